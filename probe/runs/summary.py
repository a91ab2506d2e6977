"""What became of a run in a few numbers: tasks by status, and scores with their intervals."""

from __future__ import annotations

from collections import Counter
from typing import Any

from probe.runs.records import TaskRecord


class Totals:
    """What is counted of the tasks of a run while they are read."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """Tasks by status."""
        self.fallbacks: Counter[str] = Counter()
        """Prompts that are not as the model's own template writes them, by reason."""
        self._unscored: Counter[str] = Counter()
        self._scores: dict[str, list[float]] = {}

    def add(self, task: Any) -> None:
        record = task.typed(TaskRecord)
        self.counts[record.status] += 1
        if record.error is not None:
            self._unscored[record.kind] += 1
        reasons = (passage.template.fallback for passage in task.passages.values())
        self.fallbacks.update(reason for reason in reasons if reason)
        if record.score is not None:
            self._scores.setdefault(record.kind, []).append(record.score)

    def accuracy(self) -> dict[str, dict[str, Any]]:
        """By kind of task: mean score with its interval, n, n_failed and unit."""
        from probe.maths.intervals import share_interval

        accuracy: dict[str, dict[str, Any]] = {}
        for kind, values in self._scores.items():
            # A prompting task's score is a share of its variants: no longer right or wrong.
            shares = set(values) <= {0.0, 1.0}
            low, high = share_interval(values) or (None, None)
            accuracy[kind] = {
                "mean": sum(values) / len(values),
                "low": low,
                "high": high,
                "n": len(values),
                "n_failed": self._unscored[kind],
                "unit": "share of tasks" if shares else "mean score",
            }
        return accuracy


def summary(run: Any) -> dict[str, Any]:
    """Tasks by status and accuracy by kind with its interval, as printed at the end of a run."""
    totals = Totals()
    for task in run:
        totals.add(task)
    return {
        "status": run.run["status"],
        "counts": dict(totals.counts),
        "accuracy": totals.accuracy(),
        "fallbacks": dict(totals.fallbacks),
        "report": None if run.report_path is None else str(run.report_path),
    }


def score_text(value: dict[str, Any]) -> str:
    """A mean score with its interval, the tasks that it is of, and those that failed and are in no score."""
    failed = f", {value['n_failed']} failed and not scored" if value["n_failed"] else ""
    between = (
        "without an interval" if value["low"] is None else f"[{value['low']:.3f}, {value['high']:.3f}] 95 %"
    )
    return f"{value['mean']:.3f} {between}, n = {value['n']}{failed}"


def fallback_lines(summary: dict[str, Any]) -> list[str]:
    """How many prompts are not as the model's own template writes them, and why."""
    return [
        f"{n} prompts not as the model's own template writes them: {why}"
        for why, n in summary["fallbacks"].items()
    ]
