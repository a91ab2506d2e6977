"""Steering a choice: a vector is added where the name begins, and another tool's name is to become the most probable.

For a task whose most probable name is A, and another name B: the vector is added to the residual stream behind one block, at
the one row that emits the first token of the name (`unembedding`: the first that differs between A and B). All candidates
are scored behind it, whole names (Turner et al. 2023, "Activation addition"; Wu et al. 2026, arXiv 2605.07990, add the mean
difference and the row of the output layer).

Pairs: `drawn`, B is drawn among the other names, if possible one that has a mean where A has one; `right`, B is the most
probable right name, where A is wrong.

Directions, each with the same length, `dose` mean lengths of the layer's states (`directions`):
mean_difference  mean state of tasks that name B, less that of tasks that name A
unembedding      the output layer's row of B's first token that is not A's
probe            gradient of a ridge regression of B against A
random           a Gaussian vector, one for each task, pair and layer: the control

Tasks are divided in halves by their request. Directions are had from half 0; a task of half 0 is steered by those of the
others. The setting (layer, dose) of a direction is that of most switches in half 0, of pairs `drawn`, among those whose price on
unrelated text is at most `most_kl`; half 1 tests it.

Columns of steering.parquet: `half`; `role`; `tool` A and `other` B, null for no tool; `part` one of

switch      `value` 1 where B is now the most probable name; `before` and `log_prob` log P(B), nats, without and with the vector
kl          `value` KL(without ‖ with), nats, of the next token of unrelated texts: of a pair, without a task
difference  `value` length of the mean difference, in mean lengths of a state; of a pair, `dose` the same
setting     `value` the limit `most_kl` under which layer and dose were chosen
elsewhere   in another task of half 1, whose right name is neither A nor B, under the vector at the setting: `value` 1 where
            an acceptable name is the most probable, `before` without it
call        where the setting switched the choice in half 1, what is then generated: `value` 1 for a valid call of B, `before` 1
            where the run's call of A was valid
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.errors import UsageError
from probe.experiments.registry import EXPERIMENTS, experiment
from probe.experiments.tool.attribution import add_rows
from probe.experiments.tool.conditions import Condition, Effort, Subject
from probe.experiments.tool.decisions import (
    captured_layers,
    decided,
    likeliest,
    log_probs,
    request_halves,
    spoken,
)
from probe.experiments.tool.directions import (
    DIRECTIONS,
    MEAN_DIFFERENCE,
    RANDOM,
    UNEMBEDDING,
    Directions,
    Named,
    UnrelatedText,
    parting,
)
from probe.model.edits import StateEdit
from probe.runs.records import ToolProbability
from probe.runs.views.choice import decision_states

if TYPE_CHECKING:
    import pyarrow

    from probe.experiments.loaded_run import LoadedRun
    from probe.experiments.tool.score import Scorer
    from probe.harness.runner import Progress
    from probe.runs import Run

DRAWN, RIGHT = "drawn", "right"
LAYERS = 3
"""Layers of the grid unless `--layers` names some: a third, two thirds and all of the way up."""
DOSES = (0.1, 0.25, 0.5, 1.0)
_CHUNK = 4
"""Tasks whose grids are scored together."""
_GENERATED = 8
"""Calls that are generated together."""
_STOPPED = b"stopped"
"""Key in the metadata of a table to which rows are missing: the settings under which they are to be made."""

Row = dict[str, Any]
Setting = tuple[int, float]
"""Layer and dose."""


@dataclass(frozen=True)
class SteeredPair:
    """A task whose choice is to be turned, and what to."""

    task_id: str
    half: int
    role: str
    tool: ToolProbability
    other: ToolProbability
    place: int
    """Tokens that the two names share."""
    token: int
    """The other's next token."""

    @property
    def key(self) -> tuple[str | None, str | None]:
        return self.tool.tool, self.other.tool

    def row(self, part: str, direction: str, setting: Setting, **values: Any) -> Row:
        layer, dose = setting
        tool, other = self.key
        return {
            "task_id": self.task_id,
            "half": self.half,
            "part": part,
            "role": self.role,
            "tool": tool,
            "other": other,
            "direction": direction,
            "layer": layer,
            "dose": dose,
        } | values


