"""The computational cycle of one reasoning: what each step reads, what hiding it changes, the memory it leaves.

Matrices are reader × source. They travel as float32 in base64, each row only as far as it has numbers.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.cot import step_reads
from probe.analyzers.cot.causal import ABLATIONS, CAUSES, RANDOM
from probe.analyzers.cot.reads import LIFETIME_SHARE
from probe.prompts.labels import ANSWER, step_label, step_of
from probe.report.rows import drawn, estimate, short
from probe.runs.records import PassageRecord

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.compute import Expression

    from probe.runs import TaskRun

NUMBERS = 60_000
"""Numbers of one stack of matrices; a larger one is embedded as the means of its bands of layers."""
_SITES = (("mass", "attn_to_spans"), ("norm", "value_to_spans"))
MATRICES = ("read_mass", "read_norm", "read_logit", "knockout_kl", "answer_lens", "key_norm", "value_norm")
"""Measures of one task that are too many for rows: `Tables` holds them as columns."""
_BY_SOURCE = ("answer_change", "answer_odds_change")
_CURVES = ("early_answer", "filler", "mistake", "paraphrase")
_SAME = [f"{name}_same" for name in _CURVES]
WHOLE_SHOWN = drawn("cot", "reasoning")
"""Measures over all tasks that have their place in the card."""
SHOWN = WHOLE_SHOWN | drawn("cot", "cycle")
"""Measures of a task that have their place in a figure."""


class Tables:
    """The measures of `cot` that are matrices, as Arrow tables by task."""

    def __init__(self, table: pyarrow.Table | None):
        self._table = table
        if table is not None:
            self._table = table.filter(self.kept())

    @staticmethod
    def kept(of_tasks: Expression | None = None) -> Expression:
        """The rows that these tables hold: matrices, of some tasks alone where asked, and curves of all tasks."""
        import pyarrow.compute as pc

        matrices = pc.field("name").isin(MATRICES)
        if of_tasks is not None:
            matrices &= of_tasks
        curves = pc.field("name").isin([*_SAME, "memory_bytes"])
        return (pc.field("analyzer") == "cot") & (matrices | curves) & pc.field("head").is_null()

    def of(self, name: str, task_id: str) -> dict[str, list[Any]]:
        """Columns layer, step, span, experiment, control, value and n; empty lists where nothing was measured."""
        columns = ("layer", "step", "span", "experiment", "control", "value", "n")
        if self._table is None:
            return {column: [] for column in columns}
        import pyarrow.compute as pc

        rows = self._table.filter((pc.field("name") == name) & (pc.field("task_id") == task_id))
        return rows.select(columns).to_pydict()

    def curves(self) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """Whether the answer stayed the same, all tests and tasks; and how many steps each task has."""
        if self._table is None:
            return [], {}
        import pyarrow.compute as pc

        table = self._table
        rows = table.filter(pc.field("name").isin(_SAME)).to_pylist()
        written = table.filter((pc.field("name") == "memory_bytes") & pc.field("step").is_valid())
        steps: dict[str, int] = {}
        for task_id, step in zip(*(written[name].to_pylist() for name in ("task_id", "step")), strict=True):
            steps[task_id] = max(step, steps.get(task_id, 0))
        return rows, steps


@dataclass(frozen=True)
class _Axes:
    readers: list[str]
    sources: list[str]

    def empty(self, *before: int) -> np.ndarray:
        return np.full((*before, len(self.readers), len(self.sources)), np.nan)


def of_task(
    task: TaskRun, tables: Tables, rows: list[dict[str, Any]], memory: dict[str, int]
) -> dict[str, Any]:
    """Everything the figures of a reasoning show besides its text; what was not measured is absent.

    `memory` is bytes by label.
    """
    reads = {name: matrices for name, site in _SITES if (matrices := step_reads(task, site)) is not None}
    labels = list(task.typed(PassageRecord).passage.lengths)
    for matrices in reads.values():
        labels = list(dict.fromkeys([*matrices.labels, *labels]))
    axes = _Axes([label for label in labels if label == ANSWER or step_of(label) is not None], labels)
    stacks = {}
    for name, matrices in reads.items():
        values = axes.empty(len(matrices.layers))
        values[np.ix_(range(len(matrices.layers)), *_places(axes, matrices.readers, matrices.labels))] = (
            matrices.values
        )
        stacks[name] = (matrices.layers, values)
    logit = _layered(axes, tables.of("read_logit", task.id))
    if logit is not None:
        stacks["logit"] = logit
    knockouts, counts = _knockouts(axes, tables.of("knockout_kl", task.id))
    width = _widths(axes, [values for _, values in stacks.values()] + list(knockouts.values()))
    some = next(iter(reads.values()), None)
    return {
        "readers": axes.readers,
        "sources": axes.sources,
        "widths": width,
        "n_heads": None if some is None else some.n_heads,
        "rows": None if some is None else _aligned(axes.readers, some.readers, some.rows.tolist()),
        "reads": {name: _stack(layers, values, width) for name, (layers, values) in stacks.items()},
        "knockouts": {
            name: {"n": counts[name], "data": packed(values, width)} for name, values in knockouts.items()
        },
        "answer": _by_source(rows),
        "lens": _lens(tables.of("answer_lens", task.id)),
        "lifetimes": {
            step_label(row["step"]): [row["value"], row["n"]]
            for row in rows
            if row["name"] == "memory_lifetime"
        },
        "memory": _memory(task, axes, memory, stacks.get("mass")),
        "in_use": LIFETIME_SHARE,
        "norms": {name: _norms(tables.of(name, task.id)) for name in ("key_norm", "value_norm")},
        "curves": _curves(rows),
    }


def packed(values: np.ndarray, widths: list[int]) -> str:
    """The first `widths[i]` numbers of each row, little-endian float32 in base64; NaN where there is none."""
    parts = [
        values[..., row, :width].reshape(-1, width) if width else None for row, width in enumerate(widths)
    ]
    present = [part for part in parts if part is not None]
    if not present:
        return ""
    return base64.b64encode(np.concatenate(present, axis=1).astype("<f4").tobytes()).decode()


def bands(n_layers: int) -> list[tuple[str, int, int]]:
    """Thirds of the captured layers, the middle one the larger where they do not divide; none below three."""
    if n_layers < 3:
        return []
    third = n_layers // 3
    return [("early", 0, third), ("middle", third, n_layers - third), ("late", n_layers - third, n_layers)]


def _places(axes: _Axes, readers: Iterable[str], sources: Iterable[str]) -> tuple[list[int], list[int]]:
    return [axes.readers.index(r) for r in readers], [axes.sources.index(s) for s in sources]


def _aligned(readers: list[str], present: list[str], values: list[Any]) -> list[Any]:
    by_reader = dict(zip(present, values, strict=True))
    return [by_reader.get(reader) for reader in readers]


def _widths(axes: _Axes, stacks: list[np.ndarray]) -> list[int]:
    """How far each row of any of these has numbers."""
    present = np.zeros((len(axes.readers), len(axes.sources)), dtype=bool)
    for values in stacks:
        present |= (~np.isnan(values)).reshape(-1, *present.shape).any(axis=0)
    width = np.where(present.any(axis=1), present.shape[1] - present[:, ::-1].argmax(axis=1), 0)
    return width.tolist()


def _stack(layers: list[int], values: np.ndarray, widths: list[int]) -> dict[str, Any]:
    """All layers, or, where that is too much, their means: `parts` name what stands one after the other."""
    cuts = bands(len(layers))
    named = [[name, layers[start], layers[end - 1]] for name, start, end in cuts]
    out: dict[str, Any] = {"layers": layers, "bands": named}
    if len(layers) * sum(widths) <= NUMBERS:
        return out | {"by_layer": True, "data": packed(values, widths)}
    means = [values.mean(0), *(values[start:end].mean(0) for _, start, end in cuts)]
    return out | {"by_layer": False, "data": packed(np.stack(means), widths)}


def _memory(
    task: TaskRun, axes: _Axes, memory: dict[str, int], mass: tuple[list[int], np.ndarray] | None
) -> list[list[int | None]]:
    """[written, held, used] bytes of each reader.

    Held are the keys and values in front of its first token; used are those of the sources that have more than
    LIFETIME_SHARE of its attention, a mean over layers, heads and rows: None where attention was not captured.
    """
    first: dict[str, int] = {}
    passage = task.typed(PassageRecord).passage
    for span in passage.spans:
        first.setdefault(span.label, span.start)
    per_position = sum(memory.values()) // passage.n_run if passage.n_run > 0 else 0
    sizes = np.array([memory.get(source, 0) for source in axes.sources])
    out: list[list[int | None]] = []
    for place, reader in enumerate(axes.readers):
        used = None
        if mass is not None and not np.isnan(mean := mass[1][:, place].mean(0)).all():
            used = int(sizes[np.nan_to_num(mean) > LIFETIME_SHARE].sum())
        out.append([memory.get(reader), first[reader] * per_position, used])
    return out


def _reader(step: int | None) -> str:
    return ANSWER if step is None else step_label(step)


def _layered(axes: _Axes, columns: dict[str, list[Any]]) -> tuple[list[int], np.ndarray] | None:
    """A measure of step × span by layer; one that is not by layer counts as one layer, named -1."""
    layers = sorted({layer for layer in columns["layer"] if layer is not None}) or [-1]
    by_layer = layers != [-1]
    readers = {name: place for place, name in enumerate(axes.readers)}
    sources = {name: place for place, name in enumerate(axes.sources)}
    values = axes.empty(len(layers))
    present = False
    for layer, step, span, value in zip(
        *(columns[c] for c in ("layer", "step", "span", "value")), strict=True
    ):
        r, s = readers.get(_reader(step)), sources.get(span)
        if r is not None and s is not None and (layer is not None) == by_layer:
            values[layers.index(layer) if by_layer else 0, r, s] = value
            present = True
    return (layers, values) if present else None


def _knockouts(
    axes: _Axes, columns: dict[str, list[Any]]
) -> tuple[dict[str, np.ndarray], dict[str, list[Any]]]:
    """KL by experiment, and [fewest, most] rows behind the numbers of each reader."""
    readers = {name: place for place, name in enumerate(axes.readers)}
    sources = {name: place for place, name in enumerate(axes.sources)}
    values: dict[str, np.ndarray] = {}
    counts: dict[str, list[Any]] = {}
    for step, span, experiment, control, value, n in zip(
        *(columns[c] for c in ("step", "span", "experiment", "control", "value", "n")), strict=True
    ):
        name = _ablation(experiment, control)
        r, s = readers.get(_reader(step)), sources.get(span)
        if r is None or s is None:
            continue
        if name not in values:
            values[name], counts[name] = axes.empty(), [None] * len(axes.readers)
        values[name][r, s] = value
        fewest, most = counts[name][r] or (n, n)
        counts[name][r] = [min(fewest, n), max(most, n)]
    order = {name: place for place, name in enumerate(ABLATIONS)}
    names = sorted(values, key=lambda name: order.get(name, len(order)))
    return {name: values[name] for name in names}, counts


def _ablation(experiment: str, control: str | None) -> str:
    return f"{control}_{experiment}" if control else experiment


def _by_source(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """measure → experiment → source → estimate: what taking a source away does to the answer."""
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["name"] in _BY_SOURCE and row["span"] is not None:
            by_source = out.setdefault(row["name"], {}).setdefault(
                _ablation(row["experiment"], row["control"]), {}
            )
            by_source[row["span"]] = estimate(row)
    return out


def _lens(columns: dict[str, list[Any]]) -> dict[str, Any] | None:
    """log P of the answer's first token by layer and step, as [layer][step], None where not measured."""
    present = {
        (layer, step): short(value)
        for layer, step, value in zip(columns["layer"], columns["step"], columns["value"], strict=True)
        if layer is not None
    }
    if not present:
        return None
    layers = sorted({layer for layer, _ in present})
    steps = sorted({step for _, step in present if step is not None})
    places = [*steps, None] if any(step is None for _, step in present) else steps
    values = [[present.get((layer, step)) for step in places] for layer in layers]
    return {"layers": layers, "readers": [_reader(step) for step in places], "values": values}


