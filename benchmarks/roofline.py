"""What this machine could do: arithmetic and bytes counted from shapes, against speeds measured between the rounds.

The bound of a phase is the larger of (floating-point operations / speed of a large matrix product) and
(bytes that must move / speed of streaming memory) (Williams et al. 2009). Only what the task needs is
counted: real tokens, not padding; every prompt in full, shared prefix or not; weights read once a step; the
last prompt position alone unembedded. So a contestant may be compared with it across changes of method.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.table import Figure, Ratio, Section
from benchmarks.timing import now

_STREAM = 1 << 26
"""float32 elements that are streamed: 256 MiB, several times the last-level cache."""
_SIDE = {"cpu": 2048, "cuda": 8192}
_PROBES = 3


@dataclass(frozen=True)
class Work:
    """Operations and bytes of one phase."""

    flops: float
    bytes: float

    def seconds(self, speeds: Speeds) -> float:
        return max(self.flops / speeds.flops, self.bytes / speeds.bytes)


@dataclass(frozen=True)
class Speeds:
    """What this machine does in a second."""

    flops: float
    bytes: float


@dataclass
class Pace:
    """When each forward of one call began; prefill and decode steps are told apart by counting from the end."""

    started: float
    ended: float
    forwards: list[float]

    def split(self, n_new: int) -> tuple[float, float] | None:
        """(seconds up to the first decode step, median seconds of a decode step)."""
        steps = self.forwards[-(n_new - 1) :] if n_new > 2 else []
        if len(steps) < n_new - 1 or len(self.forwards) < n_new:
            return None
        gaps = [after - before for before, after in zip(steps, steps[1:], strict=False)]
        return steps[0] - self.started, statistics.median(gaps)


class Watch:
    """Notes when the first block of a model runs; costs two calls of Python a forward."""

    def __init__(self, block: Any):
        self.block, self._forwards = block, []

    def run(self, contestant: Any) -> tuple[Any, Pace]:
        self._forwards = []
        hook = self.block.register_forward_pre_hook(self._note)
        started = now("cpu")
        try:
            result = contestant()
        finally:
            hook.remove()
        return result, Pace(started, now("cpu"), self._forwards)

    def _note(self, *_: Any) -> None:
        self._forwards.append(now("cpu"))


def machine_speeds(dtype: str, device: str) -> Speeds:
    """The best of three: a square product in `dtype`, and a sum over 256 MiB."""
    kind = "cuda" if device.startswith("cuda") else "cpu"
    side = _SIDE[kind]
    a = torch.randn(side, side, device=device).to(getattr(torch, dtype))
    stream = torch.ones(_STREAM, device=device)
    product, reading = [], []
    with torch.inference_mode():
        for _ in range(_PROBES):
            started = now(device)
            a.matmul(a)
            product.append(now(device) - started)
            started = now(device)
            stream.sum()
            reading.append(now(device) - started)
    return Speeds(2 * side**3 / min(product), 4 * _STREAM / min(reading))


@dataclass(frozen=True)
class Counts:
    """Work of prefill and of the middle decode step, without and with what we capture."""

    prefill: Work
    decode: Work
    decode_captured: Work


def count(hf: Any, facts: Any, lengths: Sequence[int], n_new: int, captured_bytes: int) -> Counts:
    """From shapes: `captured_bytes` is what the whole batch leaves, spread evenly over its decode steps."""
    itemsize, batch = hf.dtype.itemsize, len(lengths)
    head = hf.get_output_embeddings().weight.numel()
    body = _matmul_parameters(hf) - head
    heads = facts.n_layers * facts.n_heads * facts.d_head
    kv_bytes = 2 * facts.n_layers * facts.n_kv_heads * facts.d_head * itemsize
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    prefill = Work(
        2 * body * sum(lengths) + 2 * head * batch + 4 * heads * pairs,
        (body + head) * itemsize + kv_bytes * sum(lengths),
    )
    context = sum(lengths) + batch * n_new // 2
    decode = Work(
        2 * (body + head) * batch + 4 * heads * context,
        (body + head) * itemsize + kv_bytes * (context + batch),
    )
    captured = Work(decode.flops, decode.bytes + captured_bytes / n_new)
    return Counts(prefill, decode, captured)


def _matmul_parameters(hf: Any) -> int:
    """Weights that multiply every token: of linear layers (torch's, and GPT-2's Conv1D), embeddings not."""
    return sum(
        module.weight.numel()
        for module in hf.modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    )


def section(
    counts: Counts, speeds: Sequence[Speeds], paces: dict[str, list[Pace]], n_new: int, ours: str
) -> Section:
    """How many times the roofline each contestant took, round by round with that round's speeds."""
    page_section = Section("roofline", "How far from what the machine could do")
    for name, runs in paces.items():
        step = counts.decode_captured if name == ours else counts.decode
        phases: dict[str, list[float]] = {"prefill": [], "decode step": [], "all": []}
        seconds: dict[str, list[float]] = {"prefill": [], "decode step": []}
        for pace, speed in zip(runs, speeds, strict=False):
            parts = pace.split(n_new)
            first, each = counts.prefill.seconds(speed), step.seconds(speed)
            phases["all"].append((pace.ended - pace.started) / (first + (n_new - 1) * each))
            if parts is not None:
                for phase, took, bound in zip(("prefill", "decode step"), parts, (first, each), strict=True):
                    phases[phase].append(took / bound)
                    seconds[phase].append(took * 1e3)
        page_section.ratios += [
            Ratio(f"{name}: {phase} / roofline", values) for phase, values in phases.items()
        ]
        page_section.figures += [
            Figure(f"{name}: {phase}", took, "ms") for phase, took in seconds.items() if took
        ]
    page_section.figures += [
        Figure("large matrix product", [speed.flops / 1e9 for speed in speeds], "GFLOP/s"),
        Figure("streaming read", [speed.bytes / 1e9 for speed in speeds], "GB/s"),
    ]
    for name, work in (("prefill", counts.prefill), ("decode step, with capture", counts.decode_captured)):
        arithmetic = statistics.median(work.flops / speed.flops for speed in speeds)
        moving = statistics.median(work.bytes / speed.bytes for speed in speeds)
        page_section.notes.append(
            f"{name}: {work.flops / 1e9:.1f} GFLOP ({arithmetic * 1e3:.0f} ms at the product's speed), "
            f"{work.bytes / 1e6:.0f} MB ({moving * 1e3:.0f} ms at the stream's speed); the larger is the bound"
        )
    page_section.notes.append(
        "Prefill of ours includes scoring all candidates and starting the capture; of plain, setting up generate."
    )
    return page_section
