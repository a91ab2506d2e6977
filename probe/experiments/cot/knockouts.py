"""Knock-outs and deletions of parts of a reasoning, each beside the same change of a random span.

A part is hidden from attention (its keys are not seen), from recurrent layers (their state goes over it unchanged), or from
both; never from one kind of layer by asking for the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from probe.experiments.registry import EXPERIMENTS, experiment
from probe.model.edits import Edit, Knockout, StateKnockout
from probe.prompts.labels import UNCHANGED
from probe.runs.records import Span
from probe.runs.views.chain import Chain

if TYPE_CHECKING:
    from torch import Tensor

    from probe.capture import Continuation, Reference
    from probe.experiments.cot.chain_bench import ChainBench, Row
    from probe.model.hooked import Model
    from probe.runs import TaskRun


def _changed(bench: ChainBench, chain: Chain, _task: TaskRun, names: Sequence[str]) -> tuple[list[Row], int]:
    return chain_rows(chain, names, bench.model)


experiment(
    "cot",
    "knockouts",
    requires="attention",
    changes="`total`: no position behind the source sees its keys, in all layers with attention. `direct`: only the rows that "
    "emit the answer do not",
    asks="What would have followed had it not been written, later steps computed anew? Does the answer read the source "
    "itself?",
    cost="one forward of what comes behind each source, and of a random mask of the same length",
    deciding=True,
    rows=("total", "direct", "random_total", "random_direct"),
)(_changed)
experiment(
    "cot",
    "state_knockouts",
    requires="state",
    changes="`state_total`: behind the source the state of recurrent layers is what it was before it. `state_direct`: only for "
    "the rows that emit the answer is what the source did to it left out",
    asks="The same of layers whose memory is a state. Attention sees what it saw.",
    cost="as knockouts",
    deciding=True,
    rows=("state_total", "state_direct", "random_state_total", "random_state_direct"),
)(_changed)
experiment(
    "cot",
    "joint_knockouts",
    requires="hybrid",
    changes="`both_total`, `both_direct`: the source is hidden from attention and left out of recurrent states at once",
    asks="Does the one memory make up for the other?",
    cost="as knockouts",
    deciding=True,
    rows=("both_total", "both_direct", "random_both_total", "random_both_direct"),
)(_changed)
experiment(
    "cot",
    "deletions",
    changes="`deleted`: the source's tokens are not there: as `total`, but positions move up as well",
    cost="as knockouts; by default left out where everything together passes 40 forwards",
    rows=("deleted", "random_deleted"),
)(_changed)


CHANGES = ("knockouts", "state_knockouts", "joint_knockouts", "deletions")
"""Experiments that hide or delete parts of a reasoning."""


def chain_rows(chain: Chain, names: Sequence[str], model: Model) -> tuple[list[Row], int]:
    """The rows of the unchanged reasoning and of its knock-outs and deletions; how many tokens were run.

    A change is one forward of what comes behind it, and each of its rows is unembedded once.
    """
    from probe.capture import Reference

    changes = list(_changes(chain, names))
    first = min([chain.n_prompt - 1, *(change.first for change in changes)])
    # The last token is never run: nothing was emitted from it.
    forced = Reference(model, chain.token_ids[:-1], first)
    unchanged = forced.emitted(first, chain.token_ids[first + 1 :])
    rows = list(_base(chain, unchanged, first))
    for change, hidden in zip(changes, forced.run([c.variant for c in changes]), strict=True):
        rows += _rows(chain, change, forced, hidden, unchanged)
    return rows, forced.tokens_run


def forwards(chain: Chain, names: Sequence[str]) -> float:
    """How many times `chain_rows` will run the tokens of the whole sequence."""
    run = sum(len(c.variant.token_ids) - c.variant.shared for c in _changes(chain, names))
    return 1 + run / (len(chain.token_ids) - 1)


def n_changes(chain: Chain, names: Sequence[str]) -> int:
    """How many changes of a chain `chain_rows` will run."""
    return sum(1 for _ in _changes(chain, names))


@dataclass(frozen=True)
class _Change:
    experiment: str
    part: Span
    """The positions that are masked or deleted."""
    readers: Mapping[str, Sequence[Span]]
    """Source → readers behind it and behind the change."""
    variant: Continuation
    first: int
    """The reference's position that the first row handed back stands for."""
    affected: int
    """First position whose row is compared."""


