"""What a model is built like: its decoder and blocks, what its modules are given, and the facts of its layers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probe.errors import ModelUnavailable
from probe.maths.reads import LayerAttention
from probe.model.recurrent import State
from probe.model.sublayers import states_of


@dataclass(frozen=True)
class LayerFacts:
    """What a layer is, and the sizes of its attention; these are 0 where it has none."""

    kind: str
    """`full`, `sliding` or `chunked`: which positions it sees; `latent`: keys and values are made of a compressed vector;
    without attention `linear`: a matrix a head is its memory, `recurrent`: another state is, `none`: it has no memory"""
    n_heads: int = 0
    n_kv_heads: int = 0
    d_head: int = 0
    d_value: int = 0
    memory: int = 0
    """Numbers a position that the model keeps; 0 where it reads another layer's keys and values."""
    state_bytes: int = 0
    """Bytes of the state of constant size that it keeps of a sequence, beside any attention."""
    gated: bool = False
    """Whether reads are multiplied, number by number, before W_O: by a gate, or by the scale and weights of a norm."""


@dataclass(frozen=True)
class ModelFacts:
    """What the configuration and one short forward say about a model."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    """Of queries and keys"""
    d_value: int
    """`d_head` of values and reads: another in latent attention"""
    d_mlp: int
    d_vocab: int
    n_ctx: int
    """Positions the model was made for; a longer sequence is refused or shortened."""
    n_params: int
    model_type: str
    attention: tuple[LayerAttention | None, ...]
    """None of a layer without attention"""
    layers: tuple[LayerFacts, ...]
    """Sizes above that differ by layer are those of the first with attention; 0 where none has any."""
    float32_residual: bool = False
    """Whether the residual stream is float32 whatever the dtype (Mamba)."""

    def attention_of(self, layer: int) -> LayerAttention:
        """How a layer that has attention turns queries and keys into a pattern."""
        attention = self.attention[layer]
        if attention is None:
            raise ValueError(f"layer {layer} has no attention")
        return attention

    @property
    def without_attention(self) -> tuple[int, ...]:
        return tuple(layer for layer, attention in enumerate(self.attention) if attention is None)

    def attending(self, layers: Iterable[int]) -> list[int]:
        """Those of these layers that have attention."""
        return [layer for layer in layers if self.attention[layer] is not None]

    def alike(self, layers: Iterable[int]) -> bool:
        """Whether keys, values, queries and reads of these layers have one shape each."""
        attending = [self.layers[layer] for layer in self.attending(layers)]
        return len({(f.n_kv_heads, f.d_head, f.d_value) for f in attending}) < 2


def attention_facts(call: dict[str, Any], handed: int | None, state_bytes: int, gated: bool) -> LayerFacts:
    """A layer by its attention call; `handed` is what the model itself keeps of a position."""
    n_heads, n_kv_heads, d_head, d_value = map(int, call["shape"])
    facts, read = call["facts"], n_kv_heads * (d_head + d_value)
    registered = call["registered"]
    memory = (handed or 0) if registered else read
    kind = "sliding" if facts.window is not None else "chunked" if facts.chunk is not None else "full"
    kind = "latent" if 0 < memory < read else kind
    return LayerFacts(kind, n_heads, n_kv_heads, d_head, d_value, memory, state_bytes, gated)


def state_facts(state: State | None) -> LayerFacts:
    """A layer without attention by the state that a sequence leaves in it; None: it leaves none."""
    if state is None:
        return LayerFacts("none")
    kept = state.recurrent
    return LayerFacts(
        "linear" if kept is not None and kept.ndim > 3 else "recurrent", state_bytes=state.nbytes
    )


def decoder_of(hf) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
    """The module that maps tokens to final-normed states, and its decoder blocks in order.

    It holds the embedding of tokens and a list of blocks side by side. In a multimodal model it is one part of several.
    """
    embedding = hf.get_input_embeddings()
    for module in (*hf.modules(), hf.base_model):
        children = list(module.children())
        lists = [child for child in children if isinstance(child, torch.nn.ModuleList)]
        if lists and (module is hf.base_model or any(child is embedding for child in children)):
            return module, list(max(lists, key=len))
    raise ModelUnavailable(
        f"{hf.config.model_type}: no list of blocks lies beside the embedding of its tokens, as in the decoders that probe reads "
        "(encoders like BERT, and models of several stacks, have none)"
    )


def accepted(decoder: torch.nn.Module) -> frozenset[str]:
    """Which of positions and cache a decoder's forward takes by name; a state-space model's calls its cache by another."""
    parameters = inspect.signature(decoder.forward).parameters
    if "cache_params" in parameters:
        return frozenset({"cache_params", "use_cache"})
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    names = ("position_ids", "past_key_values", "use_cache")
    return frozenset(name for name in names if anything or name in parameters)


def without_attention(config: Any) -> tuple[int, ...]:
    """The layers that the configuration names as something else than attention."""
    kinds = getattr(config, "layer_types", None) or ()
    return tuple(
        layer for layer, kind in enumerate(kinds) if kind in ("linear_attention", "conv", "mlp", "moe")
    )


def has_no_memory(config: Any, layer: int) -> bool:
    """Whether a layer is an MLP alone, as the configuration says (Nemotron-H): no position reads another in it."""
    kinds = getattr(config, "layer_types", None)
    return kinds is not None and kinds[layer] in ("mlp", "moe")


@contextmanager
def watched_modules(blocks: Sequence[torch.nn.Module]):
    """Of each module in these blocks the first argument and the states it gave when it was first called."""
    exchanges: dict[torch.nn.Module, tuple[Tensor | None, Any]] = {}

    def note(module, inputs, output):
        exchanges.setdefault(module, (inputs[0] if inputs else None, states_of(output)))

    hooks = [module.register_forward_hook(note) for block in blocks for module in block.modules()]
    try:
        yield exchanges
    finally:
        for hook in hooks:
            hook.remove()


def is_projection(module: torch.nn.Module) -> bool:
    """Whether a module is one matrix: a Linear or a GPT-2 Conv1D."""
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is stored as numbers of its own: not bytes, nor several numbers in one."""
    return weight.is_floating_point() and weight.itemsize > 1


