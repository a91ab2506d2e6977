"""A task's record in a line, a function a kind: what `probe show` prints of each. It imports nothing that runs a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def prompting_gist(record: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}: {p.get('chosen', p['completion'])!r}" for name, p in record["passages"].items()
    )


def tool_gist(record: Mapping[str, Any]) -> str:
    targets = record["target"] if isinstance(record["target"], list) else [record["target"]]
    right = " or ".join(target or "no tool" for target in targets)
    return f"target {right}, chosen {record['chosen'] or 'no tool'}" + (
        f", called {record['called'] or 'nothing'}" if "called" in record else ""
    )


def cot_gist(record: Mapping[str, Any]) -> str:
    answer = "no answer" if record.get("answer") is None else f"answer {record['answer']!r}"
    target = f"target {record['target']!r}, " if "target" in record else ""
    return f"{target}{answer}, {len(record.get('steps', ()))} steps"


def agent_gist(record: Mapping[str, Any]) -> str:
    """What was called, and the answer."""
    calls = " → ".join(str(turn["called"]) for turn in record["turns"] if turn.get("called")) or "nothing"
    answer = "no answer" if record.get("answer") is None else f"answer {record['answer'][:60]!r}"
    expected = f", expected {record['expected_answer']!r}" if "expected_answer" in record else ""
    return f"called {calls}, {answer}{expected}"


def replay_gist(record: Mapping[str, Any]) -> str:
    agreement = record["replay_agreement"]
    disagrees = ", disagrees with the log" if agreement["disagrees"] else ""
    return (
        f"{agent_gist(record)}; {agreement['argmax_share']:.0%} of what was emitted is the argmax{disagrees}"
    )


GISTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "prompting": prompting_gist,
    "tool_selection": tool_gist,
    "agent": agent_gist,
    "cot": cot_gist,
    "replay": replay_gist,
}
"""Kind of this package → its line."""
