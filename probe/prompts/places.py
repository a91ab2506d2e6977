"""Where the texts of a conversation stand in what the chat template makes of it.

The conversation is rendered as it is, and again with marks around its texts. Where the two agree but for the marks,
the marks say which characters are whose. A template that looks into a message (for `<think>`, for white space, for
JSON) is disturbed by marks in the wrong place: they are set in one way after the other until they disturb nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any

from probe.jsontext import quoted, walk
from probe.prompts.codec import Codec
from probe.prompts.labels import DESCRIPTION, NAME, OTHER, PARAMETERS, TOOL_PARTS, USER, tool_label
from probe.prompts.parts import PromptFault, Segment, ToolPart
from probe.prompts.turns import Turns, message_of, messages_of
from probe.tools.calls.thoughts import last_thought
from probe.tools.definitions import Tool

# Private-use planes 15 and 16: an opening mark there, its closing mark here. No tokenizer has words of them.
_OPEN, _CLOSE, _MOST = 0xF0000, 0x100000, 0xFFFD
_OPENS = re.compile("[\U000f0000-\U000ffffd]")
_MARKS = re.compile("[\U000f0000-\U000ffffd\U00100000-\U0010fffd]")

_TAG = r"\s*</?[A-Za-z][\w:.-]*>\s*"
_CUTS = {
    "whole": re.compile(r"(?!)"),
    "inside of white space": re.compile(r"\A\s+|\s+\Z"),
    "between tags": re.compile(rf"\A\s+|\s+\Z|{_TAG}"),
    "word by word": re.compile(rf"{_TAG}|\s*(?<!\S)/\w+(?!\S)\s*|\s+"),
}
"""Ways to set marks in a message: what matches stays outside of them."""
_KEPT = {"$ref", "$schema", "$id", "$anchor"}
_UNMARKED = {
    "all texts": _KEPT | {"type", "format"},
    "texts but options": _KEPT | {"type", "format", "enum", "const", "default", "pattern", "required"},
}
"""Ways to set marks in a tool's schema: keywords whose values are left as they are."""


def schema_of(tool: Tool) -> dict[str, Any]:
    """A tool as templates are given it."""
    function = tool.document()
    return {"type": "function", "function": function}


def placed(
    codec: Codec, turns: Turns, tools: Sequence[Tool] = (), *, open_turn: bool = True
) -> list[Segment]:
    """A conversation, up to the assistant's turn with `open_turn`: what `transformers` renders, cut where the texts begin
    and end. All that a turn of the assistant says, what the template writes around it included, has the turn's label.

    Raises PromptFault with the template's own words and the message that it cannot render, and where a special token in a
    text would become one.
    """
    turns = _numbered(turns)
    chat = _Chat(codec, turns, [schema_of(tool) for tool in tools], open_turn)
    text = chat.render(turns)
    hostile = _hostile(chat)
    if not _MARKS.search(text):
        for segments in _attempts(chat, tools, text):
            if not (hostile and _leaks(chat, segments, hostile)):
                return _unnumbered(_whole(_with_bodies(chat, segments, text), codec))
    segments = _searched(text, turns, tools)
    if hostile and _leaks(chat, segments, hostile):
        what = f"the chat template moves {quoted(hostile[0])}, a token of its own, out of a text"
        raise PromptFault(f"{what}: take it out of the messages and tools")
    return _unnumbered(segments)


@dataclass(frozen=True)
class _Chat:
    """A conversation and how it is rendered."""

    codec: Codec
    turns: Turns
    schemas: list[dict[str, Any]]
    open_turn: bool

    def render(self, turns: Turns) -> str:
        """What the template makes of these turns. Raises PromptFault that names the message it cannot render."""
        try:
            return self.written(messages_of(turns))
        except PromptFault as fault:
            number = len(turns)
            while number > 1 and self._try(turns[: number - 1]) is None:
                number -= 1
            role = turns[number - 1].role if turns else "none"
            raise PromptFault(f"{fault} (message {number}, of the role {role})") from fault

    def written(self, messages: list[dict[str, Any]], schemas: list[dict[str, Any]] | None = None) -> str:
        return self.codec.template.render(
            messages, self.schemas if schemas is None else schemas, open_turn=self.open_turn
        )

    def _try(self, turns: Turns) -> str | None:
        return self.head(turns, open_turn=self.open_turn)

    def head(self, turns: Turns, *, open_turn: bool) -> str | None:
        """The first turns alone; None where they cannot be rendered."""
        try:
            return self.codec.template.render(messages_of(turns), self.schemas, open_turn=open_turn)
        except PromptFault:
            return None


