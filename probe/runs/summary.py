"""What became of a run in a few numbers: tasks by status, and scores with their intervals."""

from __future__ import annotations

from typing import Any

from probe.runs.records import TaskRecord


def summary(run: Any) -> dict[str, Any]:
    """Tasks by status and accuracy by kind with its interval, as printed at the end of a run."""
    from probe.maths.intervals import share_interval

    counts: dict[str, int] = {}
    scores: dict[str, list[float]] = {}
    unscored: dict[str, int] = {}
    fallbacks: dict[str, int] = {}
    for task in run:
        record = task.typed(TaskRecord)
        counts[record.status] = counts.get(record.status, 0) + 1
        if record.error is not None:
            unscored[record.kind] = unscored.get(record.kind, 0) + 1
        for passage in task.passages.values():
            if reason := passage.template.fallback:
                fallbacks[reason] = fallbacks.get(reason, 0) + 1
        if record.score is not None:
            scores.setdefault(record.kind, []).append(record.score)
    accuracy = {}
    for kind, values in scores.items():
        mean = sum(values) / len(values)
        # A prompting task's score is a share of its variants: no longer right or wrong.
        shares = set(values) <= {0.0, 1.0}
        low, high = share_interval(values) or (None, None)
        accuracy[kind] = {
            "mean": mean,
            "low": low,
            "high": high,
            "n": len(values),
            "n_failed": unscored.get(kind, 0),
            "unit": "share of tasks" if shares else "mean score",
        }
    return {
        "status": run.run["status"],
        "counts": counts,
        "accuracy": accuracy,
        "fallbacks": fallbacks,
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
