"""From a task to token ids with labelled spans. The only module that tokenises.

A prompt is built from segments. Template markup may contain special tokens; the text of tasks and tools is
data and is encoded with every special token as plain text, so that it can neither end a turn nor start a
call. Each segment is encoded once, on its own, so its token span is known by construction.

Position 0 is always a token that carries no content (the attention sink): the template's first special
token, else the beginning-of-sequence token. Without one the first content token becomes the sink and what is
read from it is wrong (StreamingLLM, Xiao et al. 2023, section 3).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from probe.tasks import AgentTask, CotTask, Message, PromptingTask, Task, ToolTask, Variant
from probe.tools import Tool

NO_TOOL = "no_tool"
_NO_TOOL_DESCRIPTION = "Only when no other function is related to the request."
# Wording, parameter form and the description of "no tool" were chosen on the dev half of tasks/tools.jsonl
# among 13 renderings (tasks/README.md has the figures); a schema in full costs 1.7 times the tokens and chose
# no better.
TOOL_INSTRUCTION = (
    "You are an expert in choosing functions. From the functions listed below choose the one that fulfils the "
    'request of the user. Answer with a call of that function: <tool_call>[{{"name": ..., "arguments": '
    "{{...}}}}]</tool_call>. If none of the functions can be used, call {no_tool}."
)
_CALL_OPENER = '<tool_call>[{"name": "'
_CALL_TAIL = '", "arguments": {"'
AGENT_INSTRUCTION = (
    "You are an expert in choosing functions. From the functions listed below choose the one that fulfils the "
    'request of the user. Answer with a call of that function: <tool_call>[{{"name": ..., "arguments": '
    "{{...}}}}]</tool_call>. Its result is given to you: then answer the user. If none of the functions can be "
    'used, call {no_tool}. For example, to "What time is it in Rome?" you answer <tool_call>[{{"name": "clock", '
    '"arguments": {{"city": "Rome"}}}}]</tool_call>, you are given 14:05, and you answer "It is 14:05 in Rome."'
)
COT_INSTRUCTION = (
    "Solve the problem step by step. Write each step as one short sentence on its own line. "
    'When you are done, write a last line of the form "Answer: " followed by the answer alone.'
)
ANSWER_CUE = "Answer:"


@dataclass(frozen=True)
class Span:
    """Positions start … end − 1 of the token sequence carry this label."""

    label: str
    start: int
    end: int


@dataclass(frozen=True)
class Segment:
    text: str
    label: str = "other"
    markup: bool = False
    """Template text: its special tokens are special. Data is never markup."""


@dataclass(frozen=True)
class Candidate:
    """One thing that can be said in a slot. `name` None is the listed "no tool"."""

    name: str | None
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class ReplyForm:
    """How the result of a call goes back to the model: markup, the result as data, markup."""

    name: str
    """`tool role`, `user role` (the chat template has no role for tools) or `plain` (there is no template)."""
    before: str
    """From the end of the assistant's turn on, the mark that ends it included."""
    after: str
    """Up to where the assistant's next turn begins."""
    quoted: bool = False
    """Whether the template writes the result as a JSON string."""


@dataclass
class Prompt:
    """What one passage feeds the model. Positions count from 0, special tokens included."""

    passage: str
    text: str
    token_ids: list[int]
    """Prompt and, for teacher-forced reasoning, what is forced after it."""
    n_prompt: int
    spans: list[Span]
    """Disjoint and in order; they cover every position of token_ids."""
    template: dict[str, Any]
    candidates: tuple[Candidate, ...] = ()
    no_tool: str | None = None
    """How "no tool" is scored: `listed` as a candidate, or `complement` of the opener's probability."""
    call_prefix: str | None = None
    call_tail: str | None = None
    """What follows the name in a rendered call."""
    n_opener: int = 0
    """Tokens of call_prefix at the end of the prompt."""
    reply: ReplyForm | None = None
    """For an agent: how results go back."""
    truncation: dict[str, Any] | None = None
    stop_ids: frozenset[int] = frozenset()
    forced_steps: int = 0

    @property
    def labels(self) -> list[str]:
        """Distinct labels in order of first appearance."""
        return list(dict.fromkeys(span.label for span in self.spans))


