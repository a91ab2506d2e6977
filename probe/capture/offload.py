"""The end of a sequence: its tensors leave the device, its outcome is handed over, or the reason why it has none."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from probe.capture.passage import Host, Passage, tensors
from probe.capture.sequence import ActiveSequence
from probe.capture.spec import CaptureSpec, NonFinite, Outcome
from probe.model.attention import KVCache
from probe.model.hooked import Model
from probe.prompts import Codec, Span, tool_parts
from probe.prompts.labels import SINK

Ready = Callable[[int, "Outcome | NonFinite"], None]
States = dict[str, dict[int, Tensor]]
"""Recorded state → layer → tensor with rows first."""


class Offload:
    """Sequences of a batch that have ended and whose tensors are on their way to the CPU."""

    def __init__(self, model: Model, codec: Codec, spec: CaptureSpec, host: Host, ready: Ready):
        self.model, self.codec, self.spec, self.host, self._ready = model, codec, spec, host, ready
        self.layers = spec.layer_list(model.facts.n_layers)
        self.poisoned = False
        """Whether a sequence was not finite: a cache that held NaN would poison what is masked."""
        self._waiting: deque[tuple[int, ActiveSequence, States, Outcome, list[torch.cuda.Event]]] = deque()

    def add(self, index: int, sequence: ActiveSequence, cache: KVCache, row: int, recorded: States) -> None:
        """A sequence has ended; `row` is its row of the cache, `recorded` what the recorder kept of it."""
        sequence.controller.close()
        if sequence.finish_reason == "error":
            del sequence.new_ids[-1]
            self._reject(index, sequence, recorded)
            return
        outcome = self._outcome(sequence, cache, row, recorded)
        self._waiting.append((index, sequence, recorded, outcome, self.host.mark()))

    def hand_over(self, wait: bool) -> None:
        """Give away the outcomes whose tensors have arrived on the CPU, in the order they ended."""
        while self._waiting:
            index, sequence, recorded, outcome, events = self._waiting[0]
            if not wait and not all(event.query() for event in events):
                return
            for event in events:
                event.synchronize()
            self._waiting.popleft()
            if all(map(_finite, outcome.tensors.values())):
                self._ready(index, outcome)
            else:
                self._reject(index, sequence, recorded)

    def _outcome(self, sequence: ActiveSequence, cache: KVCache, row: int, recorded: States) -> Outcome:
        prompt = sequence.job.prompt
        ids = prompt.token_ids[: prompt.n_prompt] + sequence.new_ids
        after, parsed = sequence.controller.parse(sequence.new_ids)
        spans = [span for span in prompt.spans if span.end <= prompt.n_prompt] + after
        spans = _without_unrun_label(spans, len(ids) - 1)
        labels = list(dict.fromkeys(span.label for span in spans))
        parts = tool_parts(spans)
        passage = Passage(
            token_ids=ids,
            spans=spans,
            labels=labels,
            recorded_at=sequence.recorded(len(ids) - 1),
            rows=self.spec.positions(spans, sequence.decisions, sequence.first_row, len(ids) - 1),
            n_prefilled=sequence.n_prefilled,
            prompt_labels=prompt.labels,
            span_sums=sequence.span_sums,
            keys={layer: states[row] for layer, states in cache.keys.items()},
            values={layer: states[row] for layer, states in cache.values.items()},
            decisions=sequence.decisions,
            logits=sequence.logits,
            log_probs=sequence.log_probs,
            recorded=recorded,
            part_runs=[[(part.start, part.end) for part in places] for places in parts.values()],
        )
        attending = self.model.facts.attending(self.layers)
        return Outcome(
            token_ids=ids,
            n_prompt=prompt.n_prompt,
            n_new=len(sequence.new_ids),
            finish_reason=sequence.finish_reason or "length",
            completion=self.codec.completion(sequence.new_ids),
            spans=spans,
            span_texts=[self.codec.decode(ids[span.start : span.end]) for span in spans],
            labels=labels if all(s is None for s in self.model.sinks) else [*labels, SINK],
            parts=list(parts),
            layers=self.layers,
            attention_layers=None if attending == self.layers else attending,
            tensors=tensors(self.model, self.spec, self.layers, passage, self.host),
            parsed=parsed,
            candidate_log_probs=[math.fsum(by_token) for by_token in sequence.candidate_log_probs],
            candidate_token_log_probs=sequence.candidate_log_probs,
            opener_log_prob=sequence.opener_log_prob,
            log_probs=list(sequence.log_probs),
            token_characters=self.codec.characters(sequence.new_ids),
        )

    def _reject(self, index: int, sequence: ActiveSequence, recorded: States) -> None:
        """NaN or infinity: say where it began, as far as residual rows were kept."""
        self.poisoned = True
        rows = recorded.get("resid", {})
        error = f"non-finite logits at step {len(sequence.new_ids)}"
        for layer in sorted({*rows, *sequence.span_sums}):
            bad = (~torch.isfinite(rows[layer])).any(-1).tolist() if layer in rows else []
            if any(bad):
                position = sequence.recorded(sequence.length)[bad.index(True)]
                error = f"non-finite resid_post first at layer {layer}, position {position}"
                break
            sums = sequence.span_sums.get(layer)
            if sums is not None and not bool(torch.isfinite(sums).all()):
                error = f"non-finite resid_post first at layer {layer}, in the prompt"
                break
        self._ready(index, NonFinite(error))


def _finite(tensor: Tensor) -> bool:
    """Whether every number is. Its sum says so in a twentieth of the time, unless it overflows by itself."""
    if not tensor.is_floating_point():
        return True
    return math.isfinite(float(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def _without_unrun_label(spans: list[Span], n_run: int) -> list[Span]:
    """The last emitted token is never run: a label that it alone carries has no position to read."""
    run = {span.label for span in spans if span.start < n_run}
    return [span for span in spans if span.label in run]
