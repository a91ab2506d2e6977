"""Task files: what one line may say, reading them with every mistake placed, warnings, and selection."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from probe.errors import BadInput, UsageError
from probe.jsontext import (
    Check,
    JsonFile,
    Spot,
    check_distinct,
    check_fields,
    check_list,
    check_object,
    check_string,
    check_text,
    check_type,
    kind_of,
    nearest,
    printable,
    quoted,
)
from probe.tools.definitions import Tool, catalogue_files, check_tool

ROLES = ("system", "user", "assistant", "tool")
COMMON_FIELDS = ("id", "kind", "metadata")


class Message(msgspec.Struct, frozen=True):
    """One turn of a chat."""

    role: str
    """One of `ROLES`."""
    content: str


class Pair(msgspec.Struct, frozen=True):
    """One worked example of a prompting variant."""

    input: str
    output: str


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """One way to prompt; all fields but the name absent is the reference, `base`."""

    name: str
    """1 to 64 of the characters A-Z a-z 0-9 _ . -: it prefixes names of tensors."""
    system: str | None = None
    examples: tuple[Pair, ...] = ()
    prefix: str | None = None
    suffix: str | None = None
    labels: Mapping[str, str] = {}
    """Choice → the text that stands for it under this variant, in examples and when it is scored."""


class _Common(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    id: str
    metadata: dict[str, Any] | None = None
    raw: dict[str, Any] = {}
    """The object as in the file."""
    line: int = 0
    """1-based line of the file; 0 for a task made in code."""

    @property
    def kind(self) -> str:
        return str(self.__struct_config__.tag)


class PromptingTask(_Common, frozen=True, kw_only=True, tag="prompting"):
    """One input under several prompts."""

    input: str | tuple[Message, ...]
    """A string is rendered raw; messages go through the chat template."""
    variants: tuple[Variant, ...] = (Variant(name="base"),)
    """`base` is always among them."""
    choices: tuple[str, ...] | None = None
    target: str | None = None
    """One of `choices`."""


class _ToolChoice(_Common, frozen=True, kw_only=True):
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    """In shown order."""
    target: str | tuple[str, ...] | None = None
    intentions: tuple[str, ...] | None = None
    """What may be intended before a tool is chosen, where the task lists it."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the acceptable tools; empty where no tool is to be called, or no target is given."""
        return (self.target,) if isinstance(self.target, str) else self.target or ()


class ToolTask(_ToolChoice, frozen=True, kw_only=True, tag="tool_selection"):
    """One choice among the shown tools and no tool."""


class AgentTask(_ToolChoice, frozen=True, kw_only=True, tag="agent"):
    """A transcript with tool calls, up to an answer."""

    answer: str | float | int | None = None
    max_turns: int = 8

    @property
    def has_target(self) -> bool:
        """Whether the file gives a target: null (no tool) is one, an absent field is none."""
        return self.target is not None or "target" in self.raw


class CotTask(_Common, frozen=True, kw_only=True, tag="cot"):
    """A question to reason about."""

    question: str
    answer: str | float | int | None = None
    steps: tuple[str, ...] | None = None
    """Reference reasoning."""


Task = PromptingTask | ToolTask | AgentTask | CotTask


class TaskFile(msgspec.Struct, frozen=True, kw_only=True):
    """A task file that has been read and found right."""

    path: str
    """As given."""
    sha256: str
    """Of the file's bytes, in hexadecimal."""
    tasks: tuple[Task, ...]


# --- checking one task ---


def _check_role(value: Any, spot: Spot) -> Any:
    if check_type(value, str, spot) and value not in ROLES:
        spot.fault(f"unknown role {quoted(value)}", f"write one of {', '.join(ROLES)}")
    return value


def _check_message(value: Any, spot: Spot) -> Message:
    found = check_fields(value, spot, _MESSAGE, _MESSAGE)
    return Message(found.get("role", ""), found.get("content", ""))


def check_messages(value: Any, spot: Spot) -> tuple[Message, ...]:
    """A list of at least one `{role, content}`."""
    return check_list(value, spot, _check_message)


