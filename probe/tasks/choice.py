"""What tasks that show tools have in common: their fields, and P(tool|context) of a decision."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from probe.jsontext import Check, Spot, check_distinct, check_list, check_text, kind_of, nearest, quoted
from probe.prompts import Codec, Prompt, tools_prompt
from probe.prompts.turns import INSTRUCTING
from probe.tasks.kind import Shelf, Task
from probe.tasks.messages import Message, check_choices, check_messages, text_of
from probe.tasks.passages import softmax
from probe.tasks.warnings import mentions
from probe.tools.definitions import Tool, check_tool


class ToolTalk(Task, frozen=True, kw_only=True):
    """A conversation that shows tools."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    """Tools in shown order."""


class ToolChoice(ToolTalk, frozen=True, kw_only=True):
    """A task whose conversation goes on to a choice among tools."""

    target: str | tuple[str, ...] | None = None
    intentions: tuple[str, ...] | None = None
    """What may be intended before a tool is chosen, where the task lists it."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the acceptable tools; empty where no tool is to be called, or no target is given."""
        return (self.target,) if isinstance(self.target, str) else self.target or ()


C = TypeVar("C", bound=ToolChoice)

# -- fields -----------------------------------------------------------------------------------------------


def choice_fields(shelf: Shelf) -> dict[str, Check]:
    """Checks of the fields of a task that shows tools; `input` is short for one message of the user."""
    return {
        "messages": check_messages,
        "input": check_text,
        "tools": _ToolsShown(shelf),
        "target": _check_target,
        "intentions": _check_intentions,
    }


def _check_target(value: Any, spot: Spot) -> Any:
    if value is None or isinstance(value, str):
        return value
    if value == []:
        spot.fault("is an empty list", "write null for no tool")
    elif isinstance(value, list):
        return check_choices(value, spot)
    else:
        what = f"must be a tool's name, a list of names or null, is {kind_of(value)}"
        spot.fault(what, "write the name, or null for no tool")


def _check_intentions(value: Any, spot: Spot) -> tuple[str, ...]:
    intentions = check_choices(value, spot)
    if not intentions:
        spot.fault("is an empty list", "list what may be intended, or leave the field out")
    return intentions


class _ToolsShown:
    """Checks `tools`: a list of definitions and of names from the catalogue."""

    def __init__(self, shelf: Shelf):
        self.catalogue, self._runnable = shelf.catalogue, shelf.runnable

    def __call__(self, value: Any, spot: Spot) -> tuple[Tool | str | None, ...]:
        """Tools in shown order. A name that is not in the catalogue stays: targets are still compared to it."""
        shown = check_list(value, spot, self._check)
        check_distinct(map(_name_of, shown), spot, "is shown twice", "show it once")
        return shown

    def _check(self, value: Any, spot: Spot) -> Tool | str | None:
        if isinstance(value, dict):
            return check_tool(value, spot)
        if not isinstance(value, str):
            what = f"must be a tool's name or definition, is {kind_of(value)}"
            spot.fault(what, "write a name from the catalogue, or an object")
            return None
        if value not in self.catalogue and self._runnable is not None:
            # What can be run is asked for only now: it may mean loading other packages.
            self.catalogue, self._runnable = {**self._runnable(), **self.catalogue}, None
        if value in self.catalogue:
            return self.catalogue[value]
        if self.catalogue:
            fix = f"the nearest there is {quoted(nearest(value, tuple(self.catalogue)))}"
            spot.fault(f"tool {quoted(value)} is not in the catalogue", fix)
        else:
            fix = "give one with --tools, or define the tool in this line"
            spot.fault(f"tool {quoted(value)} needs a catalogue, and there is none", fix)
        return value


def _name_of(tool: Tool | str | None) -> str | None:
    return tool.name if isinstance(tool, Tool) else tool


def compare_tools(fields: dict[str, Any], spot: Spot) -> None:
    """Targets are shown; an `input` becomes the messages."""
    _compare_target(fields, spot)
    if isinstance(text := fields.pop("input", None), str):
        fields["messages"] = (Message("user", text),)


