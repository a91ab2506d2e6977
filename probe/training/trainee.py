"""Training a causal model's matrices on token rows, through LoRA adapters or directly, and taking it back.

What is trained are the weights of all Linear (GPT-2: Conv1D) modules but the unembedding, either way: embeddings,
norms and biases stay, so that adapters of every rank and full fine-tuning differ in nothing but the rank of ΔW.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 8
"""Rows of one forward when measuring: logits over 50,000 tokens are what takes memory."""


@dataclass(frozen=True)
class Rows:
    """Right-padded token rows; causal attention keeps the padding from mattering."""

    ids: Tensor
    """[row, position]"""
    wanted: Tensor
    """[row, position − 1], bool: predictions of the next token that count."""

    def take(self, indices: Any) -> Rows:
        return Rows(self.ids[indices], self.wanted[indices])

    def __len__(self) -> int:
        return len(self.ids)


def rows_of(sequences: Sequence[tuple[Sequence[int], int]]) -> Rows:
    """Rows of (token ids, how many of them are only given and not predicted; at least 1)."""
    import torch

    width = max(len(ids) for ids, _ in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    wanted = torch.zeros(len(sequences), width - 1, dtype=torch.bool)
    for row, (tokens, given) in enumerate(sequences):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        wanted[row, max(given, 1) - 1 : len(tokens) - 1] = True
    return Rows(ids, wanted)


class Trainee:
    """A model that is trained again and again from the same weights."""

    def __init__(self, hf: Any):
        import torch

        self.hf = hf.eval().requires_grad_(False)
        head = hf.get_output_embeddings()
        self.targets = [
            name
            for name, module in hf.named_modules()
            if (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
            and module is not head
        ]
        self._start: dict[str, Tensor] = {}
        self._adapted: dict[str, Any] = {}

    @contextmanager
    def opened(self, rank: int | None, alpha: float, seed: int) -> Iterator[list[Any]]:
        """The parameters to train, of adapters of this rank (scale alpha / rank; A drawn with `seed`, B = 0), or
        with None of the matrices themselves. On leaving, the model is what it was."""
        if rank is None:
            modules = {name: self.hf.get_submodule(name) for name in self.targets}
            self._start = {name: module.weight.detach().clone() for name, module in modules.items()}
            try:
                yield [module.weight.requires_grad_() for module in modules.values()]
            finally:
                for name, module in modules.items():
                    module.weight.requires_grad_(False).copy_(self._start[name])
                    module.weight.grad = None
                self._start = {}
            return
        wrapped = self._wrapped(rank, alpha, seed)
        base = wrapped.base_model.model
        self._adapted = {name: base.get_submodule(name) for name in self.targets}
        try:
            yield [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        finally:
            self._adapted = {}
            self.hf = wrapped.unload().requires_grad_(False)

    def _wrapped(self, rank: int, alpha: float, seed: int) -> Any:
        import torch
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=self.targets)  # pyright: ignore[reportArgumentType]
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Conv1D: peft sets its own fan_in_fan_out
            torch.manual_seed(seed)
            return get_peft_model(self.hf, config)

    def train(
        self,
        rows: Rows,
        parameters: list[Any],
        *,
        rate: float,
        steps: int,
        batch: int,
        seed: int,
        at: Callable[[int], bool],
    ) -> bool:
        """AdamW (no decay, gradients clipped to norm 1, a tenth of the steps warming up) over shuffled epochs.

        `at(step)` is called with 0 before the first and after every step and may end it with False. Returns
        False where the loss stopped being a finite number.
        """
        import torch

        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        warm = max(1, steps // 10)
        order = batches(len(rows), batch, seed)
        going = at(0)
        for step in range(1, steps + 1):
            if not going:
                break
            optimizer.param_groups[0]["lr"] = rate * min(1.0, step / warm)
            taken = rows.take(next(order))
            loss = torch.nn.functional.cross_entropy(self._logits(taken), _next_tokens(taken))
            if not bool(loss.isfinite()):
                return False
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            going = at(step)
        return True

    def loss(self, rows: Rows) -> float:
        """Mean of −log P over the wanted tokens, nats."""
        return sum(float(-chosen.sum()) for _, chosen in self._measured(rows)) / int(rows.wanted.sum())

    def log_probs(self, rows: Rows) -> list[Tensor]:
        """log P [wanted token, vocabulary] of every eight rows."""
        return [every for every, _ in self._measured(rows)]

    def divergence(self, rows: Rows, reference: list[Tensor]) -> tuple[float, float]:
        """Mean KL(reference ‖ model) over the wanted tokens, and the loss on them, nats."""
        total = lost = 0.0
        for (log_p, chosen), expected in zip(self._measured(rows), reference, strict=True):
            total += float((expected.exp() * (expected - log_p)).sum(-1).double().sum())
            lost -= float(chosen.sum())
        count = int(rows.wanted.sum())
        return total / count, lost / count

    def factors(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        """A, B and scale of every matrix while adapters are trained."""
        return {
            name: (
                layer.lora_A["default"].weight.detach(),
                layer.lora_B["default"].weight.detach(),
                float(layer.scaling["default"]),
            )
            for name, layer in self._adapted.items()
        }

    def change(self, name: str) -> Tensor:
        """ΔW of a matrix trained directly, as stored, float64: of float32 weights, exact to their rounding."""
        weight = self.hf.get_submodule(name).weight.detach().double()
        return weight - self._start[name].double() if name in self._start else weight * 0

    def stored(self, name: str) -> tuple[Tensor, bool]:
        """The weight before training, and whether it is stored [in, out]."""
        module = self._adapted[name].get_base_layer() if self._adapted else self.hf.get_submodule(name)
        weight = self._start[name] if name in self._start else module.weight.detach()
        return weight, type(module).__name__ == "Conv1D"

    def _measured(self, rows: Rows) -> Iterator[tuple[Tensor, Tensor]]:
        """log P [wanted, vocabulary] and the float64 log P of the tokens that came, by eight rows."""
        import torch

        for start in range(0, len(rows), _ROWS):
            part = rows.take(slice(start, start + _ROWS))
            with torch.no_grad():
                every = self._logits(part).float().log_softmax(-1)
            yield every, every.gather(-1, _next_tokens(part)[:, None]).double()

    def _logits(self, rows: Rows) -> Tensor:
        first = int(rows.wanted.any(0).int().argmax())
        kept = rows.wanted.shape[1] - first
        logits = self.hf(input_ids=rows.ids[:, :-1], use_cache=False, logits_to_keep=kept).logits
        return logits[rows.wanted[:, first:]]


def _next_tokens(rows: Rows) -> Tensor:
    return rows.ids[:, 1:][rows.wanted]


def batches(count: int, size: int, seed: int) -> Iterator[Any]:
    """Indices of batches without end: every epoch is a new permutation, its incomplete rest begins the next."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < min(size, count):
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:size]
        left = left[size:]


def trainee(
    name: str, *, offline: bool = False, log: Callable[[str], None] = lambda message: None
) -> tuple[Trainee, Any, dict[str, Any]]:
    """A model to train (float32, CPU), its tokenizer, and what identifies its weights."""
    import torch

    from probe.model import _collector_paused, _quiet_transformers
    from probe.model.names import resolve
    from probe.model.weights import load_weights, weights_hash

    with _collector_paused():
        _quiet_transformers()
        hf, tokenizer, _ = load_weights(resolve(name), torch.float32, "cpu", offline, log)
    return Trainee(hf), tokenizer, {"name": name, "weights_hash": weights_hash(hf)}
