"""Function vectors: the heads that carry a task, and the sum of what they write (Todd et al. 2024, section 2).

The reference is the variant with the most examples. Everything is at the last prompt position.

head_effect              the reference with the answers of its examples exchanged, so that its form stays and its task
                         goes, and one head's output replaced by its mean over the family's other tasks under
                         the reference; the row without a head: nothing replaced
function_vector          the bare prompt's state plus the sum of the mean head outputs z, times W_O, of the heads
                         with the highest mean effect on the other half of the tasks
function_vector_random   as many random heads, the sum scaled to the same length

A norm or a factor between the attention's output and the residual stream acts at the scale that it has for the mean
outputs of all heads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from probe.experiments.prompting.patches import (
    Patch,
    PromptingTasks,
    Row,
    as_long,
    batches,
    fill,
    generator,
    run_patches,
)
from probe.experiments.registry import experiment
from probe.prompts.labels import BASE
from probe.runs.views.prompting import LEAST, Item, reference_variant, vector_groups

if TYPE_CHECKING:
    from torch import Tensor

    from probe.tasks import Variant

HEADS = 10
"""Heads of a vector, and at most a tenth of all (Todd et al. take 10 of the 448 of GPT-J)."""
_ROWS = 64

Head = tuple[int, int]


@dataclass
class _HeldOutTask:
    """A task with enough others in its family for a mean."""

    item: Item
    z: Tensor
    """Mean head outputs of the others under the reference: [layer, head, d_head]"""


@experiment(
    "prompting",
    requires="reads",
    changes="what a head writes under a variant, in the mean over tasks, is added to the bare prompt; the heads with the largest effect together",
    cost="one position through the blocks above, for each head and layer",
    by_name=True,
    rows=("head_effect", "function_vector", "function_vector_random"),
)
def function_vector(prompted: PromptingTasks, seed: int) -> Iterator[Row]:
    reference = reference_variant(prompted.items)
    items = [item for item in prompted.items if reference in item.outcomes]
    if reference is None or not items:
        return
    subjects = list(_subjects(items, _head_outputs(prompted, items, reference)))
    effects: dict[str, Mapping[Head, float]] = {}
    for subject in subjects:
        rows = list(_effects(prompted, subject, reference, seed))
        yield from rows
        start = next((np.exp(row["target_log_prob"]) for row in rows if row["head"] is None), 0.0)
        effects[subject.item.id] = {
            (row["layer"], row["head"]): float(np.exp(row["target_log_prob"]) - start)
            for row in rows
            if row["head"] is not None
        }
    yield from run_patches(prompted, _patches(prompted, subjects, effects, reference, seed))


def _head_outputs(prompted: PromptingTasks, items: Sequence[Item], reference: str) -> dict[str, Tensor]:
    """Head outputs z [layer, head, d_head] at the last position under the reference, by task."""
    import torch

    from probe.model.attention import KVCache, Recorder

    model, outputs = prompted.model, {}
    layers = frozenset(range(model.facts.n_layers))
    wanted = (Patch(item, "z", reference, reference, np.zeros((0, 0))) for item in items)
    for group in batches(prompted, wanted):
        ids = [patch.item.passages[reference].token_ids for patch in group]
        lengths = [patch.item.outcomes[reference].n_prompt for patch in group]
        cache = KVCache(len(group), max(lengths))
        fill(model, cache, [tokens[: n - 1] for tokens, n in zip(ids, lengths, strict=True)])
        recorder = Recorder(z=True, layers=layers)
        with model.recording(recorder):
            recorder.begin()
            last = [tokens[n - 1] for tokens, n in zip(ids, lengths, strict=True)]
            model.step(last, cache, [n - 1 for n in lengths], recorder)
            z = torch.stack(
                [recorder.states["z"][layer][:, :, 0].float().cpu() for layer in sorted(layers)], 1
            )
        outputs |= {patch.item.id: tokens for patch, tokens in zip(group, z, strict=True)}
    return outputs


def _subjects(items: Sequence[Item], outputs: Mapping[str, Tensor]) -> Iterator[_HeldOutTask]:
    import torch

    for family in vector_groups(items).values():
        for item in family:
            others = [outputs[other.id] for other in family if other.id != item.id]
            if len(others) >= LEAST - 1:
                yield _HeldOutTask(item, torch.stack(others).mean(0))


def _effects(prompted: PromptingTasks, subject: _HeldOutTask, reference: str, seed: int) -> Iterator[Row]:
    """One row a head: the target's log-probability after the exchanged examples with that head's output replaced."""
    from probe.model.attention import KVCache
    from probe.model.edits import HeadAblation

    token = subject.item.target_token(reference)
    if token is None:
        return
    model, ids = prompted.model, exchanged_ids(prompted, subject.item, reference, seed)
    heads: list[Head | None] = [None]
    heads += [(layer, head) for layer in range(model.facts.n_layers) for head in range(model.facts.n_heads)]
    size, at = min(_ROWS, len(heads)), len(ids) - 1
    cache = KVCache(size, len(ids))
    fill(model, cache, [ids[:-1]] * size)
    for start in range(0, len(heads), size):
        batch = heads[start : start + size]
        edits = [
            [HeadAblation({place[0]: (place[1],)}, at, {place[0]: subject.z[place[0]][[place[1]]]})]
            if place
            else []
            for place in batch
        ]
        with model.recording(None):
            hidden, _ = model.step([ids[-1]] * len(batch), cache, [at] * len(batch), edits=edits)
            log_p = model.unembed(hidden[:, 0]).log_softmax(-1)[:, token].tolist()
        for place, value in zip(batch, log_p, strict=True):
            layer, head = place or (None, None)
            names = {"task_id": subject.item.id, "experiment": "head_effect", "variant": reference}
            yield names | {"layer": layer, "head": head, "target_log_prob": value}


def exchanged_ids(prompted: PromptingTasks, item: Item, reference: str, seed: int) -> list[int]:
    """The prompt of the reference with the outputs of its examples in another order, as few as can be in place."""
    from probe.tasks import render

    task = prompted.opened.tasks[item.id]
    variant = next(candidate for candidate in task.variants if candidate.name == reference)
    changed = msgspec.structs.replace(task, variants=(_exchanged(variant, generator(seed, item.id)),))
    (prompt,) = render(changed, prompted.opened.codec, max_new_tokens=1)
    return list(prompt.token_ids[: prompt.n_prompt])


def _exchanged(variant: Variant, rng: np.random.Generator) -> Variant:
    outputs = [pair.output for pair in variant.examples]
    orders = [rng.permutation(len(outputs)) for _ in range(100)]
    best = min(
        orders, key=lambda order: sum(outputs[k] == output for k, output in zip(order, outputs, strict=True))
    )
    pairs = [
        msgspec.structs.replace(pair, output=outputs[k])
        for k, pair in zip(best, variant.examples, strict=True)
    ]
    return msgspec.structs.replace(variant, examples=tuple(pairs))


def chosen(effects: Sequence[Mapping[Head, float]], count: int) -> list[Head]:
    """The heads with the highest mean effect over tasks."""
    totals: dict[Head, float] = defaultdict(float)
    for by_head in effects:
        for head, value in by_head.items():
            totals[head] += value
    return sorted(totals, key=lambda head: (-totals[head], head))[:count]


def _patches(
    prompted: PromptingTasks,
    subjects: Sequence[_HeldOutTask],
    effects: Mapping[str, Mapping[Head, float]],
    reference: str,
    seed: int,
) -> Iterator[Patch]:
    facts = prompted.model.facts
    every = [(layer, head) for layer in range(facts.n_layers) for head in range(facts.n_heads)]
    count = max(1, min(HEADS, len(every) // 10))
    for half in (0, 1):
        heads = chosen([effect for s in subjects[1 - half :: 2] if (effect := effects[s.item.id])], count)
        if not heads:
            continue
        for subject in subjects[half::2]:
            item = subject.item
            base = prompted.states[item.id, BASE]
            summed = written(prompted, subject.z, heads)
            if summed is None:
                return
            vector = np.broadcast_to(summed, base.shape)
            yield Patch(item, "function_vector", reference, BASE, base + vector)
            drawn = generator(seed, item.id, "heads").choice(len(every), count, replace=False)
            other = written(prompted, subject.z, [every[k] for k in drawn])
            assert other is not None
            other = np.broadcast_to(other, base.shape)
            yield Patch(item, "function_vector_random", reference, BASE, base + as_long(other, vector))


def written(prompted: PromptingTasks, z: Tensor, heads: Sequence[Head]) -> np.ndarray | None:
    """What heads with these outputs z [layer, head, d_head] add to the residual stream together: [d_model].

    None where it passes a norm that is not known (`probe.model.linear.through_post_norm`).
    """
    import torch

    from probe.model.linear import through_post_norm

    model = prompted.model
    total = torch.zeros(model.facts.d_model)
    for layer in sorted({layer for layer, _ in heads}):
        outputs, w_o = z[layer].to(model.device), model.w_o(layer).detach().float()
        sums = sum((outputs[head] @ w_o[head] for at, head in heads if at == layer), torch.zeros(1))
        rows = outputs[:, None].expand(-1, model.facts.d_model, -1)
        through = through_post_norm(model, layer, rows, torch.eye(model.facts.d_model, device=model.device))
        if through is None:
            return None
        total += (through[0] @ sums).cpu()
    return total.numpy()
