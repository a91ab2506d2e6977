"""An estimate as text: a stacked bar of the peak, and the step in time."""

from __future__ import annotations

from typing import Any

from probe.training.memory.estimate import COMPONENTS, Moment, StepEstimate
from probe.training.memory.plan import FineTuningPlan

MARKS = {
    "weights": "W",
    "gradients": "G",
    "optimizer": "O",
    "activations": "A",
    "logits": "L",
    "temporary": "T",
    "cuda_context": "C",
    "fragmentation": "F",
}
COLORS = {
    "weights": "blue",
    "gradients": "magenta",
    "optimizer": "yellow",
    "activations": "green",
    "logits": "cyan",
    "temporary": "red",
    "cuda_context": "white",
    "fragmentation": "bright_black",
}


def both(size: float) -> str:
    """`size` bytes in GB and GiB."""
    return f"{size / 1e9:.2f} GB ({size / 2**30:.2f} GiB)"


def bar(sizes: dict[str, int], whole: int, width: int = 60) -> list[tuple[str, int]]:
    """Components and their cells; the cells of all together are the rounded share of `whole`."""
    cells, reached, used = [], 0, 0
    for name, size in sizes.items():
        reached += size
        until = round(width * reached / whole) if whole else 0
        cells.append((name, until - used))
        used = until
    return cells


def lines(estimate: StepEstimate, usable: int | None = None, width: int = 60) -> list[Any]:
    """Text (rich) of an estimate: every component with its size, the stacked bar, and the step in time."""
    from rich.text import Text

    peak = estimate.peak.bytes | estimate.outside
    plan = estimate.plan
    rows: list[Any] = [
        Text(
            f"{estimate.architecture.name}: {estimate.architecture.n_params:,} parameters, {estimate.n_trained:,} trained; "
            f"{plan.method}, {plan.precision}, {plan.optimizer}, {plan.attention} attention, "
            f"batch {plan.batch} × {plan.length} tokens"
            + "".join(f", {words}" for words in _savings(plan))
            + (f", ZeRO {plan.zero} on {plan.n_gpus} GPUs" if plan.zero else "")
        )
    ]
    for name, size in peak.items():
        rows.append(Text(f"  {MARKS[name]} {name:14} {both(size):>24}", COLORS[name]))
    rows.append(
        Text(f"  = {'total':14} {both(estimate.total_bytes):>24}  at its highest, {estimate.peak.phase}")
    )
    whole = max(estimate.total_bytes, usable or 0)
    rows.append(_drawn(bar(peak, whole, width), width, "of the GPU" if usable else ""))
    rows.append(Text("the step in time, tensors alone:"))
    for moment in _phases(estimate.timeline):
        drawn = _drawn(bar(moment.bytes, estimate.peak.total, width), width, "")
        rows.append(Text(f"  {moment.phase:24} {moment.total / 1e9:9.2f} GB ") + drawn)
    rows += [Text(f"note: {note}") for note in estimate.notes]
    return rows


def _savings(plan: FineTuningPlan) -> list[str]:
    """What a plan does to need less, in words."""
    given = {
        "gradient checkpointing": plan.checkpointing,
        "activations on the host": plan.offload,
        f"{plan.loss} loss": plan.loss != "whole",
        "compiled": plan.compile,
        "optimizer step in the backward pass": plan.optimizer_in_backward,
        "adapters of the base's type": plan.method != "full" and plan.adapter_precision == "base",
    }
    return [words for words, does in given.items() if does]


def _drawn(cells: list[tuple[str, int]], width: int, words: str) -> Any:
    from rich.text import Text

    text = Text("|")
    for name, count in cells:
        text.append(MARKS[name] * count, COLORS[name])
    used = sum(count for _, count in cells)
    return text.append("·" * max(0, width - used) + f"| {words}".rstrip())


def _phases(timeline: list[Moment], layers: int = 4) -> list[Moment]:
    """The moments of a step; of long runs of layers the first, the last and those between at even distance."""
    kept = []
    for kind in ("forward, layer", "backward, layer"):
        run = [moment for moment in timeline if moment.phase.startswith(kind)]
        step = max(1, (len(run) - 1) / (layers - 1))
        kept += [run[min(len(run) - 1, round(step * k))] for k in range(layers)]
    names = {moment.phase for moment in kept}
    return [m for m in timeline if m.phase in names or ", layer" not in m.phase]


def as_dict(estimate: StepEstimate, usable: int | None) -> dict[str, Any]:
    """The estimate as one JSON document: measures, components, timeline, notes."""
    from dataclasses import asdict

    plan = asdict(estimate.plan)
    return {
        "model": estimate.architecture.name,
        "n_params": estimate.architecture.n_params,
        "n_trained": estimate.n_trained,
        "plan": plan,
        "measures": estimate.measures(usable),
        "peak": {"phase": estimate.peak.phase, **{name: estimate.peak.bytes[name] for name in COMPONENTS}},
        "outside": estimate.outside,
        "timeline": [{"phase": m.phase, **m.bytes, "total": m.total} for m in estimate.timeline],
        "notes": estimate.notes,
    }