class Codec:
    """Encodes and decodes with one tokenizer; knows its sink, turn ends and special tokens."""

    def __init__(self, tokenizer, n_ctx: int):
        self.tokenizer, self.n_ctx = tokenizer, n_ctx
        self.special_ids = frozenset(tokenizer.all_special_ids)
        self.has_chat = bool(getattr(tokenizer, "chat_template", None))
        self.markup_tokens = self._find_markup_tokens()
        plain = [token for token in self.markup_tokens if token not in tokenizer.all_special_tokens]
        self._calls = re.compile("|".join(map(re.escape, plain))) if plain else None
        first = self._raw("x", False)
        pieces = tokenizer.convert_ids_to_tokens(first)
        # SentencePiece tokenizers with a dummy prefix would put a space in front of every segment.
        self._dummy_prefix = bool(pieces) and pieces[0].startswith("▁")
        self.sink = self._find_sink()
        self.eos_ids = frozenset(i for i in self._eos() if i is not None)

    def encode(self, text: str, markup: bool = False) -> list[int]:
        """Token ids of one segment, without added tokens; special tokens in data stay text."""
        if not text:
            return []
        if not self._dummy_prefix:
            return self._raw(text, markup)
        anchor = self._raw("\n", markup)
        return self._raw("\n" + text, markup)[len(anchor) :]

    def encode_with_offsets(self, text: str, markup: bool) -> tuple[list[int], list[int]]:
        """Token ids of a segment and the character offset each token reaches."""
        shift = "\n" if self._dummy_prefix else ""
        out = self.tokenizer(
            shift + text,
            add_special_tokens=False,
            split_special_tokens=not markup,
            return_offsets_mapping=True,
        )
        skip = len(self._raw(shift, markup)) if shift else 0
        ends = [end - len(shift) for _, end in out["offset_mapping"]]
        return list(out["input_ids"])[skip:], ends[skip:]

    def decode(self, token_ids: Sequence[int], skip_special: bool = False) -> str:
        return self.tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )

    def completion(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens, without the token that ended the turn."""
        ids = list(token_ids)
        while ids and ids[-1] in self.eos_ids:
            ids.pop()
        return self.decode(ids)

    def token_ends(self, token_ids: Sequence[int]) -> list[int]:
        """For each token, how many characters of the decoded text are complete after it.

        Decoded in windows that restart at line ends, so that the cost stays linear in the length.
        """
        ends: list[int] = []
        base_chars, base = 0, 0
        for index in range(len(token_ids)):
            text = self.decode(token_ids[base : index + 1])
            ends.append(base_chars + len(text))
            if text.endswith("\n") and index - base > 16:
                base_chars, base = ends[-1], index + 1
        return ends

    def _raw(self, text: str, markup: bool) -> list[int]:
        cuts = [m.start() + 1 for m in self._calls.finditer(text)] if self._calls and not markup else []
        ids: list[int] = []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            piece = self.tokenizer(text[start:end], add_special_tokens=False, split_special_tokens=not markup)
            ids += piece["input_ids"]
        return ids

    def _find_markup_tokens(self) -> list[str]:
        """Special tokens, and added ones that the template writes: Qwen's <tool_call> is not marked special."""
        template = str(self.tokenizer.chat_template) if self.has_chat else ""
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if not token.special]
        written = [text for text in added if text.strip() and text in template]
        return [*self.tokenizer.all_special_tokens, *written]

    def _find_sink(self) -> int:
        tokenizer = self.tokenizer
        turn_marker = self.has_chat and tokenizer.bos_token and tokenizer.bos_token in tokenizer.chat_template
        if turn_marker and "<|endoftext|>" in tokenizer.all_special_tokens:
            # SmolLM2's bos opens a turn; between documents it saw <|endoftext|>.
            return int(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
        for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id, *sorted(self.special_ids)):
            if token_id is not None:
                return int(token_id)
        return 0

    def _eos(self) -> set[int | None]:
        """End-of-sequence, and whatever special token closes an assistant's turn in the template."""
        ends: set[int | None] = {self.tokenizer.eos_token_id}
        if self.has_chat:
            mark = "\ue000turn\ue001"
            try:
                text = self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}], tokenize=False
                )
            except Exception:  # a template of somebody else's: any error means there is nothing to learn
                return ends
            after = self._raw(text.partition(mark)[2], True)
            if after and after[0] in self.special_ids:
                ends.add(after[0])
        return ends


