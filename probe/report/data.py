"""What the report shows, as plain JSON values: nothing here knows about HTML."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from probe.report import bias, distribution, verdict
from probe.report.cards import SHOWN, cards
from probe.report.details import details, texts
from probe.report.measures import RunMeasures
from probe.report.more import more, plain
from probe.report.reasoning import WHOLE_SHOWN, card
from probe.report.rows import drawn
from probe.report.tasklist import task_row, tools_shown
from probe.report.text import visible
from probe.runs.edits import edits_text
from probe.runs.files import header_faults

if TYPE_CHECKING:
    from probe.runs import Run

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


def collect(run: Run, details_of: int | None = None) -> dict[str, Any]:
    """Everything the page needs: `run`, `headlines`, `measures`, `tasks` (rows of the list) and `details` by id.

    `details_of` is how many tasks have their figures in the page, `DETAILS` unless given; 0 leaves texts out as well.
    """
    limit = DETAILS if details_of is None else details_of
    shown = set(run.task_ids[:limit])
    measures = RunMeasures(run, shown)
    rows, opened, room = [], {}, TEXT_BYTES
    tools: set[str] = set()
    for task in run:
        tools.update(tools_shown(task))
        rows.append(task_row(task, measures.of(task.id)))
        if task.id in shown:
            opened[task.id] = details(run, task, measures.of(task.id), measures.tables, measures.undrawn)
        elif limit and room > 0:
            opened[task.id] = texts(task)
            room -= len(json.dumps(opened[task.id]))
    with header_faults(run.path):
        facts, planned = _run_facts(run, rows), _planned(run.run)
    command = verdict.named_path(run.path)
    return visible(
        {
            "run": facts,
            "notices": verdict.notices(command, run.run, rows, planned),
            "headlines": verdict.headlines(rows, measures),
            "causes": verdict.causes(command, {row["kind"] for row in rows}, measures.whole_run),
            "command": command,
            "tools": sorted(tools),
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
            "limit": limit,
        }
    )


# -- the head of the page --------------------------------------------------------------------------------------


def _run_facts(run: Run, rows: list[dict[str, Any]]) -> dict[str, Any]:
    header, model = run.run, run.run["model"]
    capture = {kind: spec["sites"] for kind, spec in header.get("capture", {}).items()}
    rows_kept = {kind: spec["rows"] for kind, spec in header.get("capture", {}).items() if spec.get("rows")}
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
        ("rows", "; ".join(f"{kind}: {', '.join(words)}" for kind, words in rows_kept.items())),
        ("packages", ", ".join(f"{name} {version}" for name, version in header.get("packages", {}).items())),
        ("git commit", header.get("git_commit")),
    ]
    return {
        "title": f"{header['task_file']['path'].rpartition('/')[2]} on {model['name']}",
        "gist": " · ".join(
            filter(
                None,
                (
                    f"{len(rows)} of {_planned(header)} tasks",
                    f"{model['n_params'] / 1e6:,.4g} M parameters, {model['n_layers']} layers, {model['dtype']}",
                    str(header.get("created") or "")[:10],
                    edits_text(header) and "under edits",
                ),
            )
        ),
        "facts": [[name, str(value)] for name, value in first if value is not None],
        "provenance": [[name, str(value)] for name, value in rest if value not in (None, "")],
    }


def _planned(header: dict[str, Any]) -> int:
    """Number of tasks that the run is to have."""
    return len(header.get("task_ids") or ()) or header["task_file"]["n_tasks"]


def _variants(measures: RunMeasures) -> list[dict[str, Any]]:
    """Means over tasks by prompting variant: {variant, n, kl: [value, low, high], …}."""
    table: dict[str, dict[str, Any]] = {}
    shown = {"accuracy", *bias.OVERVIEW}
    for row in measures.whole_run:
        if row["analyzer"] == "prompting" and row["name"] in shown:
            entry = table.setdefault(row["variant"], {"variant": row["variant"]})
            entry["n"] = max(row["n"], entry.get("n", 0))
            entry[row["name"]] = [row["value"], row["low"], row["high"]]
    return list(table.values())
