"""Memory of a rank: what stays, what a pass adds, and the peak of every stage.

A stage's peak is a sum of what exists at one moment, so a plan is as good as its list of moments.
Sharding is FSDP2 as torch 2.13 runs it: each decoder layer and the embedding are units that are
gathered when they are needed. lm_head is a unit that is gathered when it is reached and kept until
its backward pass is done: it is not there in the layers' backward pass, and as scoring has none, it
is there from the end of its first pass. What belongs to no unit is the root's and stays gathered
from the start of a pass to its end; so does a tied lm_head, which is the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from xopd.plan.activations import (
    Precision,
    backward_bytes,
    forward_bytes,
    kept_bytes,
    last_norm_bytes,
    recomputed_bytes,
)
from xopd.plan.job import Job, RolloutPlace, TeacherPlace
from xopd.plan.losses import Head, HeadWork, loss_bytes, scoring_bytes
from xopd.plan.shape import ModelShape
from xopd_kernels import Backend

BF16, FP32 = 2, 4
BACKEND = Backend.TRITON


class Line(NamedTuple):
    """A row of a table: bytes or seconds by column, and where they come from."""

    name: str
    values: tuple[float, ...]  # in the order of Head
    formula: str

    def of(self, head: Head) -> float:
        """The value of a column."""
        return self.values[list(Head).index(head)]


def same(name: str, value: float, formula: str) -> Line:
    """A line whose columns do not differ."""
    return Line(name, (value,) * len(Head), formula)


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of one GPU, and of a node's host memory."""

    resident: tuple[Line, ...]  # from step to step
    parts: tuple[Line, ...]  # of an update, beside it
    stages: tuple[Line, ...]  # peaks, what stays included
    host: Line  # of the first node, which needs most

    def peak_bytes(self, head: Head) -> float:
        """Of the stage that needs most."""
        return max(stage.of(head) for stage in self.stages)


def rank_memory(job: Job) -> RankMemory:
    """The plan of one rank; see the formula of each line."""
    resident = _resident(job)
    parts = _Parts.of(job)
    stays = sum(line.values[0] for line in resident)
    earlier = parts.gradients * (job.passes > 1)
    stages = [_rollout(job, stays), *_scoring(job, stays)]
    stages += [
        Line(
            "update, at lm_head",
            tuple(
                stays + earlier + parts.kept + parts.beside_head + parts.root + parts.head + loss
                for loss in parts.loss
            ),
            "stays + gradients (if there are several passes) + activations kept + 2 max(P_l, "
            "P_head) [a layer on its way, or what lm_head was received in] + root + lm_head + loss "
            "at lm_head",
        ),
        same(
            "update, backward pass of a layer",
            stays
            + parts.gradients
            + parts.kept
            - parts.last_norm
            + parts.layer
            + parts.inner
            + parts.gathered
            + parts.root
            + parts.unreduced,
            "stays + gradients + activations kept (without the last norm's) + one layer recomputed "
            "+ gradients inside a layer + gathered layers + root + gradients before they are "
            "reduced; lm_head is no longer gathered",
        ),
        _adam(job, stays + parts.gradients),
    ]
    return RankMemory(tuple(resident), parts.lines(job), tuple(stages), _host(job))


def fits(job: Job, head: Head) -> bool:
    """Whether every stage fits beside the reserve."""
    peak = rank_memory(job).peak_bytes(head)
    return peak + job.cluster.reserve_bytes <= job.cluster.gpu.memory_bytes


def largest_micro_batch(job: Job, head: Head) -> int:
    """The most rollouts of a pass with which the job fits; 0: not even one."""
    most, least = job.rank_rows, 0
    while least < most:
        middle = (least + most + 1) // 2
        if fits(replace(job, micro_batch=middle), head):
            least = middle
        else:
            most = middle - 1
    return least


def _host(job: Job) -> Line:
    """Host memory of the first node: what offloading moves there, and two copies of weights."""
    cluster, trained = job.cluster, job.student.trained_parameters
    size = 3.0 * FP32 * trained / cluster.nodes
    size += BF16 * trained * (job.rollout_place is RolloutPlace.COLOCATED)
    if job.offloads:
        offloaded = sum(line.values[0] for line in _shards(job)) + _gradients(job)
        size += cluster.gpus_per_node * offloaded
    return same(
        "host memory of a node",
        size,
        "12 P / nodes [a checkpoint's copy, while it is written] + 2 P on the first node [the "
        "folder in memory of an engine beside the trainer] + (16 P + 4 F + 2 P_T) / nodes if "
        "offloaded",
    )


def _gradients(job: Job) -> float:
    """A rank's shards of the gradients, wherever they are: 4 P / n."""
    return FP32 * job.student.trained_parameters / job.cluster.ranks


