"""Does one vector explain the shift? The mean over inputs of the change of vocabulary-centred log-probabilities.

b_i = c(log p(·|prompt, x_i)) − c(log p(·|x_i)), c taking off the mean over the vocabulary, which makes log-probabilities
and logits the same. The claim that a prompt adds one vector to every input's logits is b_i = b; its test is
leave-one-out: R² = 1 − Σ‖b_i − b̄₋ᵢ‖² / Σ‖b_i‖², 1 where one vector explains all, 0 where it explains as much
as no vector, below 0 where less.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from probe.analyzers.prompting.shift import NAME
from probe.analyzers.registry import BOOTSTRAP, Figure, Measure, measure
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.maths.statistics import bootstrap_ratio
from probe.prompts.labels import BASE
from probe.runs.views.prompting import LEAST, Item
from probe.runs.views.shifts import LIKELY, WORDS, Vectors, centred, families_of

if TYPE_CHECKING:
    import pandas

OTHER_FAMILY = "other_family"
"""`control` of what another family of tasks is used for in the own one's place."""

_R2 = "R² = 1 − Σ‖b_i − b̄‖² / Σ‖b_i‖² of the changes b_i of centred log-probabilities, b̄ the mean over"
_NEEDS = ("logits", f"{LEAST} tasks")
BIAS_R2 = measure(
    NAME,
    "bias_r2",
    unit="R²",
    of="run",
    axes="variant family?",
    means=f"{_R2} all other tasks; with `family`, of its tasks alone and over the other ones of these.",
    interval=BOOTSTRAP,
    needs=_NEEDS,
    figure=Figure(kind="estimates", by="variant", card="bias"),
)
BIAS_R2_FAMILY = measure(
    NAME,
    "bias_r2_family",
    unit="R²",
    of="run",
    axes="variant control?",
    means=f"{_R2} the other tasks of task i's family; control `other_family`: over the tasks of another family.",
    interval=BOOTSTRAP,
    needs=_NEEDS,
    figure=Figure(kind="estimates", by="variant", card="bias"),
)


def _listed(end: str, verb: str) -> Measure:
    return measure(
        NAME,
        f"bias_{end}",
        unit="nats",
        of="run",
        axes="variant family? rank token",
        means=f"What the mean vector b̄ says: the {WORDS} tokens that it {verb} most, among those with a mean probability "
        f"of {LIKELY:g} with or without the prompt.",
        needs=_NEEDS,
        figure=Figure(kind="table", by="token", card="bias"),
    )


ENDS = {"promoted": _listed("promoted", "raises"), "demoted": _listed("demoted", "lowers")}
"""End of a list of tokens → its measure."""


def measures(
    items: Sequence[Item], table: pandas.DataFrame, known: Mapping[str, str] | None = None
) -> Iterator[Row]:
    """R² of every variant, with its control, and the tokens that each vector moves; `known` are `token_texts` of the run."""
    texts = {int(token): text for token, text in (known or {}).items()}
    texts |= {} if table.empty else _texts(table)
    for variant, families in families_of(items).items():
        vectors = Vectors(variant, [item for item in items if variant in item.passages])
        yield from _r2(vectors, families)
        for family in families:
            if vectors.counts.get(family, 0) >= LEAST:
                yield from _tokens(vectors, family, texts)


def explained(
    defined: Measure, errors: Sequence[float], sizes: Sequence[float], **place: str | int | None
) -> Row:
    """The row of 1 − Σ errors / Σ sizes over tasks; its interval is a bootstrap of both sums."""
    error, size = np.asarray(errors, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    value = 1 - error.sum() / size.sum()
    return defined.row(WHOLE_RUN, value, n=len(size), interval=bootstrap_ratio(size - error, size), **place)


def _r2(vectors: Vectors, families: Sequence[str | None]) -> Iterator[Row]:
    """R² of the vector of all tasks; of the task's own family; of another family's, which is the control."""
    pairs: dict[tuple[Measure, str | None, str | None], list[tuple[float, float]]] = defaultdict(list)
    named = [family for family in families if family is not None]
    for item in vectors.items:
        after, before = item.log_probs(vectors.variant), item.log_probs(BASE)
        assert after is not None and before is not None
        shift = centred(after) - centred(before)
        size = float(shift @ shift)
        guesses: dict[tuple[Measure, str | None, str | None], np.ndarray | None] = {
            (BIAS_R2, None, None): vectors.left_out(None, shift, True)
        }
        if item.family in named:
            within = vectors.left_out(item.family, shift, True)
            guesses |= {(BIAS_R2, item.family, None): within, (BIAS_R2_FAMILY, None, None): within}
            other = named[(named.index(item.family) + 1) % len(named)]
            if other != item.family:
                guesses[BIAS_R2_FAMILY, None, OTHER_FAMILY] = vectors.left_out(other, shift, False)
        for key, vector in guesses.items():
            if vector is not None:
                pairs[key].append((float(np.square(shift - vector).sum()), size))
    for (defined, family, control), numbers in pairs.items():
        errors, sizes = zip(*numbers, strict=True)
        if sum(sizes) > 0:
            place = {"family": family, "control": control}
            yield explained(defined, errors, sizes, variant=vectors.variant, **place)


def _tokens(vectors: Vectors, family: str | None, texts: Mapping[int, str]) -> Iterator[Row]:
    for end, rank, token, value in vectors.listed(family):
        place = {"variant": vectors.variant, "family": family, "rank": rank}
        text = texts.get(token, f"token {token}")
        yield ENDS[end].row(WHOLE_RUN, value, n=vectors.counts[family], token=text, **place)


def _texts(table: pandas.DataFrame) -> dict[int, str]:
    rows = table[table.experiment == "text"]
    return {int(token): text for token, text in zip(rows.token, rows.text, strict=True)}
