"""A conversation through the model's chat template, or plainly where there is none."""

from __future__ import annotations

from typing import Any

from probe.prompts.codec import Codec
from probe.prompts.labels import OTHER
from probe.prompts.parts import Segment


def _mark(index: int) -> str:
    return f"\ue000{index}\ue001"


def chat(codec: Codec, turns: list[tuple[str, list[Segment]]]) -> tuple[list[Segment], dict[str, Any]]:
    """Segments of a conversation up to the assistant's turn, and how they were rendered."""
    if codec.has_chat:
        for candidate, note in (
            (turns, None),
            (_without_system(turns), "system text put in the user's turn"),
        ):
            segments = through_template(codec, candidate, None) if candidate else None
            if segments is not None:
                return segments, {"name": "chat", "fallback": note}
    reason = "the chat template failed" if codec.has_chat else "no chat template"
    return _plain(turns), {"name": "plain", "fallback": reason}


def _without_system(turns):
    """The system text in front of the first user's turn; None where there is none to move or no such turn."""
    system = [segment for role, parts in turns if role == "system" for segment in parts]
    rest = [(role, parts) for role, parts in turns if role != "system"]
    first = next((index for index, (role, _) in enumerate(rest) if role == "user"), None)
    if not system or first is None:
        return None
    rest[first] = ("user", [*system, Segment("\n\n"), *rest[first][1]])
    return rest


def _plain(turns) -> list[Segment]:
    segments: list[Segment] = []
    for role, parts in turns:
        if role == "system":
            segments += [*parts, Segment("\n\n")]
        else:
            segments += [Segment(f"{role.capitalize()}: "), *parts, Segment("\n")]
    return [*segments, Segment("Assistant:\n")]


def through_template(codec: Codec, turns, tools: list[dict] | None) -> list[Segment] | None:
    """Render with marks in place of the contents, put the contents back as data; None if it does not fit.

    The result must equal the rendering of the real contents: a template that looks into a message would
    otherwise be misread.
    """
    marked = [{"role": role, "content": _mark(index)} for index, (role, _) in enumerate(turns)]
    contents = ["".join(segment.text for segment in parts) for _, parts in turns]
    real = [{"role": role, "content": text} for (role, _), text in zip(turns, contents, strict=True)]
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    if tools:
        options["tools"] = tools
    try:
        skeleton = codec.tokenizer.apply_chat_template(marked, **options)
        expected = codec.tokenizer.apply_chat_template(real, **options)
    except Exception:  # jinja errors of somebody else's template, "system role not supported" among them
        return None
    segments: list[Segment] = []
    rest = skeleton
    for index, (_, parts) in enumerate(turns):
        before, found, rest = rest.partition(_mark(index))
        if not found:
            return None
        segments += [Segment(before, OTHER, markup=True), *parts]
    segments.append(Segment(rest, OTHER, markup=True))
    segments = [segment for segment in segments if segment.text]
    if "".join(segment.text for segment in segments) == expected:
        return segments
    stripped = _strip_contents(turns)
    return None if stripped is None else through_template(codec, stripped, tools)


def _strip_contents(turns):
    """The turns with outer white space removed, as templates that trim do; None if nothing changes."""
    changed, out = False, []
    for role, parts in turns:
        parts = list(parts)
        if parts:
            first = Segment(parts[0].text.lstrip(), parts[0].label)
            changed |= first != parts[0]
            parts[0] = first
            last = Segment(parts[-1].text.rstrip(), parts[-1].label)
            changed |= last != parts[-1]
            parts[-1] = last
        out.append((role, parts))
    return out if changed else None
