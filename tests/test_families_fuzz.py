"""Other configurations of every family that works: each change is one that the configuration's own fields allow.

A change makes the plain model of transformers another one; captured numbers must be its numbers, or it is refused with a
reason. Changes that transformers itself cannot make or run say nothing of probe.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import probe
from probe.errors import ModelUnavailable
from tests.families import (
    _SIZES,
    LOOSE,
    differences,
    families,
    loaded,
    relative,
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


def runs_plainly(family: str, given: dict[str, Any]) -> bool:
    """Whether transformers itself can make and run a changed family."""
    try:
        with torch.inference_mode():
            tiny_model(tiny_config(family, **given))(input_ids=torch.arange(2, 60)[None], use_cache=False)
    except Exception:
        return False
    return True


def fault(family: str, given: dict[str, Any]) -> str:
    """What is wrong with a changed family; empty where nothing is."""
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
    bad = {name: gap for name, gap in gaps.items() if not gap < LOOSE}  # NaN is bad
    # Nemotron-H of transformers computes another thing in steps than in one pass.
    if family == "nemotron_h" and bad:
        near = 2 * step_gap(model.hf)
        bad = {name: gap for name, gap in bad.items() if not gap < near}
    return ", ".join(f"{name} differs by {gap:.1e}" for name, gap in bad.items())


def step_gap(hf: Any) -> float:
    """How far the plain model's states in steps, on its own cache, lie from those in one pass."""
    ids, first = torch.arange(5, 40)[None], 30
    with torch.inference_mode():
        whole = hf(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        try:
            begun = hf(input_ids=ids[:, :first], use_cache=True)
            cache = getattr(begun, "past_key_values", None)
            steps = []
            for at in range(first, ids.shape[1]):
                step = hf(
                    ids[:, at : at + 1], past_key_values=cache, use_cache=True, output_hidden_states=True
                )
                steps.append([states[0, 0] for states in step.hidden_states])
        except (AttributeError, TypeError, ValueError, IndexError):  # it has no cache of that name
            return 0.0
    return max(
        relative(torch.stack([step[layer] for step in steps]), states[0, first:])
        for layer, states in enumerate(whole)
    )


def changed_families(seed: int, each: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(family, name of a change, fields) of so many changes of each family that works, drawn by `seed`."""
    draw = random.Random(seed)
    for family in families():
        if written()[family][0] not in ("works", "partly"):
            continue
        possible = list(changes(tiny_config(family)))
        for name, given in draw.sample(possible, min(each, len(possible))):
            yield family, name, given


TASKS: list[dict[str, Any]] = [
    {
        "id": "tool",
        "kind": "tool_selection",
        "input": "What is 2 + 3?",
        "tools": ["calculator", "unit_converter"],
        "target": "calculator",
    },
    {"id": "cot", "kind": "cot", "question": "How many is 2 + 3?", "answer": "5", "steps": ["2 + 3 = 5."]},
    {
        "id": "prompting",
        "kind": "prompting",
        "input": "hot ->",
        "choices": [" cold", " warm"],
        "target": " cold",
        "variants": [{"name": "opposite", "prefix": "Opposite: "}],
    },
]
_CONTEXTS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_target_positions",
    "seq_length",
)


def plain_logits(hf: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits [position, d_vocab] of one pass over all tokens but the last."""
    with torch.inference_mode():
        return hf(input_ids=ids[None, :-1], use_cache=False).logits[0]


def stepped_logits(hf: Any, ids: torch.Tensor, emitted: int) -> torch.Tensor:
    """Logits [emitted, d_vocab] of the plain model's own steps: the prompt in one pass, then token by token."""
    first = len(ids) - emitted
    with torch.inference_mode():
        out = hf(input_ids=ids[None, :first], use_cache=True)
        rows = [out.logits[0, -1]]
        for at in range(first, len(ids) - 1):
            out = hf(input_ids=ids[None, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0, -1])
    return torch.stack(rows)


def task_fault(family: str, given: dict[str, Any], path: Path) -> str:
    """What is wrong with a run of one task of each kind, its log-probabilities beside plain ones; empty where nothing is."""
    try:
        model = loaded(family, **given)
    except ModelUnavailable as error:
        return f"refused: {error}"
    run = probe.run(TASKS, model=model, out=path, analyze=False, max_new_tokens=6)
    for task in run:
        if task.record["status"] != "ok":
            return f"{task.id}: {task.record['status']} {task.record.get('error')}"
        passage = "base/" if task.id == "prompting" else ""
        ids, log_probs = task[f"{passage}token_ids"].long(), task[f"{passage}log_probs"]
        emitted = len(log_probs)
        # Nemotron-H of transformers computes another thing in steps than in one pass, and a run goes in steps.
        rows = (
            stepped_logits(model.hf, ids, emitted) if family == "nemotron_h" else plain_logits(model.hf, ids)
        )
        expected = rows.float().log_softmax(-1)[-emitted:].gather(1, ids[-emitted:, None])[:, 0]
        if not (gap := relative(log_probs, expected, least=1.0)) < LOOSE:
            return f"{task.id}: log_probs differ by {gap:.1e}"
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_changed_families_have_the_numbers_of_the_plain_model_or_are_refused_with_a_reason(seed):
    faults, n_right = {}, 0
    for family, name, given in changed_families(seed, each=6):
        if not runs_plainly(family, given):
            continue
        problem = fault(family, given)
        n_right += not problem
        if problem and not problem.startswith("refused: "):
            faults[family, name] = problem
    assert faults == {} and n_right > 300


@pytest.mark.slow
def test_a_changed_configuration_of_every_family_runs_a_task_of_each_kind(tmp_path, monkeypatch):
    for name in _CONTEXTS:  # room for a prompt; configurations in configurations have it too
        monkeypatch.setitem(_SIZES, name, 4096)
    faults, n_right = {}, 0
    for family, name, given in changed_families(7, each=1):
        if not runs_plainly(family, given):
            continue
        problem = task_fault(family, given, tmp_path / family)
        n_right += not problem
        if problem and not problem.startswith("refused: "):
            faults[family, name] = problem
    assert faults == {} and n_right > 80
