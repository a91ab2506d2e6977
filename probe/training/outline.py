"""Models to be trained, for the memory they take: shapes from the configuration alone, LoRA and 4-bit layers.

Nothing here has weights worth anything. `outline_for_training` counts on the meta device; `training_model` builds
in whatever mode is active, such as FakeTensorMode, where a tensor has a size and no memory.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from probe.errors import ModelUnavailable, ProbeError, UsageError

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
RECURRENT = re.compile(
    "Mamba|SSM|Delta(Net|Attention|Rule)|LinearAttention|LightningAttention|LSTM|R(wkv|WKV)"
)
"""Classes of layers that carry a state along the text in place of attention."""
PLACE = re.compile("^_|idx|layer_?(id|index|number|num)|^layer$|depth")
UNLIMITED = 1 << 20
"""Positions of a model whose configuration names no limit."""
MOST_LAYERS = 1000
"""Layers of a configuration that is still counted: eight times those of the deepest published language model."""


def outline_for_training(name: str, *, revision: str | None = None, offline: bool = False) -> dict[str, Any]:
    """What the arithmetic of probe.training.memory needs to know of a model, without its weights.

    `parameters` lists (name, shape), tied weights once; `buffers` are bytes, such as those of masks; `style` is the
    family whose activations are known, or None; `adapted` are the layers that LoRA adapts by default; `window` is the
    smallest sliding window, or None; `sdpa` says whether transformers has that attention for it; `kinds` are the
    indices of layers that are alike, `chunk` is what recurrent ones pad to. Raises ModelUnavailable, also for a configuration
    of which transformers makes no causal language model, or one without layers.
    """
    config = training_config(name, revision, offline)
    try:
        return _outline(name, config.get_text_config())
    except ProbeError:
        raise
    except Exception as error:  # a configuration without what its own family's code asks it for
        raise ModelUnavailable(
            f"{name}: its configuration does not say enough for an estimate ({first_line(error)})"
        ) from error


def _outline(name: str, config: Any) -> dict[str, Any]:
    import torch

    with torch.device("meta"):
        model = causal_model(name, config)
    path, stack = layer_stack(name, model)
    embedded = _table(name, model.get_input_embeddings())
    heads = _number(config, "num_attention_heads", "num_heads", "n_head", "n_heads") or 1
    d_model = _number(config, "hidden_size", "d_model", "n_embd", "dim") or embedded[1]
    style = STYLES.get(config.model_type)
    linear = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    blocks = [n for n in linear if n.startswith(path + ".")]
    return {
        "name": name,
        "style": style,
        "adapted": ADAPTED[style] if style else tuple(dict.fromkeys(n.rpartition(".")[2] for n in blocks)),
        "window": _window(config),
        "sdpa": bool(getattr(model, "_supports_sdpa", True)),
        "n_layers": len(stack),
        "n_heads": heads,
        "n_kv_heads": _number(config, "num_key_value_heads") or heads,
        "d_model": d_model,
        "d_head": _number(config, "head_dim") or max(1, d_model // heads),
        "d_mlp": _number(config, "intermediate_size", "n_inner", "ffn_dim", "d_inner") or 4 * d_model,
        "d_vocab": _table(name, model.get_output_embeddings() or model.get_input_embeddings())[0],
        "n_ctx": _number(config, "max_position_embeddings", "n_positions") or UNLIMITED,
        "parameters": [(key, tuple(value.shape)) for key, value in model.named_parameters()],
        "buffers": sum(buffer.nbytes for buffer in model.buffers()),
        "kinds": tuple(tuple(kind) for kind in layer_kinds(config, stack)),
        "chunk": _chunk(config, stack),
    }


def causal_model(name: str, config: Any, *, filled: bool = False, **arguments: Any) -> Any:
    """The causal language model of `config`, in whatever mode is active; `filled`: with random weights.

    Raises ModelUnavailable with transformers' reason where it makes none.
    """
    from contextlib import nullcontext

    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from probe.model.foreign_code import no_foreign_code

    depth = _number(config, "num_hidden_layers", "n_layer", "n_layers")
    if depth is not None and not 0 < depth <= MOST_LAYERS:
        raise ModelUnavailable(f"{name} has {depth:,} layers; 1 to {MOST_LAYERS:,} can be counted")
    try:
        with no_foreign_code(), nullcontext() if filled else no_init_weights():
            model = AutoModelForCausalLM.from_config(config, **arguments)
        if not filled:
            model.tie_weights()
        return model
    except Exception as error:
        raise ModelUnavailable(
            f"{name}: transformers makes no causal language model of this configuration ({first_line(error)})"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, its type where it has none."""
    return next((line for line in str(error).strip().splitlines() if line), type(error).__name__)[:300]


