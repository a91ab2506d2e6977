"""The conditions of each experiment: a task's prompt with one thing changed, and what is scored under it.

A change of the text is a change of the task (other order, other description, another name), rendered again; a
change of what is seen is an edit of the forward pass (`probe.model.edits`). Masks leave every position where it
was, removing does not: the two answer different questions.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any

import msgspec

from probe.errors import RunDirectoryError
from probe.experiments.registry import each, experiment
from probe.model.edits import Edit, Knockout
from probe.prompts import Codec, Prompt, PromptFault, Span, ToolPart, words_of
from probe.prompts.labels import DESCRIPTION, UNCHANGED, tool_label, tool_of
from probe.runs.records import ToolRecord
from probe.tasks import Message, ToolTask, render
from probe.tools.definitions import Tool

CONTENT_FREE = ("N/A", "", "[MASK]")
"""Requests without content (Zhao et al. 2021, "Calibrate before use", section 5)."""
EXACT_TOOLS = 4
"""Most tools of which every order is scored."""
MANY_TOOLS = 6
"""Most tools that are all changed; of more, only the likeliest and the right ones."""
WINDOWS = 3


@dataclass(frozen=True)
class Effort:
    """How much is asked for."""

    orders: int = 6
    """Orders drawn where there are more than EXACT_TOOLS tools."""
    every_tool: bool = False
    """Make every experiment with every tool, however many are shown, and exchange every pair."""
    draws: int | None = None
    """Intentions drawn a task, and continuations for each cut of a reasoning; None: as many intentions as `standard_error` asks
    for, and 4 continuations."""
    standard_error: float = 0.05
    """Of P(action | state): intentions are drawn until every candidate's is at most this, or there are `most_draws`."""
    most_draws: int = 32
    """Most intentions drawn a task."""
    random_heads: int = 6
    """Sets of random heads that chosen ones are compared with."""
    pairs: str = "request"
    """What the two prompts of a pair differ in, `request` or `description` (`probe.experiments.tool.pairs`)."""
    systems: tuple[str, str] | None = None
    """Two system prompts: pairs differ in these."""
    between: tuple[str, str] | None = None
    """Two tasks by id: the one pair that is patched."""
    steer_layers: tuple[int, ...] | None = None
    """Layers behind which a choice is steered; None: a third, two thirds and all of the way up."""
    doses: tuple[float, ...] | None = None
    """Lengths of steering vectors, in mean lengths of a state; None: `steering.DOSES`."""
    most_kl: float = 1.0
    """Price on unrelated text, nats, that the steering dose may have."""
    sae: str | None = None
    """A sparse autoencoder, by directory or hub id (`probe.model.autoencoders`)."""
    sae_layer: int | None = None
    """The layer behind which it was trained, where its files do not say."""
    top: int = 10
    """Features of a tool that are shown, and ablated."""
    seed: int = 0


@dataclass(frozen=True)
class Condition:
    """One changed prompt; its candidates are what is scored."""

    experiment: str
    prompt: Prompt
    edits: tuple[Edit, ...] = ()
    subject: str | None = None
    other: str | None = None
    detail: Any = None
    layers: tuple[int | None, int | None] = (None, None)
    n_tokens: int | None = None
    weight: float | None = None
    outcome: Any = None
    """What its candidates score, where that is known already (`Outcome` or `NonFinite` of `probe.capture`)."""
    part: str | None = None
    """Part of the subject's definition that is masked, or that a random mask stands for; None: the whole."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Name in the prompt → the tool's real name."""


