"""What the reads and the residual stream of a saved chain of thought say in logits: they need W_O and the
unembedding, which a run does not hold, but nothing is run again.

read_logit   direct logit attribution of the reads by source: the part of the logit of each emitted token that the
             values of a source step bring straight to the unembedding, summed over heads; by layer and in all
answer_lens  logit lens: log P of the answer's first token, had the model stopped at a layer, in the last row of
             each step

Rows of the table: `source`, `reader`, `layer` (null: the sum over layers) and `value` in logits for `read_logit`;
`reader`, `layer` and `log_prob` in nats for `answer_lens`, where the reader `question` is the row before the first
step, and `start` the row's position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from probe.experiments.registry import experiment
from probe.prompts.labels import ANSWER, QUESTION
from probe.runs.records import PassageRecord

if TYPE_CHECKING:
    from torch import Tensor

    from probe.experiments.cot.chain_bench import ChainBench, Row
    from probe.model.hooked import Model
    from probe.prompts import Codec
    from probe.runs import TaskRun
    from probe.runs.views.chain import Chain

_ELEMENTS = 1 << 24
"""Elements of [head, row, position] held at a time."""
_ROWS = 128


def read_logits(
    task: TaskRun, model: Model, head: int | None = None
) -> tuple[list[int], list[int], list[str], Tensor] | None:
    """(layers, positions of rows, labels, [layer, row, label]): logits that each source brings in each row.

    Σ_{j∈label} α_j v_j W_O u, with u the direction of the token that the row emitted, final norm (and a norm behind
    the attention) at their frozen scale; before any softcap. Summed over heads, or of one head. None where queries,
    keys, values, reads and the residual stream behind the last layer were not all captured, and for a norm that `probe.model.norms` does not know.
    """
    import torch

    from probe.maths.reads import pattern, read, written_along
    from probe.model.linear import logit_directions, through_post_norm

    sites = ("queries", "keys", "values", "resid_post")
    if not all(site in task for site in sites):
        return None
    layers = task.layers("resid_post")
    if layers[-1] != model.facts.n_layers - 1:
        return None
    passage, rows = task.typed(PassageRecord).passage, task["rows"]
    labels = list(dict.fromkeys(span.label for span in passage.spans))
    emitted = [passage.token_ids[position + 1] for position in rows.tolist()]
    stored = {site: task.slice(site) for site in sites}
    directions = logit_directions(model, stored["resid_post"][len(layers) - 1], emitted)
    if directions is None:
        return None
    direction, n_run = directions[0], task.shape("keys")[2]
    member = torch.zeros(n_run, len(labels))
    for span in passage.spans:
        member[span.start : span.end, labels.index(span.label)] = 1
    out = torch.zeros(len(layers), len(rows), len(labels))
    block = max(1, _ELEMENTS // (model.facts.n_heads * n_run))
    for index, layer in enumerate(layers):
        queries, keys, values = (stored[site][index].float() for site in sites[:3])
        fact, sink, w_o = model.facts.attention_of(layer), model.sinks[layer], model.w_o(layer).float().cpu()
        for start in range(0, len(rows), block):
            at = slice(start, start + block)
            n_keys = min(n_run, int(rows[at].max()) + 1)
            seen_keys, seen_values = keys[:, :n_keys], values[:, :n_keys]
            alpha = pattern(queries[:, at], seen_keys, rows[at], fact, None if sink is None else sink.cpu())
            z = read(alpha, seen_values)
            through = through_post_norm(model, layer, z.to(model.device), direction[at])
            if through is None:
                return None
            written = written_along(alpha, seen_values, w_o, through[0].float().cpu())
            total = written.sum(0) if head is None else written[head]
            out[index, at] = total @ member[:n_keys]
    return layers, rows.tolist(), labels, out


@experiment(
    "cot",
    "read_logit",
    requires="reads",
    changes="nothing: the saved reads are multiplied with W_O and the unembedding",
    asks="What of an emitted token's logit comes straight from a source?",
    cost="nothing is run",
)
def _read_logit(
    bench: ChainBench, chain: Chain, task: TaskRun, _names: Sequence[str]
) -> tuple[list[Row], int]:
    return list(read_logit_rows(chain, task, bench.model)), 0


@experiment(
    "cot",
    "answer_lens",
    changes="nothing: the saved residual stream of each layer is unembedded",
    asks="From which step and layer on is the answer decodable?",
    cost="nothing is run",
)
def _answer_lens(
    bench: ChainBench, chain: Chain, task: TaskRun, _names: Sequence[str]
) -> tuple[list[Row], int]:
    return list(answer_lens_rows(chain, task, bench.model, bench.codec)), 0


def read_logit_rows(chain: Chain, task: TaskRun, model: Model) -> Iterator[Row]:
    """One row a reader, source and layer, and one with the sum over the layers; means over the reader's rows."""
    reads = read_logits(task, model)
    if reads is None:
        return
    layers, positions, labels, logits = reads
    row_of = {position: row for row, position in enumerate(positions)}
    first = {label: min(s.start for s in chain.record.passage.spans if s.label == label) for label in labels}
    for part in [*chain.steps, *([chain.answer] if chain.answer else [])]:
        emitting = [p - 1 for p in range(part.start, part.end) if p >= chain.n_prompt]
        if not emitting or not all(position in row_of for position in emitting):
            continue
        rows = [row_of[position] for position in emitting]
        means = logits[:, rows].double().mean(1)
        for column, label in enumerate(labels):
            if first[label] > positions[rows[-1]]:
                continue
            common = {"experiment": "read_logit", "source": label, "reader": part.label, "n_rows": len(rows)}
            for index, layer in enumerate(layers):
                yield common | {"layer": layer, "value": float(means[index, column])}
            yield common | {"value": float(means[:, column].sum())}


def answer_lens_rows(chain: Chain, task: TaskRun, model: Model, codec: Codec) -> Iterator[Row]:
    """One row a step and layer: log P of the answer's first token that is not blank, nats.

    The last row of a step is the one that emits what follows it; the reader `answer` is the row that emits the
    token itself. The model's own final norm, scale and softcap are applied.
    """
    import torch

    from probe.model.norms import final_norm_module

    norm = final_norm_module(model)
    if chain.answer is None or norm is None or "resid_post" not in task:
        return
    spoken = range(chain.answer.start, chain.answer.end)
    place = next((p for p in spoken if codec.decode([chain.token_ids[p]]).strip()), None)
    if place is None:
        return
    row_of = {int(position): row for row, position in enumerate(task["rows"])}
    readers = [(QUESTION, chain.n_prompt - 1), *((step.label, step.end - 1) for step in chain.steps)]
    readers = [(label, p) for label, p in [*readers, (ANSWER, place - 1)] if p in row_of]
    resid = task["resid_post"][:, [row_of[p] for _, p in readers]].to(model.device)
    flat, log_probs = resid.flatten(0, 1), []
    with torch.inference_mode():
        for start in range(0, len(flat), _ROWS):
            logits = model.unembed(norm(flat[start : start + _ROWS]))
            log_probs.append((logits[:, chain.token_ids[place]] - logits.logsumexp(-1)).double().cpu())
    by_layer = torch.cat(log_probs).view(resid.shape[:2])
    for index, layer in enumerate(task.layers("resid_post")):
        for column, (label, position) in enumerate(readers):
            log_prob = float(by_layer[index, column])
            yield {"experiment": "answer_lens", "reader": label, "layer": layer, "log_prob": log_prob} | {
                "n_rows": 1,
                "start": position,
            }
