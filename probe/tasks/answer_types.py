"""The types of answers, by name."""

from __future__ import annotations

from typing import Literal, get_args

AnswerType = Literal[
    "number", "range", "ordinal", "date", "weekday", "time", "yes_no", "option", "text", "list", "set"
]
"""Types of answers. `text` is a name or words; a `list` has an order, a `set` has none."""
ANSWER_TYPES: tuple[AnswerType, ...] = get_args(AnswerType)
