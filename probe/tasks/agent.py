"""The kind `agent`: a transcript with tool calls, up to an answer, and the other side of it.

Whatever a turn gets wrong, in the call or in the tool, is a typed result that goes back to the model and into
the record; nothing a model writes raises.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.capture.transcript import Reply, Transcript, Turn
from probe.jsontext import Check, Spot, quoted
from probe.prompts import Codec, Prompt
from probe.tasks.answer_types import AnswerType
from probe.tasks.answers import says_answer
from probe.tasks.choice import (
    ToolChoice,
    ToolTalk,
    choice_fields,
    choice_prompt,
    choice_text,
    choice_warnings,
    compare_tools,
    decision_record,
    shown_record,
    under_system,
)
from probe.tasks.kind import Kind, Setting, Shelf
from probe.tasks.messages import check_answer, check_answer_type, compare_answer
from probe.tools.calls import (
    UNREADABLE,
    Call,
    Verdict,
    judge,
    opened_thought,
    read_calls,
    spoken_from,
    unread,
)
from probe.tools.execution import BUILTIN, ToolResult, Workspace, call, executables

if TYPE_CHECKING:
    from probe.capture import Job, Outcome
    from probe.tools.execution import Executable

AGENT_INSTRUCTION = (
    "You are an expert in choosing functions. From the functions listed below choose the one that fulfils the "
    'request of the user. Answer with a call of that function: <tool_call>[{{"name": ..., "arguments": '
    "{{...}}}}]</tool_call>. Its result is given to you: then answer the user. If none of the functions can be "
    'used, call {no_tool}. For example, to "What time is it in Rome?" you answer <tool_call>[{{"name": "clock", '
    '"arguments": {{"city": "Rome"}}}}]</tool_call>, you are given 14:05, and you answer "It is 14:05 in Rome."'
)
NOTHING_CALLED = "Nothing was called. Answer the user in plain words."
"""What comes back for a call of the listed "no tool"."""

# What may stand before a call's own text, and what may still follow it before the turn is over.
_TAG = r"<[/|\uff5c]?[\w:\u2581|\uff5c-]{1,48}>"
_MARKS_BEFORE = re.compile(rf"(?:{_TAG}|\[TOOL_CALLS\]|```\w*|<function=|call:)?[\s\[]*\Z")
_MARKS_BEHIND = re.compile(rf"(?:[\s\[\],;]|{_TAG}|```)*")
_HALF_TAG = re.compile(r"<[/|\uff5c]?[\w:\u2581|\uff5c-]{0,48}\Z")
_CALL_ID = re.compile(
    r'(?:"id"\s*:\s*"|\[CALL_ID\])(?P<given>[A-Za-z0-9]{9})\b|(?P<named>\bfunctions\.[\w./-]{1,128}:\d+)'
)
_MARKS = ("</tool_call>", "<tool_call>", "```", "<function=", "<|", '{"', "[TOOL_CALLS]")


class AgentTask(ToolChoice, frozen=True, kw_only=True, tag="agent"):
    """A transcript with tool calls, up to an answer."""

    answer: str | float | int | None = None
    answer_type: AnswerType | None = None
    """How answers are compared; None: by the form of `answer`."""
    max_turns: int = 8

    @property
    def has_target(self) -> bool:
        """Whether the file gives a target: null (no tool) is one, an absent field is none."""
        return self.target is not None or "target" in self.raw


class Episode:
    """One run of an agent task: what the model may call, and the facts that its calls have kept.

    `tools` is what can be executed by name (None: `executables()`). Facts are kept in a new file for each
    episode, which goes with it. `past` are results that the task's calls had before, in order (None: to be had by
    calling): they are given again. What tools from elsewhere give is added to it, so that a task that is begun again
    calls none of them twice; this package's own change nothing but the facts, and are called again to have these.
    """

    several = False
    """Whether a turn may make several calls."""

    def __init__(
        self,
        task: ToolTalk,
        prompt: Prompt,
        tools: Mapping[str, Executable] | None = None,
        past: list[ToolResult | None] | None = None,
    ):
        self._task, self._prompt = task, prompt
        self._past = [] if past is None else past
        self._n_results = 0
        self._tools = executables() if tools is None else tools
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        # A turn may begin in a thought that the template opens: the first, and those behind results.
        self._opens_thought = opened_thought(prompt.text)
        self._thinks_on = prompt.reply is not None and opened_thought(prompt.reply.after)

    def _read(self, text: str) -> list[Call]:
        dialect = self._prompt.dialect
        return read_calls(text, tools=self._task.tools, dialect=dialect, thinking=self._opens_thought)

    def over(self, text: str) -> bool:
        """Whether the model has gone on to something else behind its call: its turn ends there."""
        calls = self._read(text)
        if not calls:
            return False
        behind = text[calls[-1].end :]
        behind = behind[_MARKS_BEHIND.match(behind).end() :]  # type: ignore[union-attr]
        opener = (self._prompt.call_prefix or "").strip()
        if _HALF_TAG.match(behind):
            return False
        return bool(behind) and not any(mark.startswith(behind) for mark in (*_MARKS, opener))

    def reply(self, text: str) -> Reply:
        """The result of the turn's call.

        The record gets `called`, `call`, `result`, and for a wrong call `call_error` and `call_error_kind`,
        which says `unread` of a turn that looks like a call in a format that is not known.
        """
        calls = self._read(text)
        thinking, self._opens_thought = self._opens_thought, self._thinks_on
        if not calls:
            strange = unread(text, self._task.tools, thinking=thinking)
            if strange is None and not self._prompt.readable:
                strange = UNREADABLE
            wrong = {} if strange is None else {"call_error": strange, "call_error_kind": "unread"}
            fields = {"called": None, "call": None} | wrong
            return Reply(None, fields, spoken_from=spoken_from(text, thinking=thinking), in_thought=thinking)
        first = calls[0]
        start, name = _places(text, first, self._prompt.call_prefix or "")
        written = {"name": first.name, "arguments": first.arguments, "text": first.text}
        if first.name is not None and first.name == self._prompt.template.get("no_tool_name"):
            result = self._given(first, None)
            fields = {"called": None, "call": written | {"name": None}, "result": {"content": result.content}}
            return Reply(result.content, fields, start, name, first.name)
        verdict = judge(calls, self._task.tools, several=self.several)
        fields: dict[str, Any] = {"called": first.name, "call": written}
        if self.several and len(calls) > 1:
            fields["calls"] = [{"name": call.name, "arguments": call.arguments} for call in calls]
        if verdict.error is not None:
            fields |= {"call_error": verdict.message, "call_error_kind": verdict.error}
        result = self._given(first, verdict)
        call_id = _CALL_ID.search(text, max(first.start - len("functions."), 0))
        return Reply(
            result.content,
            fields | {"result": _result_fields(result)},
            start,
            name,
            first.name,
            call_id=call_id[call_id.lastgroup or 0] if call_id else None,
            further=self._further(text, calls),
        )

    def _further(self, text: str, calls: Sequence[Call]) -> tuple[tuple[str | None, int, int | None], ...]:
        """Name and places of each call behind the first, where several are to be scored."""
        opener = self._prompt.call_prefix or ""
        return tuple((c.name, *_places(text, c, opener)) for c in calls[1:]) if self.several else ()

    def close(self) -> None:
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def _result(self, first: Call, verdict: Verdict | None) -> ToolResult:
        """What comes back of a turn's first call; `verdict` None: it is a call of the listed "no tool"."""
        if verdict is None:
            return ToolResult(tool=first.name or "", content=NOTHING_CALLED)
        if verdict.error is not None:
            return _wrong(first.name or "", verdict.error, verdict.message or "")
        return self._execute(str(first.name), first.arguments or {})

    def _given(self, first: Call, verdict: Verdict | None) -> ToolResult:
        """The result of a turn's call, as it was where it was had before."""
        number, self._n_results = self._n_results, self._n_results + 1
        if number < len(self._past) and (earlier := self._past[number]) is not None:
            return earlier
        result = self._result(first, verdict)
        if number == len(self._past):
            executable = self._tools.get(result.tool)
            self._past.append(result if executable and executable.source != BUILTIN else None)
        return result

    def _execute(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        if name not in self._tools:
            message = f"{name} is shown, and nothing here can run it: answer without it"
            return _wrong(name, "unavailable", message)
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="probe-task-")
        kept = Workspace(state=Path(self._scratch.name, "facts.sqlite"))
        return call(name, arguments, tools=self._tools, workspace=kept)


