"""The configuration of a run: one tree of frozen dataclasses, from strict YAML and overrides.

Every field carries its meaning in the string below it; `xopd config`, `--help` and the comments of
a dumped file are made from these strings, so they cannot drift from the code. Types and ranges are
checked when a section is built, wherever it is built: from a file, an override or Python.
"""

from __future__ import annotations

import difflib
import inspect
import math
import textwrap
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml

from xopd.schema import (
    ConfigError,
    FieldSpec,
    Range,
    Section,
    field_docstrings,
    field_specs,
    parse_text,
    read_strict_yaml,
)

__all__ = [
    "BackendChoice",
    "Config",
    "ConfigError",
    "DataConfig",
    "Dtype",
    "FieldDoc",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "RolloutConfig",
    "TrainConfig",
    "config_template",
    "config_to_dict",
    "dump_config",
    "field_docs",
    "load_config",
]


class Dtype(StrEnum):
    """Floating-point precision of a run."""

    FP32 = "fp32"
    BF16 = "bf16"


class BackendChoice(StrEnum):
    """Which implementation of the kernels a run asks for."""

    AUTO = "auto"
    REFERENCE = "reference"
    TRITON = "triton"
    NATIVE = "native"


_Count = Annotated[int, Range(1, 10_000_000)]
_CountOrZero = Annotated[int, Range(0, 10_000_000)]
_UnitFloat = Annotated[float, Range(0.0, 1.0)]
_Beta = Annotated[float, Range(0.0, 1.0, high_open=True)]


@dataclass(frozen=True)
class ModelConfig(Section):
    """Which weights are trained and which teach."""

    student: str
    """Student: folder or hub id of a speech LLM; its audio tower and adapter stay frozen."""
    teacher: str
    """Teacher: folder or hub id of a text LLM with the student's tokenizer; frozen."""
    dtype: Dtype = Dtype.FP32
    """Precision of the computation; with bf16 the student keeps fp32 master weights."""
    revision: str | None = None
    """Hub revision (commit id) of both models; null takes the default branch."""
    trust_remote_code: bool = False
    """Run Python code shipped with the model. Needs a pinned revision."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trust_remote_code and self.revision is None:
            raise ConfigError(
                "model.trust_remote_code is true but model.revision is null: pin the commit id "
                "whose code you have read in model.revision"
            )


@dataclass(frozen=True)
class DataConfig(Section):
    """Paired speech and text prompts."""

    path: str
    """Corpus folder, one set of parquet shards per split (see `xopd data synth`)."""
    train_split: str = "train"
    """Split whose prompts the student answers in training."""
    eval_split: str = "test"
    """Split of the evaluations before, during and after training."""
    eval_limit: _Count = 400
    """Prompts per evaluation; a smaller split is used whole."""


@dataclass(frozen=True)
class RolloutConfig(Section):
    """How trajectories are sampled from the student."""

    prompts_per_step: _Count = 16
    """Prompts per step (B); each is answered from speech and from text."""
    rollouts_per_prompt: _Count = 4
    """Trajectories per prompt and modality (G)."""
    max_new_tokens: Annotated[int, Range(1, 1_000_000)] = 40
    """Longest response, in tokens."""
    temperature: Annotated[float, Range(0.0, 100.0, low_open=True)] = 1.0
    """Sampling temperature; log-probabilities are taken at the same temperature."""
    batch_size: _Count = 128
    """Rows per generate call. A memory knob, but another value draws other samples."""


@dataclass(frozen=True)
class LossConfig(Section):
    """The X-OPD objective (paper, equations 1 to 5)."""

    text_weight: _UnitFloat = 0.5
    """Weight lambda of the text half: L = lambda * L_in + (1 - lambda) * L_cross."""
    clip_low: _UnitFloat = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: Annotated[float, Range(0.0, 1_000_000.0)] = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    advantage_clamp: Annotated[float, Range(0.0, 1_000_000.0, low_open=True)] = 10.0
    """Per-token advantages are clamped to [-advantage_clamp, advantage_clamp], in nats."""
    center_advantage: bool = False
    """Subtract the running mean advantage of earlier steps, for each modality apart."""
    sequence_mean: bool = True
    """Mean over the tokens of each trajectory, then over trajectories; false: over all tokens."""
    minibatches: _Count = 1
    """Optimizer steps per rollout batch. Above 1 the ratio leaves 1 and the clip acts."""


@dataclass(frozen=True)
class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    learning_rate: _UnitFloat = 2e-6
    """Learning rate before warm-up and decay are applied."""
    beta1: _Beta = 0.9
    """Decay of the first moment."""
    beta2: _Beta = 0.95
    """Decay of the second moment."""
    eps: Annotated[float, Range(0.0, 1.0, low_open=True)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: _UnitFloat = 0.0
    """Decoupled weight decay."""
    warmup_steps: _CountOrZero = 10
    """Steps of linear warm-up from 0."""
    cosine_decay: bool = True
    """Times half a cosine from 1 to 0 over all steps, warm-up included; false: no decay."""
    max_grad_norm: Annotated[float, Range(0.0, 1_000_000.0, low_open=True)] = 1.0
    """Gradients are scaled down to this global L2 norm."""


@dataclass(frozen=True)
class TrainConfig(Section):
    """The loop, and where its files go."""

    steps: _Count = 100
    """Rollout batches to train on."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Seed of prompt order and sampling; the same seed and config give the same run."""
    micro_batch: _Count = 64
    """Rollouts per forward and backward pass. A memory knob: the gradient does not depend on it."""
    eval_every: _CountOrZero = 0
    """Steps between evaluations; 0: only before and after training."""
    checkpoint_every: _CountOrZero = 20
    """Steps between checkpoints; 0: only after the last step."""
    keep_checkpoints: _Count = 2
    """How many of the newest checkpoints stay on disk."""
    out_dir: str = "runs/xopd"
    """Folder of the run: config, metrics, checkpoints, evaluations, report."""
    backend: BackendChoice = BackendChoice.AUTO
    """Kernel implementation; an explicit choice that is unavailable is an error."""
    threads: Annotated[int, Range(1, 1024)] = 2
    """CPU threads of torch."""
    tensorboard: bool = True
    """Also write TensorBoard events, where the package is installed."""


