"""`probe distribution`: one output distribution, or all decisions of a run, as a document and as lines of text."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from probe.errors import RunDirectoryError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from probe.analyzers.distribution import Decision
    from probe.model.hooked import Model
    from probe.store import Run

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


@dataclass(frozen=True)
class Seen:
    """One distribution: where it is from, its logits, the token that follows, and texts of tokens where known."""

    source: dict[str, Any]
    logits: Tensor
    token: int | None = None
    texts: Any = field(default=None, repr=False)
    """Token id → text, or None."""


# -- where a distribution is from --------------------------------------------------------------------------------


def of_run(run: Run, task_id: str, passage: str | None, index: int) -> Seen:
    """A captured decision. Raises UsageError where there is none, saying what there is."""
    from probe.analyzers.distribution import decisions

    found = list(decisions(run[task_id]))
    if not found:
        raise UsageError(f"task {task_id!r}: its logits were not captured; run it again with --capture default")
    names = list(dict.fromkeys(decision.passage for decision in found))
    passage = passage or names[0]
    if passage not in names:
        raise UsageError(f"task {task_id!r}: no passage {passage!r}; there is {', '.join(names)}")
    own = [decision for decision in found if decision.passage == passage]
    if not -len(own) <= index < len(own):
        raise UsageError(f"task {task_id!r}: no decision {index}: it has {len(own)}, counted from 0")
    return _seen(own[index])


def _seen(decision: Decision) -> Seen:
    place = {"task_id": decision.task_id, "passage": decision.passage}
    place |= {"decision": decision.index, "position": decision.position}
    return Seen(place, decision.logits, decision.token)


def of_row(run: Run, model: Model, task_id: str, passage: str | None, row: int) -> Seen:
    """The distribution at a captured row, by the run's model on the run's own tokens. Raises as `of_run`."""
    import torch

    from probe.model.weights import weights_hash

    task = run[task_id]
    if weights_hash(model.hf) != run.run["model"]["weights_hash"]:
        raise RunDirectoryError(f"{model.source.name} has other weights than the model of {run.path}")
    passages = task.record.get("passages", {"main": task.record})
    passage = passage or next(iter(passages))
    if passage not in passages:
        raise UsageError(f"task {task_id!r}: no passage {passage!r}; there is {', '.join(passages)}")
    rows = task[f"{passage}/rows" if "passages" in task.record else "rows"].tolist()
    if not -len(rows) <= row < len(rows):
        raise UsageError(f"task {task_id!r}: no row {row}: it has {len(rows)}, counted from 0")
    ids, position = passages[passage]["token_ids"], rows[row]
    with torch.inference_mode():
        inputs = torch.tensor([ids[: position + 1]], device=model.device)
        logits = model.hf(input_ids=inputs, use_cache=False).logits[0, -1].float().cpu()
    following = ids[position + 1] if position + 1 < len(ids) else None
    place = {"task_id": task_id, "passage": passage, "row": row % len(rows), "position": position}
    return Seen(place, logits, following, texts_of(model))


def texts_of(model: Model) -> Any:
    return lambda token: model.tokenizer.decode([token])


# -- one distribution --------------------------------------------------------------------------------------------


def look(seen: Seen, choices: Choices, student: Seen | None = None) -> dict[str, Any]:
    """Everything about one distribution, as one document. Raises UsageError for an entropy that no τ has."""
    from probe.distribution import heat_capacity_peak

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
        "truncation": _truncated(z, choices),
        "heat_capacity_peak": {"tau": peak[0], "heat_capacity": peak[1]} if peak else None,
        "token": _token(seen, z, choices.taus) if seen.token is not None else None,
        "distillation": _distillation(z, choices.taus, student),
        "gauge": GAUGE_NOTE,
    }


def _top(seen: Seen, n: int) -> list[dict[str, Any]]:
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

    from probe.distribution import GAUGES, boltzmann, temper

    log_p, log_one = temper(z, tau).log_softmax(-1), z.log_softmax(-1)
    p = log_p.exp()
    there = p > 0
    entropy = -float((p[there] * log_p[there]).sum())
    found = {gauge: boltzmann(z, tau, gauge) for gauge in GAUGES}
    step = 1e-4 * tau
    slope = (boltzmann(z, tau + step).energy_mean - boltzmann(z, tau - step).energy_mean) / (2 * step)
    names = ("log_partition", "energy_mean", "free_energy")
    return {
        "tau": tau,
        "entropy": float(found["raw"].entropy),
        "top1": float(p.max()),
        "top1_token": int(torch.argmax(p)),
        "kl": max(0.0, float((p[there] * (log_p[there] - log_one[there])).sum())),
        "heat_capacity": float(found["raw"].heat_capacity),
        **{gauge: {name: float(getattr(b, name)) for name in names} for gauge, b in found.items()},
        "identity_error": max(abs(float(b.free_energy - b.energy_mean) + tau * entropy) for b in found.values()),
        "difference_error": abs(float(slope - found["raw"].heat_capacity)),
    }


def _wanted(z: Tensor, entropies: Sequence[float]) -> list[dict[str, float]]:
    from probe.distribution import temperature_for_entropy

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


def _truncated(z: Tensor, choices: Choices) -> list[dict[str, Any]]:
    from probe.distribution import temper, truncate

    tempered = temper(z, choices.temperature)
    return [
        {"rule": rule, "number": number, "temperature": choices.temperature}
        | asdict(truncate(tempered, rule, number))
        for rule, number in choices.used_rules
    ]


def _token(seen: Seen, z: Tensor, taus: Iterable[float]) -> dict[str, Any]:
    """The token that was emitted: its energy in both gauges, and −log p = (E − F)/τ."""
    from probe.distribution import GAUGES, cross_entropy, gauge_shift

    assert seen.token is not None
    text = {"text": seen.texts(seen.token)} if seen.texts else {}
    energy = {gauge: float(gauge_shift(z, gauge)) - float(z[seen.token]) for gauge in GAUGES}
    by_tau = [{"tau": tau, "cross_entropy": cross_entropy(z, seen.token, tau)[0]} for tau in taus]
    return {"token": seen.token, **text, "energy": energy, "by_tau": by_tau}


def _distillation(z: Tensor, taus: Iterable[float], student: Seen | None) -> dict[str, Any]:
    """The loss of a student against softened targets, with its gradient checked by automatic differentiation.

    `scaled_norm` is τ²‖gradient‖; `limit_error` the relative error of (z − v)/(Nτ²), Hinton's limit for large τ.
    """
    import torch

    from probe.distribution import distill

    other = torch.zeros_like(z) if student is None else student.logits.double()
    if other.shape != z.shape:
        raise UsageError(f"the student has {len(other)} tokens in its vocabulary, the teacher {len(z)}")
    rows = []
    limit = ((other - other.mean()) - (z - z.mean())) / len(z)
    for tau in taus:
        found = distill(other, z, tau)
        learner = other.clone().requires_grad_(True)
        loss = -((z / tau).softmax(-1) * (learner / tau).log_softmax(-1)).sum()
        (numeric,) = torch.autograd.grad(loss, learner)
        norm = float(found.gradient.norm())
        off = float((found.gradient - limit / tau**2).norm())
        row = {"tau": tau, "loss": found.loss, "kl": found.kl, "gradient_norm": norm}
        row |= {"scaled_norm": tau**2 * norm, "gradient_error": float((found.gradient - numeric).abs().max())}
        rows.append(row | ({"limit_error": off / norm} if norm > 0 and math.isfinite(off) else {}))
    return {"student": "uniform" if student is None else student.source, "by_tau": rows}


# -- all decisions of a run --------------------------------------------------------------------------------------


def survey(run: Run, choices: Choices) -> dict[str, Any]:
    """Every captured decision of the finished tasks and how each rule follows them, as one document."""
    from probe.analyzers.distribution import KINDS, decisions
    from probe.analyzers.measure import finished
    from probe.distribution import boltzmann, temper

    rows: list[dict[str, Any]] = []
    for task in finished(run, *KINDS):
        for decision in decisions(task):
            z = decision.logits.double()
            if not bool(z.max().isfinite()):
                continue
            tempered = temper(z, choices.temperature)
            seen = _seen(decision)
            row = seen.source | {
                "entropy": float(boltzmann(tempered).entropy),
                "top1": float(tempered.softmax(-1).max()),
                "truncation": _truncated(z, choices),
            }
            if seen.token is not None:
                row["token"] = _token(seen, z, [choices.temperature])
            rows.append(row)
    if not rows:
        raise UsageError(f"{run.path}: no decision's logits were captured; run it with --capture default")
    return {
        "run": str(run.path),
        "temperature": choices.temperature,
        "decisions": rows,
        "rules": [_rule_summary(rows, at) for at in range(len(choices.used_rules))],
        "fixed_k": _fixed_k(rows),
    }


def _rule_summary(rows: list[dict[str, Any]], at: int) -> dict[str, Any]:
    found = [row["truncation"][at] for row in rows]
    sizes = sorted(kept["size"] for kept in found)
    tasks = [row["task_id"] for row in rows]
    out = {"rule": found[0]["rule"], "number": found[0]["number"], "decisions": len(rows)}
    out |= {"min": sizes[0], "median": sizes[len(sizes) // 2], "max": sizes[-1]}
    for name, unit in (("size", "tokens"), ("mass", "probability"), ("kl", "nats")):
        out[name] = _over_tasks(tasks, [kept[name] for kept in found], unit)
    out["follows_entropy"] = _spearman(tasks, [row["entropy"] for row in rows], [kept["size"] for kept in found])
    return out


def _over_tasks(tasks: Sequence[str], values: Sequence[float], unit: str) -> dict[str, Any]:
    """Mean over tasks of each task's mean, with its 95 % bootstrap interval."""
    from probe.analyzers.statistics import bootstrap_mean

    by_task: dict[str, list[float]] = defaultdict(list)
    for task, value in zip(tasks, values, strict=True):
        by_task[task].append(value)
    means = [sum(own) / len(own) for own in by_task.values()]
    low, high = bootstrap_mean(means) or (None, None)
    return {"mean": sum(means) / len(means), "low": low, "high": high, "n": len(means), "unit": unit}


