"""Estimated against tracked peak memory of a training step, over a grid.

`python -m benchmarks.finetune_memory` prints the tables of docs/memory.md; nothing is allocated. Models have their
true widths and vocabularies and few layers, which are alike, so that a case takes a second or two.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from probe.training.memory.command import architecture
from probe.training.memory.estimate import estimate, with_targets
from probe.training.memory.plan import FineTuningPlan
from probe.training.memory.tracker import tracked_step

LAYERS = 3
SEEN = ("smollm2-360m", "gemma-2b", "gpt2", "pythia-160m")
"""GQA and gated; MQA, gated and 256,000 tokens; plain MLP, tied; parallel plain MLP, untied."""
UNSEEN: dict[str, dict[str, Any]] = {
    "qwen2-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
    }
    | {"num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 151936},
    "qwen3-0.6b": {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128}
    | {
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "llama-untied": {
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "vocab_size": 32000,
    }
    | {"num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "gemma2": {"model_type": "gemma2", "hidden_size": 1152, "intermediate_size": 4608, "head_dim": 256}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32000},
    "gemma3-1b": {
        "model_type": "gemma3_text",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "head_dim": 256,
    }
    | {"num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 262144},
    "phi": {"model_type": "phi", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    | {"vocab_size": 32000},
    "mistral, window 128": {"model_type": "mistral", "hidden_size": 1024, "intermediate_size": 3584}
    | {"num_attention_heads": 16, "num_key_value_heads": 4, "sliding_window": 128, "vocab_size": 32000},
    "olmo2": {
        "model_type": "olmo2",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
    }
    | {"vocab_size": 32000},
    "opt": {"model_type": "opt", "hidden_size": 768, "ffn_dim": 3072, "num_attention_heads": 12}
    | {"word_embed_proj_dim": 768, "vocab_size": 32000},
    "falcon": {"model_type": "falcon", "hidden_size": 768, "num_attention_heads": 12, "multi_query": True}
    | {"parallel_attn": True, "bias": False, "alibi": False, "vocab_size": 32000},
}
"""Families without a tape of their own, and shapes that no formula was written on."""


@dataclass(frozen=True)
class Case:
    """A shape and how it is trained; `few` is a small vocabulary under more layers, where layers make the peak."""

    shape: str
    options: tuple[tuple[str, Any], ...] = field(default=())
    few: bool = False

    @property
    def plan(self) -> FineTuningPlan:
        return FineTuningPlan(**dict(self.options))


def case(shape: str, few: bool = False, **options: Any) -> Case:
    return Case(shape, tuple(options.items()), few)


def _grid() -> list[Case]:
    methods = [
        {"method": "full", "precision": "mixed"},
        {"method": "full", "precision": "float32", "optimizer": "adamw-single"},
        {"method": "full", "precision": "autocast"},
        {"method": "lora"},
        {"method": "qlora"},
    ]
    sizes = itertools.cycle(((1, 128), (2, 256), (3, 512)))
    attentions = itertools.cycle(("sdpa", "eager", "sdpa"))
    cases = [
        case(
            shape,
            batch=size[0],
            length=size[1],
            attention=next(attentions),
            checkpointing=checkpointing,
            **method,
        )
        for shape in SEEN
        for method in methods
        for checkpointing, size in zip((False, True), (next(sizes), next(sizes)), strict=True)
    ]
    for shape, optimizer in itertools.product(SEEN, ("sgd", "sgd-momentum", "lion", "muon", "adamw-foreach")):
        precision = "bfloat16" if shape == "gpt2" else "float32"
        cases.append(case(shape, optimizer=optimizer, precision=precision, batch=1, length=64))
    return cases


def _held_out() -> list[Case]:
    cases = []
    for shape in UNSEEN:
        target = "q_proj" if shape != "falcon" else "query_key_value"
        attention = "eager" if shape == "gemma2" else "sdpa"
        cases += [
            case(
                shape,
                precision="bfloat16",
                optimizer="adamw-single",
                batch=3,
                length=500,
                attention=attention,
            ),
            case(shape, precision="float32", batch=3, length=1000, checkpointing=True, attention=attention),
            case(shape, precision="bfloat16", optimizer="sgd", batch=2, length=301, attention="eager"),
            case(shape, method="lora", rank=3, targets=(target,), batch=5, length=333, attention=attention),
            case(shape, precision="float32", batch=1, length=77, accumulation=3, attention=attention),
        ]
    return cases


def _layers() -> list[Case]:
    cases = []
    for shape in ("llama-untied", "gemma-2b", "gpt2", "pythia-160m", "qwen3-0.6b", "olmo2", "opt"):
        cases += [
            case(shape, True, precision="float32", batch=4, length=700),
            case(
                shape, True, precision="bfloat16", optimizer="sgd", batch=4, length=1000, checkpointing=True
            ),
            case(shape, True, method="lora", batch=4, length=700),
            case(shape, True, method="qlora", rank=64, batch=2, length=700, checkpointing=True),
        ]
    return cases


GRID, HELD_OUT, LAYERS_ALONE = _grid(), _held_out(), _layers()
QUICK = [GRID[1], GRID[16], GRID[26], GRID[38], HELD_OUT[8], HELD_OUT[21]]
_FOLDER = tempfile.TemporaryDirectory()


@cache
def saved(shape: str, few: bool) -> str:
    """A directory with the configuration of a shape, cut to few layers."""
    from transformers import AutoConfig

    from probe.model.shapes import SHAPES

    values = {"pad_token_id": 0, **(UNSEEN.get(shape) or SHAPES[shape])}
    values |= {"n_layer" if "n_layer" in values else "num_hidden_layers": 8 if few else LAYERS}
    if few:
        values["vocab_size"] = 600
    path = Path(_FOLDER.name) / f"{shape.replace(', ', '-').replace(' ', '-')}{'-few' * few}"
    AutoConfig.for_model(**values).save_pretrained(path)
    return str(path)


@cache
def _known(name: str) -> Any:
    return architecture(name)


def compare(asked: Case) -> tuple[int, int]:
    """Estimated and tracked peak bytes of tensors."""
    name = saved(asked.shape, asked.few)
    arch, known = _known(name)
    plan = with_targets(asked.plan, known)
    return estimate(arch, plan).peak.total, tracked_step(name, plan)["peak_bytes"]


def _table(title: str, cases: list[Case]) -> None:
    out = sys.stdout.write
    out(f"\n### {title}\n\n")
    out(
        "| shape | method | precision | optimizer | attention | checkpointing | batch × length | estimate, MB |"
    )
    out(" tracked, MB | error |\n|---|---|---|---|---|---|---|---|---|---|\n")
    errors = []
    for asked in cases:
        estimated, tracked = compare(asked)
        errors.append(estimated / tracked - 1)
        plan = asked.plan
        method = plan.method if plan.method == "full" else f"{plan.method}, rank {plan.rank}"
        method += f" on {','.join(plan.targets)}" if plan.targets else ""
        method += f", {plan.accumulation} batches" if plan.accumulation > 1 else ""
        out(
            f"| {asked.shape} | {method} | {plan.precision} | {plan.optimizer} | {plan.attention} "
            f"| {'yes' if plan.checkpointing else 'no'} | {plan.batch} × {plan.length} "
            f"| {estimated / 1e6:,.1f} | {tracked / 1e6:,.1f} | {errors[-1]:+.2%} |\n"
        )
        sys.stdout.flush()
    within = sum(abs(error) <= 0.05 for error in errors)
    out(f"\n{within} of {len(errors)} within 5 %; from {min(errors):+.2%} to {max(errors):+.2%}.\n")


def main() -> None:
    """Print the tables as Markdown, each with the range of its errors."""
    _table("Shapes that the formulas were written on", GRID)
    _table("Shapes and settings that no formula was written on", HELD_OUT)
    _table("Eight layers under a vocabulary of 600, where a layer's own work makes the peak", LAYERS_ALONE)


if __name__ == "__main__":
    main()