@dataclass(frozen=True)
class Config:
    """The whole tree; one section per stage."""

    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        # Each modality is dealt out to minibatches; an empty one would be a step on no data.
        rollouts = self.rollout.prompts_per_step * self.rollout.rollouts_per_prompt
        if self.loss.minibatches > rollouts:
            raise ConfigError(
                f"loss.minibatches is {self.loss.minibatches}, more than the {rollouts} rollouts "
                "of a modality (rollout.prompts_per_step * rollout.rollouts_per_prompt): lower it"
            )


_SECTIONS: Mapping[str, type[Section]] = types.MappingProxyType(
    {
        "model": ModelConfig,
        "data": DataConfig,
        "rollout": RolloutConfig,
        "loss": LossConfig,
        "optim": OptimConfig,
        "train": TrainConfig,
    }
)


class FieldDoc(NamedTuple):
    """One line of help: a field, what it takes and what it means."""

    name: str  # "loss.text_weight"
    takes: str  # "float in [0, 1]"
    default: object  # dataclasses.MISSING where the field is required
    doc: str


def load_config(path: Path | None, overrides: Sequence[str]) -> Config:
    """Reads the YAML file `path` (None: nothing but defaults), then applies `section.field=value`.

    Later overrides win over earlier ones and over the file. Raises ConfigError for an unreadable
    file, an unknown key, a wrong type, a value out of range or a required field left unset.
    """
    values: dict[str, dict[str, object]] = {name: {} for name in _SECTIONS}
    if path is not None:
        for key, given in read_strict_yaml(path).items():
            section = str(key)
            if section not in _SECTIONS:
                raise _unknown(section, list(_SECTIONS))
            if not isinstance(given, dict):
                raise ConfigError(f"{section}: expected a mapping of fields, got {given!r}")
            for leaf, value in given.items():
                values[section][_find_spec(section, str(leaf)).leaf] = value
    for override in overrides:
        name, separator, text = override.partition("=")
        section, dot, leaf = name.strip().partition(".")
        if not separator or not dot:
            raise ConfigError(f"override {override!r}: expected section.field=value")
        if section not in _SECTIONS:
            raise _unknown(section, list(_SECTIONS))
        spec = _find_spec(section, leaf)
        values[section][spec.leaf] = parse_text(spec, text.strip())
    built: dict[str, Any] = {name: _build(name, values[name]) for name in _SECTIONS}
    return Config(**built)


