"""How large the memory of each step is, how long its keys and values are, and whether it gives the reads back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.cot.reads import NAME
from probe.analyzers.registry import Figure, measure
from probe.prompts.labels import SINK, step_of
from probe.runs.records import PassageRecord

if TYPE_CHECKING:
    from probe.analyzers.rows import Grid
    from probe.runs import Run, TaskRun

MEMORY_BYTES = measure(
    NAME,
    "memory_bytes",
    unit="bytes",
    axes="step? span?",
    means="Bytes of keys and values that the positions of a step, or of another label, take in the KV cache, all layers "
    "together; of latent attention those of the compressed vector. The last emitted token is never run and has none.",
    figure=Figure(kind="bars", by="step", card="cycle"),
)
KEY_NORM = measure(
    NAME,
    "key_norm",
    unit="norm",
    axes="layer step? span?",
    means="L2 norm ‖k‖ of the keys of a step, or of another label, as they are used (after rotary positions), mean over "
    "positions and kv heads.",
    needs=("keys",),
    figure=Figure(kind="bars", by="step", card="cycle"),
)
VALUE_NORM = measure(
    NAME,
    "value_norm",
    unit="norm",
    axes="layer step? span?",
    means="L2 norm ‖v‖ of the values of a step, or of another label, mean over positions and kv heads: what is there to "
    "be read, before attention and W_O; a sink has small ones.",
    needs=("values",),
    figure=Figure(kind="bars", by="step", card="cycle"),
)
RECONSTRUCTION_ERROR = measure(
    NAME,
    "reconstruction_error",
    unit="relative",
    axes="layer",
    means="max |c − z| / max |z|: the head outputs c rebuilt from the saved queries, keys and values against those that the "
    "model computed; it checks that the saved memory is the one that the model used. None for a model with a learned "
    "sink, which is not saved.",
    needs=("queries", "keys", "values", "z"),
    figure=Figure(kind="text", card="cycle"),
)

_PATTERN_ELEMENTS = 1 << 24


def memory_bytes(run: Run, task: TaskRun) -> dict[str, int]:
    """Bytes of keys and values that the positions of each label take in the KV cache, all layers together.

    Σ over layers of n_kv_heads · (d_head + d_value) · item size a position; of latent attention what is stored, the compressed
    vector; nothing of layers that read another layer's keys and values. The last emitted token is never run and so has
    no entry.
    """
    import torch

    model, passage = run.run["model"], task.typed(PassageRecord).passage
    item = getattr(torch, model["dtype"]).itemsize
    if (layers := model.get("layers")) is not None:
        per_position = item * sum(layer["memory"] for layer in layers)
    else:
        per_position = 2 * model["n_layers"] * model["n_kv_heads"] * model["d_head"] * item
    sizes: dict[str, int] = {}
    if not per_position:  # a state of constant size is nobody's
        return sizes
    for span in passage.spans:
        positions = max(0, min(span.end, passage.n_run) - span.start)
        if positions:
            sizes[span.label] = sizes.get(span.label, 0) + positions * per_position
    return sizes


def memory(task_id: str, sizes: dict[str, int]) -> Iterator[Grid]:
    if sizes:
        steps = [step_of(label) for label in sizes]
        where = {
            "step": steps,
            "span": [None if k is not None else s for k, s in zip(steps, sizes, strict=True)],
        }
        values = np.array(list(sizes.values()), dtype=np.float64)
        yield MEMORY_BYTES.grid(task_id, values, where)


def reconstruction(run: Run, task: TaskRun) -> Iterator[Grid]:
    """`reconstruction_error` of every captured layer."""
    if not all(site in task for site in ("queries", "keys", "values", "z")):
        return
    if SINK in (task.listed("labels") or ()):
        return
    from probe.maths.reads import LayerAttention

    layers = task.layers("z")
    n_heads, n_rows = task.shape("z")[1:3]
    saved = run.run["model"]["attention"]
    facts = [LayerAttention.of(saved[layer]) for layer in layers]
    errors = [reconstruction_error(task, index, fact) for index, fact in enumerate(facts)]
    yield RECONSTRUCTION_ERROR.grid(task.id, np.array(errors), {"layer": layers}, n=n_rows * n_heads)


def reconstruction_error(task: TaskRun, index: int, layer: Any) -> float:
    """max |c − z| / max |z| over all rows and heads of the captured layer number `index`.

    c = Σ_j α_j v_j with α from the saved queries and keys; `layer` is the layer's LayerAttention.
    """
    from probe.maths.reads import pattern, read

    queries, keys, values, z = (task.slice(site)[index] for site in ("queries", "keys", "values", "z"))
    rows = task["rows"]
    block = max(1, _PATTERN_ELEMENTS // (queries.shape[0] * keys.shape[1]))
    worst = 0.0
    for start in range(0, len(rows), block):
        at = slice(start, start + block)
        rebuilt = read(pattern(queries[:, at], keys, rows[at], layer), values)
        worst = max(worst, float((rebuilt - z[:, at].float()).abs().max()))
    return worst / float(z.float().abs().max())


def norms(task: TaskRun) -> Iterator[Grid]:
    """`key_norm` and `value_norm` of each label, by layer."""
    spans = task.typed(PassageRecord).passage.spans
    for defined, site in ((KEY_NORM, "keys"), (VALUE_NORM, "values")):
        if site not in task:
            continue
        n_layers, n_kv_heads, n_run = task.shape(site)[:3]
        places = {}
        for span in spans:
            places.setdefault(span.label, []).extend(range(span.start, min(span.end, n_run)))
        places = {label: positions for label, positions in places.items() if positions}
        stored = task.slice(site)
        sizes = np.stack(
            [stored[layer].float().norm(dim=-1).mean(0).double().numpy() for layer in range(n_layers)]
        )
        steps = [step_of(label) for label in places]
        where = {
            "step": steps,
            "span": [None if k is not None else s for k, s in zip(steps, places, strict=True)],
        }
        yield defined.grid(
            task.id,
            np.stack([sizes[:, positions].mean(1) for positions in places.values()], axis=1),
            {"layer": task.layers(site)},
            where,
            n=n_kv_heads * np.array([len(positions) for positions in places.values()])[None],
        )
