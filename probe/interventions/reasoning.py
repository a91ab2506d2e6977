"""Running a run's chains of thought again with one part hidden, deleted or replaced: the proof beside the reads.

Tokens are the run's own, never tokenised again. Sources are the question and each step; readers are the later
steps and the answer. Experiments by the name under which they are asked for:

knockouts      `total`: no position behind the source sees its keys, in all layers; later positions are computed
               anew, as if it had never been written. `direct`: only the rows that emit the answer do not see it;
               what later steps copied from it stays.
deletions      `deleted`: the source's tokens are not there, so what follows moves up. Positions change as well.
early_answer, filler, mistake: `probe.interventions.faithful`

Beside each of the first two stands the same done to a random run of as many positions (`random_total`, …),
somewhere between the sink and the answer, that shares none with the source.

Columns of reasoning.parquet: `source` the label acted upon (null: `base`, nothing changed); `start`, `n_tokens`
the positions that are hidden or deleted; `kept` how many steps are kept; `n_rows` over how many rows `kl` is a
mean: those of the reader's rows that lie behind the change; `kl` = KL(base‖changed) over the whole vocabulary,
nats; `log_prob` = Σ log P of the reader's own tokens, nats; `said` what the model answers instead, `same` whether
that is the run's answer, `score` whether it is the right one.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from probe.model.edits import Knockout

if TYPE_CHECKING:
    from probe.capture import Forced, Variant
    from probe.interventions.conditions import Effort
    from probe.interventions.reopened import Reopened
    from probe.model.hooked import Model
    from probe.runner import Progress
    from probe.store import Run

EXPERIMENTS: dict[str, tuple[str, ...]] = {
    "knockouts": ("total", "direct", "random_total", "random_direct"),
    "deletions": ("deleted", "random_deleted"),
    "early_answer": ("early_answer",),
    "filler": ("filler",),
    "mistake": ("mistake",),
}
"""By the name under which they are asked for: the experiments of the table."""
ASKED = frozenset({"early_answer", "filler", "mistake"})
"""Made only where they are named: they decode, and answer another question."""
ANSWER = "answer"
QUESTION = "question"
_WRITE = 8

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
        """A random run of as many positions that shares none with the source; fixed by task and source."""
        size = source.size
        starts = [*range(1, source.start - size + 1), *range(source.end, self.limit - size + 1)]
        if not starts:
            return None
        words = json.dumps([self.record["id"], source.label])
        draw = random.Random(hashlib.blake2b(words.encode(), digest_size=8).digest())
        start = draw.choice(starts)
        return Part("random", start, start + size)


def make(
    opened: Reopened, wanted: Sequence[str], *, again: bool, effort: Effort, progress: Progress
) -> list[str]:
    """Make what is missing of the wanted experiments, or all of them again; returns what was made."""
    todo = _missing(opened.run, wanted, again=again)
    if todo:
        _make(opened, todo, progress)
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
                if own:
                    todo[task.id] = own
    return todo


def _make(opened: Reopened, todo: Mapping[str, Sequence[str]], progress: Progress) -> None:
    import pyarrow as pa

    from probe.interventions.faithful import Faithful

    run, model = opened.run, opened.model
    faithful = Faithful(model, opened.codec, opened.max_new_tokens("cot"))
    progress.log(f"running {len(todo)} chains of thought with parts hidden")
    progress.start(len(todo))
    table = run.reasoning(arrow=True)
    old = table.to_pylist()
    for number, (task_id, names) in enumerate(todo.items(), 1):
        chain = Chain(run[task_id].record)
        rows, tokens = chain_rows(chain, names, model)
        rows += faithful.rows(chain, names)
        made = {"base", *(one for name in names for one in EXPERIMENTS[name])}
        old = [row for row in old if row["task_id"] != task_id or row["experiment"] not in made]
        old += [dict.fromkeys(table.column_names) | row | {"task_id": task_id} for row in rows]
        progress.done({"id": task_id, "status": "ok"}, tokens)
        if number % _WRITE == 0 or number == len(todo):
            run.write_reasoning(pa.Table.from_pylist(old, schema=table.schema))


# -- knock-outs and deletions --------------------------------------------------------------------------------------


def chain_rows(chain: Chain, names: Sequence[str], model: Model) -> tuple[list[Row], int]:
    """The rows of the unchanged reasoning and of its knock-outs and deletions; how many tokens were run.

    A change is one forward of what comes behind it.
    """
    from probe.capture import Forced

    changes = list(_changes(chain, names))
    first = min([change.first for change in changes], default=chain.n_prompt - 1)
    # The last token is never run: nothing was emitted from it.
    forced = Forced(model, chain.token_ids[:-1], min(first, chain.n_prompt - 1))
    rows = list(_base(chain, forced))
    for change, hidden in zip(changes, forced.run([c.variant for c in changes]), strict=True):
        rows += _rows(chain, change, forced, hidden)
    return rows, forced.tokens_run


@dataclass(frozen=True)
class _Change:
    experiment: str
    source: str
    part: Part
    """The positions that are hidden or deleted."""
    readers: Sequence[Part]
    variant: Variant
    first: int
    """The reference's position that the first row handed back stands for."""
    affected: int
    """From this position on rows are compared."""


