"""Foresight: what is there before a call runs, and how well it foretells that the choice is wrong.

Signals are taken from a run alone. What needs fitting is fitted on other tasks than it is tested on: on the other folds of
the run, or on another run with another catalogue (`train`). docs/tool-use.md defines signals and measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.foresight import repair
from probe.analyzers.foresight.fits import (
    LEAST_KIND,
    HeldOut,
    ProbeFit,
    Split,
    choose_signal,
    fit_probe,
    probability_of,
    ranks_within,
)
from probe.analyzers.foresight.measures import (
    ANALYZER,
    AURC,
    AURC_GAIN,
    AURC_LOWEST,
    AUROC,
    AUROC_P,
    BRIER,
    BRIER_GAIN,
    CHOSEN_FOLDS,
    CHOSEN_LAYER,
    ECE,
    ECE_FLOOR,
    ERROR_RATE,
    ERROR_RATE_QUARTER,
    ERROR_RATIO,
    RISK,
)
from probe.analyzers.foresight.signals import PROBE, SIGNALS, DecisionStates, Observed
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.analyzers.tool.calibration import calibration_error, equal_mass
from probe.errors import UsageError
from probe.maths.auroc import auroc
from probe.maths.folds import FOLDS
from probe.maths.intervals import LEAST_FOLDED, Interval, share_ratio, wilson
from probe.maths.ridge import ridge
from probe.maths.risk import area_gain, area_intervals, lowest_area, risk_area, risk_curve
from probe.runs.read import finished
from probe.runs.records import ToolRecord
from probe.runs.views.choice import Choice

if TYPE_CHECKING:
    from probe.runs import Run

RAW, HELD_OUT, TRANSFER = "raw", "held_out", "transfer"
"""Rules: as it is, fitted on other folds, fitted on another run."""
BEST = "best"
"""The signal that was best on the tasks that were fitted on."""
COVERAGES = tuple(k / 10 for k in range(1, 11))
QUARTERS = 4


def measures(run: Run, train: Run | None = None, prompted: Run | None = None) -> Iterator[Row]:
    """How well each signal foretells a wrong choice of a `tool_selection` task, and what a readout would repair; with `train`
    also what was fitted on that run's tasks, with `prompted` what the model chooses in that run of the same tasks. Raises
    UsageError for a `train` without other tasks and a `prompted` without the same."""
    refuse_misfits(run, train, prompted)
    yield from _foretold(run, train)
    yield from repair.measures(run, prompted)


def _foretold(run: Run, train: Run | None) -> Iterator[Row]:
    seen = Observed.of(run)
    if not len(seen.wrong):
        return
    yield ERROR_RATE.share(seen.wrong)
    yield from _held_out(seen)
    if train is not None:
        learned = Observed.of(train).without(set(seen.prompts))
        yield from _transferred(seen, learned, same_model=_model(run) == _model(train))


def refuse_misfits(run: Run, train: Run | None, prompted: Run | None) -> None:
    """Raise UsageError for other runs that tell nothing of this one, from records alone: before anything is computed."""
    if train is None and prompted is None:
        return
    here = {task.id: task.typed(ToolRecord) for task in finished(run, "tool_selection")}
    if not here:
        raise UsageError(f"{run.path} has no tool tasks: --train and --prompted are for their choices")
    prompts = {record.passage.prompt for record in here.values()}
    if train is not None and not any(
        task.typed(ToolRecord).passage.prompt not in prompts for task in finished(train, "tool_selection")
    ):
        raise UsageError(f"--train {train.path}: has no tool task that {run.path} does not have too")
    if prompted is not None and not any(
        task.id in here
        and sorted(here[task.id].decision.tools) == sorted(task.typed(ToolRecord).decision.tools)
        for task in finished(prompted, "tool_selection")
    ):
        raise UsageError(f"--prompted {prompted.path}: has none of the tasks with the same ids and tools")
    n = sum(repair.is_readable(Choice.of(record)) for record in here.values())
    if prompted is not None and n < repair.LEAST:
        raise UsageError(
            f"--prompted: {run.path} has {n} tasks in which some of the tools, and not all, are right; readouts need "
            f"{repair.LEAST}: leave --prompted out, or run more tasks"
        )


def reasons(run: Run) -> list[str]:
    """Why a measured run has no more of these measures, in sentences."""
    import pyarrow.compute as pc

    wanted = (pc.field("analyzer") == ANALYZER) & (pc.field("name") == ERROR_RATE.name)
    return absences([row for part in run.table_parts("measures", wanted) for row in part.to_pylist()])


def absences(rates: Iterable[Mapping[str, Any]]) -> list[str]:
    """The same from the rows of `error_rate`: a signal has one where a task has it."""
    by_signal = {row["signal"]: row for row in rates}
    if None not in by_signal:
        return ["there are no tool tasks"]
    n = by_signal[None]["n"]
    n_wrong = round(by_signal[None]["value"] * n)
    if n_wrong in (0, n):
        return [f"all of {n} choices are {'wrong' if n_wrong else 'right'}: there is nothing to foretell"]
    out, absent = [], [name for name in (*SIGNALS, PROBE) if name not in by_signal]
    if min(n_wrong, n - n_wrong) < LEAST_KIND:
        out.append(
            f"{n_wrong} of {n} choices are wrong: a fit needs {LEAST_KIND} wrong and {LEAST_KIND} right ones"
        )
        absent = [name for name in absent if name != PROBE]
    needs = {
        "attention_margin": "attn_to_spans was not captured",
        "order_agreement": "`probe analyze RUN order` was not made",
        PROBE: "resid_post was not captured",
    }
    return out + [f"no {name}: {why}" for name, why in needs.items() if name in absent]


def _model(run: Run) -> Any:
    """What tells models apart: their weights, or in older runs their name."""
    model = run.run.get("model") or {}
    return model.get("weights_hash") or model.get("name")


# -- one forecast ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """What a signal says of some tasks, and how it came out."""

    wrong: np.ndarray
    """[task], bool"""
    confidence: np.ndarray
    """[task]: from it an order of the tasks; more means surer to be right."""
    auroc: float
    interval: Interval | None
    place: dict[str, Any]
    widening: float = 1.0
    probability: np.ndarray | None = None
    """[task]: P(wrong), fitted elsewhere."""
    base: np.ndarray | None = None
    """[task]: share of wrong choices where it was fitted."""
    fitted: str = HELD_OUT
    """The rule of the probability."""

    def rows(self) -> Iterator[Row]:
        n, wrong = len(self.wrong), self.wrong
        yield AUROC.row(WHOLE_RUN, self.auroc, n=n, interval=self.interval, **self.place)
        curve = risk_curve(self.confidence, wrong)
        for coverage in COVERAGES:
            kept = max(1, round(coverage * n))
            risk = float(curve[kept - 1])
            yield RISK.row(
                WHOLE_RUN, risk, n=kept, interval=wilson(risk, kept), coverage=coverage, **self.place
            )
        of_area, of_gain = area_intervals(self.confidence, wrong, self.widening)
        yield AURC.row(WHOLE_RUN, risk_area(self.confidence, wrong), n=n, interval=of_area, **self.place)
        yield AURC_GAIN.row(WHOLE_RUN, area_gain(self.confidence, wrong), n=n, interval=of_gain, **self.place)
        yield from self._quarters(curve)
        if self.probability is not None and self.base is not None:
            yield from self._calibration(self.probability, self.base)

    def _quarters(self, curve: np.ndarray) -> Iterator[Row]:
        n = len(curve)
        if n < 2 * QUARTERS:
            return
        ends = [round(n * k / QUARTERS) for k in range(QUARTERS + 1)]
        errors = np.concatenate([[0.0], curve * np.arange(1, n + 1)])[ends]
        sizes, hits = np.diff(ends), np.diff(errors)
        for quarter, (size, hit) in enumerate(zip(sizes, hits, strict=True)):
            share = min(1.0, float(hit / size))
            yield ERROR_RATE_QUARTER.row(
                WHOLE_RUN,
                share,
                n=int(size),
                interval=wilson(share, int(size)),
                bin=QUARTERS - 1 - quarter,
                **self.place,
            )
        low, high = hits[-1] / sizes[-1], hits[0] / sizes[0]
        if high > 0:
            interval = share_ratio(hits[-1], sizes[-1], hits[0], sizes[0])
            yield ERROR_RATIO.row(
                WHOLE_RUN, low / high, n=int(sizes[-1] + sizes[0]), interval=interval, **self.place
            )

    def _calibration(self, p: np.ndarray, base: np.ndarray) -> Iterator[Row]:
        place, wrong, n = self.place | {"rule": self.fitted}, self.wrong.astype(float), len(self.wrong)
        yield BRIER.share((p - wrong) ** 2, **place)
        yield BRIER_GAIN.mean((base - wrong) ** 2 - (p - wrong) ** 2, **place)
        if n < LEAST_FOLDED:
            return
        ece, floor = calibration_error(p, wrong, equal_mass(p))
        yield ECE.row(WHOLE_RUN, ece.value, n=n, interval=ece.interval, **place)
        yield ECE_FLOOR.row(WHOLE_RUN, floor.value, n=n, interval=floor.interval, **place)


# -- within a run ----------------------------------------------------------------------------------------------------


def _held_out(seen: Observed) -> Iterator[Row]:
    """Raw signals; then, of the tasks that have all states, what is fitted on other folds."""
    for name, values in seen.signals.items():
        has = ~np.isnan(values)
        wrong, confidence = seen.wrong[has], values[has]
        yield ERROR_RATE.share(wrong, signal=name)
        area = auroc(-confidence, wrong)
        if area is None:
            continue
        yield AURC_LOWEST.row(WHOLE_RUN, lowest_area(wrong), n=len(wrong), signal=name)
        split = Split.of(wrong, permutations=0)
        probability = base = None
        if split is not None:
            probability, base = np.zeros(len(wrong)), np.zeros(len(wrong))
            for fold in range(FOLDS):
                held = split.folds == fold
                probability[held] = probability_of(-confidence[~held], wrong[~held], -confidence[held])
                base[held] = wrong[~held].mean()
        place = {"signal": name, "rule": RAW}
        yield from Forecast(wrong, confidence, *area, place, probability=probability, base=base).rows()
    fit = fitted_probe(seen)
    if fit is not None:
        split, probe = fit
        yield from _fitted(PROBE, probe.nested, split)
        for fold, layer in enumerate(probe.nested.chosen):
            yield CHOSEN_LAYER.row(
                WHOLE_RUN,
                float(layer),
                n=int((split.folds != fold).sum()),
                signal=PROBE,
                rule=HELD_OUT,
                fold=fold,
            )
        for layer, held in zip(probe.layers, probe.by_layer, strict=True):
            value, interval, _ = held.estimate(split)
            yield AUROC.row(
                WHOLE_RUN,
                value,
                n=len(split.folds),
                interval=interval,
                signal=PROBE,
                rule=HELD_OUT,
                layer=layer,
            )
    yield from _best(seen, fit)


def fitted_probe(seen: Observed) -> tuple[Split, ProbeFit] | None:
    """The linear probe of a run's tasks; None where states were not captured or too few choices are right or wrong."""
    split = Split.of(seen.wrong[seen.states.tasks])
    return None if split is None else (split, fit_probe(seen.states, split))


