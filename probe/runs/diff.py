"""Compare two runs: where do they first part, by more than the parity tolerance?

Differences are ordered as a computation goes: the first one is of the first task that differs, at its lowest
layer and, within the layer, at the earliest site of the data flow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from probe.capture.sites import ALWAYS, SITES
from probe.runs.read import Run
from probe.runs.task import TaskRun

if TYPE_CHECKING:
    import torch


class Tolerance(NamedTuple):
    """What still counts as equal."""

    relative: float
    """Activations and logits: max |a − b| ≤ relative · max |b| over the compared rows of one layer."""
    probability: float
    """Probabilities and attention mass, absolute."""
    log_prob: float
    """Log-probabilities, absolute, in nats."""


TOLERANCES = {
    "float64": Tolerance(5e-5, 1e-5, 1e-4),
    "float32": Tolerance(5e-5, 1e-5, 1e-4),
    "bfloat16": Tolerance(2e-2, 1e-2, 1e-2),
    "float16": Tolerance(2e-2, 1e-2, 1e-2),
}
"""Tolerances by the dtype of the run (run.json, model.dtype); docs/contract.md, section 5."""

FIRST = tuple(site.name for site in ALWAYS)
"""Tensors that say what was computed at all: compared before any activation."""

_ABSOLUTE = {
    **{site.name: site.tolerance for site in SITES.values() if site.tolerance != "relative"},
    "log_prob": "log_prob",
    "probability": "probability",
    "choice_probability": "probability",
    "candidate_mass": "probability",
}
_COMPARED = {
    *("status", "token_ids", "n_prompt", "n_new", "completion", "finish_reason"),
    *("tool", "chosen", "chosen_tool", "called", "score", *_ABSOLUTE),
}
"""Fields of a record that are results, wherever they stand in it; compared exactly but for _ABSOLUTE."""


@dataclass(frozen=True)
class Difference:
    """One site of one task, at one layer, that is not the same in both runs."""

    task_id: str
    site: str
    """Tensor name, `record.FIELD` or `task`."""
    layer: int | None
    row: int | None
    """First offending index into `rows` (for `logits` into `decisions`, for `log_probs` the step)."""
    position: int | None
    """Its position in the sequence."""
    kind: str
    """value, nonfinite, exact, missing, extra, shape or dtype."""
    max_abs: float | None
    """Largest |a − b| of the site at this layer; None where it is not a finite number."""
    tolerance: float | None
    """What |a − b| may be there; None where equality is asked for."""
    message: str


def diff(baseline: Run, run: Run, tolerance: Tolerance | None = None) -> list[Difference]:
    """All differences of `run` from `baseline`, first the one to look at first; empty when they agree.

    Position 0 (the attention sink) is left out of activations, and with it the `bos` column of
    `resid_span_mean`; NaN equals nothing. At most one Difference a task, site and layer. `tolerance` is by default that
    of the dtype with which the runs were made, the wider one of two.
    Raises ArtifactCorrupt when a file of either run is damaged.
    """
    tolerance = tolerance or max(_tolerance(baseline), _tolerance(run))
    differences = []
    for task_id in baseline.task_ids:
        if task_id in run:
            differences += _diff_task(baseline[task_id], run[task_id], tolerance)
        else:
            differences.append(_absent(task_id, "task", "missing", "the task is not in the second run"))
    extra = [task_id for task_id in run.task_ids if task_id not in baseline]
    return differences + [
        _absent(task_id, "task", "extra", "the task is not in the baseline") for task_id in extra
    ]


def _tolerance(run: Run) -> Tolerance:
    model = run.run.get("model")
    dtype = model.get("dtype") if isinstance(model, dict) else None
    return TOLERANCES.get(str(dtype).removeprefix("torch."), TOLERANCES["float32"])


def _absent(task_id: str, site: str, kind: str, message: str, layer: int | None = None) -> Difference:
    return Difference(
        task_id, site, layer, None, None, kind, None, None, f"task {task_id!r}: {site}: {message}"
    )


def _diff_task(a: TaskRun, b: TaskRun, tolerance: Tolerance) -> list[Difference]:
    differences: list[Difference] = []
    if bool(a.keys()) != bool(b.keys()):
        side, kind = ("second run", "missing") if a.keys() else ("baseline", "extra")
        statuses = f"statuses {a.record['status']!r} and {b.record['status']!r}"
        differences.append(_absent(a.id, "tensors", kind, f"the {side} has no tensor at all ({statuses})"))
    forks: dict[str, int | None] = {}
    for name in sorted({*a.keys(), *b.keys()} if a.keys() and b.keys() else ()):
        if name not in b:
            differences.append(_absent(a.id, name, "missing", "not in the second run"))
        elif name not in a:
            differences.append(_absent(a.id, name, "extra", "not in the baseline"))
        else:
            passage = _passage(name)
            if passage not in forks:
                forks[passage] = _fork(a, b, name)
            differences += _diff_tensor(a, b, name, tolerance, forks[passage])
    results = list(_diff_record(a.id, a.record, b.record, tolerance, "record"))
    tokens = [difference for difference in results if difference.site.endswith(".token_ids")]
    rest = [difference for difference in results if difference not in tokens]
    # Rows before the fork saw the same tokens in both runs: a layer that differs there is the cause, the
    # other tokens that were generated then are its effect.
    causes = [
        d for d in differences if forks.get(_passage(d.site)) is not None and d.kind in ("value", "nonfinite")
    ]
    others = [d for d in differences if d not in causes]
    return sorted(causes, key=_order) + tokens + sorted(others, key=_order) + rest


def _fork(a: TaskRun, b: TaskRun, name: str) -> int | None:
    """First position at which the passage's tokens differ; None when they are the same (or not saved)."""
    site = name.rpartition("/")[2]
    tokens = name.removesuffix(site) + "token_ids"
    if tokens not in a or tokens not in b:
        return None
    left, right = a[tokens].tolist(), b[tokens].tolist()
    if left == right:
        return None
    pairs = enumerate(zip(left, right, strict=False))
    return next((index for index, (x, y) in pairs if x != y), min(len(left), len(right)))


