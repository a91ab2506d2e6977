"""What the report shows, as plain JSON values: nothing here knows about HTML.

Text of models and tasks is data. `visible` makes its control characters visible, so that it can neither
reorder a line nor hide in it; that it cannot become markup is the template's and the script's part.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from probe.analyzers.findings import reconciliation
from probe.analyzers.rows import WHOLE_RUN
from probe.prompts.labels import BASE, DESCRIPTION, NAME
from probe.report import bias, distribution
from probe.report.cards import SHOWN, cards
from probe.report.details import details, target_text, texts, value_of
from probe.report.more import more, plain, undrawn
from probe.report.reasoning import MATRICES, WHOLE_SHOWN, Tables, card
from probe.report.rows import drawn
from probe.runs.edits import edits_text
from probe.runs.files import header_faults
from probe.runs.records import (
    AgentRecord,
    FailedRecord,
    PromptingRecord,
    TaskRecord,
    ToolRecord,
    struct_of,
)

if TYPE_CHECKING:
    from probe.runs import Run, TaskRun

_DRAWN = {
    "tool": SHOWN,
    "foresight": drawn("foresight", "foresight"),
    "cot": WHOLE_SHOWN,
    "distribution": distribution.SHOWN,
    "prompting": bias.SHOWN,
}
DETAILS = 400
"""Tasks whose figures are embedded; the table lists every task."""
TEXT_BYTES = 64 << 20
"""Bytes of prompts and completions that are embedded for the tasks beyond; what comes after is listed alone."""

# C0 but tab and line feed, DEL and C1, line and paragraph separators, and what changes the direction of text.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(value: Any) -> Any:
    """A JSON tree in which control and direction characters are spelled out, and infinities are words."""
    if isinstance(value, str):
        return _INVISIBLE.sub(lambda match: f"⟨U+{ord(match.group()):04X}⟩", value)
    if isinstance(value, dict):
        return {visible(key): visible(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [visible(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("∞" if value > 0 else "−∞")
    return value


def collect(run: Run) -> dict[str, Any]:
    """Everything the page needs: `run`, `headlines`, `measures`, `tasks` (table rows) and `details` by id."""
    shown = set(run.task_ids[:DETAILS])
    measures = _Measures(run, shown)
    rows, opened, room = [], {}, TEXT_BYTES
    for task in run:
        rows.append(_table_row(task, measures.of(task.id)))
        if task.id in shown:
            opened[task.id] = details(run, task, measures.of(task.id), measures.tables, measures.undrawn)
        elif room > 0:
            opened[task.id] = texts(task)
            room -= len(json.dumps(opened[task.id]))
    with header_faults(run.path):
        facts, planned = _run_facts(run, rows), _planned(run.run)
    return visible(
        {
            "run": facts,
            "headlines": _headlines(rows, measures),
            "variants": _variants(measures),
            "cards": cards(run, measures.whole_run)
            | {
                "bias": bias.card(measures.whole_run),
                "reasoning": card(measures.tables, measures.whole_run),
                "distribution": distribution.card(measures.whole_run, measures.by_task),
            },
            "more": more(measures.whole_run + measures.by_layer, measures.undrawn),
            "measures": [
                plain(row)
                for row in measures.whole_run
                if row["name"] not in _DRAWN.get(row["analyzer"], ())
                and (row["analyzer"], row["name"]) not in measures.undrawn
            ],
            "analyzed": measures.analyzed,
            "planned": planned,
            "tasks": rows,
            "details": opened,
            "limit": DETAILS,
        }
    )


class _Measures:
    """Measures by task, those by layer or head left out (figures read the captured tensors), and of the run."""

    def __init__(self, run: Run, shown: set[str]):
        self.analyzed = run.has_measures
        self.undrawn = undrawn()
        self.by_layer: list[dict[str, Any]] = []
        """Rows of the run that only a generic picture reads."""
        self.whole_run: list[dict[str, Any]] = []
        self.by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
        if not self.analyzed:
            self.tables = Tables(None)
            return
        import pyarrow as pa
        import pyarrow.compute as pc

        of_run = pc.field("task_id") == WHOLE_RUN
        of_shown = of_run | pc.field("task_id").isin(sorted(shown))
        flat = pc.field("layer").is_null() & pc.field("head").is_null()
        flat |= pc.field("name") == "reconstruction_error"
        of_cards = drawn("tool", "why", "attribution", "patching", "steering", "heads", "layers")
        flat |= (pc.field("name").isin([*of_cards]) | (pc.field("analyzer") == "foresight")) & of_run
        flat |= pc.field("name").isin(bias.BY_LAYER) & pc.field("family").is_null()
        flat &= ~(pc.field("name").isin(MATRICES) & ~of_run)
        wanted = flat & (of_shown | pc.field("name").isin(["margin", "entropy"]))
        names = pc.field("name").isin([name for _, name in self.undrawn])
        by_layer = ~flat & names & of_run
        # What is drawn is a small part of a table that grows with layers, heads and tasks.
        table = pa.concat_tables(run.table_parts("measures", wanted | by_layer | Tables.kept(of_shown)))
        self.tables = Tables(table)
        self.by_layer = table.filter(by_layer).to_pylist()
        for row in table.filter(wanted).to_pylist():
            if row["task_id"] == WHOLE_RUN:
                self.whole_run.append(row)
            else:
                self.by_task[row["task_id"]].append(row)

    def of(self, task_id: str) -> list[dict[str, Any]]:
        return self.by_task.get(task_id, [])

    def over_tasks(self, analyzer: str, name: str, kind: str | None = None) -> dict[str, Any] | None:
        for row in self.whole_run:
            if (row["analyzer"], row["name"], row["variant"], row["kind"]) == (analyzer, name, None, kind):
                return row
        return None


# -- the head of the page --------------------------------------------------------------------------------------


def _run_facts(run: Run, rows: list[dict[str, Any]]) -> dict[str, Any]:
    header, model = run.run, run.run["model"]
    capture = {kind: spec["sites"] for kind, spec in header.get("capture", {}).items()}
    first = [
        ("model", f"{model['name']} · {model['dtype']} on {model['device']}"),
        ("weights", model.get("description") or model.get("resolved")),
        (
            "shape",
            f"{model['n_layers']} layers × {model['n_heads']} heads ({model['n_kv_heads']} kv), "
            f"d_model {model['d_model']}, {model['n_params']:,} parameters",
        ),
        ("tasks", f"{header['task_file']['path']} · {len(rows)} of {_planned(header)} run"),
        (
            "outcome",
            ", ".join(f"{n} {status}" for status, n in Counter(row["status"] for row in rows).items()),
        ),
        (
            "work",
            f"{sum(r['tokens'] or 0 for r in rows):,} tokens in {sum(r['seconds'] or 0 for r in rows):,.1f} s",
        ),
        ("under edits", edits_text(header)),
        ("created", f"{header.get('created')} · {header.get('status')}"),
    ]
    rest = [
        ("run", header.get("id")),
        ("command", " ".join(header.get("argv", []))),
        ("seed", header.get("seed")),
        ("task file sha256", header["task_file"].get("sha256")),
        ("weights hash", model.get("weights_hash")),
        ("revision", model.get("revision")),
        ("attention path", model.get("attention_path")),
        ("template", "; ".join(f"{k}: {v}" for k, v in (header.get("template") or {}).items() if v)),
        ("call prefix", header.get("call_prefix")),
        ("no tool is", header.get("no_tool")),
        ("reasoning", header.get("reasoning")),
        ("generation", json.dumps(header.get("generation"))),
        (
            "captured",
            "; ".join(f"{kind}: {', '.join(sites) or 'nothing'}" for kind, sites in capture.items()),
        ),
        ("packages", ", ".join(f"{name} {version}" for name, version in header.get("packages", {}).items())),
        ("git commit", header.get("git_commit")),
    ]
    return {
        "title": f"{header['task_file']['path'].rpartition('/')[2]} on {model['name']}",
        "facts": [[name, str(value)] for name, value in first if value is not None],
        "provenance": [[name, str(value)] for name, value in rest if value not in (None, "")],
    }


def _planned(header: dict[str, Any]) -> int:
    """Number of tasks that the run is to have."""
    return len(header.get("task_ids") or ()) or header["task_file"]["n_tasks"]


def _headlines(rows: list[dict[str, Any]], measures: _Measures) -> list[dict[str, Any]]:
    """Per kind of task one sentence, and the dots of a small chart: [label, value, low, high]."""
    if not measures.analyzed:
        return [_unanalyzed(kind, rows) for kind in dict.fromkeys(row["kind"] for row in rows)]
    out = []
    tool = _tool_choice(measures)
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
    out += [part for part in (tool, _knockout(measures), leaderboard, agent, attention, cot) if part]
    variants = [
        row for row in measures.whole_run if row["analyzer"] == "prompting" and row["name"] == "accuracy"
    ]
    if variants:
        guess = measures.over_tasks("prompting", "baseline_uniform")
        dots = [[row["variant"], row["value"], row["low"], row["high"]] for row in variants]
        dots += [["a uniform choice", guess["value"], None, None]] if guess else []
        base = next((row for row in variants if row["variant"] == BASE), variants[0])
        rest = [f"{row['variant']} {_percent(row['value'])}" for row in variants if row is not base]
        sentence = f"the right choice with {base['variant']}, the bare input, in {_estimate(base)}"
        sentence += f"; with {', '.join(rest)}" if rest else ""
        sentence += f"; a uniform choice would reach {_percent(guess['value'])}" if guess else ""
        out.append({"title": "Prompting", "sentence": sentence + ".", "dots": dots})
    return out


def _tool_choice(measures: _Measures) -> dict[str, Any] | None:
    """What was scored, what the model wrote, and how much of its probability the scores are about."""
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
    return headline | {
        "sentence": f"{headline['sentence'][:-1]}. The call that the model writes is right in {_estimate(call)}. "
        f"The candidates hold {_percent(mass['value'])} of the model’s probability in the median task"
        + ("." if mass["value"] >= 0.5 else ": the scored choice is among names that it would seldom write."),
        "dots": [
            ["scored choice", *scored[1:]],
            ["generated call", call["value"], call["low"], call["high"]],
            ["candidate mass, median", mass["value"], mass["low"], mass["high"]],
            *baselines,
        ],
    }


def _knockout(measures: _Measures) -> dict[str, Any] | None:
    """The deciding experiment in a sentence: a cause beyond its control."""
    rows = {
        row["part"]: row
        for row in measures.whole_run
        if row["name"] == "knockout_minus_random" and row["role"] == "chosen"
    }
    told = [
        f"{what} {_signed(rows[part]['value'])} nats{_beyond(rows[part])}"
        for part, what in (
            (DESCRIPTION, "its description alone"),
            (NAME, "its name alone"),
            (None, "its whole definition"),
        )
        if part in rows
    ]
    if not told:
        return None
    n = max(row["n"] for row in rows.values())
    sentence = (
        f"the log-odds of the most probable tool change by hiding, beyond as many tokens elsewhere: "
        f"{'; '.join(told)}; over {n} tasks."
    )
    together = reconciliation(measures.whole_run)
    sentence += f" {together[0].upper()}{together[1:]}." if together else ""
    return {"title": "Cause", "sentence": sentence, "dots": []}


def _beyond(row: dict[str, Any]) -> str:
    if row["low"] is None:
        return ""
    return f" (95\u00a0% interval {_signed(row['low'])} to {_signed(row['high'])})"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _headline(
    measures: _Measures,
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
    sentence = f"{claim} {_estimate(row)}" + (f"; beside it: {', '.join(beside)}" if beside else "")
    dots = [["this run", row["value"], row["low"], row["high"]]]
    dots += [[label, other["value"], None, None] for label, other in others.items() if other]
    return {"title": title, "sentence": sentence + ".", "dots": dots}


def _estimate(row: dict[str, Any]) -> str:
    hits, n = round(row["value"] * row["n"]), row["n"]
    low, high = _percent(row["low"]), _percent(row["high"])
    return f"{hits} of {n} tasks: {_percent(row['value'])} (95\u00a0% interval {low} to {high})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%"


def _unanalyzed(kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    scores = [row["score"] for row in rows if row["kind"] == kind and row["score"] is not None]
    mean = f"mean score {sum(scores) / len(scores):.2f} over {len(scores)} tasks" if scores else "no scores"
    return {
        "title": kind,
        "sentence": f"{mean}; not analyzed yet, so without interval or baselines.",
        "dots": [],
    }


def _variants(measures: _Measures) -> list[dict[str, Any]]:
    """Means over tasks by prompting variant: {variant, n, kl: [value, low, high], …}."""
    table: dict[str, dict[str, Any]] = {}
    shown = {"accuracy", *bias.OVERVIEW}
    for row in measures.whole_run:
        if row["analyzer"] == "prompting" and row["name"] in shown:
            entry = table.setdefault(row["variant"], {"variant": row["variant"]})
            entry["n"] = max(row["n"], entry.get("n", 0))
            entry[row["name"]] = [row["value"], row["low"], row["high"]]
    return list(table.values())


# -- the table of tasks -----------------------------------------------------------------------------------------


def _table_row(task: TaskRun, rows: list[dict[str, Any]]) -> dict[str, Any]:
    record = task.typed(struct_of(task.record))
    return {
        "id": record.id,
        "kind": record.kind,
        "status": record.status,
        "target": _wanted(record),
        "chosen": _chosen_text(record, task.record),
        "score": record.score,
        **_call(record),
        "margin": value_of(rows, "margin"),
        "entropy": value_of(rows, "entropy", analyzer="tool"),
        "tokens": sum(passage.n_prompt + passage.n_new for passage in task.passages.values()) or None,
        "seconds": record.seconds,
    }


def _call(record: TaskRecord) -> dict[str, Any]:
    """What was called, whether that is right, turns, and the mass of the candidates; null where it makes no call."""
    if isinstance(record, ToolRecord):
        called = record.decision.called or ("no tool" if record.decision.call else "nothing")
        mass = record.decision.candidate_mass
        return {"called": called, "call_right": record.calls_right, "turns": None, "mass": mass}
    if isinstance(record, AgentRecord):
        calls = [turn.called or "no tool" for turn in record.turns if turn.call is not None]
        called = " → ".join(calls) or "nothing"
        return {
            "called": called,
            "call_right": record.called_target,
            "turns": len(record.turns),
            "mass": None,
        }
    return {"called": None, "call_right": None, "turns": None, "mass": None}


def _wanted(record: TaskRecord) -> str | None:
    """The target, and the answer that an agent is to reach."""
    answer = record.expected_answer if isinstance(record, AgentRecord) else None
    wanted = [target_text(record), None if answer is None else f"answer {answer}"]
    return " · ".join(filter(None, wanted)) or None


def _chosen_text(record: TaskRecord, fields: Mapping[str, Any]) -> str | None:
    """What was chosen or answered; a kind of another package may have an `answer`, which only the mapping shows."""
    if isinstance(record, ToolRecord):
        return record.decision.chosen or "no tool"
    if isinstance(record, PromptingRecord):
        counts = Counter(p.chosen.strip() for p in record.passages.values() if p.chosen is not None)
        return ", ".join(f"{text} ×{n}" for text, n in counts.most_common()) or None
    return None if isinstance(record, FailedRecord) else fields.get("answer")
