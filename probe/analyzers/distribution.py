"""The output distribution at every captured decision: entropy, nucleus, temperature and Boltzmann quantities.

Numbers of one distribution are exact, of the raw model at τ = 1, in float64 (the tokens of a nucleus are those that
float32 sampling keeps); over a run, their means over tasks. `step` is the decision's index in its passage, `variant`
the prompt of a `prompting` task; rule `sampled` is the distribution that the run drew from.

log Z, ⟨E⟩ and F depend on the gauge, and in the `raw` one on a constant per position that no probability shows:
they are not averaged over tasks. Curves are means over the first captured decision of up to `DECISIONS` tasks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.registry import (
    MEAN,
    OVER_TASKS,
    RANKS,
    SHARE,
    SHARE_OVER_TASKS,
    Figure,
    Measure,
    measure,
)
from probe.analyzers.rows import WHOLE_RUN, Grid, Row
from probe.maths.intervals import mean_interval, share_interval
from probe.maths.statistics import distinct_share
from probe.runs.read import finished
from probe.runs.records import AgentRecord, TaskRecord

if TYPE_CHECKING:
    from torch import Tensor

    from probe.runs import Run, TaskRun

_NAME = "distribution"
NUCLEI = (0.5, 0.9, 0.95, 0.99)
WANTED = (1.0, 3.0)
"""Entropies, nats, whose temperature is looked for."""
FIXED_K = (1, 10, 40)
LEAST_TOKENS = 16
"""Generated tokens below which a text has no share of repetitions."""
DECISIONS = 16
"""Distributions that curves are the mean of."""
TEMPERATURES = tuple(2 ** (power / 2) for power in range(-6, 7))
BINS = 40
"""Bins of the histograms of energies."""

_SITES = ("logits",)
_CARD = "distribution"

ENTROPY = measure(
    _NAME,
    "entropy",
    unit="nats",
    of="task run",
    axes="step? variant? rule?",
    means="S = −Σ p log p over the whole vocabulary; with rule `sampled`, of what the run drew its tokens from.",
    interval=OVER_TASKS,
    needs=_SITES,
    figure=Figure(kind="estimates", by="variant", card=_CARD),
)
HEAT_CAPACITY = measure(
    _NAME,
    "heat_capacity",
    unit="nats",
    of="task run",
    axes="step? variant?",
    means="C = Var(E)/τ² at τ = 1, the slope d⟨E⟩/dτ of the mean energy, with E = −z the energy of a token.",
    interval=OVER_TASKS,
    needs=_SITES,
    figure=Figure(kind="estimates", by="variant"),
)
NUCLEUS_SIZE = measure(
    _NAME,
    "nucleus_size",
    unit="tokens",
    of="task run",
    axes="step? variant? p? rule?",
    means="How many of the most probable tokens are needed for their mass to reach p; with rule `sampled`, how many the "
    "run drew its tokens from.",
    source="Holtzman et al. 2020, section 3.1",
    interval=OVER_TASKS,
    needs=_SITES,
    figure=Figure(kind="curve", x="p", by="variant", card=_CARD),
)
MASS_KEPT = measure(
    _NAME,
    "mass_kept",
    unit="probability",
    of="task run",
    axes="step? variant?",
    means="Probability, at the run's temperature, of the tokens that its truncation keeps; only in runs that draw.",
    interval=SHARE_OVER_TASKS,
    needs=_SITES,
    figure=Figure(kind="estimates", by="variant"),
)
TEMPERATURE = measure(
    _NAME,
    "temperature",
    unit="temperature",
    of="task run",
    axes="step? variant? wanted_entropy",
    means="The τ at which softmax(z/τ) has the wanted entropy; no row where no τ has it.",
    interval=OVER_TASKS,
    needs=_SITES,
    figure=Figure(kind="curve", x="wanted_entropy", by="variant"),
)
LOG_PARTITION = measure(
    _NAME,
    "log_partition",
    unit="nats",
    axes="step variant? gauge",
    means="log Z = log Σ exp(−E) over the vocabulary, with E = −z the energy of a token in the gauge.",
    needs=_SITES,
    figure="depends on the gauge: one of many numbers of a decision",
)
ENERGY_MEAN = measure(
    _NAME,
    "energy_mean",
    unit="logits",
    axes="step variant? gauge",
    means="⟨E⟩ = Σ p E, the mean energy E = −z of a token in the gauge.",
    needs=_SITES,
    figure="depends on the gauge: one of many numbers of a decision",
)
FREE_ENERGY = measure(
    _NAME,
    "free_energy",
    unit="logits",
    axes="step variant? gauge",
    means="F = −log Z = ⟨E⟩ − S at τ = 1, in the gauge.",
    needs=_SITES,
    figure="depends on the gauge: one of many numbers of a decision",
)
TOKEN_ENERGY = measure(
    _NAME,
    "token_energy",
    unit="logits",
    axes="step variant? gauge",
    means="E = −z of the token that was emitted, in the gauge.",
    needs=_SITES,
    figure="depends on the gauge: one of many numbers of a decision",
)
SURPRISAL = measure(
    _NAME,
    "surprisal",
    unit="nats",
    of="task run",
    axes="step? variant?",
    means="−log p = E − F of the token that was emitted.",
    interval=OVER_TASKS,
    needs=_SITES,
    figure=Figure(kind="estimates", by="variant"),
)
_TEXT = (f"{LEAST_TOKENS} generated tokens",)
REPETITION = measure(
    _NAME,
    "repetition",
    unit="share of runs",
    of="task run",
    axes="variant?",
    means="Runs of four generated tokens that stood in the text before, of all runs of four; compare runs that draw by other "
    "rules with `probe compare`.",
    source="Welleck et al. 2020, Neural text generation with unlikelihood training, section 6.1",
    interval=SHARE_OVER_TASKS,
    needs=_TEXT,
    figure=Figure(kind="estimates", by="variant"),
)
DISTINCT_PAIRS = measure(
    _NAME,
    "distinct_pairs",
    unit="share of pairs",
    of="task run",
    axes="variant?",
    means="Different pairs of neighbouring generated tokens, of all such pairs: the diversity of a text (distinct-2).",
    source="Li et al. 2016, A diversity-promoting objective function for neural conversation models, section 5.3",
    interval=SHARE_OVER_TASKS,
    needs=_TEXT,
    figure=Figure(kind="estimates", by="variant"),
)
NUCLEUS_FOLLOWS_ENTROPY = measure(
    _NAME,
    "nucleus_follows_entropy",
    unit="rank correlation",
    of="run",
    axes="p",
    means="Spearman's rank correlation, over decisions, of the size of the nucleus of p with the entropy; n counts "
    "decisions.",
    interval=RANKS,
    needs=(*_SITES, "3 decisions"),
    figure=Figure(kind="estimates", by="p", card=_CARD),
)
K_TOO_SMALL = measure(
    _NAME,
    "k_too_small",
    unit="share of decisions",
    of="run",
    axes="k p",
    means="Share of decisions whose nucleus of p has more than k tokens, mean over tasks.",
    interval=SHARE,
    needs=_SITES,
    figure=Figure(kind="curve", x="k", by="p", card=_CARD),
)
K_TOO_LARGE = measure(
    _NAME,
    "k_too_large",
    unit="share of decisions",
    of="run",
    axes="k p",
    means="Share of decisions whose nucleus of p has fewer than k tokens, mean over tasks.",
    interval=SHARE,
    needs=_SITES,
    figure=Figure(kind="curve", x="k", by="p", card=_CARD),
)
_FIRST = f"mean over the first captured decision of the first {DECISIONS} tasks that have one"
ENTROPY_AT_TEMPERATURE = measure(
    _NAME,
    "entropy_at_temperature",
    unit="nats",
    of="run",
    axes="temperature",
    means=f"Entropy of softmax(z/τ), {_FIRST}.",
    interval=MEAN,
    needs=_SITES,
    figure=Figure(kind="curve", x="temperature", card=_CARD),
)
TOP1_AT_TEMPERATURE = measure(
    _NAME,
    "top1_at_temperature",
    unit="probability",
    of="run",
    axes="temperature",
    means=f"Probability of the most probable token in softmax(z/τ), {_FIRST}.",
    interval=SHARE,
    needs=_SITES,
    figure=Figure(kind="curve", x="temperature", card=_CARD),
)
HEAT_CAPACITY_AT_TEMPERATURE = measure(
    _NAME,
    "heat_capacity_at_temperature",
    unit="nats",
    of="run",
    axes="temperature",
    means=f"C = Var(E)/τ² at τ, {_FIRST}.",
    interval=MEAN,
    needs=_SITES,
    figure=Figure(kind="curve", x="temperature", card=_CARD),
)
HEAT_CAPACITY_PEAK = measure(
    _NAME,
    "heat_capacity_peak",
    unit="temperature",
    of="run",
    means="The τ at which the heat capacity is highest, where a small change of τ changes the distribution most, "
    f"{_FIRST}.",
    interval=MEAN,
    needs=_SITES,
    figure=Figure(kind="text", card=_CARD),
)
TOP_K_MASS = measure(
    _NAME,
    "top_k_mass",
    unit="probability",
    of="run",
    axes="k",
    means=f"Mass of the k most probable tokens, {_FIRST}; the last k is the vocabulary.",
    interval=SHARE,
    needs=_SITES,
    figure=Figure(kind="curve", x="k", card=_CARD),
)
ENERGY_DENSITY = measure(
    _NAME,
    "energy_density",
    unit="per logit",
    of="run",
    axes="bin energy",
    means=f"Density of the energies E = −z of all tokens in the centred gauge, in {BINS} bins of equal width, {_FIRST}.",
    needs=_SITES,
    figure=Figure(kind="curve", x="energy", card=_CARD),
)
LIKELY_ENERGY_DENSITY = measure(
    _NAME,
    "likely_energy_density",
    unit="per logit",
    of="run",
    axes="bin energy",
    means=f"The same density as `energy_density`, every token weighted by its probability, {_FIRST}.",
    needs=_SITES,
    figure=Figure(kind="curve", x="energy", card=_CARD),
)


@dataclass(frozen=True)
class CapturedDecision:
    """One captured output distribution of a run."""

    task_id: str
    passage: str
    """`main`, or the variant of a `prompting` task."""
    index: int
    position: int
    token: int | None
    """The token emitted there; None where none was, as after an opener that was attached on the side."""
    logits: Tensor
    """float32 [d_vocab]."""

    @property
    def variant(self) -> str | None:
        return None if self.passage == "main" else self.passage


def decisions(task: TaskRun) -> Iterator[CapturedDecision]:
    """Every captured decision of a task, one row of logits in memory at a time; none where none was captured."""
    several = "passages" in task.record
    turns = task.typed(AgentRecord).turns if "turns" in task.record else []
    attached = {index for index, turn in enumerate(turns) if turn.slot == "attached"}
    for name, passage in task.passages.items():
        prefix = f"{name}/" if several else ""
        if f"{prefix}logits" not in task or f"{prefix}decisions" not in task:
            continue
        rows, following = task.slice(f"{prefix}logits"), passage.token_ids[1:]
        for index, position in enumerate(task[f"{prefix}decisions"].tolist()):
            emitted = position < len(following) and index not in attached
            token = following[position] if emitted else None
            yield CapturedDecision(task.id, name, index, position, token, rows[index])


def measures(run: Run) -> Iterator[Row | Grid]:
    """Each decision of each finished task; then means over tasks of what no gauge moves, how the nucleus follows the
    entropy, and curves."""
    over: dict[tuple[Measure, tuple[tuple[str, Any], ...]], list[tuple[str, float]]] = defaultdict(list)
    shapes: list[tuple[str, float, dict[float, float]]] = []
    for task in finished(run):
        draws = sampling(run, task.typed(TaskRecord).kind)
        for decision in decisions(task):
            entropy, sizes = None, {}
            for defined, place, value in numbers(decision.logits, decision.token, draws):
                place = {**place, "variant": decision.variant}
                yield defined.row(task.id, value, step=decision.index, **place)
                if "run" in defined.of:
                    over[defined, tuple(place.items())].append((task.id, value))
                if defined is ENTROPY and "rule" not in place:
                    entropy = value
                if defined is NUCLEUS_SIZE and "p" in place:
                    sizes[place["p"]] = value
            if entropy is not None:
                shapes.append((task.id, entropy, sizes))
        for defined, place, value in repetitions(run, task):
            yield defined.row(task.id, value, **place)
            over[defined, tuple(place.items())].append((task.id, value))
    for (defined, place), pairs in over.items():
        yield _mean(defined, means_of_tasks(pairs), **dict(place))
    yield from _shape_of_run(shapes)
    yield from _curves(_first_decisions(run))


def repetitions(run: Run, task: TaskRun) -> Iterator[tuple[Measure, dict[str, Any], float]]:
    """How much of a generated text repeats it; nothing of a text that was given, or into which tools wrote."""
    kind = task.typed(TaskRecord).kind
    if kind == "agent" or (kind == "cot" and run.run.get("options", {}).get("reasoning") == "reference"):
        return
    for name, passage in task.passages.items():
        text = passage.token_ids[passage.n_prompt :]
        if len(text) >= LEAST_TOKENS:
            place = {} if name == "main" else {"variant": name}
            yield REPETITION, place, 1 - distinct_share(text, 4)
            yield DISTINCT_PAIRS, place, distinct_share(text, 2)


def _shape_of_run(shapes: list[tuple[str, float, dict[float, float]]]) -> Iterator[Row]:
    """Does the nucleus follow the entropy, and where is a fixed k too small or too large for it?"""
    for p in NUCLEI:
        sizes = [(task, entropy, size[p]) for task, entropy, size in shapes]
        rho = spearman_over_tasks(sizes)
        if rho is not None:
            yield _of_run(NUCLEUS_FOLLOWS_ENTROPY, rho, p=p)
        for k in FIXED_K if sizes else ():
            for defined, sign in ((K_TOO_SMALL, 1), (K_TOO_LARGE, -1)):
                wrong = [(task, float(sign * (size - k) > 0)) for task, _, size in sizes]
                yield _mean(defined, means_of_tasks(wrong), k=k, p=p)


def _of_run(defined: Measure, estimate: Mapping[str, Any], **place: Any) -> Row:
    low, high = estimate["low"], estimate["high"]
    interval = None if low is None else (low, high)
    return defined.row(WHOLE_RUN, estimate["value"], n=estimate["n"], interval=interval, **place)


def sampling(run: Run, kind: str) -> dict[str, Any] | None:
    """`sampled`'s temperature, p and k where tasks of this kind draw their tokens; None where they are greedy."""
    generation = run.run.get("generation", {}).get(kind, {})
    if not generation.get("temperature"):
        return None
    return {
        "temperature": generation["temperature"],
        "p": generation.get("top_p"),
        "k": generation.get("top_k"),
    }


