"""How a conversation is given to a chat template: which spellings of the chat format the template takes.

A template is asked once, with messages of its own; all conversations of a run are given by one rule. What it takes is given as it
is: what it renders is what transformers renders. What it does not take is said in the nearest way that it takes, and that is
recorded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

from probe.prompts.codec import Codec
from probe.prompts.parts import PromptFault, Segment
from probe.prompts.places import schema_of
from probe.prompts.turns import INSTRUCTING, ChatTurn, Turns, arguments_of, messages_of
from probe.tools.definitions import Tool

_NAME, _RESULT, _ASKED, _WORD = "find_zephyr", "lanterns", "a request", "Quellwasser"
_TOOL = Tool(
    name=_NAME,
    description="A sample.",
    parameters={"type": "object", "properties": {"mooring": {"type": "string", "description": "A mooring."}}},
)
_AS_TEXT = f'{{"mooring": "{_WORD}"}}'
# A server's id, nine letters and digits (Mistral), the name and a number (Kimi).
_IDS = {"as given": "call_9KxT2vQ0mZ", "nine characters": "zephyr123", "of the name": f"functions.{_NAME}:0"}


@dataclass(frozen=True)
class MessageForm:
    """Which spellings of messages a template takes."""

    calls: bool
    """Whether it shows calls; else they are written as text."""
    ids: str = "as given"
    """One of `_IDS`."""
    null: bool = True
    """Whether the content of a message with calls may be null; else it is an empty text."""
    objects: bool = True
    """Whether arguments may be an object."""
    texts: bool = True
    """Whether arguments may be a JSON text; else they would be quoted a second time, or fail."""
    tools_answer: bool = True
    """Whether results have a role of their own; else the user tells them."""
    parts: frozenset[str] = frozenset()
    """Roles whose content may be a list of parts."""
    developer: bool = False
    """Whether it knows the role."""

    def given(self, turns: Turns) -> tuple[Turns, list[str]]:
        """The conversation as the template takes it, and in words what was said in another way."""
        notes: dict[str, None] = {}
        ids: dict[str, str] = {}
        out: Turns = []
        for turn in turns:
            turn = self._content(self._role(turn, notes), notes)
            if turn.calls:
                turn = self._calls(turn, ids, notes) if self.calls else _written(turn)
            elif turn.role == "tool" and self.tools_answer:
                turn = self._result(turn, ids)
            elif turn.role == "tool":
                turn = _told(turn)
                if out and out[-1].role == "user" and out[-1].label == turn.label:
                    earlier = out.pop()
                    turn = turn._replace(parts=[*earlier.parts, Segment("\n"), *turn.parts])
            out.append(turn)
        return out, list(notes)

    def _role(self, turn: ChatTurn, notes: dict[str, None]) -> ChatTurn:
        if turn.role != "developer" or self.developer:
            return turn
        notes["developer's messages as the system's"] = None
        return turn._replace(
            role="system", fields=None if turn.fields is None else {**turn.fields, "role": "system"}
        )

    def _content(self, turn: ChatTurn, notes: dict[str, None]) -> ChatTurn:
        """Parts as one text where the template takes no parts, lines between them as vLLM puts them there."""
        if turn.fields is None:
            return turn
        fields = dict(turn.fields)
        parts = list(turn.parts)
        if isinstance(fields.get("content"), list) and turn.role not in self.parts:
            notes["the parts of a content as one text"] = None
            parts = [piece for part in parts for piece in (Segment("\n", turn.label), part)][1:]
            fields["content"] = "".join(part.text for part in parts)
        elif fields.get("content") is None and (not turn.calls or not self.null):
            fields["content"] = ""
        return turn._replace(fields=fields, parts=parts)

    def _calls(self, turn: ChatTurn, ids: dict[str, str], notes: dict[str, None]) -> ChatTurn:
        calls = []
        for number, call in enumerate((turn.fields or {})["tool_calls"]):
            function = dict(call["function"])
            as_text = isinstance(function.get("arguments"), str)
            if as_text and not self.texts and isinstance(arguments_of(function), dict):
                function["arguments"] = arguments_of(function)
                notes["arguments as objects"] = None
            elif not as_text and not self.objects:
                function["arguments"] = json.dumps(function.get("arguments", {}), ensure_ascii=False)
                notes["arguments as texts"] = None
            given = call.get("id")
            call = {**call, "function": function}
            if self.ids != "as given":
                call["id"] = self._id(function["name"], given, number, len(ids))
                if call["id"] != given:
                    notes[f"ids of calls: {self.ids}"] = None
                ids[str(given)] = call["id"]
            calls.append(call)
        return turn._replace(fields={**(turn.fields or {}), "tool_calls": calls})

    def _id(self, name: str, given: str | None, number: int, total: int) -> str:
        if self.ids == "of the name":
            return given if given and name in given else f"functions.{name}:{number}"
        return given if given and len(given) == 9 and given.isalnum() else f"callid{total % 1000:03}"

    def _result(self, turn: ChatTurn, ids: Mapping[str, str]) -> ChatTurn:
        fields = dict(turn.fields or messages_of([turn])[0])
        if not ids:
            return turn
        given = str(fields.get("tool_call_id"))
        fields["tool_call_id"] = ids.get(given, list(ids.values())[-1])
        return turn._replace(fields=fields)


PLAIN = MessageForm(calls=False, tools_answer=True)
"""Where there is no template: calls as text, roles by their names."""


def _written(turn: ChatTurn) -> ChatTurn:
    """Calls as text, in the format that the fallback's instructions name."""
    calls = [{"name": call["name"], "arguments": arguments_of(call)} for call in turn.calls]
    text = f"<tool_call>{json.dumps(calls, ensure_ascii=False)}</tool_call>"
    spoken = [*turn.parts, Segment("\n", turn.label)] if any(part.text for part in turn.parts) else []
    return ChatTurn(turn.role, [*spoken, Segment(text, turn.label)], None, turn.label)


