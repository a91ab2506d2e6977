"""What the trainings of a sweep say: by rank, at matched loss, at matched ‖ΔW‖_F, and on the common claim.

Compared at the end of training, rank is confounded with how far each rank got: a larger one fits the training
lines sooner and moves further. So ranks are also compared where they have the same validation loss and where
they have moved equally far, on the straight line between two looks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probe.lora.sweep import Settings

Cell = Mapping[str, Any]
Look = Mapping[str, float]

OVERFITTING = "gap"
"""Validation loss − training loss, nats a token."""
FORGETTING = "text_kl"
"""KL(base‖tuned) on unrelated text, nats a token."""
CLAIM = "a low rank keeps the base's knowledge and overfits less than a high rank"


def findings(
    settings: Settings, cells: Sequence[Cell], trials: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One document: `ranks` (numbers by rank, means over seeds with intervals), `claim`, `trials`, `notes`."""
    by_rank: dict[str, list[Cell]] = {}
    for cell in cells:
        by_rank.setdefault(str(cell["rank"]), []).append(cell)
    level = _reached_by_all(cells, "validation_loss", lowest=True)
    moved = _reached_by_all(cells, "change", lowest=False)
    states: dict[str, Callable[[Cell], Look | None]] = {
        "at the end": lambda cell: _with_gap(cell["looks"][-1]),
        "at the best validation loss": lambda cell: _with_gap(
            min(cell["looks"], key=lambda look: look["validation_loss"])
        ),
        f"at validation loss {level:.3f}": lambda cell: _where(cell["looks"], "validation_loss", level),
        f"at ‖ΔW‖_F {moved:.3g}": lambda cell: _where(cell["looks"], "change", moved),
    }
    ranks = [
        {
            "rank": rank,
            "rate": own[0]["rate"],
            "n_trained": own[0]["n_trained"],
            "n": len(own),
            "states": {name: _means([state(cell) for cell in own], own) for name, state in states.items()},
            "spectra": _spectra(own),
        }
        for rank, own in by_rank.items()
    ]
    notes = _notes(settings, trials, by_rank)
    return {
        "model": settings.model,
        "quick": settings.quick,
        "seeds": settings.seeds,
        "ranks": ranks,
        "claim": _claim(by_rank, states),
        "trials": list(trials),
        "notes": notes,
        "curves": {
            rank: [
                {"seed": cell["seed"], "looks": [_with_gap(look) for look in cell["looks"]]} for cell in own
            ]
            for rank, own in by_rank.items()
        },
    }


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean, 95 % interval by Student's t over seeds (None for one) and n."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return {"value": mean, "low": None, "high": None, "n": n}
    from scipy.stats import t

    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    half = float(t.ppf(0.975, n - 1)) * spread
    return {"value": mean, "low": mean - half, "high": mean + half, "n": n}


def _with_gap(look: Look) -> dict[str, float]:
    return {**look, OVERFITTING: look["validation_loss"] - look["train_loss"]}


def _reached_by_all(cells: Sequence[Cell], name: str, *, lowest: bool) -> float:
    """The best value that every training reached: the highest of their minima, or the lowest of their maxima."""
    reached = [[look[name] for look in cell["looks"]] for cell in cells]
    return max(map(min, reached)) if lowest else min(map(max, reached))


def _where(looks: Sequence[Look], name: str, level: float) -> dict[str, float] | None:
    """The state in which `name` first has this value, linear between looks; None where it never does."""
    for one, other in zip(looks, looks[1:], strict=False):
        a, b = one[name], other[name]
        if min(a, b) - 1e-12 <= level <= max(a, b) + 1e-12:
            share = 0.0 if a == b else min(max((level - a) / (b - a), 0.0), 1.0)
            return _with_gap({key: one[key] + share * (other[key] - one[key]) for key in one})
    return None


def _means(states: Sequence[Look | None], cells: Sequence[Cell]) -> dict[str, Any]:
    """Means over the seeds that came to this state; absent where none did."""
    pairs = [(state, cell) for state, cell in zip(states, cells, strict=True) if state is not None]
    if not pairs:
        return {}
    names = ("step", "train_loss", "validation_loss", OVERFITTING, FORGETTING, "change")
    found = {name: interval([state[name] for state, _ in pairs]) for name in names}
    ratios = [math.exp(min(state["text_loss"] - cell["base_text_loss"], 50)) for state, cell in pairs]
    return found | {"perplexity_ratio": interval(ratios)}


def _spectra(cells: Sequence[Cell]) -> dict[str, Any]:
    """Means over matrices, then over seeds."""
    found = {}
    for name in ("nuclear_norm", "frobenius_norm", "stable_rank", "effective_rank", "cauchy_schwarz_ratio"):
        own = []
        for cell in cells:
            values = [one[name] for one in cell["spectra"] if one[name] is not None]
            if values:
                own.append(math.fsum(values) / len(values))
        if own:
            found[name] = interval(own)
    return found


