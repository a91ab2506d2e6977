"""A student learns what soft targets say, with Hinton's gradient."""

from __future__ import annotations

import pytest
import torch

from benchmarks import distillation
from probe.maths.distribution import distill


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_is_that_of_soft_targets_times_the_square_of_the_temperature(temperature):
    student, teacher = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    student.requires_grad_()
    loss = distillation.soft_loss(student[None], teacher[None], temperature)
    (gradient,) = torch.autograd.grad(loss, student)
    expected = distill(student.detach(), teacher, temperature)
    assert float(loss.detach()) == pytest.approx(temperature**2 * expected.kl, rel=1e-5)
    assert gradient.double().numpy() == pytest.approx(temperature**2 * expected.gradient.numpy(), abs=1e-6)


def test_students_come_nearer_to_what_the_teacher_says():
    """A teacher who says the same everywhere: three of fifty tokens."""
    generator = torch.Generator().manual_seed(1)
    says = torch.zeros(50).index_fill(0, torch.tensor([3, 7, 9]), 6.0)
    rows = [(torch.randint(50, (12,), generator=generator), says.expand(12, 50).half()) for _ in range(16)]
    out = distillation.compare(rows[:8], rows[8:], distillation.Setting(steps=12, batch=3, rate=0.03))
    kl = {name: of["kl"]["value"] for name, of in out.items()}
    assert max(kl["tau_1"], kl["tau_4"]) < 0.2 * kl["untrained"]
    assert kl["tokens"] > 2 * kl["tau_1"], "the tokens of these texts say nothing of the teacher"
    assert out["tau_4_minus_tau_1"]["kl"]["value"] == pytest.approx(kl["tau_4"] - kl["tau_1"])
    assert out["tau_1"]["kl"]["n"] == 8
