"""Direct logit attribution of a choice: the log-odds of two whole names as a sum over what wrote them.

Nothing is changed: the prompt is run with each name behind it, and log P of every token of the name is taken apart at the
row that emits it, with the norms on the way held at their scale (Elhage et al. 2021, "A mathematical framework for
transformer circuits"; Wang et al. 2023, section 3.1). A head's part is taken apart further by the positions that it reads,
through v W_O. Counted are the paths that go from a component straight to the unembedding; what later components make of
it is theirs.

Exact: log P(name) = Σ over its rows of direction · resid + biases − H (`probe.model.linear.LinearLogProb`), and the residual
stream is the embedding plus what every block's attention and MLP added. Where two names part they share a row, so that
the difference is that of two logits. Behind it each name has rows of its own, whose entropies H do not cancel: they
are the part `normalizer`, which no component writes. What is left is rounding, the part `remainder`.

Pairs: `first_two`, the most probable candidate against the second; `chosen_right`, the most probable one against the most
probable right one, where that is another. Candidates are whole names as they are scored; no tool is one where it is listed.
Positive is for the first of the pair.

Columns of attribution.parquet: `tool`, `other` the two, null for no tool; `part` one of

log_odds            log P(tool) − log P(other), nats: what the others sum to, `span`, `position` and `word` aside
embedding           what enters the first block: tokens and, where they are added, positions
attention           what a `head` of a `layer` read of a `source`, through W_O
attention_bias      the bias of W_O, and of a norm behind it
mlp                 all else that a block adds: its MLP
final_norm_bias, unembedding_bias, normalizer, remainder
span                the same reads, all heads of a layer together, by span: `label` and first position `start`
word                the same reads, all layers together, of each word of a message: `word`, `word_index`; a token that
                    carries two words counts for both

`source` is what a span is to the pair: `tool` and `other_tool`, their descriptions; `tools`, the other descriptions;
`user`, the last message that is no system's; `earlier`, messages before it; `name`, the tokens of the name itself; else its label.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.errors import ModelUnavailable
from probe.experiments.registry import EXPERIMENTS, experiment
from probe.experiments.tool.conditions import Effort, Subject
from probe.prompts import Span, words_of
from probe.prompts.labels import USER, tool_label, tool_of
from probe.runs.read import finished
from probe.runs.records import ToolRecord

if TYPE_CHECKING:
    import pyarrow
    from torch import Tensor

    from probe.capture import Job
    from probe.capture.prefill import PartResult
    from probe.experiments.loaded_run import LoadedRun
    from probe.harness.runner import Progress
    from probe.model.attention import KVCache
    from probe.model.hooked import Model
    from probe.model.linear import LinearLogProb
    from probe.prompts import Codec, Prompt
    from probe.runs import Run
    from probe.runs.tables import TableName

NAME = "name"
"""Source of what is read from the tokens of the name itself."""
FIRST_TWO, CHOSEN_RIGHT = "first_two", "chosen_right"
_WRITE = 20
"""Tasks after which the table is written, so that a kill costs little; of many a quarter, since all of it is written."""
_PREFIX_BYTES = 1 << 28

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class NameParts:
    """log P of one name, nats, as a sum: of scalars, and of parts by layer. float64."""

    log_prob: float
    scalars: dict[str, float]
    mlp: np.ndarray
    """[layer]"""
    attention_bias: np.ndarray
    """[layer]"""
    attention: np.ndarray
    """[layer, head, span]: spans of the prompt, then that of the name"""
    positions: np.ndarray
    """[position of the prompt]: the reads of all heads and layers"""

    def less(self, other: NameParts) -> NameParts:
        """The parts of the difference."""
        return NameParts(
            self.log_prob - other.log_prob,
            {name: value - other.scalars[name] for name, value in self.scalars.items()},
            *(
                getattr(self, name) - getattr(other, name)
                for name in ("mlp", "attention_bias", "attention", "positions")
            ),
        )

    @property
    def remainder(self) -> float:
        parts = (self.mlp, self.attention_bias, self.attention)
        return self.log_prob - sum(self.scalars.values()) - sum(float(part.sum()) for part in parts)


class NameWriter:
    """Takes names behind prompts apart; prefixes that prompts share are run once."""

    def __init__(self, model: Model, codec: Codec):
        from probe.capture import Capturer, CaptureSpec, Generation
        from probe.capture.prefixes import Prefixes

        self.model = model
        self._capturer = Capturer(
            model,
            codec,
            CaptureSpec(frozenset()),
            Generation(1),
            Prefixes(_PREFIX_BYTES),
            keep=("embedding", "resid", "queries", "z"),
        )

    def parts(self, jobs: Sequence[Job]) -> Iterator[tuple[list[int], list[NameParts | None], int]]:
        """Batch by batch (indices of jobs, the parts of each, tokens run), from jobs of `name_job`.

        None where the numbers are not finite. Raises ModelUnavailable for a model whose norms are not known.
        """
        from probe.capture import plan_shared
        from probe.experiments.tool.score import batches

        order, prefixes = plan_shared(jobs), self._capturer.prefixes
        prefixes.expect(jobs)
        for batch in batches(self.model, jobs, order):
            before = prefixes.tokens_run
            asked = [jobs[index] for index in batch]
            results, cache = self._capturer.prefill(asked)
            tokens = sum(len(job.prompt.token_ids) - job.shared for job in asked)
            yield batch, self._parts(asked, results, cache), tokens + prefixes.tokens_run - before

    def _parts(
        self, jobs: Sequence[Job], results: Sequence[PartResult], cache: KVCache
    ) -> list[NameParts | None]:
        import torch

        from probe.model.linear import linear_log_probs

        names = [job.prompt.candidates[0].token_ids for job in jobs]
        last = self.model.facts.n_layers - 1
        resid = [torch.cat(result.states["resid"][last]) for result in results]
        hidden = [torch.cat(result.hidden)[-len(ids) :] for result, ids in zip(results, names, strict=True)]
        form = linear_log_probs(
            self.model, torch.cat(resid), torch.cat(hidden), [token for ids in names for token in ids]
        )
        parts: list[NameParts | None] = []
        start = 0
        for row, (job, result, ids) in enumerate(zip(jobs, results, names, strict=True)):
            at, start = slice(start, start + len(ids)), start + len(ids)
            if form is not None and not bool(torch.isfinite(form.log_prob[at]).all()):
                parts.append(None)
                continue
            taken = None if form is None else self._of_name(job.prompt, result, cache, row, form, at)
            if taken is None:
                raise ModelUnavailable(
                    f"{self.model.source.name}: a norm behind its blocks or their attention is none that probe knows: its "
                    "logits are no sums of what the components write"
                )
            parts.append(taken)
        return parts

    def _of_name(
        self, prompt: Prompt, result: PartResult, cache: KVCache, row: int, form: LinearLogProb, at: slice
    ) -> NameParts | None:
        import torch

        model, facts = self.model, self.model.facts
        states = {
            name: {layer: torch.cat(kept).to(model.device) for layer, kept in by_layer.items()}
            for name, by_layer in result.states.items()
        }
        direction = form.direction[at]

        def along(written: Tensor) -> float:
            return float((direction * written.double()).sum())

        spans = [*prompt.spans, Span(NAME, prompt.n_prompt, len(prompt.token_ids))]
        column = torch.repeat_interleave(
            torch.arange(len(spans)), torch.tensor([span.end - span.start for span in spans])
        ).to(model.device)
        n_keys, first = len(prompt.token_ids), prompt.n_prompt - 1
        positions = torch.arange(first, n_keys, device=model.device)
        attention = torch.zeros(
            facts.n_layers, facts.n_heads, len(spans), dtype=torch.float64, device=model.device
        )
        by_position = torch.zeros(n_keys, dtype=torch.float64, device=model.device)
        bias, mlp = np.zeros(facts.n_layers), np.zeros(facts.n_layers)
        before = states["embedding"][0]
        scalars = {
            "embedding": along(before),
            "final_norm_bias": float(form.norm_bias[at].sum()),
            "unembedding_bias": float(form.unembedding_bias[at].sum()),
            "normalizer": -float(form.entropy[at].sum()),
        }
        with torch.inference_mode():
            for layer in range(facts.n_layers):
                reads = self._reads(layer, states, cache, row, positions, direction)
                if reads is None:
                    return None
                by_head, constant = reads
                attention[layer].index_add_(1, column, by_head)
                by_position += by_head.sum(0)
                bias[layer] = constant
                after = states["resid"][layer]
                mlp[layer] = along(after.double() - before.double()) - float(by_head.sum()) - constant
                before = after
        return NameParts(
            float(form.log_prob[at].sum()),
            scalars,
            mlp,
            bias,
            attention.cpu().numpy(),
            by_position[: prompt.n_prompt].cpu().numpy(),
        )

    def _reads(
        self,
        layer: int,
        states: Mapping[str, Mapping[int, Tensor]],
        cache: KVCache,
        row: int,
        positions: Tensor,
        direction: Tensor,
    ) -> tuple[Tensor, float] | None:
        """What each head reads of each position, along the directions of the rows and summed over these: [head, position],
        float64; and what biases add."""
        from probe.maths.reads import pattern, written_along
        from probe.model.linear import through_post_norm

        model, n_keys = self.model, int(positions[-1]) + 1
        queries, z = (states[name][layer].transpose(0, 1) for name in ("queries", "z"))
        through = through_post_norm(model, layer, z, direction)
        if through is None:
            return None
        keys, values = (
            store[layer][row, :, :n_keys].to(model.device) for store in (cache.keys, cache.values)
        )
        sink = model.sinks[layer]
        alpha = pattern(
            queries,
            keys,
            positions,
            model.facts.attention_of(layer),
            None if sink is None else sink.to(model.device),
        )
        w_o = model.w_o(layer).to(model.device).float()
        written = written_along(alpha, values, w_o, through[0].float())
        return written.double().sum(1), float(through[1].sum())


def name_job(prompt: Prompt, candidate: int, task_id: str) -> Job:
    """The prompt with one of its candidates forced behind it, up to the row that emits the name's last token."""
    from dataclasses import replace

    from probe.capture import Job

    chosen = prompt.candidates[candidate]
    token_ids = [*prompt.token_ids[: prompt.n_prompt], *chosen.token_ids[:-1]]
    return Job(replace(prompt, token_ids=token_ids, candidates=(chosen,)), task_id)