class Subject:
    """A task as it was run, and what its changed prompts are built from."""

    def __init__(
        self,
        task: ToolTask,
        record: ToolRecord,
        codec: Codec,
        n_layers: int,
        max_new_tokens: int,
        effort: Effort,
    ):
        self.task, self.codec, self.n_layers = task, codec, n_layers
        self.passage, self.decision = record.passage, record.decision
        self.max_new_tokens, self.effort = max_new_tokens, effort
        self.tools = {tool.name: tool for tool in task.tools}

    @cached_property
    def prompt(self) -> Prompt:
        """As recorded. Raises RunDirectoryError where it is rendered differently now."""
        prompt = self.render(self.task)
        if prompt.token_ids != self.passage.token_ids[: self.passage.n_prompt]:
            raise RunDirectoryError(
                f"the prompt of {self.task.id!r} is rendered differently now than in the record; start a new run"
            )
        return prompt

    def render(self, task: ToolTask) -> Prompt:
        return render(task, self.codec, max_new_tokens=self.max_new_tokens)[0]

    def random(self, *purpose: str) -> random.Random:
        """Draws that depend on the seed, the task's id and the purpose alone."""
        words = json.dumps([self.effort.seed, self.task.id, *purpose])
        return random.Random(hashlib.blake2b(words.encode(), digest_size=8).digest())

    def span(self, tool: str) -> Span | None:
        """Where the tool's definition lies; None where it is not one run of positions or was cut off."""
        spans = [span for span in self.prompt.spans if span.label == tool_label(tool)]
        return spans[0] if len(spans) == 1 and spans[0].start > 0 else None

    @cached_property
    def parts(self) -> dict[tuple[str, str], list[ToolPart]]:
        """(tool, part) → where it stands behind position 0; what the prompt does not show is not there."""
        parts = {}
        for (label, part), places in self.prompt.tool_parts.items():
            name = tool_of(label)
            if name is not None and places[0].start > 0:
                parts[name, part] = places
        return parts

    @property
    def decision_row(self) -> int:
        """First row that is read: the slot, or the one before the opener where no-tool is not calling."""
        opener = self.prompt.n_opener if self.prompt.no_tool == "complement" else 0
        return self.prompt.n_prompt - 1 - opener

    @cached_property
    def ranked(self) -> list[str]:
        """The shown tools, likeliest first."""
        entries = sorted(self.decision.tool_probabilities, key=lambda entry: -entry.log_prob)
        return [entry.tool for entry in entries if entry.tool is not None]

    @cached_property
    def acted_upon(self) -> list[str]:
        """Tools that are changed, in shown order."""
        if self.effort.every_tool or len(self.tools) <= MANY_TOOLS:
            return list(self.tools)
        wanted = {*self.ranked[:3], *self.task.targets}
        return [name for name in self.tools if name in wanted]

    @cached_property
    def in_question(self) -> list[str]:
        """The likeliest and the right ones of those: what costs most is done with them alone."""
        wanted = {*self.ranked[:1], *self.task.targets}
        return self.acted_upon if self.effort.every_tool else [n for n in self.acted_upon if n in wanted]

    def with_tools(self, tools: Sequence[Tool]) -> Prompt:
        return self.render(msgspec.structs.replace(self.task, tools=tuple(tools)))


def _of_each(**facts: Any) -> Callable[[Callable[[Subject], Iterator[Condition]]], Any]:
    """Decorator: enter an experiment that needs nothing but a task, its prompt and its record."""

    def enter(conditions: Callable[[Subject], Iterator[Condition]]) -> Any:
        @wraps(conditions)
        def whole(subject: Subject) -> Iterator[Condition]:
            """All conditions of a task, or none where one of them does not fit into the context."""
            try:
                yield from list(conditions(subject))
            except PromptFault:
                return

        experiment("tool", **facts)(each(whole))
        return conditions

    return enter


@_of_each(changes="nothing; equals the record", cost="1")
def base(subject: Subject) -> Iterator[Condition]:
    yield Condition(UNCHANGED, subject.prompt)


@_of_each(
    changes="the tools are shown in another order",
    cost="all n! orders of up to 4 tools, the shown one included; else `--orders` (6) distinct ones drawn at random",
)
def order(subject: Subject) -> Iterator[Condition]:
    """Every order of up to EXACT_TOOLS tools; of more, orders drawn without replacement."""
    names = list(subject.tools)
    if len(names) <= EXACT_TOOLS:
        orders = list(itertools.permutations(names))
    else:
        draw, seen = subject.random("order"), {}
        while len(seen) < min(subject.effort.orders, math.factorial(min(len(names), 12))):
            seen[tuple(draw.sample(names, len(names)))] = None
        orders = list(seen)
    for shown in orders:
        prompt = subject.with_tools([subject.tools[name] for name in shown])
        yield Condition("order", prompt, detail=list(shown))


@_of_each(
    changes='the last user message is replaced by "N/A", "" and "[MASK]"; the tools stay [Zhao et al. 2021]',
    cost="3",
)
def content_free(subject: Subject) -> Iterator[Condition]:
    """The last request of the user says nothing; the tools stay."""
    for text in CONTENT_FREE:
        task = with_request(subject.task, text)
        if task is not None:
            yield Condition("content_free", subject.render(task), detail={"text": text})