def _claim(by_rank: Mapping[str, Sequence[Cell]], states: Mapping[str, Callable[[Cell], Look | None]]) -> Any:
    """High rank (and all weights) against low rank, paired by seed: differences with intervals and a verdict."""
    numbers = sorted(int(rank) for rank in by_rank if rank.isdecimal())
    if not numbers:
        return None
    low = 4 if 4 in numbers else numbers[0]
    others = [str(numbers[-1])] if numbers[-1] != low else []
    others += [rank for rank in by_rank if not rank.isdecimal()]
    compared = []
    for high in others:
        for state_name, state in states.items():
            for name, what in ((FORGETTING, "forgetting"), (OVERFITTING, "overfitting")):
                pairs = _paired(by_rank[str(low)], by_rank[high], state)
                if pairs:
                    difference = interval([b[name] - a[name] for a, b in pairs])
                    compared.append(
                        {
                            "rank": high,
                            "against": str(low),
                            "what": what,
                            "state": state_name,
                            "measure": name,
                        }
                        | difference
                        | {"verdict": _verdict(difference)}
                    )
    return {"claim": CLAIM, "compared": compared}


def _paired(
    low: Sequence[Cell], high: Sequence[Cell], state: Callable[[Cell], Look | None]
) -> list[tuple[Look, Look]]:
    other = {cell["seed"]: cell for cell in high}
    found = []
    for cell in low:
        if cell["seed"] in other:
            a, b = state(cell), state(other[cell["seed"]])
            if a is not None and b is not None:
                found.append((a, b))
    return found


def _verdict(difference: Mapping[str, Any]) -> str:
    """Of high − low: the claim wants it above 0."""
    if difference["low"] is None:
        return "not decided: one seed"
    if difference["low"] > 0:
        return "supported"
    return "contradicted" if difference["high"] < 0 else "not decided"


def _notes(settings: Settings, trials: Sequence[Mapping[str, Any]], by_rank: Mapping[str, Any]) -> list[str]:
    notes = []
    if settings.quick:
        notes.append("a quick sweep: few steps, few lines, few rates; it shows the way, not the answer")
    if settings.seeds < 3:
        notes.append(
            f"{settings.seeds} seed{'s' * (settings.seeds > 1)}: at least 3 are needed to decide anything"
        )
    for rank, own in by_rank.items():
        tried = [trial["rate"] for trial in trials if str(trial["rank"]) == rank]
        named = _named(rank)
        if len(tried) > 1 and own[0]["rate"] in (min(tried), max(tried)):
            side = "lowest" if own[0]["rate"] == min(tried) else "highest"
            notes.append(f"{named}: the best rate, {own[0]['rate']:g}, is the {side} that was tried")
    return notes


# -- as lines ------------------------------------------------------------------------------------------------------

_COLUMNS = (
    ("step", "step", ".0f"),
    ("train_loss", "training", ".3f"),
    ("validation_loss", "validation", ".3f"),
    (OVERFITTING, "gap", ".3f"),
    (FORGETTING, "KL on text", ".4f"),
    ("perplexity_ratio", "perplexity ×", ".3f"),
    ("change", "‖ΔW‖_F", ".3f"),
)


def lines(found: Mapping[str, Any]) -> list[str]:
    """The document as text: one table a state, then the claim."""
    seeds = (
        f"means over {found['seeds']} seeds, 95 % intervals of Student's t"
        if found["seeds"] > 1
        else "one seed"
    )
    text = [f"{found['model']}: losses in nats a token, {seeds}"]
    for state in found["ranks"][0]["states"]:
        table = [["rank", "rate", "n", *(title for _, title, _ in _COLUMNS)]]
        for own in found["ranks"]:
            numbers = own["states"][state]
            cells = [_cell(numbers.get(name), form) for name, _, form in _COLUMNS]
            table.append([own["rank"], f"{own['rate']:g}", str(own["n"]), *cells])
        text += ["", state, *_aligned(table)]
    names = list(found["ranks"][0]["spectra"])
    table = [["rank", "trained", *names]]
    for own in found["ranks"]:
        cells = [_cell(own["spectra"].get(name), ".3f") for name in names]
        table.append([own["rank"], f"{own['n_trained']:,}", *cells])
    text += ["", "ΔW at the end, means over matrices", *_aligned(table)]
    if claim := found["claim"]:
        text += ["", f"The claim: {claim['claim']}."]
        for one in claim["compared"]:
            pair = f"{_named(one['rank'])} − {_named(one['against'])}"
            text.append(
                f"  {one['what']}, {pair}, {one['state']}: {_cell(one, '+.4f')} nats: {one['verdict']}"
            )
    return text + [f"note: {note}" for note in found["notes"]]


def _named(rank: str) -> str:
    return f"rank {rank}" if rank.isdecimal() else "all weights"


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]


def _cell(number: Mapping[str, Any] | None, form: str) -> str:
    if number is None:
        return "-"
    if number["low"] is None:
        return format(number["value"], form)
    return f"{number['value']:{form}} [{number['low']:{form}}, {number['high']:{form}}]"