# -- rendering ---------------------------------------------------------------------------------------------


def render(task: Task, codec: Codec, *, max_new_tokens: int, reference: bool = False) -> list[Prompt]:
    """The prompts of a task, one a passage. `reference` teacher-forces a cot task's own steps."""
    if isinstance(task, PromptingTask):
        return [_prompting(task, variant, codec, max_new_tokens) for variant in task.variants]
    if isinstance(task, CotTask):
        return [_cot(task, codec, max_new_tokens, reference)]
    assert isinstance(task, ToolTask | AgentTask)
    return [_tools(task, codec, max_new_tokens)]


def _prompting(task: PromptingTask, variant: Variant, codec: Codec, max_new_tokens: int) -> Prompt:
    if isinstance(task.input, str):
        segments = []
        if variant.system:
            segments += [Segment(variant.system, "system"), Segment("\n\n")]
        for number, pair in enumerate(variant.examples, 1):
            segments.append(Segment(f"{pair.input}{pair.output}\n", f"example:{number}"))
        segments.append(Segment(f"{variant.prefix or ''}{task.input}{variant.suffix or ''}", "user"))
        template = {"name": "raw", "fallback": None}
    else:
        segments, template = _chat(codec, _variant_messages(task.input, variant))
    choices = _choices(task.choices or (), segments[-1], codec)
    return _assemble(variant.name, segments, codec, max_new_tokens, template=template, candidates=choices)


def _variant_messages(messages: Sequence[Message], variant: Variant) -> list[tuple[str, list[Segment]]]:
    turns: list[tuple[str, list[Segment]]] = []
    given = [m for m in messages if m.role == "system"]
    system = variant.system or (given[0].content if given else None)
    if system:
        turns.append(("system", [Segment(system, "system")]))
    for number, pair in enumerate(variant.examples, 1):
        turns.append(("user", [Segment(pair.input, f"example:{number}")]))
        turns.append(("assistant", [Segment(pair.output, f"example:{number}")]))
    rest = [m for m in messages if m.role != "system"]
    last_user = max((i for i, m in enumerate(rest) if m.role == "user"), default=-1)
    for index, message in enumerate(rest):
        text = message.content
        if index == last_user:
            text = f"{variant.prefix or ''}{text}{variant.suffix or ''}"
        turns.append((message.role, [Segment(text, "user")]))
    return turns


def _choices(choices: Sequence[str], last: Segment, codec: Codec) -> tuple[Candidate, ...]:
    """Each choice tokenised jointly with the segment before it; on its own where that would change it."""
    before = codec.encode(last.text, last.markup)
    found = []
    for choice in choices:
        joint = codec.encode(last.text + choice, last.markup)
        ids = joint[len(before) :] if joint[: len(before)] == before else codec.encode(choice)
        found.append(Candidate(choice, tuple(ids)))
    return tuple(found)


def _cot(task: CotTask, codec: Codec, max_new_tokens: int, reference: bool) -> Prompt:
    system = [("system", [Segment(COT_INSTRUCTION, "system")])]
    segments, template = _chat(codec, [*system, ("user", [Segment(task.question, "question")])])
    forced: list[Segment] = []
    if reference and task.steps:
        forced = [Segment(f"{step}\n", f"step:{n}") for n, step in enumerate(task.steps, 1)]
        forced.append(Segment(ANSWER_CUE))
    return _assemble("main", segments, codec, max_new_tokens, template=template, forced=forced)


