"""Soft targets: a student trained on a teacher's tempered distribution (Hinton et al. 2015, section 2)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from probe.maths.truncation import temper


@dataclass(frozen=True)
class Distillation:
    """A student's soft cross-entropy with a teacher's softened distribution, and its gradient."""

    loss: float
    """−Σ p log q, nats, both at τ."""
    kl: float
    """KL(p‖q), nats."""
    gradient: Tensor
    """∂loss/∂(student logits) = (q − p)/τ, float64 [d_vocab]; times τ² it keeps its size as τ grows."""


def distill(
    student: Float[Tensor, " d_vocab"], teacher: Float[Tensor, " d_vocab"], temperature: float
) -> Distillation:
    """Soft targets p = softmax(v/τ) against q = softmax(z/τ) (Hinton et al. 2015, section 2), in float64."""
    if student.shape != teacher.shape:
        raise ValueError(f"vocabularies differ: {student.shape[-1]} and {teacher.shape[-1]} tokens")
    log_q = temper(student.double(), temperature).log_softmax(-1)
    log_p = temper(teacher.double(), temperature).log_softmax(-1)
    p = log_p.exp()
    support = p > 0
    loss = -float((p[support] * log_q[support]).sum())
    kl = max(0.0, float((p[support] * (log_p[support] - log_q[support])).sum()))
    return Distillation(loss, kl, (log_q.exp() - p) / temperature)