class SteeringTasks:
    """The tasks, pairs, layers and doses of a run, from the run alone."""

    def __init__(self, opened: LoadedRun, effort: Effort):
        """Raises UsageError for layers that were not captured and doses that are none."""
        self.opened, self.effort, run = opened, effort, opened.run
        records = decided(run)
        captured = captured_layers(run, records)
        self.layers, self.doses = layers_of(captured, effort), doses_of(effort)
        places = [captured.index(layer) for layer in self.layers]
        states: dict[str, np.ndarray] = {}
        for task_id in records:
            layers, state = decision_states(run[task_id]) or ([], np.empty(0))
            if layers and layers == captured and np.isfinite(state[places]).all():
                states[task_id] = state[places]
        self.records = {task_id: records[task_id] for task_id in states}
        half = request_halves(opened.tasks, self.records)
        self.named = [
            Named(task_id, spoken(record)[0].tool, half[task_id], states[task_id])
            for task_id, record in self.records.items()
        ]

    def settings(self) -> str:
        """What the rows depend on beside the run, in JSON."""
        effort, tasks = self.effort, [task.task_id for task in self.named]
        return json.dumps([self.layers, self.doses, effort.most_kl, effort.seed, tasks])

    def subject(self, task_id: str) -> Subject:
        limit = self.opened.max_new_tokens("tool_selection")
        n_layers = self.opened.run.run["model"]["n_layers"]
        return Subject(
            self.opened.tasks[task_id],
            self.records[task_id],
            self.opened.codec,
            n_layers,
            limit,
            self.effort,
        )

    def pairs(self, directions: Directions) -> list[SteeredPair]:
        """Those of every task, in the order of the tasks."""
        return [pair for task in self.named for pair in self._of_task(task, directions)]

    def _of_task(self, task: Named, directions: Directions) -> Iterator[SteeredPair]:
        record = self.records[task.task_id]
        first, *others = spoken(record)
        without = task.task_id
        whole = [entry for entry in others if directions.has_mean(entry.tool, without)]
        if not directions.has_mean(first.tool, without):
            whole = []
        draw = _draw(self.effort.seed, task.task_id)
        wanted = {DRAWN: (whole or others)[draw.integers(len(whole or others))]}
        right = next((entry for entry in others if entry.tool in record.right), None)
        if right is not None and first.tool not in record.right:
            wanted[RIGHT] = right
        for role, other in wanted.items():
            parted = parting(first, other)
            if parted is not None:
                yield SteeredPair(task.task_id, task.half, role, first, other, *parted)


def doses_of(effort: Effort) -> tuple[float, ...]:
    """Raises UsageError for a dose that is none."""
    doses = DOSES if effort.doses is None else tuple(dict.fromkeys(effort.doses))
    if not doses or not all(math.isfinite(dose) and dose for dose in doses):
        raise UsageError(f"--doses {', '.join(map(str, doses))}: give finite numbers other than 0")
    return doses


def _draw(seed: int, *words: str) -> np.random.Generator:
    from probe.experiments.prompting.patches import generator

    return generator(seed, "steering", *words)


