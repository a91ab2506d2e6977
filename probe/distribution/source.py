"""Where a distribution is from: a captured decision of a run, any captured row of it, or a text and a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.errors import BadInput, RunDirectoryError, UsageError
from probe.runs.records import TaskRecord

if TYPE_CHECKING:
    from torch import Tensor

    from probe.analyzers.distribution import CapturedDecision
    from probe.model.hooked import Model
    from probe.prompts import Codec
    from probe.runs import Run, TaskRun

_ROWS = 64
"""Vocabulary-wide rows held at a time."""


@dataclass(frozen=True)
class Distribution:
    """One distribution: where it is from, its logits, the token that follows, and texts of tokens where known."""

    source: dict[str, Any]
    logits: Tensor
    """float32 [d_vocab]."""
    token: int | None = None
    texts: Any = field(default=None, repr=False)
    """Token id → text, or None."""


# -- a run -------------------------------------------------------------------------------------------------------


def of_run(run: Run, task_id: str | None, passage: str | None, index: int) -> Distribution:
    """A captured decision; without a task, of the first task that has one.

    Raises UsageError where there is none, saying what there is.
    """
    from probe.analyzers.distribution import decisions

    task = _first(run) if task_id is None else run[task_id]
    taken = list(decisions(task))
    if not taken:
        raise UsageError(
            f"task {task.id!r}: no logits were captured: run it with --capture default, or add --row N"
        )
    names = list(dict.fromkeys(decision.passage for decision in taken))
    passage = _passage(task, passage, names)
    of_passage = [decision for decision in taken if decision.passage == passage]
    if not -len(of_passage) <= index < len(of_passage):
        raise UsageError(f"task {task.id!r}: no decision {index}: it has {len(of_passage)}, counted from 0")
    return seen(of_passage[index])


def seen(decision: CapturedDecision) -> Distribution:
    place = {"task_id": decision.task_id, "passage": decision.passage}
    place |= {"decision": decision.index, "position": decision.position}
    return Distribution(place, decision.logits, decision.token)


def of_row(run: Run, model: Model, task_id: str | None, passage: str | None, row: int) -> Distribution:
    """The distribution at a captured row, by the run's model on the run's own tokens. Raises as `of_run`."""
    from probe.model.weights import weights_hash

    if weights_hash(model.hf) != run.run["model"]["weights_hash"]:
        raise RunDirectoryError(f"{model.source.name} has other weights than the model of {run.path}")
    task = _first(run, "token_ids") if task_id is None else run[task_id]
    if not task.passages:
        raise UsageError(f"task {task.id!r} did not run: {task.typed(TaskRecord).error}")
    passage = _passage(task, passage, list(task.passages))
    facts = task.passages[passage]
    first, n_rows = facts.n_prompt - 1, facts.n_new
    if not -n_rows <= row < n_rows:
        raise UsageError(
            f"task {task.id!r}: no row {row}: it has {n_rows}, counted from 0, one a generated token"
        )
    ids, position = facts.token_ids, first + row % n_rows
    _, logits = next(_rows(model, ids[: position + 1], position))
    following = ids[position + 1] if position + 1 < len(ids) else None
    place = {"task_id": task.id, "passage": passage, "row": row % n_rows, "position": position}
    return Distribution(place, logits, following, texts_of(model))


def texts_of(model: Model) -> Any:
    return lambda token: model.tokenizer.decode([token])


def _first(run: Run, has: str = "logits") -> TaskRun:
    from probe.runs.read import finished

    for task in finished(run):
        if any(name.split("/")[-1] == has for name in task):
            return task
    raise UsageError(
        f"{run.path}: no finished task keeps {has}: run it with --capture default, or give --task ID --row N"
    )


def _passage(task: TaskRun, passage: str | None, names: list[str]) -> str:
    if passage is not None and passage not in names:
        raise UsageError(f"task {task.id!r}: no passage {passage!r}; there is {', '.join(names)}")
    return passage or names[0]


# -- a text and a model ------------------------------------------------------------------------------------------


def of_prompt(
    model: Model, codec: Codec, text: str, row: int = -1, before: str | None = None
) -> Distribution:
    """What follows the text, or a position inside of it; the last one is −1. `before` as in `_ids`."""
    ids = _ids(codec, text, before)
    if not -len(ids) <= row < len(ids):
        raise UsageError(f"--row {row}: the prompt has {len(ids)} tokens, counted from 0")
    position = row % len(ids)
    _, logits = next(_rows(model, ids[: position + 1], position))
    place = {"prompt": text, "before": _before(codec, ids), "model": model.source.name}
    place |= {"position": position, "n_tokens": len(ids)}
    return Distribution(
        place, logits, ids[position + 1] if position + 1 < len(ids) else None, texts_of(model)
    )


def each_position(
    model: Model, codec: Codec, text: str, name: str, before: str | None = None
) -> Iterator[Distribution]:
    """Every position of a text that fits the context, one row of logits in memory at a time; `before` as in `_ids`."""
    ids = _ids(codec, text, before)
    for position, logits in _rows(model, ids):
        following = ids[position + 1] if position + 1 < len(ids) else None
        yield Distribution({"task_id": name, "position": position}, logits, following, texts_of(model))


def read_texts(path: Path) -> list[str]:
    """One text a line: of a .jsonl file its field `text`, else the line itself; blank lines are left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput([f"{path}: cannot be read as text: {error}"]) from error
    if path.suffix != ".jsonl":
        texts = [line for line in lines if line.strip()]
    else:
        texts = [_field(path, at, line) for at, line in enumerate(lines, 1) if line.strip()]
    if not texts:
        raise BadInput([f"{path}: holds no text: give one text a line"])
    return texts


