"""Peaks that other tools published, beside what `probe memory` says for the same settings.

`python -m benchmarks.published_memory` prints the table of docs/memory.md. Peaks are those of torch's allocator, tensors
alone, so they are compared with the estimate's highest moment and not with its total.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from probe.training.memory.command import architecture
from probe.training.memory.estimate import StepEstimate, estimate, with_targets
from probe.training.memory.plan import FineTuningPlan

_LLAMA = {"model_type": "llama", "max_position_embeddings": 131072, "tie_word_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.2-3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}
    | {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}
    | {"tie_word_embeddings": True},
    "llama-3.1-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "llama-3.1-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    | {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256},
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "tinyllama-1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
    | {"num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000},
    "qwen-1.8b": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24}
    | {"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 151936},
    "phi-1.5": {"model_type": "phi", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
    | {"num_attention_heads": 32, "vocab_size": 51200, "max_position_embeddings": 2048},
}
MODELS["phi-1.5-gelu"] = MODELS["phi-1.5"] | {"hidden_act": "gelu_pytorch_tanh"}
"""Published configurations; Qwen's first generation has the shape of a Llama with biases."""


@dataclass(frozen=True)
class Row:
    """A published peak in bytes, the settings it was measured with, and why the estimate differs where it does."""

    name: str
    model: str
    published: float
    options: dict[str, Any]
    reason: str = ""

    def estimate(self) -> StepEstimate:
        arch, known = _known(self.model)
        return estimate(arch, with_targets(FineTuningPlan(**self.options), known))


GIB, GB = 2**30, 1e9
_TORCHTUNE = {"precision": "bfloat16", "repeat_kv": True, "adapter_precision": "base"}
_MLP = ("gate_proj", "up_proj", "down_proj")
_WIDE = ("q_proj", "v_proj", "o_proj", *_MLP)


_REASONS = {
    "compile": "torchtune's compiled layers break at flex attention, and what is copied there is not counted",
    "8-bit AdamW": "torchao's or bitsandbytes': the table does not say, and the scratch of neither's kernel is counted",
    "QLoRA, rank 64": "the gradient of one chunk's logits is counted beside the logits of all chunks",
}


def _ladder() -> list[Row]:
    """torchtune's README (Optimization flags): Llama-3.2-3B, A100, batch 2, each saving on top of those before."""
    options: dict[str, Any] = _TORCHTUNE | {"batch": 2, "length": 512}
    steps: list[tuple[str, float, dict[str, Any]]] = [
        ("baseline: texts as long as they are", 25.5, {}),
        ("packed to 4,096 tokens", 60.0, {"length": 4096}),
        ("compile", 51.0, {"compile": True}),
        ("chunked cross entropy", 42.9, {"loss": "chunked"}),
        ("activation checkpointing", 24.9, {"checkpointing": True}),
        ("optimizer step in backward", 23.1, {"optimizer_in_backward": True}),
        ("activation offloading", 21.8, {"offload": True}),
        ("8-bit AdamW", 17.6, {"optimizer": "adamw-8bit"}),
        (
            "LoRA, rank 64",
            8.5,
            {"optimizer": "adamw", "optimizer_in_backward": False}
            | {"method": "lora", "rank": 64, "targets": _WIDE},
        ),
        ("QLoRA, rank 64", 4.6, {"method": "qlora"}),
    ]
    rows = []
    for name, size, more in steps:
        options = options | more
        rows.append(Row(name, "llama-3.2-3b", size * GIB, options, _REASONS.get(name, "")))
    return rows


LADDER = _ladder()
_EIGHT = _TORCHTUNE | {"batch": 2, "length": 2048, "compile": True, "loss": "chunked"}
_LOW = {"optimizer": "paged-adamw-8bit", "optimizer_in_backward": True}
README = [
    Row("full, RTX 4090", "llama-3.1-8b", 18.9 * GIB, _EIGHT | _LOW | {"checkpointing": True}),
    Row("full, A6000", "llama-3.1-8b", 37.4 * GIB, _EIGHT | _LOW),
    Row(
        "LoRA, RTX 4090",
        "llama-3.1-8b",
        16.2 * GIB,
        _EIGHT | {"method": "lora", "rank": 8, "targets": ("q_proj", "v_proj"), "checkpointing": True},
    ),
    Row(
        "LoRA, A6000",
        "llama-3.1-8b",
        30.3 * GIB,
        _EIGHT | {"method": "lora", "rank": 8, "targets": ("q_proj", "v_proj")},
    ),
    Row(
        "QLoRA, RTX 4090",
        "llama-3.1-8b",
        7.4 * GIB,
        _EIGHT | {"method": "qlora", "rank": 8, "targets": ("k_proj", *_WIDE), "checkpointing": True},
    ),
]
"""torchtune's README (Memory and training speed): Llama-3.1-8B, batch 2, packed to 2,048 tokens, compiled."""


