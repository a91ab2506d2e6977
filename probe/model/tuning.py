"""A copy of a model in training: all of its weights, or LoRA factors (peft) beside the linear layers of its blocks.

Examples are token ids with the number of leading tokens that are given; the loss is the mean negative
log-probability, nats a token, of those behind them.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Example = tuple[list[int], int]
"""Token ids, and how many of them are given (at least one)."""

_IGNORED = -100
_BLOCK = 16
"""Examples that are evaluated together."""


class Tuning:
    """One training. The model that is given stays as it is.

    `rank` None trains every weight. Rank r has factors beside all linear layers of the blocks at scale
    alpha / r = 2 (Biderman et al. 2024, section 3), B = 0 at the start (Hu et al. 2021, section 4.1). AdamW
    without weight decay; the rate rises linearly over the first tenth of `steps` and stays, so that states
    along the way belong to one schedule whatever its length.
    """

    def __init__(self, hf: Any, *, rank: int | None, rate: float, steps: int, batch: int, seed: int):
        torch.manual_seed(seed)
        self.rank, self.rate, self.steps, self.batch = rank, rate, steps, batch
        self._linear = _linear_layers(hf)
        self._before = {name: hf.get_submodule(name).weight for name in self._linear}
        self._hf = _copied(hf) if rank is None else _adapted(hf, self._linear, rank)
        trained = [weight for weight in self._hf.parameters() if weight.requires_grad]
        self.n_trained = sum(weight.numel() for weight in trained)
        self._optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        self._draw = random.Random(seed)
        self._order: list[int] = []
        self.step = 0

    def advance(self, examples: Sequence[Example], until: int) -> None:
        """Train up to step `until`; each pass over the examples has an order of its own, drawn from the seed."""
        with torch.enable_grad():
            while self.step < until:
                self.step += 1
                for group in self._optimizer.param_groups:
                    group["lr"] = self.rate * min(1.0, self.step / max(1.0, self.steps / 10))
                while len(self._order) < self.batch:
                    self._order += self._draw.sample(range(len(examples)), len(examples))
                chosen, self._order = self._order[: self.batch], self._order[self.batch :]
                ids, seen, labels = _padded([examples[index] for index in chosen])
                logits = self._hf(input_ids=ids, attention_mask=seen).logits
                loss = _nll(logits, labels).sum() / (labels != _IGNORED).sum()
                self._optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self._optimizer.step()

    def log_probs(self, examples: Sequence[Example]) -> Iterator[tuple[Tensor, Tensor]]:
        """Log-probabilities [token, d_vocab] at the tokens behind what is given, and these tokens, by block."""
        yield from log_probs(self._hf, examples)

    def change(self) -> float:
        """‖ΔW‖_F over the linear layers of the blocks together, also where every weight is trained."""
        squares = 0.0
        with torch.no_grad():
            for name in self._linear:
                if self.rank is None:
                    after = self._hf.get_submodule(name).weight
                    squares += float((after.double() - self._before[name].double()).square().sum())
                else:
                    a, b, scale = self._factors(name)
                    squares += scale**2 * float(((b.T @ b) * (a @ a.T)).sum())
        return math.sqrt(max(squares, 0.0))

    def factors(self) -> Iterator[tuple[str, Tensor, Tensor, float]]:
        """Name, A [r, d_in], B [d_out, r] and scale of every ΔW; nothing where every weight is trained."""
        if self.rank is not None:
            for name in self._linear:
                yield name, *self._factors(name)

    def differences(self) -> Iterator[tuple[str, Tensor]]:
        """ΔW [d_out, d_in], float64, of the same layers where every weight is trained."""
        if self.rank is None:
            for name in self._linear:
                yield (
                    name,
                    self._hf.get_submodule(name).weight.detach().double() - self._before[name].double(),
                )

    def save(self, path: Path) -> None:
        """The adapter as peft saves it; nothing where every weight is trained."""
        if self.rank is not None:
            self._hf.save_pretrained(str(path), safe_serialization=True)

    def _factors(self, name: str) -> tuple[Tensor, Tensor, float]:
        layer = self._hf.get_submodule(f"base_model.model.{name}")
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        return a.double(), b.double(), float(layer.scaling["default"])


def log_probs(hf: Any, examples: Sequence[Example]) -> Iterator[tuple[Tensor, Tensor]]:
    """As `Tuning.log_probs`, of a plain model."""
    with torch.inference_mode():
        for start in range(0, len(examples), _BLOCK):
            ids, seen, labels = _padded(examples[start : start + _BLOCK])
            kept = labels[:, 1:] != _IGNORED
            logits = hf(input_ids=ids, attention_mask=seen).logits[:, :-1]
            yield logits[kept].float().log_softmax(-1), labels[:, 1:][kept]


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    return torch.nn.functional.cross_entropy(
        flat, labels[:, 1:].reshape(-1), ignore_index=_IGNORED, reduction="none"
    )


def _padded(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (0 behind an example's end), attention mask and labels, `_IGNORED` where there is no loss, each
    [example, position]."""
    longest = max(len(ids) for ids, _ in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    seen = torch.zeros_like(ids)
    labels = torch.full((len(examples), longest), _IGNORED)
    for row, (own, given) in enumerate(examples):
        ids[row, : len(own)] = torch.tensor(own)
        seen[row, : len(own)] = 1
        labels[row, given : len(own)] = torch.tensor(own[given:])
    return ids, seen, labels


def _linear_layers(hf: Any) -> list[str]:
    """Names of the linear layers inside the blocks: neither embeddings nor the unembedding."""
    head = hf.get_output_embeddings()
    return [
        name
        for name, module in hf.named_modules()
        if (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D") and module is not head
    ]


def _copied(hf: Any) -> Any:
    own = copy.deepcopy(hf)
    return own.requires_grad_(True)


def _adapted(hf: Any, linear: list[str], rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    conv = any(type(hf.get_submodule(name)).__name__ == "Conv1D" for name in linear)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=linear, lora_dropout=0.0, fan_in_fan_out=conv
    )
    return get_peft_model(copy.deepcopy(hf), config)
