"""Prefixes that several prompts share, run once: which ones are worth it, and their keys, values and span sums.

A prefix is a run of token ids, measured on the rendered prompts. `plan_shared` decides for each job how many of
its tokens come from one; `Prefixes` keeps what a prefix left between batches. Where a job reads states of positions that it
shares, as a transcript does that another one continues, the prefix keeps these as well (`PrefixRows`).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.capture.prefill import PartResult
from probe.capture.spec import Job
from probe.model.cache import KVCache, RowMemory
from probe.prompts import Span

LEAST = 16
"""Tokens that a prefix must save: it is run in the pass of its prompts, so that it costs its copies alone."""
_BYTES = 1 << 30
_Key = tuple[tuple[int, ...], tuple[Span, ...], int]
"""Token ids, the spans over them and the first position whose states are kept: what a prefix is known by."""


def plan_shared(jobs: Sequence[Job]) -> list[int]:
    """Set `job.shared` of every job so that shared tokens are run once, and return an order to run jobs in.

    A prefix may extend another one. Every branch of the tree of common prefixes is worth keeping whose tokens
    times the runs that it saves reach LEAST. In the order returned a prefix comes before its extensions.
    """
    ids = [job.prompt.token_ids for job in jobs]
    limits = [job.shareable for job in jobs]
    # By what may be shared: a job that may share little must not stand between two that share much.
    order = sorted(range(len(jobs)), key=lambda index: ids[index][: limits[index]])
    common = [
        min(_common(ids[a], ids[b]), _cut_alike(jobs[a], jobs[b]), limits[a], limits[b])
        for a, b in zip(order, order[1:], strict=False)
    ]
    for job in jobs:
        job.shared, job.prefix_ends, job.prefix_rows = 0, (), ()
    waiting: list[tuple[list[int], list[int], int]] = [(order, common, 0)]
    while waiting:
        members, inside, run = waiting.pop()
        if len(members) < 2:
            continue
        least = min(inside)
        if (least - run) * (len(members) - 1) >= LEAST:
            rows = min(least, *(jobs[member].first_read for member in members))
            for member in members:
                jobs[member].shared = least
                jobs[member].prefix_ends += (least,)
                jobs[member].prefix_rows += (rows,)
            run = least
        waiting += [(part, within, run) for part, within in _split(members, inside, least)]
    return sorted(range(len(jobs)), key=lambda index: (ids[index][: jobs[index].shared], index))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix, by halving: comparing slices is quick."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _cut_alike(a: Job, b: Job) -> int:
    """Positions up to which spans of two jobs begin and end at the same places, whatever their labels are."""
    for ours, theirs in zip(_in_order(a.prompt.spans), _in_order(b.prompt.spans), strict=False):
        if ours.start != theirs.start:
            return min(ours.start, theirs.start)
        if ours.end != theirs.end:
            return min(ours.end, theirs.end)
    return min(len(a.prompt.token_ids), len(b.prompt.token_ids))


def _in_order(spans: Sequence[Span]) -> list[Span]:
    return sorted(spans, key=lambda span: span.start)


def _split(members: list[int], common: list[int], least: int) -> Iterator[tuple[list[int], list[int]]]:
    start = 0
    for index, length in enumerate([*common, least]):
        if length == least:
            yield members[start : index + 1], common[start:index]
            start = index + 1


@dataclass(frozen=True)
class PrefixRows:
    """States of the last positions of a prefix, from `first` on."""

    first: int
    states: dict[str, dict[int, Tensor]]
    """recorded state → layer → [row, …]"""
    hidden: Tensor
    """[row, d_model], final-normed"""

    @classmethod
    def of(cls, first: int, result: PartResult, below: PrefixRows | None) -> PrefixRows:
        """What a part that was run left, behind what the prefix that it continues has of these positions."""
        if below is not None:
            below.lead(result, first, first)
        states = {
            name: {layer: torch.cat(runs) for layer, runs in by_layer.items()}
            for name, by_layer in result.states.items()
        }
        return cls(first, states, torch.cat(result.hidden))

    def lead(self, result: PartResult, first_row: int, first_hidden: int) -> None:
        """Put the states from `first_row` and the final ones from `first_hidden` on before those of a part that continues the
        prefix."""
        if len(rows := self.hidden[max(first_hidden - self.first, 0) :]):
            result.hidden.insert(0, rows)
        for name, by_layer in self.states.items():
            for layer, states in by_layer.items():
                result.states.setdefault(name, {}).setdefault(layer, []).insert(
                    0, states[max(first_row - self.first, 0) :]
                )

    @property
    def nbytes(self) -> int:
        kept = [states for by_layer in self.states.values() for states in by_layer.values()]
        return self.hidden.nbytes + sum(states.nbytes for states in kept)


@dataclass
class _CachedPrefix:
    memory: RowMemory
    span_sums: dict[int, Tensor]
    """layer → [span, d_model], float32"""
    rows: PrefixRows | None = None
    """None: no job reads a position of it."""

    @property
    def size(self) -> int:
        sums = sum(sums.nbytes for sums in self.span_sums.values())
        return self.memory.nbytes + sums + (self.rows.nbytes if self.rows else 0)


def cut(spans: Sequence[Span], length: int) -> tuple[Span, ...]:
    """Where the spans of the first `length` positions begin and end, in order and each by itself: another prompt may have other
    labels there."""
    return tuple(
        Span(str(number), span.start, min(span.end, length))
        for number, span in enumerate(_in_order(spans))
        if span.start < length
    )


def labels_of(spans: Sequence[Span], n_spans: int) -> list[str]:
    """Labels of the first spans of a prompt, as `cut` numbers them."""
    return [span.label for span in _in_order(spans)[:n_spans]]


@dataclass
class Prefix:
    """A prefix that a batch needs: held already, or run in the batch's own prefill."""

    ids: tuple[int, ...]
    spans: tuple[Span, ...]
    first: int
    """First position whose states are kept; its end: none are."""
    entry: _CachedPrefix | None = None
    """What it left; None until it has run."""
    below: Prefix | None = None
    """The longest other prefix that it continues."""
    over: bool = False
    """Whether no later batch needs it."""

    @property
    def start(self) -> int:
        """Tokens that need not be run for it."""
        return len(self.below.ids) if self.below else 0

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(span.label for span in self.spans))