def _check_input(value: Any, spot: Spot) -> Any:
    if isinstance(value, list):
        return check_messages(value, spot)
    if isinstance(value, str):
        return check_text(value, spot)
    fix = "write the text, or messages with role and content"
    spot.fault(f"must be a string or a list of messages, is {kind_of(value)}", fix)


def _check_pair(value: Any, spot: Spot) -> Pair:
    found = check_fields(value, spot, _PAIR, _PAIR)
    return Pair(found.get("input", ""), found.get("output", ""))


def _check_examples(value: Any, spot: Spot) -> tuple[Pair, ...]:
    return check_list(value, spot, _check_pair, at_least=0)


def _check_variant_name(value: Any, spot: Spot) -> Any:
    # "." and ".." would turn the prefix of a tensor's name into a step through directories.
    if check_type(value, str, spot) and not re.fullmatch(r"(?!\.{1,2}\Z)[A-Za-z0-9_.-]{1,64}", value):
        spot.fault(
            f"{quoted(value)} cannot name a variant", "use 1 to 64 of the characters A-Z a-z 0-9 _ . -"
        )
    return value


def _check_labels(value: Any, spot: Spot) -> Any:
    if check_type(value, dict, spot):
        for choice, label in value.items():
            check_text(label, spot[choice])
    return value


def _check_variant(value: Any, spot: Spot) -> Variant:
    found = check_fields(value, spot, _VARIANT, ["name"])
    if found.get("name") == "base" and any(found[name] for name in found if name != "name"):
        spot.fault('"base" is the reference, which adds nothing', "give this variant another name")
    return Variant(**{"name": "", **found})


def _check_variants(value: Any, spot: Spot) -> tuple[Variant, ...]:
    variants = check_list(value, spot, _check_variant, at_least=0)
    names = [variant.name or None for variant in variants]
    check_distinct(names, spot, "names two variants", "rename one", under="name")
    return variants if "base" in names else (Variant(name="base"), *variants)


def _check_choices(value: Any, spot: Spot) -> tuple[str, ...]:
    choices = check_list(value, spot, check_text)
    check_distinct(choices, spot, "is listed twice", "keep one")
    return choices


def _check_target(value: Any, spot: Spot) -> Any:
    if value is None or isinstance(value, str):
        return value
    if value == []:
        spot.fault("is an empty list", "write null for no tool")
    elif isinstance(value, list):
        return _check_choices(value, spot)
    else:
        what = f"must be a tool's name, a list of names or null, is {kind_of(value)}"
        spot.fault(what, "write the name, or null for no tool")


def _check_answer(value: Any, spot: Spot) -> Any:
    if isinstance(value, str):
        return check_text(value, spot)
    if isinstance(value, bool) or not isinstance(value, int | float):
        what = f"must be a string or a number, is {kind_of(value)}"
        spot.fault(what, "write the answer to reach, or leave the field out")
    return value


def _check_turns(value: Any, spot: Spot) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        spot.fault(f"must be a whole number above 0, is {quoted(value)}", "write how many turns at most")
    return value


def _check_steps(value: Any, spot: Spot) -> tuple[str, ...]:
    return check_list(value, spot, check_text)


def _check_intentions(value: Any, spot: Spot) -> tuple[str, ...]:
    intentions = _check_choices(value, spot)
    if not intentions:
        spot.fault("is an empty list", "list what may be intended, or leave the field out")
    return intentions


Runnable = Callable[[], Mapping[str, Tool]]
"""Definitions of tools that can be run, by name."""


class _ToolsShown:
    """Checks `tools`: a list of definitions and of names from the catalogue."""

    def __init__(self, catalogue: Mapping[str, Tool] | None, runnable: Runnable | None = None):
        self.catalogue = catalogue or {}
        self._runnable = runnable

    def __call__(self, value: Any, spot: Spot) -> tuple[Tool | str | None, ...]:
        """In shown order. A name that is not in the catalogue stays: targets are still compared to it."""
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


_MESSAGE: dict[str, Check] = {"role": _check_role, "content": check_string}
_PAIR: dict[str, Check] = {"input": check_string, "output": check_string}
_VARIANT: dict[str, Check] = {
    "name": _check_variant_name,
    "system": check_string,
    "examples": _check_examples,
    "prefix": check_string,
    "suffix": check_string,
    "labels": _check_labels,
}


