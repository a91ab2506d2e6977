"""Attention that does not call transformers' attention registry (GPT-J, GPT-Neo, CodeGen, BLOOM, Falcon, MPT, XGLM), and
indexers, which select the keys that an attention sees (DeepSeek V3.2, GLM-5, MiniMax M3).

Such a module computes scores and reads by itself. An adapter replaces, for the time of a recorded forward, the method that does by
one that hands the same queries, keys and values to `probe.model.attention.attend`, with the module's own projections
and parameters. Whether they are the same is judged when a model is loaded: its logits against the plain model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from probe.maths.reads import Alibi
from probe.model.attention import attend

Method = tuple[str, Callable[..., Any]]
"""Name of a method of a module, and what stands in for it."""


def adapters(blocks: Sequence[nn.Module]) -> list[tuple[nn.Module, Method]]:
    """The modules of the decoder blocks that need a stand-in for a method, each with it."""
    return [
        (module, _ADAPTERS[kind](module, layer))
        for layer, block in enumerate(blocks)
        for module in block.modules()
        if (kind := _kind(module)) in _ADAPTERS
    ]


@contextmanager
def adapted(modules: Sequence[tuple[nn.Module, Method]]) -> Iterator[None]:
    """The stand-ins in the place of the methods; undone on leaving, with what an instance had of such a name (accelerate's)."""
    before = [module.__dict__.get(name) for module, (name, _) in modules]
    for module, (name, method) in modules:
        module.__dict__[name] = method
    try:
        yield
    finally:
        for (module, (name, _)), method in zip(reversed(modules), reversed(before), strict=True):
            if method is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = method


def adds_residual(module: nn.Module) -> bool:
    """Whether an attention module's output holds the residual stream as well (BLOOM)."""
    return _kind(module) == "bloom.BloomAttention"


def needed_inputs(decoder: nn.Module, device: torch.device) -> dict[str, Any]:
    """What a decoder's forward must be given beside tokens, positions and cache: MPT and attention with an indexer a mask, of
    which they make nothing here."""
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
    if _kind(decoder) == "mpt.MptModel":
        return {"attention_mask": mask}
    if any(_ADAPTERS.get(_kind(module)) is _indexer for module in decoder.modules()):
        return {"attention_mask": {"indexed_attention": mask}}
    return {}


def _kind(module: nn.Module) -> str:
    """Folder in transformers and class of a module."""
    return ".".join((*type(module).__module__.split(".")[-2:-1], type(module).__name__))


# Stand-ins are partials of functions of the module: a copy of a module, in another precision, has its own.


def _scores(module: Any, layer: int) -> Method:
    """GPT-J and its kin: a method from queries, keys and values [sequence, head, query, d_head] to reads."""
    kind = _kind(module).split(".")[0]
    scaled = kind != "gpt_neo" and getattr(module, "scale", True)
    local = getattr(module, "attention_type", "global") == "local"
    facts = {
        "scaling": None if scaled else 1.0,
        "sliding_window": module.config.window_size if local else None,
        "layer": layer,
    }
    return "_attn", partial(_attn, module, kind == "openai", facts)


def _attn(
    module: Any, turned: bool, facts: dict[str, Any], query, key, value, attention_mask=None, *args
) -> list[Any]:
    """`turned`: keys are [sequence, head, d_head, query]."""
    read, _ = attend(module, query, key.transpose(2, 3) if turned else key, value, None, **facts)
    return [read.transpose(1, 2), None]


def _bloom(module: Any, layer: int) -> Method:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    alibi = Alibi(_slopes(build_alibi_tensor(torch.ones(1, 2), module.num_heads, torch.float32)))
    facts = {"scaling": module.inv_norm_factor, "alibi": alibi, "layer": layer}
    return "forward", partial(_bloom_forward, module, facts)


def _bloom_forward(module: Any, facts: dict[str, Any], hidden_states, residual, *args, **kwargs):
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    read, _ = attend(module, query, key, value, None, **facts)
    return module.dense(read.flatten(2)) + residual, None


def _falcon(module: Any, layer: int) -> Method:
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    scale, alibi = module.inv_norm_factor, None
    if module.config.alibi:
        mask = torch.ones(1, 2, dtype=torch.long)
        slopes = _slopes(build_alibi_tensor(mask, module.num_heads, torch.float32))
        alibi = Alibi(slopes, scale, rounded=True)
    return "forward", partial(_falcon_forward, module, {"scaling": scale, "alibi": alibi, "layer": layer})


def _falcon_forward(
    module: Any, facts: dict[str, Any], hidden_states, *args, position_embeddings: Any = None, **kwargs
):
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    qkv = module.query_key_value(hidden_states)
    if module.new_decoder_architecture:  # key and value of a group lie behind its queries, once
        parts = qkv.unflatten(
            -1, (module.num_kv_heads, module.num_heads // module.num_kv_heads + 2, module.head_dim)
        )
        states = parts[..., :-2, :].flatten(2, 3), parts[..., -2, :], parts[..., -1, :]
    else:
        states = module._split_heads(qkv)
    query, key, value = (part.transpose(1, 2) for part in states)
    if facts["alibi"] is None:
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    read, _ = attend(module, query, key, value, None, **facts)
    return module.dense(read.flatten(2)), None


def _mpt(module: Any, layer: int) -> Method:
    return "forward", partial(_mpt_forward, module, layer)


def _mpt_forward(module: Any, layer: int, hidden_states, position_bias, *args, **kwargs):
    qkv = module.Wqkv(hidden_states)
    if module.clip_qkv:
        qkv = qkv.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = (_by_head(part, module.n_heads) for part in qkv.chunk(3, dim=2))
    alibi = Alibi(_slopes(position_bias[..., -2:]))
    read, _ = attend(module, query, key, value, None, scaling=module.softmax_scale, alibi=alibi, layer=layer)
    return module.out_proj(read.flatten(2)), None


def _xglm(module: Any, layer: int) -> Method:
    return "forward", partial(_xglm_forward, module, layer)


def _xglm_forward(module: Any, layer: int, hidden_states, *args, **kwargs):
    query, key, value = (
        _by_head(project(hidden_states), module.num_heads)
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    read, _ = attend(module, query, key, value, None, scaling=module.scaling, layer=layer)
    return module.out_proj(read.flatten(2)), None


def _indexer(module: Any, layer: int) -> Method:
    """Selects every key: the context ends where that is not what the indexer does (`structure.selected_keys`)."""
    return "forward", _no_selection


def _no_selection(hidden_states: Tensor, *args, **kwargs) -> Tensor:
    return hidden_states.new_zeros(0, dtype=torch.int32)


def _by_head(states: Tensor, n_heads: int) -> Tensor:
    """[sequence, query, head · d_head] as [sequence, head, query, d_head]."""
    return states.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def _slopes(bias: Tensor) -> tuple[float, ...]:
    """By head how much a bias [head, 1, 2] grows from a key to the next."""
    return tuple((bias[:, 0, 1] - bias[:, 0, 0]).tolist())


_ADAPTERS: dict[str, Callable[[Any, int], Method]] = {
    "gptj.GPTJAttention": _scores,
    "codegen.CodeGenAttention": _scores,
    "gpt_neo.GPTNeoSelfAttention": _scores,
    "gpt_neox_japanese.GPTNeoXJapaneseAttention": _scores,
    "openai.Attention": _scores,
    "bloom.BloomAttention": _bloom,
    "falcon.FalconAttention": _falcon,
    "mpt.MptAttention": _mpt,
    "xglm.XGLMAttention": _xglm,
    "axk2.AXK2Indexer": _indexer,
    "deepseek_v32.DeepseekV32Indexer": _indexer,
    "glm_moe_dsa.GlmMoeDsaIndexer": _indexer,
    "hy_v4.HYV4Indexer": _indexer,
    "mistral_large4.MistralLarge4TextIndexer": _indexer,
    "minimax_m3_vl.MiniMaxM3VLIndexer": _indexer,
}