def _tools(task: ToolTask | AgentTask, codec: Codec, max_new_tokens: int) -> Prompt:
    turns = [
        (m.role, [Segment(m.content, "system" if m.role == "system" else "user")]) for m in task.messages
    ]
    aware = _aware(codec, turns, task.tools) if codec.has_chat and len(task.tools) else None
    if isinstance(aware, tuple):
        segments, opener, tail = aware
        template: dict[str, Any] = {"name": "chat with tools", "fallback": None}
        names: list[str | None] = [tool.name for tool in task.tools]
        no_tool = "complement"
        spoken = [tool.name for tool in task.tools]
    else:
        spoken_no_tool = _free_name(task.tools)
        instruction = AGENT_INSTRUCTION if isinstance(task, AgentTask) else TOOL_INSTRUCTION
        segments, template = _chat(codec, _listed_turns(turns, task.tools, spoken_no_tool, instruction))
        reason = "no chat template" if not codec.has_chat else "the chat template does not show the tools"
        template = {**template, "fallback": template["fallback"] or reason, "no_tool_name": spoken_no_tool}
        opener, tail = _CALL_OPENER, _CALL_TAIL
        names, spoken = (
            [*(tool.name for tool in task.tools), None],
            [*(t.name for t in task.tools), spoken_no_tool],
        )
        no_tool = "listed"
    candidates = tuple(
        Candidate(name, _candidate_ids(codec, opener, text, tail))
        for name, text in zip(names, spoken, strict=True)
    )
    # An agent writes its calls itself; a tool_selection prompt ends in the slot for the name.
    slot = [Segment(opener, "other", markup=True)] if isinstance(task, ToolTask) else []
    n_opener = len(codec.encode(opener, True))
    # Where an agent makes no call, the opener and a name are attached behind the prompt.
    attached = 0 if slot else n_opener + max(len(candidate.token_ids) for candidate in candidates)
    spare = max(max_new_tokens, attached)
    prompt = _assemble("main", [*segments, *slot], codec, spare, template=template, candidates=candidates)
    prompt.no_tool, prompt.call_prefix, prompt.call_tail = no_tool, opener, tail
    prompt.n_opener = n_opener if slot else 0
    if isinstance(task, AgentTask):
        prompt.reply = _reply_form(codec)
        template["reply"] = prompt.reply.name
    return prompt


def candidates_at(prompt: Prompt, codec: Codec, before: str, lead: str) -> tuple[Candidate, ...]:
    """The prompt's candidates in a slot of generated text: after `before`, beginning with `lead`.

    `lead` is not empty where a token reaches over the border to the name. Tokenised jointly with `before`; a
    name that no quotation mark opens is taken to be followed by a parenthesis.
    """
    if (before, lead) == (prompt.call_prefix, ""):
        return prompt.candidates
    tail = prompt.call_tail if (before + lead).endswith('"') else "("
    spoken = prompt.template.get("no_tool_name")
    return tuple(
        Candidate(
            name, _candidate_ids(codec, before, f"{lead}{spoken if name is None else name}", tail or '"')
        )
        for name in (candidate.name for candidate in prompt.candidates)
    )


def _candidate_ids(codec: Codec, opener: str, name: str, tail: str) -> tuple[int, ...]:
    """Tokens of NAME in the call, tokenised jointly with the opener, up to the first that passes the name.

    With the closing token included no name is a prefix of another.
    """
    before = codec.encode(opener, True)
    ids, ends = codec.encode_with_offsets(opener + name + tail, True)
    limit = len(opener) + len(name)
    if ids[: len(before)] != before:  # the opener's last token would merge with the name: encode them apart
        ids, ends = codec.encode_with_offsets(name + tail, False)
        ids, ends, limit = [*before, *ids], [0] * len(before) + ends, len(name)
    stop = next(i for i in range(len(before), len(ids)) if ends[i] > limit)
    return tuple(ids[len(before) : stop + 1])


def _free_name(tools: Sequence[Tool]) -> str:
    name = NO_TOOL
    while any(tool.name == name for tool in tools):
        name += "_here"
    return name