# -- marks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stretch:
    """A stretch of text between marks."""

    text: str
    label: str
    owner: int
    """Message that it stands in; tools have negative numbers."""
    before: str = ""
    """Text of the message between the piece before it and this one, outside of marks."""
    after: str = ""
    """Text behind the last piece of a message."""
    part: str | None = None
    """Part of the tool's definition that it is from."""
    optional: bool = False
    """Whether a template may leave it out: a thought, or what stands in the arguments of a call."""
    called: bool = False
    """Whether it is the name in a call."""


def _attempts(chat: _Chat, tools: Sequence[Tool], text: str) -> Iterator[list[Segment]]:
    """Segments that make up `text`, by one way of setting marks after the other."""
    for cut in _CUTS.values():
        pieces, messages = _marked_messages(chat, cut)
        if len(pieces) + len(TOOL_PARTS) * len(tools) > _MOST:
            continue
        skeleton = _skeleton(chat, messages, chat.schemas, text)
        if skeleton is None:
            continue
        _refuse_lost(skeleton, pieces, chat.turns)
        segments = _segments(skeleton, pieces)
        if segments is None:
            continue
        listed = _listed_as_json(segments, tools, chat.schemas)
        if listed is not None:
            yield listed
        if not tools:
            continue
        for unmarked in _UNMARKED.values():
            owners = [
                _Stretch("", tool_label(tool.name), -1 - n, part=part)
                for n, tool in enumerate(tools)
                for part in TOOL_PARTS
            ]
            marked = [
                _marked_tool(schema, len(pieces) + len(TOOL_PARTS) * n, unmarked)
                for n, schema in enumerate(chat.schemas)
            ]
            skeleton = _skeleton(chat, messages, marked, text)
            segments = None if skeleton is None else _segments(skeleton, [*pieces, *owners])
            if segments is not None:
                yield segments


def _skeleton(chat: _Chat, messages: list[dict], schemas: list[dict], text: str) -> str | None:
    """The rendering with marks; None where they change more than themselves."""
    try:
        skeleton = chat.written(messages, schemas)
    except PromptFault:
        return None
    return skeleton if _MARKS.sub("", skeleton) == text else None


def _marked_messages(chat: _Chat, cut: re.Pattern[str]) -> tuple[list[_Stretch], list[dict[str, Any]]]:
    """The pieces between marks, and the messages with marks around them."""
    pieces: list[_Stretch] = []
    messages: list[dict[str, Any]] = []
    marked: dict[str, dict[str, Any]] = {}
    special = set(chat.codec.tokenizer.all_special_tokens)
    for owner, turn in enumerate(chat.turns):

        def content(parts: Sequence[Segment], owner: int = owner) -> str:
            inside, behind = _pieces(parts, owner, cut, special)
            numbered = enumerate(inside, len(pieces))
            text = "".join(p.before + _mark(p.text, n) for n, p in numbered) + behind
            pieces.extend([*inside[:-1], *(replace(piece, after=behind) for piece in inside[-1:])])
            return text

        def whole(text: str, role: str, owner: int = owner, label: str = turn.label) -> str:
            if not text:
                return text
            pieces.append(_Stretch(text, label, owner, optional=role != "name", called=role == "name"))
            return _mark(text, len(pieces) - 1)

        # Equal messages stay equal: templates compare a message with the last one.
        key = json.dumps([message_of(turn), turn.label, [(p.text, p.label) for p in turn.parts]])
        if key not in marked:
            marked[key] = message_of(turn, content, whole)
        messages.append(marked[key])
    return pieces, messages


