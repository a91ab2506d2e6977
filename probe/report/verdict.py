"""The first screen: how the run ended, what the model did, what it depends on, and the commands for what is not known."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.analyzers.findings import reconciliation
from probe.prompts.labels import BASE, DESCRIPTION, NAME
from probe.report.rows import MeasureRows, Row, estimate
from probe.report.tasklist import dominant_errors

if TYPE_CHECKING:
    from probe.report.measures import RunMeasures


def named_path(path: Path) -> str:
    """The run as a command names it: from the working directory where it lies below, quoted for a shell."""
    if not isinstance(path, os.PathLike):  # a run at a URL
        return shlex.quote(str(path))
    relative = os.path.relpath(path)
    return shlex.quote(str(path.resolve()) if relative.startswith("..") else relative)


def notices(run: str, header: dict[str, Any], rows: list[Row], planned: int) -> list[dict[str, Any]]:
    """What a reader has to know before any number: {text, command?, grave}; `run` is its name in a command."""
    out: list[dict[str, Any]] = []

    def add(text: str, grave: bool = True, command: str | None = None) -> None:
        out.append({"text": text, "grave": grave, "command": command})

    status = header.get("status")
    if len(rows) < planned:
        add(f"Not ended: {len(rows)} of {planned} tasks are here.", command=f"probe resume {run}")
    elif status not in ("done", None):
        add(f"The run’s status is “{status}”.")
    counts = Counter(row["status"] for row in rows)
    for kind, n in counts.items():
        if kind not in ("ok", "truncated"):
            add(f"{_of(n, rows)} failed with “{kind}”: the list of tasks has them under “failed”.")
    if n := counts["truncated"]:
        add(f"Truncated: the prompts of {_of(n, rows)} did not fit the model and were shortened.")
    if n := sum(row["cut"] for row in rows):
        add(f"The texts of {_of(n, rows)} were cut at the limit of new tokens.", grave=False)
    return out


def _of(n: int, rows: list[Row]) -> str:
    return f"{n} of {len(rows)} tasks"


# -- what the model did ------------------------------------------------------------------------------------------


def headlines(rows: list[Row], measures: RunMeasures) -> list[dict[str, Any]]:
    """Per kind of task one sentence, and the dots of a small chart: [label, value, low, high]."""
    if not measures.analyzed:
        return [_unanalyzed(kind, rows) for kind in dict.fromkeys(row["kind"] for row in rows)]
    out = []
    tool = _tool_choice(rows, measures)
    leaderboard = _headline(
        measures,
        "tool",
        "Leaderboard",
        "bfcl_accuracy",
        "the checker of the Berkeley Function Calling Leaderboard accepts the call, or that none was made, in",
        {},
    )
    agent = _headline(
        measures, "tool", "Agent", "accuracy", "all that was asked for came true in", {}, "agent"
    )
    attention = _headline(
        measures,
        "tool",
        "Attention",
        "attention_agreement",
        "the tool with the most attention per token was the chosen one in",
        {"a uniform guess": "baseline_agreement"},
    )
    cot = _headline(measures, "cot", "Reasoning", "accuracy", "the right answer in", {})
    out += [part for part in (tool, leaderboard, agent, attention, cot) if part]
    variants = [
        row for row in measures.whole_run if row["analyzer"] == "prompting" and row["name"] == "accuracy"
    ]
    if variants:
        guess = measures.over_tasks("prompting", "baseline_uniform")
        dots = [[row["variant"], row["value"], row["low"], row["high"]] for row in variants]
        dots += [["a uniform choice", guess["value"], None, None]] if guess else []
        base = next((row for row in variants if row["variant"] == BASE), variants[0])
        rest = [f"{row['variant']} {_percent(row['value'])}" for row in variants if row is not base]
        sentence = f"the right choice with {base['variant']}, the bare input, in {_share(base)}"
        sentence += f"; with {', '.join(rest)}" if rest else ""
        sentence += f"; a uniform choice would reach {_percent(guess['value'])}" if guess else ""
        out.append({"title": "Prompting", "sentence": sentence + ".", "dots": dots})
    return out


def _tool_choice(rows: list[Row], measures: RunMeasures) -> dict[str, Any] | None:
    """What was scored, what the model wrote, how much of its probability that is about, and what most errors are."""
    headline = _headline(
        measures,
        "tool",
        "Tool choice",
        "accuracy",
        "the most probable candidate, no tool included, is right in",
        {
            "always the first tool": "baseline_first",
            "always no tool": "baseline_no_tool",
            "a uniform choice": "baseline_uniform",
        },
    )
    call, mass = (measures.over_tasks("tool", name) for name in ("call_accuracy", "candidate_mass_median"))
    if headline is None or call is None or mass is None:
        return headline
    scored, *baselines = headline["dots"]
    errors = dominant_errors([row for row in rows if row["kind"] == "tool_selection"])
    return headline | {
        "sentence": f"{headline['sentence'][:-1]}. The call that the model writes is right in {_share(call)}. "
        f"The candidates hold {_percent(mass['value'])} of the model’s probability in the median task"
        + ("." if mass["value"] >= 0.5 else ": the scored choice is among names that it would seldom write.")
        + (f" {errors}" if errors else ""),
        "dots": [
            ["scored choice", *scored[1:]],
            ["generated call", call["value"], call["low"], call["high"]],
            ["candidate mass, median", mass["value"], mass["low"], mass["high"]],
            *baselines,
        ],
    }


def _headline(
    measures: RunMeasures,
    analyzer: str,
    title: str,
    name: str,
    claim: str,
    baselines: dict[str, str],
    kind: str | None = None,
) -> dict[str, Any] | None:
    row = measures.over_tasks(analyzer, name, kind)
    if row is None:
        return None
    others = {label: measures.over_tasks(analyzer, baseline) for label, baseline in baselines.items()}
    beside = [f"{label} {_percent(other['value'])}" for label, other in others.items() if other]
    sentence = f"{claim} {_share(row)}" + (f"; beside it: {', '.join(beside)}" if beside else "")
    dots = [["this run", row["value"], row["low"], row["high"]]]
    dots += [[label, other["value"], None, None] for label, other in others.items() if other]
    return {"title": title, "sentence": sentence + ".", "dots": dots}


def _share(row: Row) -> str:
    hits, n = round(row["value"] * row["n"]), row["n"]
    low, high = _percent(row["low"]), _percent(row["high"])
    return f"{hits} of {n} tasks: {_percent(row['value'])} (95\u00a0% interval {low} to {high})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%"


def _unanalyzed(kind: str, rows: list[Row]) -> dict[str, Any]:
    scores = [row["score"] for row in rows if row["kind"] == kind and row["score"] is not None]
    mean = f"mean score {sum(scores) / len(scores):.2f} over {len(scores)} tasks" if scores else "no scores"
    return {
        "title": kind,
        "sentence": f"{mean}; not analyzed yet, so without interval or baselines.",
        "dots": [],
    }


# -- what it depends on ------------------------------------------------------------------------------------------

_HIDDEN = (
    (DESCRIPTION, "description hidden"),
    (NAME, "name hidden, which the call has to copy"),
    (None, "whole definition hidden"),
)
_ABLATED = {
    "total": "a step hidden from all that follows",
    "direct": "a step hidden from the answer alone",
    "state_total": "a step left out of the recurrent state",
    "state_direct": "a step left out of the recurrent state for the answer alone",
    "both_total": "a step hidden from all that follows and left out of the recurrent state",
    "both_direct": "a step hidden from the answer alone, in both memories",
    "deleted": "a step deleted from the text",
}


def causes(run: str, kinds: set[str], rows: list[Row]) -> list[dict[str, Any]]:
    """The causal verdict, a part a subject: {title, lines, correlates, missing, together?}.

    A line is {what, value, low, high, n, unit}: an effect less that of its control, 0 without any. `correlates` are what
    only goes together with such an effect, against it. `missing` are {what, command}; `run` is its name in a command.
    """
    makers = {
        "tool_selection": _tool_causes,
        "cot": _reasoning_causes,
        "agent": _reasoning_causes,
        "replay": _reasoning_causes,
        "prompting": _prompting_causes,
    }
    wanted = dict.fromkeys(makers[kind] for kind in makers if kind in kinds)
    return [part for make in wanted if (part := make(run, rows))]


def _tool_causes(run: str, rows: list[Row]) -> dict[str, Any]:
    measures = MeasureRows(rows)
    lines = [
        _line(what, measures.estimate("knockout_minus_random", role="chosen", part=part), "nats")
        for part, what in _HIDDEN
    ]
    masked = any(lines)
    swap = _line(
        "descriptions exchanged: slope of the shares, near 1 where they go along",
        measures.estimate("swap_slope"),
        "share",
    )
    ranks = _line(
        "attention to descriptions, against what hiding them costs",
        measures.estimate(
            "causal_spearman_within", correlate="attention", cause="knockout", part=DESCRIPTION
        ),
        "ρ",
    )
    together = reconciliation(rows)
    return {
        "title": "Why this tool",
        "how": "Change in the log-odds of the most probable tool, beyond that of hiding as many random tokens."
        if masked
        else None,
        "lines": [line for line in (*lines, swap) if line],
        "correlates": [ranks] if ranks else [],
        "together": f"{together[0].upper()}{together[1:]}." if together else None,
        "missing": [
            *_missing(masked, "which part of a definition is used", f"probe analyze {run} --quick"),
            *_missing(
                bool(swap) or not masked,
                "whether the choice follows descriptions",
                f"probe analyze {run} swap",
            ),
        ],
    }


def _reasoning_causes(run: str, rows: list[Row]) -> dict[str, Any]:
    measures = MeasureRows(rows, "cot")
    lines = [
        _line(what, measures.estimate("answer_odds_change_minus_random", experiment=name), "nats")
        or _line(what, measures.estimate("answer_change_minus_random", experiment=name), "nats")
        for name, what in _ABLATED.items()
    ]
    ranks = [
        _line(
            f"{what}, against what hiding the source changes",
            measures.estimate(
                "causal_spearman_within", correlate=name, cause="knockout_kl", experiment="total"
            ),
            "ρ",
        )
        for name, what in (("read_mass", "attention to a source"), ("read_norm", "norm of what is read"))
    ]
    present = [line for line in lines if line]
    return {
        "title": "Does the answer follow from the steps",
        "how": "Change in the answer’s log-odds by taking a step away, beyond that of a random span of equal length.",
        "lines": present,
        "correlates": [line for line in ranks if line],
        "together": None,
        "missing": _missing(
            bool(present) or any(ranks),
            "what a step changes if it is hidden",
            f"probe analyze {run} knockouts",
        ),
    }


def _prompting_causes(run: str, rows: list[Row]) -> dict[str, Any]:
    rows = [row for row in rows if row["analyzer"] == "prompting"]
    lines = [
        _line(f"{row['variant']}: mean change of the residual stream", estimate(row), "share of KL")
        for row in rows
        if row["name"] == "patch_recovery_minus_random"
    ]
    return {
        "title": "What carries the prompt’s shift",
        "how": "Share of the prompt’s shift that one vector added to the bare prompt’s residual stream brings back, "
        "beyond that of random vectors; held-out tasks.",
        "lines": [line for line in lines if line],
        "correlates": [],
        "together": None,
        "missing": _missing(
            bool(lines), "whether one vector carries the shift", f"probe analyze {run} patch"
        ),
    }


def _line(what: str, measured: dict[str, Any] | None, unit: str) -> dict[str, Any] | None:
    return None if measured is None else {"what": what, "unit": unit, **measured}


def _missing(present: bool, what: str, command: str) -> list[dict[str, str]]:
    return [] if present else [{"what": what, "command": command}]