# -- pairs ---------------------------------------------------------------------------------------------------------


def pairs_of(record: ToolRecord) -> dict[str, tuple[str | None, str | None]]:
    """Pair → (tool, other), of the candidates whose names are scored."""
    entries = [entry for entry in record.decision.tool_probabilities if entry.token_ids]
    ranked = [entry.tool for entry in sorted(entries, key=lambda entry: -entry.log_prob)]
    right = next((name for name in ranked if name in record.right), ranked[0] if ranked else None)
    pairs = {FIRST_TWO: (ranked[0], ranked[1])} if len(ranked) > 1 else {}
    return pairs | ({CHOSEN_RIGHT: (ranked[0], right)} if pairs and right != ranked[0] else {})


def sources(prompt: Prompt, tool: str | None, other: str | None) -> list[str]:
    """What each span of the prompt, and that of the name behind them, is to a pair."""
    last = max((number for number, span in enumerate(prompt.spans) if span.label == USER), default=None)
    named = {tool_label(name): source for name, source in ((tool, "tool"), (other, "other_tool")) if name}

    def source(number: int, label: str) -> str:
        if label == USER and number != last:
            return "earlier"
        return "tools" if label not in named and tool_of(label) is not None else named.get(label, label)

    return [*(source(number, span.label) for number, span in enumerate(prompt.spans)), NAME]


