"""Patching between two prompts: which states, put from one prompt into the other, bring its choice with them.

A pair of prompts differs in one thing (`probe.experiments.tool.pairs`), and so do the log-odds of two whole names. In the
mode `denoise` the corrupt prompt is run with a state of the clean one in place of its own, in `noise` the clean one
with a state of the corrupt one (Heimersheim and Nanda 2024, "How to use and interpret activation patching"). What comes
before the first difference is the same in both and has no patch. What is replaced: the residual stream behind a block, what its
attention or its MLP adds, at all positions of a span; the output of one head at the decision, that is at the last position
of the prompt and the tokens of the names. Spans of two lengths are aligned by their means (`pairs`).

Attribution patching (Nanda 2023; Syed et al. 2023) is the first-order estimate of the same: the gradient of the log-odds by the
state, times what would replace it. One pass forward and back gives it for every state.

A pair whose log-odds differ by less than LEAST_GAP nats is counted and not patched: its recovery would be a quotient of noise.

Columns of patching.parquet: `pair` what the prompts differ in, `partner` with which task or tool, `tool`, `other` the two
names, null for no tool. A row with a `status` is the pair: `ok`, `small_gap`, or why there is none (`no_partner`,
`not_scored`, `unaligned`, `no_room`, `not_finite`), with the log-odds under both prompts, `clean` and `corrupt`. Every other row is a
patch: `mode`; `donor`, `pair` or `control`, the third prompt; `site`, `span`, `layer`, `head`; `aligned` by `position`
or by `mean`; `value`, by how many nats the log-odds go to where the donor should bring them; `linear`, the estimate by
gradients of the same, null where it was not made. `heads` are the sets of `patch_sets`: JSON, with their number
`n_heads` in the column, and `half` the tasks that chose them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.errors import UsageError
from probe.experiments.registry import EXPERIMENTS, experiment
from probe.experiments.tool.attribution import Row, add_rows
from probe.experiments.tool.conditions import Effort, Subject
from probe.experiments.tool.pairs import (
    DECISION,
    DESCRIPTION,
    REQUEST,
    SYSTEM,
    TASKS,
    PromptPair,
    RequestText,
    exchanges,
    pairs,
)
from probe.experiments.tool.sides import DENOISE, LEAST_GAP, Side, sides
from probe.runs.read import finished
from probe.runs.records import ToolRecord
from probe.runs.views.heads import same_layers
from probe.runs.views.patching import CURVE, RANDOM, TESTED, half_of, patched, ranked_heads, smallest

if TYPE_CHECKING:
    from probe.capture.trials import Bench
    from probe.experiments.loaded_run import LoadedRun
    from probe.harness.runner import Progress
    from probe.prompts import Codec
    from probe.runs import Run

MOST = 5.0
"""Times the tokens of the tasks in the run that `patching` may run: as many layers are patched, evenly spaced, as that allows."""
FEWEST = 4
"""Layers that are patched however many tokens they take."""
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Numbers of heads among which the smallest set is looked for, up to half of all heads."""


