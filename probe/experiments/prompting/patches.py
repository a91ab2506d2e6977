"""Running from the middle: a state is put in behind a block at the last prompt position, and only that position runs.

The memory of what stands before it is that of the unchanged prompt (`model.edits.ResidualPatch`). The results are rows of
prompting.parquet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.capture.sites import sequence_bytes
from probe.prompts.labels import BASE
from probe.runs.views.prompting import LEAST, Item, items_of

if TYPE_CHECKING:
    from torch import Tensor

    from probe.experiments.loaded_run import LoadedRun
    from probe.model.hooked import Model

ROWS = 64
"""Sequences that run together; also vocabulary-wide rows held at a time."""
_CACHE_BYTES = 1 << 28

Row = dict[str, Any]


class PromptingTasks:
    """The prompting tasks of a run that have everything an experiment needs, and their states."""

    def __init__(self, opened: LoadedRun):
        self.opened = opened
        self.items = [item for item in items_of(opened.run) if self._whole(item)]

    @cached_property
    def model(self) -> Model:
        return self.opened.model

    @cached_property
    def states(self) -> dict[tuple[str, str], np.ndarray]:
        """(task, variant) → [layer, d_model], float32."""
        by_passage = {}
        for item in self.items:
            for variant in item.outcomes:
                states = item.states(variant)
                if states is not None:
                    by_passage[item.id, variant] = states
        return by_passage

    def differences(self, item: Item, variant: str, family: str | None) -> np.ndarray | None:
        """Mean over the other tasks of a family of state(variant) − state(base), [layer, d_model]; None for too few."""
        total, count = self._sums.get((family, variant), (np.zeros(1), 0))
        if count and item.family == family and variant in item.outcomes:
            total, count = total - self._shift(item, variant), count - 1
        return (total / count).astype(np.float32) if count >= LEAST - 1 else None

    @cached_property
    def _sums(self) -> dict[tuple[str | None, str], tuple[np.ndarray, int]]:
        """(family, variant) → sum of its tasks' shifts, and how many: each task's mean of the others is less its own."""
        sums: dict[tuple[str | None, str], tuple[np.ndarray, int]] = {}
        for item in self.items:
            for variant in item.variants:
                total, count = sums.get((item.family, variant), (np.zeros(1), 0))
                sums[item.family, variant] = total + self._shift(item, variant), count + 1
        return sums

    def _shift(self, item: Item, variant: str) -> np.ndarray:
        return (self.states[item.id, variant] - self.states[item.id, BASE]).astype(np.float64)

    def _whole(self, item: Item) -> bool:
        """Logits and the states of all layers were captured in all passages."""
        names = [f"{v}/{site}" for v in item.outcomes for site in ("logits", "resid_post")]
        n_layers = self.opened.run.run["model"]["n_layers"]
        every = item.layers is None or len(item.layers) == n_layers
        task = item.task
        return every and all(name in task for name in names)


# -- distributions compared -----------------------------------------------------------------------------------------


def compared(log_p: Tensor, log_q: Tensor, tokens: Sequence[int | None], *, full: bool) -> list[Row]:
    """The columns of each row of log_p [row, d_vocab] against log_q, nats; `full` adds JS, TV and entropy."""
    import torch

    p = log_p.exp()
    gap = log_p - log_q
    columns = {
        "kl": (p * gap).sum(-1).clamp_min(0).tolist(),
        "kl_reverse": (-log_q.exp() * gap).sum(-1).clamp_min(0).tolist(),
        "token": log_p.argmax(-1).tolist(),
    }
    if full:
        q = log_q.exp()
        log_m = ((p + q) / 2).clamp_min(torch.finfo(p.dtype).tiny).log()
        js = ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)) / 2
        columns["js"] = js.clamp_min(0).tolist()
        columns["tv"] = ((p - q).abs().sum(-1) / 2).tolist()
        columns["entropy"] = (-(p * log_p).sum(-1)).tolist()
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for row, law, token in zip(rows, log_p, tokens, strict=True):
        if token is not None:
            row["target_rank"] = int((law > law[token]).sum()) + 1
            row["target_log_prob"] = float(law[token])
    return rows


def read_out(model: Model, states: np.ndarray) -> Tensor:
    """Log-probabilities [row, d_vocab] of residual states [row, d_model]: final norm, then unembedding."""
    return resumed(model, None, [0] * len(states), model.facts.n_layers - 1, states)


def resumed(model: Model, cache: Any, positions: Sequence[int], layer: int, states: np.ndarray) -> Tensor:
    """Log-probabilities [row, d_vocab] with states [row, d_model] behind block `layer` at each row's position."""
    import torch

    from probe.model.attention import KVCache
    from probe.model.edits import ResidualPatch

    cache = KVCache(len(states), 1) if cache is None else cache
    patch = ResidualPatch(
        layer, torch.from_numpy(np.ascontiguousarray(states, dtype=np.float32)).to(model.device)
    )
    with model.recording(None):
        hidden, _ = model.step([0] * len(states), cache, positions, patch=patch)
        return model.unembed(hidden[:, 0]).log_softmax(-1)


