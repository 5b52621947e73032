"""Sampled responses with each token coloured by its advantage."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from xopd.report.inputs import Sample

_FULL_COLOUR_NATS = 3.0  # an advantage of this size or more gets the strongest colour
_STRONGEST = 0.65  # opacity; more would make the token hard to read
_FAINTEST = 0.02  # below this the token stays uncoloured
_PER_MODALITY = 6


def samples_html(samples: Sequence[Sample]) -> str:
    """Legend and samples: those of the last logged step open, those of the first folded away."""
    steps = sorted({sample.step for sample in samples})
    blocks = [_LEGEND]
    for step in dict.fromkeys([steps[-1], steps[0]]):
        chosen: list[Sample] = []
        for modality in sorted({sample.modality for sample in samples}):
            of_step = [s for s in samples if s.step == step and s.modality == modality]
            chosen += of_step[:_PER_MODALITY]
        is_open = " open" if step == steps[-1] else ""
        body = "".join(_sample_html(sample) for sample in chosen)
        blocks.append(f"<details{is_open}><summary>Step {step}</summary>{body}</details>")
    return "".join(blocks)


_LEGEND = f"""
<p>Each token is coloured by its advantage, log π<sub>T</sub> &minus; log π<sub>θ</sub>: how much
likelier the teacher finds it than the student that sampled it, as the loss saw it (clamped, and
centred where that is configured). Hover for the numbers.</p>
<div class="legend"><span>less likely to the teacher, &minus;{_FULL_COLOUR_NATS:g} nat</span>
<span class="ramp" role="img" aria-label="orange to clear to blue"></span>
<span>+{_FULL_COLOUR_NATS:g} nat, likelier</span></div>"""


def _sample_html(sample: Sample) -> str:
    verdict = {
        True: '<span class="good">✓ right</span>',
        False: '<span class="bad">✗ wrong</span>',
        None: "",
    }[sample.is_correct]
    mean = sum(sample.advantage) / max(len(sample.advantage), 1)
    tokens = " ".join(
        _token_html(*entry)
        for entry in zip(
            sample.token, sample.advantage, sample.logprob, sample.teacher_logprob, strict=True
        )
    )
    return f"""
<div class="sample card"><div class="head"><strong>{escape(sample.modality)}</strong>
<span>{escape(sample.task)}</span>{verdict}
<span class="quiet">mean advantage {mean:+.2f} nat, {len(sample.token)} tokens</span></div>
<div class="prompt">{escape(sample.prompt)}
<span class="quiet">(answer: {escape(sample.reference)})</span></div>
<div class="tokens">{tokens}</div></div>"""


def _token_html(token: str, advantage: float, logprob: float, teacher_logprob: float) -> str:
    strength = min(abs(advantage) / _FULL_COLOUR_NATS, 1.0) * _STRONGEST
    kind = "" if strength < _FAINTEST else (" up" if advantage > 0 else " down")
    numbers = f"advantage {advantage:+.3f}, student {logprob:.3f}, teacher {teacher_logprob:.3f}"
    return (
        f'<span class="token{kind}" style="--strength:{strength:.2f}" title="{numbers} nat">'
        f"{escape(token)}</span>"
    )
