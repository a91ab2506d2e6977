"""What the trainings of a sweep say of the claim that a low rank keeps the base's knowledge and hardly overfits.

At the end of training, rank is confounded with how far each training got. Ranks are therefore also compared where
they have the same loss and where they moved equally far, read off each trajectory by linear interpolation between
its measured points. Differences are paired by seed (the same order of lines); intervals are Student's t over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from probe.training.lora.sweep import FULL, Sweep

CLAIM = (
    "a low rank preserves the base model's knowledge and hardly overfits, while a high rank buys more complex, "
    "distributed changes and expressive power at a high risk of overfitting"
)
KEPT, HARDLY = 1.05, 0.1
"""What is called kept: perplexity on unrelated text at most 5 % above the base's; and hardly overfitted:
validation above training loss by at most 0.1 nats a token, beyond what it was before training."""

ENOUGH = 3
"""Seeds below which nothing is decided."""

Trained = dict[str, Any]
Reading = Callable[[Trained], float | None]


def findings(sweep: Sweep, low: int | None = None) -> dict[str, Any]:
    """The document of a sweep: by method at the end and at matched places, comparisons and the verdict."""
    setting = sweep.setting
    trained = {method: _usable(sweep.finished(method)) for method in setting.methods()}
    trained = {method: runs for method, runs in trained.items() if runs}
    ranks = sorted(int(method[1:]) for method in trained if method != FULL)
    places = _places([run for runs in trained.values() for run in runs])
    summary = {
        "claim": CLAIM,
        "setting": asdict(setting),
        "places": places,
        "methods": [_method(sweep, method, runs, places) for method, runs in trained.items()],
        "comparisons": [],
        "says": "not decided",
        "verdict": [],
        "notes": _notes(sweep, trained),
        "trajectories": {
            method: [{"seed": run["cell"]["seed"], "points": run["points"]} for run in runs]
            for method, runs in trained.items()
        },
        "singular_values": {
            method: runs[0]["spectra"]["singular_values"] for method, runs in trained.items()
        },
    }
    if not ranks:
        return summary
    lowest = low if low in ranks else 4 if 4 in ranks else ranks[0]
    others = [f"r{ranks[-1]}"] if ranks[-1] != lowest else []
    others += [FULL] if FULL in trained else []
    for other in others:
        summary["comparisons"] += _compared(f"r{lowest}", other, trained)
    summary["verdict"] = _verdicts(f"r{lowest}", others, trained, summary["comparisons"])
    summary["says"] = overall([part for part in summary["verdict"] if part["of_claim"]])
    return summary


def interval(values: Sequence[float], unit: str) -> dict[str, Any] | None:
    """Mean and 95 % interval over seeds (none for one seed)."""
    if not values:
        return None
    n, mean = len(values), sum(values) / len(values)
    estimate = {"value": mean, "low": None, "high": None, "n": n, "unit": unit}
    if n > 1:
        import scipy.stats

        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
        half = float(scipy.stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
        estimate.update(low=mean - half, high=mean + half)
    return estimate


def read_at(points: Sequence[dict[str, float]], key: str, by: str, target: float) -> float | None:
    """`key` where `by` first reaches `target`, linear between the measured points; None where it never does."""
    for before, after in zip(points, points[1:], strict=False):
        a, b = before[by], after[by]
        if a != b and min(a, b) <= target <= max(a, b):
            share = (target - a) / (b - a)
            return before[key] * (1 - share) + after[key] * share
    return None


def _usable(runs: list[Trained]) -> list[Trained]:
    """Those that did not diverge, with the gap at every point."""
    return [{**run, "points": with_gap(run["points"])} for run in runs if not run["diverged"]]


def with_gap(points: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Points with `gap`: how much further apart validation and training loss are than before training, where they
    differ because some lines are harder than others."""
    gaps = [{**point, "gap": point["validation_loss"] - point["train_loss"]} for point in points]
    return [{**point, "gap": point["gap"] - gaps[0]["gap"]} for point in gaps]


def _last(key: str) -> Reading:
    return lambda run: run["points"][-1][key]


