"""How the result of a call goes back to the model."""

from __future__ import annotations

import json

from probe.prompts.codec import Codec
from probe.prompts.parts import ReplyForm

_SAID, _TOLD = "\ue000said\ue001", "\ue000told\ue001"
_AWKWARD = 'a "b"\nc'


def reply_form(codec: Codec) -> ReplyForm:
    """How the chat template shows the result of a call; a user's turn where it has no role for tools."""
    if codec.has_chat:
        for name, spoken, told, around in _exchanges():
            form = _exchange(codec, name, spoken, told, around)
            if form is not None:
                return form
    return ReplyForm("plain", "\nTool: ", "\nAssistant:\n")


def _exchanges():
    """(name, the assistant's message, the message with the result, what is put around the result), best first."""
    call_id = "callid000"  # Mistral's templates want nine characters
    call = {
        "id": call_id,
        "type": "function",
        "function": {"name": "f", "arguments": {"x": _SAID}},
    }
    said = {"role": "assistant", "content": _SAID}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    tool = {"role": "tool", "name": "f", "tool_call_id": call_id}
    yield "tool role", said, tool, ("", "")
    yield "tool role", called, tool, ("", "")
    yield "user role", said, {"role": "user"}, ("<tool_response>\n", "\n</tool_response>")


def _exchange(codec: Codec, name: str, spoken: dict, told: dict, around: tuple[str, str]) -> ReplyForm | None:
    def rendered(text: str) -> str:
        messages = [{"role": "user", "content": "x"}, spoken, told | {"content": text.join(around)}]
        return codec.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    try:
        skeleton, real = rendered(_TOLD), rendered(_AWKWARD)
    except Exception:  # jinja errors of somebody else's template: it has no such role
        return None
    before, found, after = skeleton.partition(_SAID)[2].partition(_TOLD)
    if not found or not after:
        return None
    if "tool_calls" in spoken:
        # What closes the call was generated: what comes back begins with the mark that ends the turn.
        ends = [at for token in codec.tokenizer.all_special_tokens if (at := before.find(token)) >= 0]
        if not ends:
            return None
        before = before[min(ends) :]
    for quoted in (False, True):
        shown = json.dumps(_AWKWARD)[1:-1] if quoted else _AWKWARD
        if real == skeleton.replace(_TOLD, shown):
            return ReplyForm(name, before, after, quoted)
    return None


def reply_ids(
    form: ReplyForm, codec: Codec, content: str, *, ended_by: int | None, limit: int
) -> tuple[list[int], tuple[int, int], int]:
    """Tokens that give a result back: (ids, range of the result in them, tokens of the result left out).

    `ended_by` is the token with which the model ended its turn, which is not said twice. A result of more than
    `limit` tokens is cut, and says so. The result is data: what looks like a special token in it is plain text.
    """
    before, after = codec.encode(form.before, True), codec.encode(form.after, True)
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