def _shards(job: Job) -> list[Line]:
    """What stays from step to step; offloading moves it to the host."""
    ranks, student = job.cluster.ranks, job.student
    local = job.teacher_place is TeacherPlace.LOCAL
    sizes = (
        ("weights, fp32", FP32 * student.trained_parameters, "4 P / n"),
        ("moments of AdamW, fp32", 2 * FP32 * student.trained_parameters, "8 P / n"),
        ("frozen towers, fp32", FP32 * student.frozen_parameters, "4 F / n"),
        ("teacher, bf16", BF16 * job.teacher.parameters * local, "2 P_T / n; 0 on a server"),
    )
    return [same(name, size / ranks, formula) for name, size, formula in sizes]


def _resident(job: Job) -> list[Line]:
    """What stays on the GPU; offloaded shards are listed with 0 bytes."""
    clip = FP32 * job.speech_prompt_tokens * job.student.hidden
    lines = [same(x.name, x.values[0] * (not job.offloads), x.formula) for x in _shards(job)]
    formula = "4 D times the tokens of a spoken prompt, for each clip kept (data.kept_clips)"
    return [*lines, same("embeddings of clips, fp32", float(job.kept_clips * clip), formula)]


@dataclass(frozen=True, slots=True)
class _Parts:
    """What an update adds; bytes."""

    gradients: float  # let go after each update
    kept: float
    last_norm: float  # of `kept`
    layer: float
    inner: float
    gathered: float
    beside_head: float  # gathered, while lm_head is at work
    root: float
    head: float
    unreduced: float
    loss: tuple[float, ...]

    @classmethod
    def of(cls, job: Job) -> _Parts:
        shape, precision, tokens = job.student, job.precision, job.pass_tokens
        again = job.checkpoints_activations
        sizes = (tokens, job.width_tokens, shape.vocabulary, shape.hidden)
        work = HeadWork(*sizes, precision, job.has_sparse_gradient)
        return cls(
            gradients=_gradients(job) * (not job.offloads),
            kept=kept_bytes(shape, precision, tokens, checkpoints_activations=again),
            last_norm=last_norm_bytes(shape, precision, tokens),
            layer=recomputed_bytes(shape, precision, tokens) * again,
            inner=backward_bytes(shape, precision, tokens),
            gathered=_gathered(job, shape),
            beside_head=max(_gathered(job, shape) / 2, _head(job, shape)),
            root=_student_held(job),
            head=_head(job, shape),
            unreduced=_unreduced(job),
            loss=tuple(float(loss_bytes(head, work, BACKEND)) for head in Head),
        )

    def lines(self, job: Job) -> tuple[Line, ...]:
        root = ("root: towers, bf16", "2 F_r, gathered for a whole pass; + 2 P_head if it is tied")
        if not job.is_sharded:
            root = ("bf16 copies that autocast keeps", "2 (P - embedding - experts)")
        return (
            same("gradients, fp32", self.gradients, "4 P / n, let go after each update"),
            same(
                "activations kept",
                self.kept,
                "with checkpointing N L D r + N (norm D + 2 r h), r = 2; else every layer's: see "
                "xopd/plan/activations.py",
            ),
            same("one layer, recomputed", self.layer, "what one layer saves for its backward pass"),
            same(
                "gradients inside a layer",
                self.inner,
                "experts: N (3 k 2 D + r D); dense: N 2 (2 I + 2 D)",
            ),
            same("gathered layers, bf16", self.gathered, "2 x 2 P_l: one in use, one on its way"),
            same(root[0], self.root, root[1]),
            same(
                "lm_head, bf16",
                self.head,
                "2 P_head, gathered until its backward pass is done; one rank: none, tied: the "
                "root's",
            ),
            same(
                "gradients before they are reduced",
                self.unreduced,
                "2 P_l in bf16 + 4 max(P_l, P_head) in the buffer of the last reduce-scatter, + 2 "
                "P_head if it is tied; one rank: none",
            ),
            Line(
                "loss at lm_head",
                self.loss,
                "naive: N V (4 + 4 + 4 + 4); Liger: 20 r c + 4 (r + c) D + 6 V D + 2 N D with "
                "tiles r = min(2048, T), c = 4096; ours: memory_plan(POLICY_LOSS, N, V, D, bf16, "
                f"TRITON{', with sparse lists' * job.has_sparse_gradient}); each + d_hidden and "
                "d_weight, 2 (N D + V D)",
            ),
        )


def _gathered(job: Job, shape: ModelShape) -> float:
    """Two layers in bf16: the one in use and the one on its way (forward: its receive buffer)."""
    return 2.0 * BF16 * shape.layer_parameters if job.is_sharded else 0.0


def _root(job: Job, shape: ModelShape) -> float:
    """What is gathered in bf16 for a whole pass; nothing where nothing is sharded.

    2 F_r, and a tied lm_head: as the embedding it is needed first and last.
    """
    tied = shape.head_parameters * shape.is_tied
    return BF16 * float(tied + shape.frozen_root_parameters) * job.is_sharded


def _head(job: Job, shape: ModelShape) -> float:
    """lm_head, gathered in bf16 from its forward pass to its backward pass: 2 P_head."""
    return BF16 * float(shape.head_parameters * (not shape.is_tied)) * job.is_sharded


