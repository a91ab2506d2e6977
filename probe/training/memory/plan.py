"""What memory is estimated for: the sizes of a model, and how it is to be fine-tuned."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from probe.errors import UsageError

METHODS = ("full", "lora", "qlora")
PRECISIONS = ("mixed", "autocast", "bfloat16", "float16", "float32")
OPTIMIZERS = (
    "adamw",
    "adamw-single",
    "adamw-foreach",
    "adamw-8bit",
    "paged-adamw",
    "paged-adamw-8bit",
    "sgd",
    "sgd-momentum",
    "adafactor",
    "lion",
    "muon",
)
ATTENTIONS = ("sdpa", "flash", "eager")
DTYPES = {"mixed": "bfloat16", "autocast": "float32"}
"""Type of the weights where it is not the precision's own name."""
BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class ElementBytes:
    """Bytes of an element: of what linear layers read, and of the residual stream."""

    linear: int
    residual: int
    gradient: int


@dataclass(frozen=True)
class Architecture:
    """The numbers of a model that memory depends on; `parameters` are (name, shape), tied weights once."""

    name: str
    style: str | None
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    window: int | None = None
    sdpa: bool = True
    counted: Callable[[FineTuningPlan], tuple[float, float] | None] | None = field(
        default=None, compare=False, repr=False
    )
    """Bytes kept by a layer and outside of layers, for what no tape describes."""

    def kept(self, plan: FineTuningPlan) -> tuple[float, float] | None:
        """What `counted` says, None where the family's tape says it: masks of sliding windows are on no tape."""
        masked = self.window is not None and plan.length > self.window and plan.attention == "sdpa"
        return self.counted(plan) if self.counted and (masked or self.style is None) else None

    @property
    def n_params(self) -> int:
        return sum(math.prod(shape) for _, shape in self.parameters)

    def block_matrices(self) -> list[tuple[str, tuple[int, ...]]]:
        """The weight matrices within layers: what LoRA adapts and QLoRA stores in 4 bits."""
        return [(n, s) for n, s in self.parameters if BLOCK.search(n) and len(s) == 2]

    @property
    def embedding(self) -> int:
        """Elements of the token embedding."""
        return self.d_vocab * self.d_model

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return sum(shape == (self.d_vocab, self.d_model) for _, shape in self.parameters) < 2


@dataclass(frozen=True)
class FineTuningPlan:
    """How a model is to be fine-tuned. Raises UsageError for what does not fit together."""

    method: str = "full"
    precision: str = "mixed"
    optimizer: str = "adamw"
    batch: int = 1
    length: int = 512
    attention: str = "sdpa"
    checkpointing: bool = False
    accumulation: int = 1
    rank: int = 16
    targets: tuple[str, ...] = ()
    double_quantization: bool = True
    zero: int = 0
    n_gpus: int = 1

    def __post_init__(self) -> None:
        for value, known, option in (
            (self.method, METHODS, "--method"),
            (self.precision, PRECISIONS, "--precision"),
            (self.optimizer, OPTIMIZERS, "--optimizer"),
            (self.attention, ATTENTIONS, "--attention"),
            (self.zero, (0, 1, 2, 3), "--zero"),
        ):
            if value not in known:
                raise UsageError(f"{option} {value}: one of {', '.join(map(str, known))}")
        if min(self.batch, self.length, self.accumulation, self.rank, self.n_gpus) < 1:
            raise UsageError("--batch, --length, --accumulation, --rank and --gpus are positive numbers")
        if self.zero and self.n_gpus == 1:
            raise UsageError(f"--zero {self.zero} shards over several GPUs: give --gpus N")

    @property
    def sizes(self) -> ElementBytes:
        if self.precision == "autocast":
            return ElementBytes(2, 4, 4)
        size = 4 if self.precision == "float32" else 2
        return ElementBytes(size, size, size)

    @property
    def weight_size(self) -> int:
        return 4 if self.precision in ("float32", "autocast") else 2
