"""Models to be trained, for the memory they take: shapes from the configuration alone, LoRA and 4-bit layers.

Nothing here has weights worth anything. `outline_for_training` counts on the meta device; `training_model` builds
in whatever mode is active, such as FakeTensorMode, where a tensor has a size and no memory.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from probe.errors import ModelUnavailable, UsageError

BLOCK_PARAMETER = re.compile(r"\.(\d+)\.")
STYLES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "smollm3": "llama",
    "gemma": "gemma",
    "gpt2": "gpt2",
    "gpt_neox": "neox",
}
ADAPTED = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"),
    "neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
}
ADAPTED["gemma"] = ADAPTED["llama"]
UNLIMITED = 1 << 20
"""Positions of a model whose configuration names no limit."""


def outline_for_training(name: str, *, revision: str | None = None, offline: bool = False) -> dict[str, Any]:
    """What the arithmetic of probe.training.memory needs to know of a model, without its weights.

    `parameters` lists (name, shape), tied weights once; `style` is the family whose activations are known, or
    None; `adapted` are the layers that LoRA adapts by default; `window` is the smallest sliding window, or None;
    `sdpa` says whether transformers has that attention for it. Raises ModelUnavailable.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from probe.model.hooked import mlp_width

    config = training_config(name, revision, offline).get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    heads = int(config.num_attention_heads)
    style = STYLES.get(config.model_type)
    linear = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    blocks = [n for n in linear if BLOCK_PARAMETER.search(n)]
    return {
        "name": name,
        "style": style,
        "adapted": ADAPTED[style] if style else tuple(dict.fromkeys(n.rpartition(".")[2] for n in blocks)),
        "window": _window(config),
        "sdpa": bool(getattr(model, "_supports_sdpa", True)),
        "n_layers": int(config.num_hidden_layers),
        "n_heads": heads,
        "n_kv_heads": int(getattr(config, "num_key_value_heads", None) or heads),
        "d_model": int(config.hidden_size),
        "d_head": int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        "d_mlp": mlp_width(config),
        "d_vocab": int(config.vocab_size),
        "n_ctx": int(getattr(config, "max_position_embeddings", None) or UNLIMITED),
        "parameters": [(key, tuple(value.shape)) for key, value in model.named_parameters()],
    }


def _window(config: Any) -> int | None:
    """The sliding window, where some layer has one."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return int(window) if window and "sliding_attention" in kinds else None


def kept_by_layers(
    name: str,
    n_layers: int,
    batch: int,
    length: int,
    *,
    dtype: str,
    attention: str,
    autocast: bool,
    adapters: Any,
) -> int:
    """Bytes that autograd keeps for the backward pass of the model cut to its first `n_layers`.

    Every storage that autograd saves between input and loss once, weights left out; under FakeTensorMode, so
    nothing is computed. `adapters`: None, or the arguments of add_adapters.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    saved: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode():
        model = training_model(
            name, dtype=dtype, attention=attention, checkpointing=False, n_layers=n_layers, length=length
        )
        if adapters:
            add_adapters(model, **adapters)
        held = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        shapes = {tuple(sorted(p.shape)) for p in model.parameters() if p.ndim == 2} if autocast else set()
        ids = torch.zeros(batch, length, dtype=torch.long)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            loss = model(input_ids=ids, labels=ids).loss
        kept = [t for key, t in saved.items() if key not in held and tuple(sorted(t.shape)) not in shapes]
        del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)


def training_config(name: str, revision: str | None = None, offline: bool = False) -> Any:
    """The transformers configuration of a name; of a model on the hub, only this file is fetched.

    Hub models of a shape that `random:` has need no file at all. Raises ModelUnavailable, which lists those shapes.
    """
    from transformers import AutoConfig, PretrainedConfig

    from probe.model import _quiet_transformers
    from probe.model.names import DEFAULT, ensure_available, resolve
    from probe.model.shapes import SHAPES, random_config, refuse_endless

    _quiet_transformers()
    source = resolve(name, revision)
    if source.kind in ("random", "wheel"):
        return random_config(source.location if source.kind == "random" else DEFAULT)
    if shape := _known_shape(source):
        return random_config(shape)
    try:
        if source.kind == "gguf":
            from probe.model.weights import gguf_arguments

            config = AutoConfig.from_pretrained(**gguf_arguments(Path(source.location)))
            refuse_endless(name, config.to_dict())
            return config
        ensure_available(source, offline)
        safe: dict[str, Any] = {"revision": source.revision, "trust_remote_code": False}
        safe["local_files_only"] = offline or source.kind != "hub"
        refuse_endless(name, PretrainedConfig.get_config_dict(source.location, **safe)[0])
        return AutoConfig.from_pretrained(source.location, **safe)
    except ModelUnavailable as error:
        known = ", ".join(shape for shape in SHAPES if not shape.startswith("tiny"))
        raise ModelUnavailable(f"{error}\nNo download is needed for the shapes of {known}.") from error
    except Exception as error:
        raise ModelUnavailable(
            f"{name}: transformers could not read its configuration ({type(error).__name__}); give a saved "
            "model's directory, or random:NAME for a known shape"
        ) from error


