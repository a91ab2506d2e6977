"""The only room that imports transformers and transformer-lens.

names → shapes → weights → attention → structure → inspection → hooked: what NAME means, random shapes, getting weights, the
attention call through which everything is captured, what a model is built like, the check that it is captured faithfully, and the
model that can be recorded. `load` is the door.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probe.model.hooked import Model

DTYPES = ("float32", "bfloat16", "float16")


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Without garbage collection: torch and transformers make 640,000 objects that all stay.

    Looking through them again and again took a sixth of the time of importing them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def load(
    name: str = "smollm2-135m",
    *,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    offline: bool = False,
    log: Callable[[str], object] = lambda message: None,
    build: type[Model] | None = None,
) -> Model:
    """Load a model by name (see `probe models`), in eval mode and without gradients; `build` makes the result.

    Raises ModelUnavailable (what to do is in the message) and UsageError for an impossible dtype or device.
    """
    from probe.errors import UsageError
    from probe.model.names import ensure_available, resolve

    source = resolve(name, revision)
    ensure_available(source, offline)
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: one of {', '.join(DTYPES)}")
    if not re.fullmatch(r"cpu|auto|cuda(:[0-9]+)?", device):
        raise UsageError(f"--device {device}: one of cpu, cuda, cuda:N, auto")
    with _collector_paused():
        _quiet_transformers()
        import torch

        from probe.model.foreign_code import no_foreign_code
        from probe.model.hooked import Model
        from probe.model.weights import load_weights

    if device.startswith("cuda") and int(device[5:] or 0) >= (count := torch.cuda.device_count()):
        raise UsageError(f"--device {device}: torch sees {count} CUDA devices here; use --device cpu")
    if device == "auto":
        device = "auto" if torch.cuda.is_available() else "cpu"
    with no_foreign_code():
        hf, tokenizer, origin = load_weights(source, getattr(torch, dtype), device, offline, log)
    return (build or Model)(hf, tokenizer, source, origin)


@_collector_paused()
def outline(name: str, *, revision: str | None = None, offline: bool = False) -> dict[str, Any]:
    """Tokenizer and sizes of a model without its weights (the default model is fetched if it never was)."""
    from probe.errors import ModelUnavailable
    from probe.model.foreign_code import no_foreign_code
    from probe.model.names import ensure_available, resolve
    from probe.model.weights import load_outline

    source = resolve(name, revision)
    ensure_available(source, offline)
    _quiet_transformers()
    with no_foreign_code():
        config, tokenizer = load_outline(source, offline)
        try:
            shape = _shape(config)
        except (AttributeError, ValueError) as error:
            raise ModelUnavailable(
                f"{name}: architecture {config.model_type} cannot be captured faithfully: {str(error).splitlines()[0]}"
            ) from error
    return {"tokenizer": tokenizer, "shape": shape}


def _shape(config: Any) -> dict[str, Any]:
    from probe.model.structure import (
        context_length,
        float32_residual,
        layer_config,
        mlp_width,
        without_attention,
    )
    from probe.model.weights import count_parameters

    whole = config.get_text_config()
    n_layers, others = int(whole.num_hidden_layers), without_attention(whole)
    text = layer_config(whole, next((layer for layer in range(n_layers) if layer not in others), 0))
    n_heads = int(getattr(text, "num_attention_heads", 0))
    n_kv_heads = int(getattr(text, "num_key_value_heads", None) or n_heads)
    d_value = d_head = int(getattr(text, "head_dim", None) or text.hidden_size // max(n_heads, 1))
    if n_heads == 0 or len(others) == n_layers:
        n_heads = n_kv_heads = d_head = d_value = 0
    if rope := getattr(text, "qk_rope_head_dim", None):  # latent attention
        n_kv_heads, d_head, d_value = n_heads, int(text.qk_nope_head_dim) + int(rope), int(text.v_head_dim)
    elif text.model_type == "falcon":
        grouped = text.new_decoder_architecture or not text.multi_query
        n_kv_heads = int(text.num_kv_heads) if grouped else 1
    return {
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "d_model": int(text.hidden_size),
        "d_head": d_head,
        "d_value": d_value,
        "d_mlp": mlp_width(text),
        "d_vocab": int(text.vocab_size),
        "n_ctx": context_length(text),
        "without_attention": others,
        "n_params": count_parameters(config),
        "float32_residual": float32_residual(whole),
    }


def describe(model: Model) -> dict[str, Any]:
    """The `model` part of run.json: identity, facts, the attention path and the final norm."""
    from dataclasses import asdict

    from probe.model.norms import final_norm
    from probe.model.weights import weights_hash

    facts = asdict(model.facts)
    return {
        "name": model.source.name,
        **model.origin,
        "weights_hash": weights_hash(model.hf),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention_path": "scaled_dot_product_attention, recorded in the call",
        **facts,
        "norm": final_norm(model),
    }


def _quiet_transformers() -> None:
    """No progress bars or advice on stderr: probe prints its own progress."""
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("WANDB_MODE", "disabled")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