def numbers(
    logits: Tensor, token: int | None = None, draws: dict[str, Any] | None = None
) -> Iterator[tuple[Measure, dict[str, Any], float]]:
    """(measure, place, value) of one row of logits; nothing where one of them is NaN or +∞, or all are −∞.

    With a token, its energy E = −z in each gauge and its surprisal −log p = (E − F)/τ. With `draws`, the size, the
    mass and the entropy of what a token is drawn from.
    """
    from probe.maths.distribution import GAUGES, TokenRanking, boltzmann, gauge_shift, temperature_for_entropy

    ranked = TokenRanking(logits.float())
    if not bool(ranked.ascending[-1].isfinite()):  # NaN sorts last
        return
    z = ranked.ascending.double()
    raw = boltzmann(z)
    yield ENTROPY, {}, float(raw.entropy)
    yield HEAT_CAPACITY, {}, float(raw.heat_capacity)
    for p in NUCLEI:
        yield NUCLEUS_SIZE, {"p": p}, float(ranked.nucleus_size(p))
    for wanted in WANTED:
        tau = temperature_for_entropy(z, wanted)
        if tau is not None:
            yield TEMPERATURE, {"wanted_entropy": wanted}, tau
    energy = None if token is None else -float(logits[token])
    for gauge in GAUGES:
        shift = float(gauge_shift(z, gauge))
        yield LOG_PARTITION, {"gauge": gauge}, float(raw.log_partition) - shift
        yield ENERGY_MEAN, {"gauge": gauge}, float(raw.energy_mean) + shift
        yield FREE_ENERGY, {"gauge": gauge}, float(raw.free_energy) + shift
        if energy is not None and math.isfinite(energy):
            yield TOKEN_ENERGY, {"gauge": gauge}, energy + shift
    if energy is not None and math.isfinite(energy):
        yield SURPRISAL, {}, max(0.0, energy - float(raw.free_energy))
    if draws:
        yield from _drawn_from(logits, draws)


