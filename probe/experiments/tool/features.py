"""Features of a sparse autoencoder: what it makes of the run's states, which features go with which tool, and whether the choice
needs them.

The autoencoder is applied to the residual stream that the run holds, behind one layer; nothing is run for it. Features of a
tool are those that are more active at the decisions of tasks that choose it than at the others' (`probe.maths.selectivity`).

Ablation needs the model. At the one row that emits the first token of the name the state x becomes

reconstruction   x̂ without what the features write; with none taken away x̂ itself: the control of a bad reconstruction
state            x without what they write: what the autoencoder does not explain is left in

and all names are scored again. `top`: the features of the tool that the task chooses, from the other half of the tasks.
`random`: for each of these that is active in the task another active one, drawn among those whose part of the state is
about as long: the control. Halves are by request, so that no request chooses the features that it tests.

Columns of features.parquet: `layer`; `tool` that is chosen, null for no tool; `part` one of

width      number of features, without a task
error      of a task, its decision or all its captured rows (`state`), n rows: `value` Σ ‖x − x̂‖², `before` Σ ‖x − mean x‖²
active     likewise: `value` active features of all rows
rows       of a feature, without a task: `value` in how many of the n captured rows it is active
activity   of a `feature`, where it is active at a task's decision: `value`; without a feature where none is
ablation   `features` none, top or random, of which n are active, by `replacement`: `value` 1 where another name is now the
           most probable, `before` and `log_prob` log P of the chosen one, nats
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
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
from probe.model.autoencoders import Autoencoder, read_autoencoder
from probe.model.edits import StateEdit
from probe.runs.records import ToolRecord
from probe.runs.views.features import LEAST, FeatureActivity

if TYPE_CHECKING:
    import pyarrow
    from torch import Tensor

    from probe.experiments.loaded_run import LoadedRun
    from probe.experiments.tool.score import Scorer
    from probe.harness.runner import Progress
    from probe.runs import Run

NONE, TOP, RANDOM = "none", "top", "random"
RECONSTRUCTION, STATE = "reconstruction", "state"
CONDITIONS = (
    (NONE, RECONSTRUCTION),
    (TOP, RECONSTRUCTION),
    (RANDOM, RECONSTRUCTION),
    (TOP, STATE),
    (RANDOM, STATE),
)
_NEAREST = 5
"""A random feature is drawn among so many whose part of the state is nearest in length."""
_CHUNK = 8
"""Tasks that are scored together."""
_NOTES = b"autoencoders"
"""Key in the table's metadata: JSON, layer → name, sha256 and architecture, and what its ablations were made with."""

Row = dict[str, Any]