def pair_rows(
    parts: NameParts, subject: Subject, pair: str, tool: str | None, other: str | None
) -> list[Row]:
    """The rows of a pair, from the parts of its difference."""
    prompt = subject.prompt
    common = {
        "task_id": subject.task.id,
        "experiment": "attribution",
        "pair": pair,
        "tool": tool,
        "other": other,
    }
    of_span = sources(prompt, tool, other)
    names = list(dict.fromkeys(of_span))
    member = np.array([[name == source for name in names] for source in of_span], np.float64)
    by_source = parts.attention @ member
    rows: list[Row] = [{"part": "log_odds", "value": parts.log_prob}]
    rows += [{"part": name, "value": value} for name, value in parts.scalars.items()]
    for part in ("mlp", "attention_bias"):
        rows += [
            {"part": part, "layer": layer, "value": value} for layer, value in enumerate(getattr(parts, part))
        ]
    rows += [
        {"part": "attention", "layer": layer, "head": head, "source": names[column], "value": value}
        for (layer, head, column), value in np.ndenumerate(by_source)
    ]
    spans = [*prompt.spans, Span(NAME, prompt.n_prompt, prompt.n_prompt)]
    rows += [
        {"part": "span", "layer": layer, "source": of_span[column], "value": value}
        | {"label": spans[column].label, "start": spans[column].start}
        for (layer, column), value in np.ndenumerate(parts.attention.sum(1))
    ]
    rows.append({"part": "remainder", "value": parts.remainder})
    rows += _word_rows(parts, subject, of_span)
    return [common | row for row in rows]


