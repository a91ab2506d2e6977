"""The texts of a sweep: lines of an invented language to learn, and unrelated text that should stay known.

Tarn is a small constructed language for commands to a house: negation and tomorrow come first, then the thing with
an ending for its room, then the verb (doubled in the cellar), then the time. No line of it is in any model's
training data: what a model knows of it was learned in training, and its held-out lines share no sentence with it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from probe.errors import BadInput, UsageError

PARTS = ("train", "selection", "validation")


@dataclass(frozen=True)
class TextData:
    """Lines (prompt, completion) of each part, and the unrelated text."""

    train: list[tuple[str, str]]
    selection: list[tuple[str, str]]
    """Lines on which learning rates are chosen."""
    validation: list[tuple[str, str]]
    """Lines on which nothing is chosen."""
    text: list[str]

    def first(self, train: int, held_out: int, text: int) -> TextData:
        """The first lines of each part."""
        return TextData(
            self.train[:train], self.selection[:held_out], self.validation[:held_out], self.text[:text]
        )

    def digest(self) -> str:
        from blake3 import blake3

        return blake3(
            json.dumps([self.train, self.selection, self.validation, self.text]).encode()
        ).hexdigest()[:16]


def read_texts(path: Path | None = None) -> TextData:
    """The shipped texts, or those of a directory with train, selection, validation and text .jsonl.

    Raises UsageError where a file is missing and BadInput for lines of another form, and where a line that is
    trained on is held out too: the overfitting measured on it would be none.
    """
    root = path or resources.files("probe.training.lora") / "tarn"
    wrong: list[str] = []
    parts = {part: _lines(root / f"{part}.jsonl", ("prompt", "completion"), wrong) for part in PARTS}
    text = [line[0] for line in _lines(root / "text.jsonl", ("text",), wrong)]
    for first, second in (("train", "selection"), ("train", "validation"), ("selection", "validation")):
        for prompt, _ in sorted(set(parts[first]) & set(parts[second])):
            wrong.append(f"{second}.jsonl: {prompt!r} is in {first}.jsonl too: leave it in one")
    if wrong:
        raise BadInput(wrong)
    return TextData(**parts, text=text)


def _lines(path: Any, keys: tuple[str, ...], wrong: list[str]) -> list[Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: cannot be read ({error}); --data needs {', '.join(PARTS)} and text .jsonl"
        ) from error
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            values = tuple(entry[key] for key in keys)
        except (ValueError, KeyError, TypeError):
            values = ()
        if not values or not all(isinstance(value, str) and value for value in values):
            wrong.append(f"{path.name}:{number}: not an object with the texts {' and '.join(keys)}")
        else:
            parsed.append(values)
    if not parsed:
        wrong.append(f"{path.name}: no line in it")
    return parsed