def _best(seen: Observed, fit: tuple[Split, ProbeFit] | None) -> Iterator[Row]:
    """The signal that is best on the other folds, among those that all tasks have."""
    tasks = np.array(seen.states.tasks if fit else range(len(seen.wrong)))
    split = fit[0] if fit else Split.of(seen.wrong)
    whole = {
        name: values[tasks] for name, values in seen.signals.items() if not np.isnan(values[tasks]).any()
    }
    if split is None or len(whole) + (fit is not None) < 2:
        return
    best = choose_signal(whole, fit[1].nested if fit else None, split)
    yield from _fitted(BEST, best, split)
    for name in sorted({*best.chosen}, key=str):
        yield CHOSEN_FOLDS.row(WHOLE_RUN, best.chosen.count(name), n=FOLDS, signal=name)


def _fitted(name: str, held: HeldOut, split: Split) -> Iterator[Row]:
    wrong = split.labels[:, 0] > 0
    yield ERROR_RATE.share(wrong, signal=name)
    yield AURC_LOWEST.row(WHOLE_RUN, lowest_area(wrong), n=len(wrong), signal=name)
    probability, base = np.zeros(len(wrong)), np.zeros(len(wrong))
    for fold in range(FOLDS):
        inside = split.folds == fold
        probability[inside] = probability_of(held.known[fold, ~inside], wrong[~inside], held.scores[inside])
        base[inside] = wrong[~inside].mean()
    value, interval, p = held.estimate(split)
    place: dict[str, Any] = {"signal": name, "rule": HELD_OUT}
    yield from Forecast(
        wrong,
        -ranks_within(held.scores, split.folds),
        value,
        interval,
        place,
        held.widening(split),
        probability,
        base,
    ).rows()
    yield AUROC_P.row(WHOLE_RUN, p, n=len(wrong), **place)