class _Kind(NamedTuple):
    struct: type[PromptingTask] | type[ToolTask] | type[AgentTask] | type[CotTask]
    fields: dict[str, Check]
    required: tuple[str, ...]


def _kinds(catalogue: Mapping[str, Tool] | None, runnable: Runnable | None = None) -> dict[str, _Kind]:
    """What a line of each kind may hold, with tool names looked up in `catalogue`, an agent's in `runnable` too."""
    common: dict[str, Check] = {"id": check_text, "kind": check_string, "metadata": check_object}
    prompting: dict[str, Check] = {"input": _check_input, "variants": _check_variants}
    prompting |= {"choices": _check_choices, "target": check_string}
    choice: dict[str, Check] = {"messages": check_messages, "input": check_text}
    choice |= {"tools": _ToolsShown(catalogue), "target": _check_target, "intentions": _check_intentions}
    agent: dict[str, Check] = {**choice, "answer": _check_answer, "max_turns": _check_turns}
    agent["tools"] = _ToolsShown(catalogue, runnable)
    cot: dict[str, Check] = {"question": check_text, "answer": _check_answer, "steps": _check_steps}
    return {
        "prompting": _Kind(PromptingTask, common | prompting, ("id", "kind", "input", "variants")),
        "tool_selection": _Kind(ToolTask, common | choice, ("id", "kind", "tools", "target")),
        "agent": _Kind(AgentTask, common | agent, ("id", "kind", "tools")),
        "cot": _Kind(CotTask, common | cot, ("id", "kind", "question")),
    }


def _check_task(value: dict[str, Any], line: int, kinds: Mapping[str, _Kind], spot: Spot) -> Task | None:
    name = value.get("kind")
    kind = kinds.get(name) if isinstance(name, str) else None
    if kind is None:
        if isinstance(name, str):
            fix = f"the nearest kind is {quoted(nearest(name, tuple(kinds)))}"
            spot["kind"].fault(f"unknown kind {quoted(name)}", fix)
        # Which other fields belong here depends on the kind, so only those that every kind has are checked.
        common = {field: check for field, check in kinds["cot"].fields.items() if field in COMMON_FIELDS}
        check_fields(
            {field: value[field] for field in common if field in value}, spot, common, ("id", "kind")
        )
        return None
    found = check_fields(value, spot, kind.fields, kind.required)
    if kind.struct is PromptingTask:
        _compare_choices(found, spot)
        _compare_labels(found, spot)
    elif kind.struct is not CotTask:
        _compare_tools(found, spot)
        if isinstance(text := found.pop("input", None), str):
            found["messages"] = (Message("user", text),)
    found.pop("kind", None)
    return None if spot.faults else kind.struct(**found, raw=value, line=line)


def _compare_choices(found: Mapping[str, Any], spot: Spot) -> None:
    target, choices = found.get("target"), found.get("choices")
    if not isinstance(target, str):
        return
    if choices is None:
        spot["target"].fault("there are no choices that it could be one of", 'add "choices", or leave it out')
    elif target not in choices and (texts := tuple(text for text in choices if isinstance(text, str))):
        fix = f"the nearest is {quoted(nearest(target, texts))}"
        spot["target"].fault(f"{quoted(target)} is not one of the choices", fix)


def _compare_labels(found: Mapping[str, Any], spot: Spot) -> None:
    """Labels stand for choices, each for one. `base` may have been put first without being in the file."""
    choices = tuple(text for text in found.get("choices") or () if isinstance(text, str))
    for variant in found.get("variants") or ():
        labels = variant.labels if isinstance(variant.labels, dict) else {}
        for choice in labels:
            if choice not in choices:
                fix = f"the nearest is {quoted(nearest(choice, choices))}" if choices else 'add "choices"'
                spot["variants"].fault(f"{variant.name} labels {quoted(choice)}, which is no choice", fix)
        said = [labels.get(choice, choice) for choice in choices]
        if labels and len({str(text) for text in said}) < len(said):
            spot["variants"].fault(
                f"{variant.name} says two choices with one text", "give each a label of its own"
            )


