"""Why a head looks where it looks: its score before the softmax, split by what its query and its key read.

The heads with the largest mean attribution in the first two candidates (`attribution`), at the row that emits the first token of
the name, towards the descriptions of the two. The score towards a span is Σ_j a_j s_j over its positions, s the score before
any softcap and a the head's attention within the span, held; norms are held at their scale (`probe.model.scores`), so that it is
a sum over what earlier layers wrote at the query's row, and again over what they wrote at the keys.

Rows of attribution.parquet: `part` is `score`, or the side `query` or `key` of which `label` says what wrote it (`embedding`,
`attention`, `mlp`, `bias`) and `writer` in which layer; `layer`, `head` and `source` (`tool`, `other_tool`) say which score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from probe.experiments.registry import experiment
from probe.experiments.tool.attribution import FIRST_TWO, AttributionBench, Row, pairs_of
from probe.prompts.labels import tool_label
from probe.runs.records import ToolRecord

HEADS = 6


@experiment(
    "tool",
    requires="reads",
    loop="attribution",
    changes=f"nothing: the scores of the {HEADS} heads with the largest `attribution` towards the two descriptions are split by "
    "what their queries and keys read",
    asks="Why does a head look there?",
    cost="the prompt once, unshared, and the attention of the heads' layers for each part",
    by_name=True,
)
def head_scores(bench: AttributionBench, task_ids: Sequence[str]) -> Iterator[tuple[str, list[Row]]]:
    """(task id, rows) of each task. The heads are chosen over all tasks that have an attribution."""
    heads = largest(bench.opened.run.table("attribution"))
    bench.progress.start(len(task_ids), "prompts")
    for task_id in task_ids:
        subject = bench.subject(task_id)
        pair = pairs_of(bench.opened.run[task_id].typed(ToolRecord))[FIRST_TWO]
        yield task_id, list(_rows(bench, subject, pair, heads))
        bench.progress.done(subject.prompt.n_prompt, 1)


def largest(table: Any) -> list[tuple[int, int]]:
    """(layer, head) of the heads with the largest mean attribution, by layer."""
    rows = table[(table["part"] == "attention") & (table["pair"] == FIRST_TWO)]
    by_task = rows.groupby(["layer", "head", "task_id"])["value"].sum()
    means = by_task.groupby(["layer", "head"]).mean().abs().sort_values(ascending=False, kind="stable")
    return sorted((int(layer), int(head)) for layer, head in means.index[:HEADS])


def _rows(bench: AttributionBench, subject, pair, heads: Sequence[tuple[int, int]]) -> Iterator[Row]:
    import torch

    from probe.model.scores import Writes

    prompt, model = subject.prompt, bench.opened.model
    places = {
        source: [
            p for span in prompt.spans if span.label == tool_label(name) for p in range(span.start, span.end)
        ]
        for source, name in (("tool", pair[0]), ("other_tool", pair[1]))
        if name is not None
    }
    places = {source: positions for source, positions in places.items() if positions}
    row = prompt.n_prompt - 1
    positions = [*(p for of_source in places.values() for p in of_source), row]
    writes = Writes(model, prompt.token_ids[: prompt.n_prompt], {layer for layer, _ in heads})
    common = {"task_id": subject.task.id, "experiment": "head_scores", "pair": FIRST_TWO}
    common |= {"tool": pair[0], "other": pair[1]}
    for layer in dict.fromkeys(layer for layer, _ in heads):
        queries, keys = writes.read(layer, positions)
        facts = model.facts.attention_of(layer)
        group = model.facts.n_heads // keys.shape[1]
        names = [*writes.names[: 1 + 2 * layer], ("bias", None)]
        for head in (head for of_layer, head in heads if of_layer == layer):
            query, key = queries[:, head, -1].double() * facts.scale, keys[:, head // group].double()
            first = 0
            for source, of_source in places.items():
                at, first = slice(first, first + len(of_source)), first + len(of_source)
                scores = key.sum(0)[at] @ query.sum(0)
                seen = scores if facts.softcap is None else facts.softcap * torch.tanh(scores / facts.softcap)
                query_at, keys_at = torch.tensor([row]), torch.tensor(of_source)
                if facts.alibi is not None:
                    seen = seen + facts.alibi.bias(query_at, keys_at)[head, 0].to(seen)
                far = (keys_at < facts.first_seen(query_at)).to(seen.device)
                if bool(far.all()):
                    continue
                seen = seen.masked_fill(far, float("-inf"))
                mean_key = torch.einsum("j,pjd->pd", seen.softmax(0), key[:, at])
                place = common | {"layer": layer, "head": head, "source": source}
                yield place | {"part": "score", "value": float(mean_key.sum(0) @ query.sum(0))}
                sides = {"query": query @ mean_key.sum(0), "key": mean_key @ query.sum(0)}
                for side, values in sides.items():
                    for (label, writer), value in zip(names, np.asarray(values.cpu()), strict=True):
                        yield place | {"part": side, "label": label, "writer": writer, "value": float(value)}