def _places(text: str, first: Call, opener: str) -> tuple[int, int | None]:
    """Characters at which a call begins, its marks included, and at which it names its tool.

    White space before it belongs to it as far as the template's own opener begins with some.
    """
    begin = _MARKS_BEFORE.search(text[: first.start])
    start = begin.start() if begin else first.start
    while (mark := _MARKS_BEFORE.search(text[:start])) and mark[0].strip("[ \n\t"):
        start = mark.start()
    space = opener[: len(opener) - len(opener.lstrip())]
    start -= len(space) if text[:start].endswith(space) else 0
    if not first.name:
        return start, None
    keyed = re.compile(rf'"name"\s*:\s*"(?={re.escape(first.name)})').search(text, first.start)
    at = keyed.end() if keyed else text.find(first.name, first.start)
    return start, at if at >= 0 else None


def _wrong(name: str, kind: str, message: str) -> ToolResult:
    content = json.dumps({"error": kind, "message": message}, ensure_ascii=False)
    return ToolResult(tool=name, content=content, error=kind, message=message)


def _result_fields(result: ToolResult) -> dict[str, Any]:
    """What the record keeps of a result; an error only where there is one."""
    out: dict[str, Any] = {"content": result.content}
    if result.error is not None:
        out |= {"error": result.error, "message": result.message}
    if result.printed:
        out["printed"] = result.printed
    return out | {"seconds": round(result.seconds, 4)}


