"""Heads ranked by how well they point at the chosen tool or at the right one.

A head is scored by how often it ranks the target above another tool of the same task, so that neither the
length of a prompt nor a head's overall attention to tools counts. Hundreds of heads are compared: p-values are
corrected for their number (Westfall & Young 1993, step-down maxT, algorithm 4.1), and heads chosen on one half
of the tasks are tested on the other. That a head points at a tool does not say that the choice depends on it:
`head_ablation` sets it beside random heads.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from probe.errors import UsageError
from probe.maths.auroc import pair_wins, pooled_auroc
from probe.maths.intervals import Interval
from probe.runs.read import finished
from probe.runs.records import ToolRecord
from probe.runs.views.attention import decision_attention
from probe.runs.views.choice import Choice, Target

if TYPE_CHECKING:
    from probe.runs import Run

Score = Literal["adjusted", "rate", "mass", "norm"]
MIN_TASKS = 8
"""Fewer tasks are not ranked: halves of three say nothing."""
DRAWS = 1000
"""Permutations of the targets."""
_DRAWN = 1 << 22
"""Targets drawn at a time: a thousand permutations of ten thousand tasks over forty tools are 1.6 gigabytes."""


@dataclass(frozen=True)
class HeadEstimate:
    """A mean over `n` tasks with its 95 % interval."""

    value: float
    interval: Interval | None
    n: int


@dataclass(frozen=True)
class Ranking:
    """Every head's AUROC: the probability that the target outranks another tool of its task, ties ½."""

    target: Target
    score: Score
    layers: list[int]
    """Layer of each row of the matrices."""
    auroc: np.ndarray
    """[layer, head], all tasks."""
    intervals: list[Interval | None]
    """Of the heads of all layers one behind the other: 95 % intervals over tasks that hold all heads together."""
    p: np.ndarray
    """[layer, head]: one-sided p-value, targets permuted within tasks; not corrected."""
    p_corrected: np.ndarray
    """[layer, head]: the same, corrected for the number of heads (family-wise)."""
    halves: tuple[list[str], list[str]]
    """Ids of the tasks of each half."""
    half_auroc: np.ndarray
    """[half, layer, head]"""
    _wins: np.ndarray
    """[half, task, head]: pairs that the target wins, adjusted as fitted on that half; what tests its heads."""
    _pairs: np.ndarray
    """[task]"""
    _half: np.ndarray
    """[task]"""

    @property
    def n_tasks(self) -> int:
        return len(self.halves[0]) + len(self.halves[1])

    def best(self, k: int | None = None, half: int = 0) -> list[tuple[int, int]]:
        """The k heads (layer, head) with the highest AUROC on this half; by default a twentieth, at most 10."""
        n_heads = self.auroc.shape[1]
        k = min(10, max(1, self.auroc.size // 20)) if k is None else k
        order = np.argsort(-self.half_auroc[half].ravel(), kind="stable")[:k]
        return [(self.layers[index // n_heads], int(index % n_heads)) for index in order.tolist()]

    def random_band(
        self, k: int | None = None, draws: int = 20, seed: int = 0, *, half: int = 0
    ) -> list[list[tuple[int, int]]]:
        """Sets of random heads of the size of `best(k, half)`, without any of its heads.

        From each layer as many as were chosen there; where a layer has too few others, from any layer. A set is
        drawn again while it repeats an earlier one, up to 100 times.
        """
        chosen = self.best(k, half)
        free = [(layer, h) for layer in self.layers for h in range(self.auroc.shape[1])]
        free = [head for head in free if head not in chosen]
        if len(free) < len(chosen):
            raise UsageError(
                f"{len(chosen)} heads are chosen and only {len(free)} are left: give a smaller k"
            )
        generator = np.random.default_rng(seed)
        sets: list[list[tuple[int, int]]] = []
        for _ in range(draws):
            drawn = same_layers(chosen, free, generator)
            for _ in range(100):
                if drawn not in sets:
                    break
                drawn = same_layers(chosen, free, generator)
            sets.append(drawn)
        return sets

    def held_out(self, k: int | None = None, half: int | None = None) -> HeadEstimate:
        """Mean AUROC of the best k heads of each half on the tasks of the other one, every pair counted once.

        With `half`, only of that half's best heads.
        """
        wins, pairs = [], []
        for source in (0, 1) if half is None else (half,):
            heads = [self._column(head) for head in self.best(k, source)]
            tested = self._half == 1 - source
            wins.append(self._wins[source][tested][:, heads].mean(1, keepdims=True))
            pairs.append(self._pairs[tested])
        auroc, (interval,) = pooled_auroc(np.concatenate(wins), np.concatenate(pairs))
        return HeadEstimate(float(auroc[0]), interval, sum(map(len, pairs)))

    def _column(self, head: tuple[int, int]) -> int:
        return self.layers.index(head[0]) * self.auroc.shape[1] + head[1]


def rank(
    run: Run, target: Target = "chosen", score: Score = "adjusted", draws: int = DRAWS
) -> Ranking | None:
    """Rank all heads by how well they point at the chosen or at the right tool.

    `score` of a tool: `rate` (attention per token of its definition), `mass`, `norm` (‖Σ α v W_O‖), or
    `adjusted`: the rate within its task, less what shown slot and log length of the definition predict (least
    squares, fitted on the half on which heads are ranked). A head that always reads the first definition
    does not point by the adjusted score, even where the first tool is usually the target.

    None where fewer than MIN_TASKS tasks have a target among two visible tools, or the site of the score was not
    captured. Raises UsageError for an unknown target or score.
    """
    for value, known in ((target, get_args(Target)), (score, get_args(Score))):
        if value not in known:
            raise UsageError(f"{value!r} is none of {', '.join(known)}")
    collected = _collect(run, target, score)
    if collected is None:
        return None
    adjust = score == "adjusted"
    wins = pair_wins(collected.n_tools, collected.residuals(None) if adjust else collected.scores)
    by_half = [pair_wins(collected.n_tools, collected.residuals(half)) if adjust else wins for half in (0, 1)]
    pairs, half, shape = collected.n_pairs, collected.half, (len(collected.layers), -1)
    targets_won = np.stack([_target_wins(collected, part) for part in by_half])
    ranked = [targets_won[h][half == h].sum(0) / pairs[half == h].sum() for h in (0, 1)]
    auroc, intervals = pooled_auroc(_target_wins(collected, wins), pairs)
    p, p_corrected = _permutation_test(collected, wins, draws)
    ids = tuple(
        [task for task, h in zip(collected.task_ids, half, strict=True) if h == side] for side in (0, 1)
    )
    return Ranking(
        target=target,
        score=score,
        layers=collected.layers,
        auroc=auroc.reshape(shape),
        intervals=intervals,
        p=p.reshape(shape),
        p_corrected=p_corrected.reshape(shape),
        halves=(ids[0], ids[1]),
        half_auroc=np.stack(ranked).reshape(2, *auroc.reshape(shape).shape),
        _wins=targets_won,
        _pairs=pairs,
        _half=half,
    )


# -- the tools of all tasks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ListedTools:
    """The shown tools of all tasks; a row is one tool of one task."""

    task_ids: list[str]
    layers: list[int]
    scores: np.ndarray
    """[row, head], heads of all layers one behind the other."""
    task: np.ndarray
    """[row]: index into `task_ids`, ascending"""
    slot: np.ndarray
    """[row]: place in shown order"""
    length: np.ndarray
    """[row]: tokens of the definition"""
    target: np.ndarray
    """[row]: bool"""
    half: np.ndarray
    """[task]: 0 or 1"""

    @cached_property
    def n_tools(self) -> np.ndarray:
        """[task]"""
        return np.bincount(self.task)

    @cached_property
    def n_targets(self) -> np.ndarray:
        """[task]"""
        return np.bincount(self.task, self.target).astype(int)

    @property
    def n_pairs(self) -> np.ndarray:
        """[task]: target and other tool of the same task"""
        return self.n_targets * (self.n_tools - self.n_targets)

    def residuals(self, half: int | None) -> np.ndarray:
        """Scores within their task, less what slot and log length predict, fitted on one half or on all tasks."""
        cells = np.stack([self.n_tools[self.task], self.slot], 1)
        _, cell = np.unique(cells, axis=0, return_inverse=True)
        design = np.column_stack([np.eye(cell.max() + 1)[cell.ravel()], np.log(self.length)])
        x, y = self._centred(design), self._centred(self.scores)
        kept = slice(None) if half is None else self.half[self.task] == half
        # The least norm solution: the slots of a task are collinear once centred.
        return y - x @ np.linalg.lstsq(x[kept], y[kept], rcond=None)[0]

    def _centred(self, values: np.ndarray) -> np.ndarray:
        starts = np.concatenate([[0], np.cumsum(self.n_tools)[:-1]])
        return values - (np.add.reduceat(values, starts) / self.n_tools[:, None])[self.task]


def _collect(run: Run, target: Target, score: Score) -> _ListedTools | None:
    ids, layers, tables, rows = [], [], [], []
    for task in finished(run, "tool_selection"):
        attention = decision_attention(task)
        values = None if attention is None else attention.norm if score == "norm" else attention.mass
        if attention is None or values is None:
            continue
        columns = list(attention.tools.values())
        hit = Choice.of(task.typed(ToolRecord)).places(target, list(attention.tools))
        if not 0 < len(hit) < len(columns):
            continue
        values = values[:, :, columns].reshape(-1, len(columns)).T
        length = attention.tokens[columns]
        tables.append(values / length[:, None] if score in ("rate", "adjusted") else values)
        rows += [(len(ids), slot, length[slot], slot in hit) for slot in range(len(columns))]
        ids.append(task.id)
        layers = attention.layers
    if len(ids) < MIN_TASKS:
        return None
    task_of, slot, length, hits = (np.array(column) for column in zip(*rows, strict=True))
    half = halves(ids, np.bincount(task_of).tolist())
    return _ListedTools(ids, layers, np.concatenate(tables), task_of, slot, length, hits, half)


def halves(ids: Sequence[str], strata: Sequence[Any]) -> np.ndarray:
    """0 or 1 for each task: in each stratum alternately, in the order of a hash of the id."""
    seen: Counter[Any] = Counter()
    place = {stratum: number for number, stratum in enumerate(sorted(set(strata)))}
    half = np.zeros(len(ids), dtype=int)
    for index in sorted(range(len(ids)), key=lambda i: hashlib.sha256(ids[i].encode()).digest()):
        # The second stratum starts with the other half, so that many strata of one task are balanced too.
        half[index] = (seen[strata[index]] + place[strata[index]]) % 2
        seen[strata[index]] += 1
    return half


# -- pairs ---------------------------------------------------------------------------------------------------------


def _target_wins(shown: _ListedTools, wins: np.ndarray) -> np.ndarray:
    """[task, head]: pairs of a target and another tool that the target wins.

    Two targets of a task share one win between them, which is no such pair.
    """
    won = np.zeros((len(shown.task_ids), wins.shape[1]))
    np.add.at(won, shown.task[shown.target], wins[shown.target])
    return won - (shown.n_targets * (shown.n_targets - 1) / 2)[:, None]


def _permutation_test(
    shown: _ListedTools, wins: np.ndarray, draws: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """One-sided p-values [head], raw and corrected: the targets of each task are drawn among its tools.

    Every head is judged under the same draws, so that the correction knows how alike heads are.
    """
    generator = np.random.default_rng(seed)
    rows = np.arange(len(shown.task))
    starts = np.concatenate([[0], np.cumsum(shown.n_tools)[:-1]])
    # Wins are halves of small integers: exact in float32.
    halves_won = wins.astype(np.float32)
    null = np.empty((draws, wins.shape[1]), dtype=np.float32)
    at_once = max(1, _DRAWN // len(rows))
    for first in range(0, draws, at_once):
        drawn = np.empty((min(at_once, draws - first), len(rows)), dtype=np.float32)
        for draw in drawn:
            # Sorted by task, then by a random key: the first n_targets of each task.
            order = np.lexsort((generator.random(len(rows)), shown.task))
            draw[order] = rows - starts[shown.task] < shown.n_targets[shown.task]
        null[first : first + len(drawn)] = drawn @ halves_won
    observed = shown.target.astype(np.float32) @ halves_won
    raw = (1 + (null >= observed).sum(0)) / (1 + draws)
    order = np.argsort(-observed, kind="stable")
    # Successive maxima: a head competes only with those that it does not trail.
    maxima = np.maximum.accumulate(null[:, order[::-1]], axis=1)[:, ::-1]
    stepped = (1 + (maxima >= observed[order]).sum(0)) / (1 + draws)
    corrected = np.empty_like(stepped)
    corrected[order] = np.maximum.accumulate(stepped)
    return raw, corrected


def same_layers(
    chosen: list[tuple[int, int]], free: list[tuple[int, int]], generator: np.random.Generator
) -> list[tuple[int, int]]:
    """Random heads: as many free ones of each layer as were chosen there, the rest from any layer, sorted."""
    drawn: list[tuple[int, int]] = []
    for layer, n in sorted(Counter(layer for layer, _ in chosen).items()):
        of_layer = [head for head in free if head[0] == layer]
        drawn += [of_layer[i] for i in generator.permutation(len(of_layer))[:n]]
    rest = [head for head in free if head not in drawn]
    drawn += [rest[i] for i in generator.permutation(len(rest))[: len(chosen) - len(drawn)]]
    return sorted(drawn)