def layer_stack(name: str, model: Any) -> tuple[str, Any]:
    """Where a model's layers are and the ModuleList of them: of all ModuleLists the one with most parameters."""
    import torch

    sizes = {
        path: sum(parameter.numel() for parameter in module.parameters())
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module)
    }
    if not sizes or not max(sizes.values()):
        raise ModelUnavailable(f"{name} has no layers: there is nothing to fine-tune")
    path = max(sizes, key=lambda key: sizes[key])  # of nested lists the outer one, which comes first
    return path, model.get_submodule(path)


def _table(name: str, module: Any) -> tuple[int, int]:
    """Rows and columns of an embedding or of a head."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 2:
        raise ModelUnavailable(f"{name}: its embeddings are no table of tokens, which the estimate needs")
    return int(weight.shape[0]), int(weight.shape[1])


def _number(config: Any, *names: str) -> int | None:
    """The first of these numbers that a configuration has; of a list, one a layer, the largest."""
    for key in names:
        try:
            value = getattr(config, key, None)
        except Exception:  # transformers refuses a number that its layers do not share
            continue
        if isinstance(value, list | tuple):
            value = max((v for v in value if isinstance(v, int)), default=None)
        if isinstance(value, int) and value >= 0:
            return value
    return None


def _window(config: Any) -> int | None:
    """The sliding window, where some layer has one."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return int(window) if isinstance(window, int) and window and "sliding_attention" in kinds else None


def layer_kinds(config: Any, stack: Any) -> list[list[int]]:
    """Indices of the layers that are alike in modules, shapes, switches and declared type, a list a kind."""
    declared = getattr(config, "layer_types", None) or []
    kinds: dict[Any, list[int]] = {}
    for index, layer in enumerate(stack):
        modules = tuple(
            (path, type(module).__name__, _switches(module)) for path, module in layer.named_modules()
        )
        shapes = tuple((path, tuple(p.shape)) for path, p in layer.named_parameters())
        type_ = declared[index] if index < len(declared) else None
        kinds.setdefault((modules, shapes, type_), []).append(index)
    return list(kinds.values())


def _chunk(config: Any, stack: Any) -> int:
    """Tokens that a layer's recurrence pads its text to a multiple of; 1 where there is no such layer, 0 where it steps.

    State space layers name theirs (`chunk_size`), the gated delta rules of transformers have 64 as a default of
    their functions.
    """
    recurrent = any(RECURRENT.search(type(module).__name__) for module in stack.modules())
    sizes = [_number(config, key) or 1 for key in ("chunk_size", "mamba_chunk_size")]
    if not recurrent:
        return 1
    return 0 if max(sizes) == 1 and _scanned(stack) else math.lcm(64, *sizes)


def _scanned(stack: Any) -> bool:
    """Whether the recurrence goes token by token, as Mamba's first kind does without its kernels."""
    return any(re.fullmatch(r".*MambaMixer", type(module).__name__) for module in stack.modules())


def _switches(module: Any) -> tuple:
    """Texts, numbers and truth values that a module was built with, but for its place in the stack."""
    return tuple(
        (key, value)
        for key, value in sorted(vars(module).items())
        if isinstance(value, bool | int | str | None) and not PLACE.search(key)
    )


def training_config(name: str, revision: str | None = None, offline: bool = False) -> Any:
    """The transformers configuration of a name; of a model on the hub, only this file is fetched.

    Hub models of a shape that `random:` has need no file at all. Raises ModelUnavailable, which lists those shapes.
    """
    from transformers import AutoConfig, PretrainedConfig

    from probe.model import _quiet_transformers
    from probe.model.foreign_code import no_foreign_code
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
            config = _gguf_config(name, Path(source.location))
            refuse_endless(name, config.to_dict())
            return config
        ensure_available(source, offline)
        safe: dict[str, Any] = {"revision": source.revision, "trust_remote_code": False}
        safe["local_files_only"] = offline or source.kind != "hub"
        refuse_endless(name, PretrainedConfig.get_config_dict(source.location, **safe)[0])
        with no_foreign_code():
            return AutoConfig.from_pretrained(source.location, **safe)
    except ModelUnavailable as error:
        known = ", ".join(shape for shape in SHAPES if not shape.startswith("tiny"))
        raise ModelUnavailable(f"{error}\nNo download is needed for the shapes of {known}.") from error
    except Exception as error:
        raise ModelUnavailable(
            f"{name}: transformers could not read its configuration ({first_line(error)}); give a saved "
            "model's directory, or random:NAME for a known shape"
        ) from error


