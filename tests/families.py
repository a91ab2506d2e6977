"""A tiny random model of every decoder family that transformers knows, made from its own configuration class.

The families are those of transformers' mapping of causal language models, so the list is as old as transformers is. A
configuration starts from its family's defaults; what counts layers, heads or widths is made small by its name.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from probe.errors import ModelUnavailable

N_LAYERS = 4
VOCABULARY = 272

_SIZES: dict[str, Any] = {
    # widths
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "embedding_size"), 32),
    **dict.fromkeys(("lru_width", "attention_hidden_size", "word_embed_proj_dim", "mamba_d_ssm"), 32),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "ple_embed_dim"), 32),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "dense_intermediate_size", "d_inner"), 48),
    **dict.fromkeys(("ffn_hidden_size", "expert_ffn_hidden_size", "feed_forward_size", "dim_ff", "dff"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size", "ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_experts_intermediate_size"), 48),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    # layers
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), N_LAYERS),
    **dict.fromkeys(("num_decoder_layers", "num_blocks"), N_LAYERS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 1),
    # heads
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "swa_num_attention_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "attention_head_size", "kv_channels", "swa_head_dim", "d_head", "dim_head"), 8
    ),
    **dict.fromkeys(("attention_head_dim", "linear_head_dim", "index_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "rotary_dim", "global_head_dim"), 8),
    "qk_rope_head_dim": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "index_n_heads": 2,
    # state-space and linear layers
    **dict.fromkeys(
        ("linear_num_key_heads", "linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), 4
    ),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim", "mamba_expand_head"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("n_mamba_heads", "n_groups", "mamba_n_groups", "mamba_ngroups"), 2),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    "zero_expert_num": 2,
    # vocabulary and context
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    "hidden_size_per_layer_input": 8,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    **dict.fromkeys(("max_target_positions", "context_length"), 512),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size", "sliding_window_size"), 24),
    **dict.fromkeys(("local_attention", "attention_chunk_size"), 24),
    # ranks
    **dict.fromkeys(("laurel_rank", "adapter_rank", "hc_lowrank"), 8),
    "num_kv_shared_layers": 2,
    "max_window_layers": 2,
}
_PERIODS = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "layer_group_size": 2,
    "global_attn_every_n_layers": 2,
}
_EXPERTS = {
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group"), 1),
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
_FAMILY: dict[str, dict[str, Any]] = {
    "mamba2": {"head_dim": 16},
    "mpt": {"d_model": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "reformer": {"is_decoder": True},
    "zaya": {"num_experts_per_tok": 1},
    "deepseek_v2": _EXPERTS,
    "dots1": _EXPERTS,
    "falcon_h1": {"mamba_d_ssm": 64},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 4},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 4},
}
"""What a family needs beyond its sizes."""


def families() -> list[str]:
    """Every model type of transformers' mapping of causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str, **more: Any) -> Any:
    """The configuration of a family with a few small layers, one of each kind that its defaults have; `more` wins."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _shrunk(CONFIG_MAPPING[family], family, more)


def _shrunk(kind: type, family: str, more: dict[str, Any]) -> Any:
    from transformers import PretrainedConfig

    default = kind()
    known = default.to_dict()
    given: dict[str, Any] = {
        name: size
        for name, size in _SIZES.items()
        if known.get(name) is not None or (name in known and name in ("head_dim", "num_key_value_heads"))
    }
    if "qk_rope_head_dim" in known:  # what turns is the whole head of the configuration
        given |= {name: given["qk_rope_head_dim"] for name in ("head_dim",) if name in known}
        given |= {"num_key_value_heads": given["num_attention_heads"]}
    given |= {name: period for name, period in _PERIODS.items() if name in known}
    n_default = getattr(default, "num_hidden_layers", None)
    for name in known:
        try:
            value = getattr(default, name, None)
        except (AttributeError, RuntimeError):  # differs by layer
            continue
        if isinstance(value, PretrainedConfig):
            given[name] = _shrunk(type(value), name, {})
        elif isinstance(value, list) and len(value) == n_default and len(value) > 1:
            kinds = list(dict.fromkeys(map(str, value)))
            firsts = [value[[str(entry) for entry in value].index(kind)] for kind in kinds]
            given[name] = (firsts * N_LAYERS)[:N_LAYERS] if isinstance(value[0], str) else value[:N_LAYERS]
    if overrides := known.get("per_layer_config"):
        given["per_layer_config"] = _overrides(overrides, default.layer_types, known, given["layer_types"])
    given |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **_FAMILY.get(family, {}), **more}
    return kind(**given)


def _overrides(
    overrides: dict[Any, dict[str, int]], kinds: list[str], known: dict[str, Any], tiny_kinds: list[str]
) -> dict[int, dict[str, int]]:
    """Tiny layer → the sizes that a layer of its kind has for itself, as many times the tiny size as by default."""
    of_kind = {kinds[int(layer)]: sizes for layer, sizes in overrides.items()}
    return {
        layer: {name: max(1, _SIZES[name] * size // known[name]) for name, size in of_kind[kind].items()}
        for layer, kind in enumerate(tiny_kinds)
        if kind in of_kind
    }


def tiny_model(config: Any, seed: int = 0) -> Any:
    """A causal language model of this configuration with random weights, in eval mode: norms and biases too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    hf = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in hf.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise if parameter.ndim < 2 else parameter.shape[-1] ** -0.5 * noise)
    return hf


