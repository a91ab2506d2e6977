"""What experiments would run, before any weights are loaded: conditions and tokens, from a sample of the tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from probe.experiments.cot import knockouts, reasoning
from probe.experiments.loaded_run import LoadedRun
from probe.experiments.registry import EXPERIMENTS
from probe.experiments.tool import attribution, loop, patching, steering
from probe.experiments.tool.conditions import Condition, Effort, Subject
from probe.experiments.tool.decisions import captured_layers, decided, request_halves, spoken
from probe.experiments.tool.directions import DIRECTIONS, TEXTS
from probe.experiments.tool.features import CONDITIONS
from probe.experiments.tool.heads import HeadSets
from probe.experiments.tool.intentions import FIRST_DRAWS, MOST_TOKENS
from probe.runs.records import CotRecord, ToolRecord
from probe.runs.views.chain import Chain
from probe.runs.views.features import LEAST

if TYPE_CHECKING:
    from probe.prompts import Codec
    from probe.runs import Run

_SAMPLE = 12
"""Tasks that are rendered; the rest is taken to be like them."""


def tool_cost(opened: LoadedRun, wanted: Sequence[str], *, again: bool, effort: Effort) -> dict[str, Any]:
    """Of the tool tasks: `tasks`, `conditions`, `tokens` to run, and `ratio` to the tokens of these tasks in the run.

    Intentions, whose text the model writes, count with as many tokens as they may have.
    """
    from probe.model import outline

    run = opened.run
    heads = HeadSets.of(run, effort) if "heads" in wanted else HeadSets()
    todo = loop.missing(run, [name for name in wanted if name != "heads" or heads.sets], again=again)
    if not todo:
        return _told(0, 0, 0, 0)
    outlined = outline(opened.options.model, revision=opened.options.revision, offline=opened.options.offline)
    codec, n_layers = _codec(outlined), outlined["shape"]["n_layers"]
    limit = opened.max_new_tokens("tool_selection")
    sample = _spread(list(todo))
    conditions: list[Condition] = []
    n_intentions = run_tokens = extra = 0
    for task_id in sample:
        record = run[task_id].typed(ToolRecord)
        run_tokens += record.passage.n_prompt + record.passage.n_new
        subject = Subject(opened.tasks[task_id], record, codec, n_layers, limit, effort)
        for name in todo[task_id]:
            if name == "heads":
                conditions += heads.conditions(subject)
            elif name == "intention":
                # Each is drawn, then scored: its own tokens twice, and the opener of the call behind it; controls have no draw.
                listed = len(subject.task.intentions or ())
                n = listed or effort.draws or effort.most_draws
                controls = 0 if listed else 2 * min(n, FIRST_DRAWS)
                n_intentions += n + controls
                extra += n * MOST_TOKENS + (n + controls) * (MOST_TOKENS + subject.prompt.n_opener)
            else:
                conditions += EXPERIMENTS[name].make([subject], None)[0]
    scale = len(todo) / len(sample)
    tokens = _tokens(conditions) + extra
    return _told(len(todo), scale * (len(conditions) + n_intentions), scale * tokens, scale * run_tokens)


def attribution_cost(
    opened: LoadedRun, wanted: Sequence[str], *, again: bool, effort: Effort
) -> dict[str, Any]:
    """Of the tool tasks, as `tool_cost`: each prompt once, where no other shares a part of it, and the names behind it."""
    run = opened.run
    # Heads are chosen by their attribution: what is missing of it is made first, as `attribution.make` does.
    named = dict.fromkeys(["attribution", *wanted])
    todo = {name: attribution.missing(run, name, again=again and name in wanted) for name in named}
    conditions = tokens = run_tokens = 0
    for task_id in dict.fromkeys(task_id for ids in todo.values() for task_id in ids):
        record = run[task_id].typed(ToolRecord)
        run_tokens += record.passage.n_prompt + record.passage.n_new
        if task_id in todo["attribution"]:
            names = {name for pair in attribution.pairs_of(record).values() for name in pair}
            # The last token of a name is never run.
            lengths = [len(e.token_ids) - 1 for e in record.decision.tool_probabilities if e.tool in names]
            conditions, tokens = conditions + len(names), tokens + record.passage.n_prompt + sum(lengths)
        if task_id in todo.get("head_scores", ()):
            conditions, tokens = conditions + 1, tokens + record.passage.n_prompt
    n_tasks = len({task_id for ids in todo.values() for task_id in ids})
    return _told(n_tasks, conditions, tokens, run_tokens)


def patching_cost(opened: LoadedRun, wanted: Sequence[str], *, again: bool, effort: Effort) -> dict[str, Any]:
    """Of pairs of prompts, as `tool_cost`; a patch that begins in a later layer counts by the part of the layers that it runs."""
    from probe.model import outline

    run = opened.run
    outlined = outline(opened.options.model, revision=opened.options.revision, offline=opened.options.offline)
    codec, shape = _codec(outlined), outlined["shape"]
    limit = opened.max_new_tokens("tool_selection")
    bench = patching.PatchingBench(run, opened.tasks, codec, shape["n_layers"], limit, effort)
    ids = patching.missing(run, wanted[0], bench.kind, effort, again=again)
    sample = _spread(ids)
    pairs_by_task = bench.pairs(sample)
    grid = bench.layers(pairs_by_task)
    conditions = tokens = run_tokens = 0.0
    for task_id, pair in pairs_by_task.items():
        passage = run[task_id].typed(ToolRecord).passage
        run_tokens += passage.n_prompt + passage.n_new
        if isinstance(pair, patching.PromptPair):
            for name in wanted:
                n, of_pair = patching.predicted(name, pair, grid, shape)
                conditions, tokens = conditions + n, tokens + of_pair
    scale = len(ids) / len(sample) if sample else 0
    return _told(len(ids), scale * conditions, scale * tokens, scale * run_tokens)


def steering_cost(opened: LoadedRun, wanted: Sequence[str], *, again: bool, effort: Effort) -> dict[str, Any]:
    """Of the tool tasks, as `tool_cost`, were every direction to be had and every choice of the tested half to be turned."""
    from probe.model import outline

    run = opened.run
    records = decided(run) if steering.missing(run, again=again) else {}
    if not records:
        return _told(0, 0, 0, 0)
    outlined = outline(opened.options.model, revision=opened.options.revision, offline=opened.options.offline)
    codec, n_layers = _codec(outlined), outlined["shape"]["n_layers"]
    limit, n_texts = opened.max_new_tokens("tool_selection"), len(TEXTS)
    layers = steering.layers_of(captured_layers(run, records), effort)
    settings = [layer for layer in layers for _ in steering.doses_of(effort) for _ in DIRECTIONS]
    sample = _spread(list(records))
    conditions = tokens = run_tokens = 0
    for task_id in sample:
        record = records[task_id]
        subject = Subject(opened.tasks[task_id], record, codec, n_layers, limit, effort)
        passage, names = record.passage, [c.token_ids for c in subject.prompt.candidates]
        nodes = len({ids[:end] for ids in names for end in range(1, len(ids))})
        first, *_ = spoken(record)
        n_pairs = 1 + (first.tool not in record.right and bool({*record.right} & {*subject.tools}))
        run_tokens += passage.n_prompt + passage.n_new
        conditions += n_pairs * len(settings)
        # Grid; then of the tested half another task for each direction, and a call for each but the random one.
        tokens += passage.n_prompt + n_pairs * len(settings) * (2 + nodes)
        tokens += (passage.n_prompt + n_pairs * (len(DIRECTIONS) - 1) * passage.n_new) // 2
        # Texts run through the blocks above alone.
        tokens += n_pairs * n_texts * sum(n_layers - 1 - layer for layer in settings) // n_layers
    scale = len(records) / len(sample)
    return _told(len(records), scale * conditions, scale * tokens, scale * run_tokens)


def features_cost(opened: LoadedRun, wanted: Sequence[str], *, again: bool, effort: Effort) -> dict[str, Any]:
    """Of the tool tasks, as `tool_cost`: those that can have features to ablate, for which autoencoder is not asked. Were all active."""
    records = decided(opened.run)
    chosen = {task_id: spoken(record)[0].tool for task_id, record in records.items()}
    half = request_halves(opened.tasks, records) if records else {}
    counts = Counter((half[task_id], tool) for task_id, tool in chosen.items())
    todo = [task_id for task_id, tool in chosen.items() if counts[1 - half[task_id], tool] >= LEAST]
    tokens = run_tokens = 0
    for task_id in todo:
        passage = records[task_id].passage
        names = [entry.token_ids for entry in records[task_id].decision.tool_probabilities]
        nodes = len({tuple(ids[:end]) for ids in names for end in range(1, len(ids))})
        run_tokens += passage.n_prompt + passage.n_new
        # What stands before the row that is changed is run once.
        tokens += passage.n_prompt - 1 + len(CONDITIONS) * (1 + nodes)
    return _told(len(todo), len(todo) * len(CONDITIONS), tokens, run_tokens)


def cot_cost(opened: LoadedRun, wanted: Sequence[str], *, again: bool, effort: Effort) -> dict[str, Any]:
    """Of the chains of thought, as `tool_cost`; what writes text is made by name alone and not counted."""
    run = opened.run
    todo = reasoning.missing(run, wanted, again=again)
    if not todo:
        return _told(0, 0, 0, 0)
    sample = _spread(list(todo))
    conditions = tokens = run_tokens = 0
    for task_id in sample:
        chain = Chain(run[task_id].typed(CotRecord))
        names = todo[task_id]
        if {*knockouts.CHANGES} & {*names}:
            tokens += round(knockouts.forwards(chain, names) * len(chain.token_ids))
        if "recurrent_memory" in names:
            tokens += len(chain.token_ids) - 1
        conditions += reasoning.n_conditions(chain, names)
        run_tokens += len(chain.token_ids)
    scale = len(todo) / len(sample)
    return _told(len(todo), scale * conditions, scale * tokens, scale * run_tokens)


COSTS = {
    "tool": tool_cost,
    "attribution": attribution_cost,
    "patching": patching_cost,
    "steering": steering_cost,
    "features": features_cost,
    "cot": cot_cost,
}


def _codec(outlined: Mapping[str, Any]) -> Codec:
    from probe.prompts import Codec

    return Codec(outlined["tokenizer"], outlined["shape"]["n_ctx"])


def _spread(ids: Sequence[str]) -> list[str]:
    """Up to _SAMPLE of them, evenly over the file."""
    count = min(len(ids), _SAMPLE)
    return [ids[number * len(ids) // count] for number in range(count)]


def _tokens(conditions: Sequence[Condition]) -> int:
    """Prompt tokens that are run for these conditions, those of shared prefixes once."""
    from probe.capture import Job, plan_shared

    jobs = [Job(condition.prompt, "", edits=condition.edits) for condition in conditions]
    plan_shared(jobs)
    prefixes = {
        tuple(job.prompt.token_ids[:end]): start
        for job in jobs
        for start, end in zip((0, *job.prefix_ends), job.prefix_ends, strict=False)
    }
    unshared = sum(len(job.prompt.token_ids) - job.shared for job in jobs)
    return unshared + sum(len(ids) - start for ids, start in prefixes.items())


def _told(tasks: int, conditions: float, tokens: float, run_tokens: float) -> dict[str, Any]:
    ratio = round(tokens / run_tokens, 2) if run_tokens else 0.0
    return {"tasks": tasks, "conditions": round(conditions), "tokens": round(tokens), "ratio": ratio}


def cost(run: Run, wanted: Mapping[str, Sequence[str]], *, again: bool, effort: Effort) -> dict[str, Any]:
    """By loop the cost of the wanted experiments. Raises as `LoadedRun`."""
    from probe.harness.runner import SilentProgress

    opened = LoadedRun(run, None, SilentProgress())
    return {
        loop: told
        for loop, names in wanted.items()
        if loop in COSTS and (told := COSTS[loop](opened, names, again=again, effort=effort))["tasks"]
    }
