"""What memory is estimated for: the sizes of a model, and how it is to be fine-tuned."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

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
LOSSES = ("whole", "chunked", "fused")
ADAPTER_PRECISIONS = ("float32", "base")
DTYPES = {"mixed": "bfloat16", "autocast": "float32"}
"""Type of the weights where it is not the precision's own name."""
BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class ElementBytes:
    """Bytes of an element: of what linear layers read, and of the residual stream."""

    linear: int
    residual: int
    gradient: int


class Retention(NamedTuple):
    """Bytes that are kept from forward to backward: by a layer in the mean, by the largest, outside of layers.

    `scratch` is the most that is alive beside them while a layer runs backward, gradients of weights left out.
    """

    layer: float
    largest: float
    outside: float
    scratch: float


class Counter(Protocol):
    """What is kept for a plan; None, with a `reason`, where that cannot be counted."""

    reason: str | None

    def __call__(self, plan: FineTuningPlan, /) -> Retention | None: ...


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
    buffers: int = 0
    """Bytes of what is no parameter and lies beside them, such as masks of [positions, positions]."""
    counted: Counter | None = field(default=None, compare=False, repr=False)
    """What layers keep and what is kept outside of them, for what no tape describes."""

    def kept(self, plan: FineTuningPlan) -> Retention | None:
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
    """How a model is to be fine-tuned. Raises UsageError for what does not fit together.

    `loss`: see probe.training.memory.loss. `compile`: every layer and the loss by torch.compile, as torchtune's
    compile_model and compile_loss do. `optimizer_in_backward`: a weight is stepped and its gradient given back as
    soon as it is there (torchtune.training.register_optim_in_bwd_hooks). `offload`: what checkpointing keeps of a
    layer is on the host but for the last five (torchtune.training.OffloadActivations, max_fwd_stash_size).
    `repeat_kv`: keys and values are copied for every query head, as torchtune and litgpt do where transformers
    groups the queries. `adapter_precision`: peft's adapters are float32, torchtune's and litgpt's of the base's type.
    `adapter_dropout`: every adapter drops some of its own copy of the input (peft.LoraConfig.lora_dropout above 0).
    """

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
    loss: str = "whole"
    compile: bool = False
    optimizer_in_backward: bool = False
    offload: bool = False
    repeat_kv: bool = False
    adapter_precision: str = "float32"
    adapter_dropout: bool = False

    def __post_init__(self) -> None:
        for value, known, option in (
            (self.method, METHODS, "--method"),
            (self.precision, PRECISIONS, "--precision"),
            (self.optimizer, OPTIMIZERS, "--optimizer"),
            (self.attention, ATTENTIONS, "--attention"),
            (self.zero, (0, 1, 2, 3), "--zero"),
            (self.loss, LOSSES, "--loss"),
            (self.adapter_precision, ADAPTER_PRECISIONS, "--adapter-precision"),
        ):
            if value not in known:
                raise UsageError(f"{option} {value}: one of {', '.join(map(str, known))}")
        if min(self.batch, self.length, self.accumulation, self.rank, self.n_gpus) < 1:
            raise UsageError("--batch, --length, --accumulation, --rank and --gpus are positive numbers")
        if self.zero and self.n_gpus == 1:
            raise UsageError(f"--zero {self.zero} shards over several GPUs: give --gpus N")
        if self.offload and not self.checkpointing:
            raise UsageError("--offload-activations moves what --checkpointing keeps: give both")
        if self.optimizer_in_backward and (self.accumulation > 1 or self.zero):
            raise UsageError(
                "--optimizer-in-backward steps after one batch on one GPU: no --accumulation, no --zero"
            )
        if self.compile and self.precision == "autocast":
            raise UsageError(
                "--compile is counted for weights of one type: give another --precision than autocast"
            )

    @property
    def sizes(self) -> ElementBytes:
        if self.precision == "autocast":
            return ElementBytes(2, 4, 4)
        size = 4 if self.precision == "float32" else 2
        return ElementBytes(size, size, size)

    @property
    def adapter_size(self) -> int:
        """Bytes of a number of an adapter, its gradient and each of its optimizer's moments."""
        return 4 if self.adapter_precision == "float32" else self.weight_size

    @property
    def weight_size(self) -> int:
        return 4 if self.precision in ("float32", "autocast") else 2
