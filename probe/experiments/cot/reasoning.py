"""Running a run's chains of thought again with one part masked, deleted or replaced: the proof beside the reads.

Tokens are the run's own, never tokenised again. Sources are the question and each step; readers are the later
steps and the answer. Experiments by the name under which they are asked for:

knockouts      `total`: no position behind the source sees its keys, in all layers with attention; later positions are
               computed anew, as if it had never been written. `direct`: only the rows that emit the answer do not see
               it; what later steps copied from it stays.
state_knockouts, joint_knockouts: the same of the state of recurrent layers (`state_total`, `state_direct`), and of both
               kinds of layers at once (`both_total`, `both_direct`).
deletions      `deleted`: the source's tokens are not there, so what follows moves up. Positions change as well.
read_logit, answer_lens: `probe.experiments.cot.lens`
recurrent_memory: `probe.experiments.cot.recurrent_memory`
early_answer, filler, mistake: `probe.experiments.cot.faithfulness`
paraphrase, resampling, regenerated: `probe.experiments.cot.rewriting`

The control of knock-outs and deletions is the same change of a random span of the same length (`random_total`, …), which lies
between the sink and the answer and shares no position with the source. Up to four sources of one size share a span.
By default deletions run only while everything together stays below AFFORDABLE forwards.

Columns of reasoning.parquet: `source` the label acted upon (null: `base`, nothing changed); `start`, `n_tokens`
the positions that are masked or deleted; `kept` how many steps are kept; `n_rows` over how many rows `kl` is a
mean: those of the reader's rows that lie behind the change; `kl` = KL(base‖changed) over the whole vocabulary,
nats; `log_prob` = Σ log P of the reader's own tokens, nats; `said` what the model answers instead, `same` whether
that is the run's answer, `score` whether it is the right one; `layer` and `value` belong to `lens`, `recurrent_memory` and
`rewriting`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from probe.experiments.cot.chain_bench import ChainBench, Row
from probe.experiments.cot.knockouts import CHANGES, forwards, n_changes
from probe.experiments.registry import EXPERIMENTS
from probe.prompts.labels import UNCHANGED
from probe.runs.read import finished
from probe.runs.records import CotRecord
from probe.runs.views.chain import Chain

if TYPE_CHECKING:
    from probe.experiments.loaded_run import LoadedRun
    from probe.experiments.tool.conditions import Effort
    from probe.harness.runner import Progress
    from probe.runs import Run

_WRITE = 8
"""Chains after which the table is written, so that a kill costs little; of many a quarter, since all of it is written."""
AFFORDABLE = 40
"""Forwards of the whole sequence, in tokens: deletions that would pass it run only if named."""


def make(
    opened: LoadedRun, wanted: Sequence[str], *, again: bool, effort: Effort, progress: Progress
) -> list[str]:
    """Make what is missing of the wanted experiments, or all of them again; returns what was made."""
    todo = missing(opened.run, wanted, again=again)
    if todo:
        _make(opened, todo, effort, progress)
    return [name for name in wanted if any(name in names for names in todo.values())]


def missing(run: Run, wanted: Sequence[str], *, again: bool) -> dict[str, list[str]]:
    """task id → what to make, for the chains of thought that have a source and a reader of it."""
    table = run.table("reasoning", arrow=True)
    stored = set(zip(table["task_id"].to_pylist(), table["experiment"].to_pylist(), strict=True))
    todo = {}
    for task in finished(run, "cot"):
        chain = Chain(task.typed(CotRecord))
        if any(chain.readers(source) for source in chain.sources):
            names = [name for name in wanted if again or (task.id, EXPERIMENTS[name].rows[0]) not in stored]
            if not again and "deletions" in names and forwards(chain, wanted) > AFFORDABLE:
                names.remove("deletions")
            if names:
                todo[task.id] = names
    return todo


def n_conditions(chain: Chain, names: Sequence[str]) -> int:
    """Changes of a chain that these experiments run; an experiment that changes no part of it counts once."""
    return n_changes(chain, names) + len({*names} - {*CHANGES})


def _make(opened: LoadedRun, todo: Mapping[str, Sequence[str]], effort: Effort, progress: Progress) -> None:
    import pyarrow as pa

    run, bench = opened.run, ChainBench(opened, effort)
    progress.log(f"running {len(todo)} chains of thought with parts masked")
    changes = {
        task_id: n_conditions(Chain(run[task_id].typed(CotRecord)), names) for task_id, names in todo.items()
    }
    progress.start(sum(changes.values()), "conditions")
    table = run.table("reasoning", arrow=True)
    by_task: dict[str, list[Row]] = defaultdict(list)
    for row in table.to_pylist():
        by_task[row["task_id"]].append(row)
    written = number = 0

    def write() -> None:
        rows = [row for kept in by_task.values() for row in kept]
        run.write_table("reasoning", pa.Table.from_pylist(rows, schema=table.schema))

    try:
        for number, (task_id, names) in enumerate(todo.items(), 1):
            task = run[task_id]
            chain = Chain(task.typed(CotRecord))
            rows: list[Row] = []
            tokens = 0
            for make in dict.fromkeys(EXPERIMENTS[name].make for name in names):
                asked = [name for name in names if EXPERIMENTS[name].make is make]
                new, n_tokens = make(bench, chain, task, asked)
                rows, tokens = rows + new, tokens + n_tokens
            replaced = {
                *([UNCHANGED] if any(row["experiment"] == UNCHANGED for row in rows) else []),
                *(row for name in names for row in EXPERIMENTS[name].rows),
            }
            kept = [row for row in by_task[task_id] if row["experiment"] not in replaced]
            blank = dict.fromkeys(table.column_names)
            by_task[task_id] = kept + [blank | row | {"task_id": task_id} for row in rows]
            progress.done(tokens, changes[task_id])
            if number - written >= max(_WRITE, written // 4):
                write()
                written = number
    finally:
        if number > written:
            write()


# -- knock-outs and deletions --------------------------------------------------------------------------------------
