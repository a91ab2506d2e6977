"""What the experiments show: the shift by depth, and how much of it a vector in the residual stream recovers.

recovery = 1 − Σ KL(patched‖goal) / Σ KL(unpatched‖goal) over tasks: 1 where the patched output is the goal's, 0
where the patch does nothing, below 0 where it leads further away.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from probe.analyzers.prompting.estimates import estimate, mean_of, ratio
from probe.analyzers.rows import Row
from probe.maths.statistics import wilson
from probe.prompts.labels import BASE
from probe.runs.views.prompting import Item

if TYPE_CHECKING:
    import pandas

RECOVERIES = {
    "add": "patch_recovery",
    "add_random": "patch_recovery_random",
    "add_shuffled": "patch_recovery_shuffled",
    "remove": "patch_removal",
    "task_vector": "task_vector_recovery",
    "function_vector": "function_vector_recovery",
    "function_vector_random": "function_vector_recovery_random",
}
"""Experiment → its measure."""
ACCURACIES = {
    "add": "patch_accuracy",
    "task_vector": "task_vector_accuracy",
    "function_vector": "function_vector_accuracy",
    "lens": "lens_accuracy",
}
LENSES = {"lens": "lens", "tuned_lens": "tuned_lens"}


def measures(items: Sequence[Item], table: pandas.DataFrame) -> Iterator[Row]:
    """By variant, layer and (`span`) family: `lens_kl`, `lens_js`, `lens_tv` (and with `tuned_`), recoveries with their
    controls, and the share of tasks whose target's first token is the likeliest of the whole vocabulary."""
    if table.empty:
        return
    families = {item.id: item.family for item in items}
    table = cast("pandas.DataFrame", table[table.task_id.isin(list(families))])
    heads = table.experiment == "head_effect"
    if heads.any():
        yield from _head_effects(cast("pandas.DataFrame", table[heads]))
        table = cast("pandas.DataFrame", table[~heads])
    several = len(set(families.values())) > 1
    for key, rows in table.groupby(["experiment", "variant", "layer"], sort=True):
        experiment, variant, layer = cast("tuple[str, str, float]", key)
        where = {"variant": variant, "layer": int(layer)}
        parts: list[tuple[str | None, Any]] = [(None, rows)]
        if several:
            kinds = rows.task_id.map(families)
            parts += [(name, rows[kinds == name]) for name in sorted(set(kinds.dropna()))]
        for family, own in parts:
            yield from _of(experiment, own, where | {"span": family})


def _head_effects(rows: pandas.DataFrame) -> Iterator[Row]:
    """`head_effect` by layer and head: what the head's mean read gives back of P(target), over tasks."""
    found: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    for _, own in rows.groupby("task_id"):
        p = np.exp(own.target_log_prob)
        whole = own["head"].isna()
        start = float(p[whole].iloc[0])
        own, p = own[~whole], p[~whole]
        for variant, layer, head, value in zip(own.variant, own.layer, own["head"], p, strict=True):
            found[str(variant), int(layer), int(head)].append(float(value) - start)
    for (variant, layer, head), values in sorted(found.items()):
        yield mean_of("head_effect", values, "probability", variant=variant, layer=layer, head=head)


def _of(experiment: str, rows: pandas.DataFrame, where: dict[str, Any]) -> Iterator[Row]:
    if experiment in LENSES and where["variant"] != BASE and where["span"] is None:
        for column in ("kl", "js", "tv"):
            unit = "probability" if column == "tv" else "nats"
            yield mean_of(f"{LENSES[experiment]}_{column}", rows[column].tolist(), unit, **where)
    if experiment in RECOVERIES and rows.kl_start.sum() > 0:
        value, interval = ratio(rows.kl.tolist(), rows.kl_start.tolist())
        yield estimate(RECOVERIES[experiment], value, "share of KL", len(rows), interval, **where)
    if experiment in ACCURACIES:
        ranks = rows.target_rank.dropna()
        if len(ranks):
            hits = float((ranks == 1).mean())
            yield estimate(
                ACCURACIES[experiment], hits, "share of tasks", len(ranks), wilson(hits, len(ranks)), **where
            )
