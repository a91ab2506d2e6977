"""The memory of one fine-tuning step, from shapes alone.

Model states (weights, gradients, optimizer; the word is ZeRO's, arXiv:1910.02054, section 3.1) are counted tensor
by tensor; activations come from the tape of a layer; the step is then followed in time and the estimate is its
highest moment. Two terms lie outside of tensors and are named with their source: the CUDA context and the
allocator's fragmentation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from probe.errors import UsageError
from probe.training.memory.loss import loss_tables
from probe.training.memory.plan import BLOCK, Architecture, FineTuningPlan
from probe.training.memory.tape import Tape, final_kept, final_tensors, input_kept

COMPONENTS = ("weights", "gradients", "optimizer", "activations", "logits", "temporary")

CUDA_CONTEXT = 512 * 2**20
"""Bytes of a process on a GPU before it has a tensor. 14.56 GiB in use by a process on an RTX 4090, of which torch
allocated 13.86 GiB and had reserved 213 MiB more (its own out-of-memory message, in a public bug report): 0.5 GiB.
Older stacks took more: 1,343 MiB on a V100 (Hugging Face, Model training anatomy)."""
FRAGMENTATION = 0.15
"""Share lost to fragmentation of the memory that is taken and given back within a step. GMLake (arXiv:2401.08156, abstract) removed 15 % of
fragmentation on average (up to 33 %) in fine-tuning eight language models. Model states are allocated once."""
STASH = 5
"""Tensors on their way to the host that are still on the GPU (torchtune.training.OffloadActivations)."""


@dataclass(frozen=True)
class Moment:
    """A moment of the step: what is alive, bytes by component."""

    phase: str
    bytes: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@dataclass
class StepEstimate:
    """The step in time, and what is outside of tensors; every size in bytes."""

    architecture: Architecture
    plan: FineTuningPlan
    n_trained: int
    timeline: list[Moment]
    outside: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> Moment:
        """The highest moment, tensors alone: what a tracker or max_memory_allocated would say."""
        return max(self.timeline, key=lambda moment: moment.total)

    @property
    def total_bytes(self) -> int:
        """What the GPU must have: the peak, CUDA context and fragmentation."""
        return self.peak.total + sum(self.outside.values())

    def measures(self, usable: int | None = None) -> dict[str, Any]:
        """The analyzer `memory`'s measures; `fits` only where a GPU was named."""
        peak = self.peak.bytes
        rows: dict[str, Any] = {f"{component}_bytes": peak[component] for component in COMPONENTS}
        rows["total_bytes"] = self.total_bytes
        return rows if usable is None else rows | {"fits": self.total_bytes <= usable}


