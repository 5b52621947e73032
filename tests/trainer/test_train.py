"""The loop: files, resume to the bit, kills, refusals, and that the student really learns."""

from __future__ import annotations

import copy
import hashlib
import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.telling import tell
from xopd.cli import main
from xopd.config import Config, config_to_dict, dump_config, load_config
from xopd.guards import check_pair
from xopd.metrics import read_jsonl
from xopd.models import SpeechLM, TextLM, load_student
from xopd.models.speech_lm import leaf_modules
from xopd.rollout import Request, Sampled, generate
from xopd.run import RunError, exclusive, save_speech_lm
from xopd.step import minibatches
from xopd.train import TrainError, train
from xopd.types import Modality, Prompt, Rollout

TEXT, SPEECH = Modality.TEXT, Modality.SPEECH
MakeConfig = Callable[..., Config]
TIMINGS = {
    *("sync_s", "rollout_s", "teacher_s", "update_s"),
    *("tokens_per_s", "tflop_s", "peak_memory_gb"),
}

# Everything that a step can depend on: two minibatches, a baseline, Adam's moments, a schedule.
STATEFUL = (
    "loss.minibatches=2",
    "loss.center_advantage=true",
    "train.micro_batch=4",
    "train.checkpoint_every=1",
    "train.keep_checkpoints=9",
)


def fingerprint(run: Path) -> dict[str, Any]:
    """What a run computed: the student's bytes, every metric but the times, samples, accuracy."""
    metrics = [
        {name: value for name, value in line.items() if name not in TIMINGS}
        for line in read_jsonl(run / "metrics.jsonl")
    ]
    return {
        "student": sha256(run / "student" / "model.safetensors"),
        "metrics": metrics,
        "samples": (run / "samples.jsonl").read_text(),
        "before": json.loads((run / "eval" / "before.json").read_text()),
        "after": json.loads((run / "eval" / "after.json").read_text()),
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig) -> Path:
    """An uninterrupted run of the stateful config."""
    return train(make_config(tmp_path_factory.mktemp("whole") / "run", *STATEFUL))