def _order(difference: Difference) -> tuple[int, int, int, str]:
    """Stage (what was run, layers, outputs), layer, place in the data flow, name."""
    site = difference.site.rpartition("/")[2]
    if site in FIRST:
        return 0, 0, FIRST.index(site), difference.site
    order = list(SITES)
    if site in SITES and not SITES[site].layered:
        return 2, 0, 0, difference.site
    layer = -1 if difference.layer is None else difference.layer
    return 1, layer, order.index(site) if site in SITES else len(order), difference.site


def _diff_tensor(
    a: TaskRun, b: TaskRun, name: str, tolerance: Tolerance, fork: int | None
) -> Iterator[Difference]:
    """Compare one tensor, layer by layer where it has layers, so that one layer at a time is in memory.

    After a fork in the tokens only what comes before it is compared; a mean over spans that reach past it is
    not.
    """
    axes = a.axes(name)
    if a.dtype(name) != b.dtype(name):
        yield _absent(
            a.id, name, "dtype", f"{a.dtype(name)} in the baseline, {b.dtype(name)} in the second run"
        )
        return
    layers_a, layers_b = _layers(a, name), _layers(b, name)
    skip = 0 if layers_a is None else 1
    if fork is not None:
        yield from _diff_before_fork(a, b, name, tolerance, fork)
        return
    if b.axes(name) != axes or a.shape(name)[skip:] != b.shape(name)[skip:]:
        shapes = f"{a.shape(name)} in the baseline, {b.shape(name)} in the second run"
        yield _absent(a.id, name, "shape", f"shapes differ: {shapes}")
        return
    where = _Where(a, name, axes[skip:])
    if layers_a is None or layers_b is None:
        yield from _compare(where, a[name], b[name], None, tolerance)
        return
    slices = a.slice(name), b.slice(name)
    for layer in sorted({*layers_a, *layers_b}):
        if layer not in layers_b:
            yield _absent(a.id, name, "missing", f"layer {layer} is not in the second run", layer)
        elif layer not in layers_a:
            yield _absent(a.id, name, "extra", f"layer {layer} is not in the baseline", layer)
        else:
            left, right = slices[0][layers_a.index(layer)], slices[1][layers_b.index(layer)]
            yield from _compare(where, left, right, layer, tolerance)