def _gguf_config(name: str, path: Path) -> Any:
    """The configuration in a GGUF file. Raises ModelUnavailable where the file does not say its sizes.

    For a size that the file's metadata lacks, transformers takes a class's default: Llama's is the 7B model.
    """
    from gguf import GGUFReader
    from transformers import AutoConfig

    from probe.model.weights import gguf_arguments

    reader = GGUFReader(str(path))
    fields = set(reader.fields)
    family = next((key.rpartition(".")[0] for key in fields if key.endswith(".block_count")), "llama")
    tensors = [tensor.name for tensor in reader.tensors]
    wanted: list[tuple[str, ...]] = [("block_count",), ("embedding_length",), ("vocab_size",)]
    if not tensors or any(".attn_" in tensor for tensor in tensors):
        wanted.append(("attention.head_count",))
    if not tensors or any(".ffn_" in tensor for tensor in tensors):
        wanted.append(("feed_forward_length", "expert_feed_forward_length"))
    known = fields | ({f"{family}.vocab_size"} if "tokenizer.ggml.tokens" in fields else set())
    lacking = [keys[0] for keys in wanted if not any(f"{family}.{key}" in known for key in keys)]
    if lacking:
        raise ModelUnavailable(
            f"{name}: this GGUF file's metadata lacks {', '.join(lacking)}, so that its sizes are unknown; give the "
            "model's directory or its hub id"
        )
    return AutoConfig.from_pretrained(**gguf_arguments(path))


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
    length: int = 0,
    seed: int = 0,
    filled: bool = True,
    masks: bool = False,
) -> Any:
    """A model in training mode, dropout off, built in the active mode; `attention` is `eager` or `sdpa`.

    `filled`: with random weights. With sdpa no mask tensor is made unless `masks`: a causal batch without padding needs
    none, and a tracer that cannot look into tensors may make transformers build one of [batch, 1, length, length]. A
    sliding window shorter than `length` does need one, and so do families that read the mask themselves.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention not in ("eager", "sdpa"):
        raise UsageError(f"attention {attention}: one of eager, sdpa")
    config = training_config(name).get_text_config()
    config.use_cache = False
    masked = masks or (_window(config) or length) < length
    AttentionInterface.register("probe_training_sdpa", sdpa_attention_forward)
    AttentionMaskInterface.register("probe_training_sdpa", lambda *args, **kwargs: None)
    implementation = "probe_training_sdpa" if attention == "sdpa" and not masked else attention
    torch.manual_seed(seed)
    kind = getattr(torch, dtype)
    model = _attending(name, config, (implementation, attention), filled=filled, dtype=kind)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout") and not isinstance(module.attention_dropout, torch.nn.Module):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010, typed as a submodule
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _attending(name: str, config: Any, ways: tuple[str, ...], **arguments: Any) -> Any:
    """The model with the first of these attentions that its family takes, which may have a table of its own; eager last."""
    for way in ways:
        try:
            return causal_model(name, config, attn_implementation=way, **arguments)
        except ModelUnavailable:
            continue
    return causal_model(name, config, attn_implementation="eager", **arguments)


def add_adapters(
    model: Any,
    rank: int,
    targets: tuple[str, ...],
    *,
    four_bit: bool,
    double: bool,
    size: int = 4,
    dropout: bool = False,
) -> None:
    """Freeze `model`, store the linear layers of its blocks in 4 bits if asked, and add LoRA to `targets`.

    As peft does it: adapters in float32 (`size` 4) next to a 16-bit base, their input cast to it, the sum cast back
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
            kind = torch.float32 if size == 4 else module.weight.dtype
            replacement = _adapter(base, n_in, n_out, rank, kind, 0.05 if dropout else 0.0)
        if replacement is not module:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replacement)
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError(f"--targets {','.join(targets)}: no layer of that name; known are q_proj, c_attn, …")
    assert torch.is_grad_enabled()


def _sizes(module: Any) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return (rows, columns) if type(module).__name__ == "Conv1D" else (columns, rows)


def _adapter(base: Any, n_in: int, n_out: int, rank: int, kind: Any, dropout: float) -> Any:
    import torch

    class LoraLinear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = base
            self.lora_A = torch.nn.Linear(n_in, rank, bias=False, dtype=kind)
            self.lora_B = torch.nn.Linear(rank, n_out, bias=False, dtype=kind)

        @property
        def weight(self) -> torch.Tensor:
            """The base's, whose type some families ask for."""
            return self.base.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result = self.base(x)
            dtype = result.dtype
            x = x.to(self.lora_A.weight.dtype)
            if dropout:  # the kernel of GPUs, whose mask is a byte a number; a CPU's is as wide as the input
                x = torch.native_dropout(x, dropout, True)[0]
            result = result + self.lora_B(self.lora_A(x)) * 2.0
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

        @property
        def weight(self) -> torch.Tensor:
            return torch.empty(n_out, n_in, dtype=dtype)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = Multiply.apply(x, self.packed)
            return out if self.bias is None else out + self.bias

    return FourBit()