# -- fields, prompts, records -------------------------------------------------------------------------------


def _check_turns(value: Any, spot: Spot) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        spot.fault(f"must be a whole number above 0, is {quoted(value)}", "write how many turns at most")
    return value


def _fields(shelf: Shelf) -> dict[str, Check]:
    return {
        **choice_fields(shelf),
        "answer": check_answer,
        "answer_type": check_answer_type,
        "max_turns": _check_turns,
    }


def _compare(fields: dict[str, Any], spot: Spot) -> None:
    compare_tools(fields, spot)
    compare_answer(fields, spot)


def _render(task: AgentTask, codec: Codec, setting: Setting) -> list[Prompt]:
    return [choice_prompt(task, codec, setting.max_new_tokens, instruction=AGENT_INSTRUCTION, free=True)]


def _jobs(task: AgentTask, prompts: Sequence[Prompt], setting: Setting) -> list[Job]:
    from probe.capture import Job

    record = setting.earlier(task.id)
    tools = setting.tools() if record is None else {}
    past: list[ToolResult | None] = [] if record is None else _results(record)
    return [
        Job(
            prompt,
            task.id,
            Transcript(
                partial(Episode, task, prompt, tools, past), task.max_turns, must_call=setting.must_call
            ),
        )
        for prompt in prompts
    ]


def _results(record: Mapping[str, Any]) -> list[ToolResult | None]:
    """What came back in the turns of a record, in order; none of a task that failed."""
    fields = ("content", "error", "message", "printed", "seconds")
    return [
        ToolResult(tool=turn["called"] or "", **{key: result[key] for key in fields if key in result})
        for turn in record.get("turns", ())
        if (result := turn.get("result")) is not None
    ]