def states(arch: Architecture, plan: FineTuningPlan) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer on one GPU, and `layer`, `embedding`: shares of the gradients."""
    weights, trained = _weights(arch, plan)
    size = plan.adapter_size if plan.method != "full" else plan.weight_size
    state_size = 4 if plan.precision == "mixed" and plan.method == "full" else size
    gradients = sum(math.prod(shape) for _, shape in trained) * size
    optimizer = sum(_state_bytes(plan.optimizer, n, shape, state_size, arch) for n, shape in trained)
    if plan.precision == "mixed" and plan.method == "full":
        optimizer += 4 * sum(math.prod(shape) for _, shape in trained)
    casts = 0
    if (
        plan.precision == "autocast"
    ):  # 16-bit copies that torch.autocast makes of the weights it multiplies with
        casts = 2 * sum(math.prod(s) for _, s in arch.block_matrices()) * (plan.method != "qlora")
        weights += casts + 2 * arch.embedding
    n = plan.n_gpus
    return {
        "weights": weights / (n if plan.zero == 3 else 1),
        "gradients": gradients / (n if plan.zero >= 2 else 1),
        "optimizer": optimizer / (n if plan.zero >= 1 else 1),
        "casts": casts / (n if plan.zero == 3 else 1),
        "n_trained": sum(math.prod(shape) for _, shape in trained),
        "largest": max(math.prod(shape) for _, shape in trained),
        "layers": sum(math.prod(s) for name, s in trained if BLOCK.search(name)) * size,
    }


def _weights(arch: Architecture, plan: FineTuningPlan) -> tuple[float, list[tuple[str, tuple[int, ...]]]]:
    """Bytes of all weights, and what is trained of them."""
    size = plan.weight_size
    if plan.method == "full":
        return arch.n_params * size, list(arch.parameters)
    adapters = []
    for name, shape in arch.block_matrices():
        if any(f".{target}." in name for target in plan.targets):
            adapters += [(f"{name}.A", (plan.rank, shape[0])), (f"{name}.B", (shape[1], plan.rank))]
    if not adapters:
        raise UsageError(
            f"--targets {','.join(plan.targets)}: {arch.name} has no such layer; its layers have "
            + ", ".join(dict.fromkeys(n.split(".")[-2] for n, _ in arch.block_matrices()))
        )
    held = arch.n_params * size
    if plan.method == "qlora":
        quantized = sum(math.prod(shape) for _, shape in arch.block_matrices())
        held += quantized * (four_bit_bytes(plan.double_quantization) - size)
    return held + plan.adapter_size * sum(math.prod(shape) for _, shape in adapters), adapters


def four_bit_bytes(double: bool) -> float:
    """Bytes of a parameter in 4 bits with its constants (QLoRA, arXiv:2305.14314, section 3).

    A float32 constant for each block of 64 is 0.5 bits a parameter; quantized to 8 bits with a second constant
    for each 256 of them, 8/64 + 32/(64·256) = 0.127 bits.
    """
    return (4 + (8 / 64 + 32 / (64 * 256) if double else 32 / 64)) / 8


def _state_bytes(optimizer: str, name: str, shape: tuple[int, ...], size: int, arch: Architecture) -> float:
    n = math.prod(shape)
    if optimizer.startswith("paged"):
        return 0.0  # in host memory that the driver moves as needed (QLoRA, section 3, paged optimizers)
    if optimizer == "adamw-8bit" and n >= 4096:  # smaller tensors stay float32 (bitsandbytes, min_8bit_size)
        return 2 * (n + 4 * math.ceil(n / 256))
    if optimizer == "adamw-8bit":
        return 8 * n
    if optimizer == "adafactor":  # a row and a column of variances (arXiv:1804.04235, section 3)
        return size * (shape[0] + shape[1] if len(shape) == 2 else n)
    if optimizer == "sgd":
        return 0.0
    if optimizer in ("sgd-momentum", "lion"):
        return size * n
    if optimizer == "muon" and len(shape) == 2 and max(shape) < 32_000:
        return size * n  # embeddings, heads and vectors are AdamW's (torch.optim.Muon)
    return 2 * size * n


def _step_scratch(plan: FineTuningPlan, arch: Architecture, held: dict[str, float]) -> float:
    """Bytes that the optimizer's step takes beside model states; within the backward pass, for one tensor at once."""
    size = plan.weight_size if plan.precision != "mixed" else 4
    size = size if plan.method == "full" else plan.adapter_size
    largest = held["largest"] * size
    master = 4 * held["largest"] if plan.precision == "mixed" and plan.method == "full" else 0
    if plan.optimizer == "adamw-foreach":
        alone = master or plan.optimizer_in_backward
        return largest + master if alone else held["n_trained"] * size / (plan.n_gpus if plan.zero else 1)
    times = {"adamw-single": 2, "adafactor": 2, "lion": 2}.get(plan.optimizer, 0)
    if plan.optimizer == "muon":
        matrices = [math.prod(s) for _, s in arch.parameters if len(s) == 2 and max(s) < 32_000]
        each = size + 3 * 2 + (4 if master else 0)
        return max(max(matrices, default=0) * each, master)
    return times * largest + master


