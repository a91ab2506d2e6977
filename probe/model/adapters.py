"""PEFT adapters: a base with an adapter merged into it, training one, and the weights it was made for.

A model with a merged adapter is a plain transformers model: every hook, hash and bridge works on it unchanged.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from probe.errors import ModelUnavailable
from probe.model.names import Source
from probe.model.tokenizers import adapter_tokenizer


def merged(
    source: Source, hf: Any, tokenizer: Any, origin: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """The base with the adapter merged into its weights, its tokenizer, and origin facts of both.

    Checked against the adapter attached, on a few tokens: what does not merge faithfully (a bias where the base
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft's own calls; what matters is checked below
            adapted, untie = _attached(hf, path)
        ids = _test_ids(adapted)
        with torch.inference_mode():
            expected = adapted(input_ids=ids).logits.float()
        untie()
        plain = adapted.merge_and_unload().eval()
        with torch.inference_mode():
            logits = plain(input_ids=ids).logits.float()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelUnavailable(
            f"{path}: peft could not put this adapter on {origin['resolved']}: {reason}"
        ) from error
    tolerance = 1e-3 if hf.dtype == torch.float32 else 0.1
    if not bool((logits - expected).abs().max() <= tolerance * expected.abs().max()):
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


def _attached(hf: Any, path: Path) -> tuple[Any, Callable[[], None]]:
    """The adapter on the base as peft puts it there, and what must be called before it is merged.

    Attached, an adapter on one side of tied embeddings acts there; merged into shared weights it would on both, so
    each side first gets weights of its own.
    """
    import torch
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
    rows = _saved_rows(path)
    if rows and rows != hf.get_input_embeddings().weight.shape[0]:
        hf.resize_token_embeddings(rows)
    head, embedding = hf.get_output_embeddings(), hf.get_input_embeddings()
    adapted = PeftModel.from_pretrained(hf, str(path), config=config, is_trainable=False).eval()
    _refuse_other_weights(adapted.load_adapter(str(path), "default"))

    def untie() -> None:
        adapts_one = hf.get_output_embeddings() is not head or hf.get_input_embeddings() is not embedding
        if adapts_one and head is not None and head.weight is embedding.weight:
            hf.config.tie_word_embeddings = False
            head.weight = torch.nn.Parameter(copy.deepcopy(embedding.weight.detach()), requires_grad=False)

    return adapted, untie


def _refuse_other_weights(loading: Any) -> None:
    """Raise ValueError where the file's keys are not the adapter's: peft leaves out the one and keeps the other as
    it was made, so that an adapter with no key in place is the base."""
    listed = [
        f"{len(keys)} {what} ({', '.join(sorted(keys)[:3])}{', …' if len(keys) > 3 else ''})"
        for what, keys in (("not used", loading.unexpected_keys), ("missing", loading.missing_keys))
        if keys
    ]
    if listed:
        raise ValueError(
            f"its weights are not those that its adapter_config.json describes: {'; '.join(listed)}"
        )


def _test_ids(adapted: Any) -> Any:
    """Token ids [1, position] from the whole vocabulary, and the tokens that have rows of their own."""
    import torch

    n_vocab = adapted.get_input_embeddings().weight.shape[0]
    indices = adapted.peft_config["default"].trainable_token_indices or []
    if isinstance(indices, dict):
        indices = [index for some in indices.values() for index in some]
    spread = [*range(0, n_vocab, max(1, n_vocab // 16)), *list(indices)[:16]]
    return torch.tensor([spread], device=adapted.device)


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
