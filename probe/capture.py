"""Run a batch of prompts and capture what is computed anyway: no second forward, no [position, position] pattern.

One prefill forward and one forward a generated token serve the whole batch; hooks keep references to residual
rows, query rows and reads, the cache keeps keys and values. When a sequence ends, its attention to spans is
computed from its query rows and cached keys (`probe.reads`), the rows of all its steps at once.

Axes as in the contract of the run directory: layer, head, kv_head, row, position, span, d_model, d_head,
decision, step. `rows` are query positions n_prompt − 1 … n_prompt + n_new − 2: row t emitted step t.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from probe import reads
from probe.distribution import draw
from probe.errors import ProbeError, UsageError
from probe.model.attention import KVCache, Recorder
from probe.model.hooked import Model
from probe.prompts import Candidate, Codec, Prompt, Span, label_completion

SITES = (
    "resid_post",
    "resid_span_mean",
    "keys",
    "values",
    "queries",
    "z",
    "attn_to_spans",
    "value_to_spans",
    "logits",
    "log_probs",
)
_MEMORY = frozenset({"keys", "values", "queries", "z"})
AXES = {
    "token_ids": ("position",),
    "rows": ("row",),
    "decisions": ("decision",),
    "resid_post": ("layer", "row", "d_model"),
    "resid_span_mean": ("layer", "span", "d_model"),
    "keys": ("layer", "kv_head", "position", "d_head"),
    "values": ("layer", "kv_head", "position", "d_head"),
    "queries": ("layer", "head", "row", "d_head"),
    "z": ("layer", "head", "row", "d_head"),
    "attn_to_spans": ("layer", "head", "row", "span"),
    "value_to_spans": ("layer", "head", "row", "span"),
    "logits": ("decision", "d_vocab"),
    "log_probs": ("step",),
}
_PATTERN_ELEMENTS = 1 << 24
_UNEMBED_ROWS = 64
_SHARED_PREFIX = 32
ANSWER_TOKENS = 24
CUE_TOKENS = 8
"""At most what the forced answer cue takes; it is that many bytes for a byte-level tokenizer."""


class NonFinite(ProbeError):
    """NaN or infinity in what the model computed; the message names the layer and position."""


@dataclass(frozen=True)
class CaptureSpec:
    """Which sites are kept, of which layers (None: all), for generated rows or for every position."""

    sites: frozenset[str]
    layers: tuple[int, ...] | None = None
    all_rows: bool = False

    @classmethod
    def parse(cls, text: str | None, layers: str | None, kind: str, n_layers: int) -> CaptureSpec:
        """`--capture` and `--layers`: site names, `default`, `all`, `none`, `SITE:all`; `0,4-7,-1`."""
        default = frozenset(SITES) - (frozenset() if kind in ("cot", "agent") else _MEMORY)
        chosen: set[str] = set()
        every = False
        for word in (text or "default").split(","):
            name, _, rows = word.strip().partition(":")
            if rows not in ("", "all"):
                raise UsageError(f"--capture {word}: after the colon only `all` (every position) is known")
            every |= rows == "all"
            if name == "default":
                chosen |= default
            elif name == "all":
                chosen |= set(SITES)
            elif name in SITES:
                chosen.add(name)
            elif name != "none":
                raise UsageError(
                    f"--capture {name}: unknown site; known are {', '.join(SITES)}, default, all, none"
                )
        return cls(frozenset(chosen), _parse_layers(layers, n_layers), every)

    def layer_list(self, n_layers: int) -> list[int]:
        return list(range(n_layers)) if self.layers is None else list(self.layers)


def _parse_layers(text: str | None, n_layers: int) -> tuple[int, ...] | None:
    if not text or text == "all":
        return None
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = (
            part.strip().rpartition("-") if part.strip().rfind("-") > 0 else ("", "", part.strip())
        )
        try:
            low, high = (int(first), int(last)) if dash else (int(last), int(last))
        except ValueError:
            raise UsageError(f"--layers {text}: write numbers and ranges such as 0,4-7,-1") from None
        low, high = (
            low % n_layers if -n_layers <= low < 0 else low,
            high % n_layers if -n_layers <= high < 0 else high,
        )
        if not 0 <= low <= high < n_layers:
            raise UsageError(f"--layers {text}: the model has layers 0 to {n_layers - 1}")
        chosen.update(range(low, high + 1))
    return tuple(sorted(chosen))


@dataclass(frozen=True)
class Generation:
    """How tokens are chosen. Temperature 0 is greedy; a draw depends on (seed, task id, passage) alone."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0


