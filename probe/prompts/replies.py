"""How the result of a call goes back to the model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from probe.prompts.calls import CALL_ID, NAME, NAMED_ID, call_format
from probe.prompts.codec import Codec
from probe.prompts.parts import PromptFault, ReplyForm
from probe.prompts.places import schema_of
from probe.tools.definitions import Tool

_SAID, _TOLD = "\ue000said\ue001", "\ue000told\ue001"
_AWKWARD = 'a "b"\nc'


def reply_form(codec: Codec, tools: Sequence[Tool] = ()) -> ReplyForm:
    """How the chat template shows the result of a call; a user's turn where it has no role for tools.

    `tools` are given to the template where it shows them: some have another template for conversations with tools.
    """
    if codec.template:
        schemas = [schema_of(tool) for tool in tools]
        for name, spoken, told, around in _exchanges(codec, native=bool(tools)):
            form = _exchange(codec, schemas, name, spoken, told, around)
            if form is not None:
                return form
    return ReplyForm("plain", "\nTool: ", "\nAssistant:\n")


def _exchanges(codec: Codec, *, native: bool):
    """(name, the assistant's message, the message with the result, what is put around the result), best first."""
    spoken = {"role": "assistant", "content": _SAID}
    tool = {"role": "tool", "name": NAME, "tool_call_id": CALL_ID}
    written = call_format(codec)
    called = _called(written.message if written else None, {"x": _SAID})
    exchanges = [("tool role", spoken, tool, ("", "")), ("tool role", *called, ("", ""))]
    yield from reversed(exchanges) if native else exchanges
    yield "user role", spoken, {"role": "user"}, ("<tool_response>\n", "\n</tool_response>")


def _called(message: Mapping[str, Any] | None, arguments: dict[str, str]) -> tuple[dict, dict]:
    """A call with arguments, in the template's own spelling where it has one, and the head of its result."""
    if message is None:
        function = {"name": NAME, "arguments": {}}
        call = {"id": CALL_ID, "type": "function", "function": function}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
    message = deepcopy(dict(message))
    (call,) = message["tool_calls"]
    as_text = isinstance(call["function"]["arguments"], str)
    call["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False) if as_text else arguments
    return message, {"role": "tool", "name": NAME, "tool_call_id": call["id"]}


def _exchange(
    codec: Codec,
    schemas: Sequence[Mapping[str, Any]],
    name: str,
    spoken: dict,
    told: dict,
    around: tuple[str, str],
) -> ReplyForm | None:
    def rendered(text: str) -> str:
        messages = [{"role": "user", "content": "x"}, spoken, told | {"content": text.join(around)}]
        return codec.template.render(messages, schemas)

    try:
        skeleton, real = rendered(_TOLD), rendered(_AWKWARD)
    except PromptFault:  # it has no such role
        return None
    before, told_text, after = skeleton.partition(_SAID)[2].partition(_TOLD)
    if not told_text or not after:
        return None
    if "tool_calls" in spoken:
        # What closes the call was generated: what comes back begins with the mark that ends the turn.
        turn_ends = [codec.decode([token]) for token in codec.eos_ids]
        places = [
            [at for token in tokens if (at := before.find(token)) >= 0]
            for tokens in (turn_ends, codec.tokenizer.all_special_tokens)
        ]
        ends = next((ends for ends in places if ends), None)
        if ends is None:
            return None
        before = before[min(ends) :]
    for quoted in (False, True):
        shown = json.dumps(_AWKWARD)[1:-1] if quoted else _AWKWARD
        if real == skeleton.replace(_TOLD, shown):
            return ReplyForm(name, before, after, quoted)
    return None


def reply_ids(
    form: ReplyForm,
    codec: Codec,
    content: str,
    *,
    tool: str,
    call_id: str | None,
    number: int = 0,
    ended_by: int | None,
    limit: int,
) -> tuple[list[int], tuple[int, int], int]:
    """Tokens that give a result back: (ids, range of the result in them, tokens of the result left out).

    `tool` is what was called, `call_id` what the model called it by, None where it gave no id: then it gets one
    as a server gives it, but the same in every run, by the `number` of the call in the transcript. `ended_by` is the token
    with which the model ended its turn, which is not said twice. A result of more than `limit` tokens is cut, and
    says so. The result is data: what looks like a special token in it is plain text.
    """
    name = re.sub(
        r"[^A-Za-z0-9_.:/-]", "_", tool
    )  # whatever the model called: it must not become a token here
    ids = {CALL_ID: f"{CALL_ID[:-3]}{number % 1000:03}", NAMED_ID: f"{NAMED_ID[:-1]}{number}"}
    texts = [form.before, form.after]
    for placeholder, template in ids.items():
        texts = [text.replace(placeholder, call_id or template) for text in texts]
    texts = [text.replace(NAME, name) for text in texts]
    before, after = (codec.encode(text, True) for text in texts)
    if before and before[0] == ended_by:
        before = before[1:]
    body = codec.encode(json.dumps(content, ensure_ascii=False)[1:-1] if form.quoted else content)
    left_out = max(0, len(body) - limit)
    if left_out:
        body = body[:limit]
        for _ in range(3):  # half a character at the end
            if codec.decode(body).endswith("\ufffd"):
                body.pop()
        body += codec.encode(f" … (cut: {left_out} more tokens)")
    start = len(before)
    return [*before, *body, *after], (start, start + len(body)), left_out