def config_to_dict(config: Config) -> dict[str, dict[str, bool | int | float | str | None]]:
    """The tree as plain dicts of JSON-able scalars (enum members as their text)."""
    tree: dict[str, dict[str, bool | int | float | str | None]] = {}
    for section in _SECTIONS:
        part = getattr(config, section)
        tree[section] = {}
        for item in fields(part):
            value = getattr(part, item.name)
            tree[section][item.name] = str(value) if isinstance(value, StrEnum) else value
    return tree


def dump_config(config: Config) -> str:
    """YAML text of `config` with each field's meaning as a comment; load_config reads it back."""
    tree = config_to_dict(config)
    values = {f"{name}.{leaf}": part[leaf] for name, part in tree.items() for leaf in part}
    return _render(values)


def config_template() -> str:
    """A file of all defaults with comments; required fields are null, to be filled in."""
    return _render({d.name: None if d.default is MISSING else d.default for d in field_docs()})


def field_docs() -> tuple[FieldDoc, ...]:
    """Every field in file order: name, what it takes, default and meaning."""
    found: list[FieldDoc] = []
    for section in _SECTIONS.values():
        docs = field_docstrings(section)
        for spec in field_specs(section):
            found.append(FieldDoc(spec.name, spec.takes, spec.default, docs[spec.leaf]))
    return tuple(found)


def _render(values: Mapping[str, object]) -> str:
    lines: list[str] = []
    for section, cls in _SECTIONS.items():
        docs = field_docstrings(cls)
        lines += ["", f"# {inspect.getdoc(cls)}", f"{section}:"]
        for spec in field_specs(cls):
            note = "required" if spec.default is MISSING else f"default {_scalar(spec.default)}"
            comment = f"{docs[spec.leaf]} ({spec.takes}; {note})"
            lines += textwrap.wrap(comment, 98, initial_indent="  # ", subsequent_indent="  # ")
            lines.append(f"  {spec.leaf}: {_scalar(values[spec.name])}")
    return "\n".join(lines[1:]) + "\n"


def _scalar(value: object) -> str:
    plain = str(value) if isinstance(value, StrEnum) else value
    # One-element list in flow style: the only form in which PyYAML adds no document end marker.
    text: str = yaml.safe_dump([plain], default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.strip()[1:-1]


def _build(section: str, values: dict[str, Any]) -> Section:
    for spec in field_specs(_SECTIONS[section]):
        if spec.default is MISSING and values.get(spec.leaf) is None:
            raise ConfigError(
                f"{spec.name} is required: set it in the config file or with {spec.name}=VALUE"
            )
    return _SECTIONS[section](**values)


def _find_spec(section: str, leaf: str) -> FieldSpec:
    specs = {spec.leaf: spec for spec in field_specs(_SECTIONS[section])}
    if leaf not in specs:
        raise _unknown(f"{section}.{leaf}", [spec.name for spec in specs.values()])
    return specs[leaf]


def _unknown(name: str, candidates: Sequence[str]) -> ConfigError:
    near = difflib.get_close_matches(name, candidates, n=1)
    if not near:  # perhaps the right field in the wrong section
        everywhere = {s.leaf: s.name for cls in _SECTIONS.values() for s in field_specs(cls)}
        leaf = difflib.get_close_matches(name.rpartition(".")[2], list(everywhere), n=1)
        near = [everywhere[leaf[0]]] if leaf else []
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(candidates)}"
    return ConfigError(f"unknown key {name!r}; {hint}")
