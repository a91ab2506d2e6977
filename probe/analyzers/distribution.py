"""The output distribution at every captured decision: entropy, nucleus, temperature and Boltzmann quantities.

All are exact numbers of one distribution, the raw model's at τ = 1, in float64; over a run, their means over tasks.
`step` is the decision's index in its passage. `variant` names the gauge, p, or the wanted entropy; for `prompting`
it starts with the passage as the tensors do (`base/raw`, and `base` alone where there is nothing else to name).

log Z, ⟨E⟩ and F depend on the gauge, and in the `raw` one on a constant per position that no probability shows:
they are not averaged over tasks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.measure import WHOLE_RUN, Grid, Measure, finished
from probe.analyzers.statistics import bootstrap_mean

if TYPE_CHECKING:
    from torch import Tensor

    from probe.store import Run, TaskRun

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
}
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


def measures(run: Run) -> Iterator[Measure | Grid]:
    """Each decision of each finished task, then means over tasks of what no gauge moves."""
    over: dict[tuple[str, str | None], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for task in finished(run, *KINDS):
        for decision in decisions(task):
            for name, detail, value in numbers(decision.logits, decision.token):
                variant = decision.variant(detail)
                yield Measure(
                    task_id=task.id,
                    analyzer=_NAME,
                    name=name,
                    value=value,
                    unit=UNITS[name],
                    n=1,
                    step=decision.index,
                    variant=variant,
                )
                if name not in GAUGED:
                    over[name, variant][task.id].append(value)
    for (name, variant), by_task in over.items():
        means = [float(np.mean(values)) for values in by_task.values()]
        low, high = bootstrap_mean(means) or (None, None)
        yield Measure(
            task_id=WHOLE_RUN,
            analyzer=_NAME,
            name=name,
            value=float(np.mean(means)),
            unit=UNITS[name],
            n=len(means),
            low=low,
            high=high,
            variant=variant,
        )


def numbers(logits: Tensor, token: int | None = None) -> Iterator[tuple[str, str | None, float]]:
    """(name, detail, value) of one row of logits; none where one of them is NaN or +∞.

    With a token, its energy E = −z in each gauge and its surprisal −log p = (E − F)/τ.
    """
    import torch

    from probe.distribution import GAUGES, boltzmann, gauge_shift, nucleus_sizes, temperature_for_entropy

    # Sorted once, by numpy: a third of the time of torch, which sorts indices too.
    ascending = torch.from_numpy(np.sort(logits.float().numpy())).double()
    if not bool(ascending[-1].isfinite()):  # NaN sorts last
        return
    raw = boltzmann(ascending)
    yield "entropy", None, float(raw.entropy)
    yield "heat_capacity", None, float(raw.heat_capacity)
    for p, size in zip(NUCLEI, nucleus_sizes(ascending, NUCLEI), strict=True):
        yield "nucleus_size", f"p={p:g}", float(size)
    for wanted in WANTED:
        tau = temperature_for_entropy(ascending, wanted)
        if tau is not None:
            yield "temperature", f"entropy={wanted:g}", tau
    energy = None if token is None else -float(logits[token])
    for gauge in GAUGES:
        shift = float(gauge_shift(ascending, gauge))
        yield "log_partition", gauge, float(raw.log_partition) - shift
        yield "energy_mean", gauge, float(raw.energy_mean) + shift
        yield "free_energy", gauge, float(raw.free_energy) + shift
        if energy is not None:
            yield "token_energy", gauge, energy + shift
    if energy is not None:
        yield "surprisal", None, energy - float(raw.free_energy)