def _told(turn: ChatTurn) -> ChatTurn:
    """A result as the user tells it."""
    around = Segment("<tool_response>\n"), Segment("\n</tool_response>")
    return ChatTurn("user", [around[0], *turn.parts, around[1]], None, turn.label)


def _is_plain(turn: ChatTurn) -> bool:
    """Whether every template is given a message as it is."""
    return turn.fields is None and turn.role not in ("tool", "developer")


def given(
    codec: Codec, turns: Sequence[ChatTurn], *, native: bool, calls_as_text: str | None = None
) -> tuple[Turns, dict[str, str]]:
    """A conversation as the template takes it, and what the record says of that: `adapted`, and `calls_as_text` where calls
    are written so. `native`: whether the template is given the tools. `calls_as_text`: why its own calls are not taken."""
    turns = list(turns)
    if all(map(_is_plain, turns)):
        return turns, {}
    form = message_form(codec, native) if codec.template else PLAIN
    if calls_as_text is not None:
        form = replace(form, calls=False)
    out, notes = form.given(turns)
    record = {"adapted": "; ".join(notes)} if notes else {}
    if not form.calls and any(turn.calls for turn in turns):
        shown = "the chat template shows no calls" if codec.template else "no chat template"
        record["calls_as_text"] = calls_as_text or shown
    return out, record


@lru_cache(maxsize=8)
def message_form(codec: Codec, native: bool) -> MessageForm:
    """What the template takes, found out by rendering; `native` gives it the tools."""

    def shown(*messages: dict[str, Any]) -> str:
        try:
            return codec.template.render(messages, [schema_of(_TOOL)] if native else None)
        except PromptFault:
            return ""

    user = {"role": "user", "content": _ASKED}
    instruction = {"role": "developer", "content": "an instruction"}
    developer = "an instruction" in shown(instruction, user)
    parts = frozenset(role for role in ("user", "assistant", *INSTRUCTING) if _takes_parts(shown, role, user))

    def exchange(id: str, content: str | None, arguments: Any, result: Any = _RESULT) -> str:
        call = {"id": id, "type": "function", "function": {"name": _NAME, "arguments": arguments}}
        spoken = {"role": "assistant", "content": content, "tool_calls": [call]}
        return shown(user, spoken, {"role": "tool", "tool_call_id": id, "name": _NAME, "content": result})

    for (ids, id), null in product(_IDS.items(), (True, False)):
        content = None if null else ""
        objects, texts = exchange(id, content, {"mooring": _WORD}), exchange(id, content, _AS_TEXT)
        without = shown(user)
        takes_objects, takes_texts = (
            text.count(_NAME) > without.count(_NAME)
            and _WORD in text
            # Python's way to print null and an object, which no model is to write.
            and all(text.count(printed) == without.count(printed) for printed in ("None", "{'mooring'"))
            for text in (objects, texts)
        )
        takes_texts &= _AS_TEXT in texts
        if takes_objects or takes_texts:
            arguments = {"mooring": _WORD} if takes_objects else _AS_TEXT
            listed = exchange(id, content, arguments, [{"type": "text", "text": _RESULT}])
            if _RESULT in listed and "type'" not in listed and '"type": "text"' not in listed:
                parts |= {"tool"}
            answers = _RESULT in (objects if takes_objects else texts)
            return MessageForm(True, ids, null, takes_objects, takes_texts, answers, parts, developer)
    spoken = {"role": "assistant", "content": "a saying"}
    answered = _RESULT in shown(user, spoken, {"role": "tool", "name": _NAME, "content": _RESULT})
    return MessageForm(calls=False, tools_answer=answered, parts=parts, developer=developer)


def _takes_parts(shown: Any, role: str, user: dict[str, Any]) -> bool:
    listed = [{"type": "text", "text": "some words"}]
    messages = [{"role": role, "content": listed}]
    if role == "assistant":
        messages = [user, *messages]
    elif role != "user":
        messages = [*messages, user]
    text = shown(*messages)
    return (
        "some words" in text
        and "'type'" not in text
        and '"type"' not in text.partition("some words")[0][-24:]
    )