def estimate(arch: Architecture, plan: FineTuningPlan) -> StepEstimate:
    """The step of `plan` on `arch`. Raises UsageError where the adapters find no layer or the length no positions."""
    if plan.length > arch.n_ctx:
        raise UsageError(f"--length {plan.length}: {arch.name} has {arch.n_ctx} positions")
    if plan.attention == "sdpa" and not arch.sdpa:
        plan = replace(plan, attention="eager")
    if (plan.compile or plan.repeat_kv) and (arch.style is None or arch.kept(plan) is not None):
        raise UsageError(
            f"{arch.name}: --compile and --repeat-kv change layers of Llama, Mistral, Qwen2, SmolLM3, Gemma, GPT-2 and "
            "GPT-NeoX without a window; this model's are counted as they are: leave them out"
        )
    held = states(arch, plan)
    timeline = _Clock(arch, plan, held).timeline()
    step = StepEstimate(arch, plan, int(held["n_trained"]), timeline)
    within = max(sum(m.bytes[c] for c in ("activations", "logits", "temporary")) for m in timeline)
    step.outside = {"cuda_context": CUDA_CONTEXT, "fragmentation": int(FRAGMENTATION * within)}
    step.notes = _notes(arch, plan)
    return step


class _Clock:
    """Walks through a step and notes what is alive."""

    def __init__(self, arch: Architecture, plan: FineTuningPlan, held: dict[str, float]):
        self.arch, self.plan, self.held = arch, plan, held
        self.tape = Tape(arch, plan)
        self.whole = held["gradients"]
        self.share = (held["layers"] / arch.n_layers) * (self.whole / max(1, self._full()))

    def _full(self) -> float:
        return self.held["gradients"] * (self.plan.n_gpus if self.plan.zero >= 2 else 1)

    def _moment(self, phase: str, gradients: float, kept: float, logits: float, scratch: float) -> Moment:
        """`phase` as it is shown; autocast's copies of the weights live until the backward pass has used them."""
        plan = self.plan
        if (
            plan.zero == 3
        ):  # the layer at work is gathered, and the next one fetched ahead (FSDP, section 3.3)
            scratch += 2 * self._unit()
        if plan.accumulation > 1:
            gradients = self.whole
        sizes = {
            "weights": self.held["weights"] + self.arch.buffers - self._casts_gone(phase),
            "gradients": min(gradients, self.whole),
            "optimizer": self.held["optimizer"],
            "activations": kept,
            "logits": logits,
            "temporary": scratch,
        }
        return Moment(phase, {name: int(value) for name, value in sizes.items()})

    def _casts_gone(self, phase: str) -> float:
        """Bytes of autocast's copies that do not exist in `phase`; a checkpointed layer makes its own again."""
        if self.plan.precision != "autocast":
            return 0.0
        layers, n = self.held["casts"], self.arch.n_layers
        whole = layers + 2 * self.arch.embedding
        if phase.startswith(("start", "optimizer", "embedding")):
            return whole
        if phase.startswith("forward, layer"):
            # frozen weights' copies live as long as autograd keeps them: under checkpointing, one layer
            frozen = self.plan.checkpointing and self.plan.method != "full"
            return whole - layers * (1 if frozen else int(phase.split()[-1]) + 1) / n
        if phase.startswith("backward, layer"):
            alive = 1 if self.plan.checkpointing else int(phase.split()[-1]) + 1
            return whole - layers * alive / n
        # autocast remembers its copies of trained weights alone, to the end of the forward pass
        gone = phase != "loss, forward" or self.plan.method != "full"
        return layers if self.plan.checkpointing and gone else 0.0

    def _unit(self) -> float:
        return sum(math.prod(s) for _, s in self.arch.block_matrices()) / self.arch.n_layers * 2

    def timeline(self) -> list[Moment]:
        arch, plan, tape, n = self.arch, self.plan, self.tape, self.arch.n_layers
        ends, loss = input_kept(arch, plan), loss_tables(arch, plan)
        kept = [ends + self._layers_kept(index + 1) for index in range(n)]
        top = (tape.final or final_kept(arch, plan)) + kept[-1]
        if plan.offload:  # the final norm's tensors are the last that went, and push the layers' out
            top = ends + final_kept(arch, plan) + tape.boundary * min(n, STASH - final_tensors(arch))
        moments = [self._moment("start", 0, 0, 0, 0)]
        for index in range(n):
            moments.append(self._moment(f"forward, layer {index}", 0, kept[index], 0, 0))
        head = arch.embedding * plan.weight_size * (plan.method == "full")
        # A fused loss makes the head's gradient in its forward pass.
        early = head if plan.loss == "fused" else 0
        moments.append(self._moment("loss, forward", early, top, loss.forward, 0))
        moments.append(self._moment("loss, backward", early, top, loss.backward, 0))
        moments += [
            self._moment("head, backward", head, top, at.logits, tape.boundary + head * (at.tables - 1))
            for at in loss.head
        ]
        # Stepped in the backward pass, weights leave no gradient behind; a head that is the embedding waits for it.
        stepping = _step_scratch(plan, arch, self.held) if plan.optimizer_in_backward else 0
        gradients = head if arch.tied or not plan.optimizer_in_backward else 0
        at_work = self._largest_gradient() if plan.optimizer_in_backward else self.share
        for index in reversed(range(n)):
            below = ends + (self._layers_kept(index) if not plan.offload else tape.boundary)
            if plan.checkpointing:
                below += tape.beyond + (0 if tape.shares_boundary else tape.boundary)
            sizes = gradients + at_work, below + tape.kept, 0, tape.scratch() + stepping
            moments.append(self._moment(f"backward, layer {index}", *sizes))
            gradients += 0 if plan.optimizer_in_backward else self.share
        # The embedding's gradient comes last. A later batch's gradient is whole before it is added to the earlier ones'.
        tables = loss.beside_embedding * arch.tied + (plan.accumulation > 1)
        last = head if plan.optimizer_in_backward else self.whole
        moments.append(self._moment("embedding, backward", last, ends, 0, max(head * tables, stepping)))
        after = 0 if plan.optimizer_in_backward else self.whole
        moments.append(self._moment("optimizer", after, 0, 0, _step_scratch(plan, arch, self.held)))
        return moments

    def _layers_kept(self, count: int) -> float:
        """Bytes that the first `count` layers keep on the GPU from forward to backward."""
        plan, tape = self.plan, self.tape
        if plan.offload:
            return tape.boundary * min(count, STASH)
        return count * (tape.boundary if plan.checkpointing else tape.kept)

    def _largest_gradient(self) -> float:
        """Bytes of the gradient of the largest matrix that is trained in a layer."""
        plan = self.plan
        if plan.method != "full":
            return plan.adapter_size * self.held["largest"]
        return plan.weight_size * max(math.prod(shape) for _, shape in self.arch.block_matrices())


