"""Run a batch of prompts and record what is computed anyway: no second forward, no [position, position] pattern.

Prefixes that prompts share come from `prefixes`; one prefill forward runs the rest of all prompts, one packed
forward scores their candidates, and one forward a token serves the whole batch. Hooks keep references to
residual rows, query rows and head outputs (`steps`), the cache keeps keys and values; a sequence that ends leaves the
batch at once and hands over its tensors (`leaving`). Each sequence asks its controller what is forced and when it ends.
Rows are recorded from position n_prompt − 1 on, so that row t emitted step t; which of them are kept, and which before them, the
spec says.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from probe.capture import candidates
from probe.capture.candidates import Tree, log_probs_of
from probe.capture.offload import Offload, Ready
from probe.capture.passage import Host
from probe.capture.prefill import Part, PartResult, prefill
from probe.capture.prefixes import Prefix, Prefixes, labels_of, plan_shared
from probe.capture.sequence import ActiveSequence, generator_of
from probe.capture.sites import needs_of, resid_itemsize, row_bytes
from probe.capture.spec import CaptureSpec, Generation, Job, NonFinite, Outcome
from probe.capture.steps import Steps
from probe.capture.turns import Turns, beside_prompt
from probe.maths.distribution import draw
from probe.model.attention import KVCache, Recorder
from probe.model.hooked import Model
from probe.prompts import Codec


def run_batch(
    model: Model, codec: Codec, jobs: Sequence[Job], spec: CaptureSpec, generation: Generation
) -> list[Outcome | NonFinite]:
    """Run one batch; outcomes in the order of `jobs`.

    A sequence whose numbers are not finite gives a NonFinite in its place; the others are unaffected.
    """
    plan_shared(jobs)
    outcomes: dict[int, Outcome | NonFinite] = {}
    Capturer(model, codec, spec, generation).run(jobs, outcomes.__setitem__)
    return [outcomes[index] for index in range(len(jobs))]


class Capturer:
    """Runs batches with one capture spec; keeps shared prefixes and the cache's memory between them."""

    def __init__(
        self,
        model: Model,
        codec: Codec,
        spec: CaptureSpec,
        generation: Generation,
        prefixes: Prefixes | None = None,
        keep: Collection[str] = (),
    ):
        """`keep`: states (`probe.model.attention.RECORDED`) that are recorded beside what the sites need."""
        self.model, self.codec, self.spec, self.generation = model, codec, spec, generation
        self.layers = spec.layer_list(model.facts.n_layers)
        self.recorder = Recorder(
            layers=frozenset(self.layers), **dict.fromkeys({*needs_of(spec.sites), *keep}, True)
        )
        self.host = Host(model.device)
        # Shared only between capturers that keep span sums alike.
        self.prefixes = prefixes or Prefixes()
        self.prefixes.bytes_of_row = _row_bytes(model, self.recorder)
        self._cache: KVCache | None = None

    def expect(self, batches: Sequence[Sequence[Job]], wanted: Collection[int]) -> list[str]:
        """These batches come, in this order. What is to be done with each, for the outcomes of the `wanted` ones to be to
        the bit what they are where all are run: `run` it, `prefill` it for its prefixes, or `skip` it."""
        for jobs in batches:
            self._unshare(jobs)
        shared = [[] if self.spec.within_prompt else list(jobs) for jobs in batches]
        self.prefixes.expect([job for jobs in shared for job in jobs])
        doing = dict.fromkeys(wanted, "run")
        if len(doing) < len(batches):
            needs = self.prefixes.needs(shared)
            waiting = list(doing)
            while waiting:
                new = needs[waiting.pop()] - doing.keys()
                doing |= dict.fromkeys(new, "prefill")
                waiting += new
        return [doing.get(number, "skip") for number in range(len(batches))]

    def _unshare(self, jobs: Sequence[Job]) -> None:
        """A long sequence may have other keys than a shorter one."""
        for job in jobs:
            if self.model.switched(len(job.prompt.token_ids)):
                job.shared, job.prefix_ends, job.prefix_rows = 0, (), ()

    def run(self, jobs: Sequence[Job], ready: Ready, again: bool = False) -> None:
        """Prefill, score candidates, generate and capture; `ready(index, outcome)` as each sequence ends.

        `job.shared` says how much of a prompt comes from a shared prefix (`plan_shared`); where positions within prompts
        have rows nothing is shared, since a prefix keeps no rows of a prompt. `again`: the jobs were in a batch that failed.
        """
        self._unshare(jobs)
        with self._recording(jobs):
            batch = _Batch(self, jobs, ready, again)
            batch.run()
        self._cache = None if batch.leaving.poisoned else batch.cache

    def _recording(self, jobs: Sequence[Job]):
        return self.model.recording(self.recorder, [edit for job in jobs for edit in job.edits])

    def prefill(self, jobs: Sequence[Job]) -> tuple[list[PartResult], KVCache]:
        """Run the prompts of a batch and what is forced behind them: what each left, and the cache with job j in row j."""
        self._unshare(jobs)
        with self._recording(jobs):
            batch = _Batch(self, jobs, lambda *_: None)
            return batch.fill(), batch.cache

    def skip(self, jobs: Sequence[Job]) -> None:
        """Pass over a batch of those that were expected."""
        self.prefixes.skip([] if self.spec.within_prompt else jobs)

    def cache(self, batch: int, capacity: int) -> KVCache:
        """The cache of the last batch, begun again."""
        if self._cache is None:
            return KVCache(batch, capacity)
        cache, self._cache = self._cache, None
        cache.restart(batch, capacity)
        return cache


