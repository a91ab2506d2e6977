"""Measures of earlier versions: places that were written into `variant`, `span` or `tool` become columns."""

from __future__ import annotations

import math
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


# -- tool --------------------------------------------------------------------------------------------------------


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


def _slot(row: Mapping[str, Any]) -> dict[str, Any]:
    """`4 tools` and `slot:2`."""
    n_tools, slot = row["variant"].split()[0], row["span"].partition(":")[2]
    return {"variant": None, "span": None, "n_tools": int(n_tools), "slot": int(slot)}


def _target(row: Mapping[str, Any]) -> dict[str, Any]:
    """Target `chosen`, and in the span `chosen on half 0`."""
    half = (row["span"] or "").rpartition("chosen on half ")[2]
    return {"variant": None, "span": None, "role": row["variant"], "half": int(half) if half else None}


def _heads(row: Mapping[str, Any]) -> dict[str, Any]:
    """`random/mean`, and in the span `right, chosen on half 0`."""
    heads, _, replacement = row["variant"].partition("/")
    role, _, half = row["span"].partition(", chosen on half ")
    which = {"chosen": "together", "base": None}.get(heads, heads)
    return {
        **{"variant": None, "span": None, "role": role, "half": int(half) if half else None},
        "heads": None if row["name"] == "head_ablation_rank" else which,
        "replacement": replacement or "zero",
    }


def _probe(row: Mapping[str, Any]) -> dict[str, Any]:
    """`right/class/control` of the state in the span."""
    role, *words = row["variant"].split("/")
    return {
        **{"variant": None, "span": None, "role": role, "state": row["span"]},
        "rule": "naming" if "class" in words else "matching",
        "control": "labels" if "control" in words else None,
    }


enter("tool", _to("kind"), "accuracy")
enter("tool", _to("other_tool"), "confusion", "confusion_mass", "swap", "swap_share")
enter("tool", _tau, "tau_entropy", "tau_top1", "tau_accuracy", "tau_log_loss")
enter("tool", _to("rule"), "tau_fitted")
enter("tool", lambda row: {"step": None, "fold": row["step"]}, "tau_fold")
enter(
    "tool",
    _calibration,
    *("log_loss", "brier", "ece", "ece_floor", "reliability_accuracy", "reliability_confidence"),
)
enter(
    "tool",
    _to("scorer"),
    *("probability_scorer", "accuracy_scorer", "accuracy_scorer_tools", "scorer_agreement"),
    *("scorer_agreement_tools", "position_bias_scorer", "tool_bias_scorer"),
)
enter(
    "tool",
    _order,
    *(
        "position_bias",
        "position_bias_choice",
        "tool_bias",
        "tool_bias_choice",
        "slot_probability",
        "slot_rate",
    ),
    *("first_slot_probability", "first_slot_rate", "baseline_first_slot"),
)
enter("tool", _slot, "attention_by_position")
enter(
    "tool",
    _to("role"),
    *(
        "knockout",
        "knockout_random",
        "knockout_minus_random",
        "knockout_decision",
        "knockout_decision_random",
    ),
    *("knockout_decision_minus_random", "scramble", "remove", "remove_tv"),
)
enter(
    "tool",
    lambda row: {"variant": None, "role": "first_two" if row["variant"] else None},
    "swap_follow_description",
)
enter("tool", _window, "knockout_window")
enter("tool", _target, "head_auroc", "head_p", "head_p_corrected", "heads_found", "head_auroc_heldout")
enter("tool", _heads, "head_ablation", "head_ablation_rank", "head_ablation_accuracy")
enter(
    "tool",
    _probe,
    *("probe_accuracy", "probe_chance", "probe_selectivity", "probe_auroc", "decodable_layer"),
)
enter("tool", _word, "word")
enter("tool", _pair, "causal_spearman", "causal_spearman_within")
enter(
    "tool",
    _to("intentions"),
    *("p_action_given_state", "p_action_gap", "intention_information", "intention_entropy", "intention_mass"),
    *("intention_distinct", "p_action_accuracy", "p_action_accuracy_direct", "p_action_agreement"),
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


# -- prompting ---------------------------------------------------------------------------------------------------


def _family(row: Mapping[str, Any]) -> dict[str, Any]:
    """The family was a span; a control was the end of a name."""
    name, control = row["name"], None
    for end, label in (("_random", "random"), ("_shuffled", "other_family"), ("_other", "other_family")):
        if name.endswith(end):
            name, control = name.removesuffix(end), label
    name = "bias_r2_family" if name == "bias_r2" and control else name
    return {"name": name, "span": None, "family": row["span"], "control": control}


def _listed_token(row: Mapping[str, Any]) -> dict[str, Any]:
    return _family(row) | {"step": None, "rank": row["step"], "tool": None, "token": row["tool"]}


enter(
    "prompting",
    _family,
    *("bias_r2", "bias_r2_shuffled", "pattern_norm", "pattern_cosine", "pattern_cosine_shuffled"),
    *(
        "patch_recovery",
        "patch_recovery_random",
        "patch_recovery_shuffled",
        "patch_removal",
        "patch_accuracy",
    ),
    *("task_vector_recovery", "task_vector_accuracy", "lens_accuracy"),
    *("function_vector_recovery", "function_vector_recovery_random", "function_vector_accuracy"),
    *("manifold_alignment_random", "manifold_alignment_other", "manifold_dimension"),
)
enter("prompting", _listed_token, "bias_promoted", "bias_demoted")
enter("prompting", lambda row: _family(row) | _to("other_family")(row), "manifold_angle")
enter(
    "prompting",
    _to("wording"),
    *("accuracy_spread", "accuracy_spread_chance", "accuracy_worst", "accuracy_best", "choice_agreement"),
)
