"""A batch of tasks through the model, each committed as soon as it is whole, and the record that it becomes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from probe.errors import DiskError, ModelUnavailable
from probe.harness.plan import TaskPlan
from probe.harness.stop import RunStopped
from probe.tasks import error_record, kind_of, record

if TYPE_CHECKING:
    from probe.capture import Capturer, Job, NonFinite, Outcome
    from probe.runs import Array

Commit = Callable[[dict[str, Any], dict[str, Any], dict[str, str]], None]
Tokens = Callable[[Sequence["Job"]], list["Job"]]


def prefill_batch(capturer: Capturer, batch: list[TaskPlan], commit: Commit, tokens: Tokens) -> None:
    """Run the prompts of a batch whose tasks are all committed; where that fails as it did before, do as before."""
    try:
        capturer.prefill([job for entry in batch for job in entry.jobs])
    except Exception:
        run_batch(capturer, batch, commit, tokens, again=True)


def run_batch(
    capturer: Capturer, batch: list[TaskPlan], commit: Commit, tokens: Tokens, again: bool = False
) -> None:
    """Run a batch and commit each task as soon as its last passage ends; `tokens` gives jobs the tokens that a generator chose.

    A batch that fails is tried again task by task, without those that are committed.
    """
    started = time.perf_counter()
    jobs = [(entry, number) for entry in batch for number in range(len(entry.jobs))]
    waiting: dict[int, dict[int, Outcome | NonFinite]] = {id(entry): {} for entry in batch}
    failure: Exception | None = None

    def ready(index: int, outcome: Outcome | NonFinite) -> None:
        entry, number = jobs[index]
        outcomes = waiting[id(entry)]
        outcomes[number] = outcome
        if len(outcomes) == len(entry.jobs):
            seconds = (time.perf_counter() - started) / len(batch)
            commit(*_result(entry, [outcomes[number] for number in range(len(entry.jobs))], seconds))
            del waiting[id(entry)]

    try:
        capturer.run(tokens([entry.jobs[number] for entry, number in jobs]), ready, again)
    except (DiskError, RunStopped, ModelUnavailable):
        raise
    except Exception as error:  # whatever a task raises is its own error and not the run's end
        failure = error
    for left in [entry for entry in batch if id(entry) in waiting]:
        if len(batch) > 1:
            run_batch(capturer, [left], commit, tokens, again=True)
        else:
            message = f"{type(failure).__name__}: {failure}"
            commit(*failed_task(left, "error", message, time.perf_counter() - started))


def _result(plan: TaskPlan, outcomes: list[Outcome | NonFinite], seconds: float):
    from probe.capture import NonFinite, Outcome

    broken = [outcome for outcome in outcomes if isinstance(outcome, NonFinite)]
    if broken:
        return failed_task(plan, "nonfinite", str(broken[0]), seconds)
    try:
        return package(plan, [outcome for outcome in outcomes if isinstance(outcome, Outcome)], seconds)
    except Exception as error:
        return failed_task(plan, "error", f"{type(error).__name__}: {error}", seconds)


def failed_task(plan: TaskPlan, status: str, message: str, seconds: float):
    return error_record(plan.task, status, message, seconds), {}, {}


def package(plan: TaskPlan, outcomes: list[Outcome], seconds: float):
    """The record, the arrays by their names on disk and the metadata that says what the axes hold."""
    from probe.capture.sites import axes_of
    from probe.runs import Array

    arrays: dict[str, Array] = {}
    metadata: dict[str, str] = {}
    prefixed = kind_of(plan.task).several
    for prompt, outcome in zip(plan.prompts, outcomes, strict=True):
        prefix = f"{prompt.passage}/" if prefixed else ""
        for name, tensor in outcome.tensors.items():
            arrays[prefix + name] = Array(tensor, axes_of(name))
        metadata[prefix + "labels"] = json.dumps(outcome.labels, ensure_ascii=False)
        if outcome.parts:
            metadata[prefix + "parts"] = json.dumps(outcome.parts, ensure_ascii=False)
        metadata["layers"] = json.dumps(outcome.layers)
        if outcome.attention_layers is not None:
            metadata["attention_layers"] = json.dumps(outcome.attention_layers)
    return record(plan.task, plan.prompts, outcomes, seconds), arrays, metadata


def n_tokens(record: dict[str, Any]) -> int:
    passages = record.get("passages", {"main": record}).values()
    return sum(passage.get("n_prompt", 0) + passage.get("n_new", 0) for passage in passages)
