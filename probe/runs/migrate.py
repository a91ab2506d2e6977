"""Measures of earlier versions: places that were written into `variant`, `span` or `tool` become columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

Rule = Callable[[Mapping[str, Any]], dict[str, Any]]
"""The row as it was written → the columns that are different now, and `name` or `unit` where the measure is another."""

WRITTEN = ("analyzer", "name", "unit", "layer", "step", "span", "tool", "variant")
"""The columns on which rules depend."""

RULES: dict[tuple[str, str], Rule] = {}
"""(analyzer, name) → rule."""


def migrated(table: pyarrow.Table) -> pyarrow.Table:
    """A table of measures, its missing columns added as nulls, with the places of its rows in their own columns."""
    import pyarrow as pa

    written = list(zip(*(table[name].to_pylist() for name in WRITTEN), strict=True))
    changes: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in set(written):
        rule = RULES.get((row[0], row[1]))
        if rule:
            changes[row] = rule(dict(zip(WRITTEN, row, strict=True)))
    for name in sorted({name for change in changes.values() for name in change}):
        values = table[name].to_pylist()
        for index, row in enumerate(written):
            values[index] = changes.get(row, {}).get(name, values[index])
        column = table.column_names.index(name)
        table = table.set_column(
            column, table.schema.field(name), pa.array(values, table.schema.field(name).type)
        )
    return table


def enter(analyzer: str, rule: Rule, *names: str) -> None:
    RULES.update({(analyzer, name): rule for name in names})


# -- distribution -----------------------------------------------------------------------------------------------


def _distribution(row: Mapping[str, Any]) -> dict[str, Any]:
    """`base/p=0.9`, `entropy=1`, `few_shot/raw`, `k=40/p=0.9`, `sampled`; a part that is none of these is a variant."""
    columns: dict[str, Any] = {"variant": None}
    for part in (row["variant"] or "").split("/"):
        key, equals, value = part.partition("=")
        if equals and key in ("p", "k", "entropy"):
            axis = "wanted_entropy" if key == "entropy" else key
            columns[axis] = int(value) if key == "k" else float(value)
        elif part in ("raw", "centred"):
            columns["gauge"] = part
        elif part == "sampled":
            columns |= {} if row["name"] == "mass_kept" else {"rule": part}
        elif part:
            columns["variant"] = part
    return columns


enter(
    "distribution",
    _distribution,
    *("entropy", "nucleus_size", "mass_kept", "temperature", "heat_capacity", "surprisal", "log_partition"),
    *("energy_mean", "free_energy", "token_energy", "nucleus_follows_entropy", "k_too_small", "k_too_large"),
)


# -- cot ---------------------------------------------------------------------------------------------------------


def _reader(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"variant": None, "reader": row["variant"]}


def _ablation(row: Mapping[str, Any]) -> dict[str, Any]:
    experiment = row["variant"].removeprefix("random_")
    control = None if experiment == row["variant"] else "random"
    reader = "answer" if row["name"] == "knockout_kl" and row["step"] is None else None
    return {"variant": None, "experiment": experiment, "control": control, "reader": reader}


def _origin(row: Mapping[str, Any]) -> dict[str, Any]:
    reader = "reader" if row["variant"] == "answer" else "kind"
    return {"variant": None, "span": None, "origin": row["span"], reader: row["variant"]}


def _reads_against_proof(row: Mapping[str, Any]) -> dict[str, Any]:
    """`read_mass~knockout_kl:total`"""
    correlate, _, proof = row["variant"].partition("~")
    cause, _, experiment = proof.partition(":")
    return {"variant": None, "correlate": correlate, "cause": cause, "experiment": experiment}


def _outcome(row: Mapping[str, Any]) -> dict[str, Any]:
    of_run = "_share" if row["unit"] == "share of tasks" else ""
    return {"variant": None, "name": "_".join(filter(None, (row["name"], row["variant"]))) + of_run}


def _regenerated(row: Mapping[str, Any]) -> dict[str, Any]:
    return _reader(row) | ({"name": "regenerated_share"} if row["unit"] == "share" else {})


enter("cot", _reader, "read_mass", "read_norm", "answer_lens")
enter("cot", lambda row: _reader(row) | {"unit": "logits"}, "read_logit")
enter("cot", _origin, "read_origin")
enter("cot", lambda row: {"variant": None, "distance": int(row["variant"])}, "read_distance")
enter(
    "cot",
    lambda row: {"variant": None, "threshold": float(row["variant"].partition(">")[2])},
    "memory_lifetime",
)
enter("cot", _ablation, "knockout_kl", "answer_change", "answer_odds_change")
enter("cot", _reads_against_proof, "causal_spearman", "causal_spearman_within")
enter("cot", _outcome, "early_answer", "filler", "mistake", "paraphrase", "resampling")
enter("cot", _regenerated, "regenerated")