def _student_held(job: Job) -> float:
    """The root, or on one rank the bf16 weights of linear layers that autocast keeps.

    Grouped products with experts are not autocast, and the embedding is none.
    """
    shape = job.student
    if job.is_sharded:
        return _root(job, shape)
    cast = shape.trained_parameters - shape.expert_parameters
    return BF16 * float(cast - (0 if shape.is_tied else shape.embedding_parameters))


def _unreduced(job: Job) -> float:
    """A unit's gradients are reduced behind its backward pass; the buffer waits for the next."""
    if not job.is_sharded:
        return 0.0
    shape = job.student
    layer, head = shape.layer_parameters, shape.head_parameters
    if shape.is_tied:  # gradients of lm_head wait for those of the embedding
        return float(BF16 * layer + FP32 * layer + BF16 * head)
    return float(BF16 * layer + FP32 * max(layer, head))


def _rollout(job: Job, stays: float) -> Line:
    shape = job.student
    token_bytes = BF16 * shape.cache_elements_per_token
    prompt = max(job.speech_prompt_tokens, job.text_prompt_tokens)
    if job.rollout_place is RolloutPlace.SERVER:
        return same("rollouts", stays, "stays: the engine has GPUs of its own")
    if job.rollout_place is RolloutPlace.COLOCATED:
        rows = min(job.engine_rows, job.rows)
        weights = BF16 * shape.trained_parameters / job.sampling_gpus
        cache = rows * job.width_tokens * token_bytes / job.cache_parts
        return same(
            "rollouts",
            stays + weights + cache,
            "stays + 2 P / g + rows T 2 (2 L K h) / min(g, K): the language model and the cache of "
            "rows at a time in bf16, on the GPUs of the one engine; asleep it holds nothing",
        )
    rows = min(job.generate_rows, job.rows)
    logits = BF16 * rows * prompt * shape.vocabulary + FP32 * rows * shape.vocabulary
    cache = rows * job.width_tokens * token_bytes
    passing = forward_bytes(shape, job.precision, rows * prompt)
    held = _student_held(job) + _head(job, shape)
    return same(
        "rollouts",
        stays + _gathered(job, shape) + held + cache + max(float(logits), float(passing)),
        "stays + gathered layers + root + lm_head + rows T 2 (2 L K h) + rows V (2 T_prompt + 4): "
        "transformers computes the logits of the whole prompt",
    )


class _ScoringPass(NamedTuple):
    """A forward pass that keeps nothing but the log-probs of given tokens."""

    name: str
    shape: ModelShape
    width_tokens: int
    precision: Precision
    weights: float  # gathered or cast for it, but lm_head
    head: float  # lm_head


def _scoring(job: Job, stays: float) -> list[Line]:
    """The teacher's pass and, if asked for, the student's for the old log-probs."""
    formula = (
        "stays + gathered layers + root + N D r + max(layer, lm_head + scoring), or + lm_head + "
        "max(layer, scoring) if there are several passes, as the first leaves it gathered; layer: "
        "N (4 k 2 D + 3 r D) for experts, N 2 (3 I + 3 D) dense; scoring: naive N V (4 + 4), Liger "
        "16 r c, ours memory_plan(LOGPROB)"
    )
    lines = []
    for scoring in _scoring_passes(job):
        shape, precision = scoring.shape, scoring.precision
        tokens = job.pass_rows * scoring.width_tokens
        work = HeadWork(tokens, scoring.width_tokens, shape.vocabulary, shape.hidden, precision)
        fixed = stays + scoring.weights + tokens * shape.hidden * precision.stream_size
        layer = forward_bytes(shape, precision, tokens) + scoring.head * (job.passes > 1)
        values = [
            fixed + max(layer, scoring.head + scoring_bytes(head, work, BACKEND)) for head in Head
        ]
        lines.append(Line(scoring.name, tuple(values), formula))
    return lines


def _scoring_passes(job: Job) -> list[_ScoringPass]:
    passes = []
    if job.teacher_place is TeacherPlace.LOCAL:
        shape = job.teacher
        weights = _gathered(job, shape) + _root(job, shape)
        # Its weights are bf16 themselves, on one rank too: so is its residual stream.
        width, precision = job.teacher_width_tokens, Precision.SHARDED
        name, head = "teacher's log-probs", _head(job, shape)
        passes.append(_ScoringPass(name, shape, width, precision, weights, head))
    if job.recomputes_old:
        shape = job.student
        weights = _gathered(job, shape) + _student_held(job)
        name, width = "old log-probs", job.width_tokens
        passes.append(_ScoringPass(name, shape, width, job.precision, weights, _head(job, shape)))
    return passes


def _adam(job: Job, held: float) -> Line:
    """`held`: what stays, and the gradients."""
    if job.offloads:
        return same("AdamW", held, "on the CPU, in host memory")
    if job.is_adam_fused:
        return same("AdamW", held, "stays + gradients: the fused kernel needs nothing else")
    extra = FP32 * job.student.trained_parameters / job.cluster.ranks
    formula = "stays + gradients + 4 P / n: foreach holds the roots of all moments"
    return same("AdamW", held + extra, formula)