def _compare_tools(found: Mapping[str, Any], spot: Spot) -> None:
    if "messages" in found and "input" in found:
        spot["input"].fault('given beside "messages"', "keep one of the two", at_key=True)
    elif "messages" not in found and "input" not in found:
        spot["messages"].fault("missing", 'add "messages" or "input"')
    shown = tuple(map(_name_of, found.get("tools", ())))
    target = found.get("target")
    if not shown or None in shown:
        return
    for index, name in enumerate(target if isinstance(target, tuple) else (target,)):
        if isinstance(name, str) and name not in shown:
            fix = f"the nearest shown is {quoted(nearest(name, shown))}; null means no tool"
            entry = spot["target"][index] if isinstance(target, tuple) else spot["target"]
            entry.fault(f"tool {quoted(name)} is not shown", fix)


# --- reading a file ---


def read_tasks(path: Path, catalogue: dict[str, Tool] | None, runnable: Runnable | None = None) -> TaskFile:
    """Read and check a task file; names in `tools` are looked up in `catalogue`.

    An agent task may also name what `runnable()` gives, where the catalogue has no such name.

    Raises BadInput with every mistake of every line, and nothing else whatever the bytes.
    """
    source = JsonFile(Path(path))
    kinds = _kinds(catalogue, runnable)
    first_lines: dict[str, int] = {}
    tasks: list[Task] = []
    for line, value in source.objects():
        spot = Spot([])
        task = _check_task(value, line, kinds, spot)
        name = value.get("id")
        if isinstance(name, str) and first_lines.setdefault(name, line) != line:
            what = f"{quoted(name)} is the id of line {first_lines[name]} already"
            spot["id"].fault(what, "give every task its own id")
        if task and not spot.faults:
            tasks.append(task)
        source.report(spot.faults)
    if not tasks and not source.problems:
        source.add(1, 1, "file: has no task: write one JSON object a line")
    if source.problems:
        raise BadInput(source.problems)
    return TaskFile(path=str(path), sha256=source.sha256, tasks=tuple(tasks))


def find_catalogue(task_file: Path, given: Path | None) -> Path | None:
    """The catalogue of a task file: the one given, else `../tools` from its folder, else `./tools`, or None.

    A default counts only where it holds a `.json` or `.jsonl` file.
    """
    if given is not None:
        return given
    beside = Path(os.path.normpath(Path(task_file).parent / ".." / "tools"))
    return next((path for path in (beside, Path("tools")) if catalogue_files(path)), None)


def select(tasks: Sequence[Task], limit: str | None, ids: Sequence[str]) -> tuple[Task, ...]:
    """The tasks with the given ids (all where none is given), then of those the part that `limit` names.

    `limit` is "N", the first N, or "A-B", 1-based and inclusive; file order is kept.
    Raises UsageError for an unknown id, and for a limit that is neither or starts after the last task.
    """
    known = {task.id: task for task in tasks}
    wanted = dict.fromkeys(ids)
    if unknown := [name for name in wanted if name not in known]:
        pairs = ((quoted(name), quoted(nearest(name, tuple(known)))) for name in unknown)
        raise UsageError(
            "\n".join(f"--task-id: no task {name}: the nearest id is {near}" for name, near in pairs)
        )
    chosen = tuple(task for task in tasks if not wanted or task.id in wanted)
    if limit is None:
        return chosen
    match = re.fullmatch(r"(?:([0-9]{1,18})-)?([0-9]{1,18})", limit)
    first, last = (int(match[1] or 1), int(match[2])) if match else (0, 0)
    if not 1 <= first <= last:
        raise UsageError(f"--limit: {quoted(limit)} is no number or range: write 10 (the first ten) or 11-20")
    if first > len(chosen):
        raise UsageError(f"--limit: {quoted(limit)} starts after the last task: there are {len(chosen)}")
    return chosen[first - 1 : last]


# --- warnings ---


