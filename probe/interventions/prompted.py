"""Running a run's prompting tasks again from the middle: their states read out layer by layer, or replaced.

Only the last prompt position is touched; the memory of what stands before it is that of the unchanged prompt, so
a state put in behind block l runs one position through the blocks above l and nothing else (`model.edits.Entry`).

lens             the states that the run captured, through the final norm and the unembedding (nostalgebraist 2020)
tuned_lens       the same behind an affine map to the last layer's states, ridge by tasks left out (Belrose et al. 2023
                 train theirs on the divergence)
patch            `add`: the bare prompt's state plus the mean difference that the variant makes to the other tasks of
                 the family; `add_random`: plus a random vector as long; `add_shuffled`: plus another family's mean
                 difference, scaled to the same length; `remove`: the prompted state less the mean difference
task_vector      the bare prompt's state replaced by the state of another task of the family under the variant (Hendel
                 et al. 2023): the other task's input is the dummy query

Columns of prompting.parquet: `kl` = KL(this‖reference) over the vocabulary in nats, `kl_reverse` the other way. The
reference is, for `lens` and `tuned_lens`, the bare prompt at the same layer; for `remove` the bare prompt's output; else
the variant's output. `kl_start` is what `kl` would be without the patch. `token` is the likeliest token,
`target_rank` and `target_log_prob` are those of the target's first token, where no other choice begins with it.
Rows `text` say what a token is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.prompting.states import BASE, LEAST, Item, items_of, vector_groups

if TYPE_CHECKING:
    from torch import Tensor

    from probe.interventions.conditions import Effort
    from probe.interventions.reopened import Reopened
    from probe.model.hooked import Model
    from probe.runner import Progress

EXPERIMENTS: dict[str, tuple[str, ...]] = {
    "lens": ("lens", "text"),
    "patch": ("add", "add_random", "add_shuffled", "remove"),
    "tuned_lens": ("tuned_lens",),
    "task_vector": ("task_vector",),
}
"""By the name under which they are asked for: the experiments of the table."""
ASKED = frozenset({"tuned_lens", "task_vector"})
"""Made only where they are named."""
_ROWS = 64
"""Sequences that run together; also vocabulary-wide rows held at a time."""
_CACHE_BYTES = 1 << 28

Row = dict[str, Any]


class Prompted:
    """The prompting tasks of a run that have everything an experiment needs, and their states."""

    def __init__(self, opened: Reopened):
        self.opened = opened
        self.items = [item for item in items_of(opened.run) if self._whole(item)]

    @cached_property
    def model(self) -> Model:
        return self.opened.model

    @cached_property
    def states(self) -> dict[tuple[str, str], np.ndarray]:
        """(task, variant) → [layer, d_model], float32."""
        found = {}
        for item in self.items:
            for variant in item.passages:
                states = item.states(variant)
                if states is not None:
                    found[item.id, variant] = states
        return found

    def differences(self, item: Item, variant: str, others: Sequence[Item]) -> np.ndarray | None:
        """Mean over other tasks of state(variant) − state(base), [layer, d_model]; None for too few."""
        found = [
            self.states[other.id, variant] - self.states[other.id, BASE]
            for other in others
            if other.id != item.id and variant in other.passages
        ]
        return np.mean(found, axis=0) if len(found) >= LEAST - 1 else None

    def _whole(self, item: Item) -> bool:
        """Logits and the states of all layers were captured in all passages."""
        names = [f"{v}/{site}" for v in item.passages for site in ("logits", "resid_post")]
        n_layers = self.opened.run.run["model"]["n_layers"]
        every = item.layers is None or len(item.layers) == n_layers
        return every and all(name in item.task for name in names)


def make(
    opened: Reopened, wanted: Sequence[str], *, again: bool, effort: Effort, progress: Progress
) -> list[str]:
    """Make what is missing of the wanted experiments, or all of them again; returns what was made."""
    table = opened.run.prompting(arrow=True)
    there = set(table["experiment"].unique().to_pylist())
    prompted = Prompted(opened)
    if len(prompted.items) == 0:
        return []
    made = []
    for name in wanted:
        if again or not there & set(EXPERIMENTS[name]):
            progress.log(f"{name}: {len(prompted.items)} prompting tasks")
            rows = list(_MAKERS[name](prompted, effort.seed))
            if rows:
                _write(opened, EXPERIMENTS[name], rows)
                made.append(name)
    return made


def _write(opened: Reopened, experiments: Sequence[str], rows: Sequence[Row]) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    kept = opened.run.prompting(arrow=True)
    kept = kept.filter(~pc.field("experiment").isin(list(experiments)))
    blank = dict.fromkeys(kept.column_names)
    new = pa.Table.from_pylist([blank | row for row in rows], schema=kept.schema)
    opened.run.write_prompting(pa.concat_tables([kept, new]))


# -- what a distribution is told by --------------------------------------------------------------------------------


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
    for row, own, token in zip(rows, log_p, tokens, strict=True):
        if token is not None:
            row["target_rank"] = int((own > own[token]).sum()) + 1
            row["target_log_prob"] = float(own[token])
    return rows


# -- lens ----------------------------------------------------------------------------------------------------------


def lens(prompted: Prompted, _seed: int = 0) -> Iterator[Row]:
    yield from _lens(prompted, "lens", lambda _item, states: states)
    yield from _token_texts(prompted)


def _lens(prompted: Prompted, name: str, mapped: Callable[[Item, np.ndarray], np.ndarray]) -> Iterator[Row]:
    """Base and variants of a task at every layer, each variant against base at the same layer."""
    for item in prompted.items:
        variants = [BASE, *item.variants]
        stack = np.stack([mapped(item, prompted.states[item.id, variant]) for variant in variants])
        for layer in range(stack.shape[1]):
            log_p = read_out(prompted.model, stack[:, layer])
            against = log_p[:1].expand_as(log_p)
            tokens = [item.target_token(variant) for variant in variants]
            rows = compared(log_p, against, tokens, full=True)
            for variant, row in zip(variants, rows, strict=True):
                yield {"task_id": item.id, "experiment": name, "variant": variant, "layer": layer, **row}


def read_out(model: Model, states: np.ndarray) -> Tensor:
    """Log-probabilities [row, d_vocab] of residual states [row, d_model]: final norm, then unembedding."""
    return resumed(model, None, [0] * len(states), model.facts.n_layers - 1, states)


def resumed(model: Model, cache: Any, positions: Sequence[int], layer: int, states: np.ndarray) -> Tensor:
    """Log-probabilities [row, d_vocab] with states [row, d_model] behind block `layer` at each row's position."""
    import torch

    from probe.model.attention import KVCache
    from probe.model.edits import Entry

    cache = KVCache(len(states), 1) if cache is None else cache
    entry = Entry(layer, torch.from_numpy(np.ascontiguousarray(states, dtype=np.float32)).to(model.device))
    with model.recording(None):
        hidden, _ = model.step([0] * len(states), cache, positions, entry=entry)
        return model.unembed(hidden[:, 0]).log_softmax(-1)


