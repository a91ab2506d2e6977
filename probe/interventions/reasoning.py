"""Running a run's chains of thought again with one part hidden, deleted or replaced: the proof beside the reads.

Tokens are the run's own, never tokenised again. Sources are the question and each step; readers are the later
steps and the answer. Experiments by the name under which they are asked for:

knockouts      `total`: no position behind the source sees its keys, in all layers; later positions are computed
               anew, as if it had never been written. `direct`: only the rows that emit the answer do not see it;
               what later steps copied from it stays.
deletions      `deleted`: the source's tokens are not there, so what follows moves up. Positions change as well.
read_logit, answer_lens: `probe.interventions.lens`
early_answer, filler, mistake: `probe.interventions.faithful`
paraphrase, resampling, regenerated: `probe.interventions.rewritten`

Beside each of the first two stands the same done to a random run of as many positions (`random_total`, …),
somewhere between the sink and the answer, that shares none with the source. Up to four sources of one size share a
random run. Deletions are made unasked only while everything together stays below AFFORDABLE forwards.

Columns of reasoning.parquet: `source` the label acted upon (null: `base`, nothing changed); `start`, `n_tokens`
the positions that are hidden or deleted; `kept` how many steps are kept; `n_rows` over how many rows `kl` is a
mean: those of the reader's rows that lie behind the change; `kl` = KL(base‖changed) over the whole vocabulary,
nats; `log_prob` = Σ log P of the reader's own tokens, nats; `said` what the model answers instead, `same` whether
that is the run's answer, `score` whether it is the right one; `layer` and `value` belong to `lens` and `rewritten`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from probe.model.edits import Knockout

if TYPE_CHECKING:
    from torch import Tensor

    from probe.capture import Forced, Variant
    from probe.interventions.conditions import Effort
    from probe.interventions.reopened import Reopened
    from probe.model.hooked import Model
    from probe.runner import Progress
    from probe.store import Run

EXPERIMENTS: dict[str, tuple[str, ...]] = {
    "knockouts": ("total", "direct", "random_total", "random_direct"),
    "deletions": ("deleted", "random_deleted"),
    "read_logit": ("read_logit",),
    "answer_lens": ("answer_lens",),
    "early_answer": ("early_answer",),
    "filler": ("filler",),
    "mistake": ("mistake",),
    "paraphrase": ("paraphrase",),
    "resampling": ("resampling",),
    "regenerated": ("regenerated", "regenerated_base"),
}
"""By the name under which they are asked for: the experiments of the table."""
ASKED = frozenset({"early_answer", "filler", "mistake", "paraphrase", "resampling", "regenerated"})
"""Made only where they are named: they decode, and answer another question."""
_CHANGES = frozenset({"knockouts", "deletions"})
ANSWER = "answer"
QUESTION = "question"
_WRITE = 8
_SHARE = 4
"""Sources of one size that have one random run between them."""
AFFORDABLE = 40
"""Forwards of the whole sequence, in tokens: deletions that would pass it are made only where they are named."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A labelled run of positions start … end − 1."""

    label: str
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


class Chain:
    """A reasoning as it was run: its tokens, the question, the steps and the answer."""

    def __init__(self, record: Mapping[str, Any]):
        self.record = record
        self.token_ids: list[int] = list(record["token_ids"])
        self.n_prompt: int = record["n_prompt"]
        found: dict[str, list[Part]] = {}
        for span in record["spans"]:
            found.setdefault(span["label"], []).append(Part(span["label"], span["start"], span["end"]))
        # A label in several pieces, as of a question that a truncated prompt cut, is no one run of positions.
        whole = {label: parts[0] for label, parts in found.items() if len(parts) == 1 and parts[0].start > 0}
        self.question = whole.get(QUESTION)
        self.answer = whole.get(ANSWER)
        self.steps = [part for label, part in whole.items() if label.startswith("step:")]

    @property
    def sources(self) -> list[Part]:
        return [*([self.question] if self.question else []), *self.steps]

    def readers(self, source: Part) -> list[Part]:
        """What comes behind a source and was emitted."""
        emitted = [*self.steps, *([self.answer] if self.answer else [])]
        return [part for part in emitted if part.start >= source.end]

    @property
    def limit(self) -> int:
        """Sources and random runs end here: at the first row that emits the answer, else at the last row."""
        return self.answer.start - 1 if self.answer else len(self.token_ids) - 1

    def elsewhere(self, source: Part) -> Part | None:
        """A random run of as many positions that shares none with the source; fixed by the task."""
        return self._controls.get(source.label)

    @cached_property
    def _controls(self) -> dict[str, Part]:
        """label → the random run beside it. Up to _SHARE sources of one size share a run that touches none of
        them: it is then run once for all."""
        found: dict[str, Part] = {}
        by_size: dict[int, list[Part]] = {}
        for source in self.sources:
            by_size.setdefault(source.size, []).append(source)
        for alike in by_size.values():
            for start in range(0, len(alike), _SHARE):
                group = alike[start : start + _SHARE]
                run = self._draw(group)
                for source in group:
                    own = run or self._draw([source])
                    if own is not None:
                        found[source.label] = own
        return found

    def _draw(self, sources: Sequence[Part]) -> Part | None:
        size = sources[0].size
        starts = [
            start
            for start in range(1, self.limit - size + 1)
            if all(start + size <= source.start or source.end <= start for source in sources)
        ]
        if not starts:
            return None
        words = json.dumps([self.record["id"], sources[0].label])
        draw = random.Random(hashlib.blake2b(words.encode(), digest_size=8).digest())
        start = draw.choice(starts)
        return Part("random", start, start + size)