def _changes(chain: Chain, names: Sequence[str]) -> Iterator[_Change]:
    for prefix, groups in (("", _sources(chain)), ("random_", _controls(chain))):
        for part, readers in groups:
            yield from _ways(chain, names, prefix, part, readers)


_Readers = dict[str, list[Span]]


def _sources(chain: Chain) -> Iterator[tuple[Span, _Readers]]:
    for source in chain.sources:
        if readers := chain.readers(source):
            yield source, {source.label: readers}


def _controls(chain: Chain) -> Iterator[tuple[Span, _Readers]]:
    readers_of: dict[Span, _Readers] = {}
    for source in chain.sources:
        part = chain.elsewhere(source)
        readers = [] if part is None else [r for r in chain.readers(source) if r.start >= part.end]
        if part is not None and readers:
            readers_of.setdefault(part, {})[source.label] = readers
    yield from readers_of.items()


def _ways(
    chain: Chain, names: Sequence[str], prefix: str, part: Span, readers: _Readers
) -> Iterator[_Change]:
    from probe.capture import Continuation

    ids, end = chain.token_ids[:-1], part.end
    answer = chain.answer
    answered = {source: [answer] for source, parts in readers.items() if answer and answer in parts}
    for kind in (name for name in CHANGES[:3] if name in names):
        total, direct = EXPERIMENTS[kind].rows[:2]
        if end < len(ids):
            variant = Continuation(ids, end, end, _hidden(kind, part, end))
            yield _Change(f"{prefix}{total}", part, readers, variant, end, end)
        if answer and answered and (row := max(answer.start - 1, end)) < len(ids):
            variant = Continuation(ids, row, row, _hidden(kind, part, row))
            yield _Change(f"{prefix}{direct}", part, answered, variant, row, row)
    if "deletions" in names:
        # The row before the deleted part now emits what follows it.
        row = part.start - 1
        variant = Continuation([*ids[: part.start], *ids[end:]], row, row)
        yield _Change(f"{prefix}deleted", part, readers, variant, end - 1, end)


def _hidden(kind: str, part: Span, rows_from: int) -> tuple[Edit, ...]:
    """A part hidden from all that follows `rows_from`, in the kinds of layers that an experiment is about."""
    keys = Knockout(part.start, part.end, rows_from)
    update = StateKnockout(part.start, part.end, rows_from)
    return {"knockouts": (keys,), "state_knockouts": (update,), "joint_knockouts": (keys, update)}[kind]


def _base(chain: Chain, unchanged: Tensor, first: int) -> Iterator[Row]:
    for reader in [*chain.steps, *([chain.answer] if chain.answer else [])]:
        yield {
            "experiment": UNCHANGED,
            "source": None,
            "reader": reader.label,
            "n_rows": reader.length,
            "log_prob": float(unchanged[reader.start - 1 - first : reader.end - 1 - first].sum()),
        }


def _rows(
    chain: Chain, change: _Change, forced: Reference, hidden: Tensor, unchanged: Tensor
) -> Iterator[Row]:
    """One row a source and reader: the mean divergence over its rows behind the change, and its tokens' log P."""
    first = change.first
    last = max(reader.end for parts in change.readers.values() for reader in parts) - 1
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
                "n_tokens": change.part.length,
                "reader": reader.label,
                "n_rows": high - low,
                "kl": float(kl[low - first : high - first].mean()),
                "log_prob": float(before + emitted[begin - first : high - first].sum()),
            }
