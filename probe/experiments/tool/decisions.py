"""Decisions of a run's tool tasks, as experiments that change a state take them: names that are scored, layers, halves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from probe.runs.read import finished
from probe.runs.records import ToolProbability, ToolRecord
from probe.runs.views.choice import decision_states
from probe.runs.views.heads import halves

if TYPE_CHECKING:
    from probe.capture import NonFinite, Outcome
    from probe.prompts import Prompt
    from probe.runs import Run


def spoken(record: ToolRecord) -> list[ToolProbability]:
    """The candidates whose names are scored, the most probable first; one a run without tokens of names has none."""
    entries = [entry for entry in record.decision.tool_probabilities if entry.token_ids]
    return sorted(entries, key=lambda entry: -entry.log_prob)


def decided(run: Run) -> dict[str, ToolRecord]:
    """The tool tasks that ran to their end and show two names or more, by id."""
    records = {task.id: task.typed(ToolRecord) for task in finished(run, "tool_selection")}
    return {i: record for i, record in records.items() if record.status == "ok" and len(spoken(record)) > 1}


def captured_layers(run: Run, task_ids: Iterable[str]) -> list[int]:
    """The layers whose residual stream the first of these tasks has that has any."""
    return next((states[0] for task_id in task_ids if (states := decision_states(run[task_id]))), [])


def request_halves(tasks: Mapping[str, Any], records: Mapping[str, ToolRecord]) -> dict[str, int]:
    """Task → its half: by request, so that one that is asked in several orders is in one half, and evenly for each name."""
    requests = {task_id: repr([(m.role, m.content) for m in tasks[task_id].messages]) for task_id in records}
    first = {request: task_id for task_id, request in reversed(requests.items())}
    strata = [repr(spoken(records[task_id])[0].tool) for task_id in first.values()]
    half = dict(zip(first, halves(list(first), strata).tolist(), strict=True))
    return {task_id: half[request] for task_id, request in requests.items()}


def log_probs(
    record: ToolRecord, prompt: Prompt, outcome: Outcome | NonFinite
) -> dict[str | None, float] | None:
    """log P of each name that is scored, nats, as in the record; None where the numbers are not finite."""
    from probe.capture import NonFinite

    if isinstance(outcome, NonFinite):
        return None
    opener = (record.decision.opener_log_prob or 0.0) if prompt.no_tool == "complement" else 0.0
    by_token = zip(prompt.candidates, outcome.candidate_token_log_probs, strict=True)
    return {candidate.name: opener + math.fsum(values) for candidate, values in by_token}


def likeliest(scores: dict[str | None, float]) -> str | None:
    """The most probable name."""
    return max(scores, key=lambda name: scores[name])