def _listed_turns(
    turns, tools: Sequence[Tool], no_tool: str, instruction: str
) -> list[tuple[str, list[Segment]]]:
    """The plain fallback: the system message lists one JSON object a tool, "no tool" last."""
    listing = [Segment(instruction.format(no_tool=no_tool) + "\n<tools>\n", "system")]
    for tool in tools:
        listing += [Segment(_tool_json(tool), f"tool:{tool.name}"), Segment("\n", "system")]
    nothing = Tool(
        name=no_tool, description=_NO_TOOL_DESCRIPTION, parameters={"type": "object", "properties": {}}
    )
    listing += [Segment(_tool_json(nothing) + "\n</tools>", "system")]
    own = [segment for role, parts in turns if role == "system" for segment in parts]
    if own:
        listing = [*own, Segment("\n\n", "system"), *listing]
    return [("system", listing), *((role, parts) for role, parts in turns if role != "system")]


def _tool_json(tool: Tool) -> str:
    """One line a tool: name, description, and what each parameter is."""
    fields = tool.parameters.get("properties", {})
    parameters = {name: _gist(schema) for name, schema in fields.items()}
    shown = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return json.dumps(shown, ensure_ascii=False)


def _gist(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return ""
    said = schema.get("description") or schema.get("type", "")
    if options := schema.get("enum"):
        return f"{said} (one of: {', '.join(map(str, options))})"
    return said


def chat_prompt(text: str, codec: Codec, max_new_tokens: int) -> Prompt:
    """One message of a user through the model's chat template, outside of any task."""
    segments, template = _chat(codec, [("user", [Segment(text, "user")])])
    return _assemble("main", segments, codec, max_new_tokens, template=template)


def prompt_of(content: str | Sequence[Segment], codec: Codec, max_new_tokens: int) -> Prompt:
    """A prompt from plain text (label `user`) or labelled segments, outside of any task."""
    segments = [Segment(content, "user")] if isinstance(content, str) else list(content)
    return _assemble("main", segments, codec, max_new_tokens, template={"name": "raw", "fallback": None})


def candidates_after(
    content: str | Sequence[Segment] | Prompt, continuations: Sequence[str], codec: Codec
) -> list[tuple[int, ...]]:
    """Token ids of texts that follow a prompt, tokenised jointly with its last segment where it is known."""
    if isinstance(content, Prompt):
        last = Segment("")
    else:
        last = Segment(content) if isinstance(content, str) else content[-1]
    return [tuple(candidate.token_ids) for candidate in _choices(continuations, last, codec)]


def continued(
    prompt: Prompt, codec: Codec, said: Sequence[str | Sequence[int]], *, opener: bool
) -> Prompt | None:
    """The prompt of a tool task with something said before the call; None where that passes the context.

    `said` are texts (data) and token ids as they were generated; `opener` puts the call opener behind them.
    """
    token_ids = prompt.token_ids[: prompt.n_prompt - prompt.n_opener]
    for part in said:
        token_ids = [*token_ids, *(codec.encode(part) if isinstance(part, str) else part)]
    spans = [span for span in prompt.spans if span.end <= prompt.n_prompt - prompt.n_opener]
    behind = codec.encode(prompt.call_prefix or "", True) if opener else []
    start = spans[-1].end if spans else 0
    token_ids = [*token_ids, *behind]
    room = max([1, *(len(candidate.token_ids) for candidate in prompt.candidates)])
    if len(token_ids) + room > codec.n_ctx:
        return None
    return replace(
        prompt,
        text=codec.decode(token_ids),
        token_ids=token_ids,
        n_prompt=len(token_ids),
        n_opener=len(behind),
        spans=[*spans, Span("other", start, len(token_ids))],
    )


def words_of(prompt: Prompt, codec: Codec, span: Span, text: str) -> list[tuple[str, int, int]]:
    """(word, start, end) of each word of a text that stands in a span, with the positions that carry it.

    The text may be spelled as in JSON. Empty where it does not stand there as a whole. A token that carries the
    end of one word and the beginning of the next belongs to both.
    """
    ids = prompt.token_ids[span.start : span.end]
    shown, ends = codec.decode(ids), codec.token_ends(ids)
    spellings = [text, *(json.dumps(text, ensure_ascii=a)[1:-1] for a in (False, True))]
    first = next((at for at in map(shown.find, spellings) if at >= 0), None)
    length = next((len(spelling) for spelling in spellings if spelling in shown), 0)
    if first is None:
        return []
    words = []
    for word in re.finditer(r"\S+", shown[first : first + length]):
        low, high = first + word.start(), first + word.end()
        carriers = [
            index
            for index, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
            if begin < high and end > low
        ]
        if carriers:
            words.append((word.group(), span.start + carriers[0], span.start + carriers[-1] + 1))
    return words


# -- chat templates ------------------------------------------------------------------------------------------


def _mark(index: int) -> str:
    return f"\ue000{index}\ue001"


def _chat(codec: Codec, turns: list[tuple[str, list[Segment]]]) -> tuple[list[Segment], dict[str, Any]]:
    """Segments of a conversation up to the assistant's turn, and how they were rendered."""
    if codec.has_chat:
        for candidate, note in (
            (turns, None),
            (_without_system(turns), "system text put in the user's turn"),
        ):
            segments = _through_template(codec, candidate, None) if candidate else None
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


def _through_template(codec: Codec, turns, tools: list[dict] | None) -> list[Segment] | None:
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
        segments += [Segment(before, "other", markup=True), *parts]
    segments.append(Segment(rest, "other", markup=True))
    segments = [segment for segment in segments if segment.text]
    if "".join(segment.text for segment in segments) == expected:
        return segments
    stripped = _strip_contents(turns)
    return None if stripped is None else _through_template(codec, stripped, tools)


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


def _aware(codec: Codec, turns, tools: Sequence[Tool]) -> tuple[list[Segment], str, str] | None:
    """Segments, call opener and call tail through a template that shows every tool; None if it does not."""
    schemas = [
        {
            "type": "function",
            "function": {"name": t.name, "description": t.description, "parameters": t.parameters},
        }
        for t in tools
    ]
    segments = _through_template(codec, turns, schemas)
    if segments is None:
        return None
    text = "".join(segment.text for segment in segments if segment.markup)
    if not all(tool.name in text for tool in tools):
        return None
    call = _call_format(codec, turns, schemas)
    split = _split_tools(segments, tools, schemas)
    if call is None or split is None or _leaks(codec, turns, tools, schemas, split):
        return None
    return split, *call


def _leaks(codec: Codec, turns, tools: Sequence[Tool], schemas, split: list[Segment]) -> bool:
    """Whether a special token in a tool's text stands outside of the tool's JSON, where it would be one."""
    text = json.dumps(schemas, ensure_ascii=False)
    for token in codec.markup_tokens:
        text = text.replace(token, "x")
    harmless = json.loads(text)
    if harmless == schemas:
        return False
    segments = _through_template(codec, turns, harmless)
    again = None if segments is None else _split_tools(segments, tools, harmless)
    return again is None or [s.text for s in again if s.markup] != [s.text for s in split if s.markup]


def _call_format(codec: Codec, turns, schemas) -> tuple[str, str] | None:
    """What the template writes before and after the name when the assistant calls a function."""
    name = "\ue000name\ue001"
    call = {"type": "function", "function": {"name": name, "arguments": {}}}
    user = [{"role": "user", "content": "x"}]
    asked = [*user, {"role": "assistant", "content": "", "tool_calls": [call]}]
    try:
        head = codec.tokenizer.apply_chat_template(
            user, tools=schemas, tokenize=False, add_generation_prompt=True
        )
        full = codec.tokenizer.apply_chat_template(asked, tools=schemas, tokenize=False)
    except Exception:  # the template has no way to write a call
        return None
    if not full.startswith(head):
        return None
    opener, found, tail = full[len(head) :].partition(name)
    return (opener, tail) if found and opener and tail else None


def _split_tools(segments: list[Segment], tools: Sequence[Tool], schemas) -> list[Segment] | None:
    """Cut each tool's JSON out of the template's text as a labelled data segment."""
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
            out += [Segment(before, "other", markup=True), Segment(shown, f"tool:{tool.name}")]
            pending.pop(0)
        out.append(Segment(rest, "other", markup=True))
    return None if pending else [segment for segment in out if segment.text]


def _spellings(schema: dict) -> list[str]:
    forms = [schema, schema["function"]]
    return [
        json.dumps(form, ensure_ascii=a, indent=i)
        for form in forms
        for i in (None, 4, 2)
        for a in (False, True)
    ]


# -- results of calls ------------------------------------------------------------------------------------------


def _reply_form(codec: Codec) -> ReplyForm:
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


_SAID, _TOLD = "\ue000said\ue001", "\ue000told\ue001"
_AWKWARD = 'a "b"\nc'


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


# -- assembling ----------------------------------------------------------------------------------------------


def _assemble(
    passage: str,
    segments: list[Segment],
    codec: Codec,
    max_new_tokens: int,
    *,
    template: dict[str, Any],
    candidates: tuple[Candidate, ...] = (),
    forced: Sequence[Segment] = (),
) -> Prompt:
    token_ids: list[int] = []
    spans: list[Span] = []
    first = codec.encode(segments[0].text, segments[0].markup)
    if not first or first[0] not in codec.special_ids:
        segments = [Segment(codec.decode([codec.sink]), "bos", markup=True), *segments]
    n_prompt = 0
    for index, segment in enumerate([*segments, *forced]):
        if index == len(segments):
            n_prompt = len(token_ids)
        ids = codec.encode(segment.text, segment.markup)
        if ids:
            _extend(spans, segment.label, len(token_ids), len(token_ids) + len(ids))
            token_ids += ids
    n_prompt = n_prompt or len(token_ids)
    spans = _sink_first(spans)
    prompt = Prompt(
        passage=passage,
        text="".join(segment.text for segment in segments),
        token_ids=token_ids,
        n_prompt=n_prompt,
        spans=spans,
        template=template,
        candidates=candidates,
        stop_ids=codec.eos_ids,
        forced_steps=sum(segment.label.startswith("step:") for segment in forced),
    )
    _fit(prompt, codec, max_new_tokens)
    return prompt


def _extend(spans: list[Span], label: str, start: int, end: int) -> None:
    if spans and spans[-1].label == label and spans[-1].end == start:
        spans[-1] = Span(label, spans[-1].start, end)
    else:
        spans.append(Span(label, start, end))


def _sink_first(spans: list[Span]) -> list[Span]:
    head = spans[0]
    rest = [Span(head.label, 1, head.end)] if head.end > 1 else []
    return [Span("bos", 0, 1), *rest, *spans[1:]]


def _fit(prompt: Prompt, codec: Codec, max_new_tokens: int) -> None:
    """Shorten a prompt that does not fit: position 0 and the end are kept, what follows position 0 goes."""
    spare = max([max_new_tokens, *(len(candidate.token_ids) for candidate in prompt.candidates)])
    room = codec.n_ctx - max(1, min(spare, codec.n_ctx // 2))
    excess = len(prompt.token_ids) - room
    if excess <= 0:
        return
    if prompt.n_prompt - 1 - excess < 1:
        excess = prompt.n_prompt - 2  # teacher-forced reasoning longer than the context is cut below
    cut = 1 + excess
    spans = [Span("bos", 0, 1)]
    for span in prompt.spans[1:]:
        if span.end > cut:
            spans.append(Span(span.label, max(span.start, cut) - excess, span.end - excess))
    kept = [prompt.token_ids[0], *prompt.token_ids[cut:]]
    prompt.token_ids = kept[: codec.n_ctx]
    limit = len(prompt.token_ids)
    prompt.spans = [Span(s.label, s.start, min(s.end, limit)) for s in spans if s.start < limit]
    prompt.n_prompt -= excess
    prompt.text = codec.decode(prompt.token_ids[: prompt.n_prompt])
    rule = "the tokens after position 0 were dropped, the end of the prompt is kept"
    prompt.truncation = {"rule": rule, "tokens_dropped": excess, "n_ctx": codec.n_ctx}
    if len(kept) > limit:
        prompt.truncation["forced_tokens_dropped"] = len(kept) - limit


# -- reading completions ---------------------------------------------------------------------------------------

# What leads up to it ("So the", "**") belongs to the cue: alone it would be counted as a step.
_CUE = re.compile(
    r"(?i)(?:\b(?:so|thus|hence|therefore),? )?[*#]*\s*(?:\bthe )?\b(?:final )?answer(?: is)?\s*(?::|=| is\b)\s*\**\s*"
)
# Behind it: a capital, a figure, a quote or bracket, an amount, markup, or "x = ".
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[A-Z0-9\"'(*\\]|\$|[a-z] ?[=+*/-])")
# The full stop after the number of a list ("1. Do this"), a title, a month or a letter in front ends no sentence.
_NO_END = re.compile(
    r"(?:^\s*\d+\.|^\s*[A-Z]\.|(?<!\w)(?:Mr|Mrs|Ms|Dr|Prof|St|Fig|Eq|vs|approx|e\.g|i\.e|cf"
    r"|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\.)\s*$"
)


def announces_answer(text: str) -> bool:
    """Whether generated reasoning has said that the answer follows ("Answer:", "the answer is")."""
    return _CUE.search(text) is not None


def split_steps(text: str) -> list[tuple[int, int]]:
    """Character ranges of the reasoning steps: lines, and within a line its sentences.

    A range reaches up to the next step, white space included, so the ranges cover the text.
    """
    starts: list[int] = []
    offset = 0
    for line in text.splitlines(keepends=True):
        if line.strip():
            starts.append(offset)
            for cut in (m.end() for m in _SENTENCE_END.finditer(line.rstrip())):
                if not _NO_END.search(line[starts[-1] - offset : cut]):
                    starts.append(offset + cut)
        offset += len(line)
    if not starts:
        return []
    starts[0] = 0
    return list(zip(starts, [*starts[1:], len(text)], strict=True))


def label_completion(
    prompt: Prompt, codec: Codec, new_ids: Sequence[int], *, cot: bool, answer_at: int | None
) -> tuple[list[Span], dict[str, Any]]:
    """Spans of everything after the prompt, and the steps and answer read from it.

    `answer_at` is the index in new_ids of the first answer token of a cot task. A token that straddles a
    border belongs to the span in which it begins.
    """
    start, total = prompt.n_prompt, prompt.n_prompt + len(new_ids)
    if not cot:
        return ([Span("answer", start, total)] if new_ids else []), {}
    spans = [span for span in prompt.spans if span.start >= start and span.label.startswith("step:")]
    if spans:
        steps = [codec.decode(new_ids[span.start - start : span.end - start]) for span in spans]
        reasoning_end = spans[-1].end - start
    else:
        text = codec.decode(new_ids)
        cue = _CUE.search(text)
        ranges = split_steps(text[: cue.start() if cue else len(text)])
        steps = [text[a:b] for a, b in ranges]
        begins = [0, *codec.token_ends(new_ids)][: len(new_ids)]
        limit = cue.start() if cue else len(text)
        reasoning_end = next((i for i, begin in enumerate(begins) if begin >= limit), len(new_ids))
        number = 0
        for index in range(reasoning_end):
            while number + 1 < len(ranges) and begins[index] >= ranges[number + 1][0]:
                number += 1
            _extend(spans, f"step:{number + 1}" if ranges else "other", start + index, start + index + 1)
    answer_from = len(new_ids) if answer_at is None else answer_at
    if answer_from > reasoning_end:
        _extend(spans, "other", start + reasoning_end, start + answer_from)
    found: dict[str, Any] = {"steps": [step.strip() for step in steps], "answer": None}
    if answer_from < len(new_ids):
        _extend(spans, "answer", start + max(answer_from, reasoning_end), total)
        found["answer"] = codec.completion(new_ids[answer_from:]).strip().partition("\n")[0].strip()
    return spans, found
