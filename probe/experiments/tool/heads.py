"""Ablating the heads that point at a tool, beside random heads: the causal check of attention's ranking.

Heads are chosen on one half of the tasks and ablated in the other, so that nothing is tested on what chose it.
Only the decision's reads are replaced: what the ranking looked at is what is taken away.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from probe.experiments.tool.conditions import Condition, Effort, Subject
from probe.model.edits import HeadAblation

if TYPE_CHECKING:
    from probe.runs import Run

_LEAST = 3
"""Heads of a set, at least: heads that attend alike are told apart by what happens without each."""
_ALONE = 2
"""So many of the chosen heads are also ablated one by one."""

Head = tuple[int, int]


@dataclass(frozen=True)
class _HeadSet:
    heads: Sequence[Head]
    detail: dict[str, Any]


@dataclass
class HeadSets:
    """The sets of heads to ablate in each task, by its id."""

    sets: dict[str, list[_HeadSet]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def of(cls, run: Run, effort: Effort) -> HeadSets:
        """Heads ranked on the run's own attention; empty with too few tasks or no captured attention."""
        from probe.runs.views.heads import rank

        head_sets = cls()
        for target in ("chosen", "right"):
            ranking = rank(run, target)
            if ranking is None:
                continue
            for half in (0, 1):
                k = min(max(_LEAST, len(ranking.best(half=half))), ranking.auroc.size // 2)
                best = ranking.best(k, half)
                kinds = [("chosen", best), *(("alone", [head]) for head in best[:_ALONE])]
                band = ranking.random_band(k, effort.random_heads, effort.seed, half=half)
                kinds += [("random", heads) for heads in band]
                for number, (kind, heads) in enumerate(kinds):
                    detail = {"heads": [list(head) for head in heads], "set": kind, "half": half}
                    detail |= {"target": target, "replace": "zero"}
                    for place, task_id in enumerate(sorted(ranking.halves[1 - half])):
                        # Each random set is tested on every second task, so that there can be twice as many.
                        if kind != "random" or (place + number) % 2 == 0:
                            head_sets.sets[task_id].append(_HeadSet(heads, detail))
        return head_sets

    def conditions(self, subject: Subject) -> list[Condition]:
        """One condition a set; the reads of its heads are zero from the decision row on."""
        conditions = []
        for head_set in self.sets.get(subject.task.id, ()):
            by_layer: dict[int, list[int]] = defaultdict(list)
            for layer, head in head_set.heads:
                by_layer[layer].append(head)
            heads = {layer: tuple(sorted(heads)) for layer, heads in by_layer.items()}
            edit = HeadAblation(heads, subject.decision_row)
            conditions.append(Condition("heads", subject.prompt, (edit,), detail=head_set.detail))
        return conditions
