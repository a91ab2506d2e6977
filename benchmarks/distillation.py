"""`python -m benchmarks.distillation`: a small student, trained on a teacher's soft targets at two temperatures, and on tokens alone.

The loss is τ² KL(p_τ‖q_τ) a position, p of the teacher and q of the student (Hinton et al. 2015, section 2), so that gradients keep
their size. All students begin with the same random weights and see the same batches of shipped texts; what they are measured on
are other texts: KL from the teacher's distribution at τ = 1, and the loss on the tokens. Of one seed: intervals are over texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch.nn.functional import cross_entropy

import probe
from probe.maths.intervals import mean_interval

ROOT = Path(__file__).parent.parent
TOKENS = 48
"""Tokens of a text; what is longer is cut."""
Rows = list[tuple[torch.Tensor, torch.Tensor]]
"""Token ids [position] of a text, and the teacher's logits [position, d_vocab], half precision."""


def training_texts() -> list[str]:
    """Shipped texts of two kinds: prose, and questions."""
    prose = ROOT / "probe" / "training" / "lora" / "tarn" / "text.jsonl"
    lines = [json.loads(line)["text"] for line in prose.read_text("utf-8").splitlines()]
    questions = (ROOT / "tasks" / "cot.jsonl").read_text("utf-8").splitlines()
    return [*lines, *(json.loads(line)["question"] for line in questions)]


def held_out_texts() -> list[str]:
    return [
        line
        for name in ("known", "reworded")
        for line in (ROOT / "tasks" / "texts" / f"{name}.txt").read_text("utf-8").splitlines()
    ]


def soft_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """τ² KL(teacher‖student) at τ, nats, mean over positions; logits [position, d_vocab]."""
    log_p, log_q = (logits.div(temperature).log_softmax(-1) for logits in (teacher, student))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def taught(hf: Any, tokenizer: Any, texts: list[str]) -> Rows:
    """The texts with what a model says at each of their positions."""
    rows: Rows = []
    for text in texts:
        ids = torch.tensor(tokenizer(text)["input_ids"][:TOKENS])
        with torch.no_grad():
            rows.append((ids, hf(ids[None]).logits[0].half()))
    return rows


def fresh(d_vocab: int, width: int = 64) -> Any:
    """A student of two layers with random weights, the same each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=d_vocab,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


@dataclass(frozen=True)
class Setting:
    """A training."""

    steps: int = 80
    batch: int = 6
    rate: float = 3e-3


def train(rows: Rows, temperature: float | None, setting: Setting) -> Any:
    """A student of these rows: on soft targets at a temperature, or on the tokens alone."""
    student = fresh(rows[0][1].shape[-1])
    optimizer = torch.optim.AdamW(student.parameters(), lr=setting.rate)
    generator = np.random.default_rng(0)
    for _ in range(setting.steps):
        optimizer.zero_grad()
        for number in generator.choice(len(rows), setting.batch, replace=False):
            ids, teacher = rows[number]
            logits = student(ids[None]).logits[0]
            if temperature is None:
                loss = cross_entropy(logits[:-1], ids[1:])
            else:
                loss = soft_loss(logits[:-1], teacher[:-1].float(), temperature)
            (loss / setting.batch).backward()
        optimizer.step()
    return student.eval()


@torch.no_grad()
def measured(student: Any, rows: Rows) -> dict[str, np.ndarray]:
    """[text]: `kl` from the teacher at τ = 1 and `loss` on the tokens, nats a position."""
    numbers: dict[str, list[float]] = {"kl": [], "loss": []}
    for ids, teacher in rows:
        logits = student(ids[None]).logits[0]
        numbers["kl"].append(float(soft_loss(logits[:-1], teacher[:-1].float(), 1.0)))
        numbers["loss"].append(float(cross_entropy(logits[:-1], ids[1:])))
    return {name: np.array(values) for name, values in numbers.items()}


def compare(
    seen: Rows, held_out: Rows, setting: Setting, log: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """`kl` and `loss` of an untrained student and of those trained on tokens and at two temperatures, and the paired difference of
    the two."""
    students = {"untrained": fresh(seen[0][1].shape[-1]).eval()}
    for name, temperature in (("tokens", None), ("tau_1", 1.0), ("tau_4", 4.0)):
        log(f"training on {name}")
        students[name] = train(seen, temperature, setting)
    outcomes = {name: measured(student, held_out) for name, student in students.items()}
    out = {name: {key: _mean(values) for key, values in of.items()} for name, of in outcomes.items()}
    for name in ("tokens", "tau_4"):
        out[f"{name}_minus_tau_1"] = {
            key: _mean(outcomes[name][key] - outcomes["tau_1"][key]) for key in ("kl", "loss")
        }
    return out


def _mean(values: np.ndarray) -> dict[str, Any]:
    low, high = mean_interval(values) or (None, None)
    return {"value": float(values.mean()), "low": low, "high": high, "n": len(values)}


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True, help="The teacher.")
@click.option("--steps", default=Setting.steps, show_default=True, type=click.IntRange(1))
def main(model: str, steps: int) -> None:
    """Print a JSON document: what students of one teacher have learned at two temperatures."""
    teacher = probe.load(model)
    seen, held_out = (
        taught(teacher.hf, teacher.tokenizer, texts) for texts in (training_texts(), held_out_texts())
    )
    out = compare(seen, held_out, Setting(steps=steps), lambda line: click.echo(line, err=True))
    click.echo(json.dumps({"model": model, "texts": len(seen), "steps": steps, **out}))


if __name__ == "__main__":
    main()