def _drawn_from(logits: Tensor, draws: dict[str, Any]) -> Iterator[tuple[Measure, dict[str, Any], float]]:
    from probe.maths.distribution import boltzmann, sampled, temper

    left = sampled(logits, **draws)
    whole = boltzmann(temper(logits.float(), draws["temperature"]))
    kept = boltzmann(left)
    yield NUCLEUS_SIZE, {"rule": "sampled"}, float((left > -math.inf).sum())
    yield MASS_KEPT, {}, min(1.0, math.exp(float(kept.log_partition - whole.log_partition)))
    yield ENTROPY, {"rule": "sampled"}, float(kept.entropy)


# -- curves ------------------------------------------------------------------------------------------------------


def _first_decisions(run: Run) -> list[Tensor]:
    """float64 [d_vocab] of the first captured decision of the first tasks whose logits have a finite maximum."""
    firsts = (next(iter(decisions(task)), None) for task in finished(run))
    usable = (
        first.logits.double() for first in firsts if first is not None and bool(first.logits.max().isfinite())
    )
    return list(islice(usable, DECISIONS))


def _curves(logits: list[Tensor]) -> Iterator[Row]:
    from probe.maths.distribution import boltzmann, heat_capacity_peak

    if not logits:
        return
    for tau in TEMPERATURES:
        states = [boltzmann(z, tau) for z in logits]
        pairs = zip(logits, states, strict=True)
        highest = [math.exp(float(z.max()) / tau - float(state.log_partition)) for z, state in pairs]
        for defined, values in (
            (ENTROPY_AT_TEMPERATURE, [float(state.entropy) for state in states]),
            (TOP1_AT_TEMPERATURE, highest),
            (HEAT_CAPACITY_AT_TEMPERATURE, [float(state.heat_capacity) for state in states]),
        ):
            yield _mean(defined, values, temperature=tau)
    peaks = [peak[0] for z in logits if (peak := heat_capacity_peak(z))]
    if peaks:
        yield _mean(HEAT_CAPACITY_PEAK, peaks)
    yield from _top_k_masses(logits)
    yield from _energies(logits)