def _mark(text: str, number: int) -> str:
    return f"{chr(_OPEN + min(number, _MOST))}{text}{chr(_CLOSE + min(number, _MOST))}"


def _pieces(
    parts: Sequence[Segment], owner: int, cut: re.Pattern[str], special: set[str]
) -> tuple[list[_Stretch], str]:
    """The pieces of a message and what stands behind the last. A special token is never left outside of marks."""
    whole = "".join(part.text for part in parts)
    outside = [m.span() for m in cut.finditer(whole) if m.group().strip() not in special]
    outside.append((len(whole), len(whole)))
    pieces: list[_Stretch] = []
    behind = at = number = 0
    for part, end in zip(parts, accumulate(len(part.text) for part in parts), strict=True):
        while at < end:
            start, stop = outside[number]
            if start <= at:
                at = min(stop, end)
                number += at == stop
                continue
            to = min(start, end)
            pieces.append(_Stretch(whole[at:to], part.label, owner, whole[behind:at]))
            behind = at = to
    return pieces, whole[behind:]


def _marked_tool(schema: Mapping[str, Any], number: int, unmarked: set[str]) -> dict[str, Any]:
    """A tool with marks around its texts: those of its n-th part have the number `number` + n."""
    function = {
        part: _marked(schema["function"][part], number + n, unmarked, part)
        for n, part in enumerate(TOOL_PARTS)
    }
    return {**schema, "function": function}


def _marked(value: Any, number: int, unmarked: set[str], key: str = "") -> Any:
    """A value with marks around its texts; names of properties among them, so that they stay equal everywhere."""
    if isinstance(value, str):
        return value if key in unmarked or not value else _mark(value, number)
    if isinstance(value, list):
        return [_marked(item, number, unmarked, key) for item in value]
    if isinstance(value, dict):
        named = key == "properties"
        named &= "required" not in unmarked
        return {
            (_mark(name, number) if named and name else name): _marked(
                item, number, unmarked, "" if key == "properties" else name
            )
            for name, item in value.items()
        }
    return value


# -- from marks to segments ----------------------------------------------------------------------------------------


def _refuse_lost(skeleton: str, pieces: Sequence[_Stretch], turns: Turns) -> None:
    """Raises PromptFault where nothing of a message is shown; a thought may be left out of the history."""
    numbers = {ord(mark) - (_OPEN if ord(mark) < _CLOSE else _CLOSE) for mark in _MARKS.findall(skeleton)}
    shown = {pieces[number].owner for number in numbers if number < len(pieces)}
    for number, piece in enumerate(pieces):
        turn = turns[piece.owner]
        if piece.owner not in shown and piece.text.strip():
            if piece.optional or any("</think>" in part.text for part in turn.parts):
                continue
            what = f"the chat template leaves out message {piece.owner + 1}, of the role {turn.role}"
            raise PromptFault(f"{what}: take it out, or say it in another role")
        if piece.called and number not in numbers:
            what = f"the chat template leaves out a call of message {piece.owner + 1} ({quoted(piece.text)})"
            raise PromptFault(f"{what}: make one call a message")


def _segments(skeleton: str, pieces: Sequence[_Stretch]) -> list[Segment] | None:
    """None where a mark has lost its other half: the template cut the text between them."""
    parts = _read(skeleton, pieces)
    return None if parts is None else _joined(list(_with_gaps(parts)))


def _read(skeleton: str, pieces: Sequence[_Stretch]) -> list[tuple[_Stretch | None, str]] | None:
    """The text in order: each piece, and (None) what stands between them; None where a mark stands alone."""
    parts: list[tuple[_Stretch | None, str]] = []
    at = 0
    for match in _OPENS.finditer(skeleton):
        number = ord(match.group()) - _OPEN
        end = skeleton.find(chr(_CLOSE + number), match.end())
        if match.start() < at or end < 0:
            return None
        parts += [(None, skeleton[at : match.start()]), (pieces[number], skeleton[match.end() : end])]
        at = end + 1
    parts.append((None, skeleton[at:]))
    if any(_MARKS.search(text) for _, text in parts):
        return None
    return [(piece, text) for piece, text in parts if text or piece]