@dataclass
class PatchingBench:
    """What the experiments on pairs of prompts share."""

    run: Run
    tasks: Mapping[str, Any]
    codec: Codec
    n_layers: int
    limit: int
    effort: Effort
    opened: LoadedRun | None = None
    progress: Progress | None = None

    @property
    def kind(self) -> str:
        """What the prompts of a pair differ in. Raises UsageError for no kind of pair."""
        if self.effort.between:
            return TASKS
        if self.effort.systems:
            return SYSTEM
        if self.effort.pairs not in (REQUEST, DESCRIPTION):
            raise UsageError(f"--pairs {self.effort.pairs}: one of {REQUEST}, {DESCRIPTION}")
        return self.effort.pairs

    def subject(self, task_id: str) -> tuple[Subject, ToolRecord]:
        record = self.run[task_id].typed(ToolRecord)
        task = self.tasks[task_id]
        return Subject(task, record, self.codec, self.n_layers, self.limit, self.effort), record

    @cached_property
    def _exchanges(self) -> list[RequestText]:
        ids = _patchable(self.run)
        return exchanges(((self.tasks[i], self.run[i].typed(ToolRecord)) for i in ids), self.codec)

    def pairs(self, task_ids: Sequence[str]) -> dict[str, PromptPair | str]:
        """The pair of each task, or why it has none."""
        others = self._exchanges if self.kind == REQUEST else ()
        wanted = [*task_ids, *(self.effort.between or ())]
        subjects = {task_id: self.subject(task_id) for task_id in dict.fromkeys(wanted)}
        by_task = pairs(self.kind, subjects, others, systems=self.effort.systems, between=self.effort.between)
        return dict.fromkeys(task_ids, "no_partner") | {
            task_id: pair for task_id, pair in by_task if task_id in task_ids
        }

    def layers(self, by_task: Mapping[str, PromptPair | str]) -> list[int]:
        """Layers whose residual stream is patched exactly, of all these pairs: as many as keep `patching` within MOST."""
        patchable = {task_id: pair for task_id, pair in by_task.items() if isinstance(pair, PromptPair)}
        if not patchable:
            return []
        passages = [self.run[task_id].typed(ToolRecord).passage for task_id in patchable]
        room = MOST * sum(passage.n_prompt + passage.n_new for passage in passages)
        room -= sum(map(unpatched_tokens, patchable.values()))
        exact = sum(map(exact_tokens, patchable.values()))
        for count in range(self.n_layers, FEWEST, -1):
            grid = spaced(self.n_layers, count)
            if exact * behind(grid, self.n_layers) <= room:
                return grid
        return spaced(self.n_layers, FEWEST)

    def bench(self, by_task: Mapping[str, PromptPair | str]) -> Bench:
        """What runs all these prompts."""
        from probe.capture.trials import Bench

        assert self.opened is not None
        slots = [
            prompt.n_prompt + pair.n_nodes
            for pair in by_task.values()
            if isinstance(pair, PromptPair)
            for prompt in (pair.clean, pair.corrupt, pair.control)
            if prompt is not None
        ]
        return Bench(self.opened.model, max(slots, default=1))


def spaced(n_layers: int, count: int) -> list[int]:
    """So many layers, evenly spaced, the first and the last among them."""
    return sorted({round(layer) for layer in np.linspace(0, n_layers - 1, min(count, n_layers)).tolist()})


def behind(grid: Sequence[int], n_layers: int) -> float:
    """What a patch in each of these layers runs together, in passes through the whole model."""
    return sum(n_layers - layer for layer in grid) / n_layers


def unpatched_tokens(pair: PromptPair) -> int:
    """Tokens that `patching` runs of a pair beside the patches: the prompts as they are, and one pass forward and back each."""
    return _prompt_tokens(pair) + 6 * (pair.clean.n_prompt - pair.first)


def _prompt_tokens(pair: PromptPair) -> int:
    """Tokens of the prompts of a pair as they are; the clean one is run again for the second mode."""
    return pair.clean.n_prompt + 3 * (pair.clean.n_prompt + pair.n_nodes - pair.first)