def _known_shape(source: Any) -> str | None:
    """The shape of random:NAME that a hub model has, by its id without what says how it was trained on."""
    from probe.model.shapes import SHAPES

    if source.kind != "hub" or source.revision:
        return None
    bare = re.sub(r"(-(it|instruct|deduped|v0))+$", "", source.location.rsplit("/")[-1].lower())
    return bare if bare in SHAPES else None


def training_model(
    name: str,
    *,
    dtype: str,
    attention: str,
    checkpointing: bool,
    n_layers: int | None = None,
    length: int = 0,
    seed: int = 0,
) -> Any:
    """A model in training mode, dropout off, built in the active mode; `attention` is `eager` or `sdpa`.

    `n_layers` cuts it. With sdpa no mask tensor is made: a causal batch without padding needs none, and a tracer
    that cannot look into tensors may make transformers build one of [batch, 1, length, length]. A sliding window
    shorter than `length` does need one.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention not in ("eager", "sdpa"):
        raise UsageError(f"attention {attention}: one of eager, sdpa")
    config = training_config(name).get_text_config()
    config.use_cache = False
    if n_layers:
        config.num_hidden_layers = n_layers
        if getattr(config, "layer_types", None):
            config.layer_types = list(config.layer_types)[:n_layers]
    masked = (_window(config) or length) < length
    AttentionInterface.register("probe_training_sdpa", sdpa_attention_forward)
    AttentionMaskInterface.register("probe_training_sdpa", lambda *args, **kwargs: None)
    implementation = "probe_training_sdpa" if attention == "sdpa" and not masked else attention
    torch.manual_seed(seed)
    kind = getattr(torch, dtype)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=kind, attn_implementation=implementation)
    except KeyError:  # a family that looks its attention up in a table of its own
        model = AutoModelForCausalLM.from_config(config, dtype=kind, attn_implementation=attention)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout") and not isinstance(module.attention_dropout, torch.nn.Module):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010, typed as a submodule
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def add_adapters(model: Any, rank: int, targets: tuple[str, ...], *, four_bit: bool, double: bool) -> None:
    """Freeze `model`, store the linear layers of its blocks in 4 bits if asked, and add LoRA to `targets`.

    As peft does it: adapters in float32 next to a 16-bit base, their input cast to it, the sum cast back
    (peft.tuners.lora.layer.Linear.forward); the embeddings' output requires gradients, as with
    enable_input_require_grads.
    """
    import torch

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.enable_input_require_grads()
    for name, module in list(model.named_modules()):
        linear = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        if not (linear and BLOCK_PARAMETER.search(name)):
            continue
        base = _four_bit(module, double) if four_bit else module
        replacement = base
        if any(name.endswith("." + target) for target in targets):
            n_in, n_out = _sizes(module)
            replacement = _adapter(base, n_in, n_out, rank)
        if replacement is not module:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replacement)
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError(f"--targets {','.join(targets)}: no layer of that name; known are q_proj, c_attn, …")
    assert torch.is_grad_enabled()


def _sizes(module: Any) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return (rows, columns) if type(module).__name__ == "Conv1D" else (columns, rows)


def _adapter(base: Any, n_in: int, n_out: int, rank: int) -> Any:
    import torch

    class LoraLinear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = base
            self.lora_A = torch.nn.Linear(n_in, rank, bias=False, dtype=torch.float32)
            self.lora_B = torch.nn.Linear(rank, n_out, bias=False, dtype=torch.float32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result = self.base(x)
            dtype = result.dtype
            result = result + self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype))) * 2.0
            return result.to(dtype)

    return LoraLinear()


def _four_bit(module: Any, double: bool) -> Any:
    """A stand-in for bitsandbytes' Linear4bit with its sizes and its dequantisation, not its numbers."""
    import torch

    n_in, n_out = _sizes(module)
    dtype = module.weight.dtype

    class Multiply(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, packed):
            ctx.save_for_backward(packed)
            return x @ torch.empty(n_in, n_out, dtype=dtype)

        @staticmethod
        def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
            return grad @ torch.empty(n_out, n_in, dtype=dtype), None

    class FourBit(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            count = n_in * n_out
            self.register_buffer("packed", torch.zeros((count + 1) // 2, dtype=torch.uint8))
            blocks = -(-count // 64)
            self.register_buffer(
                "constants", torch.zeros(blocks, dtype=torch.uint8 if double else torch.float32)
            )
            self.register_buffer("second", torch.zeros(-(-blocks // 256) if double else 0))
            self.bias = module.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = Multiply.apply(x, self.packed)
            return out if self.bias is None else out + self.bias

    return FourBit()