def _with_gaps(parts: list[tuple[_Stretch | None, str]]) -> Iterator[Segment]:
    """Segments. What stands between two pieces as it stood in the message is the message's, else the template's."""
    for index, (piece, text) in enumerate(parts):
        if piece is not None:
            yield Segment(text, piece.label, parts=_of_part(text, piece.part))
            continue
        left = parts[index - 1][0] if index else None
        right = parts[index + 1][0] if index + 1 < len(parts) else None
        if left and right and left.owner == right.owner:
            if left.owner < 0:  # within a tool: the template's words, between those of the tool
                between = PARAMETERS if left.part == right.part == PARAMETERS else None
                yield Segment(text, left.label, markup=True, parts=_of_part(text, between))
                continue
            if text in (right.before, json.dumps(right.before, ensure_ascii=False)[1:-1]):
                yield Segment(text, left.label)
                continue
        # A tag at the end of a message; white space there is what the template trimmed.
        head = left.after if left and left.after.strip() and text.startswith(left.after) else ""
        rest = text[len(head) :]
        tail = right.before if right and right.before.strip() and rest.endswith(right.before) else ""
        yield Segment(head, left.label if left else OTHER)
        yield Segment(rest[: len(rest) - len(tail)], OTHER, markup=True)
        yield Segment(tail, right.label if right else OTHER)


def _of_part(text: str, part: str | None) -> tuple[ToolPart, ...]:
    """A text that is of one part, or (None) of no part."""
    return () if part is None else (ToolPart(part, 0, len(text)),)


def _joined(segments: list[Segment]) -> list[Segment]:
    """Neighbours with one label as one segment, so that they are tokenised together; markup stays apart."""
    out: list[Segment] = []
    for segment in segments:
        if not segment.text:
            continue
        if out and (out[-1].label, out[-1].markup) == (segment.label, segment.markup):
            out[-1] = _together([out[-1], segment], segment.markup)
        else:
            out.append(segment)
    return out


def _whole(segments: list[Segment], codec: Codec) -> list[Segment]:
    """Each tool, and each turn of the assistant, as one segment of markup where none of its own text could be taken for a token
    of the template."""
    out: list[Segment] = []
    for label, group in groupby(segments, key=lambda segment: segment.label):
        run = list(group)
        whole = _together(run, markup=True)
        shown = "".join(segment.text if segment.markup else "\n" for segment in run)
        mixed = any(segment.markup for segment in run) and label != OTHER
        if mixed and all(whole.text.count(token) == shown.count(token) for token in codec.markup_tokens):
            run = [whole]
        out += run
    return out


def _together(segments: Sequence[Segment], markup: bool) -> Segment:
    """Segments of one label as one; a part that goes on from one to the next is one part."""
    text, parts = "", list[ToolPart]()
    for segment in segments:
        for part in (part.moved(len(text)) for part in segment.parts):
            if parts and (parts[-1].part, parts[-1].end) == (part.part, part.start):
                part = replace(part, start=parts.pop().start)
            parts.append(part)
        text += segment.text
    return Segment(text, segments[0].label, markup, tuple(parts))


# -- tools as JSON, and what is left ---------------------------------------------------------------------------------


def _listed_as_json(
    segments: list[Segment], tools: Sequence[Tool], schemas: Sequence[Mapping[str, Any]]
) -> list[Segment] | None:
    """Each tool's JSON cut out of the template's text, as labelled data; None where one is not there as JSON."""
    out: list[Segment] = []
    pending = list(zip(tools, schemas, strict=True))
    for segment in segments:
        if not segment.markup:
            out.append(segment)
            continue
        rest = segment.text
        while pending:
            tool, schema = pending[0]
            shown = next((text for text in _spellings(schema) if text in rest), None)
            if shown is None:
                break
            before, _, rest = rest.partition(shown)
            data = Segment(shown, tool_label(tool.name), parts=parts_of_json(shown))
            out += [Segment(before, OTHER, markup=True), data]
            pending.pop(0)
        out.append(Segment(rest, OTHER, markup=True))
    return None if pending else [segment for segment in out if segment.text]