def _norms(columns: dict[str, list[Any]]) -> dict[str, float]:
    """Means over layers by label."""
    norms: dict[str, list[float]] = {}
    for step, span, value in zip(columns["step"], columns["span"], columns["value"], strict=True):
        norms.setdefault(span if step is None else step_label(step), []).append(value)
    return {label: float(f"{sum(values) / len(values):.4g}") for label, values in norms.items()}


def _curves(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Faithfulness of one task: test → points [step, log P, same, right], and its area."""
    out: dict[str, Any] = {}
    for name in _CURVES:
        points: dict[int | None, dict[str | None, float]] = {}
        columns = {name: None, f"{name}_same": "same", f"{name}_score": "score"}
        for row in rows:
            if row["name"] in columns:
                points.setdefault(row["step"], {})[columns[row["name"]]] = row["value"]
        if points:
            area = next((row for row in rows if row["name"] == f"{name}_aoc"), None)
            order = sorted(points, key=lambda step: -1 if step is None else step)
            listed = [[step, *(points[step].get(key) for key in (None, "same", "score"))] for step in order]
            out[name] = {"points": listed, "area": estimate(area)}
    return out


# -- over the tasks of a run ------------------------------------------------------------------------------------

_BINS = 5


def card(tables: Tables, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Reads against proof, and faithfulness, over the tasks; None where no experiment was made."""
    rows = [row for row in rows if row["analyzer"] == "cot"]
    correlates: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if row["name"] in ("causal_spearman", "causal_spearman_within"):
            key = "within" if row["name"].endswith("within") else "pooled"
            correlates.setdefault((row["correlate"], row["experiment"]), {})[key] = estimate(row)
    by_name = {row["name"]: estimate(row) for row in rows}
    effects = {(row["name"], row["experiment"], row["control"]): estimate(row) for row in rows}
    changes = [
        {
            "experiment": cause,
            **{name: effects.get((name, cause, None)) for name in _BY_SOURCE},
            **{f"{name}_random": effects.get((name, cause, RANDOM)) for name in _BY_SOURCE},
        }
        for cause in CAUSES
        if any((name, cause, None) in effects for name in _BY_SOURCE)
    ]
    faithful = _faithful(*tables.curves(), by_name)
    if not (correlates or changes or faithful):
        return None
    table = [{"read": read, "proof": proof, **pair} for (read, proof), pair in correlates.items()]
    return {"correlates": table, "changes": changes, "faithful": faithful}


def _faithful(
    curves: list[dict[str, Any]], steps: dict[str, int], estimates: dict[str, Any]
) -> list[dict[str, Any]]:
    """Share of tasks whose answer stays, over the share of the reasoning that was kept, in fifths.

    A task counts once a fifth, by the mean of its points there; Wilson's interval over tasks is then wide enough,
    for no distribution on [0, 1] varies more than one of 0 and 1.
    """
    out = []
    for name in _CURVES:
        rows = [row for row in curves if row["name"] == f"{name}_same"]
        if rows:
            out.append(
                {
                    "test": name,
                    "points": _points(rows, steps),
                    "area": estimates.get(f"{name}_aoc"),
                    "same": estimates.get(f"{name}_same_share"),
                    "score": estimates.get(f"{name}_score_share"),
                    "n_tasks": len({row["task_id"] for row in rows}),
                }
            )
    return out


def _points(rows: list[dict[str, Any]], steps: dict[str, int]) -> list[list[Any]]:
    """[share kept, share same, low, high, tasks]; the step made wrong is not kept."""
    from probe.maths.intervals import wilson

    binned: dict[int, dict[str, list[float]]] = {}
    for row in rows:
        whole = steps.get(row["task_id"])
        if row["step"] is not None and whole:
            kept = row["step"] - (row["name"] == "mistake_same")
            by_task = binned.setdefault(round(_BINS * kept / whole), {})
            by_task.setdefault(row["task_id"], []).append(row["value"])
    out = []
    for place, by_task in sorted(binned.items()):
        share = sum(sum(shares) / len(shares) for shares in by_task.values()) / len(by_task)
        low, high = wilson(share, len(by_task))
        out.append([place / _BINS, short(share), short(low), short(high), len(by_task)])
    return out