def _diff_before_fork(
    a: TaskRun, b: TaskRun, name: str, tolerance: Tolerance, fork: int
) -> Iterator[Difference]:
    axes, layers = a.axes(name), _layers(a, name)
    where = _Where(a, name, axes[0 if layers is None else 1 :])
    other = _Where(b, name, axes[0 if layers is None else 1 :])
    same_labels = where.all_labels == other.all_labels
    if where.site == "token_ids" or b.axes(name) != axes or _layers(b, name) != layers:
        return
    if where.axis is None or where.along == "span" or ("span" in axes and not same_labels):
        return
    count = min(where.before(fork), other.before(fork))
    if count == 0:
        return
    for index, layer in enumerate(layers if layers is not None else [None]):
        left, right = (t[name] if layer is None else t.slice(name)[index] for t in (a, b))
        left, right = (part.narrow(where.axis, 0, count) for part in (left, right))
        if left.shape != right.shape:
            shapes = f"{a.shape(name)} in the baseline, {b.shape(name)} in the second run"
            yield _absent(a.id, name, "shape", f"shapes differ: {shapes}")
            return
        yield from _compare(where, left, right, layer, tolerance)


def _passage(name: str) -> str:
    return name.rpartition("/")[0] or "main"


def _layers(task: TaskRun, name: str) -> list[int] | None:
    """Layer numbers along the first axis; None for a tensor without layers."""
    if task.axes(name)[:1] != ("layer",):
        return None
    return task.layers(name)


class _Where:
    """Which part of one tensor is compared, and how an index along its rows is told."""

    def __init__(self, task: TaskRun, name: str, axes: tuple[str, ...]):
        self.task_id, self.name, self.site = task.id, name, name.rpartition("/")[2]
        self.axis = next(
            (axes.index(axis) for axis in ("row", "position", "decision", "step", "span") if axis in axes),
            None,
        )
        self.along = None if self.axis is None else axes[self.axis]
        prefix = name.removesuffix(self.site)
        index = {"row": "rows", "decision": "decisions"}.get(self.along or "")
        self.positions = task[prefix + index].tolist() if index and prefix + index in task else None
        self.all_labels = task.listed("labels", _passage(name))
        self.labels = self.all_labels if self.along == "span" else None
        self.n_rows = (
            0 if self.axis is None else task.shape(name)[len(task.axes(name)) - len(axes) + self.axis]
        )
        self.n_prompt = self._n_prompt(task)
        self.left_out = None if self.site in (*FIRST, "logits", "log_probs") else self._sink()

    def _n_prompt(self, task: TaskRun) -> int:
        passages = task.record.get("passages", {})
        return int(passages.get(_passage(self.name), task.record).get("n_prompt", 0))

    def before(self, fork: int) -> int:
        """How many indices along the rows saw only tokens before position `fork`."""
        if self.along == "position":
            return min(fork, self.n_rows)
        if self.along == "step":
            return max(0, min(fork - self.n_prompt, self.n_rows))
        positions = self.positions or []
        return sum(position < fork for position in positions[: self.n_rows])

    def _sink(self) -> int | None:
        """Index of position 0 along the rows."""
        if self.along == "position":
            return 0
        if self.along == "row" and self.positions and 0 in self.positions:
            return self.positions.index(0)
        from probe.prompts.labels import BOS

        if self.along == "span" and self.labels and BOS in self.labels:
            return self.labels.index(BOS)
        return None

    def describe(self, index: int) -> tuple[int | None, int | None, str]:
        """(row, position, words) of an index along the rows."""
        if self.along == "position":
            return None, index, f" position {index}"
        if self.along == "span":
            known = self.labels is not None and index < len(self.labels)
            return None, None, f" span {self.labels[index]!r}" if known and self.labels else f" span {index}"
        position = self.positions[index] if self.positions and index < len(self.positions) else None
        return (
            index,
            position,
            f" {self.along} {index}" + ("" if position is None else f" (position {position})"),
        )


