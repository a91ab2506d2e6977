"""The tensors that one finished passage leaves, named and laid out as `SITES` say.

Computed from what the forward passes recorded and from the cached keys and values: nothing is run again, and
no [position, position] pattern is made. Attention to spans takes many layers in one product, because a layer
of a small model is too little work for its overhead.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from probe.capture.sites import ALWAYS, SITES, needs_of
from probe.capture.spec import CaptureSpec
from probe.maths import reads
from probe.model.hooked import Model
from probe.prompts import Span

PATTERN_ELEMENTS = 1 << 22
"""Elements of one block of pattern rows: 16 MiB in float32, a few of which live at a time."""
_ROWS = 128
"""Rows of a block at most: keys behind its last row are left out, half of all in a long completion, and its pattern stays near
the processor."""


@dataclass
class Passage:
    """A finished sequence: its tokens, its spans and what was recorded of it, still on the device."""

    token_ids: list[int]
    spans: list[Span]
    labels: list[str]
    recorded_at: list[int]
    """Positions whose states were recorded, ascending; all from the last of the prompt on are among them."""
    rows: list[int]
    """Those of them that are kept, ascending."""
    n_prefilled: int
    """Positions that the prefill ran; span sums cover them."""
    prompt_labels: list[str]
    span_sums: dict[int, Tensor]
    """layer → [prompt label, d_model]"""
    keys: dict[int, Tensor]
    """layer → [kv_head, position, d_head], at least up to the last position that was run"""
    values: dict[int, Tensor]
    recorded: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    """state → layer → [row, …]: `resid` [row, d_model], `queries` and `z` [row, head, d_head]"""
    decisions: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    part_runs: list[list[tuple[int, int]]] = field(default_factory=list)
    """Of each part of each tool the half-open ranges of its positions."""

    @property
    def n_run(self) -> int:
        """Positions that were run: all but the last token."""
        return len(self.token_ids) - 1

    def indices(self, positions: Tensor) -> Tensor:
        """Where the states of these positions lie among those that were recorded."""
        return torch.searchsorted(torch.tensor(self.recorded_at), positions)

    def kept(self, states: Tensor) -> Tensor:
        """Of recorded states [row, …] those that are kept."""
        if self.rows == self.recorded_at:
            return states
        return states[self.indices(torch.tensor(self.rows)).to(states.device)]


class Host:
    """Where captured tensors go. From a GPU they leave without waiting, into pinned memory."""

    def __init__(self, device: torch.device):
        self._far = device.type == "cuda"

    def stack(self, parts: Sequence[Tensor]) -> Tensor:
        """One CPU tensor [part, …]; from a GPU it is whole only when a later `mark` has passed."""
        if not self._far:
            return torch.stack([part.cpu() for part in parts])
        out = torch.empty((len(parts), *parts[0].shape), dtype=parts[0].dtype, pin_memory=True)
        for index, part in enumerate(parts):
            out[index].copy_(part, non_blocking=True)
        return out

    def mark(self) -> list[torch.cuda.Event]:
        """Events after which everything handed over so far has arrived; empty on a CPU."""
        events = []
        for number in range(torch.cuda.device_count() if self._far else 0):
            with torch.cuda.device(number):
                events.append(torch.cuda.Event())
                events[-1].record()
        return events


def tensors(
    model: Model, spec: CaptureSpec, layers: list[int], passage: Passage, host: Host
) -> dict[str, Tensor]:
    """Every tensor that `spec` asks for, named and laid out as `SITES` say."""
    reading = _Read(model, layers, passage, host, needs_of(spec.sites))
    sites = [site for site in SITES.values() if site.name in spec.sites]
    parts, alike = len(passage.part_runs), model.facts.alike(layers)
    attending = len(model.facts.attending(layers))
    wanted = [*ALWAYS, *(site for site in sites if site.exists(parts, alike, attending))]
    out = {site.name: site.read(reading).contiguous() for site in wanted}
    for name, tensor in out.items():
        if tensor.numel() == 0:
            raise RuntimeError(f"capture of {name} is empty; this is a bug in probe")
    return out


@dataclass
class _Read:
    """What `probe.capture.sites.Reading` promises, of one passage."""

    model: Model
    layers: list[int]
    passage: Passage
    host: Host
    needs: frozenset[str] = frozenset({"read_norms", "part_norms"})
    """What else will be read: norms cost more than mass."""

    @property
    def token_ids(self) -> Tensor:
        return torch.tensor(self.passage.token_ids)

    @property
    def rows(self) -> Tensor:
        return torch.tensor(self.passage.rows)

    @property
    def decisions(self) -> Tensor:
        return torch.tensor(self.passage.decisions)

    @property
    def _attending(self) -> list[int]:
        return self.model.facts.attending(self.layers)

    def by_row(self, state: str) -> Tensor:
        states = self.passage.recorded[state]
        return self.host.stack([self.passage.kept(states[layer]) for layer in self.layers])

    def by_head(self, state: str) -> Tensor:
        states = self.passage.recorded[state]
        return self.host.stack(
            [self.passage.kept(states[layer]).transpose(0, 1) for layer in self._attending]
        )

    def cached(self, what: str) -> Tensor:
        states, n_run = getattr(self.passage, what), self.passage.n_run
        return self.host.stack([states[layer][:, :n_run] for layer in self._attending])

    @property
    def span_means(self) -> Tensor:
        return self.host.stack(_span_means(self.passage, self.layers, self.model.dtype))

    @property
    def attention_mass(self) -> Tensor:
        return self.host.stack(self._span_reads[0])

    @property
    def read_norms(self) -> Tensor:
        return self.host.stack(self._span_reads[1])

    @property
    def part_mass(self) -> Tensor:
        return self.host.stack(self._part_reads[0])

    @property
    def part_norms(self) -> Tensor:
        return self.host.stack(self._part_reads[1])

    @cached_property
    def _span_reads(self) -> tuple[list[Tensor], list[Tensor]]:
        passage, n_run = self.passage, self.passage.n_run
        runs = [
            [(span.start, min(span.end, n_run)) for span in passage.spans if span.label == label]
            for label in passage.labels
        ]
        norms = "read_norms" in self.needs
        return _reads(self.model, self._attending, passage, runs, torch.tensor(passage.rows), norms=norms)

    @cached_property
    def _part_reads(self) -> tuple[list[Tensor], list[Tensor]]:
        passage = self.passage
        runs, positions = passage.part_runs, torch.tensor(passage.decisions)
        norms = "part_norms" in self.needs
        reads = _reads(self.model, self._attending, passage, runs, positions, norms=norms)
        # Without the column of a learned sink, which is no part.
        mass, norm = ([by_layer[..., : len(runs)] for by_layer in read] for read in reads)
        return mass, norm

    @property
    def logits(self) -> Tensor:
        return self.host.stack([logits.float() for logits in self.passage.logits])

    @property
    def log_probs(self) -> Tensor:
        return torch.tensor(self.passage.log_probs, dtype=torch.float32)


def _span_means(passage: Passage, layers: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Mean residual over each label's positions that were run, [span, d_model], a tensor a layer."""
    labels, start, n_run = passage.labels, passage.n_prefilled, passage.n_run
    after = torch.zeros(len(labels), n_run - start)
    counts = torch.zeros(len(labels))
    for span in passage.spans:
        column = labels.index(span.label)
        counts[column] += max(0, min(span.end, n_run) - span.start)
        after[column, max(span.start - start, 0) : max(min(span.end, n_run) - start, 0)] = 1
    # A label of the prompt may have lost its positions (forced steps that were never run).
    behind = bisect_left(passage.recorded_at, start)
    pairs = [(labels.index(label), i) for i, label in enumerate(passage.prompt_labels) if label in labels]
    columns, sources = zip(*pairs, strict=True)
    means = []
    for layer in layers:
        sums = passage.span_sums[layer]
        total = after.to(sums.device) @ passage.recorded["resid"][layer][behind:].float()
        total[list(columns)] += sums[list(sources)]
        means.append((total / counts.to(sums.device)[:, None]).to(dtype))
    return means