def loaded(family: str, dtype: torch.dtype = torch.float32, draw: int = 0, **more: Any) -> Any:
    """A tiny random model of a family as `probe.load` gives it; raises ModelUnavailable where it is refused. Other weights with
    another `draw`."""
    from probe.capture.model import CapturingModel
    from probe.model.names import Source
    from probe.model.shapes import byte_tokenizer

    hf = tiny_model(tiny_config(family, **more), draw).to(dtype)
    return CapturingModel(
        hf, byte_tokenizer(VOCABULARY), Source(family, "random", family), {"resolved": family}
    )


_WITHOUT_EMBEDDING = ("mamba", "mamba2", "falcon_mamba")
"""Families whose `output_hidden_states` begin behind the first block."""
TEXT = "A prompt that is longer than any window of a tiny model."
CONTINUATIONS = (" is", " was", " it was so")


def differences(model: Any) -> dict[str, float]:
    """By what is captured its largest difference from the plain model's, relative to the largest of these: the states behind
    the blocks against `output_hidden_states`, attention rebuilt from queries and keys against eager attentions, reads
    rebuilt from attention and values against `z`, log-probabilities of emitted tokens and of continuations against plain ones (of
    1 nat at least: a sure token's is 0 but for rounding)."""
    nats = ("log_probs", "score")
    return {
        name: relative(*pair, least=1.0 if name.startswith(nats) else 0.0)
        for name, pair in pairs(model, captured(model), model.hf).items()
    }


def captured(model: Any) -> tuple[Any, Any]:
    """What a model gives of TEXT: everything that is captured, and scores of continuations."""
    return model.capture(TEXT, sites="all:all", max_new_tokens=4), model.score(TEXT, CONTINUATIONS)