def make(
    opened: Reopened, wanted: Sequence[str], *, again: bool, effort: Effort, progress: Progress
) -> list[str]:
    """Make what is missing of the wanted experiments, or all of them again; returns what was made."""
    todo = _missing(opened.run, wanted, again=again)
    if todo:
        _make(opened, todo, effort, progress)
    return [name for name in wanted if any(name in own for own in todo.values())]


def _missing(run: Run, wanted: Sequence[str], *, again: bool) -> dict[str, list[str]]:
    """task id → what to make, for the chains of thought that have a source and a reader of it."""
    table = run.reasoning(arrow=True)
    there = set(zip(table["task_id"].to_pylist(), table["experiment"].to_pylist(), strict=True))
    todo = {}
    for task in run:
        if task.record["kind"] == "cot" and task.record["status"] in ("ok", "truncated"):
            chain = Chain(task.record)
            if any(chain.readers(source) for source in chain.sources):
                own = [name for name in wanted if again or (task.id, EXPERIMENTS[name][0]) not in there]
                if not again and "deletions" in own and forwards(chain, wanted) > AFFORDABLE:
                    own.remove("deletions")
                if own:
                    todo[task.id] = own
    return todo


def _make(opened: Reopened, todo: Mapping[str, Sequence[str]], effort: Effort, progress: Progress) -> None:
    import pyarrow as pa

    from probe.interventions.faithful import Faithful
    from probe.interventions.lens import answer_lens_rows, read_logit_rows
    from probe.interventions.rewritten import Rewritten

    run, model = opened.run, opened.model
    faithful = Faithful(model, opened.codec, opened.max_new_tokens("cot"))
    rewritten = Rewritten(faithful, effort)
    progress.log(f"running {len(todo)} chains of thought with parts hidden")
    progress.start(len(todo))
    table = run.reasoning(arrow=True)
    old = table.to_pylist()
    for number, (task_id, names) in enumerate(todo.items(), 1):
        task = run[task_id]
        chain = Chain(task.record)
        rows, tokens = chain_rows(chain, names, model) if {*names} & _CHANGES else ([], 0)
        if "read_logit" in names:
            rows += read_logit_rows(chain, task, model)
        if "answer_lens" in names:
            rows += answer_lens_rows(chain, task, model, opened.codec)
        rows += faithful.rows(chain, names)
        rows += rewritten.rows(chain, names)
        made = {*(["base"] if tokens else []), *(one for name in names for one in EXPERIMENTS[name])}
        old = [row for row in old if row["task_id"] != task_id or row["experiment"] not in made]
        old += [dict.fromkeys(table.column_names) | row | {"task_id": task_id} for row in rows]
        progress.done({"id": task_id, "status": "ok"}, tokens)
        if number % _WRITE == 0 or number == len(todo):
            run.write_reasoning(pa.Table.from_pylist(old, schema=table.schema))


# -- knock-outs and deletions --------------------------------------------------------------------------------------


