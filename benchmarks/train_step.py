"""How many tokens of one X-OPD step fit into a memory, and how long the step takes, by loss.

One step of a transformer of the given size (random weights): the teacher, a second one of the same
size, scores every token without a gradient; the student's forward pass, its clipped policy loss on
the reverse-KL advantage, and the backward pass. Without an optimizer, whose memory does not depend
on the loss. Losses: materialised logits, TRL, Liger, ours.

The peak is taken from torch's own record of every allocation, over what is there before the step.
On CUDA a step that runs out of memory does not fit, on a CPU one whose recorded peak is over it.

examples:
  python -m benchmarks.train_step --smoke
  python -m benchmarks.train_step --layers 4 --dim 1024 --vocab 151936 --memory-gb 8
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xopd_bench.clock import Clock
from xopd_bench.measure import Limits
from xopd_bench.memory import peak, recorded
from xopd_bench.record import append, origin
from xopd_kernels import linear_logprob, linear_policy_loss

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
Score = Callable[[Tensor, Tensor, Tensor], Tensor]  # (hidden, weight, target) -> logprob [N]
# (hidden, weight, target, teacher_logprob) -> loss
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sizes:
    """The transformer."""

    layers: int
    dim: int
    vocab_size: int
    context: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Way:
    """One library's way from hidden states to the teacher's scores and to the loss."""

    name: str
    score: Score
    loss: Loss


def ways() -> Iterator[Way]:
    """Those that can run here; the reason for the others is printed."""
    yield Way("logits", _logits_score, _clipped(_logits_score))
    try:
        from trl.kernels import ChunkedLogProbFunction

        def trl(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            arguments = (hidden, weight, None, target, 1.0, 32_768, None, 1.0, ())
            out: Tensor = ChunkedLogProbFunction.apply(*arguments)[0]  # type: ignore[no-untyped-call]
            return out

        yield Way("TRL chunked", trl, _clipped(trl))
    except ImportError as error:
        _skip("TRL chunked", error)
    try:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
            LigerFusedLinearScaledCrossEntropyFunction as Scaled,
        )

        def liger(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            out = Scaled.apply(hidden, weight, target)
            return -(out if isinstance(out, Tensor) else out[0])

        yield Way("Liger scaled CE", liger, _clipped(liger))
    except ImportError as error:
        _skip("Liger scaled CE", error)
    yield Way("ours", _our_score, _our_loss)


def _skip(name: str, error: ImportError) -> None:
    print(json.dumps({"way": name, "absent": str(error)}), file=sys.stderr)


def _logits_score(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = nn.functional.linear(hidden, weight).float()
    return logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1)


def _clipped(score: Score) -> Loss:
    """The clipped-ratio loss on top of log-probs, in plain torch."""

    def loss(hidden: Tensor, weight: Tensor, target: Tensor, teacher_logprob: Tensor) -> Tensor:
        logprob = score(hidden, weight, target)
        advantage = (teacher_logprob - logprob.detach()).clamp(-10.0, 10.0)
        ratio = (logprob - logprob.detach()).exp()
        clipped = ratio.clamp(0.8, 1.2)
        return -torch.minimum(ratio * advantage, clipped * advantage).mean()

    return loss


def _our_score(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, target).logprob


def _our_loss(hidden: Tensor, weight: Tensor, target: Tensor, teacher_logprob: Tensor) -> Tensor:
    # 1/N in token_weight: the loss is a sum, and the backward pass has nothing left to scale.
    share = torch.full_like(teacher_logprob, 1.0 / len(target))
    return linear_policy_loss(
        hidden, weight, target, teacher_logprob=teacher_logprob, token_weight=share
    ).loss


class Step:
    """Student and teacher, and one training step of them."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self._sizes, self._device = sizes, device
        self._student, self._teacher = (self._model(seed) for seed in (0, 1))
        self._teacher.requires_grad_(requires_grad=False)

    def _model(self, seed: int) -> Any:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        sizes, heads = self._sizes, max(1, self._sizes.dim // 128)
        config = Qwen3Config(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.dim,
            intermediate_size=3 * sizes.dim,
            num_hidden_layers=sizes.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=sizes.dim // heads,
            use_cache=False,
            tie_word_embeddings=False,
        )
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).to(self._device, sizes.dtype)
        model.gradient_checkpointing_enable()
        return model.train()

    def run(self, way: Way, tokens: int) -> tuple[float, float]:
        """One step over that many tokens: the loss, and the norm of the head's gradient.

        Gradients are released with the next one.
        """
        context = min(tokens, self._sizes.context)
        shape = tokens // context, context
        rng = torch.Generator().manual_seed(3)
        ids = torch.randint(self._sizes.vocab_size, shape, generator=rng).to(self._device)
        target = ids.roll(-1, 1).flatten()
        self._student.zero_grad(set_to_none=True)
        with torch.no_grad():
            hidden = self._teacher.model(ids).last_hidden_state.flatten(0, 1)
            teacher_logprob = way.score(hidden, self._teacher.lm_head.weight, target)
            del hidden
        hidden = self._student.model(ids).last_hidden_state.flatten(0, 1)
        loss = way.loss(hidden, self._student.lm_head.weight, target, teacher_logprob)
        loss.backward()
        return float(loss.detach()), float(self._student.lm_head.weight.grad.norm())

    def free(self) -> None:
        """Release the gradients of the last step."""
        self._student.zero_grad(set_to_none=True)
        gc.collect()

    def peak_bytes(self, way: Way, tokens: int) -> int | None:
        """The most memory of a step beside the two models; None if it ran out."""
        self.free()
        try:
            _, sizes = recorded(lambda: self.run(way, tokens), self._device)
        except torch.OutOfMemoryError:
            return None
        finally:
            self.free()
        return peak(sizes, {}, {}).total_bytes