@dataclass
class Job:
    """One passage to run. `finished` sees the tokens so far and may end the sequence by itself."""

    prompt: Prompt
    task_id: str
    kind: str
    finished: Callable[[str], bool] | None = None
    answer_cue: str | None = None
    """For cot: the text that is forced when the model stops reasoning without announcing an answer."""
    answer_tokens: int = 0
    """For cot: how many tokens the answer may take, on top of max_new_tokens."""
    announces: Callable[[str], bool] | None = None

    def most_new(self, max_new_tokens: int) -> int:
        """Bound of the tokens after the prompt: forced, generated, and for cot the cue and the answer."""
        forced = len(self.prompt.token_ids) - self.prompt.n_prompt
        return forced + max_new_tokens + (self.answer_tokens + CUE_TOKENS if self.answer_tokens else 0)


@dataclass
class Outcome:
    """What one passage gave. Tensors are on the CPU, named and laid out as in `AXES`."""

    token_ids: list[int]
    n_prompt: int
    n_new: int
    finish_reason: str
    completion: str
    spans: list[Span]
    span_texts: list[str]
    """What the tokens of each span decode to."""
    labels: list[str]
    layers: list[int]
    tensors: dict[str, Tensor]
    found: dict[str, Any] = field(default_factory=dict)
    candidate_log_probs: list[float] = field(default_factory=list)
    opener_log_prob: float | None = None
    answer_forced: bool = False


@dataclass
class _Strand:
    """A sequence in flight."""

    job: Job
    generator: torch.Generator
    new_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    queue: list[int] = field(default_factory=list)
    decisions: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    answer_at: int | None = None
    answer_forced: bool = False
    finish_reason: str | None = None
    candidate_log_probs: list[float] = field(default_factory=list)
    opener_log_prob: float | None = None

    @property
    def length(self) -> int:
        """Tokens so far, the prompt included."""
        return self.job.prompt.n_prompt + len(self.new_ids)


def run_batch(
    model: Model, codec: Codec, jobs: Sequence[Job], spec: CaptureSpec, generation: Generation
) -> list[Outcome | NonFinite]:
    """Prefill, score candidates, generate and capture a batch; outcomes in the order of `jobs`.

    A sequence whose numbers are not finite gives a NonFinite in its place; the others are unaffected.
    """
    return _Batch(model, codec, jobs, spec, generation).run()


