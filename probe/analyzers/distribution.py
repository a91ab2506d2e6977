"""The output distribution at every captured decision: entropy, nucleus, temperature and Boltzmann quantities.

Numbers of one distribution are exact, of the raw model at τ = 1, in float64 (the tokens of a nucleus are those that
float32 sampling keeps); over a run, their means over tasks. `step` is the decision's index in its passage. `variant`
names the gauge, p, or the wanted entropy; `sampled` is the distribution that the run drew from. For `prompting` it
starts with the passage as the tensors do (`base/raw`, and `base` alone where there is nothing else to name).

log Z, ⟨E⟩ and F depend on the gauge, and in the `raw` one on a constant per position that no probability shows:
they are not averaged over tasks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.rows import WHOLE_RUN, Grid, Row, finished
from probe.maths.statistics import bootstrap_mean

if TYPE_CHECKING:
    from torch import Tensor

    from probe.runs import Run, TaskRun

_NAME = "distribution"
KINDS = ("prompting", "tool_selection", "cot", "agent")
NUCLEI = (0.5, 0.9, 0.95, 0.99)
WANTED = (1.0, 3.0)
"""Entropies, nats, whose temperature is looked for."""
UNITS = {
    "entropy": "nats",
    "nucleus_size": "tokens",
    "temperature": "temperature",
    "heat_capacity": "nats",
    "log_partition": "nats",
    "energy_mean": "logits",
    "free_energy": "logits",
    "token_energy": "logits",
    "surprisal": "nats",
    "mass_kept": "probability",
}
FIXED_K = (1, 10, 40)
GAUGED = {"log_partition", "energy_mean", "free_energy", "token_energy"}


@dataclass(frozen=True)
class Decision:
    """One captured output distribution of a run."""

    task_id: str
    passage: str
    """`main`, or the variant of a `prompting` task."""
    index: int
    position: int
    token: int | None
    """The token emitted there; None where none was, as after an opener that was attached on the side."""
    logits: Tensor
    """float32 [d_vocab]."""

    def variant(self, detail: str | None) -> str | None:
        parts = [part for part in (self.passage if self.passage != "main" else None, detail) if part]
        return "/".join(parts) or None


def decisions(task: TaskRun) -> Iterator[Decision]:
    """Every captured decision of a task, one row of logits in memory at a time; none where none was captured."""
    record = task.record
    for passage, facts in record.get("passages", {"main": record}).items():
        prefix = f"{passage}/" if "passages" in record else ""
        if f"{prefix}logits" not in task or f"{prefix}decisions" not in task:
            continue
        rows = task.slice(f"{prefix}logits")
        for index, position in enumerate(task[f"{prefix}decisions"].tolist()):
            token = _emitted(facts, index, position)
            yield Decision(task.id, passage, index, position, token, rows[index])


def _emitted(passage: dict[str, Any], index: int, position: int) -> int | None:
    turns = passage.get("turns", ())
    if index < len(turns) and turns[index].get("slot") == "attached":
        return None
    ids = passage["token_ids"]
    return ids[position + 1] if position + 1 < len(ids) else None


def measures(run: Run) -> Iterator[Row | Grid]:
    """Each decision of each finished task; then means over tasks of what no gauge moves, and how the nucleus
    follows the entropy."""
    over: dict[tuple[str, str | None], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    shapes: list[tuple[str, float, dict[str, float]]] = []
    for task in finished(run, *KINDS):
        draws = sampling(run, task.record["kind"])
        for decision in decisions(task):
            found = list(numbers(decision.logits, decision.token, draws))
            for name, detail, value in found:
                variant = decision.variant(detail)
                place = {"task_id": task.id, "step": decision.index, "variant": variant}
                yield Row(analyzer=_NAME, name=name, value=value, unit=UNITS[name], n=1, **place)
                if name not in GAUGED:
                    over[name, variant][task.id].append(value)
            sizes = {str(at): value for name, at, value in found if name == "nucleus_size"}
            if found:
                shapes.append((task.id, found[0][2], sizes))
    for (name, variant), by_task in over.items():
        mean = mean_over_tasks([(task, value) for task, values in by_task.items() for value in values])
        yield _of_run(name, variant, UNITS[name], mean)
    yield from _shape_of_run(shapes)


def _shape_of_run(shapes: list[tuple[str, float, dict[str, float]]]) -> Iterator[Row]:
    """Does the nucleus follow the entropy, and where is a fixed k too small or too large for it?"""
    for p in NUCLEI:
        sizes = [(task, entropy, size[f"p={p:g}"]) for task, entropy, size in shapes]
        rho = spearman_over_tasks(sizes)
        if rho is not None:
            yield _of_run("nucleus_follows_entropy", f"p={p:g}", "rank correlation", rho)
        for k in FIXED_K if sizes else ():
            for name, wrong in (("k_too_small", lambda n, k=k: k < n), ("k_too_large", lambda n, k=k: k > n)):
                share = mean_over_tasks([(task, float(wrong(size))) for task, _, size in sizes])
                yield _of_run(name, f"k={k}/p={p:g}", "share of decisions", share)


def _of_run(name: str, variant: str | None, unit: str, found: dict[str, Any]) -> Row:
    numbers = {key: found[key] for key in ("value", "low", "high", "n")}
    return Row(task_id=WHOLE_RUN, analyzer=_NAME, name=name, unit=unit, variant=variant, **numbers)


def sampling(run: Run, kind: str) -> dict[str, Any] | None:
    """`sampled`'s temperature, p and k where tasks of this kind draw their tokens; None where they are greedy."""
    made = run.run.get("generation", {}).get(kind, {})
    if not made.get("temperature"):
        return None
    return {"temperature": made["temperature"], "p": made.get("top_p"), "k": made.get("top_k")}