def _mean(defined: Measure, values: list[float], **place: Any) -> Row:
    return defined.share(values, **place) if _is_share(defined) else defined.mean(values, **place)


def _is_share(defined: Measure) -> bool:
    """Whether its numbers lie between 0 and 1."""
    return defined.interval in (SHARE, SHARE_OVER_TASKS)


def _top_k_masses(logits: list[Tensor]) -> Iterator[Row]:
    """Mean masses of the k likeliest tokens, for k = 1, 2, 4, … and the whole vocabulary."""
    masses = [z.softmax(-1).sort(descending=True).values.cumsum(-1) for z in logits]
    size = min(len(mass) for mass in masses)
    for k in [2**power for power in range(size.bit_length()) if 2**power < size] + [size]:
        yield _mean(TOP_K_MASS, [min(1.0, float(mass[k - 1])) for mass in masses], k=k)


def _energies(logits: list[Tensor]) -> Iterator[Row]:
    energies = []
    for z in logits:
        finite = z[z.isfinite()]
        energies.append((finite.mean() - finite).numpy())
    low, high = min(float(e.min()) for e in energies), max(float(e.max()) for e in energies)
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    weights = [np.exp(e.min() - e) for e in energies]
    for defined, weighted in ((ENERGY_DENSITY, [None] * len(energies)), (LIKELY_ENERGY_DENSITY, weights)):
        pairs = zip(energies, weighted, strict=True)
        density = np.mean([np.histogram(e, edges, weights=w, density=True)[0] for e, w in pairs], axis=0)
        for index, middle in enumerate((edges[:-1] + edges[1:]) / 2):
            place = {"bin": index, "energy": float(middle)}
            yield defined.row(WHOLE_RUN, density[index], n=len(energies), **place)