def _changes(chain: Chain, names: Sequence[str]) -> Iterator[_Change]:
    from probe.capture import Variant

    ids = chain.token_ids[:-1]
    for source in chain.sources:
        if not chain.readers(source):
            continue
        for prefix, part in (("", source), ("random_", chain.elsewhere(source))):
            readers = [] if part is None else [r for r in chain.readers(source) if r.start >= part.end]
            if part is None or not readers:
                continue
            end = part.end
            if "knockouts" in names and end < len(ids):
                variant = Variant(ids, end, end, (Knockout(part.start, end, end),))
                yield _Change(f"{prefix}total", source.label, part, readers, variant, end, end)
            if "knockouts" in names and chain.answer and chain.answer in readers:
                row = max(chain.answer.start - 1, end)
                if row < len(ids):
                    variant = Variant(ids, row, row, (Knockout(part.start, end, row),))
                    yield _Change(f"{prefix}direct", source.label, part, [chain.answer], variant, row, row)
            if "deletions" in names:
                # The row before the deleted part now emits what follows it.
                row = part.start - 1
                variant = Variant([*ids[: part.start], *ids[end:]], row, row)
                yield _Change(f"{prefix}deleted", source.label, part, readers, variant, end - 1, end)


def _base(chain: Chain, forced: Forced) -> Iterator[Row]:
    readers = [*chain.steps, *([chain.answer] if chain.answer else [])]
    for reader in readers:
        log_prob = _log_prob(chain, reader, forced, forced.hidden, forced.first, reader.start)
        yield {
            "experiment": "base",
            "source": None,
            "reader": reader.label,
            "n_rows": reader.size,
            "log_prob": log_prob,
        }


def _rows(chain: Chain, change: _Change, forced: Forced, hidden: Any) -> Iterator[Row]:
    """One row a reader: the mean divergence over its rows behind the change, and its own tokens' log P."""
    for reader in change.readers:
        low, high = max(reader.start - 1, change.affected), reader.end - 1
        if low >= high:
            continue
        kl = forced.divergences(hidden[low - change.first : high - change.first], low)
        begin = max(reader.start, change.first + 1)
        log_prob = _log_prob(chain, reader, forced, hidden, change.first, begin)
        yield {
            "experiment": change.experiment,
            "source": change.source,
            "start": change.part.start,
            "n_tokens": change.part.size,
            "reader": reader.label,
            "n_rows": high - low,
            "kl": float(kl.mean()),
            "log_prob": log_prob,
        }


def _log_prob(chain: Chain, reader: Part, forced: Forced, hidden: Any, first: int, begin: int) -> float:
    """Σ log P of a reader's tokens: from position `begin` on under `hidden`, whose row 0 is position `first`;
    those before it come from rows that nothing changed."""
    from probe.capture import token_log_probs

    def total(states: Any, states_first: int, start: int, end: int) -> float:
        rows = states[start - 1 - states_first : end - 1 - states_first]
        return sum(token_log_probs(forced.model, rows, chain.token_ids[start:end])[0])

    unchanged = total(forced.hidden, forced.first, reader.start, begin) if begin > reader.start else 0.0
    return unchanged + total(hidden, first, begin, reader.end)