def _word_rows(parts: NameParts, subject: Subject, of_span: Sequence[str]) -> Iterator[Row]:
    texts = [message.content for message in subject.task.messages if message.role != "system"]
    for span, source in zip(subject.prompt.spans, of_span, strict=False):
        if span.label != USER:
            continue
        # A short message may stand within a longer one: the span is the message with most words in it.
        by_text = (words_of(subject.prompt, subject.codec, span, text) for text in texts)
        words = max(by_text, key=len, default=[])
        for index, (text, start, end) in enumerate(words):
            value = float(parts.positions[start:end].sum())
            yield {
                "part": "word",
                "source": source,
                "label": span.label,
                "start": span.start,
                "value": value,
            } | {
                "word": text,
                "word_index": index,
            }


# -- the loop ------------------------------------------------------------------------------------------------------


@dataclass
class AttributionBench:
    """What takes names apart, and what a task is."""

    opened: LoadedRun
    effort: Effort
    progress: Progress

    def subject(self, task_id: str) -> Subject:
        record = self.opened.run[task_id].typed(ToolRecord)
        limit = self.opened.max_new_tokens("tool_selection")
        n_layers = self.opened.model.facts.n_layers
        return Subject(self.opened.tasks[task_id], record, self.opened.codec, n_layers, limit, self.effort)