def _token_texts(prompted: Prompted) -> Iterator[Row]:
    """What the tokens are that the analyzer lists: a run has no vocabulary."""
    from probe.analyzers.prompting.bias import listed_tokens

    for token in listed_tokens(prompted.items):
        text = prompted.opened.codec.decode([token])
        yield {"task_id": "", "experiment": "text", "variant": "", "token": token, "text": text}


def tuned_lens(prompted: Prompted, _seed: int = 0) -> Iterator[Row]:
    """Two halves of the tasks: each is read out with the maps fitted on the other one."""
    halves = [prompted.items[0::2], prompted.items[1::2]]
    if min(map(len, halves)) < LEAST:
        return
    for half, other in ((0, 1), (1, 0)):
        maps = _translators(prompted, halves[other])
        inside = {item.id for item in halves[half]}

        def mapped(_item: Item, states: np.ndarray, maps=maps) -> np.ndarray:
            return np.stack([weights(own) for weights, own in zip(maps, states, strict=True)])

        own = [row for row in _lens_of(prompted, inside, mapped)]
        yield from own


def _lens_of(prompted: Prompted, ids: set[str], mapped: Callable) -> Iterator[Row]:
    part = Prompted.__new__(Prompted)
    part.__dict__.update(prompted.__dict__ | {"states": prompted.states, "model": prompted.model})
    part.items = [item for item in prompted.items if item.id in ids]
    yield from _lens(part, "tuned_lens", mapped)


