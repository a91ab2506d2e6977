"""Thoughts in what a model writes, and in the prompt that opens one for it."""

from __future__ import annotations

import re

THOUGHTS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|thought_start|>": "<|thought_end|>",
    "<|channel|>analysis<|message|>": "<|end|>",
    "<|channel>thought": "<channel|>",
    "\u25c1think\u25b7": "\u25c1/think\u25b7",
}
"""What opens and closes a thought."""
# Apriel's prompts open one in words. Whoever reads what was written cannot tell: there the words may be anybody's.
_PROMPTED = THOUGHTS | {"Here are my reasoning steps:": "[BEGIN FINAL RESPONSE]"}
_OPENING, _CLOSING = ("|".join(map(re.escape, marks)) for marks in (THOUGHTS, THOUGHTS.values()))

EMPTY_THOUGHT = re.compile(
    rf"\s*(?P<opening>{_OPENING})?(?P<inside>\s*)(?P<closing>{_CLOSING})(?P<behind>\s*)"
)
"""A thought without words, or the end of one, at the beginning of a turn."""


def thought_end(text: str) -> int | None:
    """Where the first thought ends of which a text has the end alone; None: it has none such."""
    ends = []
    for opening, closing in THOUGHTS.items():
        end = -1 if closing in ("<|end|>", "<channel|>") else text.find(closing)
        if end >= 0 and opening not in text[:end]:
            ends.append(end + len(closing))
    return min(ends, default=None)


def opened_thought(prompt: str) -> bool:
    """Whether a prompt ends in a thought that it has opened and not closed."""
    thought = last_thought(prompt)
    return bool(closing_of(thought)) and thought.strip() in _PROMPTED


def last_thought(prompt: str) -> str:
    """The thought that a prompt ends in, from what opens it on, white space behind it included; empty: in none."""
    opening = max(_PROMPTED, key=lambda mark: (prompt.rfind(mark), len(mark)))
    begin = prompt.rfind(opening)
    if begin < 0:
        return ""
    thought = prompt[begin:]
    _, closed, behind = thought.partition(_PROMPTED[opening])
    return "" if closed and behind.strip() else thought


def closing_of(thought: str) -> str:
    """What ends a thought (`last_thought`) that is left open; empty for none, and for one that is closed."""
    opening = max((mark for mark in _PROMPTED if thought.startswith(mark)), key=len, default="")
    if not opening or _PROMPTED[opening] in thought:
        return ""
    line = "\n" if thought.endswith("\n") else ""
    return f"{line}{_PROMPTED[opening]}{line}{line}"


def spoken_from(text: str, *, thinking: bool = False) -> int | None:
    """Where in a turn the thought has ended that it begins with, white space behind it included; None: it has not.

    With `thinking` the prompt has opened the thought. Harmony's next message is begun by the same marks again.
    """
    opened = _OPENED.match(text)
    if not thinking and opened is None:
        return 0
    opening = opened[1] if opened else None
    closings = (THOUGHTS[opening],) if opening else set(THOUGHTS.values())
    ends = [at + len(closing) for closing in closings if (at := text.find(closing)) >= 0]
    if not ends:
        return None
    return _BEHIND.match(text, min(ends)).end()  # type: ignore[union-attr]


_OPENED = re.compile(rf"\s*({_OPENING})")
_BEHIND = re.compile(r"\s*(?:<\|start\|>assistant)?")
