"""Labels of spans, and the names that stand where a tool, a variant or an experiment could.

A label is a kind, and for some kinds a key behind a colon: `user`, `tool:calculator`, `step:3`.
"""

from __future__ import annotations

from typing import NamedTuple

BOS = "bos"
"""Position 0, whatever its token."""
SINK = "sink"
"""A model's learned attention sink, which has no positions."""
SYSTEM = "system"
"""System message."""
USER = "user"
"""Message of the user."""
QUESTION = "question"
"""Question of a `cot` task."""
ASSISTANT = "assistant"
"""Earlier message of the assistant, its calls included."""
ANSWER = "answer"
"""Answer of the model."""
OTHER = "other"
"""Markup, and all that has no label of its own."""

SINKS = (BOS, SINK)
"""Labels of attention sinks."""
REQUESTS = (USER, QUESTION)
"""Labels of what is asked."""

NO_TOOL = "no_tool"
"""Candidate that calls no tool: its name where a template lists it, and its label beside those of spans."""
BASE = "base"
"""Variant of a prompting task that adds nothing: the reference of all others."""
UNCHANGED = "base"
"""Experiment that changes nothing: the scores that the others are compared with."""

TOOL, STEP, RESULT, EXAMPLE = "tool", "step", "result", "example"
"""Kinds of the labels that have a key; an earlier result in the messages of a task has none."""

NAME, DESCRIPTION, PARAMETERS = TOOL_PARTS = ("name", "description", "parameters")
"""Parts of a tool's definition, as they stand in a span `tool:NAME`."""


class Label(NamedTuple):
    """A label in its two parts; `str` puts them together again."""

    kind: str
    """`user`, `tool`, `step`, …"""
    key: str | None = None
    """Name of the tool, number of the step, result or example; null for a kind that has no key."""

    def __str__(self) -> str:
        return self.kind if self.key is None else f"{self.kind}:{self.key}"

    @classmethod
    def parse(cls, text: str) -> Label:
        """The label that `text` spells; a key may have colons."""
        kind, colon, key = text.partition(":")
        return cls(kind, key if colon else None)


def tool_label(name: str) -> str:
    """Label of a tool's definition."""
    return str(Label(TOOL, name))


def step_label(number: int) -> str:
    """Label of a step of reasoning, or of an agent's turn that calls a tool; from 1."""
    return str(Label(STEP, str(number)))


def result_label(number: int) -> str:
    """Label of what a tool gave back in an agent's turn, from 1."""
    return str(Label(RESULT, str(number)))


def example_label(number: int) -> str:
    """Label of a worked example in a prompt, from 1."""
    return str(Label(EXAMPLE, str(number)))


def tool_of(label: str) -> str | None:
    """Name of the tool that a label describes; None for another label."""
    kind, key = Label.parse(label)
    return key if kind == TOOL else None


def step_of(label: str) -> int | None:
    """Number of the step that a label names; None for another label."""
    kind, key = Label.parse(label)
    return int(key) if kind == STEP and key is not None else None


def is_example(label: str) -> bool:
    """Whether a label is that of a worked example."""
    return Label.parse(label).kind == EXAMPLE
