"""A conversation through the model's chat template, or plainly where it has none."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from probe.prompts.codec import Codec
from probe.prompts.parts import PromptFault, Segment
from probe.prompts.places import Turns, placed

_SYSTEM_MOVED = "system text put in the user's turn"


def chat(codec: Codec, turns: Turns) -> tuple[list[Segment], dict[str, Any]]:
    """Segments of a conversation up to the assistant's turn, and how they were rendered.

    Raises PromptFault where the chat template cannot render it.
    """
    if not codec.template:
        return _plain(turns), {"name": "plain", "fallback": "no chat template"}
    turns, note = with_system(codec, turns)
    return placed(codec, turns), {"name": "chat", "fallback": note}


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
    system = [segment for role, parts in turns if role == "system" for segment in parts if segment.text]
    rest = [(role, parts) for role, parts in turns if role != "system"]
    first = next((index for index, (role, _) in enumerate(rest) if role == "user"), None)
    if not system or first is None:
        return None
    rest[first] = ("user", [*system, Segment("\n\n"), *rest[first][1]])
    return rest


def _plain(turns: Turns) -> list[Segment]:
    segments: list[Segment] = []
    for role, parts in turns:
        if role == "system":
            segments += [*parts, Segment("\n\n")]
        else:
            segments += [Segment(f"{role.capitalize()}: "), *parts, Segment("\n")]
    return [*segments, Segment("Assistant:\n")]