def _compare_target(fields: Mapping[str, Any], spot: Spot) -> None:
    if "messages" in fields and "input" in fields:
        spot["input"].fault('given beside "messages"', "keep one of the two", at_key=True)
    elif "messages" not in fields and "input" not in fields:
        spot["messages"].fault("missing", 'add "messages" or "input"')
    shown = tuple(map(_name_of, fields.get("tools", ())))
    target = fields.get("target")
    if not shown or None in shown:
        return
    for index, name in enumerate(target if isinstance(target, tuple) else (target,)):
        if isinstance(name, str) and name not in shown:
            fix = f"the nearest shown is {quoted(nearest(name, shown))}; null means no tool"
            entry = spot["target"][index] if isinstance(target, tuple) else spot["target"]
            entry.fault(f"tool {quoted(name)} is not shown", fix)


def choice_warnings(tasks: Sequence[C]) -> Iterator[tuple[C, str]]:
    """What may spoil a choice, task by task."""
    for task in tasks:
        user = "\n".join(message.content for message in task.messages if message.role == "user")
        for name in task.targets:
            if mentions(user, name):
                yield (
                    task,
                    f"the user's text has the target's name {quoted(name)}: it may be copied, not chosen",
                )
        for tool in task.tools:
            if not tool.description.strip():
                yield task, f"tool {quoted(tool.name)} has no description: there is nothing to attend to"


def choice_text(task: ToolTalk) -> tuple[str, ...]:
    """The same request with other tools, or the same tools in another order, is a task of its own."""
    return (text_of(task.messages), *(tool.name for tool in task.tools))


def under_system(task: C, text: str) -> C:
    """The task under another system message, first and alone: those of its own, of system and developer, are gone."""
    rest = [message for message in task.messages if message.role not in INSTRUCTING]
    return msgspec.structs.replace(task, messages=(Message("system", text), *rest))


# -- prompts and records ----------------------------------------------------------------------------------


def choice_prompt(
    task: ToolChoice, codec: Codec, max_new_tokens: int, *, instruction: str, free: bool
) -> Prompt:
    """See `probe.prompts.tools_prompt`."""
    turns = [message.turn() for message in task.messages]
    return tools_prompt(turns, task.tools, codec, max_new_tokens, instruction=instruction, free=free)


def shown_record(task: ToolTalk, prompt: Prompt) -> dict[str, Any]:
    """How the tools were shown."""
    return {
        "call_prefix": prompt.call_prefix,
        "no_tool": prompt.no_tool,
        "tools": [tool.name for tool in task.tools],
    }


def decision_record(
    prompt: Prompt, token_log_probs: Sequence[Sequence[float]], opener_log_prob: float | None
) -> dict[str, Any]:
    """P(tool|context) in a slot and the two choices that follow from it."""
    entries = tool_probabilities(prompt, token_log_probs, opener_log_prob)
    tools = [entry for entry in entries if entry["tool"] is not None]
    return {
        "tool_probabilities": entries,
        "chosen": max(entries, key=lambda entry: entry["probability"])["tool"],
        "chosen_tool": max(tools, key=lambda entry: entry["probability"])["tool"],
        "candidate_mass": math.fsum(math.exp(entry["log_prob"]) for entry in entries),
    }


def tool_probabilities(
    prompt: Prompt, token_log_probs: Sequence[Sequence[float]], opener_log_prob: float | None
) -> list[dict[str, Any]]:
    """Shown tools in shown order, then no-tool; log_prob in nats, probability = softmax over all entries.

    With a tool-aware template log P(opener) is added to every tool and no-tool is log(1 − P(opener)).
    """
    entries = [
        {
            "tool": candidate.name,
            "token_ids": list(candidate.token_ids),
            "token_log_probs": list(by_token),
            "log_prob": math.fsum(by_token),
        }
        for candidate, by_token in zip(prompt.candidates, token_log_probs, strict=True)
    ]
    if prompt.no_tool == "complement":
        assert opener_log_prob is not None
        for entry in entries:
            entry["log_prob"] += opener_log_prob
        # log(1 − p) by log1p(−exp) is exact near p = 0, by log(−expm1) near p = 1; p = 1 is kept finite.
        likely = opener_log_prob > -math.log(2)
        gap = (
            math.log(max(-math.expm1(opener_log_prob), 1e-300))
            if likely
            else math.log1p(-math.exp(opener_log_prob))
        )
        entries.append({"tool": None, "token_ids": [], "token_log_probs": [], "log_prob": gap})
    for group, name in ((entries, "probability"), (entries[:-1], "choice_probability")):
        for entry, probability in zip(group, softmax([entry["log_prob"] for entry in group]), strict=True):
            entry[name] = probability
    return entries
