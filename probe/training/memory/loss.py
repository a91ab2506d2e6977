"""The tables of tokens × vocabulary that a loss keeps, and the gradients of the head they make.

`whole` is what transformers computes: all logits, copied to float32, and cross entropy of them. `chunked` is
torchtune's CEWithChunkedOutputLoss: the head and the loss run over eighths of the text, so that only an eighth is
in float32 at once; the logits of all of it exist. `fused` is Liger's fused_linear_cross_entropy: a chunk's logits
become the gradient of its hidden states and of the head at once, so that no table outlives its chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

from probe.training.memory.plan import Architecture, FineTuningPlan

CHUNKS = 8
"""torchtune.modules.loss.CEWithChunkedOutputLoss, num_output_chunks."""


@dataclass(frozen=True)
class HeadMoment:
    """A moment of the head's backward pass: bytes of logits and their gradients, tables of the head's gradient."""

    logits: float
    tables: int


@dataclass(frozen=True)
class LossTables:
    """Bytes of tables while the loss runs forward and backward, and moments of the head's backward pass.

    `beside_embedding` counts tables that are alive with the embedding's gradient where the head is the same matrix:
    autograd adds two gradients out of place (three tables: torch.profiler, a tied 2,000 × 500 table), and to a sum of
    several in place.
    """

    forward: float
    backward: float
    head: tuple[HeadMoment, ...]
    beside_embedding: int


def loss_tables(arch: Architecture, plan: FineTuningPlan) -> LossTables:
    """What `plan`'s loss takes on `arch`.

    Compiled, a loss keeps its input and a number a row, and its backward pass writes one table: what the partitioner
    of torch.compile saves of `cross_entropy(logits.float())`; uncompiled it keeps log-probabilities in float32, and
    two gradients of that size are made of them.
    """
    tokens, size = plan.batch * plan.length, plan.sizes.linear
    table = tokens * arch.d_vocab
    upcast = 0 if size == 4 else size
    if plan.loss == "fused":
        wide = -(-arch.d_vocab // arch.d_model)
        rows = min(tokens, 1 << (-(-tokens // wide) - 1).bit_length())
        peak = rows * arch.d_vocab * size + tokens * arch.d_model * size
        return LossTables(peak, tokens * arch.d_model * size, (HeadMoment(peak, 1),), 2)
    if plan.loss == "chunked":
        kept = size if plan.compile else 4
        forward = size if plan.compile else size + 4 + (4 / CHUNKS if upcast else 0)
        backward = kept + (size if plan.compile else 8) / CHUNKS
        # autograd runs what was made last first: every chunk's loss, and then the head's products one by one
        moments = tuple(
            HeadMoment(table * size * (CHUNKS + 1 - k) / CHUNKS, tables)
            for k, tables in ((1, 1), (2, 3), (3, 2))
        )
        return LossTables(table * forward, table * backward, moments, 1)
    head = (HeadMoment(table * size, 1),)
    if plan.compile:
        return LossTables(table * (upcast + 4), table * 8, head, 2)
    return LossTables(table * (upcast + 8), table * 12, head, 2)