class _Batch:
    def __init__(
        self, model: Model, codec: Codec, jobs: Sequence[Job], spec: CaptureSpec, generation: Generation
    ):
        self.model, self.codec, self.spec, self.generation = model, codec, spec, generation
        self.strands = [_Strand(job, _generator(generation.seed, job)) for job in jobs]
        n_layers = model.facts.n_layers
        self.layers = spec.layer_list(n_layers)
        needs_reads = bool(spec.sites & {"attn_to_spans", "value_to_spans"})
        self.recorder = Recorder(
            resid=bool(spec.sites & {"resid_post", "resid_span_mean"}),
            queries=needs_reads or "queries" in spec.sites,
            z="z" in spec.sites,
            layers=frozenset(self.layers),
        )
        lengths = [len(job.prompt.token_ids) for job in jobs]
        ends = [job.prompt.n_prompt + job.most_new(generation.max_new_tokens) for job in jobs]
        # Packed candidates are padded to the largest tree of the batch, behind each prompt.
        packed = max(lengths) + max(map(_packed_size, jobs))
        self.cache = KVCache(len(jobs), max(packed, *ends))
        self.lengths = lengths
        self.steps: list[_Segment] = []
        self.results: dict[int, Outcome | NonFinite] = {}

    def run(self) -> list[Outcome | NonFinite]:
        with self.model.recording(self.recorder):
            logits = self._prefill()
            self._score()
            active = list(range(len(self.strands)))
            active = self._emit(active, logits)
            while active:
                logits = self._step(active)
                active = self._emit(active, logits)
        return [self.results[index] for index in range(len(self.strands))]

    # -- prefill -------------------------------------------------------------------------------------------

    def _prefill(self) -> Tensor:
        """Run all prompts (and forced reasoning); returns the next-token logits [sequence, d_vocab]."""
        width = max(self.lengths)
        tokens = torch.zeros(len(self.strands), width, dtype=torch.long)
        for index, strand in enumerate(self.strands):
            ids = strand.job.prompt.token_ids
            tokens[index, : len(ids)] = torch.tensor(ids)
        self.prompt_labels = [strand.job.prompt.labels for strand in self.strands]
        spans = self._membership(width) if "resid_span_mean" in self.spec.sites else None
        self.first_rows = [0 if self.spec.all_rows else s.job.prompt.n_prompt - 1 for s in self.strands]
        rows = _ranges(self.first_rows, self.lengths)
        shared = self._shared_prefix()
        prefix_sums: dict[int, Tensor] = {}
        if shared:
            self.recorder.begin(rows[:1, :1] * 0, None if spans is None else spans[:, :, :shared])
            self.model.forward(tokens[:1, :shared], self.cache, 0, recorder=self.recorder)
            prefix_sums = self.recorder.span_sums
            self.cache.broadcast_first(shared)
        self.recorder.begin(rows - shared, None if spans is None else spans[:, :, shared:])
        hidden, _ = self.model.forward(tokens[:, shared:], self.cache, shared, recorder=self.recorder)
        self.prefill = _Kept(self.recorder)
        self.span_sums = {
            layer: sums + prefix_sums[layer] if layer in prefix_sums else sums
            for layer, sums in self.recorder.span_sums.items()
        }
        return self._prompt_logits(hidden, shared)

    def _membership(self, width: int) -> Tensor:
        """0/1 membership [sequence, label, position] of the prompt's positions in its labels."""
        member = torch.zeros(len(self.strands), max(map(len, self.prompt_labels)), width)
        for index, strand in enumerate(self.strands):
            for span in strand.job.prompt.spans:
                member[index, self.prompt_labels[index].index(span.label), span.start : span.end] = 1
        return member

    def _shared_prefix(self) -> int:
        """Length of the token prefix that all prompts share and that can be run once; 0 if not worth it."""
        if len(self.strands) < 2 or self.spec.all_rows:
            return 0
        prompts = [strand.job.prompt for strand in self.strands]
        # The rows that are read (slot, opener, forced steps) stay outside of the shared part.
        limit = min(p.n_prompt - 1 - max(p.n_opener, 1) for p in prompts)
        first, common = prompts[0].token_ids, 0
        while common < limit and all(p.token_ids[common] == first[common] for p in prompts):
            common += 1
        return common if common >= _SHARED_PREFIX else 0

    def _prompt_logits(self, hidden: Tensor, shared: int) -> Tensor:
        """Next-token logits; log-probabilities of forced tokens and opener are noted on the way."""
        everyone = torch.arange(len(self.strands))
        last = self.model.unembed(hidden[everyone, torch.tensor(self.lengths) - 1 - shared])
        for index, strand in enumerate(self.strands):
            prompt, own = strand.job.prompt, hidden[index]
            ids, slot = prompt.token_ids, prompt.n_prompt - 1 - shared
            if prompt.n_opener:
                opener = ids[prompt.n_prompt - prompt.n_opener : prompt.n_prompt]
                strand.opener_log_prob = sum(self._log_probs_of(own[slot - len(opener) : slot], opener))
            forced = ids[prompt.n_prompt :]
            self._decide(
                strand, prompt.n_prompt - 1, self.model.unembed(own[slot]) if forced else last[index]
            )
            strand.new_ids += forced
            strand.log_probs += self._log_probs_of(own[slot : slot + len(forced)], forced)
        return last

    def _log_probs_of(self, hidden: Tensor, targets: Sequence[int]) -> list[float]:
        """log P of each target under the row that precedes it, in nats; unembedded in blocks."""
        found: list[float] = []
        for start in range(0, len(targets), _UNEMBED_ROWS):
            block = torch.tensor(targets[start : start + _UNEMBED_ROWS])
            log_probs = self.model.unembed(hidden[start : start + _UNEMBED_ROWS]).log_softmax(-1)
            found += log_probs.gather(1, block.to(log_probs.device)[:, None])[:, 0].tolist()
        return found

    # -- candidates ------------------------------------------------------------------------------------------

    def _score(self) -> None:
        """Log-probability of every candidate of every prompt with one short forward for the batch."""
        trees = [_Tree(strand.job.prompt.candidates) for strand in self.strands]
        width = max(tree.n_inner for tree in trees)
        if width == 0 and not any(tree.candidates for tree in trees):
            return
        start = torch.tensor(self.lengths)
        inner = None
        if width:
            tokens, positions, mask = _pack(trees, start, width)
            self.recorder.begin(None, None)
            inner, _ = self.model.forward(
                tokens,
                self.cache,
                start,
                mask=mask.to(self.model.device),
                positions=positions.to(self.model.device),
            )
        for index, (tree, strand) in enumerate(zip(trees, self.strands, strict=True)):
            if tree.candidates:
                first = strand.logits[0].log_softmax(-1)
                strand.candidate_log_probs = tree.read(
                    first, None if inner is None else inner[index], self.model.unembed
                )

    # -- generation ------------------------------------------------------------------------------------------

    def _emit(self, active: list[int], logits: Tensor) -> list[int]:
        """Choose and append one token for each active sequence; finished ones leave the batch."""
        log_probs = logits.log_softmax(-1)
        gone: list[int] = []
        for row, index in enumerate(active):
            strand = self.strands[index]
            if not bool(torch.isfinite(logits[row]).all()):
                strand.finish_reason = "error"
            else:
                self._emit_one(strand, logits[row], log_probs[row])
            if strand.finish_reason:
                gone.append(row)
        if gone:
            if self.steps:
                self.steps[-1].close()
            for row in gone:
                self.results[active[row]] = self._finish(active[row], row)
            return self._compact(active, gone)
        return active

    def _emit_one(self, strand: _Strand, logits: Tensor, log_probs: Tensor) -> None:
        g, job = self.generation, strand.job
        from_queue = bool(strand.queue)
        if from_queue:
            token = strand.queue.pop(0)
        else:
            token = draw(logits, temperature=g.temperature, p=g.top_p, k=g.top_k, generator=strand.generator)
            cued = self._cue(strand, token)
            token, from_queue = (token, False) if cued is None else (cued, True)
        if job.announces is not None and strand.answer_at is None and not from_queue:
            solid = any(character.isalnum() for character in self.codec.decode([token]))
            if solid and job.announces(self.codec.decode(strand.new_ids)):
                strand.answer_at = len(strand.new_ids)
                self._decide(strand, strand.length - 1, logits)
        strand.new_ids.append(token)
        strand.log_probs.append(float(log_probs[token]))
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
        tokens = torch.tensor([[self.strands[index].new_ids[-1]] for index in active])
        lengths = [self.strands[index].length - 1 for index in active]
        start: Tensor | int = lengths[0] if len(set(lengths)) == 1 else torch.tensor(lengths)
        self.recorder.begin(None, None)
        hidden, _ = self.model.forward(tokens, self.cache, start, recorder=self.recorder)
        if not self.steps or self.steps[-1].active != active:
            self.steps.append(_Segment(list(active)))
        self.steps[-1].add(self.recorder)
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

    def _decide(self, strand: _Strand, position: int, logits: Tensor) -> None:
        strand.decisions.append(position)
        strand.logits.append(logits)

    # -- what a finished sequence leaves -----------------------------------------------------------------------

    def _finish(self, index: int, row: int) -> Outcome | NonFinite:
        strand = self.strands[index]
        prompt = strand.job.prompt
        kept = self._rows_of(index)
        if strand.finish_reason == "error":
            return self._nonfinite(strand, kept)
        ids = prompt.token_ids[: prompt.n_prompt] + strand.new_ids
        spans, found = label_completion(
            prompt,
            self.codec,
            strand.new_ids,
            cot=strand.job.announces is not None,
            answer_at=strand.answer_at,
        )
        spans = [span for span in prompt.spans if span.end <= prompt.n_prompt] + spans
        spans = _without_unrun_label(spans, len(ids) - 1)
        labels = list(dict.fromkeys(span.label for span in spans))
        tensors = self._tensors(index, row, ids, spans, labels, kept)
        for tensor in tensors.values():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return self._nonfinite(strand, kept)
        completion = self.codec.completion(strand.new_ids)
        return Outcome(
            token_ids=ids,
            n_prompt=prompt.n_prompt,
            n_new=len(strand.new_ids),
            finish_reason=strand.finish_reason or "length",
            completion=completion,
            spans=spans,
            span_texts=[self.codec.decode(ids[span.start : span.end]) for span in spans],
            labels=[*labels, "sink"] if self._has_sink() else labels,
            layers=self.layers,
            tensors=tensors,
            found=found,
            candidate_log_probs=strand.candidate_log_probs,
            opener_log_prob=strand.opener_log_prob,
            answer_forced=strand.answer_forced,
        )

    def _rows_of(self, index: int) -> dict[str, dict[int, Tensor]]:
        """Residual rows, query rows and reads of one sequence: site → layer → tensor with rows first."""
        n_prefill = self.lengths[index] - self.first_rows[index]
        found: dict[str, dict[int, Tensor]] = {}
        for site in ("resid", "queries", "z"):
            per_layer = getattr(self.prefill, site)
            found[site] = {
                layer: torch.cat(
                    [
                        states[index][:n_prefill],
                        *(s.of(site, layer, index) for s in self.steps if index in s.active),
                    ]
                )
                for layer, states in per_layer.items()
            }
        return found

    def _tensors(self, index, row, ids, spans, labels, kept) -> dict[str, Tensor]:
        strand, sites = self.strands[index], self.spec.sites
        n_run = len(ids) - 1
        first = self.first_rows[index]
        positions = torch.arange(first, n_run)
        out: dict[str, Tensor] = {"token_ids": torch.tensor(ids), "rows": positions}
        out["decisions"] = torch.tensor(strand.decisions)
        if "resid_post" in sites:
            out["resid_post"] = _stack(kept["resid"], self.layers)
        if "queries" in sites:
            out["queries"] = _stack(kept["queries"], self.layers).transpose(1, 2)
        if "z" in sites:
            out["z"] = _stack(kept["z"], self.layers).transpose(1, 2)
        for site, store in (("keys", self.cache.keys), ("values", self.cache.values)):
            if site in sites:
                out[site] = torch.stack([store[layer][row, :, :n_run].cpu() for layer in self.layers])
        if "resid_span_mean" in sites:
            out["resid_span_mean"] = self._span_means(index, spans, labels, kept["resid"], n_run)
        if sites & {"attn_to_spans", "value_to_spans"}:
            mass, norm = self._reads(row, positions, n_run, spans, labels, kept["queries"])
            if "attn_to_spans" in sites:
                out["attn_to_spans"] = mass
            if "value_to_spans" in sites:
                out["value_to_spans"] = norm
        if "logits" in sites:
            out["logits"] = torch.stack([logits.float().cpu() for logits in strand.logits])
        if "log_probs" in sites:
            out["log_probs"] = torch.tensor(strand.log_probs, dtype=torch.float32)
        for name, tensor in out.items():
            if tensor.numel() == 0:
                raise RuntimeError(f"capture of {name} is empty; this is a bug in probe")
        return {name: tensor.contiguous() for name, tensor in out.items()}

    def _span_means(self, index: int, spans, labels, resid: dict[int, Tensor], n_run: int) -> Tensor:
        """Mean residual over each label's positions that were run, [layer, span, d_model]."""
        prompt_labels, start = self.prompt_labels[index], self.lengths[index]
        after = torch.zeros(len(labels), n_run - start)
        counts = torch.zeros(len(labels))
        for span in spans:
            column = labels.index(span.label)
            counts[column] += max(0, min(span.end, n_run) - span.start)
            after[column, max(span.start - start, 0) : max(min(span.end, n_run) - start, 0)] = 1
        means = []
        for layer in self.layers:
            sums = self.span_sums[layer][index]
            total = torch.zeros(len(labels), sums.shape[-1])
            for column, label in enumerate(labels):
                if label in prompt_labels:
                    total[column] = sums[prompt_labels.index(label)].cpu()
            generated = resid[layer][start - self.first_rows[index] :].float().cpu()
            means.append((total + after @ generated) / counts[:, None])
        return torch.stack(means).to(self.model.dtype)

    def _reads(self, row: int, positions, n_run: int, spans, labels, queries) -> tuple[Tensor, Tensor]:
        """attn_to_spans and value_to_spans [layer, head, row, span], float32."""
        runs = [[(s.start, min(s.end, n_run)) for s in spans if s.label == label] for label in labels]
        want_norm = "value_to_spans" in self.spec.sites
        masses, norms = [], []
        block = max(1, _PATTERN_ELEMENTS // (self.model.facts.n_heads * n_run))
        for layer in self.layers:
            keys = self.cache.keys[layer][row, :, :n_run]
            values = self.cache.values[layer][row, :, :n_run]
            factor = self.model.write_norms[layer].to(keys.device) if want_norm else None
            sink = self.model.sinks[layer]
            parts = []
            for start in range(0, len(positions), block):
                at = slice(start, start + block)
                alpha = reads.pattern(
                    queries[layer][at].transpose(0, 1),
                    keys,
                    positions[at].to(keys.device),
                    self.model.facts.attention[layer],
                    sink,
                )
                mass, norm = reads.read_by_span(alpha, values if want_norm else None, runs, factor)
                if sink is not None:
                    mass = torch.cat([mass, 1 - alpha.sum(-1, keepdim=True)], -1)
                    norm = None if norm is None else torch.cat([norm, torch.zeros_like(norm[..., :1])], -1)
                parts.append((mass.cpu(), mass.cpu() if norm is None else norm.cpu()))
            masses.append(torch.cat([mass for mass, _ in parts], 1))
            norms.append(torch.cat([norm for _, norm in parts], 1))
        return torch.stack(masses), torch.stack(norms)

    def _has_sink(self) -> bool:
        return any(sink is not None for sink in self.model.sinks)

    def _nonfinite(self, strand: _Strand, kept) -> NonFinite:
        for layer, rows in sorted(kept["resid"].items()):
            bad = (~torch.isfinite(rows)).any(-1).nonzero()
            if len(bad):
                position = int(bad[0, 0]) + (0 if self.spec.all_rows else strand.job.prompt.n_prompt - 1)
                return NonFinite(f"non-finite resid_post first at layer {layer}, position {position}")
        return NonFinite(f"non-finite logits at step {len(strand.new_ids)}")


class _Kept:
    """The prefill's recorded rows, rows first behind the sequence: resid [s, row, d], queries, z [s, row, h, d]."""

    def __init__(self, recorder: Recorder):
        self.resid = recorder.resid
        self.queries = {layer: states.transpose(1, 2) for layer, states in recorder.queries.items()}
        self.z = {layer: states.transpose(1, 2) for layer, states in recorder.z.items()}


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


class _Tree:
    """Candidates as a prefix tree: what they share is computed once, leaves are never run."""

    def __init__(self, candidates: Sequence[Candidate]):
        self.candidates = candidates
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        inner: dict[tuple[int, ...], int] = {}
        for candidate in candidates:
            for depth in range(1, len(candidate.token_ids)):
                path = candidate.token_ids[:depth]
                if path not in inner:
                    inner[path] = len(self.tokens)
                    self.tokens.append(path[-1])
                    self.parents.append(inner[path[:-1]] if depth > 1 else -1)
                    self.depths.append(depth - 1)
        self._inner = inner

    @property
    def n_inner(self) -> int:
        return len(self.tokens)

    def read(self, first: Tensor, hidden: Tensor | None, unembed) -> list[float]:
        """Σ log P of each candidate's tokens. `first` log-probabilities at the slot; hidden [node, d_model]."""
        edges: dict[int, list[tuple[int, int]]] = {}
        total = [float(first[c.token_ids[0]]) for c in self.candidates]
        for number, candidate in enumerate(self.candidates):
            for depth in range(1, len(candidate.token_ids)):
                node = self._inner[candidate.token_ids[:depth]]
                edges.setdefault(node, []).append((number, candidate.token_ids[depth]))
        nodes = sorted(edges)
        for start in range(0, len(nodes), _UNEMBED_ROWS):
            block = nodes[start : start + _UNEMBED_ROWS]
            assert hidden is not None
            log_probs = unembed(hidden[block]).log_softmax(-1)
            for row, node in enumerate(block):
                for number, token in edges[node]:
                    total[number] += float(log_probs[row, token])
        return total


def _pack(trees: list[_Tree], start: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, rotary positions and visibility of the packed candidates of a batch.

    A node sees its own sequence's prompt, its ancestors and itself; nothing sees padding.
    """
    batch = len(trees)
    tokens = torch.zeros(batch, width, dtype=torch.long)
    positions = start[:, None].repeat(1, width)
    n_keys = int(start.max()) + width
    mask = torch.zeros(batch, width, n_keys, dtype=torch.bool)
    for index, tree in enumerate(trees):
        begin = int(start[index])
        mask[index, :, :begin] = True
        for node, (token, parent, depth) in enumerate(
            zip(tree.tokens, tree.parents, tree.depths, strict=True)
        ):
            tokens[index, node] = token
            positions[index, node] = begin + depth
            if parent >= 0:
                mask[index, node, begin:] = mask[index, parent, begin:]
            mask[index, node, begin + node] = True
    return tokens, positions, mask


def _packed_size(job: Job) -> int:
    return _Tree(job.prompt.candidates).n_inner


def _ranges(firsts: list[int], ends: list[int]) -> Tensor:
    """Row indices first … end − 1 of each sequence, short ones padded by repeating their last row."""
    width = max(end - first for first, end in zip(firsts, ends, strict=True))
    rows = torch.arange(width)[None] + torch.tensor(firsts)[:, None]
    return torch.minimum(rows, torch.tensor(ends)[:, None] - 1)


def _stack(per_layer: dict[int, Tensor], layers: list[int]) -> Tensor:
    return torch.stack([per_layer[layer].cpu() for layer in layers])


def _without_unrun_label(spans: list[Span], n_run: int) -> list[Span]:
    """The last emitted token is never run: a label that it alone carries has no position to read."""
    run = {span.label for span in spans if span.start < n_run}
    return [span for span in spans if span.label in run]


def _generator(seed: int, job: Job) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}\n{job.task_id}\n{job.prompt.passage}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
