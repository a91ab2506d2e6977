"""Prefixes that several prompts share, run once: which ones are worth it, and their keys, values and span sums.

A prefix is a run of token ids, measured on the rendered prompts. `plan_shared` decides for each job how many of
its tokens come from one; `Prefixes` keeps what a prefix left between batches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from probe.capture.prefill import Part, prefill
from probe.capture.spec import Job
from probe.model.attention import KVCache, Recorder
from probe.model.hooked import Model
from probe.prompts import Span

LEAST = 32
"""Tokens below which sharing saves less than copying and an uneven batch cost."""
_WORTH = 64
"""Tokens that a pass of its own must save: one of few tokens takes as long as 40 tokens of a full one."""
_GRAIN = 16
_BYTES = 1 << 30


def plan_shared(jobs: Sequence[Job]) -> None:
    """Set `job.shared` of every job so that the most prompt tokens are saved.

    Prompts in order form a tree of common prefixes; in each branch either its own prefix is shared by all, or
    parts of it share longer ones. Lengths are compared in steps of a few tokens, which bounds the depth.
    """
    ids = [job.prompt.token_ids for job in jobs]
    limits = [job.shareable for job in jobs]
    order = sorted(range(len(jobs)), key=lambda index: ids[index])
    common = [
        min(_common(ids[a], ids[b]), limits[a], limits[b]) for a, b in zip(order, order[1:], strict=False)
    ]
    for job in jobs:
        job.shared = 0
    _, groups = _best(order, [length - length % _GRAIN for length in common])
    for length, members in groups:
        exact = min(
            [limits[m] for m in members] + [_common(ids[members[0]], ids[other]) for other in members[1:]]
        )
        for member in members:
            jobs[member].shared = exact if length >= LEAST else 0


def plan_nested(jobs: Sequence[Job]) -> list[int]:
    """Set `job.shared` for jobs that are variations of few prompts, and return an order to run them in.

    A prefix may extend another one: `Prefixes` continues from the longest that it holds. So every branch of the
    tree of common prefixes is worth running once whose tokens times the runs it saves reach _WORTH, and an order
    in which a prefix comes before its extensions finds the shorter one there.
    """
    ids = [job.prompt.token_ids for job in jobs]
    limits = [job.shareable for job in jobs]
    order = sorted(range(len(jobs)), key=lambda index: (ids[index], limits[index]))
    common = [
        min(_common(ids[a], ids[b]), limits[a], limits[b]) for a, b in zip(order, order[1:], strict=False)
    ]
    for job in jobs:
        job.shared = 0
    waiting: list[tuple[list[int], list[int], int]] = [(order, common, 0)]
    while waiting:
        members, inside, run = waiting.pop()
        if len(members) < 2:
            continue
        least = min(inside)
        if (least - run) * (len(members) - 1) >= _WORTH:
            for member in members:
                jobs[member].shared = least
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


def _best(members: list[int], common: list[int]) -> tuple[int, list[tuple[int, list[int]]]]:
    """(tokens saved, groups) of members in order; common[i] is what members i and i + 1 share."""
    if len(members) < 2:
        return 0, []
    least = min(common)
    if least >= LEAST and max(common) == least:
        return least * (len(members) - 1), [(least, members)]
    worth = least if least >= LEAST else 0
    saved, groups = 0, []
    pool, pool_saved, pool_groups = [], 0, []
    for part, inside in _split(members, common, least):
        own, own_groups = _best(part, inside)
        if own < worth * len(part):
            pool, pool_saved, pool_groups = pool + part, pool_saved + own, pool_groups + own_groups
        else:
            saved, groups = saved + own, groups + own_groups
    if worth * (len(pool) - 1) > pool_saved:
        return saved + worth * (len(pool) - 1), [*groups, (least, pool)]
    return saved + pool_saved, groups + pool_groups


def _split(members: list[int], common: list[int], least: int) -> Iterator[tuple[list[int], list[int]]]:
    start = 0
    for index, length in enumerate([*common, least]):
        if length == least:
            yield members[start : index + 1], common[start:index]
            start = index + 1


@dataclass
class _Entry:
    keys: dict[int, Tensor]
    """layer → [kv_head, position, d_head]"""
    values: dict[int, Tensor]
    span_sums: dict[int, Tensor]
    """layer → [label, d_model], float32"""
    labels: list[str]

    @property
    def size(self) -> int:
        return sum(
            tensor.nbytes for store in (self.keys, self.values, self.span_sums) for tensor in store.values()
        )


def cut(spans: Sequence[Span], length: int) -> tuple[Span, ...]:
    """The spans of the first `length` positions."""
    return tuple(Span(s.label, s.start, min(s.end, length)) for s in spans if s.start < length)


class Prefixes:
    """What shared prefixes left in a model, the least recently used dropped beyond `limit` bytes."""

    def __init__(self, model: Model, recorder: Recorder, *, spans: bool, limit: int = _BYTES):
        self._model, self._recorder, self._spans, self._limit = model, recorder, spans, limit
        self._entries: OrderedDict[tuple, _Entry] = OrderedDict()
        self.tokens_run = 0
        """Prompt tokens computed for prefixes so far."""

    def load(self, job: Job, cache: KVCache, row: int) -> tuple[list[str], dict[int, Tensor]]:
        """Put the job's prefix into a row of the cache, run it first where that never happened.

        Returns its labels and, per layer, the sum of the residual stream over each, [label, d_model].
        """
        entry = self._find(job)
        for layer in entry.keys:
            cache.fill(layer, row, entry.keys[layer], entry.values[layer])
        return entry.labels, entry.span_sums

    def _find(self, job: Job) -> _Entry:
        ids = tuple(job.prompt.token_ids[: job.shared])
        spans = cut(job.prompt.spans, job.shared)
        key = (ids, spans)
        if key not in self._entries:
            entry = self._run(ids, spans)
            size = entry.size + sum(kept.size for kept in self._entries.values())
            while self._entries and size > self._limit:
                size -= self._entries.popitem(last=False)[1].size
            self._entries[key] = entry
        self._entries.move_to_end(key)
        return self._entries[key]

    def _longest(self, ids: tuple[int, ...], spans: tuple[Span, ...]) -> tuple[int, _Entry | None]:
        """The longest prefix held that these tokens extend, with spans that are theirs cut at its end."""
        best, found = 0, None
        for (own, own_spans), entry in self._entries.items():
            if best < len(own) < len(ids) and ids[: len(own)] == own and own_spans == cut(spans, len(own)):
                best, found = len(own), entry
        return best, found

    def _run(self, ids: tuple[int, ...], spans: tuple[Span, ...]) -> _Entry:
        labels = list(dict.fromkeys(span.label for span in spans))
        cache = KVCache(1, len(ids))
        start, held = self._longest(ids, spans)
        if held:
            for layer in held.keys:
                cache.fill(layer, 0, held.keys[layer], held.values[layer])
        part = Part(0, ids, start, len(ids), len(ids), labels, spans if self._spans else ())
        (ran,) = prefill(self._model, self._recorder, cache, [part])
        self.tokens_run += len(ids) - start
        for layer, sums in held.span_sums.items() if held else ():
            ran.span_sums[layer][: len(sums)] += sums
        return _Entry(
            {layer: states[0] for layer, states in cache.keys.items()},
            {layer: states[0] for layer, states in cache.values.items()},
            ran.span_sums,
            labels,
        )