_LEAST = {"batch": 1, "length": 512, "rank": 16, "checkpointing": True, "offload": True, "loss": "fused"} | {
    "precision": "bfloat16",
    "adapter_precision": "base",
    "optimizer": "adamw-8bit",
}
MINIMA = [
    Row(f"{method}, least", model, size * GIB, _LEAST | {"method": method})
    for model, *sizes in (("llama-3.2-3b", 3.5, 8), ("llama-3.1-8b", 6, 22), ("llama-3.1-70b", 41, 164))
    for method, size in zip(("qlora", "lora"), sizes, strict=True)
]
"""Unsloth's documentation, minimum memory for a size of model: bounds, since its kernels and lengths are its own."""
_LITGPT = {"precision": "bfloat16", "adapter_precision": "base", "loss": "chunked", "repeat_kv": True}
_QV = {"rank": 32, "targets": ("q_proj", "v_proj"), "batch": 2, "length": 512, "adapter_dropout": True}
_ALL = {"rank": 32, "batch": 8, "length": 512, "adapter_dropout": True}
_NO_DOUBLE = {"method": "qlora", "double_quantization": False}
_PHI = {"method": "lora", "rank": 8, "targets": ("q_proj", "v_proj"), "length": 1044, "adapter_dropout": True}
_QLORA_REASON = (
    "not explained: in litgpt's own tables 4-bit weights keep more than 16-bit ones (its bug report 1112); float32 between "
    "the 4-bit products would do it"
)
_GELU_REASON = (
    "transformers' gelu_new is Python and keeps four tables of the feed-forward width, litgpt's kernel one"
)
OTHERS = [
    Row("litgpt LoRA, 2 × 512", "llama-2-7b", 19.77 * GB, _LITGPT | _QV | {"method": "lora"}),
    Row("litgpt QLoRA, 2 × 512", "llama-2-7b", 13.68 * GB, _LITGPT | _QV | _NO_DOUBLE, _QLORA_REASON),
    Row(
        "the same in float32",
        "llama-2-7b",
        13.68 * GB,
        _LITGPT | _QV | _NO_DOUBLE | {"precision": "float32"},
    ),
    Row("litgpt LoRA, 8 × 512", "tinyllama-1.1b", 13.50 * GB, _LITGPT | _ALL | {"method": "lora"}),
    *(
        Row(
            f"litgpt LoRA, {batch} × 1,044{words}",
            model,
            size * GB,
            _LITGPT | _PHI | {"batch": batch, "repeat_kv": False},
            reason,
        )
        for model, words, reason in (("phi-1.5", "", _GELU_REASON), ("phi-1.5-gelu", ", that kernel", ""))
        for batch, size in ((1, 4.82), (2, 6.76), (4, 10.68))
    ),
    Row(
        "Qwen's own full fine-tuning, 1 × 256",
        "qwen-1.8b",
        43.5 * GIB,
        {"batch": 1, "length": 256},
        "a process under DeepSpeed: its float32 gradients and buckets and the allocator's cache are in it, which are not "
        "tensors of a step",
    ),
]
"""Rows of litgpt's config hub and resource tables (max_memory_allocated, texts up to that length) and of Qwen's README."""


@cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


@cache
def _known(model: str) -> Any:
    path = Path(_folder().name) / model
    path.mkdir()
    (path / "config.json").write_text(json.dumps(_LLAMA | MODELS[model]))
    return architecture(str(path))


def main() -> None:
    """Print the tables as Markdown."""
    out = sys.stdout.write
    titles = (
        ("torchtune, ladder", LADDER),
        ("torchtune, table", README),
        ("Unsloth's minima", MINIMA),
        ("litgpt and Qwen", OTHERS),
    )
    for title, rows in titles:
        out(
            f"\n### {title}\n\n| setting | published, GiB | estimate, GiB | difference | highest | reason |\n"
        )
        out("|---|---|---|---|---|---|\n")
        for row in rows:
            peak = row.estimate().peak
            name = f"{row.model.removesuffix('-gelu')}, {row.name}" if rows in (OTHERS, MINIMA) else row.name
            out(
                f"| {name} | {row.published / GIB:.1f} | {peak.total / GIB:.1f} "
                f"| {peak.total / row.published - 1:+.1%} | {peak.phase} | {row.reason} |\n"
            )


if __name__ == "__main__":
    main()
