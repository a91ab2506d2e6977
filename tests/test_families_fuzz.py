"""Other configurations of every family that works: each change is one that the configuration's own fields allow.

A change makes the plain model of transformers another one; captured numbers must be its numbers, or it is refused with a
reason. Changes that transformers itself cannot make or run say nothing of probe.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

import torch

from probe.errors import ModelUnavailable
from tests.families import (
    LOOSE,
    differences,
    families,
    loaded,
    tiny_config,
    tiny_model,
    written,
)

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
_WINDOWS = (
    "sliding_window",
    "attention_window_size",
    "window_size",
    "sliding_window_size",
    "attention_chunk_size",
)
_NOT_THE_MODELS = re.compile(
    "use_cache|output_|return_dict|is_(en|de)coder|torchscript|use_mamba_kernels|.*(aux|router|loss|jitter|noise).*|gradient_.*|"
    "tie_encoder.*|tf_.*|add_cross.*|cross_attention.*|.*dropout.*|use_bfloat16|scale_fp32|.*precision.*|use_mem_eff_path"
)


def changes(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name of a change → the fields that make it, of a tiny configuration."""
    known = config.get_text_config().to_dict()
    heads, kv_heads, width, d_head = (
        next((name for name in names if isinstance(known.get(name), int)), None)
        for names in (_HEADS, _KV_HEADS, _WIDTHS, ("head_dim",))
    )
    if heads and width:
        for n_heads, n_kv in ((3, 1), (3, 3), (6, 3), (6, 2), (1, 1)):
            given = {heads: n_heads} | ({kv_heads: n_kv} if kv_heads else {})
            for wide in ({}, {width: 36}) if d_head else ({width: 36},):
                yield f"{n_heads} heads, {n_kv} of keys {wide or ''}", given | wide
    if d_head:
        yield "heads wider than the residual stream", {d_head: 24}
    for name, value in known.items():
        if isinstance(value, bool) and not _NOT_THE_MODELS.fullmatch(name):
            yield f"{name} = {not value}", {name: not value}
        elif name in _WINDOWS:
            yield f"{name} = 5", {name: 5}
        elif "softcap" in name or name == "logits_soft_cap":
            yield f"{name} = 2.5", {name: 2.5}
        elif (
            isinstance(value, float) and re.search("scal|multiplier|factor|clip", name) and "init" not in name
        ):
            yield f"{name} × 1.5", {name: 1.5 * value}
        elif name == "query_pre_attn_scalar":
            yield f"{name} × 2", {name: 2 * value}
    kinds = known.get("layer_types")
    if isinstance(kinds, list) and len(set(kinds)) > 1:
        yield "layers the other way round", {"layer_types": kinds[::-1]}
        for kind in sorted(set(kinds)):
            yield f"layers of {kind} alone", {"layer_types": [kind] * len(kinds)}
    if isinstance(rope := known.get("rope_parameters"), dict):
        for scaling in _SCALINGS:
            yield f"rope {scaling['rope_type']}", {"rope_parameters": _scaled(rope, scaling)}


_SCALINGS: tuple[dict[str, Any], ...] = (
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 20},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 20},
    {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 20,
    },
    {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 20},
)


def _scaled(rope: dict[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters, or those of each kind of layer, scaled."""
    if "rope_theta" not in rope and any(isinstance(part, dict) for part in rope.values()):
        return {kind: _scaled(part, scaling) for kind, part in rope.items() if isinstance(part, dict)}
    out = {**rope, **scaling}
    if scaling["rope_type"] == "longrope":
        turned = int(8 * rope.get("partial_rotary_factor", 1.0)) // 2
        out |= {"short_factor": [1.0] * turned, "long_factor": [1.0 + 0.7 * i for i in range(turned)]}
    return out


def fault(family: str, given: dict[str, Any]) -> str:
    """What is wrong with a changed family; empty where nothing is. Raises ValueError where transformers cannot make it."""
    try:
        with torch.inference_mode():
            tiny_model(tiny_config(family, **given))(input_ids=torch.arange(2, 60)[None], use_cache=False)
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {str(error)[:80]}") from error
    try:
        model = loaded(family, **given)
    except ModelUnavailable as error:
        why = str(error)
        reasoned = "cannot be captured faithfully: " in why or "context has" in why or "gives NaN" in why
        return f"refused: {why}" if reasoned else f"refused without a reason: {why}"
    except Exception as error:
        return f"crash while loading: {type(error).__name__}: {error}"
    try:
        gaps = differences(model)
    except Exception as error:
        return f"crash while capturing: {type(error).__name__}: {error}"
    worst = max(gaps, key=lambda name: gaps[name])
    return "" if gaps[worst] < LOOSE else f"{worst} differs by {gaps[worst]:.1e}"


REFUSED = {
    "layers must have as many": "one number of heads for all layers",
}
"""Reasons for which a changed family may be refused → what they keep to."""


def changed_families(seed: int, each: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(family, name of a change, fields) of so many changes of each family that works, drawn by `seed`."""
    draw = random.Random(seed)
    for family in families():
        if written()[family][0] not in ("works", "partly"):
            continue
        possible = list(changes(tiny_config(family)))
        for name, given in draw.sample(possible, min(each, len(possible))):
            yield family, name, given
