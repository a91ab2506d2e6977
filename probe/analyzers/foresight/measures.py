"""Definitions of the measures of foresight."""

from __future__ import annotations

from probe.analyzers.foresight.fits import LEAST_KIND, PERMUTATIONS
from probe.analyzers.registry import FOLDED, MEAN, SHARE, WILSON, Figure, Measure, measure
from probe.maths.auroc import LEAST_GROUP

ANALYZER = "foresight"
_CARD = "foresight"
_TABLE = Figure(kind="table", by="signal", card=_CARD)
_CURVE = Figure(kind="curve", x="coverage", by="signal", card=_CARD)
_FIT = (f"{LEAST_KIND} right and {LEAST_KIND} wrong choices",)
_WIDENED = (
    f"95 % Newcombe's AUROC (2006, method 5) over tasks, from {LEAST_GROUP} right and {LEAST_GROUP} wrong on; of a held-out fit "
    "widened by what permuted labels vary more"
)
_BOOTSTRAP = "95 % bootstrap over tasks, from 20 on; of a held-out fit widened as that of `auroc`"


def _of_run(name: str, unit: str, axes: str, means: str, **more) -> Measure:
    more.setdefault("figure", _TABLE)
    return measure(ANALYZER, name, unit=unit, of="run", axes=axes, means=means, **more)


ERROR_RATE = _of_run(
    "error_rate",
    "share of tasks",
    "signal?",
    "Tasks whose most probable candidate is wrong; with a signal of those that have it. It is the base rate: the risk of a "
    "random order at every coverage, and its `aurc`.",
    interval=WILSON,
)
AUROC = _of_run(
    "auroc",
    "probability",
    "signal rule layer?",
    "P(a wrong choice has less of the signal than a right one), ties ½. `raw` signals are as they are; those `held_out` are "
    "fitted on other folds, and pairs are of one fold; those of `transfer` are fitted on another run. With a layer the "
    "linear probe of that layer, not chosen.",
    interval=_WIDENED,
)
AUROC_P = _of_run(
    "auroc_p",
    "probability",
    "signal rule",
    f"Share of label sets whose `auroc` is as high, the true one counted: {PERMUTATIONS} times the labels are exchanged "
    "within folds and the whole fit, choice included, is made again.",
    source="Phipson and Smyth 2010",
    needs=_FIT,
)
CHOSEN_LAYER = _of_run(
    "chosen_layer",
    "layer",
    "signal rule fold?",
    "The layer of the linear probe: without the tasks of a fold, or on all tasks of the other run.",
    needs=("resid_post", *_FIT),
)
CHOSEN_FOLDS = _of_run(
    "chosen_folds",
    "folds",
    "signal",
    "Folds without which this signal has the highest AUROC: it is what `best` stands for there.",
    needs=_FIT,
)
RISK = _of_run(
    "risk",
    "share of choices",
    "signal rule coverage",
    "Share of wrong choices among the n surest, a share `coverage` of all; ties in their mean order.",
    interval=f"{WILSON} that are accepted",
    figure=_CURVE,
)
AURC = _of_run(
    "aurc",
    "share of choices",
    "signal rule",
    "Area under the risk–coverage curve: the mean over k of the share of wrong choices among the k surest. A random order "
    "has `error_rate`, the best possible one `aurc_lowest`.",
    source="Geifman and El-Yaniv 2017",
    interval=_BOOTSTRAP,
)
AURC_LOWEST = _of_run(
    "aurc_lowest",
    "share of choices",
    "signal",
    "`aurc` where every right choice comes before every wrong one.",
)
AURC_GAIN = _of_run(
    "aurc_gain",
    "share",
    "signal rule",
    "(`error_rate` − `aurc`) / (`error_rate` − `aurc_lowest`): 0 for a random order, 1 for the best possible one.",
    interval=_BOOTSTRAP,
)
ERROR_RATE_QUARTER = _of_run(
    "error_rate_quarter",
    "share of tasks",
    "signal rule bin",
    "`error_rate` of a quarter of the tasks by the signal: bin 0 has the least of it, bin 3 the most; ties in their mean "
    "order.",
    interval=WILSON,
)
ERROR_RATIO = _of_run(
    "error_ratio",
    "ratio",
    "signal rule",
    "`error_rate_quarter` of the quarter with the least of the signal over that with the most. No row where the latter has "
    "no error.",
    source="Wu et al. 2026, arXiv 2605.07990",
    interval="95 % Katz, of two quarters",
)
BRIER = _of_run(
    "brier",
    "probability",
    "signal rule",
    "Mean (P(wrong) − wrong)², where P is that of a logistic regression on the signal, fitted on other folds or on another "
    "run.",
    source="Platt 1999",
    interval=SHARE,
    needs=_FIT,
)
BRIER_GAIN = _of_run(
    "brier_gain",
    "probability",
    "signal rule",
    "`brier` of the error rate of the tasks that were fitted on, said of every task, minus `brier`.",
    interval=MEAN,
    needs=_FIT,
)
ECE = _of_run(
    "ece",
    "probability",
    "signal rule",
    "Σ_b n_b/n · |share wrong − mean P(wrong)| over bins of equally many tasks; compare it with `ece_floor`.",
    source="Guo et al. 2017, eq. 3",
    interval=FOLDED,
    needs=_FIT,
)
ECE_FLOOR = _of_run(
    "ece_floor",
    "probability",
    "signal rule",
    "Mean `ece` of a calibrated forecast of the same P: what chance alone gives.",
    source="Bröcker and Smith 2007",
    interval="95 % range of draws",
    needs=_FIT,
)
