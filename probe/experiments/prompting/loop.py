"""Running a run's prompting tasks again from the middle: their states read out layer by layer, or replaced.

Only the last prompt position is touched; the memory of what stands before it is that of the unchanged prompt, so
a state put in behind block l runs one position through the blocks above l and nothing else (`model.edits.ResidualPatch`).

lens             the states that the run captured, through the final norm and the unembedding (nostalgebraist 2020)
tuned_lens       the same behind an affine map to the last layer's states, ridge by tasks left out (Belrose et al. 2023
                 train theirs on the divergence)
patch            `add`: the bare prompt's state plus the mean difference that the variant makes to the other tasks of
                 the family; `add_random`: plus a random vector as long; `add_shuffled`: plus another family's mean
                 difference, scaled to the same length; `remove`: the prompted state less the mean difference
task_vector      the bare prompt's state replaced by the state of another task of the family under the variant (Hendel
                 et al. 2023): the other task's input is the dummy query
function_vector  heads that carry the task, and the sum of what they write (`functions`)

Columns of prompting.parquet: `kl` = KL(this‖reference) over the vocabulary in nats, `kl_reverse` the other way. The
reference is, for `lens` and `tuned_lens`, the bare prompt at the same layer; for `remove` the bare prompt's output; else
the variant's output. `kl_start` is what `kl` would be without the patch. `token` is the likeliest token,
`target_rank` and `target_log_prob` are those of the target's first token, where no other choice begins with it.
Rows `text` say what a token is; `head` is filled in those of `head_effect`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from probe.experiments.prompting import functions as _functions  # noqa: F401 - enters its experiment
from probe.experiments.prompting.patches import (
    Patch,
    PromptingTasks,
    Row,
    as_long,
    compared,
    generator,
    read_out,
    run_patches,
)
from probe.experiments.registry import EXPERIMENTS, experiment
from probe.prompts.labels import BASE
from probe.runs.views.prompting import LEAST, Item, vector_groups

if TYPE_CHECKING:
    from probe.experiments.loaded_run import LoadedRun
    from probe.experiments.tool.conditions import Effort
    from probe.harness.runner import Progress


def make(
    opened: LoadedRun, wanted: Sequence[str], *, again: bool, effort: Effort, progress: Progress
) -> list[str]:
    """Make what is missing of the wanted experiments, or all of them again; returns what was made."""
    table = opened.run.table("prompting", arrow=True)
    stored = set(table["experiment"].unique().to_pylist())
    prompted = PromptingTasks(opened)
    if len(prompted.items) == 0:
        return []
    names = []
    for name in wanted:
        if again or not stored & set(EXPERIMENTS[name].rows):
            progress.log(f"{name}: {len(prompted.items)} prompting tasks")
            rows = list(EXPERIMENTS[name].make(prompted, effort.seed))
            if rows:
                _write(opened, EXPERIMENTS[name].rows, rows)
                names.append(name)
    return names


def _write(opened: LoadedRun, experiments: Sequence[str], rows: Sequence[Row]) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    kept = opened.run.table("prompting", arrow=True)
    kept = kept.filter(~pc.field("experiment").isin(list(experiments)))
    blank = dict.fromkeys(kept.column_names)
    new = pa.Table.from_pylist([blank | row for row in rows], schema=kept.schema)
    opened.run.write_table("prompting", pa.concat_tables([kept, new]))


# -- lens ----------------------------------------------------------------------------------------------------------


@experiment(
    "prompting",
    changes="nothing: the captured states of every layer pass the final norm and the unembedding",
    cost="nothing is run",
    rows=("lens", "text"),
)
def lens(prompted: PromptingTasks, _seed: int = 0) -> Iterator[Row]:
    yield from _lens(prompted, "lens", prompted.items, lambda states: states)
    yield from _token_texts(prompted)


def _lens(
    prompted: PromptingTasks, name: str, items: Sequence[Item], mapped: Callable[[np.ndarray], np.ndarray]
) -> Iterator[Row]:
    """Base and variants of some tasks at every layer, each variant against base at the same layer.

    `mapped` takes states [layer, d_model] to those that are read out.
    """
    for item in items:
        variants = [BASE, *item.variants]
        stack = np.stack([mapped(prompted.states[item.id, variant]) for variant in variants])
        for layer in range(stack.shape[1]):
            log_p = read_out(prompted.model, stack[:, layer])
            against = log_p[:1].expand_as(log_p)
            tokens = [item.target_token(variant) for variant in variants]
            rows = compared(log_p, against, tokens, full=True)
            for variant, row in zip(variants, rows, strict=True):
                yield {"task_id": item.id, "experiment": name, "variant": variant, "layer": layer, **row}


def _token_texts(prompted: PromptingTasks) -> Iterator[Row]:
    """Texts of the tokens that the analyzer lists: a run has no vocabulary."""
    from probe.runs.views.shifts import listed_tokens

    for token in listed_tokens(prompted.items):
        text = prompted.opened.codec.decode([token])
        yield {"task_id": "", "experiment": "text", "variant": "", "token": token, "text": text}


@experiment(
    "prompting",
    changes="nothing: the captured states pass an affine map to the last layer's states, fitted on the other half of the tasks",
    cost="nothing is run",
    by_name=True,
)
def tuned_lens(prompted: PromptingTasks, _seed: int = 0) -> Iterator[Row]:
    """Two halves of the tasks: each is read out with the maps fitted on the other one."""
    halves = [prompted.items[0::2], prompted.items[1::2]]
    if min(map(len, halves)) < LEAST:
        return
    for half, other in ((0, 1), (1, 0)):
        maps = _translators(prompted, halves[other])

        def mapped(states: np.ndarray, maps=maps) -> np.ndarray:
            return np.stack([weights(state) for weights, state in zip(maps, states, strict=True)])

        yield from _lens(prompted, "tuned_lens", halves[half], mapped)


def _translators(prompted: PromptingTasks, items: Sequence[Item]) -> list[Callable[[np.ndarray], np.ndarray]]:
    """An affine map from each layer's state to the last layer's: ridge, its strength chosen by generalized
    cross-validation (Golub, Heath and Wahba 1979)."""
    rows = np.stack(
        [states for (task, _), states in prompted.states.items() if task in {i.id for i in items}]
    )
    goal = rows[:, -1].astype(np.float64)
    maps: list[Callable[[np.ndarray], np.ndarray]] = []
    for layer in range(rows.shape[1] - 1):
        maps.append(_ridge(rows[:, layer].astype(np.float64), goal))
    return [*maps, lambda states: states]


def _ridge(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """y ≈ x + (x − x̄) W + b: the change to the last layer is fitted, so that a strong penalty is the plain lens."""
    change = y - x
    center, shift = x.mean(0), change.mean(0)
    u, s, v = np.linalg.svd(x - center, full_matrices=False)
    aligned = u.T @ (change - shift)
    best: tuple[float, float] = (np.inf, 0.0)
    for strength in np.logspace(-6, 2, 17) * s[0] ** 2:
        kept = s**2 / (s**2 + strength)
        rest = (change - shift) - u @ (kept[:, None] * aligned)
        score = float(np.square(rest).sum() / (len(x) - 1 - kept.sum()) ** 2)
        best = min(best, (score, float(strength)))
    weights = v.T @ ((s / (s**2 + best[1]))[:, None] * aligned)
    return lambda states: states + (states - center) @ weights + shift


# -- patches -------------------------------------------------------------------------------------------------------


@experiment(
    "prompting",
    changes="the state behind a block at the last prompt position is replaced: the bare state plus a variant's mean difference, or the prompted state less it",
    cost="one position through the blocks above, for each layer, variant and control",
    deciding=True,
    rows=("add", "add_random", "add_shuffled", "remove"),
)
def patch(prompted: PromptingTasks, seed: int) -> Iterator[Row]:
    yield from run_patches(prompted, _mean_patches(prompted, seed))


def _mean_patches(prompted: PromptingTasks, seed: int) -> Iterator[Patch]:
    families = vector_groups(prompted.items)
    names = sorted(families, key=str)
    for family, items in families.items():
        other = names[(names.index(family) + 1) % len(names)]
        for item in items:
            base = prompted.states[item.id, BASE]
            for variant in item.variants:
                difference = prompted.differences(item, variant, family)
                if difference is None:
                    continue
                yield Patch(item, "add", variant, BASE, base + difference)
                drawn = generator(seed, item.id, variant).standard_normal(difference.shape)
                yield Patch(item, "add_random", variant, BASE, base + as_long(drawn, difference))
                wrong = prompted.differences(item, variant, other) if other != family else None
                if wrong is not None:
                    yield Patch(item, "add_shuffled", variant, BASE, base + as_long(wrong, difference))
                state = prompted.states[item.id, variant]
                yield Patch(item, "remove", variant, variant, state - difference)


@experiment(
    "prompting",
    changes="the bare state is replaced by another task's state under the variant",
    cost="one position through the blocks above, for each layer and variant",
    by_name=True,
)
def task_vector(prompted: PromptingTasks, _seed: int = 0) -> Iterator[Row]:
    def patches() -> Iterator[Patch]:
        for items in vector_groups(prompted.items).values():
            for place, item in enumerate(items):
                for variant in item.variants:
                    others = (items[(place + step) % len(items)] for step in range(1, len(items)))
                    dummy = next((o for o in others if variant in o.outcomes), None)
                    if dummy is not None:
                        states = prompted.states[dummy.id, variant]
                        yield Patch(item, "task_vector", variant, BASE, states)

    yield from run_patches(prompted, patches())