def _translators(prompted: Prompted, items: Sequence[Item]) -> list[Callable[[np.ndarray], np.ndarray]]:
    """By layer an affine map to the last layer's state: ridge, its strength chosen by generalized
    cross-validation (Golub, Heath and Wahba 1979)."""
    rows = np.stack(
        [states for (task, _), states in prompted.states.items() if task in {i.id for i in items}]
    )
    goal = rows[:, -1].astype(np.float64)
    maps: list[Callable[[np.ndarray], np.ndarray]] = []
    for layer in range(rows.shape[1] - 1):
        maps.append(_ridge(rows[:, layer].astype(np.float64), goal))
    return [*maps, lambda states: states]


def _ridge(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """y ≈ x + (x − x̄) W + b: the change to the last layer is fitted, so that a strong penalty is the plain lens."""
    change = y - x
    center, shift = x.mean(0), change.mean(0)
    u, s, v = np.linalg.svd(x - center, full_matrices=False)
    aligned = u.T @ (change - shift)
    best: tuple[float, float] = (np.inf, 0.0)
    for strength in np.logspace(-6, 2, 17) * s[0] ** 2:
        kept = s**2 / (s**2 + strength)
        rest = (change - shift) - u @ (kept[:, None] * aligned)
        score = float(np.square(rest).sum() / (len(x) - 1 - kept.sum()) ** 2)
        best = min(best, (score, float(strength)))
    weights = v.T @ ((s / (s**2 + best[1]))[:, None] * aligned)
    return lambda states: states + (states - center) @ weights + shift


# -- patches -------------------------------------------------------------------------------------------------------


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


def patch(prompted: Prompted, seed: int) -> Iterator[Row]:
    yield from run_patches(prompted, _mean_patches(prompted, seed))


def _mean_patches(prompted: Prompted, seed: int) -> Iterator[Patch]:
    families = vector_groups(prompted.items)
    names = sorted(families, key=str)
    for family, items in families.items():
        other = families[names[(names.index(family) + 1) % len(names)]] if len(names) > 1 else []
        for item in items:
            base = prompted.states[item.id, BASE]
            for variant in item.variants:
                own = prompted.differences(item, variant, items)
                if own is None:
                    continue
                yield Patch(item, "add", variant, BASE, base + own)
                drawn = _generator(seed, item.id, variant).standard_normal(own.shape)
                yield Patch(item, "add_random", variant, BASE, base + _as_long(drawn, own))
                wrong = prompted.differences(item, variant, other)
                if wrong is not None:
                    yield Patch(item, "add_shuffled", variant, BASE, base + _as_long(wrong, own))
                there = prompted.states[item.id, variant]
                yield Patch(item, "remove", variant, variant, there - own)


def task_vector(prompted: Prompted, _seed: int = 0) -> Iterator[Row]:
    def patches() -> Iterator[Patch]:
        for items in vector_groups(prompted.items).values():
            for place, item in enumerate(items):
                for variant in item.variants:
                    others = [*items[place + 1 :], *items[:place]]
                    dummy = next((o for o in others if variant in o.passages), None)
                    if dummy is not None:
                        states = prompted.states[dummy.id, variant]
                        yield Patch(item, "task_vector", variant, BASE, states)

    yield from run_patches(prompted, patches())


def _as_long(vectors: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Rows [layer, d_model] scaled to the lengths of those of `like`."""
    own, wanted = (np.linalg.norm(rows, axis=-1, keepdims=True) for rows in (vectors, like))
    return vectors * (wanted / np.maximum(own, 1e-30))


def _generator(seed: int, *words: str) -> np.random.Generator:
    digest = hashlib.blake2b(json.dumps([seed, *words]).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def run_patches(prompted: Prompted, patches: Iterator[Patch]) -> Iterator[Row]:
    """One row a patch and layer. Patches of one prompt share its memory; neighbors run together."""
    for group in _batches(prompted, patches):
        yield from _run_batch(prompted, group)


def _batches(prompted: Prompted, patches: Iterator[Patch]) -> Iterator[list[Patch]]:
    """Up to _ROWS patches of like length whose memory fits; those of long prompts by themselves."""
    facts = prompted.model.facts
    position = 2 * facts.n_layers * facts.n_kv_heads * facts.d_head * prompted.model.dtype.itemsize
    ordered = sorted(patches, key=lambda one: one.item.passages[one.prompt]["n_prompt"])
    group: list[Patch] = []
    for one in ordered:
        length = one.item.passages[one.prompt]["n_prompt"]
        if group and (len(group) == _ROWS or (len(group) + 1) * length * position > _CACHE_BYTES):
            yield group
            group = []
        group.append(one)
    if group:
        yield group


def _run_batch(prompted: Prompted, group: Sequence[Patch]) -> Iterator[Row]:
    import torch

    from probe.model.attention import KVCache, Recorder

    model = prompted.model
    lengths = [one.item.passages[one.prompt]["n_prompt"] for one in group]
    cache = KVCache(len(group), max(lengths))
    _fill(model, Recorder(resid=False, queries=False, z=False, layers=frozenset()), cache, group, lengths)
    log_q = torch.stack([_output(one.item, one.goal) for one in group]).to(model.device)
    start = torch.stack([_output(one.item, one.prompt) for one in group]).to(model.device)
    starts = (start.exp() * (start - log_q)).sum(-1).clamp_min(0).tolist()
    tokens = [one.item.target_token(one.variant) for one in group]
    states = np.stack([one.states for one in group])
    for layer in range(states.shape[1]):
        log_p = resumed(model, cache, [n - 1 for n in lengths], layer, states[:, layer])
        rows = compared(log_p, log_q, tokens, full=False)
        for one, row, before in zip(group, rows, starts, strict=True):
            names = {"task_id": one.item.id, "experiment": one.experiment, "variant": one.variant}
            yield names | {"layer": layer, "kl_start": before} | row


def _output(item: Item, variant: str) -> Tensor:
    return item.task[f"{variant}/logits"][0].float().log_softmax(-1)


def _fill(model: Model, recorder: Any, cache: Any, group: Sequence[Patch], lengths: Sequence[int]) -> None:
    """Each row's memory of what stands before the last position; a prompt that several share is run once."""
    import torch

    from probe.capture.prefill import Part, prefill

    first: dict[tuple[int, ...], int] = {}
    parts, copies = [], []
    for row, (one, length) in enumerate(zip(group, lengths, strict=True)):
        ids = tuple(one.item.passages[one.prompt]["token_ids"][: length - 1])
        if not ids:
            continue
        if ids in first:
            copies.append((first[ids], row, len(ids)))
        else:
            first[ids] = row
            parts.append(Part(row, ids, 0, len(ids), len(ids), (), ()))
    if parts:
        with model.recording(recorder):
            prefill(model, recorder, cache, parts)
    with torch.inference_mode():  # what the cache holds was computed in it
        for copy in copies:
            cache.copy(*copy)


_MAKERS: Mapping[str, Callable[[Prompted, int], Iterator[Row]]] = {
    "lens": lens,
    "patch": patch,
    "tuned_lens": tuned_lens,
    "task_vector": task_vector,
}
