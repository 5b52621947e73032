"""xopd.config and xopd.schema: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from xopd.config import (
    BackendChoice,
    Config,
    ConfigError,
    DataConfig,
    Dtype,
    LossConfig,
    ModelConfig,
    RolloutConfig,
    config_template,
    config_to_dict,
    dump_config,
    field_docs,
    load_config,
)
from xopd.schema import Section

REQUIRED = ["model.student=student", "model.teacher=teacher", "data.path=corpus"]
HEAD = "model: {student: s, teacher: t}\ndata: {path: p}\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_and_overrides() -> None:
    config = load_config(None, [*REQUIRED, "optim.learning_rate=3e-4", "loss.clip_low=0"])
    assert config.model == ModelConfig(student="student", teacher="teacher")
    assert config.optim.learning_rate == 3e-4
    assert config.loss.clip_low == 0.0
    assert isinstance(config.loss.clip_low, float)
    assert config.train.backend is BackendChoice.AUTO


def test_overrides_win_over_the_file_and_later_ones_win(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + "train: {steps: 7, seed: 5}\n")
    config = load_config(path, ["train.steps=8", "train.steps=9"])
    assert (config.train.steps, config.train.seed) == (9, 5)


def test_values_by_type(tmp_path: Path) -> None:
    text = HEAD + "optim: {learning_rate: 3e-4, eps: 1}\ntrain: {backend: triton}\n"
    config = load_config(write(tmp_path, text), ["model.dtype=bf16", "train.tensorboard=FALSE"])
    assert config.optim.learning_rate == 3e-4  # YAML 1.1 reads this one as text
    assert config.optim.eps == 1.0
    assert config.model.dtype is Dtype.BF16
    assert config.train.backend is BackendChoice.TRITON
    assert config.train.tensorboard is False


def test_revision_takes_null_in_both_notations(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {student: s, teacher: t, revision: null}\ndata: {path: p}\n")
    assert load_config(path, []).model.revision is None
    assert load_config(path, ["model.revision=abc"]).model.revision == "abc"
    assert load_config(path, ["model.revision=null"]).model.revision is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.text_wieght=1", "unknown key 'loss.text_wieght'; did you mean 'loss.text_weight'?"),
        ("lss.text_weight=1", "unknown key 'lss'; did you mean 'loss'?"),
        ("loss.learning_rate=1", "did you mean 'optim.learning_rate'?"),
        ("loss.zzz=1", "known here: loss.text_weight, loss.clip_low"),
        ("loss.text_weight=1.5", "loss.text_weight: expected float in [0, 1], got '1.5'"),
        ("loss.text_weight=nan", "loss.text_weight: expected float in [0, 1], got 'nan'"),
        ("optim.beta1=1", "optim.beta1: expected float in [0, 1), got '1'"),
        ("optim.eps=0", "optim.eps: expected float in (0, 1], got '0'"),
        ("train.steps=0", "train.steps: expected int in [1, 10000000], got 0"),
        ("train.steps=1e3", "train.steps: expected int in [1, 10000000], got '1e3'"),
        ("train.tensorboard=1", "train.tensorboard: expected bool, got '1'"),
        ("train.backend=cuda", "expected auto | reference | triton | native, got 'cuda'"),
        ("model.student=", "model.student: expected non-empty text, got ''"),
        ("model.trust_remote_code=true", "pin the commit id"),
        ("rollout.prompts_per_step", "expected section.field=value"),
        ("steps=3", "expected section.field=value"),
    ],
)
def test_refused_overrides(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*REQUIRED, override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "train: {steps: true}", "train.steps: expected int in [1, 10000000], got True"),
        (HEAD + "train: {steps: 3.0}", "train.steps: expected int in [1, 10000000], got 3.0"),
        (HEAD + "train: {steps: '3'}", "train.steps: expected int in [1, 10000000], got '3'"),
        (HEAD + "optim: {eps: true}", "optim.eps: expected float in (0, 1], got True"),
        (HEAD + "optim: {eps: .inf}", "optim.eps: expected float in (0, 1], got inf"),
        (HEAD + "loss: 3", "loss: expected a mapping of fields, got 3"),
        (HEAD + "train:\n  seed: 1\n  seed: 2", "config.yaml:5: key 'seed' appears twice"),
        (HEAD + "loss: &a {clip_low: 0.1}\noptim: *a", "aliases are not allowed"),
        (HEAD + "x: [[[[[1]]]]]", "nested deeper"),
        (HEAD + "train: {seed: !!python/object/apply:os.getpid []}", "not valid YAML"),
        ("model: {student: 3, teacher: t}\ndata: {path: p}", "model.student: expected non-empty"),
        ("model: {student: s}\ndata: {path: p}", "model.teacher is required"),
        ("- 1", "expected a mapping of sections, got list"),
        ("a: [", "not valid YAML"),
        ("seed: 2020-99-99", "not valid YAML"),
    ],
)
def test_refused_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), [])
    assert message in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config"):
        load_config(tmp_path / "absent.yaml", [])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read the config"):
        load_config(tmp_path / "binary.yaml", [])
    with pytest.raises(ConfigError, match="1000001 bytes, more than 1000000"):
        load_config(write(tmp_path, "#" * 1_000_001), [])


@dataclasses.dataclass(frozen=True)
class AnyConfig(Section):
    number: float = 0.0


@pytest.mark.parametrize("value", ["nan", "inf", float("-inf"), 10**400])
def test_a_float_is_finite_even_where_no_range_says_so(value: float) -> None:
    with pytest.raises(ConfigError, match=r"any\.number: expected float, got"):
        AnyConfig(number=value)


def test_deep_nesting_is_refused_before_recursion(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nested deeper"):
        load_config(write(tmp_path, "[" * 100_000), [])


def test_python_callers_are_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"loss\.clip_low: expected float in \[0, 1\], got 2"):
        LossConfig(clip_low=2)
    config = load_config(None, REQUIRED)
    with pytest.raises(ConfigError, match="more than the 2 rollouts"):
        dataclasses.replace(
            config,
            rollout=RolloutConfig(prompts_per_step=2, rollouts_per_prompt=1),
            loss=LossConfig(minibatches=3),
        )
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.loss.clip_low = 0.1  # type: ignore[misc]


def test_dump_reads_back_and_explains(tmp_path: Path) -> None:
    config = Config(
        model=ModelConfig(student="a: b # c", teacher="null", dtype=Dtype.BF16, revision="1e3"),
        data=DataConfig(path="ünïcode, [x] 'y' \"z\"" + "long " * 40),
        loss=LossConfig(text_weight=1 / 3, clip_low=1e-7),
    )
    text = dump_config(config)
    assert load_config(write(tmp_path, text), []) == config
    assert "# Weight lambda of the text half" in text
    assert max(len(line) for line in text.splitlines() if line.lstrip().startswith("#")) <= 98


def test_template_holds_every_field_and_asks_for_the_required_ones(tmp_path: Path) -> None:
    path = write(tmp_path, config_template())
    with pytest.raises(ConfigError, match=r"model\.student is required"):
        load_config(path, [])
    assert load_config(path, REQUIRED) == load_config(None, REQUIRED)


def test_every_field_has_a_doc_and_sections_are_named_after_their_class() -> None:
    config = load_config(None, REQUIRED)
    docs = {doc.name: doc.doc for doc in field_docs()}
    names = [f"{s}.{leaf}" for s, part in config_to_dict(config).items() for leaf in part]
    assert list(docs) == names
    assert type(config_to_dict(config)["model"]["dtype"]) is str
    assert all(doc.endswith(".") for doc in docs.values())
