"""Adapters as measures: one number a row, by module and over the adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from probe.analyzers.registry import Measure, measure
from probe.analyzers.rows import Row
from probe.training.lora.base import TOP_K, BaseComparison, BaseVectors, against, decompose
from probe.training.lora.files import Adapter, Delta
from probe.training.lora.spectrum import Spectrum, of_factors

_NAME = "lora"
_PRINTED = "`probe lora` prints it and draws the singular values"
_OF_SWEEP = "the figure of `probe lora sweep` draws it along the training"
_OVER_SEEDS = "95 % over seeds, Student's t"


def _measure(
    name: str, unit: str, means: str, *, over: str | None = None, source: str | None = None
) -> Measure:
    """A measure of one ΔW, and, where `over` says how, of all of an adapter."""
    axes = "layer? module" if over is None else "layer? module?"
    whole = "" if over is None else f" Over an adapter: {over}."
    return measure(_NAME, name, unit=unit, axes=axes, means=means + whole, source=source, figure=_PRINTED)


_BLOCKS = "of all ΔW as one block-diagonal matrix"
_MEAN = "the mean over its matrices"
NUCLEAR_NORM = _measure("nuclear_norm", "weight", "Σ σ, the sum of the singular values of ΔW.", over=_BLOCKS)
FROBENIUS_NORM = _measure("frobenius_norm", "weight", "√Σ σ² of ΔW.", over=_BLOCKS)
SPECTRAL_NORM = _measure("spectral_norm", "weight", "σ₁, the largest singular value of ΔW.", over=_BLOCKS)
NORMS = NUCLEAR_NORM, FROBENIUS_NORM, SPECTRAL_NORM
RANKS = (
    _measure("rank", "rank", "r of the factors B [d_out, r] and A [r, d_in].", over=_MEAN),
    _measure("numerical_rank", "rank", "How many σ exceed σ₁ · max(d_out, d_in) · 2⁻⁵².", over=_MEAN),
    _measure(
        "stable_rank",
        "rank",
        "‖ΔW‖_F² / ‖ΔW‖₂².",
        over=_MEAN,
        source="Rudelson and Vershynin 2007",
    ),
    _measure(
        "effective_rank",
        "rank",
        "exp of the entropy of σ / Σ σ.",
        over=_MEAN,
        source="Roy and Vetterli 2007",
    ),
)
CAUCHY_SCHWARZ_RATIO = _measure(
    "cauchy_schwarz_ratio",
    "share",
    "‖ΔW‖_* / (√r ‖ΔW‖_F), at most 1: how much of the bound ‖ΔW‖_* ≤ √r ‖ΔW‖_F is used; 1 where all r singular values "
    "are equal.",
    over=_MEAN,
)
PARAMETERS = measure(
    _NAME,
    "parameters",
    unit="parameters",
    means="Numbers in all factors A and B of an adapter.",
    figure=_PRINTED,
)
SHARE_OF_BASE = _measure("share_of_base", "share", "‖ΔW‖_F / ‖W‖_F.")
_OVERLAP = "Hu et al. 2021, section 7.2"
OVERLAPS = tuple(
    (
        _measure(
            f"base_overlap_{side}",
            "share",
            f"‖{matrix}_ΔWᵀ {matrix}_W‖_F² / r over the r {side} singular vectors of ΔW and the r first of W.",
            source=_OVERLAP,
        ),
        _measure(
            f"base_overlap_chance_{side}",
            "share",
            f"What `base_overlap_{side}` is in the mean for r random directions: r over the dimension.",
        ),
    )
    for side, matrix in (("left", "U"), ("right", "V"))
)
_INTRUDERS = "Shuttleworth et al. 2024, section 3"
INTRUDER_DIMENSIONS = _measure(
    "intruder_dimensions",
    "directions",
    f"Of the {TOP_K} first left singular vectors of W + ΔW, those whose largest absolute cosine with any of W is below "
    "0.5.",
    over="the sum over its matrices",
    source=_INTRUDERS,
)
INTRUDER_DIMENSIONS_RIGHT = _measure(
    "intruder_dimensions_right", "directions", "The same of the right singular vectors.", source=_INTRUDERS
)
INTRUDER_DIMENSIONS_WITH_MAGNITUDE = _measure(
    "intruder_dimensions_with_magnitude",
    "directions",
    "`intruder_dimensions` of the weights with DoRA's learned magnitude.",
    source="Liu et al. 2024",
)
SHARE_OF_BASE_WITH_MAGNITUDE = _measure(
    "share_of_base_with_magnitude",
    "share",
    "‖W′ − W‖_F / ‖W‖_F, W′ the weights with DoRA's learned magnitude.",
    source="Liu et al. 2024",
)
for _name, _means in (
    (
        "train_loss",
        "Mean −log p over the completions of as many training lines as there are validation lines.",
    ),
    ("validation_loss", "Mean −log p over the completions of the validation lines."),
    ("base_kl", "KL(base‖adapted), mean over all next-token distributions of the unrelated text."),
):
    measure(_NAME, _name, unit="nats/token", of="run", means=_means, interval=_OVER_SEEDS, figure=_OF_SWEEP)


def spectra(adapter: Adapter) -> list[tuple[Delta, Spectrum]]:
    """The spectrum of every ΔW of an adapter, from its factors."""
    return [(delta, of_factors(delta.a, delta.b, delta.scale)) for delta in adapter.deltas]


def against_base(
    adapter: Adapter,
    weight_of: Callable[[str], tuple[Any, bool] | None],
    vectors: dict[str, BaseVectors],
    done: Callable[[], None] = lambda: None,
) -> dict[str, BaseComparison]:
    """Every ΔW against its base weight, by module; `vectors` keeps decompositions for further adapters.

    `weight_of(module)` gives the stored weight and whether it is transposed, None where a path has no weight
    of its own (an expert). Raises BadInput where shapes differ.
    """
    comparisons = {}
    for delta in adapter.deltas:
        key = f"{delta.module} as stored" if adapter.as_stored(delta.module) else delta.module
        if key not in vectors:
            weight = weight_of(delta.module)
            if weight is None:
                continue
            vectors[key] = decompose(weight[0], weight[1] and key == delta.module)
        comparisons[delta.module] = against(delta, vectors[key])
        done()
    return comparisons


def rows(
    name: str, decomposed: list[tuple[Delta, Spectrum]], compared: Mapping[str, BaseComparison] | None = None
) -> list[Row]:
    """Measures of one adapter: by module, then over all (module null)."""
    measures = [
        defined.row(name, value, layer=delta.layer, module=delta.module)
        for delta, spectrum in decomposed
        for defined, value in _numbers(spectrum, (compared or {}).get(delta.module))
        if value is not None
    ]
    return measures + _over_all(name, decomposed, compared or {})


def _numbers(spectrum: Spectrum, base: BaseComparison | None) -> Iterator[tuple[Measure, float | None]]:
    for defined in (*NORMS, *RANKS, CAUCHY_SCHWARZ_RATIO):
        yield defined, getattr(spectrum, defined.name)
    if base is None:
        return
    yield SHARE_OF_BASE, base.share_of_base
    if base.overlap and base.overlap_chance:
        for (overlap, by_chance), value, chance in zip(
            OVERLAPS, base.overlap, base.overlap_chance, strict=True
        ):
            yield overlap, value
            yield by_chance, chance
    yield INTRUDER_DIMENSIONS, base.intruders[0]
    yield INTRUDER_DIMENSIONS_RIGHT, base.intruders[1]
    if base.magnitude_intruders is not None:
        yield INTRUDER_DIMENSIONS_WITH_MAGNITUDE, base.magnitude_intruders[0]
        yield SHARE_OF_BASE_WITH_MAGNITUDE, base.magnitude_share


def _over_all(
    name: str, decomposed: list[tuple[Delta, Spectrum]], compared: Mapping[str, BaseComparison]
) -> list[Row]:
    """Norms of all ΔW as one block-diagonal matrix, means of ranks, sums of intruders."""
    every = [spectrum for _, spectrum in decomposed]
    n = len(every)
    out = [
        NUCLEAR_NORM.row(name, sum(s.nuclear_norm for s in every), n=n),
        FROBENIUS_NORM.row(name, math.sqrt(sum(s.frobenius_norm**2 for s in every)), n=n),
        SPECTRAL_NORM.row(name, max(s.spectral_norm for s in every), n=n),
    ]
    for defined in (*RANKS, CAUCHY_SCHWARZ_RATIO):
        values = [value for s in every if (value := getattr(s, defined.name)) is not None]
        if values:
            out.append(defined.row(name, sum(values) / len(values), n=len(values)))
    out.append(PARAMETERS.row(name, sum(d.a.numel() + d.b.numel() for d, _ in decomposed), n=n))
    if compared:
        intruders = sum(c.intruders[0] for c in compared.values())
        out.append(INTRUDER_DIMENSIONS.row(name, intruders, n=len(compared)))
    return out


def document(
    adapter: Adapter, decomposed: list[tuple[Delta, Spectrum]], measures: list[Row]
) -> dict[str, Any]:
    """One adapter as a JSON document: settings, every module's numbers and singular values, the rest of the file."""
    modules: dict[str, dict[str, Any]] = {}
    for delta, spectrum in decomposed:
        modules[delta.module] = {
            "module": delta.module,
            "layer": delta.layer,
            "shape": [delta.b.shape[0], delta.a.shape[1]],
            "scale": delta.scale,
            "dora": delta.magnitude is not None,
            "singular_values": spectrum.singular_values.tolist(),
        }
    total = {}
    for row in measures:
        module = row.at("module")
        (total if module is None else modules[module])[row.name] = row.value
    settings = (
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "init_lora_weights",
    )
    return {
        "adapter": adapter.name,
        "file": str(adapter.path),
        "base": adapter.base,
        "settings": {key: adapter.config.get(key) for key in settings if key in adapter.config},
        "n_matrices": len(decomposed),
        "total": total,
        "modules": list(modules.values()),
        "not_low_rank": [
            {"tensor": key, "shape": list(shape), "what": what} for key, shape, what in adapter.others
        ],
        "notes": adapter.notes,
        "definitions": {
            defined.name: f"{defined.means} [{defined.source}]" if defined.source else defined.means
            for defined in (CAUCHY_SCHWARZ_RATIO, *RANKS[2:], INTRUDER_DIMENSIONS)
        },
    }