def test_a_run_writes_its_files(whole: Path) -> None:
    found = {p.relative_to(whole).as_posix() for p in whole.rglob("*") if p.is_file()}
    expected = {
        *("config.yaml", "metrics.jsonl", "samples.jsonl", "eval/before.json", "eval/after.json"),
        *("student/model.safetensors", "student/config.json", "student/tokenizer.json"),
        "student/preprocessor_config.json",
        "checkpoints/step_000004/shard-00001-model-00001-of-00001.safetensors",
        "checkpoints/step_000004/state.json",
        "checkpoints/step_000004/manifest.json",
    }
    assert expected <= found
    assert not [name for name in found if "tmp" in name or name.endswith((".bin", ".pt"))]
    lines = read_jsonl(whole / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        for name in ("loss", "grad_norm", "learning_rate", "kl_text", "kl_speech", *TIMINGS):
            assert isinstance(line[name], (int, float)), name
    assert any(line["clip_fraction_text"] > 0 for line in lines)  # the ratio leaves 1
    samples = read_jsonl(whole / "samples.jsonl")
    assert {sample["step"] for sample in samples} == {0, 2, 3}
    for sample in samples:
        lengths = {len(sample[k]) for k in ("token", "advantage", "logprob", "teacher_logprob")}
        assert len(lengths) == 1


def test_evaluation_records(whole: Path) -> None:
    record = json.loads((whole / "eval" / "after.json").read_text())
    assert (record["step"], record["split"], record["count"]) == (4, "test", 4)
    assert set(record["probes"]) == {"transcribe", "speaker", "speed"}
    assert {"speech", "text", "teacher_text", "held_out_voice"} <= set(record)


def test_the_audio_tower_stays_and_the_language_model_moves(whole: Path, student: SpeechLM) -> None:
    trained = load_student(str(whole / "student"))
    for leaf, moves in (("audio_tower", False), ("visual", False), ("lm_head", True)):
        (before,) = leaf_modules(student.model, [leaf])
        (after,) = leaf_modules(trained.model, [leaf])
        after_state = after.state_dict()
        same = [torch.equal(v, after_state[k]) for k, v in before.state_dict().items()]
        assert not any(same) if moves else all(same), leaf
    (before, after) = (
        leaf_modules(lm.model, ["layers"])[-1].state_dict() for lm in (student, trained)
    )
    assert not all(torch.equal(v, after[k]) for k, v in before.items())


def cut(whole: Path, config: Config, done: int) -> None:
    """A copy of a finished run in the config's folder, as if killed after `done` of four steps."""
    run = Path(config.train.out_dir)
    shutil.copytree(whole, run)
    for step in range(done + 1, 5):
        shutil.rmtree(run / "checkpoints" / f"step_{step:06d}")
    shutil.rmtree(run / "student")
    (run / "eval" / "after.json").unlink()
    (run / "config.yaml").write_text(dump_config(config))


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_resume_equals_the_uninterrupted_run(
    whole: Path, make_config: MakeConfig, tmp_path: Path, done: int
) -> None:
    """As if killed right after the checkpoint of step ``done``, later metrics already written."""
    run = tmp_path / "run"
    config = make_config(run, *STATEFUL)
    cut(whole, config, done)
    assert train(config) == run
    assert fingerprint(run) == fingerprint(whole)


AHEAD = (*STATEFUL, "rollout.engine=vllm", "rollout.max_staleness=1")


def test_a_run_that_samples_one_step_ahead_resumes_to_the_bit(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint holds what was sampled ahead, with weights that are gone by then."""
    tell(monkeypatch, 0.0)
    whole = train(make_config(tmp_path / "whole", *AHEAD))
    lines = read_jsonl(whole / "metrics.jsonl")
    assert [line["staleness"] for line in lines] == [0, 1, 1, 1]
    for done in range(4):
        config = make_config(tmp_path / f"cut_{done}", *AHEAD)
        cut(whole, config, done)
        assert fingerprint(train(config)) == fingerprint(whole)


@pytest.mark.parametrize("seed", [0, 1])
def test_kill_and_the_same_command_again(
    whole: Path, make_config: MakeConfig, tmp_path: Path, seed: int
) -> None:
    """SIGKILL at a random instant, twice; then the command runs to its end."""
    rng = random.Random(seed)
    run = tmp_path / "run"
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(make_config(run, *STATEFUL)))
    context = multiprocessing.get_context("forkserver")
    # Imports once for all children; each child is a process of its own all the same.
    context.set_forkserver_preload(["xopd.train", "xopd.models.demo", "xopd.report"])
    killed = 0
    for steps in (0, rng.choice([1, 2, 3])):
        child = context.Process(target=main, args=(["train", str(file)],))
        child.start()
        wait_for_steps(run, steps, child.is_alive)
        time.sleep(rng.uniform(0.0, 0.3))
        child.kill()
        child.join()
        killed += child.exitcode == -9
    assert killed == 2
    assert main(["train", str(file)]) == 0
    assert fingerprint(run) == fingerprint(whole)
    assert (run / "report.html").exists()


def wait_for_steps(run: Path, steps: int, is_running: Callable[[], bool]) -> None:
    """Until the run has logged so many steps, or its process has ended."""

    def logged() -> int:
        path = run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    deadline_s = time.monotonic() + 300  # a child on a busy machine takes a minute to import torch
    while is_running() and logged() < steps:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_another_config_in_the_same_folder_is_refused(whole: Path, make_config: MakeConfig) -> None:
    before = fingerprint(whole)
    with pytest.raises(RunError, match=r"optim\.learning_rate: 0\.001 -> 0\.002"):
        train(make_config(whole, *STATEFUL, "optim.learning_rate=2e-3"))
    assert fingerprint(whole) == before


def test_a_foreign_folder_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match=r"not empty and holds no config\.yaml"):
        train(make_config(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_loss_that_is_not_finite_stops_the_run(
    make_config: MakeConfig, teacher: TextLM, tmp_path: Path
) -> None:
    broken, folder = copy.deepcopy(teacher.model), tmp_path / "teacher"
    with torch.no_grad():
        broken.lm_head.weight[7] = torch.nan
    for part in broken, teacher.tokenizer:
        part.save_pretrained(folder)
    with pytest.raises(TrainError, match=r"loss nan .* not finite in 2 updates in a row"):
        train(
            make_config(tmp_path / "run", f"model.teacher={folder}", "train.max_skipped_updates=1")
        )
    (line,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")[:1]
    assert (line["loss"], line["skipped_updates"]) == (None, 1)
    assert not (tmp_path / "run" / "student").exists()
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


@pytest.mark.parametrize(("weight", "kept", "dropped"), [(1, TEXT, SPEECH), (0, SPEECH, TEXT)])
def test_lambda_one_or_zero_drops_a_modality(
    make_config: MakeConfig, tmp_path: Path, weight: int, kept: Modality, dropped: Modality
) -> None:
    config = make_config(tmp_path / "run", f"loss.text_weight={weight}", "train.steps=1")
    (line,) = read_jsonl(train(config) / "metrics.jsonl")
    assert f"kl_{kept.value}" in line
    assert f"kl_{dropped.value}" not in line
    assert line["tokens"] == pytest.approx(6 * line[f"length_{kept.value}"])


@torch.no_grad()
def exact_kl(student: SpeechLM, teacher: TextLM, rows: list[Rollout]) -> float:
    """Mean KL(student || teacher) in nats over the response tokens of text rollouts.

    The student is the policy that samples: no mass on reserved ids.
    """
    total, tokens = 0.0, 0
    allowed = [i for i in range(student.lm_head.out_features) if i not in student.reserved_ids]
    for row in rows:
        ids = torch.tensor([row.prompt.text_ids + row.response_ids])
        position = torch.arange(ids.shape[1])[None]
        first = len(row.prompt.text_ids) - 1
        z_p, z_q = (
            lm.model(
                inputs_embeds=lm.model.get_input_embeddings()(ids),
                position_ids=position,
                use_cache=False,
            ).logits[0, first:-1]
            for lm in (student, teacher)
        )
        log_p = z_p[:, allowed].log_softmax(-1)
        log_q = z_q.log_softmax(-1)[:, allowed]
        total += float((log_p.exp() * (log_p - log_q)).sum())
        tokens += len(row.response_ids)
    return total / tokens


def sharpen(student: SpeechLM, teacher: TextLM) -> None:
    """Make the pair as a trained one: no mass on reserved ids, and a student with four bad habits.

    Along the mean hidden state, reserved rows of both heads go down and four of the student's up.
    """
    with torch.no_grad():
        hidden = teacher.model.model(input_ids=torch.arange(71)[None]).last_hidden_state[0].mean(0)
        direction = hidden / hidden.norm() ** 2
        rows = teacher.model.lm_head.weight.shape[0]
        teacher.model.lm_head.weight[[*student.reserved_ids, *range(71, rows)]] -= 12 * direction
        student.lm_head.weight.copy_(teacher.model.lm_head.weight)
        student.lm_head.weight[20:24] += 6 * direction


def test_training_lowers_the_exact_kl_to_the_teacher(
    make_config: MakeConfig,
    new_student: SpeechLM,
    teacher: TextLM,
    prompts: list[Prompt],
    tmp_path: Path,
) -> None:
    sharp = TextLM(copy.deepcopy(teacher.model), teacher.tokenizer)
    sharpen(new_student, sharp)
    save_speech_lm(new_student, tmp_path / "student")
    for part in sharp.model, sharp.tokenizer:
        part.save_pretrained(tmp_path / "teacher")
    responses = generate(
        new_student,
        prompts[:12],
        TEXT,
        max_new_tokens=12,
        temperature=1.0,
        seeds=range(12),
    )
    rows = [
        Rollout(prompt, TEXT, response, is_finished=False)
        for prompt, response in zip(prompts, responses, strict=False)
    ]
    config = make_config(
        tmp_path / "run",
        f"model.student={tmp_path / 'student'}",
        f"model.teacher={tmp_path / 'teacher'}",
        "loss.text_weight=1",
        "train.steps=15",
        "rollout.prompts_per_step=8",
        "rollout.rollouts_per_prompt=4",
        "optim.learning_rate=3e-4",
    )
    run = train(config)
    before = exact_kl(check_pair(new_student, sharp), sharp, rows)
    after = exact_kl(check_pair(load_student(str(run / "student")), sharp), sharp, rows)
    assert before > 0.5
    assert after < 0.5 * before


def test_minibatches_hold_both_modalities() -> None:
    modalities = [TEXT] * 5 + [SPEECH] * 4
    rows = [Sampled(Request(i, m, i), 3, (1,), True) for i, m in enumerate(modalities)]
    parts = minibatches(rows, 2)
    assert sorted(map(id, rows)) == sorted(id(row) for part in parts for row in part)
    counts = [[sum(r.modality is m for r in part) for m in (TEXT, SPEECH)] for part in parts]
    assert counts == [[3, 2], [2, 2]]


def test_the_config_in_the_folder_is_the_resolved_one(whole: Path, make_config: MakeConfig) -> None:
    written = load_config(whole / "config.yaml", [])
    assert config_to_dict(written) == config_to_dict(make_config(whole, *STATEFUL))


def test_a_second_process_is_kept_out(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    with exclusive(tmp_path / "run"), pytest.raises(RunError, match="in use by another process"):
        train(config)
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


def test_an_out_dir_that_is_a_file_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(RunError, match=r"train\.out_dir"):
        train(make_config(tmp_path / "run"))


def test_the_logged_kl_is_the_true_one_with_a_baseline(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """At learning rate 0 the rollouts of both runs are the same; only the baseline differs."""
    logged = []
    for name, center in (("plain", "false"), ("centred", "true")):
        config = make_config(
            tmp_path / name, f"loss.center_advantage={center}", "optim.learning_rate=0"
        )
        logged.append(read_jsonl(train(config) / "metrics.jsonl"))
    keys = ("kl_text", "kl_speech")
    plain, centred = ([[line[key] for key in keys] for line in lines] for lines in logged)
    assert plain == centred
    losses = [[line["loss"] for line in lines] for lines in logged]
    assert losses[0] != losses[1]  # the baseline did act


def test_memory_knobs_may_change_on_resume(make_config: MakeConfig, tmp_path: Path) -> None:
    run = train(make_config(tmp_path / "run"))
    (run / "eval" / "after.json").unlink()
    assert train(make_config(tmp_path / "run", "train.micro_batch=2")) == run


def test_sigterm_saves_and_the_same_command_goes_on(
    whole: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    """Told to end in its second step, with checkpoints only at the end: nothing is lost."""
    run = tmp_path / "run"
    file = tmp_path / "config.yaml"
    rare = [o for o in STATEFUL if not o.startswith("train.checkpoint_every")]
    file.write_text(dump_config(make_config(run, *rare)))
    child = subprocess.Popen(
        [sys.executable, "-m", "xopd", "train", str(file)], stderr=subprocess.PIPE, text=True
    )
    wait_for_steps(run, 1, lambda: child.poll() is None)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=30)
    assert child.returncode == 143
    assert "stopped by SIGTERM after step" in said
    assert "the same command resumes" in said
    (saved,) = (run / "checkpoints").iterdir()
    assert saved.name in ("step_000001", "step_000002", "step_000003")
    assert main(["train", str(file)]) == 0
    assert fingerprint(run) == fingerprint(whole)
