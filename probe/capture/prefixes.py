"""Prefixes that several prompts share, run once: which ones are worth it, and their keys, values and span sums.

A prefix is a run of token ids, measured on the rendered prompts. `plan_shared` decides for each job how many of
its tokens come from one; `Prefixes` keeps what a prefix left between batches.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from probe.capture.spec import Job
from probe.model.cache import KVCache, RowMemory
from probe.prompts import Span

LEAST = 16
"""Tokens that a prefix must save: it is run in the pass of its prompts, so that it costs its copies alone."""
_BYTES = 1 << 30
_Key = tuple[tuple[int, ...], tuple[Span, ...]]
"""Token ids and the spans over them: what a prefix is known by."""


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
        min(_common(ids[a], ids[b]), limits[a], limits[b]) for a, b in zip(order, order[1:], strict=False)
    ]
    for job in jobs:
        job.shared, job.prefix_ends = 0, ()
    waiting: list[tuple[list[int], list[int], int]] = [(order, common, 0)]
    while waiting:
        members, inside, run = waiting.pop()
        if len(members) < 2:
            continue
        least = min(inside)
        if (least - run) * (len(members) - 1) >= LEAST:
            for member in members:
                jobs[member].shared = least
                jobs[member].prefix_ends += (least,)
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


def _split(members: list[int], common: list[int], least: int) -> Iterator[tuple[list[int], list[int]]]:
    start = 0
    for index, length in enumerate([*common, least]):
        if length == least:
            yield members[start : index + 1], common[start:index]
            start = index + 1


@dataclass
class _CachedPrefix:
    memory: RowMemory
    span_sums: dict[int, Tensor]
    """layer → [label, d_model], float32"""

    @property
    def size(self) -> int:
        return self.memory.nbytes + sum(sums.nbytes for sums in self.span_sums.values())


def cut(spans: Sequence[Span], length: int) -> tuple[Span, ...]:
    """The spans of the first `length` positions."""
    return tuple(Span(s.label, s.start, min(s.end, length)) for s in spans if s.start < length)


@dataclass
class Prefix:
    """A prefix that a batch needs: held already, or run in the batch's own prefill."""

    ids: tuple[int, ...]
    spans: tuple[Span, ...]
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
        """`bytes_of` a prefix of so many tokens is what it counts for; None: what it takes."""
        self._limit, self._bytes_of = limit, bytes_of
        self._held: OrderedDict[_Key, Prefix] = OrderedDict()
        self._lengths: Counter[int] = Counter()
        """How many held prefixes have a length."""
        self._expected: Counter[_Key] = Counter()
        """How many jobs that are still to come go through a prefix."""
        self.size = 0
        """Bytes held."""
        self.tokens_run = 0
        """Prompt tokens computed for prefixes so far."""

    def expect(self, jobs: Sequence[Job]) -> None:
        """These jobs, as `plan_shared` left them, will each be run once."""
        self._expected.update(_key(job, end) for job in jobs for end in job.prefix_ends)

    def needs(self, batches: Sequence[Sequence[Job]]) -> list[set[int]]:
        """Of each batch the earlier ones in whose prefill a prefix is run that it continues, if all run in this order."""
        rehearsal = Prefixes(self._limit, self._bytes_of)
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
        needed = {_key(job, job.shared) for job in jobs if job.shared} - self._held.keys()
        keys = needed | {
            _key(job, end) for job in jobs if _key(job, job.shared) in needed for end in job.prefix_ends
        }
        for key in sorted(keys - self._held.keys(), key=lambda key: len(key[0])):
            new[key] = Prefix(*key)
            new[key].below = self._longest(key, new)
        for job in jobs:
            key = _key(job, job.shared)
            if key in self._held:
                self._held.move_to_end(key)
            prefixes.append((self._held.get(key) or new[key]) if job.shared else None)
        if again:
            for key, prefix in new.items():
                prefix.over = key not in self._expected
        elif self._expected:
            for job in jobs:
                for end in job.prefix_ends:
                    self._pass(_key(job, end), new)
        return prefixes, list(new.values())

    def keep(self, prefix: Prefix, cache: KVCache, row: int, span_sums: dict[int, Tensor]) -> None:
        """What a prefix left in a row of the cache; span sums [label, d_model] by layer, of what was run for it."""
        if prefix.below is not None and prefix.below.entry is not None:
            for layer, sums in prefix.below.entry.span_sums.items():
                span_sums[layer][: len(sums)] += sums
        prefix.entry = _CachedPrefix(cache.take(row, len(prefix.ids)), span_sums)
        self.tokens_run += len(prefix.ids) - prefix.start
        self.hold(prefix)

    def hold(self, prefix: Prefix) -> None:
        """Hold a new prefix as long as a later batch needs it."""
        # What it continues is not needed through it any more.
        prefix.below = None
        if prefix.over:
            return
        self._held[prefix.ids, prefix.spans] = prefix
        self._lengths[len(prefix.ids)] += 1
        self.size += self._weight(prefix)
        while self.size > self._limit and len(self._held) > 1:
            self._drop(next(iter(self._held)))

    def _weight(self, prefix: Prefix) -> int:
        if self._bytes_of is not None:
            return self._bytes_of(len(prefix.ids))
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
        self._lengths[len(key[0])] -= 1
        self._lengths += Counter()  # lengths that none has any more go

    def _longest(self, key: _Key, new: Mapping[_Key, Prefix]) -> Prefix | None:
        """The longest that a prefix continues, with spans that are its own cut at that length."""
        ids, spans = key
        lengths = {*self._lengths, *(len(other) for other, _ in new)}
        for length in sorted((length for length in lengths if length < len(ids)), reverse=True):
            shorter = ids[:length], cut(spans, length)
            if shorter in self._held or shorter in new:
                return self._held.get(shorter) or new[shorter]
        return None


def _key(job: Job, end: int) -> _Key:
    return tuple(job.prompt.token_ids[:end]), cut(job.prompt.spans, end)
