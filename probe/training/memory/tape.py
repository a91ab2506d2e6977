"""What a training step keeps for its backward pass, node by node: the activation model.

A tape lists the operations of one layer in forward order; each keeps bytes until its own backward has run, which
makes a gradient for the one before. Read off the tensors that autograd saves in transformers' layers (eager and
scaled_dot_product_attention; unique storages, weights excluded), so norms keep their input in float32 and linear
layers their input only where a weight or an adapter on it is trained. Korthikanti et al. (arXiv:2205.05198,
section 4.1) count the same for a GPT block with dropout: s·b·h·(34 + 5·a·s/h) bytes in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probe.training.memory.plan import Architecture, FineTuningPlan


@dataclass(frozen=True)
class Node:
    """One operation: bytes kept for its backward, bytes of the gradient that makes, and of scratch beside it."""

    name: str
    kept: float
    out: float
    scratch: float = 0.0
    weights: float = 0.0
    """Bytes of weight gradients made here."""


class Tape:
    """The operations of one layer for `plan`, in forward order, in `nodes`."""

    def __init__(self, arch: Architecture, plan: FineTuningPlan):
        self.arch, self.plan = arch, plan
        self.sizes = plan.sizes
        self.tokens = plan.batch * plan.length
        self.nodes: list[Node] = []
        {"gpt2": self._gpt2, "neox": self._neox}.get(arch.style or "", self._llama)()
        self.final: float | None = None
        self.beyond = 0.0
        """Bytes that the largest layer keeps more than a layer in the mean."""
        self._counted: float | None = None
        if (counted := arch.kept(plan)) is not None:
            self.nodes.insert(0, Node("beside a Llama layer", counted.layer - self.kept, 0.0))
            self.final = counted.outside - input_kept(arch, plan) - 4 * self.tokens * arch.d_vocab
            self.beyond = counted.largest - counted.layer
            self._counted = counted.scratch if arch.style is None else None

    @property
    def kept(self) -> float:
        """Bytes that one layer keeps from forward to backward."""
        return sum(node.kept for node in self.nodes)

    @property
    def boundary(self) -> float:
        """Bytes of a layer's input, all that gradient checkpointing keeps of it."""
        return self.tokens * self.arch.d_model * self.sizes.residual

    @property
    def shares_boundary(self) -> bool:
        """Whether the first norm keeps the layer's input itself; a 16-bit RMSNorm keeps a float32 copy."""
        return self.sizes.residual == 4 or self.plan.compile or self.arch.style in ("gpt2", "neox")

    def scratch(self) -> float:
        """Most bytes alive beside what this layer and its weights' gradients take while it runs backward."""
        if self._counted is not None:
            return self._counted
        weights = sum(node.weights for node in self.nodes)
        return max(0.0, self._backward_peak() - self.kept - weights)

    def _backward_peak(self) -> float:
        alive, weights, chain, peak = self.kept, 0.0, 0.0, 0.0
        for node in reversed(self.nodes):
            weights += node.weights
            peak = max(peak, alive + weights + self.boundary + chain + node.out + node.scratch)
            alive -= node.kept
            chain = node.out
        return peak

    def _add(self, name: str, kept: float, out: float, scratch: float = 0.0, weights: float = 0.0) -> None:
        self.nodes.append(Node(name, kept, out, scratch, weights))

    def _llama(self) -> None:
        arch, m = self.arch, self.arch.d_mlp
        heads, kv = arch.n_heads * arch.d_head, arch.n_kv_heads * arch.d_head
        col = self.tokens * self.sizes.linear
        self._rms_norm("norm_1")
        self._linear(arch.d_model, {"q_proj": heads, "k_proj": kv, "v_proj": kv})
        self._attention()
        self._linear(heads, {"o_proj": arch.d_model}, already=self.plan.attention != "eager")
        self._rms_norm("norm_2")
        self._linear(arch.d_model, {"gate_proj": m, "up_proj": m})
        self._add("activation", col * m, col * m, col * m)  # beside the gradient of the other factor
        # Its factors; torch.compile computes the activated one again from its input.
        self._add("product", (1 if self.plan.compile else 2) * col * m, 2 * col * m)
        self._linear(m, {"down_proj": arch.d_model})

    def _gpt2(self) -> None:
        d, m = self.arch.d_model, self.arch.d_mlp
        col = self.tokens * self.sizes.linear
        self._layer_norm("norm_1", shared=False)
        self._linear(d, {"c_attn": 3 * d})
        self._attention()
        self._linear(d, {"attn.c_proj": d}, already=self.plan.attention != "eager")
        self._layer_norm("norm_2", shared=False)
        self._linear(d, {"c_fc": m})
        # gelu_new is written in Python: x reaches it by two ways
        self._add("activation", (1 if self.plan.compile else 4) * col * m, col * m, col * m)
        self._linear(m, {"mlp.c_proj": d})

    def _neox(self) -> None:
        d, m = self.arch.d_model, self.arch.d_mlp
        col = self.tokens * self.sizes.linear
        self._layer_norm("norm_1", shared=False)
        self._linear(d, {"query_key_value": 3 * d})
        self._attention()
        self._linear(d, {"dense": d})
        self._layer_norm("norm_2", shared=True)
        self._linear(d, {"dense_h_to_4h": m})
        self._add("activation", col * m, col * m)
        self._linear(m, {"dense_4h_to_h": d})

    def _rms_norm(self, name: str) -> None:
        """Input in float32, its inverse norm, and, for the weight's gradient, the normed input.

        Compiled, the input as it is and the inverse norm: the rest is computed again.
        """
        d = self.arch.d_model
        if self.plan.compile:
            self._add(name, self.boundary + 4 * self.tokens, self.boundary, self.tokens * 4 * d)
            return
        normed = 4 if self.arch.style == "gemma" else self.sizes.residual
        kept = 4 * d + 4 + (normed * d if self.plan.method == "full" else 0)
        self._add(name, self.tokens * kept, self.boundary, self.tokens * 8 * d)

    def _layer_norm(self, name: str, *, shared: bool) -> None:
        rows = 2 * self.sizes.residual * self.tokens
        self._add(name, rows + (0 if shared else self.boundary), self.boundary)

    def _linear(self, n_in: int, outs: dict[str, int], *, already: bool = False) -> None:
        """Linear layers on one input; `already`: attention keeps that input as its own output."""
        plan, sizes = self.plan, self.sizes
        adapted = [name for name in outs if plan.method != "full" and name in plan.targets]
        trained = plan.method == "full"
        copies = (
            len(outs) if plan.precision == "autocast" and n_in == self.arch.d_model and not already else 1
        )
        if plan.precision == "autocast" and self.arch.style in ("gpt2", "neox"):
            copies = 1
        kept = self.tokens * n_in * sizes.linear * copies if trained and not already else 0.0
        # Adapters in float32 read their own copy of the input; of the base's type they share the input itself.
        size = 2 if plan.precision == "autocast" else plan.adapter_size
        shared = sizes.linear == size and plan.precision != "autocast"
        if adapted:
            times = (0 if already else 1) if shared else len(adapted)
            if plan.adapter_dropout:  # what is left, and a byte of mask for each number
                times = len(adapted) * (1 + 1 / size)
            kept += self.tokens * size * (n_in * times + plan.rank * len(adapted))
        weights = n_in * sum(outs.values()) * sizes.gradient if trained else 0
        weights += sum(plan.adapter_size * plan.rank * (n_in + outs[name]) for name in adapted)
        scratch = self.tokens * n_in * sizes.linear * (len(outs) > 1)
        if adapted:
            scratch += self.tokens * size * max(n_in, max(outs.values()))
        if plan.method == "qlora":
            # the weight in 16 bits, for the base's backward; the adapter's runs before or after it
            scratch = max(scratch, sizes.linear * n_in * max(outs.values()))
        self._add("+".join(outs), kept, self.tokens * n_in * sizes.linear, scratch, weights)

    def _attention(self) -> None:
        arch, col = self.arch, self.tokens * self.sizes.linear
        heads, kv = arch.n_heads * arch.d_head, arch.n_kv_heads * arch.d_head
        kv = heads if self.plan.repeat_kv else kv
        gradient = col * (heads + 2 * kv)
        fused = arch.style in ("gpt2", "neox")
        if self.plan.attention == "eager":
            pairs = self.tokens * self.plan.length * arch.n_heads
            upcast = 0 if arch.style == "gpt2" and self.plan.precision != "autocast" else 4
            if self.sizes.linear == 4:
                upcast = 0
            self._add("query·key", col * 2 * heads, gradient)
            self._add("softmax", pairs * (upcast or self.sizes.linear), pairs * (upcast or self.sizes.linear))
            self._add(
                "pattern·value",
                col * heads + (pairs * self.sizes.linear if upcast else 0),
                pairs * max(upcast, self.sizes.linear),
                pairs * (self.sizes.linear if upcast else 0),
            )
            return
        log_sums = 4 * self.tokens * arch.n_heads
        states = {"gpt2": 3 * heads, "neox": 5 * heads}.get(arch.style or "", heads + 2 * kv)
        self._add("attention", col * (states + heads) + log_sums, gradient, col * heads if fused else 0)