# -- over the tasks of a run -------------------------------------------------------------------------------------


def means_of_tasks(pairs: Sequence[tuple[str, float]]) -> list[float]:
    """The mean of each task."""
    by_task: dict[str, list[float]] = defaultdict(list)
    for task, value in pairs:
        by_task[task].append(value)
    return [float(np.mean(values)) for values in by_task.values()]


def mean_over_tasks(pairs: Sequence[tuple[str, float]], shares: bool = False) -> dict[str, Any]:
    """Mean over tasks of each task's mean, with its 95 % interval over tasks (of numbers from 0 to 1: `shares`), None
    where there is none; n counts tasks."""
    means = means_of_tasks(pairs)
    low, high = (share_interval(means) if shares else mean_interval(means)) or (None, None)
    return {"value": float(np.mean(means)), "low": low, "high": high, "n": len(means)}


def spearman_over_tasks(rows: Sequence[tuple[str, float, float]]) -> dict[str, Any] | None:
    """Rank correlation of x and y over decisions (task, x, y); None where one of them is constant.

    The 95 % interval is over resampled tasks, None for fewer than twenty; n counts decisions.
    """
    from probe.maths.rank_correlation import spearman

    if len(rows) < 3:
        return None
    tasks, groups = np.unique([row[0] for row in rows], return_inverse=True)
    rho = spearman(np.array([row[1] for row in rows]), np.array([row[2] for row in rows]), groups)
    if rho is None:
        return None
    low, high = rho.interval or (None, None)
    return {"value": rho.value, "low": low, "high": high, "n": len(rows), "tasks": len(tasks)}