def parts_of_json(shown: str) -> tuple[ToolPart, ...]:
    """Where the parts of a tool stand in its JSON: texts without their quotation marks, parameters as a whole."""
    decoder, parts = json.JSONDecoder(), list[ToolPart]()
    for event in walk(shown):
        part = event.at[-1] if event.at else None
        if part in TOOL_PARTS and event.at[:-1] in ((), ("function",)) and not event.is_key:
            end = decoder.raw_decode(shown, event.offset)[1]
            quote = event.token.startswith('"')
            parts.append(ToolPart(str(part), event.offset + quote, end - quote))
    return tuple(part for part in parts if part.start < part.end)


def _spellings(schema: Mapping[str, Any]) -> list[str]:
    forms = [schema, schema["function"]]
    return [
        json.dumps(form, ensure_ascii=a, indent=i)
        for form in forms
        for i in (None, 4, 2)
        for a in (False, True)
    ]


def _searched(text: str, turns: Turns, tools: Sequence[Tool]) -> list[Segment]:
    """The rendering with the texts that can be searched for in it: names and descriptions of tools, whole messages."""
    wanted = [
        (tool_label(tool.name), words, part)
        for tool in tools
        for part, words in ((NAME, tool.name), (DESCRIPTION, tool.description))
    ]
    wanted += [(segment.label, segment.text, None) for turn in turns for segment in turn.parts]
    wanted += [(turn.label, call["name"], None) for turn in turns for call in turn.calls]
    spans: list[tuple[int, int, str, str | None]] = []
    for label, words, part in wanted:
        spelled = (json.dumps(words, ensure_ascii=False)[1:-1], words.strip())
        for shown in filter(None, dict.fromkeys([words, *spelled])):
            free = (
                match.span()
                for match in re.finditer(re.escape(shown), text)
                if all(match.end() <= start or match.start() >= end for start, end, *_ in spans)
            )
            if (span := next(free, None)) is not None:
                # A text that stands there twice may be another's: no part is known of it.
                spans.append((*span, label, part if text.count(shown) == 1 else None))
                break
    out, at = [], 0
    for start, end, label, part in sorted(spans, key=lambda span: span[:2]):
        shown = text[start:end]
        out += [
            Segment(text[at:start], OTHER, markup=True),
            Segment(shown, label, parts=_of_part(shown, part)),
        ]
        at = end
    return _joined([*out, Segment(text[at:], OTHER, markup=True)])


# -- tokens of the template in texts ---------------------------------------------------------------------------------


def _hostile(chat: _Chat) -> list[str]:
    """Special tokens that stand in a message, and tokens of the template in a tool."""
    messages = json.dumps(messages_of(chat.turns), ensure_ascii=False)
    listed = json.dumps(chat.schemas, ensure_ascii=False)
    special = set(chat.codec.tokenizer.all_special_tokens)
    return [t for t in chat.codec.markup_tokens if t and (t in listed or (t in messages and t in special))]


def _leaks(chat: _Chat, segments: list[Segment], hostile: list[str]) -> bool:
    """Whether one of the tokens stands more often in markup than where the texts are harmless."""

    def clean(text: str) -> str:
        for token in hostile:
            text = text.replace(token, "x")
        return text

    harmless = [
        message_of(
            turn, lambda parts: clean("".join(part.text for part in parts)), lambda text, _: clean(text)
        )
        for turn in chat.turns
    ]
    try:
        text = chat.written(harmless, json.loads(clean(json.dumps(chat.schemas, ensure_ascii=False))))
    except PromptFault:
        return True
    shown = "\n".join(segment.text for segment in segments if segment.markup)
    return any(shown.count(token) > text.count(token) for token in hostile)


# -- what the assistant says -----------------------------------------------------------------------------------------

_OF = "\0"
"""Between a label and the number of the message, while a conversation is placed."""


