"""The demo's teacher and base student from nothing, in three stages on the CPU.

1. Text pre-training: a Qwen3 decoder learns to solve the world's written problems step by step.
2. Audio alignment: the thinker's audio tower learns to name, every 80 ms, the word being spoken,
   against the frozen text embeddings (word timings come from the synthesiser).
3. Base student: the whole thinker learns to transcribe, to name speaker and speed, and sees a
   small pool of spoken problems. It hears well and reasons well from text, but reasons worse from
   speech: the gap that X-OPD closes.

Test and dev prompts are never seen here: problems are drawn from the train bucket only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from xopd.config import OptimConfig
from xopd.data.corpus import SpokenPrompt, decode_audio, log_mel
from xopd.data.world import PROBES, Probe, Problem, answer_of, draw
from xopd.head import IGNORE, Head, fused_head
from xopd.models.demo import build_student, build_teacher, copy_language_model
from xopd.models.prompting import speech_prompt, text_prompt
from xopd.models.speech_lm import AUDIO_LEAVES, SpeechLM, TextLM, audio_token_count, leaf_modules
from xopd.optimizer import build_optimizer, learning_rate
from xopd.scoring import embed, layout, positions
from xopd.types import Modality, Prompt, Rollout
from xopd_kernels import LinearLogprob, linear_logprob

Log = Callable[[str, int, float], None]  # stage, step, loss


@dataclass(frozen=True, slots=True)
class Stage:
    """Length, batch and peak learning rate of one stage."""

    steps: int
    batch: int
    learning_rate: float


TEACHER = Stage(steps=700, batch=96, learning_rate=3e-3)
ALIGN = Stage(steps=300, batch=32, learning_rate=3e-3)
BASE = Stage(steps=900, batch=48, learning_rate=1e-3)


@dataclass(frozen=True, slots=True)
class BaseMixture:
    """What the base student sees; the shares of a batch add up with the transcriptions to 1."""

    text_problem: float = 0.10
    spoken_problem: float = 0.15
    probe: float = 0.35  # speaker and speed, half each
    spoken_problem_pool: int = 200  # distinct spoken problems: few, so that a gap remains


def nll(lm: SpeechLM | TextLM, rows: Sequence[Rollout]) -> Tensor:
    """Mean negative log-likelihood per response token, through ``linear_logprob``."""
    batch = layout(rows, lm)

    def op(hidden: Tensor, head: Head, values: Sequence[Tensor]) -> LinearLogprob:
        return linear_logprob(hidden, head.weight, values[0], bias=head.bias)

    with fused_head(lm.model, op, [batch.target]):
        found: LinearLogprob = lm.model(
            inputs_embeds=embed(lm, batch), position_ids=positions(batch), use_cache=False
        ).logits
    return -found.logprob.sum() / int((batch.target != IGNORE).sum())


def _optimize(
    name: str,
    stage: Stage,
    parameters: Sequence[nn.Parameter],
    loss_of_step: Callable[[], Tensor],
    log: Log,
) -> None:
    config = OptimConfig(learning_rate=stage.learning_rate, beta2=0.98, warmup_steps=30)
    optimizer = build_optimizer(parameters, config)
    for step in range(stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage.steps, config)
        loss = loss_of_step()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        log(name, step, float(loss.detach()))


def _answer(tokenizer: PreTrainedTokenizerFast, words: str) -> tuple[int, ...]:
    ids = tokenizer(words, add_special_tokens=False).input_ids
    return (*ids, int(tokenizer.eos_token_id))


def _text_row(tokenizer: PreTrainedTokenizerFast, problem: Problem) -> Rollout:
    ids = text_prompt(tokenizer, problem.text)
    prompt = Prompt("", problem.task, ids, (), torch.empty(0), problem.text, problem.answer)
    return Rollout(prompt, Modality.TEXT, _answer(tokenizer, problem.solution), is_finished=True)


def train_teacher(
    tokenizer: PreTrainedTokenizerFast, *, seed: int, log: Log, stage: Stage = TEACHER
) -> TextLM:
    """Stage 1: a text LM that solves written problems by worked solutions."""
    teacher = TextLM(build_teacher(tokenizer, seed), tokenizer)
    rng = random.Random(f"teacher/{seed}")

    def loss() -> Tensor:
        return nll(teacher, [_text_row(tokenizer, draw(rng)) for _ in range(stage.batch)])

    _optimize("teacher", stage, list(teacher.model.parameters()), loss, log)
    return teacher


@dataclass(frozen=True, slots=True)
class Clip:
    """One utterance of the alignment split with its features."""

    record: SpokenPrompt
    features: np.ndarray  # [n_mels, frames] fp32


def load_clips(student: SpeechLM, records: Sequence[SpokenPrompt]) -> list[Clip]:
    """Log-mel features of every record."""
    features = log_mel([decode_audio(r) for r in records], student.feature_extractor)
    return [Clip(r, f) for r, f in zip(records, features, strict=True)]


def spoken_word_of_embedding(clip: Clip, tokenizer: PreTrainedTokenizerFast) -> Tensor:  # [A]
    """For each audio embedding, the id of the word spoken at its centre (pad id: silence).

    Embedding i covers 80 ms, 13 of them 1 s; the word is the last one that began by then.
    """
    words = list(zip(clip.record.text.split(), clip.record.word_start_ms, strict=True))
    ids = []
    for i in range(audio_token_count(clip.features.shape[1])):
        second, slot = divmod(i, 13)
        centre_ms = 1000 * second + 80 * slot + 60
        begun = [word for word, start_ms in words if start_ms <= centre_ms]
        ids.append(
            tokenizer.convert_tokens_to_ids(begun[-1]) if begun else int(tokenizer.pad_token_id)
        )
    return torch.tensor(ids)


def align_tower(
    student: SpeechLM, clips: Sequence[Clip], *, seed: int, log: Log, stage: Stage = ALIGN
) -> None:
    """Stage 2: audio embeddings move to the text embedding of the word being spoken.

    Cross-entropy over cosine similarities (scale 16) to the frozen table, plus a weak pull of the
    norms towards the table's mean norm.
    """
    table = student.model.get_input_embeddings().weight.detach()
    direction, norm = F.normalize(table, dim=-1), table.norm(dim=-1).mean()
    (tower,) = leaf_modules(student.model, AUDIO_LEAVES)
    label = {id(c): spoken_word_of_embedding(c, student.tokenizer) for c in clips}
    rng = random.Random(f"align/{seed}")

    def loss() -> Tensor:
        batch = rng.sample(list(clips), stage.batch)
        audio = torch.cat(student.encode_audio([c.features for c in batch]))
        target = torch.cat([label[id(c)] for c in batch])
        scores = 16.0 * F.normalize(audio, dim=-1) @ direction.T
        pull: Tensor = (audio.norm(dim=-1) - norm).square().mean()
        return F.cross_entropy(scores, target) + 1e-2 * pull

    _optimize("align", stage, list(tower.parameters()), loss, log)


def train_base(
    student: SpeechLM,
    clips: Sequence[Clip],
    *,
    seed: int,
    log: Log,
    stage: Stage = BASE,
    mixture: BaseMixture = BaseMixture(),
) -> None:
    """Stage 3: transcription, speaker and speed, few spoken problems, some written ones."""
    rng = random.Random(f"base/{seed}")
    pool = clips[: mixture.spoken_problem_pool]
    transcribe = next(p for p in PROBES if p.name == "transcribe")
    voice = [p for p in PROBES if p is not transcribe]

    def spoken() -> tuple[Clip, Probe | None]:
        share = rng.random() * (1.0 - mixture.text_problem)
        if share < mixture.spoken_problem:
            return rng.choice(pool), None
        if share < mixture.spoken_problem + mixture.probe:
            return rng.choice(clips), rng.choice(voice)
        return rng.choice(clips), transcribe

    def loss() -> Tensor:
        written = sum(rng.random() < mixture.text_problem for _ in range(stage.batch))
        rows = [_text_row(student.tokenizer, draw(rng)) for _ in range(written)]
        drawn = [spoken() for _ in range(stage.batch - written)]
        embeddings = student.encode_audio([clip.features for clip, _ in drawn])
        for (clip, probe), audio in zip(drawn, embeddings, strict=True):
            rows.append(_speech_row(student, clip.record, probe, audio))
        return nll(student, rows)

    trained = [p for n, p in student.model.named_parameters() if "visual" not in n.split(".")]
    _optimize("base", stage, trained, loss, log)


def _speech_row(
    student: SpeechLM, record: SpokenPrompt, probe: Probe | None, audio: Tensor
) -> Rollout:
    words = record.solution if probe is None else answer_of(probe, record)
    question = "" if probe is None else probe.question
    ids = speech_prompt(student.tokenizer, student.audio_id, audio.shape[0], question)
    prompt = Prompt(record.id, record.task, (), ids, audio, record.text, record.answer)
    return Rollout(prompt, Modality.SPEECH, _answer(student.tokenizer, words), is_finished=True)


def make_base_pair(
    tokenizer: PreTrainedTokenizerFast,
    records: Sequence[SpokenPrompt],
    *,
    seed: int,
    log: Log,
) -> tuple[TextLM, SpeechLM]:
    """All three stages: the teacher and the base student."""
    teacher = train_teacher(tokenizer, seed=seed, log=log)
    student = build_student(tokenizer, seed + 1)
    if not isinstance(teacher.model, Qwen3ForCausalLM):
        raise TypeError(f"teacher is {type(teacher.model).__name__}, expected Qwen3ForCausalLM")
    copy_language_model(teacher.model, student)
    clips = load_clips(student, records)
    align_tower(student, clips, seed=seed, log=log)
    train_base(student, clips, seed=seed, log=log)
    return teacher, student
