"""Run a batch of prompts and record what is computed anyway: no second forward, no [position, position] pattern.

Prefixes that prompts share come from `prefixes`; one prefill forward runs the rest of all prompts, one packed
forward scores their candidates, and one forward a token serves the whole batch. Hooks keep references to
residual rows, query rows and reads, the cache keeps keys and values; a sequence that ends leaves the batch at
once and hands over its tensors (`passage`). `rows` are query positions n_prompt − 1 … n_prompt + n_new − 2:
row t emitted step t.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from probe.capture import candidates
from probe.capture.candidates import Tree, log_probs_of
from probe.capture.passage import Host, Passage, tensors
from probe.capture.prefill import Part, Ran, prefill
from probe.capture.prefixes import Prefix, Prefixes, plan_shared
from probe.capture.spec import CaptureSpec, Generation, Job, NonFinite, Outcome
from probe.capture.turns import Talk, Turns
from probe.maths.distribution import draw
from probe.model.attention import KVCache, Recorder
from probe.model.hooked import Model
from probe.prompts import Codec, Span, label_completion
from probe.prompts.labels import SINK

Ready = Callable[[int, "Outcome | NonFinite"], None]


@dataclass
class _Strand:
    """A sequence in flight."""

    job: Job
    generator: torch.Generator
    shared: int
    """Leading tokens that came from a shared prefix."""
    new_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    queue: list[int] = field(default_factory=list)
    decisions: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    span_sums: dict[int, Tensor] = field(default_factory=dict)
    answer_at: int | None = None
    answer_forced: bool = False
    finish_reason: str | None = None
    candidate_log_probs: list[list[float]] = field(default_factory=list)
    opener_log_prob: float | None = None
    talk: Talk | None = None
    """Of an agent: its turns."""

    @property
    def n_prefilled(self) -> int:
        return len(self.job.prompt.token_ids)

    @property
    def n_prompt(self) -> int:
        return self.job.prompt.n_prompt

    @property
    def length(self) -> int:
        """Tokens so far, the prompt included."""
        return self.job.prompt.n_prompt + len(self.new_ids)

    @property
    def turn_over(self) -> bool:
        return self.talk is not None and self.talk.over is not None

    def decide(self, position: int, logits: Tensor) -> None:
        self.decisions.append(position)
        self.logits.append(logits)


def run_batch(
    model: Model, codec: Codec, jobs: Sequence[Job], spec: CaptureSpec, generation: Generation
) -> list[Outcome | NonFinite]:
    """Run one batch; outcomes in the order of `jobs`.

    A sequence whose numbers are not finite gives a NonFinite in its place; the others are unaffected.
    """
    plan_shared(jobs)
    found: dict[int, Outcome | NonFinite] = {}
    Capturer(model, codec, spec, generation).run(jobs, found.__setitem__)
    return [found[index] for index in range(len(jobs))]


class Capturer:
    """Runs batches with one capture spec; keeps shared prefixes and the cache's memory between them."""

    def __init__(
        self,
        model: Model,
        codec: Codec,
        spec: CaptureSpec,
        generation: Generation,
        prefixes: Prefixes | None = None,
    ):
        self.model, self.codec, self.spec, self.generation = model, codec, spec, generation
        self.layers = spec.layer_list(model.facts.n_layers)
        needs_reads = bool(spec.sites & {"attn_to_spans", "value_to_spans"})
        self.recorder = Recorder(
            resid=bool(spec.sites & {"resid_post", "resid_span_mean"}),
            queries=needs_reads or "queries" in spec.sites,
            z="z" in spec.sites,
            layers=frozenset(self.layers),
        )
        self.host = Host(model.device)
        # Shared only between capturers that keep span sums alike.
        self.prefixes = prefixes or Prefixes()
        self._cache: KVCache | None = None

    def run(self, jobs: Sequence[Job], ready: Ready) -> None:
        """Prefill, score candidates, generate and capture; `ready(index, outcome)` as each sequence ends.

        `job.shared` says how much of a prompt comes from a shared prefix (`plan_shared`); with every position
        captured nothing is shared, since a prefix keeps no rows.
        """
        with self.model.recording(self.recorder):
            batch = _Batch(self, jobs, ready)
            batch.run()
        # A cache that held NaN would poison what is masked.
        self._cache = None if batch.poisoned else batch.cache

    def cache(self, batch: int, capacity: int) -> KVCache:
        """The cache of the last batch, begun again."""
        if self._cache is None:
            return KVCache(batch, capacity)
        cache, self._cache = self._cache, None
        cache.restart(batch, capacity)
        return cache


