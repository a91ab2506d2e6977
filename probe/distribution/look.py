"""One output distribution, or many of them, as one document: plain values that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from probe.distribution.source import Distribution
from probe.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

TAUS = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0, 10.0)
ENTROPIES = (0.5, 1.0, 2.0, 4.0)
RULES = {
    "top-p": (0.5, 0.9, 0.95, 0.99),
    "top-k": (1, 10, 40),
    "min-p": (0.05,),
    "typical": (0.95,),
    "epsilon": (3e-4,),
    "eta": (3e-4,),
}
"""What is shown where no rule is asked for. Cutoffs of epsilon and eta as in Hewitt et al. 2022."""
GAUGE_NOTE = (
    "z → z + c moves ⟨E⟩ and F by −c and log Z by c/τ, and no probability: compare them across positions or models "
    "in the centred gauge only, differences and C in either."
)


@dataclass(frozen=True)
class Choices:
    """What to compute. `rules` are (name in `TRUNCATIONS`, number), applied at `temperature`."""

    taus: tuple[float, ...] = TAUS
    entropies: tuple[float, ...] = ()
    rules: tuple[tuple[str, float], ...] = ()
    temperature: float = 1.0

    @property
    def used_rules(self) -> list[tuple[str, float]]:
        return list(self.rules) or [(rule, number) for rule, numbers in RULES.items() for number in numbers]


# -- one distribution --------------------------------------------------------------------------------------------


def look(seen: Distribution, choices: Choices, student: Distribution | None = None) -> dict[str, Any]:
    """Everything about one distribution, as one document. Raises UsageError for an entropy that no τ has."""
    from probe.maths.distribution import heat_capacity_peak

    z = seen.logits.double()
    if not bool(z.max().isfinite()):
        raise UsageError(f"{seen.source}: its logits are not finite")
    peak = heat_capacity_peak(z)
    return {
        "source": seen.source,
        "d_vocab": len(z),
        "top": _top(seen, 10),
        "temperature": [_at(z, tau) for tau in choices.taus],
        "wanted": _wanted(z, choices.entropies),
        "truncation": _truncated(seen.logits, choices),
        "heat_capacity_peak": {"tau": peak[0], "heat_capacity": peak[1]} if peak else None,
        "token": _token(seen, z, choices.taus) if seen.token is not None else None,
        "distillation": _distillation(z, choices.taus, student),
        "gauge": GAUGE_NOTE,
    }


def _top(seen: Distribution, n: int) -> list[dict[str, Any]]:
    log_p = seen.logits.double().log_softmax(-1)
    best = log_p.topk(min(n, len(log_p)))
    rows = []
    for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        text = {"text": seen.texts(token)} if seen.texts else {}
        rows.append({"token": token, "probability": math.exp(value), "log_prob": value} | text)
    return rows


def _at(z: Tensor, tau: float) -> dict[str, Any]:
    """One τ: the distribution, both gauges, and two checks of them.

    `identity_error` is |F − (⟨E⟩ − τS)| with S = −Σ p log p, the larger of both gauges; `difference_error` is
    |d⟨E⟩/dτ − C| with a central difference.
    """
    import torch

    from probe.maths.distribution import GAUGES, boltzmann, temper

    log_p, log_base = temper(z, tau).log_softmax(-1), z.log_softmax(-1)
    p = log_p.exp()
    support = p > 0
    entropy = -float((p[support] * log_p[support]).sum())
    laws = {gauge: boltzmann(z, tau, gauge) for gauge in GAUGES}
    step = 1e-4 * tau
    slope = (boltzmann(z, tau + step).energy_mean - boltzmann(z, tau - step).energy_mean) / (2 * step)
    names = ("log_partition", "energy_mean", "free_energy")
    return {
        "tau": tau,
        "entropy": float(laws["raw"].entropy),
        "top1": float(p.max()),
        "top1_token": int(torch.argmax(p)),
        "kl": max(0.0, float((p[support] * (log_p[support] - log_base[support])).sum())),
        "heat_capacity": float(laws["raw"].heat_capacity),
        **{gauge: {name: float(getattr(b, name)) for name in names} for gauge, b in laws.items()},
        "identity_error": max(
            abs(float(b.free_energy - b.energy_mean) + tau * entropy) for b in laws.values()
        ),
        "difference_error": abs(float(slope - laws["raw"].heat_capacity)),
    }


def _wanted(z: Tensor, entropies: Sequence[float]) -> list[dict[str, float]]:
    from probe.maths.distribution import temperature_for_entropy

    rows = []
    for wanted in entropies or ENTROPIES:
        tau = temperature_for_entropy(z, wanted)
        if tau is not None:
            rows.append({"entropy": wanted, "tau": tau})
        elif entropies:
            raise UsageError(
                f"no temperature has an entropy of {wanted:g} nats: it grows with τ from the logarithm of the number "
                f"of equally likely best tokens to log {len(z)} = {math.log(len(z)):.3f}"
            )
    return rows


def _truncated(logits: Tensor, choices: Choices) -> list[dict[str, Any]]:
    """What each rule keeps, decided in float32 as in sampling."""
    from probe.maths.distribution import TokenRanking, temper

    ranked = TokenRanking(temper(logits.float(), choices.temperature))
    place = {"temperature": choices.temperature}
    return [
        {"rule": rule, "number": number, **place, **asdict(ranked.kept(rule, number))}
        for rule, number in choices.used_rules
    ]


def _token(seen: Distribution, z: Tensor, taus: Iterable[float]) -> dict[str, Any]:
    """The token that was emitted: its energy in both gauges, and −log p = (E − F)/τ."""
    from probe.maths.distribution import GAUGES, cross_entropy, gauge_shift

    assert seen.token is not None
    text = {"text": seen.texts(seen.token)} if seen.texts else {}
    energy = {gauge: float(gauge_shift(z, gauge)) - float(z[seen.token]) for gauge in GAUGES}
    by_tau = [{"tau": tau, "cross_entropy": cross_entropy(z, seen.token, tau)[0]} for tau in taus]
    return {"token": seen.token, **text, "energy": energy, "by_tau": by_tau}


def _distillation(z: Tensor, taus: Iterable[float], student: Distribution | None) -> dict[str, Any]:
    """The loss of a student against softened targets, with its gradient checked by automatic differentiation.

    `scaled_norm` is τ²‖gradient‖; `limit_error` the relative error of (z − v)/(Nτ²), Hinton's limit for large τ.
    """
    import torch

    from probe.maths.distribution import distill

    other = torch.zeros_like(z) if student is None else student.logits.double()
    if other.shape != z.shape:
        raise UsageError(f"the student has {len(other)} tokens in its vocabulary, the teacher {len(z)}")
    rows = []
    limit = ((other - other.mean()) - (z - z.mean())) / len(z)
    for tau in taus:
        softened = distill(other, z, tau)
        learner = other.clone().requires_grad_(True)
        loss = -((z / tau).softmax(-1) * (learner / tau).log_softmax(-1)).sum()
        (numeric,) = torch.autograd.grad(loss, learner)
        norm = float(softened.gradient.norm())
        off = float((softened.gradient - limit / tau**2).norm())
        row = {"tau": tau, "loss": softened.loss, "kl": softened.kl, "gradient_norm": norm}
        row |= {
            "scaled_norm": tau**2 * norm,
            "gradient_error": float((softened.gradient - numeric).abs().max()),
        }
        rows.append(row | ({"limit_error": off / norm} if norm > 0 and math.isfinite(off) else {}))
    return {"student": "uniform" if student is None else student.source, "by_tau": rows}


# -- many distributions ------------------------------------------------------------------------------------------


def survey(places: Iterable[Distribution], choices: Choices) -> dict[str, Any]:
    """Every distribution and how each rule follows them; intervals are over tasks (texts)."""
    from probe.maths.distribution import boltzmann, temper

    rows: list[dict[str, Any]] = []
    for seen in places:
        z = seen.logits.double()
        if not bool(z.max().isfinite()):
            continue
        state = boltzmann(temper(z, choices.temperature))
        row = seen.source | {
            "entropy": float(state.entropy),
            "top1": math.exp(float(z.max() / choices.temperature - state.log_partition)),
            "truncation": _truncated(seen.logits, choices),
        }
        if seen.token is not None:
            row["token"] = _token(seen, z, [choices.temperature])
        rows.append(row)
    if not rows:
        raise UsageError("no decision's logits were captured: run the tasks with --capture default")
    return {
        "temperature": choices.temperature,
        "decisions": rows,
        "rules": [_rule_summary(rows, at) for at in range(len(choices.used_rules))],
        "fixed_k": _fixed_k(rows),
    }


def _rule_summary(rows: list[dict[str, Any]], at: int) -> dict[str, Any]:
    from probe.analyzers.distribution import mean_over_tasks, spearman_over_tasks

    truncations = [row["truncation"][at] for row in rows]
    sizes = sorted(kept["size"] for kept in truncations)
    tasks = [row["task_id"] for row in rows]
    out = {"rule": truncations[0]["rule"], "number": truncations[0]["number"], "decisions": len(rows)}
    out |= {"min": sizes[0], "median": sizes[len(sizes) // 2], "max": sizes[-1]}
    for name, unit in (("size", "tokens"), ("mass", "probability"), ("kl", "nats")):
        pairs = [(task, kept[name]) for task, kept in zip(tasks, truncations, strict=True)]
        out[name] = mean_over_tasks(pairs, shares=name == "mass") | {"unit": unit}
    entropies = [row["entropy"] for row in rows]
    sizes_by_task = [
        (task, h, kept["size"]) for task, h, kept in zip(tasks, entropies, truncations, strict=True)
    ]
    rho = spearman_over_tasks(sizes_by_task)
    out["follows_entropy"] = rho and rho | {"unit": "rank correlation"}
    return out


def _fixed_k(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Shares of decisions where k keeps fewer tokens than the nucleus of p, and where more, for each k and p."""
    from probe.analyzers.distribution import mean_over_tasks

    kept = rows[0]["truncation"]
    tasks = [row["task_id"] for row in rows]
    out = []
    for i, fixed in enumerate(kept):
        for j, nucleus in enumerate(kept):
            if (fixed["rule"], nucleus["rule"]) != ("top-k", "top-p"):
                continue
            pairs = [(row["truncation"][i]["size"], row["truncation"][j]["size"]) for row in rows]
            shares = {
                name: mean_over_tasks(
                    [(task, float(wrong(*p))) for task, p in zip(tasks, pairs, strict=True)], shares=True
                )
                | {"unit": "share of decisions"}
                for name, wrong in (("too_small", lambda k, n: k < n), ("too_large", lambda k, n: k > n))
            }
            numbers = {"k": fixed["number"], "p": nucleus["number"]}
            out.append(numbers | shares)
    return out
