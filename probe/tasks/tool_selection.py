"""The kind `tool_selection`: one choice among the shown tools and no tool."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from probe.capture.given import PREFILLED
from probe.jsontext import Spot, kind_of
from probe.prompts import Codec, Prompt
from probe.tasks.choice import (
    ToolChoice,
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
from probe.tasks.warnings import unbalanced
from probe.tools.calls import closed, judge, read_calls, unread
from probe.tools.calls.bfcl import BfclVerdict, bfcl_verdict, verdict_on
from probe.tools.calls.leaderboard import Decoding, handler_of
from probe.tools.definitions import Tool

if TYPE_CHECKING:
    from probe.capture import Job, Outcome

# Wording, parameter form and the description of "no tool" were chosen on the dev half of tasks/tools.jsonl
# among 13 renderings (tasks/README.md has the figures); a schema in full costs 1.7 times the tokens and chose
# no better.
TOOL_INSTRUCTION = (
    "You are an expert in choosing functions. From the functions listed below choose the one that fulfils the "
    'request of the user. Answer with a call of that function: <tool_call>[{{"name": ..., "arguments": '
    "{{...}}}}]</tool_call>. If none of the functions can be used, call {no_tool}."
)
# An opener of JSON or brackets alone does not say that a call follows.
_UNMARKED = re.compile(r'[\s\[{(]*(?:"\w+"\s*:\s*[\s\[{(]*(?:"\w*"?,?\s*)?)*\Z')


class ToolTask(ToolChoice, frozen=True, kw_only=True, tag="tool_selection"):
    """One choice among the shown tools and no tool."""

    parallel_calls: bool = False
    """Whether several calls at once are right where each is of an acceptable tool."""


def _check_flag(value: Any, spot: Spot) -> Any:
    if not isinstance(value, bool):
        spot.fault(
            f"must be true or false, is {kind_of(value)}", "write true where several calls may be made"
        )
    return value


def _lint(tasks: Sequence[ToolTask]) -> Iterator[tuple[ToolTask | None, str]]:
    yield from choice_warnings(tasks)
    if tasks and all(task.targets for task in tasks):
        yield None, "every tool_selection task has a target tool: add some whose target is null"
    aimed = [task for task in tasks if len(task.targets) == 1]
    positions = Counter(
        [tool.name for tool in task.tools].index(task.targets[0]) for task in aimed if len(task.tools) > 1
    )
    if len(positions) == 1 and positions.total() > 2:
        position = next(iter(positions)) + 1
        yield (
            None,
            f"the target is always shown as number {position} ({positions.total()} tasks): vary the order",
        )
    options = {tool.name for task in aimed for tool in task.tools}
    for warning in unbalanced("tool_selection", [task.targets[0] for task in aimed], options):
        yield None, warning


def _render(task: ToolTask, codec: Codec, setting: Setting) -> list[Prompt]:
    prompt = choice_prompt(task, codec, setting.max_new_tokens, instruction=TOOL_INSTRUCTION, free=False)
    if "bfcl" in (task.metadata or {}) and prompt.no_tool == "complement":
        prompt.decoder = handler_of(codec.tokenizer.name_or_path, native=True)
    return [prompt]


def _jobs(task: ToolTask, prompts: Sequence[Prompt], _setting: Setting) -> list[Job]:
    from probe.capture import Controller, Job

    ended = partial(_call_closed, several=task.parallel_calls)
    return [Job(prompt, task.id, Controller(partial(ended, prompt))) for prompt in prompts]


def _score(task: ToolTask, prompts: Sequence[Prompt], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    (prompt,), (outcome,) = prompts, outcomes
    out: dict[str, Any] = {
        "target": task.raw.get("target"),
        **shown_record(task, prompt),
        **decision_record(prompt, outcome.candidate_token_log_probs, outcome.opener_log_prob),
    }
    generated = outcome.finish_reason != PREFILLED
    if generated:
        out |= read_call(prompt, outcome.completion, task.tools, several=task.parallel_calls)
    if outcome.opener_log_prob is not None:
        out["opener_log_prob"] = outcome.opener_log_prob
    right = out["chosen"] in task.targets if task.targets else out["chosen"] is None
    out["score"] = float(right)
    if generated and (verdict := _bfcl(task, prompt, outcome)):
        out["bfcl"] = asdict(verdict)
    return out


def _written(prompt: Prompt, completion: str) -> str:
    """The call that the opener began; a mark says that it is one where the template writes none."""
    opener = prompt.call_prefix or ""
    return "<tool_call>" + opener + completion if _UNMARKED.match(opener) else opener + completion


def _call_closed(prompt: Prompt, completion: str, several: bool = False) -> bool:
    """Whether the call that the opener began is complete, or the line has ended on which its name should have been closed.

    With `several` the model ends its turn itself: another call may follow.
    """
    if (prompt.call_prefix or "").endswith('"') and "\n" in completion.partition('"')[0]:
        return True
    if several or not completion.rstrip().endswith(("}", "]", ">", ")")):
        return False
    calls = read_calls(_written(prompt, completion), dialect=prompt.dialect)
    return bool(calls) and calls[0].complete


_UNREAD = "what the call's opener began cannot be read"


def read_call(
    prompt: Prompt, completion: str, tools: Sequence[Tool], *, several: bool = False
) -> dict[str, Any]:
    """`called` (name, or null for no tool or no readable call) and the call's arguments as generated.

    Where `several` calls are allowed and more than one was made, `calls` has all of them.

    A call that is not a right call of a shown tool also has `call_error`, a sentence, and `call_error_kind`, one
    of `probe.tools.calls.KINDS`.
    """
    written = _written(prompt, completion)
    calls = read_calls(written, tools=tools, dialect=prompt.dialect)
    name = calls[0].name if calls else None
    if name is not None and name == prompt.template.get("no_tool_name"):
        return {"called": None, "call": {"name": None}}
    call = None if name is None else {"name": name, "arguments": calls[0].arguments}
    # The prompt ends with the opener of a call: what follows is one, whether it can be read or not.
    verdict = judge(calls, tools, unread=unread(written, tools) or _UNREAD, several=several)
    wrong = {"call_error": verdict.message, "call_error_kind": verdict.error} if verdict.error else {}
    listed = [{"name": call.name, "arguments": call.arguments} for call in calls if call.name is not None]
    return {
        "called": name,
        "call": call,
        **({"calls": listed} if several and len(listed) > 1 else {}),
        **wrong,
    }


def _bfcl(task: ToolTask, prompt: Prompt, outcome: Outcome) -> BfclVerdict | None:
    """The leaderboard's verdict on what was generated; None for a task that is not of it.

    The prompt ends with the call's opener, so text follows it also where the model would not have opened a
    call: without a listed "no tool", an opener of probability below one half counts as no call.
    """
    facts = (task.metadata or {}).get("bfcl")
    if facts is None:
        return None
    written = (prompt.call_prefix or "") + outcome.completion
    calls = read_calls(_written(prompt, outcome.completion), tools=task.tools, dialect=prompt.dialect)
    answered = next((tool for tool in task.tools if tool.name in task.targets), None)
    required = answered.parameters.get("required", []) if answered else []
    opener = outcome.opener_log_prob if prompt.no_tool == "complement" else None
    unopened = opener is not None and opener < -math.log(2)
    if unopened or (
        calls and calls[0].name is not None and calls[0].name == prompt.template.get("no_tool_name")
    ):
        return bfcl_verdict(Decoding(error="decoder_failed", message="nothing is called"), facts, required)
    if len(calls) == 1 and calls[0].complete:
        written = closed(written)
    return verdict_on(written, facts, required, handler=prompt.decoder)


TOOL_SELECTION = Kind(
    task=ToolTask,
    fields=lambda shelf: {**choice_fields(Shelf(shelf.catalogue)), "parallel_calls": _check_flag},
    required=("tools", "target"),
    compare=compare_tools,
    render=_render,
    jobs=_jobs,
    score=_score,
    # Of the default model's calls that end the longest has 81 tokens; generation stops where a call does.
    max_new_tokens=128,
    under=under_system,
    target=lambda task: {"target": task.target},
    text=choice_text,
    lint=_lint,
)