@dataclass
class Patch:
    """States to put in behind each block at the last position of one prompt."""

    item: Item
    experiment: str
    variant: str
    prompt: str
    """The variant whose prompt is run: `base`, or for removals the variant itself."""
    states: np.ndarray
    """[layer, d_model]"""

    @property
    def goal(self) -> str:
        """The variant whose output is the reference."""
        return BASE if self.experiment == "remove" else self.variant


def as_long(vectors: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Rows [layer, d_model] scaled to the lengths of those of `like`."""
    lengths, wanted = (np.linalg.norm(rows, axis=-1, keepdims=True) for rows in (vectors, like))
    return vectors * (wanted / np.maximum(lengths, 1e-30))


def generator(seed: int, *words: str) -> np.random.Generator:
    digest = hashlib.blake2b(json.dumps([seed, *words]).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def run_patches(prompted: PromptingTasks, patches: Iterator[Patch]) -> Iterator[Row]:
    """One row a patch and layer. Patches of one prompt share its memory; neighbors run together."""
    for group in batches(prompted, patches):
        yield from _run_batch(prompted, group)


def batches(prompted: PromptingTasks, patches: Iterator[Patch]) -> Iterator[list[Patch]]:
    """Up to ROWS patches of like length whose memory fits; those of long prompts by themselves."""
    facts, itemsize = prompted.model.facts, prompted.model.dtype.itemsize
    ordered = sorted(patches, key=lambda patch: patch.item.outcomes[patch.prompt].n_prompt)
    group: list[Patch] = []
    for patch in ordered:
        length = patch.item.outcomes[patch.prompt].n_prompt
        if group and (
            len(group) == ROWS or (len(group) + 1) * sequence_bytes(facts, itemsize, length) > _CACHE_BYTES
        ):
            yield group
            group = []
        group.append(patch)
    if group:
        yield group


def _run_batch(prompted: PromptingTasks, group: Sequence[Patch]) -> Iterator[Row]:
    import torch

    from probe.model.attention import KVCache

    model = prompted.model
    lengths = [patch.item.outcomes[patch.prompt].n_prompt for patch in group]
    cache = KVCache(len(group), max(lengths))
    before = [
        patch.item.passages[patch.prompt].token_ids[: n - 1] for patch, n in zip(group, lengths, strict=True)
    ]
    fill(model, cache, before)
    log_q = torch.stack([_output(patch.item, patch.goal) for patch in group]).to(model.device)
    start = torch.stack([_output(patch.item, patch.prompt) for patch in group]).to(model.device)
    starts = (start.exp() * (start - log_q)).sum(-1).clamp_min(0).tolist()
    tokens = [patch.item.target_token(patch.variant) for patch in group]
    states = np.stack([patch.states for patch in group])
    for layer in range(states.shape[1]):
        log_p = resumed(model, cache, [n - 1 for n in lengths], layer, states[:, layer])
        rows = compared(log_p, log_q, tokens, full=False)
        for patch, row, before in zip(group, rows, starts, strict=True):
            names = {"task_id": patch.item.id, "experiment": patch.experiment, "variant": patch.variant}
            yield names | {"layer": layer, "kl_start": before} | row


def _output(item: Item, variant: str) -> Tensor:
    return item.task[f"{variant}/logits"][0].float().log_softmax(-1)


def fill(model: Model, cache: Any, before: Sequence[Sequence[int]]) -> None:
    """Each row's memory of the tokens before its last position; those that several rows share are run once."""
    import torch

    from probe.capture.prefill import Part, prefill
    from probe.model.attention import Recorder

    first: dict[tuple[int, ...], int] = {}
    parts, copies = [], []
    for row, tokens in enumerate(before):
        ids = tuple(tokens)
        if not ids:
            continue
        if ids in first:
            copies.append((first[ids], row, len(ids)))
        else:
            first[ids] = row
            parts.append(Part(row, ids, 0, len(ids), len(ids), (), (), unrun=1))
    if parts:
        recorder = Recorder(layers=frozenset())
        with model.recording(recorder):
            prefill(model, recorder, cache, parts)
    with torch.inference_mode():  # what the cache holds was computed in it
        for copy in copies:
            cache.copy(*copy)
