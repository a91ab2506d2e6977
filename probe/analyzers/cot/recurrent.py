"""The memory of recurrent layers: its bytes, what each step changes in it, and whether it gives the layer's outputs back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from probe.analyzers.cot.reads import NAME
from probe.analyzers.registry import OVER_TASKS, Figure, measure
from probe.analyzers.rows import WHOLE_RUN
from probe.prompts.labels import ANSWER, QUESTION, step_of

if TYPE_CHECKING:
    from probe.analyzers.rows import Row
    from probe.runs import Run

_STATE = "the recurrence of a layer, or the window of a layer that has convolutions alone"
STATE_BYTES = measure(
    NAME,
    "state_bytes",
    unit="bytes",
    of="run",
    axes="layer?",
    means="Bytes of the state of constant size that a recurrent layer keeps of a sequence, windows of convolutions included; "
    "without a layer all together. No step adds to them: they are no part of `memory_bytes`.",
    figure=Figure(kind="text"),
)
STATE_NORM = measure(
    NAME,
    "state_norm",
    unit="norm",
    axes="layer step? reader?",
    means=f"‖S‖, Frobenius norm of the state behind `step` (0: before the first step; reader `answer`: behind the answer): "
    f"{_STATE}.",
    needs=("experiment:recurrent_memory",),
    figure=Figure(kind="matrix", x="step", by="layer"),
)
STATE_CHANGE = measure(
    NAME,
    "state_change",
    unit="relative",
    of="task run",
    axes="layer step? reader?",
    means="‖S − S′‖ / ‖S′‖, Frobenius norms, with S the state behind `step` (reader `answer`: behind the answer) and S′ the one "
    f"before it: {_STATE}. What the step wrote and what it made the layer forget count alike. Of the run: mean over the "
    "steps of a task, then over tasks.",
    interval=OVER_TASKS,
    needs=("experiment:recurrent_memory",),
    figure=Figure(kind="matrix", x="step", by="layer"),
)
STATE_ERROR = measure(
    NAME,
    "state_reconstruction_error",
    unit="relative",
    axes="layer",
    means="max |c − o| / max |o|: a recurrent layer's outputs c in the rows of steps and answer, rebuilt from the state stored "
    "where each begins, against those o that it gave when the model ran: `reconstruction_error` of this kind of memory.",
    needs=("experiment:recurrent_memory",),
    figure=Figure(kind="text"),
)


def measures(run: Run) -> Iterator[Row]:
    """Bytes from the run alone; the others where the experiment was made."""
    layers = run.run["model"].get("layers") or ()
    sizes = {number: layer["state_bytes"] for number, layer in enumerate(layers) if layer.get("state_bytes")}
    for layer, size in sizes.items():
        yield STATE_BYTES.row(WHOLE_RUN, float(size), layer=layer)
    if sizes:
        yield STATE_BYTES.row(WHOLE_RUN, float(sum(sizes.values())))
    frame: Any = run.table("reasoning")
    changes: dict[int, dict[str, list[float]]] = {}
    for defined, name in ((STATE_NORM, "state_norm"), (STATE_CHANGE, "state_change")):
        for row in frame[frame["experiment"] == name].to_dict("records"):
            layer, task_id, place = int(row["layer"]), row["task_id"], _place(row["reader"])
            yield defined.row(task_id, row["value"], n=int(row["n_rows"]), layer=layer, **place)
            if defined is STATE_CHANGE and "step" in place:
                changes.setdefault(layer, {}).setdefault(task_id, []).append(row["value"])
    for layer, by_task in sorted(changes.items()):
        means = [sum(values) / len(values) for values in by_task.values()]
        yield STATE_CHANGE.mean(means, layer=layer)
    errors = frame[frame["experiment"] == "state_error"]
    for (task_id, layer), rows in errors.groupby(["task_id", "layer"], sort=False):
        yield STATE_ERROR.row(
            task_id, float(rows["value"].max()), n=int(rows["n_rows"].sum()), layer=int(layer)
        )


def _place(reader: str) -> dict[str, Any]:
    if reader == ANSWER:
        return {"reader": ANSWER}
    return {"step": 0 if reader == QUESTION else step_of(reader)}
