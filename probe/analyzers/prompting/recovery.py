"""What the experiments show: the shift by depth, and how much of it a vector in the residual stream recovers.

recovery = 1 − Σ KL(patched‖goal) / Σ KL(unpatched‖goal) over tasks: 1 where the patched output is the goal's, 0
where the patch does nothing, below 0 where it leads further away.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from probe.analyzers.prompting.bias import OTHER_FAMILY, explained
from probe.analyzers.prompting.shift import NAME
from probe.analyzers.registry import MEAN, WILSON, Figure, Measure, measure
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.maths.intervals import mean_interval
from probe.prompts.labels import BASE
from probe.runs.views.prompting import Item

if TYPE_CHECKING:
    import pandas

RANDOM = "random"
"""`control` of a random vector, head or subspace."""
_HENDEL = "Hendel, Geva and Globerson 2023, In-context learning creates task vectors, section 3.1"
_TODD = "Todd et al. 2024, Function vectors in large language models, section 2"


def _lens(experiment: str, column: str, distance: str, unit: str) -> Measure:
    tuned = experiment == "tuned_lens"
    read = (
        "behind an affine map to the last layer's states, fitted by ridge regression on the other half of the tasks "
        "(the paper fits on the divergence, on far more text), then "
        if tuned
        else ""
    )
    return measure(
        NAME,
        f"{experiment}_{column}",
        unit=unit,
        of="run",
        axes="variant layer",
        means=f"The shift at a layer: {distance} of the variant's and of base's state, both read {read}through the final "
        "norm and the unembedding; mean over tasks.",
        source="Belrose et al. 2023" if tuned else "nostalgebraist 2020",
        interval=MEAN,
        needs=("resid_post", f"experiment:{experiment}"),
        figure=Figure(
            kind="curve", x="layer", by="variant", card="bias" if experiment + column == "lenskl" else None
        ),
    )


def _recovery(
    name: str, means: str, experiment: str, axes: str, source: str | None = None, card: str | None = None
) -> Measure:
    return measure(
        NAME,
        name,
        unit="share of KL",
        of="run",
        axes=f"variant family? {axes}",
        means=f"Share of the shift, 1 − Σ KL(patched‖goal) / Σ KL(unpatched‖goal), {means}",
        source=source,
        interval=MEAN,
        needs=("resid_post", f"experiment:{experiment}"),
        figure=Figure(kind="curve", x="layer", by="variant", card=card),
    )


def _accuracy(name: str, means: str, experiment: str) -> Measure:
    return measure(
        NAME,
        name,
        unit="share of tasks",
        of="run",
        axes="variant family? layer",
        means=f"Share of tasks whose target's first token is the likeliest of the vocabulary {means}",
        interval=WILSON,
        needs=("resid_post", f"experiment:{experiment}"),
        figure=Figure(kind="curve", x="layer", by="variant"),
    )


LENSES = {
    experiment: {
        column: _lens(experiment, column, distance, unit)
        for column, distance, unit in (
            ("kl", "KL(variant‖base)", "nats"),
            ("js", "Jensen–Shannon divergence", "nats"),
            ("tv", "total variation", "probability"),
        )
    }
    for experiment in ("lens", "tuned_lens")
}
"""Experiment → column of its table → measure."""
LENS_KL = LENSES["lens"]["kl"]
PATCH_RECOVERY = _recovery(
    "patch_recovery",
    "that the bare prompt has after adding the mean Δh of the family's other tasks to its state; the goal is the prompted "
    "output. Controls, as long: `random`, a random vector; `other_family`, another family's mean Δh.",
    *("patch", "control? layer"),
    card="bias",
)
_HALVES = (
    "in the layer where the other half of the tasks has most of it: every second task of a family. With `half` of the "
    "layer that was chosen on that half; without, of all tasks; control `random` in the same layers"
)


def _held_out_measures(experiment: str) -> tuple[Measure, Measure]:
    """`…_recovery_heldout` and `…_recovery_minus_random` of an experiment."""
    heldout, net = (
        measure(
            NAME,
            f"{experiment}_recovery_{name}",
            unit="share of KL",
            of="run",
            axes=axes,
            means=means,
            interval=MEAN,
            needs=("resid_post", f"experiment:{experiment}"),
            figure=Figure(kind="estimates", by="variant", card="bias" if experiment == "patch" else None),
        )
        for name, axes, means in (
            ("heldout", "variant control? half? layer?", f"`{experiment}_recovery` {_HALVES}."),
            (
                "minus_random",
                "variant",
                f"`{experiment}_recovery_heldout` less that of its control `random`, paired by task.",
            ),
        )
    )
    return heldout, net


HELD_OUT = {
    "add": ("add_random", *_held_out_measures("patch")),
    "function_vector": ("function_vector_random", *_held_out_measures("function_vector")),
}
"""What the table names as experiment → its control, and the measures in a layer that is chosen on the other half."""
PATCH_RECOVERY_HELDOUT = HELD_OUT["add"][1]
PATCH_REMOVAL = _recovery(
    "patch_removal",
    "that goes from the prompted input if the mean Δh is taken from its state; the goal is the bare output.",
    *("patch", "layer"),
    card="bias",
)
TASK_VECTOR_RECOVERY = _recovery(
    "task_vector_recovery",
    "that the bare prompt has if its state is replaced by the prompted state of another task of the family.",
    *("task_vector", "layer", _HENDEL),
)
FUNCTION_VECTOR_RECOVERY = _recovery(
    "function_vector_recovery",
    "that the bare prompt has after adding the sum of the mean reads, times W_O, of the ten heads (at most a tenth of all) "
    "with the highest `head_effect` on the other half of the tasks; control `random`: of as many random heads, as long.",
    *("function_vector", "control? layer", _TODD),
)
HEAD_EFFECT = measure(
    NAME,
    "head_effect",
    unit="probability",
    of="run",
    axes="variant layer head",
    means="What P(target's first token) gains, after examples whose answers are exchanged, if one head's read is replaced "
    "by its mean over the family's other tasks under the variant with the most examples; mean over tasks.",
    source=_TODD,
    interval=f"{MEAN}, all heads together (Bonferroni)",
    needs=("experiment:function_vector",),
    figure=Figure(kind="matrix", x="head", by="layer"),
)
RECOVERIES: dict[str, tuple[Measure, str | None]] = {
    "add": (PATCH_RECOVERY, None),
    "add_random": (PATCH_RECOVERY, RANDOM),
    "add_shuffled": (PATCH_RECOVERY, OTHER_FAMILY),
    "remove": (PATCH_REMOVAL, None),
    "task_vector": (TASK_VECTOR_RECOVERY, None),
    "function_vector": (FUNCTION_VECTOR_RECOVERY, None),
    "function_vector_random": (FUNCTION_VECTOR_RECOVERY, RANDOM),
}
"""What the table names as experiment → its measure and the control that it is."""
ACCURACIES = {
    "add": _accuracy("patch_accuracy", "after adding, as in `patch_recovery`.", "patch"),
    "task_vector": _accuracy(
        "task_vector_accuracy", "after replacing, as in `task_vector_recovery`.", "task_vector"
    ),
    "function_vector": _accuracy(
        "function_vector_accuracy", "after adding, as in `function_vector_recovery`.", "function_vector"
    ),
    "lens": _accuracy("lens_accuracy", "in the logit lens; of `base` too.", "lens"),
}


def measures(items: Sequence[Item], table: pandas.DataFrame) -> Iterator[Row]:
    """By variant and layer, over all tasks and for each of several families."""
    if table.empty:
        return
    families = {item.id: item.family for item in items}
    table = cast("pandas.DataFrame", table[table.task_id.isin(list(families))])
    heads = table.experiment == "head_effect"
    if heads.any():
        yield from _head_effects(cast("pandas.DataFrame", table[heads]))
        table = cast("pandas.DataFrame", table[~heads])
    for name, (of_control, *defined) in HELD_OUT.items():
        for variant, rows in table[table.experiment == name].groupby("variant", sort=True):
            control = table[(table.experiment == of_control) & (table.variant == variant)]
            added, control = cast("pandas.DataFrame", rows), cast("pandas.DataFrame", control)
            yield from _held_out(added, control, families, str(variant), *defined)
    several = len(set(families.values())) > 1
    for key, rows in table.groupby(["experiment", "variant", "layer"], sort=True):
        experiment, variant, layer = cast("tuple[str, str, float]", key)
        parts: list[tuple[str | None, Any]] = [(None, rows)]
        if several:
            kinds = rows.task_id.map(families)
            parts += [(name, rows[kinds == name]) for name in sorted(set(kinds.dropna()))]
        for family, part in parts:
            yield from _of(experiment, part, {"variant": variant, "layer": int(layer), "family": family})


def _held_out(
    rows: pandas.DataFrame,
    control: pandas.DataFrame,
    families: Mapping[str, str | None],
    variant: str,
    heldout: Measure,
    net: Measure,
) -> Iterator[Row]:
    """The best layer of each half, measured on the other."""
    tasks = sorted(set(rows.task_id), key=lambda task: (str(families[task]), task))
    kl, start = (
        rows.pivot(index="task_id", columns="layer", values=name).loc[tasks] for name in ("kl", "kl_start")
    )
    of_control = control.pivot_table(index="task_id", columns="layer", values="kl").reindex(tasks)
    tested = []
    for half in (0, 1):
        chosen_on, others = tasks[half::2], tasks[1 - half :: 2]
        recovered = 1 - kl.loc[chosen_on].sum() / start.loc[chosen_on].sum()
        if not others or not np.isfinite(recovered).all() or start.loc[others].sum().min() <= 0:
            return
        layer = int(recovered.idxmax())
        of_layer = [of.loc[others, layer].to_numpy() for of in (kl, start)]
        of_layer.append(
            of_control.loc[others, layer].to_numpy() if layer in of_control else of_layer[0] * np.nan
        )
        tested.append(np.stack(of_layer))
        yield explained(heldout, *of_layer[:2], variant=variant, half=half, layer=layer)
    with_vector, size, at_random = np.concatenate(tested, axis=1)
    if size.sum() <= 0:
        return
    yield explained(heldout, with_vector, size, variant=variant)
    if not np.isnan(at_random).any():
        yield explained(heldout, at_random, size, variant=variant, control=RANDOM)
        yield explained(net, size - (at_random - with_vector), size, variant=variant)


def _head_effects(rows: pandas.DataFrame) -> Iterator[Row]:
    """By layer and head: what the head's mean read gives back of P(target), over tasks."""
    effects: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    for _, of_task in rows.groupby("task_id"):
        p = np.exp(of_task.target_log_prob)
        whole = of_task["head"].isna()
        start = float(p[whole].iloc[0])
        changed, p = of_task[~whole], p[~whole]
        for variant, layer, head, value in zip(
            changed.variant, changed.layer, changed["head"], p, strict=True
        ):
            effects[str(variant), int(layer), int(head)].append(float(value) - start)
    for (variant, layer, head), values in sorted(effects.items()):
        interval = mean_interval(values, family=len(effects))
        place = {"variant": variant, "layer": layer, "head": head}
        yield HEAD_EFFECT.row(WHOLE_RUN, float(np.mean(values)), n=len(values), interval=interval, **place)


def _of(experiment: str, rows: pandas.DataFrame, place: dict[str, Any]) -> Iterator[Row]:
    if place["variant"] != BASE and place["family"] is None:
        for column, defined in LENSES.get(experiment, {}).items():
            yield defined.mean(rows[column].tolist(), **place)
    if experiment in RECOVERIES and rows.kl_start.sum() > 0:
        defined, control = RECOVERIES[experiment]
        yield explained(defined, rows.kl.tolist(), rows.kl_start.tolist(), control=control, **place)
    if experiment in ACCURACIES:
        ranks = rows.target_rank.dropna()
        if len(ranks):
            yield ACCURACIES[experiment].share(ranks == 1, **place)
