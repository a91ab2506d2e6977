"""What is there before a call runs: how sure the choice is, by several signals, and the states behind it.

Every signal is oriented beforehand, so that more of it should mean a right choice; nothing is fitted here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from probe.maths.statistics import entropy, log_odds, log_softmax, picks
from probe.runs.read import finished
from probe.runs.records import ToolRecord
from probe.runs.views.attention import Attention, decision_attention
from probe.runs.views.choice import Choice, decision_states
from probe.runs.views.conditions import Scores, scores_by_task
from probe.runs.views.layer_file import LayerFile

if TYPE_CHECKING:
    from probe.runs import Run, TaskRun

PROBE = "linear_probe"
"""The signal that is fitted: a linear probe of the decision's residual stream."""


class SignalInputs(NamedTuple):
    """What the signals of one task read."""

    choice: Choice
    attention: Attention | None
    orders: Sequence[Scores]


def _margin(seen: SignalInputs) -> float:
    first, second = np.sort(seen.choice.log_probs)[:-3:-1]
    return float(first - second)


def _entropy(seen: SignalInputs) -> float:
    return -entropy(log_softmax(seen.choice.log_probs))


def _log_odds_gap(seen: SignalInputs) -> float:
    odds = log_odds(seen.choice.log_probs, np.eye(len(seen.choice.names), dtype=bool))
    return float(odds[seen.choice.log_probs.argmax()] - odds[: seen.choice.n_tools].mean())


def _attention_margin(seen: SignalInputs) -> float:
    """NaN where no tool was chosen, and where fewer than two tools were seen."""
    choice, attention = seen.choice, seen.attention
    if attention is None or choice.chosen not in attention.tools or len(attention.tools) < 2:
        return np.nan
    columns = list(attention.tools.values())
    rates = attention.mass[:, :, columns].mean((0, 1)) / attention.tokens[columns]
    share = dict(zip(attention.tools, rates / rates.sum(), strict=True))
    chosen = share.pop(choice.chosen)
    return float(chosen - max(share.values()))


def _order_agreement(seen: SignalInputs) -> float:
    if len(seen.orders) < 2:
        return np.nan
    chosen = seen.choice.log_probs.argmax()
    return float(np.mean([picks(scores.log_probs)[chosen] for scores in seen.orders]))


def _candidate_mass(seen: SignalInputs) -> float:
    return float(np.logaddexp.reduce(seen.choice.log_probs))


def _log_prob(seen: SignalInputs) -> float:
    return float(seen.choice.log_probs.max())


SIGNALS: dict[str, Callable[[SignalInputs], float]] = {
    "margin": _margin,
    "entropy": _entropy,
    "log_odds_gap": _log_odds_gap,
    "attention_margin": _attention_margin,
    "order_agreement": _order_agreement,
    "candidate_mass": _candidate_mass,
    "log_prob": _log_prob,
}
"""Signal → its value for a task, NaN where the task has none."""


class DecisionStates:
    """Residual streams [task, layer, d_model] of the decisions of those tasks that have them."""

    def __init__(self) -> None:
        self._file = LayerFile()
        self.layers: list[int] = []
        self.tasks: list[int] = []
        """Number of the task of each row."""
        self._rows: list[int] = []

    @property
    def width(self) -> int:
        """d_model; 0 where there are no states."""
        return self._file.shape[1] if self._file.shape else 0

    def add(self, number: int, task: TaskRun) -> None:
        """Keep the decision's row of a task; nothing where `resid_post` was not captured at it, or in other layers."""
        captured = decision_states(task)
        if captured is None:
            return
        layers, states = captured
        if not self.tasks:
            self.layers = layers
        elif (layers, states.shape[1]) != (self.layers, self.width):
            return
        if np.isfinite(states).all():
            self._rows.append(self._file.n)
            self._file.add(states[None])
            self.tasks.append(number)

    def layer(self, layer: int) -> np.ndarray:
        """[row, d_model] of a layer of `layers`."""
        return self._file.layer(self.layers.index(layer))[self._rows]

    def of(self, kept: np.ndarray) -> DecisionStates:
        """The states of some tasks ([task], bool), numbered anew, on the same file."""
        out = copy(self)
        number = np.cumsum(kept) - 1
        out._rows = [row for row, task in zip(self._rows, self.tasks, strict=True) if kept[task]]
        out.tasks = [int(number[task]) for task in self.tasks if kept[task]]
        return out


@dataclass
class Observed:
    """The tool tasks of a run: which choices are wrong, and the signals that were there."""

    wrong: np.ndarray
    """[task], bool: the most probable candidate is not acceptable."""
    signals: dict[str, np.ndarray]
    """Signal → [task], NaN where it has none; signals that no task has are left out."""
    prompts: list[str]
    """[task]: the text that was read."""
    states: DecisionStates = field(default_factory=DecisionStates)

    @classmethod
    def of(cls, run: Run) -> Observed:
        orders = scores_by_task(run, "order")
        states, prompts, wrong = DecisionStates(), [], []
        values: dict[str, list[float]] = {name: [] for name in SIGNALS}
        for number, task in enumerate(finished(run, "tool_selection")):
            record = task.typed(ToolRecord)
            seen = SignalInputs(Choice.of(record), decision_attention(task), orders.get(task.id, ()))
            prompts.append(record.passage.prompt)
            wrong.append(seen.choice.chosen not in seen.choice.right)
            for name, signal in SIGNALS.items():
                values[name].append(signal(seen))
            states.add(number, task)
        signals = {name: np.array(column) for name, column in values.items()}
        present = {name: column for name, column in signals.items() if not np.isnan(column).all()}
        return cls(np.array(wrong, dtype=bool), present, prompts, states)

    def without(self, prompts: set[str]) -> Observed:
        """The tasks whose prompts are not among these."""
        kept = np.array([prompt not in prompts for prompt in self.prompts], dtype=bool)
        return Observed(
            self.wrong[kept],
            {name: values[kept] for name, values in self.signals.items() if not np.isnan(values[kept]).all()},
            [prompt for prompt in self.prompts if prompt not in prompts],
            self.states.of(kept),
        )