class Prefixes:
    """What shared prefixes left in a model. One that no expected job goes through any more is dropped at once; of
    the others the least recently used are, beyond `limit` bytes."""

    def __init__(self, limit: int = _BYTES, bytes_of: Callable[[int], int] | None = None):
        """`bytes_of` a prefix of so many tokens is what it counts for; None: what it takes. States that it keeps count beside it."""
        self._limit, self._bytes_of = limit, bytes_of
        self.bytes_of_row = 0
        """Bytes of the states of one position that a prefix keeps (`Capturer`)."""
        self._held: OrderedDict[_Key, Prefix] = OrderedDict()
        self._lengths: Counter[tuple[int, int]] = Counter()
        """How many held prefixes have a length and a first position whose states they keep."""
        self._expected: Counter[_Key] = Counter()
        """How many jobs that are still to come go through a prefix."""
        self.size = 0
        """Bytes held."""
        self.tokens_run = 0
        """Prompt tokens computed for prefixes so far."""

    def expect(self, jobs: Sequence[Job]) -> None:
        """These jobs, as `plan_shared` left them, will each be run once."""
        self._expected.update(key for job in jobs for key in _keys(job))

    def needs(self, batches: Sequence[Sequence[Job]]) -> list[set[int]]:
        """Of each batch the earlier ones in whose prefill a prefix is run that it continues, if all run in this order."""
        rehearsal = Prefixes(self._limit, self._bytes_of)
        rehearsal.bytes_of_row = self.bytes_of_row
        rehearsal.expect([job for jobs in batches for job in jobs])
        makers: dict[int, tuple[int, Prefix]] = {}
        needs: list[set[int]] = []
        for number, jobs in enumerate(batches):
            prefixes, new = rehearsal.find(jobs)
            continued = [*filter(None, prefixes), *(prefix.below for prefix in new if prefix.below)]
            needs.append({makers[id(prefix)][0] for prefix in continued if id(prefix) in makers})
            makers |= {id(prefix): (number, prefix) for prefix in new}
            for prefix in new:
                rehearsal.hold(prefix)
        return needs

    def skip(self, jobs: Sequence[Job]) -> None:
        """As if these jobs had been run: what they would have left is held, but empty."""
        for prefix in self.find(jobs)[1]:
            self.hold(prefix)

    def find(self, jobs: Sequence[Job], again: bool = False) -> tuple[list[Prefix | None], list[Prefix]]:
        """The prefix of each job, None where nothing is shared, and those that are still to be run.

        Of the latter none comes before one that it continues. `again`: these jobs have been here before.
        """
        new: dict[_Key, Prefix] = {}
        prefixes: list[Prefix | None] = []
        by_job = [_keys(job) for job in jobs]
        needed = {keys[-1] for keys in by_job if keys} - self._held.keys()
        keys = {key for keys in by_job if keys and keys[-1] in needed for key in keys}
        for key in sorted(keys - self._held.keys(), key=lambda key: len(key[0])):
            new[key] = Prefix(*key)
            new[key].below = self._longest(key, new)
        for of_job in by_job:
            key = of_job[-1] if of_job else None
            if key in self._held:
                self._held.move_to_end(key)
            prefixes.append(None if key is None else self._held.get(key) or new[key])
        if again:
            for key, prefix in new.items():
                prefix.over = key not in self._expected
        elif self._expected:
            for of_job in by_job:
                for key in of_job:
                    self._pass(key, new)
        return prefixes, list(new.values())

    def keep(self, prefix: Prefix, cache: KVCache, row: int, result: PartResult) -> None:
        """What a prefix left in a row of the cache, and beside it: `result`, of what was run for it."""
        below = prefix.below.entry if prefix.below is not None else None
        if below is not None:
            for layer, sums in below.span_sums.items():
                result.span_sums[layer][: len(sums)] += sums
        rows = None
        if prefix.first < len(prefix.ids):
            rows = PrefixRows.of(prefix.first, result, below.rows if below is not None else None)
        prefix.entry = _CachedPrefix(cache.take(row, len(prefix.ids)), result.span_sums, rows)
        self.tokens_run += len(prefix.ids) - prefix.start
        self.hold(prefix)

    def hold(self, prefix: Prefix) -> None:
        """Hold a new prefix as long as a later batch needs it."""
        # What it continues is not needed through it any more.
        prefix.below = None
        if prefix.over:
            return
        self._held[prefix.ids, prefix.spans, prefix.first] = prefix
        self._lengths[len(prefix.ids), prefix.first] += 1
        self.size += self._weight(prefix)
        while self.size > self._limit and len(self._held) > 1:
            self._drop(next(iter(self._held)))

    def _weight(self, prefix: Prefix) -> int:
        if self._bytes_of is not None:
            kept = len(prefix.ids) - prefix.first
            return self._bytes_of(len(prefix.ids)) + kept * self.bytes_of_row
        return prefix.entry.size if prefix.entry else 0

    def clear(self) -> None:
        """Nothing that is held will be needed."""
        for key in list(self._held):
            self._drop(key)

    def _pass(self, key: _Key, new: Mapping[_Key, Prefix]) -> None:
        """One of the jobs that were expected to go through a prefix does so now."""
        if key not in self._expected:
            return
        self._expected[key] -= 1
        if self._expected[key]:
            return
        del self._expected[key]
        if key in new:
            new[key].over = True
        elif key in self._held:
            self._drop(key)

    def _drop(self, key: _Key) -> None:
        self.size -= self._weight(self._held.pop(key))
        self._lengths[len(key[0]), key[2]] -= 1
        self._lengths += Counter()  # lengths that none has any more go

    def _longest(self, key: _Key, new: Mapping[_Key, Prefix]) -> Prefix | None:
        """The longest that a prefix continues, with spans that are its own cut at that length."""
        ids, spans, first = key
        kept = {*self._lengths, *((len(other[0]), other[2]) for other in new)}
        for length, first_kept in sorted((of for of in kept if of[0] < len(ids)), reverse=True):
            shorter = ids[:length], cut(spans, length), first_kept
            if first_kept <= min(first, length) and (shorter in self._held or shorter in new):
                return self._held.get(shorter) or new[shorter]
        return None


def _keys(job: Job) -> list[_Key]:
    """Of each prefix that a job goes through, the longest last."""
    ids, spans = job.prompt.token_ids, job.prompt.spans
    return [
        (tuple(ids[:end]), cut(spans, end), first)
        for end, first in zip(job.prefix_ends, job.prefix_rows, strict=True)
    ]