def _places(runs: Sequence[Trained]) -> dict[str, float]:
    """Where these trainings can be compared: the furthest that each of them reached."""
    if not runs:
        return {}
    furthest = {
        by: max(min(point[by] for point in run["points"]) for run in runs)
        for by in ("train_loss", "validation_loss")
    }
    furthest["frobenius_norm"] = min(max(point["frobenius_norm"] for point in run["points"]) for run in runs)
    return furthest


def _readings(places: dict[str, float]) -> dict[str, tuple[str, str, Reading]]:
    """Name → (quantity, place, how to read it off a training)."""
    readings: dict[str, tuple[str, str, Reading]] = {}
    for key in ("base_kl", "log_perplexity_ratio", "gap"):
        readings[f"{key} at the end"] = (key, "end", _last(key))
        for by in ("train_loss", "validation_loss", "frobenius_norm"):
            if key == "gap" and by == "validation_loss":
                continue  # at equal validation loss the gap is the training loss alone: how well it was learned by heart
            readings[f"{key} at {by}"] = (key, by, _at(key, by, places[by]))
    return readings


def _at(key: str, by: str, target: float) -> Reading:
    return lambda run: read_at(run["points"], key, by, target)


def _method(sweep: Sweep, method: str, runs: list[Trained], places: dict[str, float]) -> dict[str, Any]:
    """One row of the table: everything at the end, and what is kept and overfitted at matched places."""
    end: dict[str, Any] = {}
    for key, unit in (
        ("train_loss", "nats/token"),
        ("validation_loss", "nats/token"),
        ("gap", "nats/token"),
        ("base_kl", "nats/token"),
        ("frobenius_norm", "weight"),
    ):
        end[key] = interval([run["points"][-1][key] for run in runs], unit)
    end["perplexity_ratio"] = interval([_ratio(run["points"][-1]) for run in runs], "ratio")
    end["best_validation_loss"] = interval([_best(run) for run in runs], "nats/token")
    end["rise"] = interval([run["points"][-1]["validation_loss"] - _best(run) for run in runs], "nats/token")
    for key, unit in (
        ("stable_rank", "rank"),
        ("effective_rank", "rank"),
        ("cauchy_schwarz_ratio", "share"),
        ("nuclear_norm", "weight"),
        ("intruder_dimensions", "directions/matrix"),
    ):
        values = [run["spectra"][key] for run in runs if key in run["spectra"]]
        end[key] = interval(values, unit)
    matched = {}
    for name, (_, place, read) in _readings(places).items():
        if place != "end":
            matched[name] = interval(
                [value for run in runs if (value := read(run)) is not None], "nats/token"
            )
    return {
        "method": method,
        "rate": sweep.chosen(method),
        "parameters": runs[0]["parameters"],
        "n": len(runs),
        "end": end,
        "matched": matched,
        "seconds": sum(run["seconds"] for run in runs),
    }


def _best(run: Trained) -> float:
    return min(point["validation_loss"] for point in run["points"])


def _ratio(point: dict[str, float]) -> float:
    return math.exp(min(point["log_perplexity_ratio"], 700.0))


def _compared(low: str, high: str, trained: dict[str, list[Trained]]) -> list[dict[str, Any]]:
    """high − low, paired by seed, at places that both reached."""
    pairs = _pairs(trained[low], trained[high])
    if not pairs:
        return []
    places = _places([run for pair in pairs for run in pair])
    comparisons = []
    for key, place, read in _readings(places).values():
        values = [(read(a), read(b)) for a, b in pairs]
        differences = [b - a for a, b in values if a is not None and b is not None]
        if (difference := interval(differences, "nats/token")) is not None:
            at = None if place == "end" else places[place]
            comparisons.append(
                {"low": low, "high": high, "quantity": key, "place": place, "at": at, **_named(difference)}
            )
    for key, unit, sign in (
        ("effective_rank", "rank", 1),
        ("train_loss", "nats/token", -1),
        ("best", "nats/token", -1),
    ):
        values = [sign * (_of(b, key) - _of(a, key)) for a, b in pairs]
        if (difference := interval(values, unit)) is not None:
            comparisons.append(
                {"low": low, "high": high, "quantity": key, "place": "end", "at": None, **_named(difference)}
            )
    return comparisons


