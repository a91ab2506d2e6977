"""Temperature, truncation, Boltzmann quantities and soft targets against transformers, scipy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from transformers.generation import logits_process as theirs

from probe.analyzers.distribution import repetitions
from probe.capture.spec import Generation
from probe.maths.distribution import (
    GAUGES,
    TRUNCATIONS,
    TokenRanking,
    boltzmann,
    cross_entropy,
    distill,
    draw,
    gauge_shift,
    heat_capacity_peak,
    sampled,
    temper,
    temperature_for_entropy,
)
from probe.maths.statistics import distinct_share

THEIRS = {
    "top-k": theirs.TopKLogitsWarper,
    "top-p": theirs.TopPLogitsWarper,
    "min-p": theirs.MinPLogitsWarper,
    "typical": theirs.TypicalLogitsWarper,
    "epsilon": theirs.EpsilonLogitsWarper,
    "eta": theirs.EtaLogitsWarper,
}
NUMBERS = {
    "top-k": st.integers(1, 60),
    "top-p": st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.999]) | st.floats(0.01, 0.999),
    "min-p": st.sampled_from([0.0, 0.05, 0.5, 1.0]) | st.floats(0, 1),
    "typical": st.sampled_from([0.2, 0.5, 0.75, 0.95]) | st.floats(0.01, 0.99),
    "epsilon": st.sampled_from([0.02, 0.25, 3e-4]) | st.floats(1e-6, 0.9),
    "eta": st.sampled_from([0.02, 0.25, 3e-4]) | st.floats(1e-6, 0.9),
}
# Few distinct values, so that there are ties: at the border of a nucleus too.
TIED = st.lists(st.sampled_from([-3.0, 0.0, 0.0, math.log(2), 1.0, 4.0]), min_size=2, max_size=48)
FREE = st.lists(st.floats(-40, 40, width=32), min_size=2, max_size=48)
CUT = st.lists(st.sampled_from([-math.inf, 0.0, 1.0, 2.5]), min_size=2, max_size=24).filter(
    lambda z: max(z) > -math.inf
)


def z_of(*sizes: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- truncation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", TRUNCATIONS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_rule_keeps_exactly_the_tokens_that_transformers_keeps(rule, data):
    z = torch.tensor(
        data.draw(TIED | FREE | CUT), dtype=data.draw(st.sampled_from([torch.float32, torch.float64]))
    )
    number = data.draw(NUMBERS[rule])
    if rule == "epsilon" or rule == "eta":
        number = min(max(number, 1e-6), 0.99)
    expected = THEIRS[rule](number)(torch.zeros(1, 1, dtype=torch.long), z[None].clone())[0]
    actual = TRUNCATIONS[rule](z, number)
    assert torch.equal(actual, expected)
    kept = TokenRanking(z).kept(rule, number)
    stays = (expected > -math.inf).numpy()
    assert kept.size == stays.sum()
    p = special.softmax(z.double().numpy())
    assert kept.mass == pytest.approx(p[stays].sum(), abs=1e-12)
    left = p[stays] / p[stays].sum()
    assert kept.entropy == pytest.approx(stats.entropy(left), abs=1e-9)
    assert kept.kl == pytest.approx(special.rel_entr(left, p[stays]).sum(), abs=1e-9)


@pytest.mark.parametrize("rule", TRUNCATIONS)
def test_a_batch_is_truncated_row_by_row(rule):
    z = z_of(3, 5, 200).float()
    number = {"top-k": 7, "min-p": 0.1, "epsilon": 0.003, "eta": 0.003}.get(rule, 0.8)
    rows = torch.stack([torch.stack([TRUNCATIONS[rule](row, number) for row in block]) for block in z])
    assert torch.equal(TRUNCATIONS[rule](z, number), rows)


def test_the_token_that_reaches_p_belongs_to_the_nucleus_and_of_equal_tokens_only_enough_stay():
    p = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    sizes = [TokenRanking(p.log()).nucleus_size(mass) for mass in (0.3, 0.6, 0.7, 0.8, 0.9, 1.0)]
    assert sizes == [1, 2, 2, 3, 4, 4]
    assert TokenRanking(torch.zeros(10)).nucleus_size(0.45) == 5


@pytest.mark.parametrize("rule", TRUNCATIONS)
def test_a_number_out_of_range_is_refused(rule):
    for number in (-1, 0 if rule != "min-p" else -0.1, 1.5 if rule != "top-k" else 0):
        with pytest.raises(ValueError, match=rule):
            TRUNCATIONS[rule](torch.zeros(3), number)


@pytest.mark.parametrize(("n", "shares"), [(2, (1.0, 3 / 11)), (4, (1.0, 3 / 9))])
def test_of_a_text_that_goes_round_only_one_round_is_distinct(n, shares):
    once, round_and_round = list(range(12)), [5, 6, 7] * 4
    assert (distinct_share(once, n), distinct_share(round_and_round, n)) == pytest.approx(shares)
    assert math.isnan(distinct_share([1], n))


def test_only_what_the_model_wrote_is_looked_at_for_repetition():
    from types import SimpleNamespace as Made

    passage = Made(token_ids=[1, 2] * 30 + list(range(20)), n_prompt=60)

    def numbers_of(kind, reasoning="generate"):
        task = Made(typed=lambda _: Made(kind=kind), passages={"main": passage})
        run = Made(run={"options": {"reasoning": reasoning}})
        return [value for _, _, value in repetitions(run, task)]  # pyright: ignore[reportArgumentType]

    assert numbers_of("cot") == numbers_of("tool_selection", "reference") == [0, 1]
    assert numbers_of("agent") == numbers_of("cot", "reference") == []
    passage.token_ids = passage.token_ids[:70]
    assert numbers_of("cot") == [], "too short a text"


def test_a_million_draws_have_the_tempered_and_truncated_distribution():
    z = z_of(300, scale=2.0).float()
    expected = sampled(z, temperature=0.8, p=0.9, k=60).softmax(-1).double().numpy()
    generator = torch.Generator().manual_seed(0)
    n = 1_000_000
    # One draw a row; what a row is drawn by is what `probe run` draws a token by.
    shares = sampled(z, temperature=0.8, p=0.9, k=60).softmax(-1)
    tokens = torch.multinomial(shares, n, replacement=True, generator=generator)
    counts = np.bincount(tokens.numpy(), minlength=len(z))
    kept = expected > 0
    assert counts[~kept].sum() == 0 and kept.sum() < 61
    assert stats.chisquare(counts[kept], n * expected[kept] / expected[kept].sum()).pvalue > 1e-3


@pytest.mark.parametrize("n", [20_000, pytest.param(1_000_000, marks=[pytest.mark.slow])])
def test_draws_of_single_tokens_have_that_distribution_too(n):
    z = z_of(40, scale=1.5, seed=3).float()
    generator = torch.Generator().manual_seed(1)
    tokens = [draw(z, temperature=1.3, p=0.95, k=None, generator=generator) for _ in range(n)]
    counts = np.bincount(tokens, minlength=40)
    warped = theirs.TopPLogitsWarper(0.95)(torch.zeros(1, 1, dtype=torch.long), (z / 1.3)[None])[0]
    expected = warped.double().softmax(-1).numpy()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    assert stats.chisquare(counts[kept], n * expected[kept]).pvalue > 1e-3


def test_at_temperature_zero_the_most_probable_token_is_taken():
    z = z_of(40, scale=1.5, seed=3).float()
    assert draw(z, temperature=0, p=0.1, k=3, generator=torch.Generator()) == int(z.argmax())


ROWS = {
    "random": lambda n: 3 * torch.randn(n, generator=torch.Generator().manual_seed(5)),
    "peaked": lambda n: torch.zeros(n).index_fill(0, torch.tensor(n // 3), 30.0),
    "flat": lambda n: torch.zeros(n),
    "tied": lambda n: torch.randn(n, generator=torch.Generator().manual_seed(6)).round(),
    "degenerate": lambda n: torch.full((n,), -math.inf).index_fill(0, torch.tensor([7]), 1.0),
}


@pytest.mark.parametrize("rule", TRUNCATIONS)
@pytest.mark.parametrize("shape", ROWS)
def test_rules_are_transformers_at_a_vocabulary_of_256_thousand(rule, shape):
    z = ROWS[shape](256_000)
    for number in {"top-k": (1, 40, 300_000), "epsilon": (3e-4, 1e-6), "eta": (3e-4, 1e-6)}.get(
        rule, (0.1, 0.9)
    ):
        expected = THEIRS[rule](number)(torch.zeros(1, 1, dtype=torch.long), z[None].clone())[0]
        assert torch.equal(TRUNCATIONS[rule](z, number), expected)
        assert TokenRanking(z).kept(rule, number).size == int((expected > -math.inf).sum())


def test_a_run_draws_by_these_functions(monkeypatch):
    """Every token that a run draws goes through `sampled`: with it replaced, only its token is drawn."""
    from probe.maths import truncation
    from tests.conftest import tiny

    only = lambda logits, **_: torch.full_like(logits, -math.inf).index_fill(-1, torch.tensor(77), 0.0)  # noqa: E731
    monkeypatch.setattr(truncation, "sampled", only)
    outcome = tiny("tiny-llama").capture("go", sites="none", max_new_tokens=5, temperature=1.0)
    assert outcome.token_ids[-5:] == [77] * 5
    assert Generation(1).temperature == 0


# -- temperature -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.05, 0.7, 1.0, 2.5, 50.0])
def test_temperature_is_transformers_and_its_entropy_scipys(tau):
    z = z_of(1000)
    assert torch.equal(temper(z, tau), theirs.TemperatureLogitsWarper(tau)(torch.zeros(1, 1), z))
    p = special.softmax(z.numpy() / tau)
    assert float(boltzmann(z, tau).entropy) == pytest.approx(stats.entropy(p), abs=1e-10)


@pytest.mark.parametrize("wanted", [1e-6, 0.3, 1.0, 3.0, 6.0, 6.9])
def test_the_temperature_of_a_wanted_entropy_has_it(wanted):
    z = z_of(1000)
    tau = temperature_for_entropy(z, wanted)
    assert tau is not None
    assert stats.entropy(special.softmax(z.numpy() / tau)) == pytest.approx(wanted, abs=1e-8)


def test_an_entropy_that_no_temperature_has_is_none():
    z = torch.tensor([2.0, 2.0, 1.0, -math.inf])
    assert temperature_for_entropy(z, math.log(2)) is None
    assert temperature_for_entropy(z, math.log(3)) is None
    tau = temperature_for_entropy(z, 0.9)
    assert tau is not None and float(boltzmann(z, tau).entropy) == pytest.approx(0.9, abs=1e-10)
    assert temperature_for_entropy(torch.zeros(5), 1.0) is None


# -- Boltzmann -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("tau", [0.02, 0.5, 1.0, 3.0, 200.0])
def test_free_energy_is_energy_minus_temperature_times_entropy(tau, gauge):
    z = z_of(4, 5000, scale=8.0) + 30
    law = boltzmann(z, tau, gauge)
    energy = -(z - gauge_shift(z, gauge)[:, None]).numpy()
    p = special.softmax(-energy / tau, axis=-1)
    close = {"rtol": 1e-12, "atol": 1e-10}
    np.testing.assert_allclose(law.log_partition, special.logsumexp(-energy / tau, axis=-1), **close)
    np.testing.assert_allclose(law.energy_mean, (p * energy).sum(-1), **close)
    np.testing.assert_allclose(law.entropy, stats.entropy(p, axis=-1), **close)
    np.testing.assert_allclose(law.free_energy, law.energy_mean - tau * law.entropy, rtol=0, atol=1e-10)
    variance = (p * (energy - (p * energy).sum(-1, keepdims=True)) ** 2).sum(-1)
    np.testing.assert_allclose(law.heat_capacity, variance / tau**2, rtol=1e-10)


@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
def test_heat_capacity_is_the_slope_of_the_mean_energy(tau):
    z, step = z_of(2000), 1e-4 * tau
    slope = (boltzmann(z, tau + step).energy_mean - boltzmann(z, tau - step).energy_mean) / (2 * step)
    assert float(boltzmann(z, tau).heat_capacity) == pytest.approx(float(slope), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(gap=st.floats(0.1, 20), tau=st.floats(0.2, 20), shift=st.floats(-50, 50))
def test_two_levels_have_their_closed_form_and_a_gauge_moves_only_energies(gap, tau, shift):
    z = torch.tensor([0.0, -gap], dtype=torch.float64)
    first, other = boltzmann(z, tau), boltzmann(z + shift, tau)
    p = 1 / (1 + math.exp(gap / tau))
    assert float(first.energy_mean) == pytest.approx(gap * p, abs=1e-12)
    assert float(first.heat_capacity) == pytest.approx((gap / tau) ** 2 * p * (1 - p), abs=1e-12)
    assert float(first.log_partition) == pytest.approx(math.log1p(math.exp(-gap / tau)), abs=1e-12)
    assert float(other.entropy) == pytest.approx(float(first.entropy), abs=1e-10)
    assert float(other.heat_capacity) == pytest.approx(float(first.heat_capacity), abs=1e-10)
    assert float(other.energy_mean) == pytest.approx(float(first.energy_mean) - shift, abs=1e-10)
    assert float(other.free_energy) == pytest.approx(float(first.free_energy) - shift, abs=1e-10)
    assert float(other.log_partition) == pytest.approx(float(first.log_partition) + shift / tau, abs=1e-9)
    centred, moved = boltzmann(z, tau, "centred"), boltzmann(z + shift, tau, "centred")
    assert float(centred.free_energy) == pytest.approx(float(moved.free_energy), abs=1e-10)


def test_a_two_level_heat_capacity_peaks_where_schottkys_does():
    """x tanh(x/2) = 2 at the peak of (gap/τ)² p (1 − p), x = gap/τ = 2.39936, C = 0.439229."""
    peak = heat_capacity_peak(torch.tensor([0.0, -5.0], dtype=torch.float64))
    assert peak == (pytest.approx(5 / 2.399357, rel=1e-6), pytest.approx(0.4392288, rel=1e-6))
    assert heat_capacity_peak(torch.zeros(4)) is None


def test_of_several_peaks_the_highest_is_found_in_a_large_vocabulary():
    """A pair near the top gives one peak, 50,000 tokens far below another, higher one."""
    z = torch.cat([torch.tensor([30.0, 29.9]).double(), z_of(50_000, scale=1.0)])
    peak = heat_capacity_peak(z)
    grid = np.exp(np.linspace(math.log(0.01), math.log(30), 300))
    capacities = [float(boltzmann(z, tau).heat_capacity) for tau in grid]
    assert peak is not None
    assert peak[1] >= max(capacities) and peak[1] == pytest.approx(max(capacities), rel=1e-2)
    assert peak[0] == pytest.approx(grid[int(np.argmax(capacities))], rel=0.05)


def test_tokens_without_probability_have_no_energy():
    z = torch.tensor([1.0, -math.inf, 3.0, -math.inf])
    for gauge in GAUGES:
        law, reference = boltzmann(z, 0.7, gauge), boltzmann(z[[0, 2]], 0.7, gauge)
        assert float(law.entropy) == float(reference.entropy)
        assert float(law.free_energy) == float(reference.free_energy)
    alone = boltzmann(torch.tensor([-math.inf, 5.0]))
    assert (float(alone.entropy), float(alone.heat_capacity), float(alone.energy_mean)) == (0.0, 0.0, -5.0)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_cross_entropy_is_energy_minus_free_energy_over_temperature(tau):
    z = z_of(500)
    actual, energy = cross_entropy(z, 17, tau)
    oracle = torch.nn.functional.cross_entropy((z / tau)[None], torch.tensor([17]))
    assert actual == pytest.approx(float(oracle), abs=1e-10)
    assert energy == -float(z[17])


# -- distillation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0, 20.0])
def test_the_gradient_of_soft_targets_is_autograds(tau):
    student, teacher = z_of(300, seed=1), z_of(300, seed=2)
    softened = distill(student, teacher, tau)
    learner = student.clone().requires_grad_(True)
    loss = torch.nn.functional.cross_entropy((learner / tau)[None], (teacher / tau).softmax(-1)[None])
    (gradient,) = torch.autograd.grad(loss, learner)
    torch.testing.assert_close(softened.gradient, gradient, rtol=0, atol=1e-14)
    assert softened.loss == pytest.approx(float(loss.detach()), abs=1e-12)
    p, q = (special.softmax(x.numpy() / tau) for x in (teacher, student))
    assert softened.kl == pytest.approx(stats.entropy(p, q), abs=1e-12)


def test_the_gradient_of_soft_targets_falls_as_one_over_temperature_squared():
    """Hinton et al. 2015, eq. 4: (z − v)/(Nτ²) for centred logits and τ far above them; not for small τ."""
    student, teacher = z_of(300, seed=1), z_of(300, seed=2)
    limit = ((student - student.mean()) - (teacher - teacher.mean())) / len(student)
    errors = []
    for tau in (1.0, 100.0, 10_000.0):
        scaled = tau**2 * distill(student, teacher, tau).gradient
        errors.append(float((scaled - limit).norm() / limit.norm()))
    assert errors[0] > 0.5 and errors[1] < 0.1 and errors[2] < 1e-3