def predicted(
    name: str, pair: PromptPair, grid: Sequence[int], shape: Mapping[str, int]
) -> tuple[int, float]:
    """(patches, tokens run) of an experiment on a pair; a patch behind half of the layers runs half a token."""
    n_layers, slots = shape["n_layers"], pair.n_nodes + 1
    passes = behind(grid, n_layers)
    whole = _prompt_tokens(pair)
    heads = 2 * shape["n_heads"] * (n_layers + 1) / 2 * slots
    if name == "patching":
        n = len(pair.spans) * len(grid) * (3 if pair.control else 2)
        return n, unpatched_tokens(pair) + exact_tokens(pair) * passes
    if name == "patch_parts":
        both = exact_tokens(replace(pair, control=None)) * passes
        return 4 * len(pair.spans) * len(grid) + 2 * n_layers * shape["n_heads"], whole + 2 * both + heads
    n = 7 + sum(size <= n_layers * shape["n_heads"] // 2 for size in SIZES)
    return n, 2 * whole + n * slots


def exact_tokens(pair: PromptPair) -> int:
    """Tokens behind the spans of a pair that a patch in the first layer runs, in both directions and for the control."""
    total = 0
    for runs in pair.spans.values():
        for side, prompt in enumerate((pair.clean, pair.corrupt)):
            start = min(run[side][0] for run in runs)
            total += prompt.n_prompt + pair.n_nodes - start
            total += prompt.n_prompt + pair.n_nodes - start if side and pair.control else 0
    return total


# -- rows of a pair --------------------------------------------------------------------------------------------------


def _of_pair(pair: PromptPair | str, kind: str, task_id: str, name: str) -> Row:
    """Columns that all rows of a pair have."""
    row: Row = {"task_id": task_id, "experiment": name, "pair": kind}
    if isinstance(pair, str):
        return row | {"status": pair}
    tool, other = (candidate.name for candidate in pair.names)
    return row | {"partner": pair.partner, "tool": tool, "other": other}


def _each(
    bench: PatchingBench,
    by_task: Mapping[str, PromptPair | str],
    name: str,
    rows_of: Callable[[str, Bench, Side], list[Row]],
) -> Iterator[tuple[str, list[Row]]]:
    """(task id, rows) of each task: that of its pair, then those of each direction in which it is patched."""
    engine = bench.bench(by_task)
    if bench.progress is not None:
        bench.progress.start(len(by_task), "pairs")
    for task_id, pair in by_task.items():
        common, before = _of_pair(pair, bench.kind, task_id, name), engine.tokens
        rows: list[Row] = []
        if isinstance(pair, str):
            rows.append({})
        else:
            for step in sides(engine, pair, least=LEAST_GAP):
                rows += rows_of(task_id, engine, step) if isinstance(step, Side) else [step]
        yield task_id, [common | row for row in rows]
        if bench.progress is not None:
            bench.progress.done(round(engine.tokens - before), 1)


@experiment(
    "tool",
    requires="reads",
    loop="patching",
    changes="the residual stream behind a layer, at a span, is replaced by that of a prompt that differs in one thing (`--pairs`), "
    "in both directions; control: by that of a third prompt. Beside it the estimate by gradients, of attention, MLP and heads too",
    asks="Which states carry the choice from one prompt to the other?",
    cost=f"as many layers, for each span, as {MOST:.0f} times the tokens of the task allow, 2 passes back included",
    by_name=True,
)
def patching(bench: PatchingBench, task_ids: Sequence[str]) -> Iterator[tuple[str, list[Row]]]:
    """(task id, rows) of each task."""
    by_task = bench.pairs(task_ids)
    grid = bench.layers(by_task)
    yield from _each(bench, by_task, "patching", lambda _, engine, side: residual_rows(engine, side, grid))


def residual_rows(bench: Bench, side: Side, grid: Sequence[int]) -> list[Row]:
    """Patches of the residual stream by layer and span, beside estimates of these and of all other sites."""
    rows, trials = [], []
    gradients = bench.gradients(side.base)
    n_layers, n_heads = bench.model.facts.n_layers, bench.model.facts.n_heads
    spans = side.pair.spans
    for span, runs in spans.items():
        for site in ("resid_post", *bench.sites):
            for layer in range(n_layers):
                place = {"site": site, "span": span, "layer": layer, "aligned": side.aligned("pair", runs)}
                (linear,) = side.linear(gradients, runs, site, layer)
                exact = site == "resid_post" and layer in grid
                rows.append(side.row(**place, linear=float(linear)))
                if not exact:
                    continue
                trials.append((rows[-1], side.trial("pair", runs, site, [(layer, None)])))
                if "control" in side.donors:
                    place["aligned"] = side.aligned("control", runs)
                    rows.append(side.row(**place) | {"donor": "control"})
                    trials.append((rows[-1], side.trial("control", runs, site, [(layer, None)])))
    for layer in range(n_layers):
        by_head = side.linear(gradients, spans[DECISION], "z", layer)
        for head in range(n_heads):
            place = {"site": "z", "span": DECISION, "layer": layer, "head": head, "aligned": "position"}
            rows.append(side.row(**place, linear=float(by_head[head])))
    for (row, _), effect in zip(trials, side.effects(bench, [trial for _, trial in trials]), strict=True):
        row["value"] = effect
    return rows


@experiment(
    "tool",
    requires="reads",
    loop="patching",
    changes="as `patching`, of what attention and MLP of a layer add at a span, and of the output of each head at the decision",
    asks="Which heads and MLPs carry the choice from one prompt to the other?",
    cost="twice the layers and spans of `patching`, and every head at the decision, in both directions",
    by_name=True,
)
def patch_parts(bench: PatchingBench, task_ids: Sequence[str]) -> Iterator[tuple[str, list[Row]]]:
    """(task id, rows) of each task."""
    by_task = bench.pairs(task_ids)
    grid = bench.layers(by_task)
    yield from _each(bench, by_task, "patch_parts", lambda _, engine, side: part_rows(engine, side, grid))


def part_rows(bench: Bench, side: Side, grid: Sequence[int]) -> list[Row]:
    """Patches of attention and MLP by layer and span, and of each head at the decision."""
    rows, trials, facts = [], [], bench.model.facts
    spans = side.pair.spans
    for span, runs in spans.items():
        for site in bench.sites:
            for layer in grid:
                place = {"site": site, "span": span, "layer": layer}
                rows.append(side.row(**place, aligned=side.aligned("pair", runs)))
                trials.append(side.trial("pair", runs, site, [(layer, None)]))
    for layer in range(facts.n_layers):
        for head in range(facts.n_heads):
            place = {"site": "z", "span": DECISION, "layer": layer, "head": head}
            rows.append(side.row(**place, aligned="position"))
            trials.append(side.trial("pair", spans[DECISION], "z", [(layer, head)]))
    effects = side.effects(bench, trials)
    return [row | {"value": effect} for row, effect in zip(rows, effects, strict=True)]


@experiment(
    "tool",
    requires="reads",
    loop="patching",
    changes="the outputs of several heads at once are replaced by the clean prompt's, at the decision: the heads that recover most "
    "alone on one half of the tasks, in that half to find how many recover 80 %, and that many in the other half; control: as many "
    "random heads of the same layers",
    asks="How few heads carry the choice?",
    cost="14 sets and 1 + 6 of the size that was found, at the decision",
    by_name=True,
)
def patch_sets(bench: PatchingBench, task_ids: Sequence[str]) -> Iterator[tuple[str, list[Row]]]:
    """(task id, rows) of each task, once all sizes are known. Heads are ranked by `patch_parts` over all tasks that have it."""
    table = bench.run.table("patching")
    ranked = ranked_heads(table, bench.kind)
    half = half_of(patched(table, "patch_parts", bench.kind)["task_id"].tolist())
    if not all(ranked):
        return
    by_task = bench.pairs(task_ids)
    sizes = [size for size in SIZES if size <= len(ranked[0]) // 2]

    def curve(task_id: str, engine: Bench, side: Side) -> list[Row]:
        here = half.get(task_id)
        return (
            [] if here is None else set_rows(engine, side, [(CURVE, here, ranked[here][:n]) for n in sizes])
        )

    def tested(task_id: str, engine: Bench, side: Side) -> list[Row]:
        if task_id not in half:
            return []
        other = 1 - half[task_id]
        best = ranked[other][: chosen[other]]
        free = [head for head in ranked[other] if head not in best]
        generator = np.random.default_rng(bench.effort.seed)
        drawn = [same_layers(best, free, generator) for _ in range(bench.effort.random_heads)]
        return set_rows(engine, side, [(TESTED, other, best), *((RANDOM, other, heads) for heads in drawn)])

    curves = dict(_each(bench, by_task, "patch_sets", curve))
    chosen = [_size(curves, half, number) or sizes[-1] for number in (0, 1)]
    for task_id, rows in _each(bench, by_task, "patch_sets", tested):
        yield task_id, curves[task_id] + rows[1:]


def set_rows(
    bench: Bench, side: Side, sets: Sequence[tuple[str, int, Sequence[tuple[int, int]]]]
) -> list[Row]:
    """One row a set of heads, (what it is, the half that chose it, its heads), into the corrupt prompt."""
    if side.mode != DENOISE:
        return []
    runs = side.pair.spans[DECISION]
    effects = side.effects(bench, [side.trial("pair", runs, "z", heads) for _, _, heads in sets])
    return [
        side.row(site="z", span=DECISION, aligned="position", value=effect)
        | {"heads": json.dumps({what: heads}), "n_heads": len(heads), "half": half}
        for (what, half, heads), effect in zip(sets, effects, strict=True)
    ]


def _size(curves: Mapping[str, Sequence[Row]], half: Mapping[str, int], number: int) -> int | None:
    """The smallest size that recovers enough on a half of the tasks."""
    import pandas

    rows = [
        {"n_heads": row["n_heads"], "value": row["value"], "gap": abs(rows[0]["clean"] - rows[0]["corrupt"])}
        for task_id, rows in curves.items()
        if half.get(task_id) == number
        for row in rows[1:]
    ]
    return smallest(pandas.DataFrame(rows)) if rows else None


# -- the loop ------------------------------------------------------------------------------------------------------


def make(
    opened: LoadedRun, wanted: Sequence[str], *, again: bool, effort: Effort, progress: Progress
) -> list[str]:
    """Make what is missing of the wanted experiments, or all of them again; returns what was made."""
    import pyarrow.compute as pc

    run, completed = opened.run, []
    bench = PatchingBench(
        run,
        opened.tasks,
        opened.codec,
        opened.model.facts.n_layers,
        opened.max_new_tokens("tool_selection"),
        effort,
        opened,
        progress,
    )
    # Sets are chosen among heads that were patched alone: what is missing of these is made, whoever named it.
    names = dict.fromkeys(["patch_parts"] * ("patch_sets" in wanted) + list(wanted))
    for name in sorted(names, key=list(EXPERIMENTS).index):
        todo = missing(run, name, bench.kind, effort, again=again and name in wanted)
        if not todo:
            continue
        progress.log(f"{name}: pairs of {len(todo)} tasks that differ in {bench.kind}")
        kept = run.table("patching", arrow=True)
        field = (pc.field("experiment") == name) & (pc.field("pair") == bench.kind)
        kept = kept.filter(~(field & pc.field("task_id").isin(todo)))
        add_rows(run, "patching", kept, EXPERIMENTS[name].make(bench, todo))
        completed.append(name)
    return completed


def _patchable(run: Run) -> list[str]:
    """Tool tasks that ran to their end and whose choice is between two names at least."""
    records = ((task.id, task.typed(ToolRecord)) for task in finished(run, "tool_selection"))
    return [
        task_id
        for task_id, record in records
        if record.status == "ok" and sum(bool(e.token_ids) for e in record.decision.tool_probabilities) > 1
    ]


def missing(run: Run, name: str, kind: str, effort: Effort, *, again: bool) -> list[str]:
    """The tasks whose pair of this kind an experiment has not patched, or found not to be patched. Raises UsageError for
    tasks to pair that the run has not."""
    ids = _patchable(run)
    for task_id in effort.between or ():
        if task_id not in ids:
            raise UsageError(f"--between {task_id}: no tool task of this run that ran to its end")
    ids = ids if effort.between is None else [effort.between[0]]
    table = run.table("patching")
    stored = table[(table["experiment"] == name) & (table["pair"] == kind) & table["status"].notna()]
    patched_already = set() if again else {*stored["task_id"]}
    return [task_id for task_id in ids if task_id not in patched_already]