_FIRST = ("tool_probabilities", "chosen", "chosen_tool", "candidate_mass", "opener_log_prob")


def _score(task: AgentTask, prompts: Sequence[Prompt], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """`turns`, and at the top what a tool task has, of the first turn.

    `score` is 1 where all that the task asks for came true, else 0: `reached_answer` where it gives an answer,
    `called_target` where it gives a target (a right call of an acceptable tool in some turn; for null, no call
    in any). It is absent where the task gives neither.
    """
    (prompt,), (outcome,) = prompts, outcomes
    out = turns_record(task, prompt, outcome)
    turns, answer = out["turns"], out["answer"]
    strange = any(turn.get("call_error_kind") == "unread" for turn in turns)
    wanted: dict[str, bool] = {}
    if task.answer is not None:
        out["expected_answer"] = task.answer
        wanted["reached_answer"] = answer is not None and says_answer(answer, task.answer, task.answer_type)
    if task.has_target:
        out["target"] = task.raw.get("target")
        called = [turn["called"] for turn in turns if "call_error" not in turn]
        spoken = {turn["called"] for turn in turns} - {None}
        wanted["called_target"] = (
            bool(set(called) & set(task.targets)) if task.targets else not spoken and not strange
        )
    return out | wanted | ({"score": float(all(wanted.values()))} if wanted else {})


def turns_record(task: ToolTalk, prompt: Prompt, outcome: Outcome) -> dict[str, Any]:
    """What a record says of a transcript: its turns, and at the top what a tool task has, of the first turn."""
    turns = [_turn(prompt, number, turn) for number, turn in enumerate(outcome.parsed["turns"], 1)]
    last = outcome.parsed["turns"][-1]
    calls = last.called or turns[-1].get("call_error_kind") == "unread"
    return {
        **shown_record(task, prompt),
        **{name: turns[0][name] for name in _FIRST},
        **{
            name: turns[0][name]
            for name in ("called", "call", "calls", "call_error", "call_error_kind")
            if name in turns[0]
        },
        "turns": turns,
        "n_turns": len(turns),
        "ended_by": outcome.parsed["ended_by"],
        "answer": None if calls else last.text.strip(),
    }


def _turn(prompt: Prompt, number: int, turn: Turn) -> dict[str, Any]:
    """One turn and its decision; `slot` is `reached` by the turn's own call, `attached` on the side, or
    `forced` where the call's opener was given to the model."""
    out: dict[str, Any] = {
        "turn": number,
        "start": turn.start,
        "end": turn.end,
        "text": turn.text,
        "position": turn.position,
        "slot": "attached" if not turn.reached else "forced" if turn.forced else "reached",
        **turn.fields,
        **_decision(prompt, turn),
    }
    if "result" in out:
        out["result"] = out["result"] | {"shown": turn.result is not None}
        if turn.left_out:
            out["result"]["tokens_left_out"] = turn.left_out
    if turn.further:
        out["further_calls"] = [
            {"called": again.fields["called"], "position": again.position} | _decision(prompt, again)
            for again in turn.further
        ]
    return out


def _decision(prompt: Prompt, turn: Turn) -> dict[str, Any]:
    known = replace(prompt, candidates=turn.candidates)
    return {
        **decision_record(known, turn.candidate_token_log_probs, turn.opener_log_prob),
        "opener_log_prob": turn.opener_log_prob,
    }


AGENT = Kind(
    task=AgentTask,
    fields=_fields,
    required=("tools",),
    compare=_compare,
    render=_render,
    jobs=_jobs,
    score=_score,
    max_new_tokens=512,  # of the whole transcript, results included
    memory=True,
    calls=True,
    under=under_system,
    target=lambda task: {} if task.target is None else {"target": task.target},
    text=choice_text,
    lint=choice_warnings,
)