def numbers(
    logits: Tensor, token: int | None = None, draws: dict[str, Any] | None = None
) -> Iterator[tuple[str, str | None, float]]:
    """(name, detail, value) of one row of logits; nothing where one of them is NaN or +∞, or all are −∞.

    With a token, its energy E = −z in each gauge and its surprisal −log p = (E − F)/τ. With `draws`, the size, the
    mass and the entropy of what a token is drawn from, at detail `sampled`.
    """
    from probe.maths.distribution import GAUGES, Ranked, boltzmann, gauge_shift, temperature_for_entropy

    ranked = Ranked(logits.float())
    if not bool(ranked.ascending[-1].isfinite()):  # NaN sorts last
        return
    z = ranked.ascending.double()
    raw = boltzmann(z)
    yield "entropy", None, float(raw.entropy)
    yield "heat_capacity", None, float(raw.heat_capacity)
    for p in NUCLEI:
        yield "nucleus_size", f"p={p:g}", float(ranked.nucleus_size(p))
    for wanted in WANTED:
        tau = temperature_for_entropy(z, wanted)
        if tau is not None:
            yield "temperature", f"entropy={wanted:g}", tau
    energy = None if token is None else -float(logits[token])
    for gauge in GAUGES:
        shift = float(gauge_shift(z, gauge))
        yield "log_partition", gauge, float(raw.log_partition) - shift
        yield "energy_mean", gauge, float(raw.energy_mean) + shift
        yield "free_energy", gauge, float(raw.free_energy) + shift
        if energy is not None and math.isfinite(energy):
            yield "token_energy", gauge, energy + shift
    if energy is not None and math.isfinite(energy):
        yield "surprisal", None, max(0.0, energy - float(raw.free_energy))
    if draws:
        yield from _drawn_from(logits, draws)


def _drawn_from(logits: Tensor, draws: dict[str, Any]) -> Iterator[tuple[str, str | None, float]]:
    from probe.maths.distribution import boltzmann, sampled, temper

    left = sampled(logits, **draws)
    whole = boltzmann(temper(logits.float(), draws["temperature"]))
    kept = boltzmann(left)
    yield "nucleus_size", "sampled", float((left > -math.inf).sum())
    yield "mass_kept", "sampled", min(1.0, math.exp(float(kept.log_partition - whole.log_partition)))
    yield "entropy", "sampled", float(kept.entropy)


# -- over the tasks of a run -------------------------------------------------------------------------------------


def mean_over_tasks(pairs: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Mean over tasks of each task's mean, with its 95 % bootstrap interval over tasks; n counts tasks."""
    by_task: dict[str, list[float]] = defaultdict(list)
    for task, value in pairs:
        by_task[task].append(value)
    means = [float(np.mean(values)) for values in by_task.values()]
    low, high = bootstrap_mean(means) or (None, None)
    return {"value": float(np.mean(means)), "low": low, "high": high, "n": len(means)}


def spearman_over_tasks(rows: Sequence[tuple[str, float, float]]) -> dict[str, Any] | None:
    """Rank correlation of x and y over decisions (task, x, y); None where one of them is constant.

    The 95 % interval is over resampled tasks, None for fewer than three; n counts decisions.
    """
    from probe.analyzers.tool.correlates import spearman

    if len(rows) < 3:
        return None
    tasks, groups = np.unique([row[0] for row in rows], return_inverse=True)
    found = spearman(np.array([row[1] for row in rows]), np.array([row[2] for row in rows]), groups)
    if found is None:
        return None
    value, low, high = found if len(tasks) > 2 else (found[0], None, None)
    return {"value": value, "low": low, "high": high, "n": len(rows), "tasks": len(tasks)}
