"""What the steps of a chain of thought do to the states of recurrent layers, whose weights a run does not hold.

state_error    max |c − o| / max |o| of a layer's outputs in the rows of a reader, rebuilt from the state at its start
state_norm     ‖S‖ behind the reader; of reader `question` before the first step
state_change   ‖S − S′‖ / ‖S′‖ of a step, S′ the state before it

Rows of the table: `reader`, `layer`, `n_rows` (positions of the reader that were run, of `question` all
before the first step) and `value`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from probe.experiments.registry import experiment
from probe.prompts.labels import QUESTION

if TYPE_CHECKING:
    from probe.experiments.cot.chain_bench import ChainBench, Row
    from probe.model.hooked import Model
    from probe.runs import TaskRun
    from probe.runs.views.chain import Chain


@experiment(
    "cot",
    "recurrent_memory",
    requires="state",
    changes="nothing: the states of recurrent layers are kept where steps begin and end, and their outputs rebuilt from these",
    asks="What does a step write into a memory of constant size?",
    cost="one forward, and the recurrent layers alone once more",
    rows=("state_error", "state_norm", "state_change"),
)
def _recurrent_memory(
    bench: ChainBench, chain: Chain, _task: TaskRun, _names: Sequence[str]
) -> tuple[list[Row], int]:
    return list(state_rows(chain, bench.model)), len(chain.token_ids) - 1


def state_rows(chain: Chain, model: Model) -> Iterator[Row]:
    """One row a quantity, reader and layer. The last token is never run: a reader that has no other has none."""
    from probe.capture import state_stretches

    ids = chain.token_ids[:-1]
    readers = {
        (part.start, min(part.end, len(ids))): part.label
        for part in [*chain.steps, *([chain.answer] if chain.answer else [])]
        if part.start < len(ids)
    }
    first = min((start for start, _ in readers), default=len(ids))
    bounds = sorted({0, len(ids), *(at for span in readers for at in span)})
    before: dict[int, float] = {}
    for stretch in state_stretches(model, ids, bounds):
        common: Row = {"layer": stretch.layer, "n_rows": stretch.end - stretch.start}
        reader = readers.get((stretch.start, stretch.end))
        if stretch.end == first:
            yield common | {"experiment": "state_norm", "reader": QUESTION, "value": stretch.norm}
        if reader is not None:
            common["reader"] = reader
            if stretch.largest:
                yield common | {"experiment": "state_error", "value": stretch.error / stretch.largest}
            yield common | {"experiment": "state_norm", "value": stretch.norm}
            if norm := before.get(stretch.layer):
                yield common | {"experiment": "state_change", "value": stretch.change / norm}
        before[stretch.layer] = stretch.norm