def chain_rows(chain: Chain, names: Sequence[str], model: Model) -> tuple[list[Row], int]:
    """The rows of the unchanged reasoning and of its knock-outs and deletions; how many tokens were run.

    A change is one forward of what comes behind it, and each of its rows is unembedded once.
    """
    from probe.capture import Forced

    changes = list(_changes(chain, names))
    first = min([chain.n_prompt - 1, *(change.first for change in changes)])
    # The last token is never run: nothing was emitted from it.
    forced = Forced(model, chain.token_ids[:-1], first)
    unchanged = forced.emitted(first, chain.token_ids[first + 1 :])
    rows = list(_base(chain, unchanged, first))
    for change, hidden in zip(changes, forced.run([c.variant for c in changes]), strict=True):
        rows += _rows(chain, change, forced, hidden, unchanged)
    return rows, forced.tokens_run


def forwards(chain: Chain, names: Sequence[str]) -> float:
    """How many times the tokens of the whole sequence `chain_rows` will run."""
    run = sum(len(c.variant.token_ids) - c.variant.shared for c in _changes(chain, names))
    return 1 + run / (len(chain.token_ids) - 1)


@dataclass(frozen=True)
class _Change:
    experiment: str
    part: Part
    """The positions that are hidden or deleted."""
    readers: Mapping[str, Sequence[Part]]
    """source → who is behind it and behind the change"""
    variant: Variant
    first: int
    """The reference's position that the first row handed back stands for."""
    affected: int
    """From this position on rows are compared."""


def _changes(chain: Chain, names: Sequence[str]) -> Iterator[_Change]:
    for prefix, groups in (("", _own(chain)), ("random_", _random(chain))):
        for part, readers in groups:
            yield from _ways(chain, names, prefix, part, readers)


_Readers = dict[str, list[Part]]


def _own(chain: Chain) -> Iterator[tuple[Part, _Readers]]:
    for source in chain.sources:
        if readers := chain.readers(source):
            yield source, {source.label: readers}


def _random(chain: Chain) -> Iterator[tuple[Part, _Readers]]:
    found: dict[Part, _Readers] = {}
    for source in chain.sources:
        part = chain.elsewhere(source)
        readers = [] if part is None else [r for r in chain.readers(source) if r.start >= part.end]
        if part is not None and readers:
            found.setdefault(part, {})[source.label] = readers
    yield from found.items()


def _ways(
    chain: Chain, names: Sequence[str], prefix: str, part: Part, readers: _Readers
) -> Iterator[_Change]:
    from probe.capture import Variant

    ids, end = chain.token_ids[:-1], part.end
    if "knockouts" in names and end < len(ids):
        variant = Variant(ids, end, end, (Knockout(part.start, end, end),))
        yield _Change(f"{prefix}total", part, readers, variant, end, end)
    answer = chain.answer
    answered = {source: [answer] for source, own in readers.items() if answer and answer in own}
    if "knockouts" in names and answer and answered:
        row = max(answer.start - 1, end)
        if row < len(ids):
            variant = Variant(ids, row, row, (Knockout(part.start, end, row),))
            yield _Change(f"{prefix}direct", part, answered, variant, row, row)
    if "deletions" in names:
        # The row before the deleted part now emits what follows it.
        row = part.start - 1
        variant = Variant([*ids[: part.start], *ids[end:]], row, row)
        yield _Change(f"{prefix}deleted", part, readers, variant, end - 1, end)


def _base(chain: Chain, unchanged: Tensor, first: int) -> Iterator[Row]:
    for reader in [*chain.steps, *([chain.answer] if chain.answer else [])]:
        yield {
            "experiment": "base",
            "source": None,
            "reader": reader.label,
            "n_rows": reader.size,
            "log_prob": float(unchanged[reader.start - 1 - first : reader.end - 1 - first].sum()),
        }


def _rows(chain: Chain, change: _Change, forced: Forced, hidden: Tensor, unchanged: Tensor) -> Iterator[Row]:
    """One row a source and reader: the mean divergence over its rows behind the change, and its tokens' log P."""
    first = change.first
    last = max(reader.end for own in change.readers.values() for reader in own) - 1
    kl, emitted = forced.compare(hidden[: last - first], first, chain.token_ids[first + 1 : last + 1])
    for source, readers in change.readers.items():
        for reader in readers:
            low, high = max(reader.start - 1, change.affected), reader.end - 1
            if low >= high:
                continue
            # Rows before the change are the reference's.
            begin = max(reader.start - 1, first)
            before = unchanged[reader.start - 1 - forced.first : begin - forced.first].sum()
            yield {
                "experiment": change.experiment,
                "source": source,
                "start": change.part.start,
                "n_tokens": change.part.size,
                "reader": reader.label,
                "n_rows": high - low,
                "kl": float(kl[low - first : high - first].mean()),
                "log_prob": float(before + emitted[begin - first : high - first].sum()),
            }
