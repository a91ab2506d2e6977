"""Measures of earlier versions: places that were written into `variant`, `span` or `tool` become columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

Rule = Callable[[Mapping[str, Any]], dict[str, Any]]
"""The row as it was written → the columns that are different now, and `name` or `unit` where the measure is another."""


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


RULES: dict[tuple[str, str], Rule] = {
    ("distribution", name): _distribution
    for name in (
        *(
            "entropy",
            "nucleus_size",
            "mass_kept",
            "temperature",
            "heat_capacity",
            "surprisal",
            "log_partition",
        ),
        *("energy_mean", "free_energy", "token_energy"),
        *("nucleus_follows_entropy", "k_too_small", "k_too_large"),
    )
}
"""(analyzer, name) → rule."""


def _to(axis: str) -> Rule:
    return lambda row: {"variant": None, axis: row["variant"]}


def _tau(row: Mapping[str, Any]) -> dict[str, Any]:
    """τ was written to four digits of a half power of two."""
    return {"variant": None, "temperature": 2.0 ** (round(2 * math.log2(float(row["variant"]))) / 2)}


def _calibration(row: Mapping[str, Any]) -> dict[str, Any]:
    """`raw`, `fitted:mass`; the bin was a step."""
    rule, _, binning = row["variant"].partition(":")
    return {"variant": None, "rule": rule, "binning": binning or None, "step": None, "bin": row["step"]}


def _order(row: Mapping[str, Any]) -> dict[str, Any]:
    """`orders:K:slot`, `shown:K`, `orders`, and of a task `K:slot`."""
    parts = row["variant"].split(":")
    if parts[0].isdigit():
        parts.insert(0, "orders")
    axes = ("experiment", "n_tools", "slot")
    columns: dict[str, Any] = dict(zip(axes, (parts[0], *map(int, parts[1:])), strict=False))
    return columns | {"variant": None, "experiment": "order" if parts[0] == "orders" else None}


def _window(row: Mapping[str, Any]) -> dict[str, Any]:
    """`chosen:0-7`, of a task `0-7`."""
    role, _, layers = row["variant"].rpartition(":")
    return {"variant": None, "role": role or None, "layer_to": int(layers.partition("-")[2])}


def _word(row: Mapping[str, Any]) -> dict[str, Any]:
    index, _, text = row["span"].partition(":")
    return {"span": None, "word": text, "word_index": int(index)}


def _pair(row: Mapping[str, Any]) -> dict[str, Any]:
    names = {"attention_no_sink": "attention_without_sink", "value_norm": "attention_norm"}
    correlate, _, cause = row["variant"].partition("~")
    return {"variant": None, "correlate": names.get(correlate, correlate), "cause": cause}


_TOOL: dict[Rule, str] = {
    _to("kind"): "accuracy",
    _to("other_tool"): "confusion confusion_mass swap swap_share",
    _tau: "tau_entropy tau_top1 tau_accuracy tau_log_loss",
    _to("rule"): "tau_fitted",
    lambda row: {"step": None, "fold": row["step"]}: "tau_fold",
    _calibration: "log_loss brier ece ece_floor reliability_accuracy reliability_confidence",
    _to(
        "scorer"
    ): "probability_scorer accuracy_scorer accuracy_scorer_tools scorer_agreement scorer_agreement_tools "
    "position_bias_scorer tool_bias_scorer",
    _order: "position_bias position_bias_choice tool_bias tool_bias_choice slot_probability slot_rate "
    "first_slot_probability first_slot_rate baseline_first_slot",
    lambda row: {
        "variant": None,
        "span": None,
        "n_tools": int(row["variant"].split()[0]),
        "slot": int(row["span"].partition(":")[2]),
    }: "attention_by_position",
    _to("role"): "knockout knockout_random knockout_minus_random knockout_decision knockout_decision_random "
    "knockout_decision_minus_random scramble remove remove_tv",
    lambda row: {"variant": None, "role": "first_two" if row["variant"] else None}: "swap_follow_description",
    _window: "knockout_window",
    _word: "word",
    _pair: "causal_spearman causal_spearman_within",
    _to(
        "intentions"
    ): "p_action_given_state p_action_gap intention_information intention_entropy intention_mass "
    "intention_distinct p_action_accuracy p_action_accuracy_direct p_action_agreement",
}
RULES |= {("tool", name): rule for rule, names in _TOOL.items() for name in names.split()}


def migrated(table: pyarrow.Table) -> pyarrow.Table:
    """A table of measures, its missing columns added as nulls, with the places of its rows in their own columns."""
    import pyarrow as pa

    columns = {name: table[name].to_pylist() for name in table.column_names}
    rules = [RULES.get(key) for key in zip(columns.get("analyzer", ()), columns.get("name", ()), strict=True)]
    if not any(rules):
        return table
    for index, rule in enumerate(rules):
        if rule:
            row = {name: values[index] for name, values in columns.items()}
            for name, value in rule(row).items():
                columns[name][index] = value
    return pa.table(columns, schema=table.schema)
