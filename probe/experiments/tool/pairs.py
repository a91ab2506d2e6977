"""Two prompts that differ in one thing, and how the positions of one are those of the other.

request      the last message of the user is exchanged with that of another task whose right tool is shown here too
description  the right tool exchanges description and parameters with the most probable other one
system       the same task under two system prompts, A and B
tasks        two tasks, as they are

`clean` is the first of the two. The two names are the right tool of each; under two system prompts they are the
two most probable candidates. The `control` of a pair is a third prompt that has as little to do with the two as can be: the
request of a third task, an exchange with a third tool. Of requests that fit, the one most nearly as long is taken.

Positions are aligned span by span, in order, behind what the prompts share. Spans of one length are aligned position by
position. Of spans of two lengths the mean is: each state of the one prompt is moved by the difference of the means. Prompts
whose spans do not follow each other alike are not aligned, and are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import msgspec

from probe.experiments.tool.attribution import FIRST_TWO, pairs_of, sources
from probe.experiments.tool.conditions import Subject, with_request
from probe.prompts import Candidate, Prompt, PromptFault
from probe.runs.records import ToolRecord
from probe.tasks import ToolTask
from probe.tasks.choice import under_system

if TYPE_CHECKING:
    from probe.prompts import Codec

REQUEST, DESCRIPTION, SYSTEM, TASKS = PAIRS = ("request", "description", "system", "tasks")
DECISION = "decision"
"""Span of the last position of the prompt and the tokens of the names behind it."""

Region = tuple[int, int]
"""Slots start … end − 1."""


class NoPair(Exception):
    """Why a task has no pair: `no_partner`, `not_scored`, `unaligned`."""


@dataclass(frozen=True, eq=False)
class PromptPair:
    """Two prompts of a task, the names whose log-odds are compared, and a third prompt as control."""

    task_id: str
    kind: str
    partner: str | None
    """The task, or the tool, with which something was exchanged."""
    names: tuple[Candidate, Candidate]
    clean: Prompt
    corrupt: Prompt
    control: Prompt | None = None

    @cached_property
    def first(self) -> int:
        """The first position at which the prompts differ, at most the last of the shortest."""
        prompts = [self.clean, self.corrupt, *([self.control] if self.control else [])]
        least = min(prompt.n_prompt for prompt in prompts) - 1
        ids = zip(*(prompt.token_ids[:least] for prompt in prompts), strict=True)
        return next((n for n, column in enumerate(ids) if len(set(column)) > 1), least)

    @property
    def n_nodes(self) -> int:
        """Slots that the names take behind a prompt."""
        from probe.capture.candidates import Tree

        return Tree(self.names).n_nodes

    @cached_property
    def spans(self) -> dict[str, list[tuple[Region, Region, Region]]]:
        """Source of a span (`attribution.sources`), or `decision` → its runs in clean, corrupt and control (of clean where
        there is none), behind what the prompts share. Raises NoPair."""
        prompts = [self.clean, self.corrupt, self.control or self.clean]
        shown = [self._runs(prompt) for prompt in prompts]
        if len({tuple(source for source, _ in runs) for runs in shown}) > 1:
            raise NoPair("unaligned")
        regions: dict[str, list[tuple[Region, Region, Region]]] = {}
        for runs in zip(*shown, strict=True):
            source, places = runs[0][0], tuple(place for _, place in runs)
            filled = [end > start for start, end in places]
            if any(filled) and not all(filled):
                raise NoPair("unaligned")
            if all(filled):
                regions.setdefault(source, []).append((places[0], places[1], places[2]))
        return regions

    def _runs(self, prompt: Prompt) -> list[tuple[str, Region]]:
        """Every span of a prompt, clipped to what is behind `first` and before the decision; then the decision."""
        tool, other = (name.name for name in self.names)
        last = prompt.n_prompt - 1
        runs = [
            (source, (max(span.start, self.first), min(span.end, last)))
            for source, span in zip(sources(prompt, tool, other), prompt.spans, strict=False)
        ]
        return [*runs, (DECISION, (last, prompt.n_prompt + self.n_nodes))]


@dataclass(frozen=True)
class RequestText:
    """What another task may give: its last request, how many tokens that has, and its right tools."""

    task_id: str
    request: str
    n_tokens: int
    right: tuple[str | None, ...]


def exchanges(tasks: Iterable[tuple[ToolTask, ToolRecord]], codec: Codec) -> list[RequestText]:
    """Of every task with a message of the user."""
    return [
        RequestText(task.id, request, len(codec.encode(request)), record.right)
        for task, record in tasks
        if (request := last_request(task)) is not None
    ]


def last_request(task: ToolTask) -> str | None:
    return next((message.content for message in reversed(task.messages) if message.role == "user"), None)


def request_pair(subject: Subject, record: ToolRecord, others: Sequence[RequestText]) -> PromptPair:
    """Raises NoPair, PromptFault."""
    shown, right = set(subject.tools), set(record.right)
    asked = next((other for other in others if other.task_id == subject.task.id), None)
    if asked is None:
        raise NoPair("no_partner")
    draw = subject.random("pair")
    shuffled = draw.sample([other for other in others if other.task_id != subject.task.id], len(others) - 1)
    nearest = sorted(shuffled, key=lambda other: abs(other.n_tokens - asked.n_tokens))
    partner = next((o for o in nearest if shown & set(o.right) and not right & set(o.right)), None)
    if partner is None:
        raise NoPair("no_partner")
    other_right = [name for name in partner.right if name in shown]
    taken = right | set(partner.right)
    third = next((o for o in nearest if o is not partner and not taken & set(o.right)), None)
    return _pair(
        subject,
        REQUEST,
        partner.task_id,
        (list(record.right), other_right),
        subject.prompt,
        _asking(subject, partner),
        None if third is None else _asking(subject, third),
    )


def _asking(subject: Subject, other: RequestText) -> Prompt:
    task = with_request(subject.task, other.request)
    assert task is not None
    return subject.render(task)


def description_pair(subject: Subject, record: ToolRecord) -> PromptPair:
    """Raises NoPair, PromptFault."""
    right = [name for name in subject.ranked if name in record.right]
    others = [name for name in subject.ranked if name not in record.right]
    if not right or not others:
        raise NoPair("no_partner")

    def exchanged(other: str) -> Prompt:
        given = {right[0]: subject.tools[other], other: subject.tools[right[0]]}
        return subject.with_tools(
            [
                msgspec.structs.replace(given.get(tool.name, tool), name=tool.name)
                for tool in subject.task.tools
            ]
        )

    return _pair(
        subject,
        DESCRIPTION,
        others[0],
        ([right[0]], others[:1]),
        subject.prompt,
        exchanged(others[0]),
        exchanged(others[1]) if len(others) > 1 else None,
    )


def system_pair(subject: Subject, record: ToolRecord, systems: tuple[str, str]) -> PromptPair:
    """Raises NoPair, PromptFault."""
    pair = pairs_of(record).get(FIRST_TWO)
    if pair is None:
        raise NoPair("not_scored")
    tool, other = pair
    clean, corrupt = (subject.render(under_system(subject.task, text)) for text in systems)
    return _pair(subject, SYSTEM, None, ([tool], [other]), clean, corrupt)


def tasks_pair(subject: Subject, record: ToolRecord, other: Subject, other_record: ToolRecord) -> PromptPair:
    """Raises NoPair, PromptFault."""
    second = [name for name in other_record.right if name not in record.right]
    return _pair(subject, TASKS, other.task.id, (list(record.right), second), subject.prompt, other.prompt)


def _pair(
    subject: Subject,
    kind: str,
    partner: str | None,
    wanted: tuple[Sequence[str | None], Sequence[str | None]],
    clean: Prompt,
    corrupt: Prompt,
    control: Prompt | None = None,
) -> PromptPair:
    """A pair whose names are the first wanted ones that are scored alike behind both prompts."""
    scored: list[Mapping[str | None, Candidate]] = [
        {candidate.name: candidate for candidate in prompt.candidates} for prompt in (clean, corrupt)
    ]

    first, second = (
        next((scored[0][n] for n in names if n in scored[0] and scored[0][n] == scored[1].get(n)), None)
        for names in wanted
    )
    if first is None or second is None or first.token_ids == second.token_ids:
        raise NoPair("not_scored")
    pair = PromptPair(subject.task.id, kind, partner, (first, second), clean, corrupt, control)
    if control is not None:
        try:
            _ = pair.spans
        except NoPair:  # without its control it may be
            pair = PromptPair(subject.task.id, kind, partner, (first, second), clean, corrupt)
    _ = pair.spans
    return pair


def pairs(
    kind: str,
    subjects: Mapping[str, tuple[Subject, ToolRecord]],
    others: Sequence[RequestText] = (),
    *,
    systems: tuple[str, str] | None = None,
    between: tuple[str, str] | None = None,
) -> Iterator[tuple[str, PromptPair | str]]:
    """(task id, its pair, or why it has none)."""
    for task_id, (subject, record) in subjects.items():
        try:
            if kind == REQUEST:
                yield task_id, request_pair(subject, record, others)
            elif kind == DESCRIPTION:
                yield task_id, description_pair(subject, record)
            elif kind == SYSTEM:
                assert systems is not None
                yield task_id, system_pair(subject, record, systems)
            elif between is not None and task_id == between[0]:
                yield task_id, tasks_pair(subject, record, *subjects[between[1]])
        except NoPair as reason:
            yield task_id, str(reason)
        except PromptFault:
            yield task_id, "no_room"