@_of_each(
    changes="the keys of `tool:NAME` are masked from every row behind the span: later tools, the request and the decision cannot read it",
    cost="one for each tool",
    deciding=True,
    requires="attention",
)
def mask_all(subject: Subject) -> Iterator[Condition]:
    for name, span in _spans(subject, subject.acted_upon):
        yield _masked(subject, "mask_all", name, span, span.end)


@_of_each(
    changes="the keys of one part of `tool:NAME`, its name, its description or its parameters, are masked from every row behind them",
    cost="one for each part of each tool",
    deciding=True,
    requires="attention",
)
def mask_part(subject: Subject) -> Iterator[Condition]:
    for (name, part), places in subject.parts.items():
        if name in subject.acted_upon:
            yield _masked_part(subject, "mask_part", name, part, places)


@_of_each(
    changes="a random mask of the same length as the part, outside of `tool:NAME`, behind position 0 and before the decision row, from every row behind it",
    cost="one for each part of each tool in question",
    deciding=True,
    requires="attention",
)
def mask_part_random(subject: Subject) -> Iterator[Condition]:
    for (name, part), places in subject.parts.items():
        if name in subject.in_question and (span := subject.span(name)):
            size = sum(place.end - place.start for place in places)
            if other := _elsewhere(subject, span, size, "elsewhere", name, part):
                yield _masked_part(subject, "mask_part_random", name, part, [other])


@_of_each(
    changes="the keys of `tool:NAME` are masked from the decision on; everything before was computed with them",
    cost="one for each tool",
    requires="attention",
)
def mask_decision(subject: Subject) -> Iterator[Condition]:
    for name, span in _spans(subject, subject.acted_upon):
        yield _masked(subject, "mask_decision", name, span, subject.decision_row)


@_of_each(
    changes="as `mask_decision`, in one of 3 windows of layers at a time (one for each layer where there are fewer)",
    cost="3 for each tool in question",
    requires="attention",
)
def mask_window(subject: Subject) -> Iterator[Condition]:
    """The decision's own view of a definition, cut off in one window of layers at a time."""
    count = min(WINDOWS, subject.n_layers)
    borders = [round(number * subject.n_layers / count) for number in range(count + 1)]
    for name, span in _spans(subject, subject.in_question):
        for first, end in itertools.pairwise(borders):
            edit = Knockout(span.start, span.end, subject.decision_row, frozenset(range(first, end)))
            yield Condition(
                "mask_window",
                subject.prompt,
                (edit,),
                subject=name,
                layers=(first, end - 1),
                n_tokens=span.end - span.start,
            )


@_of_each(
    changes="a random mask of the same length, which shares no position with the span, behind position 0 and before the decision row, from every row behind it",
    cost="one for each tool in question",
    deciding=True,
    requires="attention",
)
def mask_all_random(subject: Subject) -> Iterator[Condition]:
    for name, span in _spans(subject, subject.in_question):
        if other := _elsewhere(subject, span, span.end - span.start, "elsewhere", name):
            yield _masked(subject, "mask_all_random", name, other, other.end)


@_of_each(
    changes="the same random mask as in `mask_all_random`, from the decision on",
    cost="one for each tool in question",
    requires="attention",
)
def mask_decision_random(subject: Subject) -> Iterator[Condition]:
    for name, span in _spans(subject, subject.in_question):
        if other := _elsewhere(subject, span, span.end - span.start, "elsewhere", name):
            yield _masked(subject, "mask_decision_random", name, other, subject.decision_row)


@_of_each(
    changes="the tool is not in the prompt, and is no candidate",
    cost="one for each tool in question, where more than one is shown",
)
def remove(subject: Subject) -> Iterator[Condition]:
    """The tool is not shown at all; with one tool there would be nothing left to choose from."""
    if len(subject.tools) > 1:
        for name in subject.in_question:
            rest = [tool for tool in subject.task.tools if tool.name != name]
            yield Condition("remove", subject.with_tools(rest), subject=name)


