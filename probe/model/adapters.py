"""PEFT adapters: a base with an adapter merged into it, training one, and the weights it was made for.

A model with a merged adapter is a plain transformers model: every hook, hash and bridge works on it unchanged.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

from probe.errors import ModelUnavailable
from probe.model.names import Source
from probe.model.tokenizers import adapter_tokenizer


def merged(
    source: Source, hf: Any, tokenizer: Any, origin: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """The base with the adapter merged into its weights, its tokenizer, and origin facts of both.

    Checked against the adapter attached, on eight tokens: what does not merge faithfully (a bias where the base
    has none, an adapter that acts behind some tokens only) is refused with ModelUnavailable.
    """
    import torch

    path = Path(source.location)
    if not (path / "adapter_model.safetensors").is_file():
        raise ModelUnavailable(
            f"{path}: no adapter_model.safetensors in it; pickled adapters are never loaded. "
            "Where you trust it, load it with peft and save it again with save_pretrained."
        )
    tokenizer = adapter_tokenizer(source) or tokenizer
    ids = torch.arange(8, device=hf.device)[None] % hf.config.get_text_config().vocab_size
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft's own calls; what matters is checked below
            adapted = _attached(hf, path)
        with torch.inference_mode():
            expected = adapted(input_ids=ids).logits.float()
        plain = adapted.merge_and_unload().eval()
        with torch.inference_mode():
            found = plain(input_ids=ids).logits.float()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelUnavailable(
            f"{path}: peft could not put this adapter on {origin['resolved']}: {reason}"
        ) from error
    tolerance = 1e-3 if hf.dtype == torch.float32 else 0.1
    if not bool((found - expected).abs().max() <= tolerance * expected.abs().max()):
        raise ModelUnavailable(f"{path}: merged into the base it does not compute what it does attached")
    described = (
        f"{origin.get('description', origin['resolved'])}, with the LoRA adapter {path.name} merged into it"
    )
    return plain, tokenizer, {**origin, "description": described, "adapter": _identity(path)}


_NOT_REPEATED = {
    "pissa_niter": "draws random numbers",
    "corda": "looks at data",
    "lora_ga": "looks at gradients",
    "loftq": "quantizes the base",
}
"""Initializations that change the base's weights, each in a way that loading the adapter cannot repeat."""


def _attached(hf: Any, path: Path) -> Any:
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(path))
    init = str(getattr(config, "init_lora_weights", "")).lower()
    for name, reason in _NOT_REPEATED.items():
        if init.startswith(name):
            raise ValueError(
                f"init_lora_weights={init} changed the base's weights and {reason}, so the model it was trained in "
                "cannot be made again; save it with path_initial_model_for_weight_conversion"
            )
    if getattr(config, "layer_replication", None):
        raise ValueError(
            "its layer_replication lets layers share weights, into which no adapter can be merged"
        )
    config.inference_mode = True
    _untie_if_adapted(hf, config)
    rows = _saved_rows(path)
    if rows and rows != hf.get_input_embeddings().weight.shape[0]:
        hf.resize_token_embeddings(rows)
    return PeftModel.from_pretrained(hf, str(path), config=config, is_trainable=False).eval()


def _untie_if_adapted(hf: Any, config: Any) -> None:
    """Attached, an adapter on tied embeddings acts on one side only; merged into shared weights it would on both."""
    import torch

    head, embedding = hf.get_output_embeddings(), hf.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    targets = (
        {config.target_modules}
        if isinstance(config.target_modules, str)
        else set(config.target_modules or ())
    )
    touched = targets | set(config.modules_to_save or ())
    names = {
        name.rpartition(".")[2]
        for name, module in hf.named_modules()
        if module is head or module is embedding
    }
    if touched & names or config.trainable_token_indices or any("embed" in t or "head" in t for t in targets):
        hf.config.tie_word_embeddings = False
        head.weight = torch.nn.Parameter(copy.deepcopy(embedding.weight.detach()), requires_grad=False)


def _saved_rows(path: Path) -> int | None:
    """Rows of an embedding that was saved whole with the adapter: its vocabulary may have grown."""
    from safetensors import safe_open

    with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            if "embed" in name and name.endswith(".weight") and "lora_" not in name:
                return file.get_slice(name).get_shape()[0]
    return None


def _identity(path: Path) -> dict[str, Any]:
    """What run.json says of an adapter: settings and checksum; the weights hash is that of the merged weights."""
    import json

    from blake3 import blake3

    config = json.loads((path / "adapter_config.json").read_bytes())
    kept = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "target_modules")
    digest = blake3((path / "adapter_model.safetensors").read_bytes()).hexdigest()
    return {"path": str(path), "blake3": digest, **{key: config.get(key) for key in kept}}
