"""The list of tasks: what each asked for, what was chosen and called, and the numbers that it is sorted by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from probe.prompts.labels import REQUESTS, tool_of
from probe.report.details import target_text, value_of
from probe.runs.records import (
    AgentRecord,
    FailedRecord,
    Passage,
    PromptingRecord,
    TaskRecord,
    ToolRecord,
    struct_of,
)

if TYPE_CHECKING:
    from probe.runs import TaskRun

QUESTION_LENGTH = 400
"""Characters of a question that the list shows and searches."""
_NO_TOOL = "no tool"


def task_row(task: TaskRun, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the list; what a kind of task does not have is null. `rows` are the task's measures."""
    record = task.typed(struct_of(task.record))
    passages = task.passages.values()
    return {
        "id": record.id,
        "kind": record.kind,
        "status": record.status,
        "question": _question(record, list(passages)),
        "target": _wanted(record),
        "chosen": _chosen_text(record, task.record),
        "score": record.score,
        **_call(record),
        "margin": value_of(rows, "margin"),
        "entropy": value_of(rows, "entropy", analyzer="tool"),
        "cut": any(passage.finish_reason == "length" for passage in passages),
        "tokens": sum(passage.n_prompt + passage.n_new for passage in passages) or None,
        "seconds": record.seconds,
        "metadata": {
            key: value
            for key, value in (record.metadata or {}).items()
            if isinstance(value, str | int | float | bool)
        },
    }


def tools_shown(task: TaskRun) -> set[str]:
    """Names of the tools that a task's prompts show."""
    return {
        name
        for passage in task.passages.values()
        for span in passage.spans
        if (name := tool_of(span.label)) is not None
    }


def _question(record: TaskRecord, passages: list[Passage]) -> str | None:
    """What the user asked, cut to `QUESTION_LENGTH`; of a prompting task its bare input."""
    if not passages:
        return None
    asked = [span.text or "" for span in passages[0].spans if span.label in REQUESTS]
    if not asked and isinstance(record, PromptingRecord):
        asked = [passages[0].prompt]
    text = " ".join(" … ".join(asked).split())
    return (text if len(text) <= QUESTION_LENGTH else text[: QUESTION_LENGTH - 1] + "…") or None


def _call(record: TaskRecord) -> dict[str, Any]:
    """The choice and the call of a task with tools, in the words of the list; nulls for the other kinds.

    `right` is the most probable acceptable choice, as in the confusion matrix; `agrees` says whether the scored choice
    is also the called one.
    """
    names = ("called", "call_right", "call_error", "right", "confidence", "agrees", "turns", "mass")
    out: dict[str, Any] = dict.fromkeys(names)
    if isinstance(record, ToolRecord):
        decision = record.decision
        scored = {entry.tool: entry for entry in decision.tool_probabilities}
        right = [scored[name] for name in record.right if name in scored]
        no_call = decision.call is None
        out |= {
            "right": max(right, key=lambda entry: entry.log_prob).tool or _NO_TOOL if right else None,
            "confidence": scored[decision.chosen].probability,
            "mass": decision.candidate_mass,
        }
        if record.passage.generated:
            out |= {
                "called": decision.called or ("nothing" if no_call else _NO_TOOL),
                "call_right": record.calls_right,
                "call_error": decision.call_error_kind,
                "agrees": decision.called == decision.chosen and not no_call,
            }
        return out
    if isinstance(record, AgentRecord):
        calls = [turn.called or _NO_TOOL for turn in record.turns if turn.call is not None]
        errors = [turn.call_error_kind for turn in record.turns if turn.call_error_kind]
        return out | {
            "called": " → ".join(calls) or "nothing",
            "call_right": record.called_target,
            "call_error": errors[0] if errors else None,
            "turns": len(record.turns),
        }
    return out


def _wanted(record: TaskRecord) -> str | None:
    """The target, and the answer that an agent is to reach."""
    answer = record.expected_answer if isinstance(record, AgentRecord) else None
    wanted = [target_text(record), None if answer is None else f"answer {answer}"]
    return " · ".join(filter(None, wanted)) or None


def _chosen_text(record: TaskRecord, fields: Mapping[str, Any]) -> str | None:
    """What was chosen or answered; a kind of another package may have an `answer`, which only the mapping shows."""
    if isinstance(record, ToolRecord):
        return record.decision.chosen or _NO_TOOL
    if isinstance(record, PromptingRecord):
        counts = Counter(p.chosen.strip() for p in record.passages.values() if p.chosen is not None)
        return ", ".join(f"{text} ×{n}" for text, n in counts.most_common()) or None
    return None if isinstance(record, FailedRecord) else fields.get("answer")


# -- what went wrong most often ---------------------------------------------------------------------------------

_CHOICES = {
    "none": "name a tool where none was wanted",
    "unnamed": "name no tool where one was wanted",
    "other": "name another tool than the wanted one",
}
_CALLS = {
    "none": "a call where none was wanted",
    "unnamed": "no call where one was wanted",
    "beside": "more calls than the wanted one, or an opener less likely than not",
    "other": "another tool than the wanted one",
}


def _call_fault(row: dict[str, Any]) -> str:
    """What is wrong with a call whose form is right."""
    wanted = (row["target"] or "").split(" or ")
    if wanted == [_NO_TOOL]:
        return "none"
    if row["called"] in ("nothing", _NO_TOOL):
        return "unnamed"
    return "beside" if row["called"] in wanted else "other"


def dominant_errors(rows: list[dict[str, Any]]) -> str:
    """Up to two sentences: what most wrong choices, and most wrong calls, have in common; empty without errors."""
    choices: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for row in rows:
        if row["call_right"] is False:
            calls[row["call_error"] or _CALLS[_call_fault(row)]] += 1
        if row["right"] is None or row["score"] is None or row["score"] >= 1:
            continue
        kind = "none" if row["right"] == _NO_TOOL else "unnamed" if row["chosen"] == _NO_TOOL else "other"
        choices[kind] += 1
    told = []
    if choices:
        kind, n = choices.most_common(1)[0]
        told.append(f"Of {_plural(choices.total(), 'wrong choice')}, {n} {_CHOICES[kind]}.")
    if calls:
        error, n = calls.most_common(1)[0]
        told.append(f"Of {_plural(calls.total(), 'wrong call')}, {n}: {error.replace('_', ' ')}.")
    return " ".join(told)


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