def pairs(
    model: Any, given: tuple[Any, Any], hf: Any, loose: float | None = None
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name → (what was captured, the same of the plain model `hf`), the pairs of `differences`."""
    from probe.maths.reads import pattern, read

    loose = loose or LOOSE
    outcome, scores = given
    tensors = outcome.tensors
    plain, eager = (_plain(hf, outcome.token_ids[:-1], eager) for eager in (False, True))
    # Falcon adds ALiBi twice where attention is eager.
    alike = relative(eager.logits, plain.logits) < loose
    out = {}
    # The last of transformers' states is behind the final norm.
    first = 0 if model.facts.model_type in _WITHOUT_EMBEDDING else 1
    for layer, hidden in enumerate(plain.hidden_states[first:-1]):
        out[f"resid_post {layer}"] = tensors["resid_post"][layer], hidden[0]
    attending = model.facts.attending(range(model.facts.n_layers))
    shown = [w for w in getattr(eager, "attentions", None) or () if w is not None]
    weights_of = dict(zip(attending, shown, strict=True)) if shown else {}
    for index, layer in enumerate(attending if "queries" in tensors else ()):
        sink, attention = model.sinks[layer], model.facts.attention_of(layer)
        alpha = pattern(tensors["queries"][index], tensors["keys"][index], tensors["rows"], attention, sink)
        if alike and layer in weights_of:
            weights = weights_of[layer][0][..., : alpha.shape[-1]]
            # Granite gives its weights from before a sink takes its part.
            before_sink = sink is not None and bool((weights.float().sum(-1) > 1 - loose).all())
            ours = alpha / alpha.sum(-1, keepdim=True) if before_sink else alpha
            out[f"attention {layer}"] = ours, weights
        out[f"z {layer}"] = read(alpha, tensors["values"][index]), tensors["z"][index]
    log_p = plain.logits[0].float().log_softmax(-1)
    at = torch.arange(outcome.n_prompt - 1, len(outcome.token_ids) - 1)
    out["log_probs"] = tensors["log_probs"], log_p[at, torch.tensor(outcome.token_ids)[at + 1]]
    prompt = outcome.token_ids[: outcome.n_prompt]
    for score in scores:
        ids = [*prompt, *score.token_ids]
        log_p = _plain(hf, ids).logits[0].float().log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(ids) - 1)
        expected = log_p[at, torch.tensor(ids)[at + 1]].sum()
        out[f"score {score.text}"] = torch.tensor(score.log_prob), expected
    return out


def rounded(family: str, dtype: torch.dtype) -> str:
    """What of a family in 16 bits deviates from the plain model in 16 bits by more than LOOSE_16 of the largest number.

    Empty where nothing does. In brackets what deviates as rounding makes the plain model deviate: its own distance from the
    same weights in float32 is two thirds of ours or more, in this model or in several together: which side a router's choice falls on,
    or the largest of a thousand roundings, is chance in one.
    """
    try:
        model = loaded(family, dtype)
    except ModelUnavailable as error:
        return f"refused: {_reason(str(error))}"
    try:
        given = captured(model)
        plain = pairs(model, given, model.hf, LOOSE_16)
    except Exception as error:  # an operation that this processor lacks in 16 bits, or what is not finite
        return f"not computed ({type(error).__name__})"
    if all(relative(*pair) < LOOSE_16 for pair in plain.values()):
        return ""
    exact = pairs(model, given, copy.deepcopy(model.hf).float(), LOOSE_16)
    deviating: dict[str, bool] = {}
    for name, (ours, theirs) in plain.items():
        if relative(ours, theirs) < LOOSE_16:
            continue
        expected = exact[name][1] if name in exact else None
        # Reads have no plain counterpart: they are rebuilt from what was captured.
        as_rounded = (
            expected is not None
            and not name.startswith("z ")
            and relative(ours, expected) <= AS_ROUNDED * relative(theirs, expected)
        )
        site = name.partition(" ")[0]
        deviating[site] = deviating.get(site, True) and as_rounded
    for site in [site for site, as_rounded in deviating.items() if not as_rounded and site != "z"]:
        deviating[site] = further(family, dtype, site) <= AS_ROUNDED
    return ", ".join(f"({site})" if as_rounded else site for site, as_rounded in deviating.items())


def further(family: str, dtype: torch.dtype, site: str) -> float:
    """How many times as far as the plain model's in 16 bits a captured site lies from float32: root mean squares over the layers
    of DRAWS random models."""
    squares = torch.zeros(2, dtype=torch.float64)
    for draw in range(DRAWS):
        model = loaded(family, dtype, draw)
        given = captured(model)
        plain = pairs(model, given, model.hf, LOOSE_16)
        exact = pairs(model, given, copy.deepcopy(model.hf).float(), LOOSE_16)
        for name, (ours, theirs) in plain.items():
            if name.partition(" ")[0] == site and name in exact:
                expected = exact[name][1].double()
                squares += torch.stack([(x.double() - expected).square().sum() for x in (ours, theirs)])
    return float((squares[0] / squares[1]).sqrt())


def _plain(hf: Any, ids: list[int], eager: bool = False) -> Any:
    """A plain forward; with attentions where they are computed by the book."""
    configs = {id(module.config): module.config for module in hf.modules() if hasattr(module, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = "eager" if eager else before[id(config)]
    try:
        with torch.inference_mode():
            asked = {"use_cache": False, "output_hidden_states": True, "output_attentions": eager}
            return hf(input_ids=torch.tensor([ids]), **asked)
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def relative(states: torch.Tensor, expected: torch.Tensor, least: float = 0.0) -> float:
    """Largest difference, of the largest number that is expected, or of `least`; as it is where all of these are 0."""
    largest = max(float(expected.abs().max()), least) or 1.0
    return float((states.float() - expected.float()).abs().max()) / largest


TABLE = Path(__file__).parent.parent / "docs" / "models.md"
PARTS = TABLE.parent.parent / "build" / "families.jsonl"
LOOSE = 1e-4
"""Largest difference of a captured number from the plain model's, of the largest such number."""
LOOSE_16 = 1e-2
"""The same in 16 bits, beyond which what deviates is named."""
AS_ROUNDED = 1.5
"""How much further from float32 than the plain model's in 16 bits what deviates by rounding may be."""
DRAWS = 5
"""Random models whose distances are taken together where one alone lies further."""
HALVES = (torch.bfloat16, torch.float16)


def verdict(family: str) -> tuple[str, str]:
    """`works`, `partly`, `refused`, `differs` or `untried`, and the kinds of its layers, what is absent, or why."""
    try:
        config = tiny_config(family)
        hf = tiny_model(config)
        with torch.inference_mode():
            hf(input_ids=torch.arange(2, 10)[None], use_cache=False)
    except Exception as error:  # the plain model of transformers fails: nothing is said of probe
        return "untried", f"transformers makes no tiny model of it here ({type(error).__name__})"
    try:
        model = loaded(family)
    except ModelUnavailable as error:
        return "refused", _reason(str(error))
    gaps = differences(model)
    worst = max(gaps, key=lambda name: gaps[name])
    if not gaps[worst] < LOOSE:
        return "differs", worst
    kinds = dict.fromkeys(
        f"{layer.kind} with a state" if layer.n_heads and layer.state_bytes else layer.kind
        for layer in model.facts.layers
    )
    told = ", ".join(kinds)
    if not model.facts.alike(range(model.facts.n_layers)):
        return (
            "partly",
            f"{told}; layers have heads of several sizes: no keys, values, queries and z of all together",
        )
    return "works", told


def _reason(error: str) -> str:
    """Why a family is refused, without the family, what transformers said, and numbers that differ by machine."""
    why = error.partition("faithfully: ")[2] or error.partition(": ")[2]
    return re.sub(r" by [0-9.e+-]+ of their maximum", "", why.partition(" (")[0].splitlines()[0])


def line(family: str) -> list[str]:
    """Verdict, why, and what deviates in bfloat16 and in float16, of a family that works."""
    what, why = verdict(family)
    halves = [rounded(family, dtype) or "–" if what in ("works", "partly") else "" for dtype in HALVES]
    return [what, why, *halves]


def table(lines: Mapping[str, list[str]]) -> str:
    """docs/models.md of the `line` of every family of transformers' mapping."""
    import transformers

    counts = Counter(what for what, *_ in lines.values())
    halves = [sum(entry[place] == "–" for entry in lines.values()) for place in (2, 3)]
    text = [
        "# Families of models",
        "",
        f"Written by `python -m tests.families` with transformers {transformers.__version__}, and held by a slow test: a tiny random "
        "model of every family that transformers knows as a causal language model is captured, and its residual stream, "
        "attention, reads and log-probabilities are compared with `output_hidden_states`, eager attentions and plain "
        f"log-probabilities, to {LOOSE:g} of the largest.",
        "",
        f"{counts['works']} of {len(lines)} families work, {counts['partly']} partly, {counts['refused']} are refused when they are "
        f"loaded; of {counts['untried']} no tiny model could be made. `full`, `sliding` and `chunked` say which positions a layer "
        "sees; `latent` attention makes keys and values of a compressed vector: the expanded ones are captured, and "
        "`memory_bytes` counts the vector. Layers without attention are `linear` (a matrix a head is their memory), `recurrent` "
        "(another state of constant size) or `none` (an MLP alone); tensors with heads have the other layers alone. "
        "Where an indexer selects the keys that a query sees (DeepSeek V3.2, GLM-5, MiniMax M3), the context ends with the positions up to "
        "which it selects all: behind them a layer's pattern is not that of its queries and keys.",
        "",
        f"In 16 bits the same numbers are compared with the plain model's in 16 bits, and what deviates by more than {LOOSE_16:g} of the "
        f"largest is named; – where nothing does: {halves[0]} families in bfloat16 and {halves[1]} in float16. Both round at every step, in "
        "another order: what is in brackets is no further from the same weights in float32 than "
        f"{AS_ROUNDED:g} times the plain model is, in one random model or in {DRAWS} together: in `gpt_oss` a router that takes another "
        "expert moves one model or the other, and its eager attention rounds the softmax itself to 16 bits, where probe's does not. These columns are those of one processor: others round otherwise.",
        "",
        "| family | verdict | layers, or why not | bfloat16 | float16 |",
        "|---|---|---|---|---|",
        *(f"| `{family}` | {' | '.join(entry)} |" for family, entry in sorted(lines.items())),
        "",
    ]
    return "\n".join(text)


def written() -> dict[str, list[str]]:
    """The `line` of every family in docs/models.md."""
    rows = [row.split(" | ") for row in TABLE.read_text().splitlines() if row.startswith("| `")]
    return {row[0].strip("| `"): [*row[1:-1], row[-1].removesuffix(" |")] for row in rows}


def main() -> None:
    """Write docs/models.md; lines go to build/families.jsonl one by one, and a call that is stopped goes on from there."""
    PARTS.parent.mkdir(exist_ok=True)
    lines = dict(map(json.loads, PARTS.read_text().splitlines())) if PARTS.exists() else {}
    for family in families():
        if family not in lines:
            lines[family] = line(family)
            with PARTS.open("a") as file:
                file.write(json.dumps([family, lines[family]]) + "\n")
    TABLE.write_text(table(lines))
    PARTS.unlink()


if __name__ == "__main__":
    main()