def _numbered(turns: Turns) -> Turns:
    """The turns, those of the assistant with labels of their own."""
    out: Turns = []
    for index, turn in enumerate(turns):
        if turn.role == "assistant" and turn.label != USER:
            label = f"{turn.label}{_OF}{index}"
            parts = [replace(part, label=label) for part in turn.parts]
            turn = turn._replace(parts=parts, label=label)
        out.append(turn)
    return out


def _with_bodies(chat: _Chat, segments: list[Segment], text: str) -> list[Segment]:
    """The segments, with the label of each turn of the assistant on all that it says, up to the mark that ends it."""
    ends = list(accumulate(len(segment.text) for segment in segments))
    labelled = [
        (segment.label, end - len(segment.text), end)
        for segment, end in zip(segments, ends, strict=True)
        if segment.label != OTHER
    ]
    marks = [mark for token in chat.codec.eos_ids if (mark := chat.codec.decode([token]))]
    bodies: list[tuple[int, int, str]] = []
    for index, turn in enumerate(chat.turns):
        at = [number for number, (label, *_) in enumerate(labelled) if _OF in label and label == turn.label]
        # A template may say the name of a call again where its result begins.
        while len(at) > 1 and any(mark in text[labelled[at[-2]][2] : labelled[at[-1]][1]] for mark in marks):
            (_, *again), names = labelled[at[-1]], [call["name"] for call in turn.calls]
            if text[slice(*again)] not in names:
                break
            at.pop()
        if at:
            before = labelled[at[0] - 1][2] if at[0] else 0
            behind = labelled[at[-1] + 1][1] if at[-1] + 1 < len(labelled) else len(text)
            start = _body_start(chat, index, text, before, labelled[at[0]][1])
            end = _body_end(chat, index, text, labelled[at[-1]][2], behind, marks)
            bodies.append((start, end, turn.label))
    out: list[Segment] = []
    for segment, end in zip(segments, ends, strict=True):
        begin = end - len(segment.text)
        if segment.label != OTHER:
            outside = any(label == segment.label and begin >= stop for _, stop, label in bodies)
            out.append(replace(segment, label=OTHER) if outside else segment)
            continue
        for start, stop, label in bodies:
            if start < end and stop > begin:
                low, high = max(start, begin), min(stop, end)
                out += [Segment(text[begin:low], OTHER, segment.markup)]
                out += [Segment(text[low:high], label, segment.markup)]
                begin = high
        out.append(Segment(text[begin:end], OTHER, segment.markup))
    return [segment for segment in out if segment.text]


def _body_start(chat: _Chat, index: int, text: str, before: int, first: int) -> int:
    """Where a turn of the assistant begins: behind what opens it. `before`: end of what was said before; `first`: where its
    own first text stands."""
    opened = chat.head(chat.turns[:index], open_turn=True)
    if opened is None:
        return first
    bare = opened[: len(opened) - len(last_thought(opened))]
    for head in (opened, bare):
        if text.startswith(head) and before <= len(head) <= first:
            return len(head)
    # Where the beginning is another without what follows, what stands behind the message before is looked for.
    last = "".join(part.text for part in chat.turns[index - 1].parts).strip() if index else ""
    for head in (opened, bare) if last else ():
        behind = head.rpartition(last)[2]
        at = text.find(behind, before, first) if behind != head and behind else -1
        if at >= 0:
            return at + len(behind)
    return first


def _body_end(chat: _Chat, index: int, text: str, last: int, behind: int, marks: Sequence[str]) -> int:
    """Where a turn of the assistant ends: before the mark of its end. `last`: end of its own last text; `behind`: where what
    is said next begins."""
    places = [at for mark in marks if (at := text.find(mark, last, behind)) >= 0]
    if places:
        return min(places)
    closed = (chat.head(chat.turns[: index + 1], open_turn=False) or "").rstrip()
    return len(closed) if last <= len(closed) <= behind and text.startswith(closed) else last


def _unnumbered(segments: list[Segment]) -> list[Segment]:
    return [replace(segment, label=segment.label.partition(_OF)[0]) for segment in segments]