def _reads(
    model: Model,
    layers: list[int],
    passage: Passage,
    runs: list[list[tuple[int, int]]],
    positions: Tensor,
    *,
    norms: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """Attention mass and read norm [head, row, span] of the rows at `positions`, float32, a tensor a layer.

    `runs[s]` are the half-open ranges of positions of span s; a learned sink is a column behind them.
    """
    n_run, n_heads, places = passage.n_run, model.facts.n_heads, passage.indices(positions)
    sunk = any(sink is not None for sink in model.sinks)
    masses: list[Tensor] = []
    read_norms: list[Tensor] = []
    for chunk in _alike(model, layers, passage, PATTERN_ELEMENTS // (n_heads * n_run * len(positions))):
        keys = torch.cat([passage.keys[layer][:, :n_run] for layer in chunk])
        values = torch.cat([passage.values[layer][:, :n_run] for layer in chunk]) if norms else None
        factor = torch.cat([model.write_norms[layer] for layer in chunk]).to(keys.device) if norms else None
        gated = norms and model.facts.layers[chunk[0]].gated
        # R v_j before the sum: one product a key instead of one a row and span; behind it where these are fewer.
        if values is not None and factor is not None and not gated and len(positions) * len(runs) >= n_run:
            values, factor = reads.values_written(values, factor), None
        sinks = [model.sinks[layer] for layer in chunk]
        sink = None if sinks[0] is None else torch.cat([s for s in sinks if s is not None])
        parts = []
        block = min(_ROWS, max(1, PATTERN_ELEMENTS // (len(chunk) * n_heads * n_run)))
        for start in range(0, len(positions), block):
            at, index = positions[start : start + block], places[start : start + block]
            low, high = int(index[0]), int(index[-1]) + 1
            rows = slice(low, high) if high - low == len(at) else index
            # Layers become heads of one layer: each keeps its own keys, since heads are grouped in order.
            queries = torch.cat([passage.recorded["queries"][layer][rows].transpose(0, 1) for layer in chunk])
            n_keys = int(at.max()) + 1
            run_values = None if values is None else values[:, :n_keys]
            alpha = reads.pattern(queries, keys[:, :n_keys], at, model.facts.attention_of(chunk[0]), sink)
            gates = [passage.recorded["gate"][layer][rows].transpose(0, 1) for layer in chunk if gated]
            gate = torch.cat(gates) if gates else None
            mass, norm = reads.read_by_span(alpha, run_values, runs, factor, at, gate)
            if sunk:
                left = 1 - alpha.sum(-1, keepdim=True)
                mass = torch.cat([mass, left if sink is not None else torch.zeros_like(left)], -1)
                norm = None if norm is None else torch.cat([norm, torch.zeros_like(norm[..., :1])], -1)
            parts.append((mass, mass if norm is None else norm))
        masses += torch.cat([mass for mass, _ in parts], 1).split(n_heads)
        read_norms += torch.cat([norm for _, norm in parts], 1).split(n_heads)
    return masses, read_norms


def _alike(model: Model, layers: list[int], passage: Passage, most: int) -> Iterator[list[int]]:
    """Runs of at most `most` layers that turn queries and keys into a pattern in the same way."""
    chunk: list[int] = []
    for layer in layers:
        if chunk and (len(chunk) >= most or _way(model, layer, passage) != _way(model, chunk[0], passage)):
            yield chunk
            chunk = []
        chunk.append(layer)
    yield chunk


def _way(model: Model, layer: int, passage: Passage) -> tuple:
    keys, values = passage.keys[layer], passage.values[layer]
    shape = keys.shape[0], keys.shape[2], values.shape[2], model.facts.layers[layer].gated
    return model.facts.attention[layer], model.sinks[layer] is None, keys.device, shape