def layers_of(captured: Sequence[int], effort: Effort) -> list[int]:
    """The layers that are steered, of those that were captured. Raises UsageError for others."""
    if effort.steer_layers is not None:
        if missing := {*effort.steer_layers} - {*captured}:
            raise UsageError(
                f"--layers {', '.join(map(str, sorted(missing)))}: the run has resid_post of layers "
                f"{', '.join(map(str, captured)) or 'none'}"
            )
        return sorted({*effort.steer_layers})
    n = len(captured)
    return sorted({captured[max(0, n * k // LAYERS - 1)] for k in range(1, LAYERS + 1)}) if n else []


class Steerer:
    """Adds vectors to choices and says what they then are."""

    def __init__(self, steered: SteeringTasks, directions: Directions, scorer: Scorer):
        self.steered, self.directions, self.scorer = steered, directions, scorer

    def edit(self, pair: SteeredPair, direction: str, setting: Setting, subject: Subject) -> StateEdit | None:
        """The vector of a pair, in the prompt of its own task or of another; None where it has none."""
        import torch

        layer, dose = setting
        without = pair.task_id if pair.half == 0 else None
        vector = self.directions.vector(direction, layer, *pair.key, pair.token, without, pair.task_id)
        if vector is None:
            return None
        values = torch.from_numpy(vector * np.float32(self.directions.lengths[layer]))
        shared = pair.place if direction == UNEMBEDDING and subject.task.id == pair.task_id else 0
        row = subject.prompt.n_prompt - 1 + shared
        return StateEdit("resid_post", layer, values, start=row, end=row + 1, dose=dose)

    def switches(self, pairs: Sequence[SteeredPair], ran: Any) -> Iterator[Row]:
        """The grid of some pairs of a few tasks."""
        asked: list[tuple[SteeredPair, str, Setting]] = []
        conditions: list[tuple[str, Condition]] = []
        subjects = {pair.task_id: self.steered.subject(pair.task_id) for pair in pairs}
        for pair in pairs:
            for direction in DIRECTIONS:
                for layer in self.steered.layers:
                    edit = self.edit(pair, direction, (layer, 1.0), subjects[pair.task_id])
                    if edit is None:
                        continue
                    for dose in self.steered.doses:
                        asked.append((pair, direction, (layer, dose)))
                        conditions.append(_condition(subjects[pair.task_id], replace(edit, dose=dose)))
        for (pair, direction, setting), outcome in zip(
            asked, self.scorer.outcomes(conditions, ran), strict=True
        ):
            record = self.steered.records[pair.task_id]
            scores = log_probs(record, subjects[pair.task_id].prompt, outcome)
            if scores is not None:
                other = pair.other.tool
                yield pair.row(
                    "switch",
                    direction,
                    setting,
                    value=float(likeliest(scores) == other),
                    before=pair.other.log_prob,
                    log_prob=scores[other],
                )

    def elsewhere(self, pairs: Sequence[SteeredPair], settings: dict[str, Setting]) -> Iterator[Row]:
        """Each vector at its direction's setting, in another task of half 1 that is about neither of the two names."""
        records = {
            task.task_id: self.steered.records[task.task_id] for task in self.steered.named if task.half
        }
        asked: list[tuple[SteeredPair, str, str]] = []
        conditions: list[tuple[str, Condition]] = []
        for pair in pairs:
            strangers = [
                task_id
                for task_id, record in records.items()
                if task_id != pair.task_id and not {*pair.key} & {*record.right}
            ]
            if not strangers:
                continue
            draw = _draw(self.steered.effort.seed, "elsewhere", pair.task_id)
            subject = self.steered.subject(strangers[draw.integers(len(strangers))])
            for direction, setting in settings.items():
                edit = self.edit(pair, direction, setting, subject)
                if edit is not None:
                    asked.append((pair, direction, subject.task.id))
                    conditions.append(_condition(subject, edit))
        for (pair, direction, task_id), (_, condition), outcome in zip(
            asked, conditions, self.scorer.outcomes(conditions), strict=True
        ):
            record = records[task_id]
            scores = log_probs(record, condition.prompt, outcome)
            if scores is not None:
                right = {
                    "value": float(likeliest(scores) in record.right),
                    "before": float(spoken(record)[0].tool in record.right),
                }
                yield pair.row("elsewhere", direction, settings[direction], **right)

    def calls(self, pairs: Sequence[tuple[SteeredPair, str, Setting]]) -> Iterator[Row]:
        """What is generated under the vectors of a few pairs, together, read as the run's calls are."""
        from probe.capture import CaptureSpec, NonFinite, run_batch
        from probe.tasks import Setting as Asked
        from probe.tasks import kind_of

        opened = self.steered.opened
        generation = opened.options.generation("tool_selection")
        subjects = [self.steered.subject(pair.task_id) for pair, _, _ in pairs]
        jobs = []
        for (pair, direction, setting), subject in zip(pairs, subjects, strict=True):
            kind, edit = kind_of(subject.task), self.edit(pair, direction, setting, subject)
            (job,) = kind.jobs(subject.task, [subject.prompt], Asked(generation.max_new_tokens))
            job.edits = (edit,) if edit is not None else ()
            jobs.append(job)
        outcomes = run_batch(self.scorer.model, self.scorer.codec, jobs, CaptureSpec(frozenset()), generation)
        for (pair, direction, setting), subject, outcome in zip(pairs, subjects, outcomes, strict=True):
            if isinstance(outcome, NonFinite):
                continue
            read = kind_of(subject.task).score(subject.task, [subject.prompt], [outcome])
            record = self.steered.records[pair.task_id]
            before = record.decision
            yield pair.row(
                "call",
                direction,
                setting,
                value=float(read["called"] == pair.other.tool and "call_error" not in read),
                before=float(before.called == pair.tool.tool and before.call_error is None)
                if record.passage.generated
                else None,
            )


def _condition(subject: Subject, edit: StateEdit) -> tuple[str, Condition]:
    """Names alone are scored: the rows of the opener are before the vector, and the record has what they say."""
    return subject.task.id, Condition("steering", replace(subject.prompt, n_opener=0), (edit,))


# -- price and setting ---------------------------------------------------------------------------------------------


def prices(steered: SteeringTasks, directions: Directions, pairs: Sequence[SteeredPair]) -> Iterator[Row]:
    """What the vectors of each pair of names cost on unrelated text, and how long their mean difference is."""
    of_names = {pair.key: pair for pair in reversed(pairs)}
    texts = UnrelatedText(directions.model, steered.opened.codec, steered.layers) if pairs else None
    for pair in of_names.values() if texts else ():
        whole = {"task_id": "", "half": None, "role": None}
        for layer in steered.layers:
            difference = directions.difference(layer, *pair.key)
            if difference is not None and directions.lengths[layer] > 0:
                share = float(np.linalg.norm(difference)) / directions.lengths[layer]
                yield pair.row("difference", MEAN_DIFFERENCE, (layer, share), value=share) | whole
            vectors = {d: directions.vector(d, layer, *pair.key, pair.token) for d in DIRECTIONS}
            kept = [
                (d, dose, vector)
                for d, vector in vectors.items()
                if vector is not None
                for dose in steered.doses
            ]
            scaled = [vector * np.float32(dose * directions.lengths[layer]) for _, dose, vector in kept]
            assert texts is not None
            divergences = texts.divergence(layer, np.stack(scaled)) if kept else ()
            for (direction, dose, _), value in zip(kept, divergences, strict=True):
                if np.isfinite(value):
                    yield pair.row("kl", direction, (layer, dose), value=float(value)) | whole


def best_settings(rows: Sequence[Row], most_kl: float) -> dict[str, Setting]:
    """Direction → the layer and dose of most switches in half 0, of pairs `drawn`, among those whose mean price is at most
    `most_kl`; of equal ones the cheapest. A direction without such a setting has none."""
    switched: dict[tuple[str, Setting], list[float]] = defaultdict(list)
    paid: dict[tuple[str, Setting], list[float]] = defaultdict(list)
    for row in rows:
        key = (row["direction"], (row["layer"], row["dose"]))
        if row["part"] == "switch" and row["half"] == 0 and row["role"] == DRAWN:
            switched[key].append(row["value"])
        elif row["part"] == "kl":
            paid[key].append(row["value"])
    best: dict[str, tuple[float, float, Setting]] = {}
    for (direction, setting), hits in switched.items():
        if not (costs := paid.get((direction, setting))) or (price := float(np.mean(costs))) > most_kl:
            continue
        score = (float(np.mean(hits)), -price, setting)
        if direction not in best or score[:2] > best[direction][:2]:
            best[direction] = score
    return {direction: setting for direction, (_, _, setting) in best.items()}


# -- the loop ------------------------------------------------------------------------------------------------------


@experiment(
    "tool",
    loop="steering",
    changes="a vector is added to the residual stream where the name begins: the mean difference of two tools, the output layer's "
    "row of the name, a linear probe's direction, a random one as long",
    asks="Can the choice be turned, and at what price?",
    cost="the last rows of the prompt and the names behind them, for each layer, dose, direction and pair: "
    f"{LAYERS} × {len(DOSES)} × {len(DIRECTIONS)} × 1 or 2 unless `--layers` and `--doses` say otherwise",
    by_name=True,
    resumes=True,
)
def steering(
    steered: SteeringTasks, scorer: Scorer, progress: Progress, kept: Sequence[Row]
) -> Iterator[tuple[str, list[Row]]]:
    """(task id, rows) of each task's grid, then (empty, rows) of prices, settings and their tests; without what is in the rows
    `kept` of a call that was stopped."""
    effort = steered.effort
    directions = Directions(steered.opened.model, steered.layers, steered.named, effort.seed)
    pairs = steered.pairs(directions)
    steerer = Steerer(steered, directions, scorer)
    by_task: dict[str, list[SteeredPair]] = defaultdict(list)
    for pair in pairs:
        by_task[pair.task_id].append(pair)
    rows = list(kept)
    parts = {row["part"] for row in rows}
    gridded = {row["task_id"] for row in rows if row["part"] == "switch"}
    left = [task_id for task_id in by_task if task_id not in gridded]
    n_pairs = sum(len(by_task[task_id]) for task_id in left)
    progress.start(n_pairs * len(steered.layers) * len(steered.doses) * len(DIRECTIONS), "conditions")
    for start in range(0, len(left), _CHUNK):
        chunk = left[start : start + _CHUNK]
        asked = [pair for task_id in chunk for pair in by_task[task_id]]
        new = list(steerer.switches(asked, lambda count, tokens: progress.done(tokens, count)))
        rows += new
        for task_id in chunk:
            yield task_id, [row for row in new if row["task_id"] == task_id]
        scorer.prefixes.clear()
    if "kl" not in parts:
        new = list(prices(steered, directions, pairs))
        rows += new
        yield "", new
    settings = best_settings(rows, effort.most_kl)
    tested = [pair for pair in pairs if pair.half == 1]
    if "setting" not in parts:
        new = [
            {
                "task_id": "",
                "part": "setting",
                "direction": direction,
                "layer": layer,
                "dose": dose,
                "value": effort.most_kl,
            }
            for direction, (layer, dose) in settings.items()
        ]
        yield "", new + list(steerer.elsewhere([pair for pair in tested if pair.role == DRAWN], settings))
    called = {(row["task_id"], row["role"], row["direction"]) for row in rows if row["part"] == "call"}
    turned = {
        (row["task_id"], row["role"], row["direction"])
        for row in rows
        if row["part"] == "switch"
        and row["value"]
        and settings.get(row["direction"]) == (row["layer"], row["dose"])
    }
    asked_for = [
        (pair, direction, setting)
        for pair in tested
        for direction, setting in settings.items()
        if direction != RANDOM and (pair.task_id, pair.role, direction) in turned - called
    ]
    for start in range(0, len(asked_for), _GENERATED):
        yield "", list(steerer.calls(asked_for[start : start + _GENERATED]))


def make(
    opened: LoadedRun, wanted: Sequence[str], *, again: bool, effort: Effort, progress: Progress
) -> list[str]:
    """Make the experiment where it is missing, or again; returns what was made. One that was stopped goes on, where it is asked for
    as before."""
    from probe.experiments.tool.score import Scorer

    if not missing(opened.run, again=again):
        return []
    steered = SteeringTasks(opened, effort)
    if not steered.records:
        progress.log("no steering: no tool task has the residual stream at its choice; capture resid_post")
        return []
    progress.log(f"steering: {len(steered.records)} tasks, layers {', '.join(map(str, steered.layers))}")
    run, settings = opened.run, steered.settings()
    table = run.table("steering", arrow=True)
    if _stopped(table) != settings:
        table = table.slice(0, 0)
    kept = table.replace_schema_metadata({_STOPPED: settings})
    scorer = Scorer(opened.model, opened.codec)
    add_rows(run, "steering", kept, EXPERIMENTS["steering"].make(steered, scorer, progress, kept.to_pylist()))
    written = run.table("steering", arrow=True)
    rows = (
        written if _stopped(written) == settings else kept
    )  # rows of other settings stay only until there are new ones
    run.write_table("steering", rows.replace_schema_metadata(None))
    return list(wanted)


def missing(run: Run, *, again: bool) -> bool:
    """Whether there is something to make: it is one whole, since directions are had from all tasks."""
    table = run.table("steering", arrow=True)
    return again or not len(table) or _stopped(table) is not None


def _stopped(table: pyarrow.Table) -> str | None:
    """The settings of a call that was stopped before all rows were there."""
    settings = (table.schema.metadata or {}).get(_STOPPED)
    return None if settings is None else settings.decode()
