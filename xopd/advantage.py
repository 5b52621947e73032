"""The reverse-KL advantage outside the kernels: the teacher's side and its baseline.

The kernel forms A_t = clamp(log pi_T(y_t | x_text, y_<t) - log pi_theta(y_t | x, y_<t)) from
``teacher_logprob`` while it computes the student's log-prob. A constant b that does not depend on
the sampled tokens lowers the variance of A - b; it enters by shifting ``teacher_logprob``, before
the clamp. b is a running mean of A per modality over *earlier* steps: it costs no extra pass. With
a token mean it leaves the expected gradient alone (the score function has mean zero); with
sequence means, weighted by 1/|y|, it adds a slight pressure on the length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from xopd.types import Modality, Rollout

DECAY = 0.8  # of the running mean: about the last five steps count


@dataclass(frozen=True, slots=True)
class Baseline:
    """Running mean advantage per modality, in nats; None until a first step was seen."""

    text: float | None = None
    speech: float | None = None

    def of(self, modality: Modality) -> float:
        value = self.text if modality is Modality.TEXT else self.speech
        return 0.0 if value is None else value

    def updated(self, modality: Modality, mean_advantage: float) -> Baseline:
        """The baseline after a step whose uncentred mean advantage was ``mean_advantage``."""
        name = "text" if modality is Modality.TEXT else "speech"
        old = getattr(self, name)
        new = mean_advantage if old is None else DECAY * old + (1 - DECAY) * mean_advantage
        return replace(self, **{name: new})


def centred(rollout: Rollout, baseline: Baseline) -> Rollout:
    """The rollout with its teacher log-probs shifted so that the advantage becomes A - b."""
    if rollout.teacher_logprob is None:
        raise ValueError("rollout has no teacher_logprob; score it with the teacher first.")
    return replace(rollout, teacher_logprob=rollout.teacher_logprob - baseline.of(rollout.modality))