class _Batch:
    def __init__(self, capturer: Capturer, jobs: Sequence[Job], ready: Ready):
        self.capturer, self.ready = capturer, ready
        self.model, self.codec, self.spec = capturer.model, capturer.codec, capturer.spec
        self.generation, self.recorder = capturer.generation, capturer.recorder
        self.strands = [
            _Strand(job, _generator(self.generation.seed, job), 0 if self.spec.all_rows else job.shared)
            for job in jobs
        ]
        for strand in self.strands:
            if strand.job.converse is not None:
                talking = strand.job.converse()
                strand.talk = Talk(talking, strand.job.prompt, self.codec, strand.job.max_turns)
                strand.talk.forced = strand.job.must_call
                strand.queue = list(strand.talk.opener) if strand.job.must_call else []
        # An agent's candidates are scored where its turns have led.
        self.trees = [Tree(() if job.converse else job.prompt.candidates) for job in jobs]
        self.lengths = [strand.n_prefilled for strand in self.strands]
        ends = [job.prompt.n_prompt + job.most_new(self.generation.max_new_tokens) for job in jobs]
        # Packed candidates lie behind their prompt for a while.
        ends += [start + tree.n_nodes for start, tree in zip(self.lengths, self.trees, strict=True)]
        ends += [end + s.talk.nodes for end, s in zip(ends, self.strands, strict=False) if s.talk]
        shared = [] if self.spec.all_rows else [strand.job for strand in self.strands]
        self.prefix_of, self.new_prefixes = capturer.prefixes.find(shared)
        self.cache = capturer.cache(len(jobs) + len(self.new_prefixes), max(ends))
        self.turns = Turns(self.model, self.codec, self.recorder, self.generation.max_new_tokens)
        self.steps: list[_Segment | _Given] = []
        self.poisoned = False
        self._leaving: deque[tuple[int, Outcome, list[torch.cuda.Event]]] = deque()

    def run(self) -> None:
        logits = self._prefill()
        self._score()
        active = self._emit(list(range(len(self.strands))), logits)
        while active:
            logits = self._step(active)
            self._hand_over(wait=False)
            active = self._emit(active, logits)
        self._hand_over(wait=True)

    # -- prefill -------------------------------------------------------------------------------------------

    def _prefill(self) -> Tensor:
        """Run all prompts (and forced reasoning); returns the next-token logits [sequence, d_vocab]."""
        self.first_rows = [
            0 if self.spec.all_rows else strand.job.prompt.n_prompt - 1 for strand in self.strands
        ]
        parts = self._parts()
        ran = prefill(self.model, self.recorder, self.cache, parts)
        n_new = len(self.new_prefixes)
        for prefix, part, own in zip(self.new_prefixes, parts, ran[:n_new], strict=False):
            self.capturer.prefixes.keep(prefix, self.cache, part.row, own.span_sums)
        self.prefilled = ran[n_new:]
        for index, (strand, own) in enumerate(zip(self.strands, self.prefilled, strict=True)):
            strand.span_sums = own.span_sums
            prefix = self.prefix_of[index] if self.prefix_of else None
            if prefix is not None and prefix.entry is not None and own.span_sums:
                for layer, sums in prefix.entry.span_sums.items():  # its labels are the first of the prompt
                    strand.span_sums[layer][: len(sums)] += sums
        return self._prompt_logits([torch.cat(ran.hidden) for ran in self.prefilled])

    def _parts(self) -> list[Part]:
        """What is to be run: the prefixes that nobody ran yet, each behind what it continues, then the prompts."""
        spans_wanted = "resid_span_mean" in self.spec.sites
        places = {id(prefix): number for number, prefix in enumerate(self.new_prefixes)}
        parts = []

        def start(prefix: Prefix | None, row: int) -> int | None:
            """The part that a row continues; a prefix that is held is put into the row."""
            if prefix is None or prefix.entry is None:
                return None if prefix is None else places[id(prefix)]
            for layer in prefix.entry.keys:
                self.cache.fill(layer, row, prefix.entry.keys[layer], prefix.entry.values[layer])
            return None

        for number, prefix in enumerate(self.new_prefixes):
            row, end = len(self.strands) + number, len(prefix.ids)
            spans = prefix.spans if spans_wanted else ()
            after = start(prefix.below, row)
            parts.append(Part(row, prefix.ids, prefix.start, end, end, prefix.labels, spans, (), after))
        for row, strand in enumerate(self.strands):
            prompt = strand.job.prompt
            parts.append(
                Part(
                    row,
                    prompt.token_ids,
                    strand.shared,
                    self.first_rows[row],
                    prompt.n_prompt - 1 - prompt.n_opener,
                    prompt.labels,
                    prompt.spans if spans_wanted else (),
                    strand.job.edits,
                    start(self.prefix_of[row] if self.prefix_of else None, row),
                    self.trees[row],
                )
            )
        return parts

    def _prompt_logits(self, hidden: list[Tensor]) -> Tensor:
        """Next-token logits; log-probabilities of forced tokens and opener are noted on the way.

        `hidden` by sequence: [position, d_model] from the one before the opener on.
        """
        unembed = self.model.unembed
        last = unembed(torch.stack([own[-1] for own in hidden]))
        rows, targets, sequences = [], [], []
        for index, (strand, own) in enumerate(zip(self.strands, hidden, strict=True)):
            prompt = strand.job.prompt
            slot, first = prompt.n_prompt - 1, prompt.n_prompt - prompt.n_opener
            forced = slot < strand.n_prefilled - 1
            if strand.talk is not None:
                strand.talk.begin(0, own[-1])
            else:
                strand.decide(slot, unembed(own[prompt.n_opener]) if forced else last[index])
            rows.append(own[:-1])
            targets += [[token] for token in prompt.token_ids[first:]]
            sequences += [index] * (len(own) - 1)
        if not targets:
            return last
        found = log_probs_of(torch.cat(rows), targets, unembed)
        by_strand: dict[int, list[float]] = {}
        for index, (log_prob,) in zip(sequences, found, strict=True):
            by_strand.setdefault(index, []).append(log_prob)
        for index, log_probs in by_strand.items():
            strand, prompt = self.strands[index], self.strands[index].job.prompt
            if prompt.n_opener:
                strand.opener_log_prob = sum(log_probs[: prompt.n_opener])
            strand.new_ids += prompt.token_ids[prompt.n_prompt :]
            strand.log_probs += log_probs[prompt.n_opener :]
        return last

    # -- candidates ------------------------------------------------------------------------------------------

    def _score(self) -> None:
        """Log-probability of every candidate of every prompt, from the states that prefill left."""
        waiting = [strand for strand in self.strands if strand.talk is None]
        slots = [strand.logits[0] for strand in waiting]
        trees = [tree for tree, s in zip(self.trees, self.strands, strict=True) if s.talk is None]
        nodes = [own.nodes for own in self.prefilled if own.nodes is not None]
        scored = candidates.read(trees, slots, torch.cat(nodes) if nodes else None, self.model.unembed)
        for strand, log_probs in zip(waiting, scored, strict=True):
            strand.candidate_log_probs = log_probs

    # -- generation ------------------------------------------------------------------------------------------

    def _emit(self, active: list[int], logits: Tensor) -> list[int]:
        """Choose and append one token for each active sequence; finished ones leave the batch."""
        self._choose(active, logits)
        speaking = active
        while ended := [i for i in speaking if self.strands[i].turn_over]:
            speaking, logits = self._end_turns(active, ended)
            self._choose(speaking, logits)
        gone = [row for row, index in enumerate(active) if self.strands[index].finish_reason]
        if not gone:
            return active
        if self.steps:
            self.steps[-1].close()
        for row in gone:
            self._finish(active[row], row)
        self._hand_over(wait=False)
        return self._compact(active, gone)

    def _end_turns(self, active: list[int], ended: list[int]) -> tuple[list[int], Tensor]:
        """Score the turns that ended and give results back: who speaks again, and with which logits."""
        if self.steps:
            self.steps[-1].close()
        strands = [self.strands[index] for index in ended]
        given = self.turns.end(strands, [active.index(index) for index in ended], self.cache)
        speaking, hidden = [], []
        for index, strand, ran in zip(ended, strands, given, strict=True):
            assert strand.talk is not None
            if not all(map(math.isfinite, strand.talk.turns[-1].log_probs)):
                strand.finish_reason = "error"
                strand.new_ids.append(0)
            elif ran is None:
                over, by = strand.talk.over, strand.talk.ended_by
                strand.finish_reason = over if by == "answer" else "stop" if by == "max_turns" else "length"
            else:
                self.steps.append(_Given((index,), ran))
                speaking.append(index)
                hidden.append(strand.talk.hidden[0])
        return speaking, self.model.unembed(torch.stack(hidden)) if hidden else torch.zeros(0, 1)

    def _choose(self, active: list[int], logits: Tensor) -> None:
        """Choose and append one token for each of these sequences."""
        if not active:
            return
        finite = torch.isfinite(logits).all(-1).tolist()
        best = logits.argmax(-1).tolist()
        norms = logits.logsumexp(-1)
        for row, index in enumerate(active):
            if finite[row]:
                self._emit_one(self.strands[index], logits[row], best[row])
            else:
                self.strands[index].finish_reason = "error"
                self.strands[index].new_ids.append(0)
        emitted = [self.strands[index].new_ids[-1] for index in active]
        log_probs = (logits[torch.arange(len(active)), emitted] - norms).tolist()
        for index, log_prob in zip(active, log_probs, strict=True):
            self.strands[index].log_probs.append(log_prob)

    def _emit_one(self, strand: _Strand, logits: Tensor, best: int) -> None:
        g, job = self.generation, strand.job
        from_queue = bool(strand.queue)
        if from_queue:
            token = strand.queue.pop(0)
        else:
            token = best
            if g.temperature:
                token = draw(
                    logits, temperature=g.temperature, p=g.top_p, k=g.top_k, generator=strand.generator
                )
            cued = self._cue(strand, token)
            token, from_queue = (token, False) if cued is None else (cued, True)
        if job.announces is not None and strand.answer_at is None and not from_queue:
            solid = any(character.isalnum() for character in self.codec.decode([token]))
            if solid and job.announces(self.codec.decode(strand.new_ids)):
                strand.answer_at = len(strand.new_ids)
                strand.decide(strand.length - 1, logits)
        strand.new_ids.append(token)
        if strand.talk is not None:
            strand.talk.see(strand.new_ids, job.most_new(g.max_new_tokens))
        else:
            strand.finish_reason = self._finish_reason(strand, token)

    def _cue(self, strand: _Strand, token: int) -> int | None:
        """When a reasoning would end without an answer, the first token of the forced cue in its place."""
        job = strand.job
        if job.answer_cue is None or strand.answer_forced or strand.answer_at is not None:
            return None
        out_of_budget = len(strand.new_ids) >= self.generation.max_new_tokens
        if token not in job.prompt.stop_ids and not out_of_budget:
            return None
        text = self.codec.decode(strand.new_ids)
        if job.announces is not None and job.announces(text):
            return None
        strand.answer_forced = True
        strand.queue = self.codec.encode(
            job.answer_cue if text.endswith("\n") or not text else "\n" + job.answer_cue
        )
        return strand.queue.pop(0)

    def _finish_reason(self, strand: _Strand, token: int) -> str | None:
        job, n_new = strand.job, len(strand.new_ids)
        if token in job.prompt.stop_ids and not strand.queue:
            return "eos"
        if job.finished is not None and job.finished(self.codec.decode(strand.new_ids)):
            return "stop"
        if strand.answer_at is not None:
            if "\n" in self.codec.decode(strand.new_ids[strand.answer_at :]):
                return "stop"
            if n_new - strand.answer_at >= job.answer_tokens:
                return "length"
        # The token emitted last is run next, at position length − 1, which the model must have.
        full = strand.length > self.model.facts.n_ctx
        return "length" if full or n_new >= job.most_new(self.generation.max_new_tokens) else None

    def _step(self, active: list[int]) -> Tensor:
        """One decode forward for the active sequences; returns logits [sequence, d_vocab]."""
        tokens = [self.strands[index].new_ids[-1] for index in active]
        positions = [self.strands[index].length - 1 for index in active]
        self.recorder.begin()
        edits = [self.strands[index].job.edits for index in active]
        hidden, _ = self.model.step(tokens, self.cache, positions, self.recorder, edits if any(edits) else ())
        if not self.steps or self.steps[-1].active != active:
            self.steps.append(_Segment(list(active)))
        self.steps[-1].add(self.recorder)
        for row, index in enumerate(active):
            if (talk := self.strands[index].talk) is not None:
                talk.hidden.append(hidden[row, 0])
        return self.model.unembed(hidden[:, 0])

    def _compact(self, active: list[int], gone: list[int]) -> list[int]:
        """Drop finished rows: the last rows of the cache move into their places."""
        active = list(active)
        for row in sorted(gone, reverse=True):
            last = len(active) - 1
            if row != last:
                self.cache.move(last, row)
                active[row] = active[last]
            active.pop()
        return active

    # -- what a finished sequence leaves -----------------------------------------------------------------------

    def _finish(self, index: int, row: int) -> None:
        strand, prompt = self.strands[index], self.strands[index].job.prompt
        if strand.finish_reason == "error":
            del strand.new_ids[-1]
            self._reject(index)
            return
        talk = strand.talk
        if talk is not None:
            talk.conversation.close()
        ids = prompt.token_ids[: prompt.n_prompt] + strand.new_ids
        after, found = label_completion(
            prompt,
            self.codec,
            strand.new_ids,
            cot=strand.job.announces is not None,
            answer_at=strand.answer_at,
        )
        after = after if talk is None else talk.spans(len(ids))
        spans = [span for span in prompt.spans if span.end <= prompt.n_prompt] + after
        spans = _without_unrun_label(spans, len(ids) - 1)
        labels = list(dict.fromkeys(span.label for span in spans))
        passage = Passage(
            token_ids=ids,
            spans=spans,
            labels=labels,
            first_row=self.first_rows[index],
            n_prefilled=strand.n_prefilled,
            prompt_labels=prompt.labels,
            span_sums=strand.span_sums,
            keys={layer: states[row] for layer, states in self.cache.keys.items()},
            values={layer: states[row] for layer, states in self.cache.values.items()},
            decisions=strand.decisions,
            logits=strand.logits,
            log_probs=strand.log_probs,
            **self._rows_of(index),
        )
        outcome = Outcome(
            token_ids=ids,
            n_prompt=prompt.n_prompt,
            n_new=len(strand.new_ids),
            finish_reason=strand.finish_reason or "length",
            completion=self.codec.completion(strand.new_ids),
            spans=spans,
            span_texts=[self.codec.decode(ids[span.start : span.end]) for span in spans],
            labels=labels if all(s is None for s in self.model.sinks) else [*labels, SINK],
            layers=self.capturer.layers,
            tensors=tensors(self.model, self.spec, self.capturer.layers, passage, self.capturer.host),
            found=found,
            candidate_log_probs=[math.fsum(by_token) for by_token in strand.candidate_log_probs],
            candidate_token_log_probs=strand.candidate_log_probs,
            opener_log_prob=strand.opener_log_prob,
            answer_forced=strand.answer_forced,
            turns=[] if talk is None else talk.turns,
            ended_by=None if talk is None else talk.ended_by,
        )
        self._leaving.append((index, outcome, self.capturer.host.mark()))

    def _hand_over(self, wait: bool) -> None:
        """Give away the outcomes whose tensors have arrived on the CPU, in the order they ended."""
        while self._leaving:
            index, outcome, events = self._leaving[0]
            if not wait and not all(event.query() for event in events):
                return
            for event in events:
                event.synchronize()
            self._leaving.popleft()
            floats = (tensor for tensor in outcome.tensors.values() if tensor.is_floating_point())
            if all(bool(torch.isfinite(tensor).all()) for tensor in floats):
                self.ready(index, outcome)
            else:
                self._reject(index)

    def _reject(self, index: int) -> None:
        """NaN or infinity: say where it began, as far as residual rows were kept."""
        self.poisoned = True
        if (talk := self.strands[index].talk) is not None:
            talk.conversation.close()
        strand, rows = self.strands[index], self._rows_of(index)["resid"]
        error = f"non-finite logits at step {len(strand.new_ids)}"
        for layer in sorted({*rows, *strand.span_sums}):
            bad = (~torch.isfinite(rows[layer])).any(-1).tolist() if layer in rows else []
            if any(bad):
                position = bad.index(True) + self.first_rows[index]
                error = f"non-finite resid_post first at layer {layer}, position {position}"
                break
            sums = strand.span_sums.get(layer)
            if sums is not None and not bool(torch.isfinite(sums).all()):
                error = f"non-finite resid_post first at layer {layer}, in the prompt"
                break
        self.ready(index, NonFinite(error))

    def _rows_of(self, index: int) -> dict[str, dict[int, Tensor]]:
        """Residual rows, query rows and reads of one sequence: site → layer → tensor with rows first."""
        segments = [segment for segment in self.steps if index in segment.active]
        return {
            site: {
                layer: torch.cat([*states, *(segment.of(site, layer, index) for segment in segments)])
                for layer, states in getattr(self.prefilled[index], site).items()
            }
            for site in ("resid", "queries", "z")
        }