# -- from another run ------------------------------------------------------------------------------------------------


def _transferred(seen: Observed, learned: Observed, same_model: bool) -> Iterator[Row]:
    """What is fitted on another run's tasks alone, tested on this run's."""
    areas: dict[str, float] = {}
    fits: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for name, values in learned.signals.items():
        has = ~np.isnan(values)
        if name not in seen.signals or _too_few(learned.wrong[has]):
            continue
        fits[name] = -values[has], learned.wrong[has], -seen.signals[name]
        area = auroc(-values[has], learned.wrong[has])
        areas[name] = area.value if area else 0.5
    fit = fitted_probe(learned) if same_model and _alike(seen.states, learned.states) else None
    if fit is not None:
        split, probe = fit
        layer = probe.best_layer
        held = probe.by_layer[probe.layers.index(layer)]
        wrong = split.labels[:, 0] > 0
        asked = np.full(len(seen.wrong), np.nan)
        asked[seen.states.tasks] = ridge(
            learned.states.layer(layer), split.labels[:, :1], seen.states.layer(layer)
        )[:, 0]
        fits[PROBE] = held.scores, wrong, asked
        areas[PROBE] = float(probe.nested.estimate(split)[0])
        yield CHOSEN_LAYER.row(WHOLE_RUN, layer, n=len(wrong), signal=PROBE, rule=TRANSFER)
    whole = [name for name, (_, _, asked) in fits.items() if not np.isnan(asked).any()]
    if len(whole) > 1:
        fits[BEST] = fits[max(whole, key=lambda name: areas[name])]
    for name, (scores, wrong, asked) in fits.items():
        has = ~np.isnan(asked)
        tested = seen.wrong[has]
        p = probability_of(scores, wrong, asked[has])
        area = auroc(p, tested)
        if area is None:
            continue
        base = np.full(len(tested), wrong.mean())
        place = {"signal": name, "rule": TRANSFER}
        yield from Forecast(tested, -p, *area, place, probability=p, base=base, fitted=TRANSFER).rows()


def _too_few(wrong: np.ndarray) -> bool:
    return bool(min(wrong.sum(), (~wrong).sum()) < LEAST_KIND)


def _alike(states: DecisionStates, other: DecisionStates) -> bool:
    return (states.layers, states.width) == (other.layers, other.width)