def most_tokens(fits: Callable[[int], bool], unit: int, limit: int) -> int:
    """The most multiples of `unit` that fit, at most `limit`; 0 if one does not.

    Doubles until it does not fit, then halves the interval: memory grows with the tokens.
    """
    if not fits(unit):
        return 0
    low, high = unit, 2 * unit
    while high <= limit and fits(high):
        low, high = high, 2 * high
    if high > limit:
        high = limit + unit
    while high - low > unit:
        middle = (low + high) // 2 // unit * unit
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fitting_tokens(step: Step, way: Way, given: argparse.Namespace) -> int:
    """The most tokens of a step within the memory."""

    def fits(tokens: int) -> bool:
        used = step.peak_bytes(way, tokens)
        shown = "out of memory" if used is None else f"peak {used / 1e6:,.1f}"
        budget = f"{given.memory_gb * 1e3:,.1f} MB"
        print(f"{way.name}: {tokens} tokens: {shown} of {budget}", file=sys.stderr, flush=True)
        return used is not None and used <= given.memory_gb * 1e9

    return most_tokens(fits, given.unit, given.most)


def measure(step: Step, way: Way, tokens: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Peak, time, loss and gradient of a step of that many tokens."""
    used = step.peak_bytes(way, tokens)
    clock = Clock(device)
    times_ms = sorted(clock.milliseconds(lambda: step.run(way, tokens)) for _ in range(rounds))
    loss, d_weight_norm = step.run(way, tokens)
    step.free()
    return {
        "tokens": tokens,
        "peak_bytes": used,
        "median_ms": times_ms[len(times_ms) // 2],
        "loss": loss,
        "d_weight_norm": d_weight_norm,
    }


def disagreeing(lines: list[dict[str, Any]], tolerance: float) -> list[str]:
    """Ways whose loss or gradient is not that of most others."""
    measured = [line for line in lines if line["median_ms"] is not None]
    wrong: list[str] = []
    for name in ("loss", "d_weight_norm") if measured else ():
        middle = sorted(line[name] for line in measured)[len(measured) // 2]
        for line in measured:
            if not abs(line[name] - middle) <= tolerance * abs(middle):
                wrong.append(f"{line['way']}: {name} {line[name]:.6g}, others {middle:.6g}")
    return wrong


def table(lines: list[dict[str, Any]]) -> str:
    """A row for each way; tokens as a multiple of those of materialised logits."""
    step = f"step of {lines[0]['tokens']} tokens, ms"
    rows = [
        f"| loss | tokens that fit | x logits | {step} | peak, MB |",
        "|---|---:|---:|---:|---:|",
    ]
    base = next(x["fitting_tokens"] for x in lines if x["way"] == "logits")
    for line in lines:
        more = f"{line['fitting_tokens'] / base:.2f}" if base else "-"
        most = f"{'>= ' if line['is_limit'] else ''}{line['fitting_tokens']:,}"
        time = "-" if line["median_ms"] is None else f"{line['median_ms']:,.0f}"
        memory = "-" if line["peak_bytes"] is None else f"{line['peak_bytes'] / 1e6:,.0f}"
        rows.append(f"| {line['way']} | {most} | {more} | {time} | {memory} |")
    return "\n".join(rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--smoke", action="store_true", help="a tiny transformer; seconds")
    add("--layers", type=int, default=4, help="default: %(default)s")
    add("--dim", type=int, default=1024, help="hidden size (default: %(default)s)")
    add("--vocab", type=int, default=151_936, help="classes (default: %(default)s)")
    add("--context", type=int, default=1024, help="tokens of a sequence (default: %(default)s)")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, float32 on a CPU")
    help_text = "beside the two models (default: %(default)s)"
    add("--memory-gb", type=float, default=8.0, metavar="GB", help=help_text)
    help_text = "of the step that is timed (default: as many as fit with every loss)"
    add("--tokens", type=int, help=help_text)
    add("--unit", type=int, default=1024, help="tokens are tried in multiples (default: 1024)")
    add("--most", type=int, default=65_536, help="no more tokens are tried (default: %(default)s)")
    add("--rounds", type=int, default=3, help="timed steps (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="append JSON lines")
    given = parser.parse_args()
    if given.smoke:
        given.layers, given.dim, given.vocab, given.context = 1, 64, 4000, 32
        given.memory_gb, given.unit, given.most = 0.006, 32, 1024
    for name in ("layers", "dim", "vocab", "context", "memory_gb", "tokens", "unit", "rounds"):
        if getattr(given, name) is not None and getattr(given, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    if given.unit % given.context or (given.tokens or 0) % given.context:
        parser.error("--unit and --tokens must be multiples of --context: whole sequences")
    return given


def main() -> int:
    """Measure every way and print the table."""
    given = _parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[given.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    sizes = Sizes(given.layers, given.dim, given.vocab, given.context, dtype)
    step = Step(sizes, device)
    if device.type == "cuda":
        held = torch.cuda.memory_allocated()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, (held + given.memory_gb * 1e9) / total), device
        )
    about = {
        **origin(device, Limits(given.rounds, 0.0, 0.0)),
        "layers": given.layers,
        "dim": given.dim,
        "vocab_size": given.vocab,
        "context": given.context,
        "dtype": str(dtype).removeprefix("torch."),
        "memory_gb": given.memory_gb,
    }
    known = list(ways())
    most = {way.name: fitting_tokens(step, way, given) for way in known}
    # At the most tokens that fit every way: with few, the transformer takes all of the time.
    tokens = given.tokens or min((count for count in most.values() if count), default=0)
    nothing = {"tokens": tokens, "peak_bytes": None, "median_ms": None}
    lines = []
    for way in known:
        fits = 0 < tokens <= most[way.name]
        found = measure(step, way, tokens, given.rounds, device) if fits else nothing
        count = most[way.name]
        line = {"way": way.name, "fitting_tokens": count, "is_limit": count == given.most}
        lines.append(line | found)
        if given.output is not None:
            append(given.output, {**about, **lines[-1]})
    print(table(lines))
    wrong = disagreeing(lines, 0.05 if dtype == torch.bfloat16 else 1e-3)
    if wrong:
        print(f"not the same step: {'; '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