def _named(difference: dict[str, Any]) -> dict[str, Any]:
    return {"difference": difference, "says": decided(difference)}


def _of(run: Trained, key: str) -> float:
    if key == "best":
        return _best(run)
    return run["spectra"].get(key, 0.0) if key == "effective_rank" else run["points"][-1][key]


def _pairs(first: list[Trained], second: list[Trained]) -> list[tuple[Trained, Trained]]:
    by_seed = {run["cell"]["seed"]: run for run in second}
    return [(run, by_seed[seed]) for run in first if (seed := run["cell"]["seed"]) in by_seed]


def decided(difference: dict[str, Any], threshold: float = 0.0) -> str:
    """An interval wholly above the threshold supports what the claim expects, wholly below contradicts it."""
    if difference["low"] is None or difference["n"] < ENOUGH:
        return "not decided"
    if difference["low"] > threshold:
        return "supported"
    return "contradicted" if difference["high"] < threshold else "not decided"


def _verdicts(
    low: str, others: list[str], trained: dict[str, list[Trained]], compared: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The claim in parts, each with its verdict and the numbers it was made from."""
    runs = trained[low]
    kept = interval(
        [math.log(KEPT) - run["points"][-1]["log_perplexity_ratio"] for run in runs], "nats/token"
    )
    hardly = interval([HARDLY - run["points"][-1]["gap"] for run in runs], "nats/token")
    verdicts = []
    for what, margin in (
        (f"{low} preserves the base (perplexity on unrelated text at most × {KEPT})", kept),
        (f"{low} hardly overfits (gap at most {HARDLY} nats/token)", hardly),
    ):
        assert margin is not None  # low was trained
        evidence = [{"place": "end", "margin": margin}]
        verdicts.append({"part": what, "of_claim": True, "says": decided(margin), "from": evidence})
    for other in others:
        matching = [entry for entry in compared if entry["high"] == other]
        for what, quantities in (
            (f"{other} forgets more than {low}", ("base_kl",)),
            (f"{other} overfits more than {low}", ("gap",)),
            (f"{other} makes more complex changes (effective rank of ΔW)", ("effective_rank",)),
            (f"{other} learns more (lowest validation loss)", ("best",)),
        ):
            parts = [entry for entry in matching if entry["quantity"] in quantities]
            if parts:
                of_claim = other == others[0]
                verdicts.append({"part": what, "of_claim": of_claim, "says": together(parts), "from": parts})
    return verdicts


def together(compared: Sequence[dict[str, Any]]) -> str:
    """One verdict of several places. Support has to hold at all of them; the matched places, where rank is not
    confounded with how far a training got, contradict it where one does and none supports it."""
    if all(entry["says"] == "supported" for entry in compared):
        return "supported"
    matched = [entry["says"] for entry in compared if entry["place"] != "end"] or [compared[0]["says"]]
    if "contradicted" in matched and "supported" not in matched:
        return "contradicted"
    return "not decided"


def overall(parts: Sequence[dict[str, Any]]) -> str:
    """The claim is that all its parts hold: one that is contradicted refutes it."""
    verdicts = [part["says"] for part in parts]
    if "contradicted" in verdicts:
        return "contradicted"
    return "supported" if verdicts and set(verdicts) == {"supported"} else "not decided"


def _notes(sweep: Sweep, trained: dict[str, list[Trained]]) -> list[str]:
    setting, notes = sweep.setting, []
    if setting.quick:
        notes.append("quick: few lines, steps and points; a look at how it works, not a result")
    if setting.seeds < ENOUGH:
        notes.append(f"seeds: {setting.seeds}; fewer than {ENOUGH} decide nothing: add some with --seeds")
    for method in setting.methods():
        rate, rates = sweep.chosen(method), setting.rates_of(method)
        if rate is not None and len(rates) > 1 and rate in (min(rates), max(rates)):
            notes.append(
                f"{method}: the best rate {rate:g} is at the edge of those tried; a further one may be better"
            )
        missing = setting.seeds - len(trained.get(method, []))
        if missing:
            notes.append(f"{method}: {missing} of {setting.seeds} trainings diverged and are left out")
    return notes
