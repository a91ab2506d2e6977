"""Running a run's tasks again with one thing changed: what is read, what is written, what is shown.

    loaded_run    the run's options, tasks and model
    tool/         tool tasks → interventions.parquet: conditions, intentions, heads → score; → attribution.parquet: the
                  log-odds of two names by what writes them (attribution, head_scores); → patching.parquet: states of one
                  prompt put into another (pairs → patching); →
                  steering.parquet: choices under an added vector (directions → steering); → features.parquet: what a sparse
                  autoencoder makes of the states, and choices without some of its features (features)
    cot/          chains of thought → reasoning.parquet: knock-outs, lenses, faithfulness, rewriting
    prompting/    prompting tasks → prompting.parquet: states read out and replaced layer by layer (patches), heads
                  that carry a task (functions)

Every result is a table beside the run. Analyzers read the tables without a model.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from probe.errors import UsageError
from probe.experiments.cot import faithfulness, knockouts, lens, reasoning, recurrent_memory, rewriting
from probe.experiments.prompting import loop as prompting
from probe.experiments.registry import EXPERIMENTS, Experiment, experiment, read_by
from probe.experiments.tool import attribution, features, head_scores, patching, steering
from probe.experiments.tool import loop as tool
from probe.experiments.tool.conditions import Effort
from probe.experiments.tool.features import encode

if TYPE_CHECKING:
    from probe.harness.runner import Progress
    from probe.model.hooked import Model
    from probe.runs import Run

__all__ = ["EXPERIMENTS", "Effort", "Experiment", "encode", "experiment", "intervene", "predict", "read_by"]

_ENTERED = (
    tool,
    attribution,
    head_scores,
    patching,
    steering,
    features,
    knockouts,
    recurrent_memory,
    lens,
    faithfulness,
    rewriting,
    prompting,
)
"""Modules that enter experiments: imported here, so that the registry is whole."""
_LOOPS = {
    "tool": tool.make,
    "attribution": attribution.make,
    "patching": patching.make,
    "steering": steering.make,
    "features": features.make,
    "cot": reasoning.make,
    "prompting": prompting.make,
}
"""Loop over tasks by the name under which experiments name it."""


def intervene(
    run: Run,
    names: Sequence[str] = (),
    *,
    quick: bool = False,
    model: Model | None = None,
    effort: Effort | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Make the experiments that are missing, or make those named again; returns what was made.

    `quick` asks for the deciding ones alone: masks of definitions and of their parts beside random masks, exchanges, knock-outs, patches.
    Needs the model of the run (loaded here, once, unless given) and its task file, both unchanged. Raises
    UsageError, ModelUnavailable, BadInput and RunDirectoryError.
    """
    from probe.experiments.loaded_run import LoadedRun
    from probe.harness.runner import SilentProgress

    _refuse_unknown(names)
    progress, effort = progress or SilentProgress(), effort or Effort()
    opened = LoadedRun(run, model, progress)
    completed: list[str] = []
    for loop, wanted in _wanted(run, names, quick, progress.log).items():
        completed += _LOOPS[loop](opened, wanted, again=bool(names), effort=effort, progress=progress)
    return completed


def predict(
    run: Run, names: Sequence[str] = (), *, quick: bool = False, effort: Effort | None = None
) -> dict[str, Any]:
    """What `intervene` would run, by loop: tasks, conditions, tokens, and their ratio to the tokens of the run.

    Loads no weights. Prompting experiments run single positions and are not counted. Raises as `intervene`.
    """
    from probe.experiments.cost import cost

    _refuse_unknown(names)
    return cost(run, _wanted(run, names, quick), again=bool(names), effort=effort or Effort())


def _wanted(
    run: Run, names: Sequence[str], quick: bool, log: Callable[[str], object] = lambda message: None
) -> dict[str, list[str]]:
    """Loop → experiments to make, where there are any. One that the run's model cannot have is refused where it is named, and
    left out where it is not."""
    layers = run.run["model"].get("layers") or ()
    wanted: dict[str, list[str]] = {}
    for entry in EXPERIMENTS.values():
        if not (entry.name in names if names else not entry.by_name and (entry.deciding or not quick)):
            continue
        if reason := entry.lacks(layers):
            if names:
                raise UsageError(f"{entry.name}: {reason}; leave it out")
            if entry.requires not in ("state", "hybrid"):  # few models have states: nobody misses them
                log(f"{entry.name} is left out: {reason}")
            continue
        wanted.setdefault(entry.loop, []).append(entry.name)
    return {loop: wanted[loop] for loop in _LOOPS if loop in wanted}


def _refuse_unknown(names: Sequence[str]) -> None:
    for name in names:
        if name not in EXPERIMENTS:
            near = difflib.get_close_matches(name, EXPERIMENTS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(EXPERIMENTS)}"
            raise UsageError(f"no experiment {name!r}: {hint}")