def _row_bytes(model: Model, recorder: Recorder) -> int:
    """Bytes of what is recorded of one position, and of its final state."""
    itemsize = model.dtype.itemsize
    final = model.facts.d_model * resid_itemsize(model.facts, itemsize)
    return final + row_bytes(model.facts, itemsize, sorted(recorder.layers), recorder.wanted)


class _Batch:
    def __init__(self, capturer: Capturer, jobs: Sequence[Job], ready: Ready, again: bool = False):
        self.capturer = capturer
        self.model, self.codec, self.spec = capturer.model, capturer.codec, capturer.spec
        self.generation, self.recorder = capturer.generation, capturer.recorder
        limit, seed = self.generation.max_new_tokens, self.generation.seed
        self.sequences = [
            ActiveSequence(
                job,
                job.controller.begin(job.prompt, self.codec, limit),
                generator_of(seed, job),
                self.spec.within_prompt,
                self.spec.before_completion(job.prompt),
            )
            for job in jobs
        ]
        self.trees = [Tree(s.job.prompt.candidates if s.controller.at_prompt else ()) for s in self.sequences]
        self.lengths = [sequence.n_prefilled for sequence in self.sequences]
        ends = [
            job.prompt.n_prompt + job.most_new(limit) + sequence.controller.side_slots
            for job, sequence in zip(jobs, self.sequences, strict=True)
        ]
        # Packed candidates lie behind their prompt for a while.
        ends += [start + tree.n_nodes for start, tree in zip(self.lengths, self.trees, strict=True)]
        shared = [] if self.spec.within_prompt else [sequence.job for sequence in self.sequences]
        self.prefix_of, self.new_prefixes = capturer.prefixes.find(shared, again)
        self.cache = capturer.cache(len(jobs) + len(self.new_prefixes), max(ends))
        self.turns = Turns(self.model, self.codec, self.recorder)
        self.steps = Steps()
        self.leaving = Offload(self.model, self.codec, self.spec, capturer.host, ready)

    def run(self) -> None:
        logits = self._prefill()
        self._score()
        active = self._emit(list(range(len(self.sequences))), logits)
        while active:
            logits = self._step(active)
            self.leaving.hand_over(wait=False)
            active = self._emit(active, logits)
        self.leaving.hand_over(wait=True)

    # -- prefill -------------------------------------------------------------------------------------------

    def fill(self) -> list[PartResult]:
        """Run all prompts (and forced reasoning); keep the prefixes, and return what the prompts left."""
        parts = self._parts()
        results = prefill(self.model, self.recorder, self.cache, parts)
        n_new = len(self.new_prefixes)
        for prefix, part, result in zip(self.new_prefixes, parts, results[:n_new], strict=False):
            self.capturer.prefixes.keep(prefix, self.cache, part.row, result)
        for prefix, part, result in zip(self.prefix_of, parts[n_new:], results[n_new:], strict=False):
            if prefix is not None and prefix.entry is not None and prefix.entry.rows is not None:
                prefix.entry.rows.lead(result, part.first_row, part.first_hidden)
        return results[n_new:]

    def _prefill(self) -> Tensor:
        """Run all prompts; returns the next-token logits [sequence, d_vocab]."""
        self.prefilled = self.fill()
        for index, (sequence, result) in enumerate(zip(self.sequences, self.prefilled, strict=True)):
            sequence.span_sums = result.span_sums
            prefix = self.prefix_of[index] if self.prefix_of else None
            if prefix is not None and prefix.entry is not None and result.span_sums:
                labels = labels_of(sequence.job.prompt.spans, len(prefix.spans))
                columns = torch.tensor(
                    [sequence.job.prompt.labels.index(label) for label in labels], dtype=torch.long
                )
                # A product, since several spans have a label, and adding at repeated places has no fixed order on a GPU.
                members = torch.nn.functional.one_hot(columns, len(sequence.job.prompt.labels)).T
                for layer, sums in prefix.entry.span_sums.items():
                    sequence.span_sums[layer] += members.to(sums) @ sums
        return self._prompt_logits([torch.cat(result.hidden) for result in self.prefilled])

    def _parts(self) -> list[Part]:
        """What is to be run: the prefixes that nobody ran yet, each behind what it continues, then the prompts."""
        spans_wanted = "span_sums" in needs_of(self.spec.sites)
        places = {id(prefix): number for number, prefix in enumerate(self.new_prefixes)}
        parts = []

        def start(prefix: Prefix | None, row: int) -> int | None:
            """The part that a row continues; a prefix that is held is put into the row."""
            if prefix is None or prefix.entry is None:
                return None if prefix is None else places[id(prefix)]
            self.cache.put(row, prefix.entry.memory)
            return None

        for number, prefix in enumerate(self.new_prefixes):
            row, first = len(self.sequences) + number, prefix.first
            spans = prefix.spans if spans_wanted else ()
            after = start(prefix.below, row)
            parts.append(Part(row, prefix.ids, prefix.start, first, first, prefix.labels, spans, (), after))
        for row, sequence in enumerate(self.sequences):
            prompt = sequence.job.prompt
            parts.append(
                Part(
                    row,
                    prompt.token_ids,
                    sequence.shared,
                    sequence.first_row,
                    prompt.n_prompt - 1 - prompt.n_opener,
                    prompt.labels,
                    prompt.spans if spans_wanted else (),
                    sequence.job.edits,
                    start(self.prefix_of[row] if self.prefix_of else None, row),
                    self.trees[row] if prompt.n_prompt == sequence.n_prefilled else None,
                    rows_before=sequence.rows_before,
                )
            )
        return parts

    def _prompt_logits(self, hidden: list[Tensor]) -> Tensor:
        """Next-token logits; log-probabilities of forced tokens and opener are noted on the way.

        `hidden` by sequence: [position, d_model] from the one before the opener on.
        """
        unembed = self.model.unembed
        last = unembed(torch.stack([states[-1] for states in hidden]))
        rows, targets, sequences = [], [], []
        for index, (sequence, states) in enumerate(zip(self.sequences, hidden, strict=True)):
            prompt = sequence.job.prompt
            slot, first = prompt.n_prompt - 1, prompt.n_prompt - prompt.n_opener
            forced = slot < sequence.n_prefilled - 1
            sequence.controller.see_all(states[prompt.n_opener :])
            if sequence.controller.at_prompt:
                sequence.decide(slot, unembed(states[prompt.n_opener]) if forced else last[index])
            for position in sequence.controller.decided:
                sequence.decide(position, unembed(states[position + 1 - first]))
            rows.append(states[:-1])
            targets += [[token] for token in prompt.token_ids[first:]]
            sequences += [index] * (len(states) - 1)
        if not targets:
            return last
        wanted = any(sequence.controller.most_probable is not None for sequence in self.sequences)
        best: list[int] | None = [] if wanted else None
        scored = log_probs_of(torch.cat(rows), targets, unembed, best)
        by_sequence: dict[int, list[float]] = {}
        for index, (log_prob,) in zip(sequences, scored, strict=True):
            by_sequence.setdefault(index, []).append(log_prob)
        for index, token in zip(sequences, best or (), strict=False):
            if (noted := self.sequences[index].controller.most_probable) is not None:
                noted.append(token)
        for index, log_probs in by_sequence.items():
            sequence, prompt = self.sequences[index], self.sequences[index].job.prompt
            if prompt.n_opener:
                sequence.opener_log_prob = sum(log_probs[: prompt.n_opener])
                if sequence.controller.most_probable is not None:
                    del sequence.controller.most_probable[: prompt.n_opener]
            sequence.new_ids += prompt.token_ids[prompt.n_prompt :]
            sequence.log_probs += log_probs[prompt.n_opener :]
        return last

    # -- candidates ------------------------------------------------------------------------------------------

    def _score(self) -> None:
        """Log-probability of every candidate of every prompt, from the states that prefill left."""
        waiting = [sequence for sequence in self.sequences if sequence.controller.at_prompt]
        slots = [sequence.logits[0] for sequence in waiting]
        trees = [tree for tree, s in zip(self.trees, self.sequences, strict=True) if s.controller.at_prompt]
        self._run_beside()
        nodes = [part.nodes for part in self.prefilled if part.nodes is not None]
        scored = candidates.read(trees, slots, torch.cat(nodes) if nodes else None, self.model.unembed)
        for sequence, log_probs in zip(waiting, scored, strict=True):
            sequence.candidate_log_probs = log_probs

    def _run_beside(self) -> None:
        """Run the candidates of prompts behind which tokens were forced: their part of the prefill ended behind these."""
        behind = [
            row
            for row, (sequence, tree) in enumerate(zip(self.sequences, self.trees, strict=True))
            if tree.n_nodes and sequence.n_prompt < sequence.n_prefilled
        ]
        if not behind:
            return
        pieces = [beside_prompt(row, self.sequences[row], self.trees[row]) for row in behind]
        self.recorder.begin(torch.zeros(0, dtype=torch.long))
        hidden = self.model.forward(pieces, self.cache)[0][0]
        for row, nodes in zip(behind, hidden.split([len(each.tokens) for each in pieces]), strict=True):
            self.prefilled[row].nodes = nodes

    # -- generation ------------------------------------------------------------------------------------------

    def _emit(self, active: list[int], logits: Tensor) -> list[int]:
        """Choose and append one token for each active sequence; finished ones leave the batch."""
        self._choose(active, logits)
        speaking = active
        while ended := [i for i in speaking if self.sequences[i].controller.paused]:
            speaking, logits = self._end_turns(active, ended)
            self._choose(speaking, logits)
        gone = [row for row, index in enumerate(active) if self.sequences[index].finish_reason]
        if not gone:
            return active
        self.steps.close()
        for row in gone:
            index = active[row]
            recorded = self.steps.rows(index, self.prefilled[index])
            self.leaving.add(index, self.sequences[index], self.cache, row, recorded)
        self.leaving.hand_over(wait=False)
        return self._compact(active, gone)

    def _end_turns(self, active: list[int], ended: list[int]) -> tuple[list[int], Tensor]:
        """Score the turns that ended and give results back: who speaks again, and with which logits."""
        self.steps.close()
        sequences = [self.sequences[index] for index in ended]
        given = self.turns.end(sequences, [active.index(index) for index in ended], self.cache)
        speaking, hidden = [], []
        for index, resumed in zip(ended, given, strict=True):
            if resumed is not None:
                self.steps.give(index, resumed.ran)
                speaking.append(index)
                hidden.append(resumed.hidden)
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
                self._emit_token(self.sequences[index], logits[row], best[row])
            else:
                self.sequences[index].fail()
        emitted = [self.sequences[index].new_ids[-1] for index in active]
        log_probs = (logits[torch.arange(len(active)), emitted] - norms).tolist()
        for index, log_prob in zip(active, log_probs, strict=True):
            self.sequences[index].log_probs.append(log_prob)

    def _emit_token(self, sequence: ActiveSequence, logits: Tensor, best: int) -> None:
        g, controller = self.generation, sequence.controller
        if controller.most_probable is not None:
            controller.most_probable.append(best)
        if controller.queue:
            token = controller.queue.pop(0)
        else:
            token = best
            if g.temperature:
                token = draw(
                    logits, temperature=g.temperature, p=g.top_p, k=g.top_k, generator=sequence.generator
                )
            if cue := controller.cue(sequence.new_ids, token):
                token, controller.queue = cue[0], cue[1:]
            elif controller.decides(sequence.new_ids, token):
                sequence.decide(sequence.length - 1, logits)
        sequence.new_ids.append(token)
        sequence.finish_reason = controller.stop(sequence.new_ids)

    def _step(self, active: list[int]) -> Tensor:
        """One decode forward for the active sequences; returns logits [sequence, d_vocab]."""
        tokens = [self.sequences[index].new_ids[-1] for index in active]
        positions = [self.sequences[index].length - 1 for index in active]
        self.recorder.begin()
        edits = [self.sequences[index].job.edits for index in active]
        hidden, _ = self.model.step(tokens, self.cache, positions, self.recorder, edits if any(edits) else ())
        self.steps.add(active, self.recorder)
        for row, index in enumerate(active):
            self.sequences[index].controller.see(hidden[row, 0])
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