def input_kept(arch: Architecture, plan: FineTuningPlan) -> float:
    """Bytes kept outside of the layers to the end of the backward pass: token ids, labels, rotary tables."""
    rotary = 0 if arch.style == "gpt2" else 2 * plan.length * arch.d_head * plan.sizes.residual
    masked = (
        plan.attention == "eager" and plan.checkpointing
    )  # held as an argument of every layer's recomputation
    mask = plan.batch * plan.length**2 * plan.sizes.residual if masked else 0
    # Adapters make the embedding's output require a gradient: a leaf, which the graph holds.
    copied = arch.style == "gpt2" or (arch.style in ("llama", "gemma") and plan.sizes.residual == 2)
    leaf = plan.batch * plan.length * arch.d_model * plan.sizes.residual * (plan.method != "full" and copied)
    return 2 * 8 * plan.batch * plan.length + rotary + mask + leaf


def final_tensors(arch: Architecture) -> int:
    """Tensors that the final norm saves: input and inverse norm for two products, and what is normed; or three."""
    return 3 if arch.style in ("gpt2", "neox") else 5


def final_kept(arch: Architecture, plan: FineTuningPlan) -> float:
    """Bytes kept by the final norm and the head, which are the first to be given back."""
    tokens, d, sizes = plan.batch * plan.length, arch.d_model, plan.sizes
    if arch.style in ("gpt2", "neox"):
        norm = tokens * sizes.residual * (d + 2)
    else:
        normed = 4 if arch.style == "gemma" else sizes.residual
        norm = tokens * (4 * d + 4 + (normed * d if plan.method == "full" else 0))
    head = tokens * d * sizes.linear if plan.method == "full" else 0
    return norm + head