@experiment(
    "tool",
    requires="reads",
    loop="attribution",
    changes="nothing: the log-odds of two names are taken apart into what each layer's heads and MLP wrote, and heads by what "
    "they read",
    asks="Which components write the choice, and from where?",
    cost="the prompt once, and each of 2 or 3 names behind it",
)
def attribution(bench: AttributionBench, task_ids: Sequence[str]) -> Iterator[tuple[str, list[Row]]]:
    """(task id, rows) of each task, as soon as its last name was run."""
    pairs = {task_id: pairs_of(bench.opened.run[task_id].typed(ToolRecord)) for task_id in task_ids}
    subjects = {task_id: bench.subject(task_id) for task_id in task_ids}
    asked: list[tuple[str, str | None]] = []
    jobs: list[Job] = []
    for task_id, subject in subjects.items():
        spoken = [candidate.name for candidate in subject.prompt.candidates]
        for name in dict.fromkeys(name for pair in pairs[task_id].values() for name in pair):
            asked.append((task_id, name))
            jobs.append(name_job(subject.prompt, spoken.index(name), task_id))
    waiting = Counter(task_id for task_id, _ in asked)
    held: dict[str, dict[str | None, NameParts | None]] = defaultdict(dict)
    bench.progress.start(len(jobs), "names")
    for batch, parts, tokens in NameWriter(bench.opened.model, bench.opened.codec).parts(jobs):
        for index, of_name in zip(batch, parts, strict=True):
            task_id, name = asked[index]
            held[task_id][name] = of_name
            waiting[task_id] -= 1
            if not waiting[task_id]:
                names = held.pop(task_id)
                rows: list[Row] = []
                for pair, (tool, other) in pairs[task_id].items():
                    first, second = names[tool], names[other]
                    if first is not None and second is not None:
                        rows += pair_rows(first.less(second), subjects[task_id], pair, tool, other)
                yield task_id, rows
        bench.progress.done(tokens, len(batch))


def make(
    opened: LoadedRun, wanted: Sequence[str], *, again: bool, effort: Effort, progress: Progress
) -> list[str]:
    """Make what is missing of the wanted experiments, or all of them again; returns what was made."""
    bench, completed = AttributionBench(opened, effort, progress), []
    # Heads are chosen by their attribution: what is missing of it is made, whoever named it.
    for name in dict.fromkeys(["attribution", *wanted]):
        todo = missing(opened.run, name, again=again and name in wanted)
        if todo:
            progress.log(f"{name}: {len(todo)} tasks")
            try:
                _make(bench, name, todo)
            except ModelUnavailable as fault:
                if again:  # it was named
                    raise
                progress.log(f"no {name}: {fault}")
                return completed
            completed.append(name)
    return completed


def missing(run: Run, name: str, *, again: bool) -> list[str]:
    """The tasks with a pair that have no rows of an experiment yet."""
    table = run.table("attribution", arrow=True)
    stored = (
        set()
        if again
        else {
            task_id
            for task_id, entry in zip(
                table["task_id"].to_pylist(), table["experiment"].to_pylist(), strict=True
            )
            if entry == name
        }
    )
    # Those of the other experiments on tools, whose masks stand beside: a truncated task has none.
    records = ((task.id, task.typed(ToolRecord)) for task in finished(run, "tool_selection"))
    return [
        task_id
        for task_id, record in records
        if record.status == "ok" and task_id not in stored and pairs_of(record)
    ]


def _make(bench: AttributionBench, name: str, todo: Sequence[str]) -> None:
    import pyarrow.compute as pc

    run = bench.opened.run
    kept = run.table("attribution", arrow=True)
    kept = kept.filter(~((pc.field("experiment") == name) & pc.field("task_id").isin(list(todo))))
    add_rows(run, "attribution", kept, EXPERIMENTS[name].make(bench, todo))


def add_rows(
    run: Run, name: TableName, kept: pyarrow.Table, by_task: Iterable[tuple[str, Sequence[Row]]]
) -> None:
    """Write a table of the run as the (task id, rows) behind its kept rows come, and what there is where they stop."""
    import pyarrow as pa

    new: list[pyarrow.Table] = []
    written = 0
    blank = dict.fromkeys(kept.column_names)
    try:
        for _, rows in by_task:
            new.append(pa.Table.from_pylist([blank | row for row in rows], schema=kept.schema))
            if len(new) - written >= max(_WRITE, written // 4):
                run.write_table(name, pa.concat_tables([kept, *new]))
                written = len(new)
    finally:
        if len(new) > written:
            run.write_table(name, pa.concat_tables([kept, *new]))