def _field(path: Path, at: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
        if isinstance(text, str) and text:
            return text
    except (ValueError, KeyError, TypeError):
        pass
    raise BadInput([f"{path}:{at}:1: text: a line of a .jsonl file is an object with a field `text`"])


def _ids(codec: Codec, text: str, before: str | None) -> list[int]:
    """Token ids of a text behind special tokens: those of `before`, none where it is empty, the model's attention sink
    where it is None. Raises UsageError for what is no special token of the model."""
    from probe.prompts import prompt_of

    if not text:
        raise UsageError("the text is empty: give at least one character")
    prompt = prompt_of(text, codec, 1)
    if prompt.truncation:
        raise UsageError(
            f"the text is {prompt.truncation['tokens_dropped']} tokens longer than the {codec.n_ctx} positions of "
            "the model's context: shorten it, or cut it into lines"
        )
    if before is None:
        return prompt.token_ids
    if not before:
        return codec.encode_first(text)
    special = codec.encode_first(before, markup=True)
    if not codec.special_ids.issuperset(special):
        known = ", ".join(codec.tokenizer.all_special_tokens)
        raise UsageError(f"--before {before}: no special token of the model; it has {known}")
    return [*special, *codec.encode(text, after=special[-1])]


def _before(codec: Codec, ids: list[int]) -> str:
    """The special tokens in front of a text, of which each is one token."""
    n_special = next((n for n, token in enumerate(ids) if token not in codec.special_ids), len(ids))
    return codec.decode(ids[:n_special])


def _rows(model: Model, ids: list[int], start: int = 0) -> Iterator[tuple[int, Tensor]]:
    """(position, logits [d_vocab]) from `start` on; the unembedding runs over a few rows at a time."""
    import torch

    with torch.inference_mode():
        inputs = torch.tensor([ids], device=model.device)
        hidden = model.decoder(input_ids=inputs, use_cache=False).last_hidden_state[0]
        for at in range(start, len(ids), _ROWS):
            block = model.unembed(hidden[at : at + _ROWS]).cpu()
            yield from ((at + i, row) for i, row in enumerate(block))