class _Segment:
    """Consecutive decode steps with the same active sequences; stacked once when the set changes."""

    def __init__(self, active: list[int]):
        self.active = active
        self._steps: list[tuple[dict, dict, dict]] = []
        self._stacked: dict[tuple[str, int], Tensor] = {}

    def add(self, recorder: Recorder) -> None:
        self._steps.append((recorder.resid, recorder.queries, recorder.z))

    def close(self) -> None:
        """Stack what was collected: site, layer → [step, sequence, …]."""
        if not self._steps:
            return
        for position, site in enumerate(("resid", "queries", "z")):
            for layer in self._steps[0][position]:
                states = torch.stack([step[position][layer] for step in self._steps])
                # resid [step, sequence, 1, d_model]; queries and z [step, sequence, head, 1, d_head]
                states = states[:, :, 0] if site == "resid" else states[:, :, :, 0]
                old = self._stacked.get((site, layer))
                self._stacked[site, layer] = states if old is None else torch.cat([old, states])
        self._steps = []

    def of(self, site: str, layer: int, index: int) -> Tensor:
        return self._stacked[site, layer][:, self.active.index(index)]


class _Given:
    """A result that was run on top of a sequence: the rows it left, read as those of a segment are."""

    def __init__(self, active: tuple[int], ran: Ran):
        self.active, self._ran = active, ran

    def add(self, recorder: Recorder) -> None:
        raise TypeError("steps of a sequence never continue a result")

    def close(self) -> None: ...

    def of(self, site: str, layer: int, _index: int) -> Tensor:
        return torch.cat(getattr(self._ran, site)[layer])


def _without_unrun_label(spans: list[Span], n_run: int) -> list[Span]:
    """The last emitted token is never run: a label that it alone carries has no position to read."""
    run = {span.label for span in spans if span.start < n_run}
    return [span for span in spans if span.label in run]


def _generator(seed: int, job: Job) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}\n{job.task_id}\n{job.prompt.passage}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