def lint(file: TaskFile) -> list[str]:
    """What is allowed but may spoil a result: `FILE:LINE: ID: what`, then `FILE: what` about all of it."""
    path = printable(file.path, 4096)
    about = [(task, text) for task in file.tasks for text in _task_warnings(task)]
    about = sorted([*about, *_repeats(file.tasks)], key=lambda pair: pair[0].line)
    lines = [f"{path}:{task.line}: {printable(task.id)}: {text}" for task, text in about]
    return lines + [f"{path}: {text}" for text in _file_warnings(file.tasks)]


def _task_warnings(task: Task) -> Iterator[str]:
    if isinstance(task, PromptingTask):
        for short in task.choices or ():
            for long in task.choices or ():
                if long != short and long.startswith(short):
                    yield f"choice {quoted(short)} begins {quoted(long)}: one token may not tell them apart"
    elif isinstance(task, CotTask):
        answer = task.answer
        if isinstance(answer, float) and answer.is_integer():
            answer = int(answer)
        if task.steps and answer is not None and not _mentions(task.steps[-1], str(answer)):
            yield f"the answer {quoted(task.answer)} is not in the last step"
    else:
        user = "\n".join(message.content for message in task.messages if message.role == "user")
        for name in task.targets:
            if _mentions(user, name):
                yield f"the user's text has the target's name {quoted(name)}: it may be copied, not chosen"
        for tool in task.tools:
            if not tool.description.strip():
                yield f"tool {quoted(tool.name)} has no description: there is nothing to attend to"


def _mentions(text: str, name: str) -> bool:
    """Whether `name` stands in `text` as a word or number of its own, thousands separators and case aside."""
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", text).casefold()
    name = re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", name).casefold()
    return re.search(rf"(?<!\w)(?<!\w\.){re.escape(name)}(?!\w|\.\w)", text) is not None


def _repeats(tasks: Sequence[Task]) -> Iterator[tuple[Task, str]]:
    """Tasks of one kind whose text is that of an earlier one, case, spacing and punctuation aside.

    The same request with other tools, or the same tools in another order, is a task of its own.
    """
    first: dict[tuple[str, ...], Task] = {}
    for task in tasks:
        if isinstance(task, CotTask):
            text, tools = task.question, ()
        elif isinstance(task, PromptingTask):
            text, tools = task.input, ()
        else:
            text, tools = task.messages, tuple(tool.name for tool in task.tools)
        if not isinstance(text, str):
            text = "\n".join(f"{message.role} {message.content}" for message in text)
        words = " ".join(re.findall(r"\w+", text.casefold())) or text
        earlier = first.setdefault((task.kind, words, *tools), task)
        if earlier is not task:
            yield task, f"nearly the same text as {quoted(earlier.id)} (line {earlier.line})"


def _file_warnings(tasks: Sequence[Task]) -> Iterator[str]:
    choosing = [task for task in tasks if isinstance(task, ToolTask)]
    if choosing and all(task.targets for task in choosing):
        yield "every tool_selection task has a target tool: add some whose target is null"
    positions = Counter(
        [tool.name for tool in task.tools].index(task.targets[0])
        for task in choosing
        if len(task.targets) == 1 and len(task.tools) > 1
    )
    if len(positions) == 1 and positions.total() > 2:
        position = next(iter(positions)) + 1
        yield f"the target is always shown as number {position} ({positions.total()} tasks): vary the order"
    targets: dict[str, Counter[str]] = defaultdict(Counter)
    options: dict[str, set[str]] = defaultdict(set)
    for task in tasks:
        if isinstance(task, ToolTask) and len(task.targets) == 1:
            targets[task.kind][task.targets[0]] += 1
            options[task.kind].update(tool.name for tool in task.tools)
        elif isinstance(task, PromptingTask) and task.target is not None:
            targets[task.kind][task.target] += 1
            options[task.kind].update(task.choices or ())
    for kind, counts in targets.items():
        (name, most), total = counts.most_common(1)[0], counts.total()
        # Twice the even share, and more than half: with fewer than eight tasks that happens by chance.
        if total >= 8 and most > total / 2 and most > 2 * total / len(options[kind]):
            yield f"{most} of {total} {kind} targets are {quoted(name)}: balance them"
