"""Many small changes of one prompt, and what each does to its candidates, without running what stays as it is.

A state that is changed in layer L at slot s reaches the layers from L on and the slots from s on, and nothing else: a trial
runs these alone, from the residual stream that the unchanged prompt had before layer L, on top of its keys and values.
Trials that begin in the same layer run side by side. The candidates lie behind the prompt, packed (`candidates.piece`),
each node in a slot of its own: slots n_prompt … n_prompt + nodes − 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from probe.capture.candidates import Tree, piece, read
from probe.capture.prefill import PASS_TOKENS
from probe.capture.sites import sequence_bytes
from probe.model.attention import KVCache, Piece, Recorder
from probe.model.edits import ResidualPatch, StateEdit
from probe.model.hooked import Model
from probe.prompts import Candidate, Prompt

_ROWS = 16
"""Trials side by side at most: each has a row of the cache, to which the prompt is copied."""
_BYTES = 1 << 29
"""Bytes of keys and values that the rows may take."""


@dataclass(frozen=True, eq=False)
class PatchTrial:
    """Edits of states, the earliest in `layer` and none before slot `start`."""

    layer: int
    start: int
    edits: tuple[StateEdit, ...]

    @classmethod
    def of(cls, edits: Sequence[StateEdit]) -> PatchTrial:
        return cls(min(edit.layer for edit in edits), min(edit.start for edit in edits), tuple(edits))


@dataclass(frozen=True, eq=False)
class Unchanged:
    """A prompt as it is: what its trials begin from."""

    prompt: Prompt
    tree: Tree
    first: int
    """Slot from which its states are kept, and trials may begin."""
    states: dict[str, dict[int, Tensor]]
    """`embedding`, `resid`, `attn_out`, `mlp_out` [slot, d_model] and `z` [slot, head, d_head] → layer → those from `first` on"""
    log_probs: list[float]
    """Of each candidate, nats"""

    @property
    def n_slots(self) -> int:
        return self.prompt.n_prompt + self.tree.n_nodes

    def piece(self, start: int) -> Piece:
        """The slots from `start` on, at most the last of the prompt."""
        return piece(self.tree, 0, self.prompt.token_ids[start : self.prompt.n_prompt], start)


class Bench:
    """Runs prompts and trials of the last one with one model; what a prompt shares with the one before is not run again."""

    def __init__(self, model: Model, capacity: int):
        """`capacity`: slots of the longest prompt with its candidates."""
        row = sequence_bytes(model.facts, model.dtype.itemsize, capacity)
        self.model = model
        self.n_rows = max(2, min(_ROWS + 1, _BYTES // row))
        self.cache = KVCache(self.n_rows, capacity)
        self.sites = ("attn_out", "mlp_out") if self._writers_known else ()
        self.tokens = 0
        """Tokens run so far, those of a trial in part of the layers counted by that part."""
        self._ids: tuple[int, ...] = ()
        """Of the prompt that was run last, how its length bears on rotary frequencies, and its tokens."""
        self._valid = [0] * self.n_rows
        """Slots of each row that hold what the last prompt has there."""

    @property
    def _writers_known(self) -> bool:
        return all(writers.mlp is not None for writers in self.model.writers)

    def _recorder(self) -> Recorder:
        wanted = dict.fromkeys(("embedding", "resid", "z", *self.sites), True)
        return Recorder(layers=frozenset(range(self.model.facts.n_layers)), **wanted)

    def run(self, prompt: Prompt, candidates: tuple[Candidate, ...], first: int) -> Unchanged:
        """Run a prompt with its candidates; trials may begin at `first` or later, before the end of the prompt."""
        ids = self._ids_of(prompt)
        shared = next((n for n, (a, b) in enumerate(zip(ids, self._ids, strict=False)) if a != b), None)
        shared = min(len(ids), len(self._ids)) if shared is None else shared
        self._valid = [min(n, max(shared - 1, 0)) for n in self._valid]
        self._ids = ids
        start = min(self._valid[0], first)
        with self.model.recording(None):
            for begin in range(start, first, PASS_TOKENS):
                tokens = prompt.token_ids[begin : min(begin + PASS_TOKENS, first)]
                self.model.forward([Piece(0, begin, tokens, length=prompt.n_prompt)], self.cache)
        recorder, tree = self._recorder(), Tree(candidates)
        unchanged = Unchanged(prompt, tree, first, {}, [])
        with self.model.recording(recorder):
            hidden, _ = self.model.forward([unchanged.piece(first)], self.cache, recorder)
            (log_probs,) = self._log_probs([unchanged], [hidden[0]])
        self.tokens += unchanged.n_slots - start
        self._valid[0] = prompt.n_prompt
        return replace(unchanged, states=_states(recorder), log_probs=log_probs)

    def _ids_of(self, prompt: Prompt) -> tuple[int, ...]:
        return self.model.switched(prompt.n_prompt), *prompt.token_ids[: prompt.n_prompt]

    def _refuse_other(self, unchanged: Unchanged) -> None:
        if self._ids_of(unchanged.prompt) != self._ids:
            raise ValueError("another prompt was run since: run this one again")

    def trials(self, unchanged: Unchanged, trials: Sequence[PatchTrial]) -> list[list[float]]:
        """log P of each candidate, nats, under each trial of the prompt that was run last."""
        self._refuse_other(unchanged)
        log_probs: list[list[float]] = [[] for _ in trials]
        for batch in self._batches(unchanged, trials):
            for index, values in zip(batch, self._batch(unchanged, [trials[i] for i in batch]), strict=True):
                log_probs[index] = values
        return log_probs

    def _batches(self, unchanged: Unchanged, trials: Sequence[PatchTrial]) -> Iterator[list[int]]:
        """Indices of trials of one layer, the latest first: rows are then whole up to where a trial begins."""
        order = sorted(range(len(trials)), key=lambda i: (-trials[i].start, trials[i].layer))
        batch: list[int] = []
        tokens = 0
        for index in order:
            size = unchanged.n_slots - trials[index].start
            if batch and (
                len(batch) == self.n_rows - 1
                or tokens + size > PASS_TOKENS
                or trials[index].layer != trials[batch[0]].layer
            ):
                yield batch
                batch, tokens = [], 0
            batch.append(index)
            tokens += size
        if batch:
            yield batch

    def _batch(self, unchanged: Unchanged, trials: Sequence[PatchTrial]) -> list[list[float]]:
        layer, n_layers = trials[0].layer, self.model.facts.n_layers
        pieces, states = [], []
        by_start = {trial.start: unchanged.piece(trial.start) for trial in trials}
        for row, trial in enumerate(trials, 1):
            if self._valid[row] < trial.start:
                with torch.inference_mode():  # what the cache holds was computed in it
                    self.cache.copy(0, row, trial.start, self._valid[row])
            self._valid[row] = trial.start
            pieces.append(replace(by_start[trial.start], row=row, edits=trial.edits, by_slot=True))
            if layer:
                states.append(unchanged.states["resid"][layer - 1][trial.start - unchanged.first :])
            self.tokens += (unchanged.n_slots - trial.start) * (n_layers - layer) / n_layers
        patch = ResidualPatch(layer - 1, torch.cat(states)) if layer else None
        edits = [edit for trial in trials for edit in trial.edits]
        with self.model.recording(None, edits):
            hidden, _ = self.model.forward(pieces, self.cache, patch=patch)
            runs = hidden[0].split([len(each.tokens) for each in pieces])
            return self._log_probs([unchanged] * len(runs), runs)

    def _log_probs(self, prompts: Sequence[Unchanged], runs: Sequence[Tensor]) -> list[list[float]]:
        """Of each run that ends with a prompt's last token and its nodes, log P of each candidate."""
        nodes = [prompt.tree.n_nodes for prompt in prompts]
        slots = [run[len(run) - n - 1] for run, n in zip(runs, nodes, strict=True)]
        behind = [run[len(run) - n :] for run, n in zip(runs, nodes, strict=True)]
        hidden = torch.cat(behind) if any(nodes) else None
        by_token = read(
            [prompt.tree for prompt in prompts],
            list(self.model.unembed(torch.stack(slots))),
            hidden,
            self.model.unembed,
        )
        return [[sum(tokens) for tokens in candidates] for candidates in by_token]

    def gradients(self, unchanged: Unchanged) -> dict[str, dict[int, Tensor]]:
        """∂(log P(first candidate) − log P(second)) / ∂ each state, laid out as `Unchanged.states`.

        Of the prompt that was run last, by one pass over the slots from its `first` on and back.
        """
        self._refuse_other(unchanged)
        first, cache = unchanged.first, KVCache(1, unchanged.n_slots)
        if first:
            cache.put(0, self.cache.take(0, first))
        recorder = _Differentiated(self._recorder())
        with self.model.recording(recorder, gradients=True):
            hidden, _ = self.model.forward([unchanged.piece(first)], cache, recorder)
            difference = self._difference(unchanged, hidden[0])
            places = [(name, layer) for name, by_layer in recorder.states.items() for layer in by_layer]
            by_place = torch.autograd.grad(
                difference, [recorder.states[name][layer] for name, layer in places], materialize_grads=True
            )
        self.tokens += 3 * (unchanged.n_slots - first)
        gradients: dict[str, dict[int, Tensor]] = {}
        for (name, layer), gradient in zip(places, by_place, strict=True):
            gradients.setdefault(name, {})[layer] = _by_slot(name, gradient)
        return gradients

    def _difference(self, unchanged: Unchanged, hidden: Tensor) -> Tensor:
        """log P(first candidate) − log P(second), to be differentiated."""
        tree = unchanged.tree
        first_node = len(hidden) - tree.n_nodes
        edges = [
            (first_node - 1, number, candidate.token_ids[0])
            for number, candidate in enumerate(tree.candidates)
        ]
        edges += [(first_node + node, number, token) for node, number, token in tree.edges()]
        rows = torch.tensor([row for row, _, _ in edges], device=hidden.device)
        log_p = self.model.unembed(hidden[rows]).log_softmax(-1)
        signs = [1.0 if number == 0 else -1.0 for _, number, _ in edges]
        terms = [
            sign * log_p[i, token] for i, (sign, (_, _, token)) in enumerate(zip(signs, edges, strict=True))
        ]
        return torch.stack(terms).sum()


class _Differentiated(Recorder):
    """A recorder whose embedding is where differentiation begins."""

    def __init__(self, like: Recorder):
        super().__init__(layers=like.layers, **dict.fromkeys(like.wanted, True))

    def on_embedding(self, hidden: Tensor) -> None:
        super().on_embedding(hidden.requires_grad_())


def _states(recorder: Recorder) -> dict[str, dict[int, Tensor]]:
    return {
        name: {layer: _by_slot(name, states) for layer, states in by_layer.items()}
        for name, by_layer in recorder.states.items()
    }


def _by_slot(name: str, states: Tensor) -> Tensor:
    """[slot, …] of what a recorder kept of one flat pass."""
    return states[0].transpose(0, 1) if name == "z" else states[0]
