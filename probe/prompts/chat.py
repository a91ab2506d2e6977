"""A conversation through the model's chat template, or plainly where it has none."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from probe.prompts.codec import Codec
from probe.prompts.forms import given
from probe.prompts.parts import PromptFault, Segment
from probe.prompts.places import placed
from probe.prompts.turns import INSTRUCTING, ChatTurn, Turns
from probe.tools.definitions import Tool

_SYSTEM_MOVED = "system text put in the user's turn"


def chat(
    codec: Codec,
    turns: Sequence[ChatTurn],
    tools: Sequence[Tool] = (),
    *,
    open_turn: bool = True,
) -> tuple[list[Segment], dict[str, Any]]:
    """Segments of a conversation, up to the assistant's turn with `open_turn`, and how they were rendered. `tools` are given to
    the template.

    Calls that the template cannot show are written as text. Raises PromptFault where it cannot render the conversation.
    """
    if not codec.template:
        spoken, record = given(codec, turns, native=False)
        return _plain(spoken, open_turn), {"name": "plain", "fallback": "no chat template"} | record

    def shown(calls_as_text: str | None) -> tuple[list[Segment], dict[str, Any]]:
        taken, record = given(codec, turns, native=bool(tools), calls_as_text=calls_as_text)
        taken, note = with_system(codec, taken)
        return placed(codec, taken, tools, open_turn=open_turn), {"name": "chat", "fallback": note} | record

    try:
        return shown(None)
    except PromptFault as fault:
        if any(turn.calls for turn in turns):
            with suppress(PromptFault):
                return shown(str(fault))
        raise


def with_system(codec: Codec, turns: Turns) -> tuple[Turns, str | None]:
    """Turns that the template shows whole: a system text goes to the user where it knows no system role.

    The second part says so. That depends on the template alone: all conversations are rendered by one rule.
    """
    moved = None if _shows_system(codec) else _without_system(turns)
    return (turns, None) if moved is None else (moved, _SYSTEM_MOVED)


@lru_cache(maxsize=8)
def _shows_system(codec: Codec) -> bool:
    """Whether the template shows a system message; true as well for one that renders nothing, to say so itself."""
    user = {"role": "user", "content": "a request"}
    instruction = {"role": "system", "content": "an instruction"}
    return not _rendered(codec, user) or instruction["content"] in _rendered(codec, instruction, user)


def _rendered(codec: Codec, *messages: dict[str, str]) -> str:
    try:
        return codec.template.render(messages)
    except PromptFault:
        return ""


def _without_system(turns: Turns) -> Turns | None:
    """The system text in front of the first user's turn; None where there is none to move or no such turn."""
    system = [segment for turn in turns if turn.role == "system" for segment in turn.parts if segment.text]
    rest = [turn for turn in turns if turn.role != "system"]
    first = next((index for index, turn in enumerate(rest) if turn.role == "user"), None)
    if not system or first is None:
        return None
    rest[first] = ChatTurn("user", [*system, Segment("\n\n"), *rest[first].parts], None, rest[first].label)
    return rest


def _plain(turns: Turns, open_turn: bool) -> list[Segment]:
    segments: list[Segment] = []
    for turn in turns:
        if turn.role in INSTRUCTING:
            segments += [*turn.parts, Segment("\n\n")]
        else:
            segments += [Segment(f"{turn.role.capitalize()}: "), *turn.parts, Segment("\n")]
    return [*segments, Segment("Assistant:\n")] if open_turn else segments