def _notes(arch: Architecture, plan: FineTuningPlan) -> list[str]:
    notes = []
    if arch.style is None and arch.kept(plan) is None:
        reason = f" ({arch.counted.reason})" if arch.counted else ""
        notes.append(
            f"activations of {arch.name} are counted as those of a Llama layer of its sizes: what its own layers "
            f"keep could not be counted{reason}; take --measure real"
        )
    if plan.attention == "eager" and not arch.sdpa:
        notes.append(f"transformers has no sdpa attention for {arch.name}: counted with eager attention")
    if plan.optimizer.startswith("paged"):
        notes.append(
            "a paged optimizer's state is in host memory and counts 0 here; under pressure it is slow"
        )
    if plan.method == "qlora":
        rest = arch.n_params - sum(math.prod(s) for _, s in arch.block_matrices())
        notes.append(
            f"embeddings, head and norms stay in 16 bits; peft's prepare_model_for_kbit_training makes them "
            f"float32, {2 * rest / 1e9:.2f} GB more"
        )
    if plan.attention == "eager" and plan.length >= 1024:
        notes.append("eager attention keeps every layer's [length, length] pattern: use sdpa or flash")
    return notes


def with_targets(plan: FineTuningPlan, targets: tuple[str, ...]) -> FineTuningPlan:
    """`plan` with the layers to adapt, for LoRA and QLoRA."""
    return plan if plan.method == "full" else replace(plan, targets=plan.targets or targets)