def _spearman(tasks: Sequence[str], x: Sequence[float], y: Sequence[float]) -> dict[str, Any] | None:
    """Rank correlation over decisions, 95 % interval from 999 resamples of tasks; None where one is constant."""
    import numpy as np
    from scipy.stats import rankdata

    a, b = np.asarray(x), np.asarray(y)

    def rho(at: np.ndarray) -> float | None:
        ranks = rankdata(a[at]), rankdata(b[at])
        return None if min(np.ptp(r) for r in ranks) == 0 else float(np.corrcoef(*ranks)[0, 1])

    value = rho(np.arange(len(a)))
    if value is None:
        return None
    names = list(dict.fromkeys(tasks))
    places = [np.flatnonzero([task == name for task in tasks]) for name in names]
    generator = np.random.default_rng(0)
    drawn = (
        rho(np.concatenate([places[i] for i in generator.integers(len(places), size=len(places))]))
        for _ in range(999)
    )
    replicates = [one for one in drawn if one is not None]
    low, high = np.quantile(replicates, [0.025, 0.975]) if len(names) > 2 else (None, None)
    interval = {"low": low if low is None else float(low), "high": high if high is None else float(high)}
    return {"spearman": value, **interval, "n": len(a), "tasks": len(names), "unit": "rank correlation"}


def _fixed_k(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each k and p: the share of decisions where k keeps fewer tokens than the nucleus, and where more."""
    kept = rows[0]["truncation"]
    tasks = [row["task_id"] for row in rows]
    out = []
    for i, fixed in enumerate(kept):
        for j, nucleus in enumerate(kept):
            if (fixed["rule"], nucleus["rule"]) != ("top-k", "top-p"):
                continue
            pairs = [(row["truncation"][i]["size"], row["truncation"][j]["size"]) for row in rows]
            too_small = _over_tasks(tasks, [float(k < size) for k, size in pairs], "share of decisions")
            too_large = _over_tasks(tasks, [float(k > size) for k, size in pairs], "share of decisions")
            numbers = {"k": fixed["number"], "p": nucleus["number"]}
            out.append(numbers | {"too_small": too_small, "too_large": too_large})
    return out