def _compare(
    where: _Where, a: torch.Tensor, b: torch.Tensor, layer: int | None, tolerance: Tolerance
) -> Iterator[Difference]:
    """Compare two tensors of one shape (one layer of them); yields at most one Difference."""
    import torch

    if torch.equal(a, b):  # never so with a NaN
        return
    if where.axis is not None:
        a, b = a.movedim(where.axis, 0), b.movedim(where.axis, 0)
    a, b = a.reshape(len(a) if a.ndim else 1, -1), b.reshape(len(b) if b.ndim else 1, -1)
    exact = not a.is_floating_point()
    keep = torch.ones(len(a), dtype=torch.bool)
    if where.left_out is not None and where.left_out < len(a):
        keep[where.left_out] = False
    a, b = a[keep].double(), b[keep].double()
    if a.numel() == 0:
        return
    gap = torch.where(a == b, 0.0, (a - b).abs())
    allowed = 0.0 if exact else _allowed(where.site, a, tolerance)
    bad = ~(gap <= allowed)
    if not bool(bad.any()):
        return
    index = int(keep.nonzero()[int(bad.any(1).nonzero()[0])])
    largest = float(gap.max())
    row, position, words = where.describe(index) if where.axis is not None else (None, None, "")
    kind = "exact" if exact else "value" if math.isfinite(largest) else "nonfinite"
    at = "" if layer is None else f" layer {layer}"
    amount = "differs" if exact else f"max |a − b| = {largest:.3g}, allowed {allowed:.3g}"
    amount += f" ({int(bad.sum())} of {bad.numel()} numbers)"
    yield Difference(
        where.task_id, where.name, layer, row, position, kind,
        largest if math.isfinite(largest) else None, None if exact else allowed,
        f"task {where.task_id!r}: {where.name}{at}{words}: {amount}",
    )  # fmt: skip


def _allowed(site: str, baseline: torch.Tensor, tolerance: Tolerance) -> float:
    """Largest |a − b| that counts as equal, given the compared numbers of the baseline."""
    if site in _ABSOLUTE:
        return getattr(tolerance, _ABSOLUTE[site])
    finite = baseline[baseline.isfinite()]
    return tolerance.relative * float(finite.abs().max()) if len(finite) else 0.0


def _diff_record(
    task_id: str, a: Any, b: Any, tolerance: Tolerance, path: str, key: str = ""
) -> Iterator[Difference]:
    """Walk two records side by side: results are compared, prose and timings are not."""
    if key in _ABSOLUTE and isinstance(a, (int, float)) and isinstance(b, (int, float)):
        allowed = getattr(tolerance, _ABSOLUTE[key])
        if not abs(a - b) <= allowed:
            text = f"task {task_id!r}: {path}: {a} and {b}: |a − b| = {abs(a - b):.3g}, allowed {allowed:.3g}"
            yield Difference(task_id, path, None, None, None, "value", abs(a - b), allowed, text)
    elif key in _COMPARED:
        if a != b:
            text = f"task {task_id!r}: {path}: {_short(a)} in the baseline, {_short(b)} in the second run"
            yield Difference(task_id, path, None, None, None, "exact", None, None, text)
    elif isinstance(a, dict) and isinstance(b, dict):
        for name in [*a, *(name for name in b if name not in a)]:
            child = f"{path}.{name}"
            if name in a and name in b:
                yield from _diff_record(task_id, a[name], b[name], tolerance, child, name)
            elif name in _COMPARED:
                kind, side = ("missing", "second run") if name in a else ("extra", "baseline")
                yield _absent(task_id, child, kind, f"not in the record of the {side}")
    elif isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            yield _absent(task_id, path, "shape", f"{len(a)} and {len(b)} entries")
        for number, (left, right) in enumerate(zip(a, b, strict=False)):
            yield from _diff_record(task_id, left, right, tolerance, f"{path}.{number}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