@_of_each(
    changes="two tools exchange description and parameters; names and places stay",
    cost="the most probable tool with the next probable one and with each right one",
    deciding=True,
)
def swap(subject: Subject) -> Iterator[Condition]:
    """Two tools exchange description and parameters and keep their names and places.

    The likeliest tool exchanges with the next likely one and with the right ones.
    """
    top, rivals = subject.ranked[0], {*subject.ranked[1:2], *subject.task.targets}
    for a, b in itertools.combinations(subject.acted_upon, 2):
        first, second = (b, a) if b == top else (a, b)
        if not subject.effort.every_tool and (first != top or second not in rivals):
            continue
        given = {first: subject.tools[second], second: subject.tools[first]}
        tools = [
            msgspec.structs.replace(given.get(tool.name, tool), name=tool.name) for tool in subject.task.tools
        ]
        yield Condition("swap", subject.with_tools(tools), subject=first, other=second)


@_of_each(
    changes="the letters and digits of the tool's name are shuffled; description and place stay; it is scored under the new name",
    cost="one for each tool in question",
)
def scramble(subject: Subject) -> Iterator[Condition]:
    """The tool's name loses its meaning: its letters are shuffled, punctuation stays."""
    for name in subject.in_question:
        new = scrambled(name, subject.random("scramble", name), set(subject.tools))
        tools = [
            msgspec.structs.replace(tool, name=new) if tool.name == name else tool
            for tool in subject.task.tools
        ]
        prompt = subject.with_tools(tools)
        yield Condition("scramble", prompt, subject=name, detail={"name": new}, renamed={new: name})


@_of_each(
    changes="one word of the tool's description is masked at a time, from every row behind it",
    cost="one for each word of the tools in question",
    by_name=True,
    requires="attention",
)
def word(subject: Subject) -> Iterator[Condition]:
    """One word of the description of the likeliest tool, and of the right ones, masked at a time."""
    for name, span in _spans(subject, subject.in_question):
        # Not the first place in the span that reads alike: a name may be the beginning of its description.
        place = subject.parts.get((name, DESCRIPTION), [span])[0]
        words = words_of(subject.prompt, subject.codec, place, subject.tools[name].description)
        for index, (text, start, end) in enumerate(words):
            yield Condition(
                "word",
                subject.prompt,
                (Knockout(start, end, end),),
                subject=name,
                detail={"text": text, "index": index},
                n_tokens=end - start,
            )


def with_request(task: ToolTask, text: str) -> ToolTask | None:
    """The task with another last message of the user; None where there is none."""
    messages = list(task.messages)
    last = max((i for i, message in enumerate(messages) if message.role == "user"), default=None)
    if last is None:
        return None
    messages[last] = Message("user", text)
    return msgspec.structs.replace(task, messages=tuple(messages))


def _spans(subject: Subject, names: Sequence[str]) -> Iterator[tuple[str, Span]]:
    for name in names:
        span = subject.span(name)
        if span is not None:
            yield name, span


def _masked(subject: Subject, experiment: str, name: str, span: Span, rows_from: int) -> Condition:
    detail = {"start": span.start} if experiment.endswith("random") else None
    edit = Knockout(span.start, span.end, rows_from)
    return Condition(
        experiment, subject.prompt, (edit,), subject=name, detail=detail, n_tokens=span.end - span.start
    )


def _masked_part(
    subject: Subject, experiment: str, name: str, part: str, places: Sequence[ToolPart | Span]
) -> Condition:
    """Each place masked from every row behind it."""
    return Condition(
        experiment,
        subject.prompt,
        tuple(Knockout(place.start, place.end, place.end) for place in places),
        subject=name,
        part=part,
        detail={"start": places[0].start} if experiment.endswith("random") else None,
        n_tokens=sum(place.end - place.start for place in places),
    )


def _elsewhere(subject: Subject, span: Span, size: int, *purpose: str) -> Span | None:
    """A random run of `size` positions that shares none with the span, position 0 or the rows read."""
    starts = [*range(1, span.start - size + 1), *range(span.end, subject.decision_row - size + 1)]
    if not starts:
        return None
    start = subject.random(*purpose).choice(starts)
    return Span("random", start, start + size)


def scrambled(name: str, draw: random.Random, taken: set[str]) -> str:
    """The name with its letters and digits in another order, no name of `taken`."""
    places = [index for index, character in enumerate(name) if character.isalnum()]
    for _ in range(100):
        new = list(name)
        for place, source in zip(places, draw.sample(places, len(places)), strict=True):
            new[place] = name[source]
        if "".join(new) not in taken:
            return "".join(new)
    while name in taken:  # a name of one letter, or of equal ones
        name += draw.choice("bcdfghjklmnpqrstvwxz")
    return name
