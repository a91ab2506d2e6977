"""Adapters as measures: one number a row, by module and over the adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from probe.analyzers.rows import Row
from probe.training.lora.base import TOP_K, AgainstBase, BaseVectors, against, decompose
from probe.training.lora.files import Adapter, Delta
from probe.training.lora.spectrum import Spectrum, of_factors

RANKS = ("rank", "numerical_rank", "stable_rank", "effective_rank")
NORMS = ("nuclear_norm", "frobenius_norm", "spectral_norm")


def spectra(adapter: Adapter) -> list[tuple[Delta, Spectrum]]:
    """The spectrum of every ΔW of an adapter, from its factors."""
    return [(delta, of_factors(delta.a, delta.b, delta.scale)) for delta in adapter.deltas]


def against_base(
    adapter: Adapter,
    weight_of: Callable[[str], tuple[Any, bool] | None],
    vectors: dict[str, BaseVectors],
    done: Callable[[], None] = lambda: None,
) -> dict[str, AgainstBase]:
    """Every ΔW against its base weight, by module; `vectors` keeps decompositions for further adapters.

    `weight_of(module)` gives the stored weight and whether it is transposed, None where a path has no weight
    of its own (an expert). Raises BadInput where shapes differ.
    """
    found = {}
    for delta in adapter.deltas:
        key = f"{delta.module} as stored" if adapter.as_stored(delta.module) else delta.module
        if key not in vectors:
            weight = weight_of(delta.module)
            if weight is None:
                continue
            vectors[key] = decompose(weight[0], weight[1] and key == delta.module)
        found[delta.module] = against(delta, vectors[key])
        done()
    return found


def rows(
    name: str, found: list[tuple[Delta, Spectrum]], compared: Mapping[str, AgainstBase] | None = None
) -> list[Row]:
    """Measures of one adapter: by module (`variant`), then over all (variant null)."""
    measures: list[Row] = []
    for delta, spectrum in found:
        at = {"task_id": name, "analyzer": "lora", "layer": delta.layer, "variant": delta.module, "n": 1}
        for key, value, unit in _numbers(spectrum, (compared or {}).get(delta.module)):
            if value is not None:
                measures.append(Row(**at, name=key, value=float(value), unit=unit))
    return measures + _over_all(name, found, compared or {})


def _numbers(spectrum: Spectrum, base: AgainstBase | None) -> list[tuple[str, float | None, str]]:
    found: list[tuple[str, float | None, str]] = [(key, getattr(spectrum, key), "weight") for key in NORMS]
    found += [(key, getattr(spectrum, key), "rank") for key in RANKS]
    found.append(("cauchy_schwarz_ratio", spectrum.cauchy_schwarz_ratio, "share"))
    if base is None:
        return found
    found.append(("share_of_base", base.share_of_base, "share"))
    for index, side in enumerate(("left", "right")):
        if base.overlap and base.overlap_chance:
            found.append((f"base_overlap_{side}", base.overlap[index], "share"))
            found.append((f"base_overlap_chance_{side}", base.overlap_chance[index], "share"))
    found.append(("intruder_dimensions", base.intruders[0], "directions"))
    found.append(("intruder_dimensions_right", base.intruders[1], "directions"))
    if base.magnitude_intruders is not None:
        found.append(("intruder_dimensions_with_magnitude", base.magnitude_intruders[0], "directions"))
        found.append(("share_of_base_with_magnitude", base.magnitude_share, "share"))
    return found


def _over_all(
    name: str, found: list[tuple[Delta, Spectrum]], compared: Mapping[str, AgainstBase]
) -> list[Row]:
    """Norms of all ΔW as one block-diagonal matrix, means of ranks, sums of intruders."""
    every = [spectrum for _, spectrum in found]
    n = len(every)
    total = [
        ("nuclear_norm", sum(s.nuclear_norm for s in every), "weight", n),
        ("frobenius_norm", math.sqrt(sum(s.frobenius_norm**2 for s in every)), "weight", n),
        ("spectral_norm", max(s.spectral_norm for s in every), "weight", n),
    ]
    for key, unit in (*((key, "rank") for key in RANKS), ("cauchy_schwarz_ratio", "share")):
        values = [value for s in every if (value := getattr(s, key)) is not None]
        if values:
            total.append((key, sum(values) / len(values), unit, len(values)))
    total.append(("parameters", sum(d.a.numel() + d.b.numel() for d, _ in found), "parameters", n))
    if compared:
        total.append(
            (
                "intruder_dimensions",
                sum(c.intruders[0] for c in compared.values()),
                "directions",
                len(compared),
            )
        )
    return [
        Row(task_id=name, analyzer="lora", name=key, value=float(value), unit=unit, n=count)
        for key, value, unit, count in total
    ]


def document(adapter: Adapter, found: list[tuple[Delta, Spectrum]], measures: list[Row]) -> dict[str, Any]:
    """One adapter as a JSON document: settings, every module's numbers and singular values, the rest of the file."""
    modules: dict[str, dict[str, Any]] = {}
    for delta, spectrum in found:
        modules[delta.module] = {
            "module": delta.module,
            "layer": delta.layer,
            "shape": [delta.b.shape[0], delta.a.shape[1]],
            "scale": delta.scale,
            "dora": delta.magnitude is not None,
            "singular_values": spectrum.singular_values.tolist(),
        }
    total = {}
    for measure in measures:
        if measure.variant is None:
            total[measure.name] = measure.value
        else:
            modules[measure.variant][measure.name] = measure.value
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
        "n_matrices": len(found),
        "total": total,
        "modules": list(modules.values()),
        "not_low_rank": [
            {"tensor": key, "shape": list(shape), "what": what} for key, shape, what in adapter.others
        ],
        "notes": adapter.notes,
        "definitions": {
            "cauchy_schwarz_ratio": "nuclear_norm / (sqrt(r) * frobenius_norm), r the rank of the factors",
            "stable_rank": "frobenius_norm^2 / spectral_norm^2 (Rudelson & Vershynin 2007)",
            "effective_rank": "exp of the entropy of the normalised singular values (Roy & Vetterli 2007)",
            "intruder_dimensions": f"of the {TOP_K} first left singular vectors of W + dW, those whose absolute "
            "cosine with every one of W is below 0.5 (Shuttleworth et al. 2024)",
        },
    }