# -- what the run holds --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class EncodedRun:
    """A run's choices and states, and the autoencoder that reads them."""

    run: Run
    autoencoder: Autoencoder
    layer: int
    records: dict[str, ToolRecord]
    place: int
    """Of the layer among the captured ones."""

    @classmethod
    def of(cls, run: Run, effort: Effort, *, offline: bool = False) -> EncodedRun:
        """Raises UsageError where no autoencoder is given, or it does not fit the run; BadInput; ModelUnavailable."""
        if effort.sae is None:
            raise UsageError("which sparse autoencoder? `probe features RUN --sae DIRECTORY` names it")
        autoencoder = read_autoencoder(effort.sae, offline=offline)
        layer = autoencoder.layer if effort.sae_layer is None else effort.sae_layer
        if layer is None:
            raise UsageError(f"{effort.sae}: its files do not say of which layer it is: give --layer")
        if autoencoder.layer not in (None, layer):
            raise UsageError(f"--layer {layer}: {effort.sae} is of layer {autoencoder.layer}")
        autoencoder.refuse_other_width(run.run["model"]["d_model"])
        records = decided(run)
        captured = captured_layers(run, records)
        if layer not in captured:
            raise UsageError(
                f"{effort.sae} reads layer {layer}: the run has resid_post of layers "
                f"{', '.join(map(str, captured)) or 'none'}; run the tasks again with --layers {layer}"
            )
        return cls(run, autoencoder, layer, records, captured.index(layer))

    def states(self, task_id: str) -> tuple[Tensor, int] | None:
        """The states [row, d_model] of a task, float32, and which row is its decision; None where they are not whole."""
        task = self.run[task_id]
        if "resid_post" not in task:
            return None
        at = (task["rows"] == int(task["decisions"][0])).nonzero()
        states = task.slice("resid_post")[self.place : self.place + 1, :, :][0].float()
        return (states, int(at[0, 0])) if len(at) and bool(states.isfinite().all()) else None

    def rows(self) -> Iterator[Row]:
        """Of all parts but `ablation`."""
        sums = {state: _Variance() for state in ("decision", "rows")}
        counts, n_rows = np.zeros(self.autoencoder.width, np.int64), 0
        for task_id, record in self.records.items():
            whole = self.states(task_id)
            if whole is None:
                continue
            states, at = whole
            activations = self.autoencoder.encode(states)
            errors = (states - self.autoencoder.decode(activations, states)).double().square().sum(-1).numpy()
            active = (activations > 0).numpy()
            counts, n_rows = counts + active.sum(0), n_rows + len(active)
            for state, kept in (("decision", slice(at, at + 1)), ("rows", slice(None))):
                sums[state].add(task_id, states[kept].double().numpy(), errors[kept])
                n = len(errors[kept])
                yield self._row("active", float(active[kept].sum()), task_id=task_id, state=state, n=n)
            tool, at_decision = spoken(record)[0].tool, activations[at]
            here = at_decision.nonzero()[:, 0].tolist()
            for feature in here or [None]:
                value = 0.0 if feature is None else float(at_decision[feature])
                yield self._row("activity", value, task_id=task_id, feature=feature, tool=tool)
        yield self._row("width", float(self.autoencoder.width))
        for feature in counts.nonzero()[0].tolist():
            yield self._row("rows", float(counts[feature]), feature=feature, n=n_rows)
        for state, variance in sums.items():
            for task_id, error, around, n in variance.by_task():
                yield self._row("error", error, task_id=task_id, state=state, before=around, n=n)

    def _row(self, part: str, value: float, **columns: Any) -> Row:
        return {"task_id": "", "layer": self.layer, "part": part, "value": value} | columns


class _Variance:
    """Squared distances of states from their mean, by task; the mean is known when all have come."""

    def __init__(self):
        self._of: dict[str, tuple[float, np.ndarray, float, int]] = {}

    def add(self, task_id: str, states: np.ndarray, errors: np.ndarray) -> None:
        self._of[task_id] = (float(errors.sum()), states.sum(0), float(np.square(states).sum()), len(states))

    def by_task(self) -> Iterator[tuple[str, float, float, int]]:
        """(task, Σ errors, Σ ‖x − mean x‖², rows)."""
        if not self._of:
            return
        n_rows = sum(n for *_, n in self._of.values())
        mean = np.sum([total for _, total, _, _ in self._of.values()], axis=0) / n_rows
        for task_id, (error, total, squares, n) in self._of.items():
            around = squares - 2 * float(mean @ total) + n * float(mean @ mean)
            yield task_id, error, max(0.0, around), n


