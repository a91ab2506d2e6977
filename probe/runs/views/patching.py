"""Patches between two prompts, as experiments and analyzers read them from patching.parquet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from probe.runs.views.heads import halves

Frame = Any
"""A pandas DataFrame."""
SHARE = 0.8
"""Share of the gap that a set of heads has to recover."""
CURVE, TESTED, RANDOM = "curve", "together", "random"
"""What a set of heads is: one of those among which the size is chosen, on the tasks that chose its heads; that size on
the other tasks; as many random heads of the same layers, on the other tasks."""


def patched(table: Frame, experiment: str, pair: str) -> Frame:
    """The patches of pairs that are patched, each with its pair's `gap`: how far the log-odds under the clean prompt and those
    under the corrupt one lie apart, nats."""
    rows = table[(table["pair"] == pair) & (table["experiment"] == experiment)]
    ok = rows[rows["status"] == "ok"].set_index("task_id")
    of_ok = rows[rows["status"].isna() & rows["task_id"].isin(ok.index)]
    return of_ok.assign(gap=of_ok["task_id"].map((ok["clean"] - ok["corrupt"]).abs()))


def half_of(task_ids: Sequence[str]) -> dict[str, int]:
    """The half, 0 or 1, of each task."""
    ids = sorted(set(task_ids))
    return dict(zip(ids, halves(ids, [0] * len(ids)).tolist(), strict=True)) if ids else {}


def ranked_heads(table: Frame, pair: str) -> list[list[tuple[int, int]]]:
    """Of each half of the tasks all heads (layer, head), those first that recover most of its gap when they alone are
    replaced by the clean prompt's."""
    rows = patched(table, "patch_parts", pair)
    rows = rows[(rows["site"] == "z") & (rows["mode"] == "denoise")]
    halves_of = half_of(rows["task_id"].tolist())
    ranked = []
    for half in (0, 1):
        of_half = rows[rows["task_id"].map(halves_of) == half]
        sums = of_half.groupby(["layer", "head"])["value"].sum().sort_values(ascending=False, kind="stable")
        ranked.append([(int(layer), int(head)) for layer, head in sums.index])
    return ranked


def smallest(curve: Frame) -> int | None:
    """Of the sets of a curve (`n_heads`, `value`, `gap`, a row a task) the smallest that recovers SHARE of the gap."""
    sums = curve.groupby("n_heads")[["value", "gap"]].sum().sort_index()
    shares = sums["value"] / sums["gap"]
    enough = shares.index[np.asarray(shares >= SHARE)]
    return int(enough[0]) if len(enough) else None