def context_length(config: Any) -> int:
    """Positions that a model was made for; 2³⁰ where its configuration knows no limit (ALiBi)."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    length = next((int(n) for name in names if (n := getattr(config, name, None))), 1 << 30)
    if getattr(config, "attn_temperature_tuning", False) and hasattr(config, "floor_scale"):
        # Llama 4 scales queries from there on by their place in a forward pass, which here holds several sequences.
        length = min(length, int(config.floor_scale) - 1)
    # Beyond it which keys a query sees is no property of the layer any more.
    return min(length, selected_keys(config) or length)


_FLOAT32_RESIDUAL = ("mamba", "mamba2", "falcon_mamba")
"""Others have the configuration's field and hand on 16 bits all the same (Nemotron-H, Bamba)."""


def float32_residual(config: Any) -> bool:
    """Whether the residual stream is to be float32 in 16 bits too, before a model is loaded and seen."""
    return config.model_type in _FLOAT32_RESIDUAL and bool(getattr(config, "residual_in_fp32", False))


def layer_config(config: Any, layer: int) -> Any:
    """What a configuration says of one layer, where it says several things for each (Gemma 4)."""
    return config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config


def selected_keys(config: Any) -> int | None:
    """Positions up to which an attention that selects by an indexer which keys a query sees (DeepSeek V3.2, GLM-5,
    MiniMax M3) selects all; None where no layer selects."""
    if (n_keys := getattr(config, "index_topk", None)) is not None:
        return int(n_keys)
    blocks = getattr(config, "index_topk_blocks", None)
    selecting = any("sparse" in kind for kind in getattr(config, "layer_types", None) or ())
    return int(blocks) * int(config.index_block_size) if blocks is not None and selecting else None


def mlp_width(config: Any) -> int:
    """Width of the hidden layer of a block's feed-forward part, the widest where blocks differ."""
    for name in ("intermediate_size", "n_inner", "ffn_dim"):
        if width := getattr(config, name, None):
            return int(max(width) if isinstance(width, list | tuple) else width)
    return 4 * int(config.hidden_size)