def encode(run: Run, effort: Effort, *, offline: bool = False) -> EncodedRun:
    """Apply the autoencoder to the run's states and keep what it says, in place of what another said of this layer; no model
    is used. Raises as `EncodedRun.of`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    encoded = EncodedRun.of(run, effort, offline=offline)
    table, notes = run.table("features", arrow=True), _notes(run)
    layer, note = str(encoded.layer), notes.get(str(encoded.layer), {})
    elsewhere = pc.field("layer") != encoded.layer
    if same := note.get("sha256") == encoded.autoencoder.sha256:
        elsewhere |= pc.field("part") == "ablation"
    about = {"name": encoded.autoencoder.name, "sha256": encoded.autoencoder.sha256}
    notes[layer] = (note if same else {}) | about | {"architecture": encoded.autoencoder.architecture}
    blank = dict.fromkeys(table.schema.names)
    rows = [blank | row for row in encoded.rows()]
    _write(
        run,
        pa.concat_tables([table.filter(elsewhere), pa.Table.from_pylist(rows, schema=table.schema)]),
        notes,
    )
    return encoded


def _notes(run: Run) -> dict[str, dict[str, Any]]:
    return json.loads((run.table("features", arrow=True).schema.metadata or {}).get(_NOTES, b"{}"))


def _write(run: Run, table: pyarrow.Table, notes: Mapping[str, Any]) -> None:
    run.write_table("features", table.replace_schema_metadata({_NOTES: json.dumps(notes)}))


# -- ablation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Ablations:
    """The tasks whose chosen tool has features, from the other half of the tasks."""

    encoded: EncodedRun
    half: dict[str, int]
    features: dict[str, list[int]]
    """Task → the features of its chosen tool."""
    seed: int

    def states(self, task_id: str) -> list[tuple[str, str, int, Tensor]]:
        """(features, replacement, how many of them are active, the state [d_model] in place of the task's own)."""
        import torch

        whole = self.encoded.states(task_id)
        assert whole is not None
        x = whole[0][whole[1]][None]
        coder = self.encoded.autoencoder
        active = coder.encode(x)[0]
        lengths = (active * coder.w_dec.norm(dim=-1)).double().numpy()
        top = [feature for feature in self.features[task_id] if active[feature] > 0]
        sets = {NONE: [], TOP: top, RANDOM: self._random(task_id, lengths, top)}
        whole_sum = coder.decode(active[None], x)[0]
        out = []
        for features, replacement in CONDITIONS:
            left = active.clone()
            left[torch.tensor(sets[features], dtype=torch.long)] = 0
            moved = coder.decode(left[None], x)[0]
            state = moved if replacement == RECONSTRUCTION else x[0] + moved - whole_sum
            out.append((features, replacement, len(sets[features]), state))
        return out

    def _random(self, task_id: str, lengths: np.ndarray, top: Sequence[int]) -> list[int]:
        """As many other active features, each drawn among the nearest in the length of what it writes."""
        from probe.experiments.prompting.patches import generator

        draw = generator(self.seed, "features", task_id)
        free = [int(f) for f in np.flatnonzero(lengths > 0) if f not in {*self.features[task_id]}]
        drawn: list[int] = []
        for feature in top:
            free.sort(key=lambda other: abs(np.log(lengths[other] / lengths[feature])))
            if free:
                drawn.append(free.pop(int(draw.integers(min(_NEAREST, len(free))))))
        return drawn


@experiment(
    "features",
    changes="the features of a sparse autoencoder that go with the chosen tool are taken out of the state where the name begins: of its "
    "reconstruction, and of the state itself. Controls: other active features of the same length, and the reconstruction alone. "
    "`probe features` names the autoencoder",
    asks="Does the choice need the features that go with it?",
    cost=f"the last row of the prompt and the names behind it, {len(CONDITIONS)} times, in tasks whose tool is chosen in {LEAST} tasks of the "
    "other half",
    by_name=True,
    resumes=True,
)
def feature_ablation(
    opened: LoadedRun, ablations: Ablations, task_ids: Sequence[str], scorer: Scorer, progress: Progress
) -> Iterator[tuple[str, list[Row]]]:
    """(task id, rows) of each task."""
    encoded = ablations.encoded
    limit, n_layers = opened.max_new_tokens("tool_selection"), opened.run.run["model"]["n_layers"]
    progress.start(len(task_ids) * len(CONDITIONS), "conditions")
    for start in range(0, len(task_ids), _CHUNK):
        asked: list[tuple[str, str, str, int]] = []
        conditions: list[tuple[str, Condition]] = []
        for task_id in task_ids[start : start + _CHUNK]:
            record = encoded.records[task_id]
            subject = Subject(opened.tasks[task_id], record, opened.codec, n_layers, limit, Effort())
            prompt = replace(subject.prompt, n_opener=0)
            at = prompt.n_prompt - 1
            for features, replacement, n, state in ablations.states(task_id):
                edit = StateEdit("resid_post", encoded.layer, state, "replace", start=at, end=at + 1)
                asked.append((task_id, features, replacement, n))
                conditions.append((task_id, Condition("feature_ablation", prompt, (edit,))))
        outcomes = scorer.outcomes(conditions, lambda count, tokens: progress.done(tokens, count))
        scorer.prefixes.clear()
        rows: dict[str, list[Row]] = {}
        for (task_id, *change), (_, condition), outcome in zip(asked, conditions, outcomes, strict=True):
            record = encoded.records[task_id]
            scores = log_probs(record, condition.prompt, outcome)
            if scores is not None:
                chosen = spoken(record)[0]
                rows.setdefault(task_id, []).append(
                    {
                        "task_id": task_id,
                        "layer": encoded.layer,
                        "part": "ablation",
                        "tool": chosen.tool,
                        "half": ablations.half[task_id],
                        "before": chosen.log_prob,
                        "value": float(likeliest(scores) != chosen.tool),
                        "log_prob": scores[chosen.tool],
                    }
                    | dict(zip(("features", "replacement", "n"), change, strict=True))
                )
        yield from rows.items()


def ablations_of(opened: LoadedRun, encoded: EncodedRun, effort: Effort) -> Ablations:
    """The tasks of which features can be ablated."""
    activity = FeatureActivity.of(opened.run.table("features"), encoded.layer)
    records = {task_id: encoded.records[task_id] for task_id in activity.task_ids}
    half = request_halves(opened.tasks, records)
    halves = np.array([half[task_id] for task_id in activity.task_ids])
    top = [activity.top(halves == 1 - number, effort.top) for number in (0, 1)]
    features = {
        task_id: [int(feature) for feature in top[half[task_id]][chosen]]
        for task_id, chosen in zip(activity.task_ids, activity.chosen, strict=True)
        if len(top[half[task_id]].get(chosen, ()))
    }
    return Ablations(encoded, half, features, effort.seed)


def make(
    opened: LoadedRun, wanted: Sequence[str], *, again: bool, effort: Effort, progress: Progress
) -> list[str]:
    """Encode the run's states, and ablate features in the tasks in which this autoencoder's were not; returns what was made.

    Tasks that a stopped call had finished are kept, and those of the same settings are never made twice.
    """
    import pyarrow.compute as pc

    from probe.experiments.tool.score import Scorer

    run = opened.run
    encoded = encode(run, effort, offline=opened.options.offline)
    ablations = ablations_of(opened, encoded, effort)
    if not ablations.features:
        progress.log(f"no features are ablated: no tool is chosen in {LEAST} tasks of both halves")
        return []
    settings = [encoded.autoencoder.sha256, effort.top, effort.seed, ablations.features]
    made_with = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    table, notes = run.table("features", arrow=True), _notes(run)
    note = notes[str(encoded.layer)]
    if note.get("ablations") != made_with:
        other = (pc.field("layer") != encoded.layer) | (pc.field("part") != "ablation")
        table = table.filter(other)
        notes[str(encoded.layer)] = note | {"ablations": made_with}
        _write(run, table, notes)
    kept = run.table("features", arrow=True)
    here = (pc.field("layer") == encoded.layer) & (pc.field("part") == "ablation")
    finished = {*kept.filter(here)["task_id"].to_pylist()}
    todo = [task_id for task_id in ablations.features if task_id not in finished]
    progress.log(f"features: {len(todo)} tasks, layer {encoded.layer}")
    if todo:
        scorer = Scorer(opened.model, opened.codec)
        add_rows(
            run,
            "features",
            kept,
            EXPERIMENTS["feature_ablation"].make(opened, ablations, todo, scorer, progress),
        )
    return list(wanted)
