"""What the report shows of one task: its texts, its numbers and the matrices of its figures."""

from __future__ import annotations

import json
from collections import Counter
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from probe.analyzers.cot import memory_bytes
from probe.analyzers.tool.scorers import SCORERS
from probe.prompts.labels import ANSWER, BOS, USER, step_label, tool_of
from probe.report import bias, distribution, reasoning, why
from probe.report.more import more, plain
from probe.report.rows import drawn, estimate, short
from probe.report.text import script_length, visible
from probe.runs.records import (
    AgentRecord,
    CotRecord,
    Decision,
    FailedRecord,
    Passage,
    PassageRecord,
    PromptingRecord,
    TaskRecord,
    ToolRecord,
    Turn,
    struct_of,
)
from probe.runs.views.attention import Attention, decision_attention

if TYPE_CHECKING:
    from probe.analyzers.registry import Measure
    from probe.runs import Run, TaskRun

NUMBERS = 40_000
"""Numbers embedded for one figure; a larger one is embedded as its mean over heads or layers."""
_MORE = 100
_SHOWN = {
    "tool": drawn("tool", "tool", "choices", "why"),
    "prompting": bias.OVERVIEW,
    "cot": reasoning.SHOWN,
    "distribution": distribution.OF_A_TASK,
}


def details(
    run: Run,
    task: TaskRun,
    rows: list[dict[str, Any]],
    tables: reasoning.Tables,
    undrawn: dict[tuple[str, str], Measure],
) -> dict[str, Any]:
    """What the page shows of a task when it is open; `rows` are its measures, those by layer or head left out.

    `tables` holds the measures that are matrices, `undrawn` the definitions of those that a generic picture draws.
    """
    record = task.typed(struct_of(task.record))
    left = [row for row in rows if row["name"] not in _SHOWN.get(row["analyzer"], ())]
    out: dict[str, Any] = {
        "kind": record.kind,
        "pictures": more(left, undrawn),
        "more": [plain(row) for row in left if (row["analyzer"], row["name"]) not in undrawn][:_MORE],
    }
    if record.status not in ("ok", "truncated"):
        return out | {"error": record.error or "no message"}
    if isinstance(record, PromptingRecord):
        return out | {"variants": [_variant(task, record, name, rows) for name in record.passages]}
    passage = task.typed(PassageRecord).passage
    out |= _passage(passage) | _tokens(task, passage)
    if isinstance(record, ToolRecord):
        return out | _tool(task, record, rows)
    if isinstance(record, CotRecord):
        return out | _cot(run, task, record, rows, tables)
    if isinstance(record, AgentRecord):
        return out | _agent(run, task, record, rows, tables)
    return out


def texts(task: TaskRun) -> dict[str, Any]:
    """What the page shows of a task whose figures it does not hold: its prompt and what followed."""
    record = task.typed(struct_of(task.record))
    out: dict[str, Any] = {"kind": record.kind, "texts_only": True}
    if isinstance(record, FailedRecord):
        return out | {"error": record.error}
    names = task.passages if isinstance(record, PromptingRecord) else [None]
    passages = zip(names, task.passages.values(), strict=True)
    return out | {"passages": [{"name": name} | _passage(passage) for name, passage in passages]}


def value_of(rows: list[dict[str, Any]], name: str, **places: Any) -> float | None:
    """One number of a task, None where it was not measured."""
    for row in rows:
        if row["name"] == name and all(row[key] == value for key, value in places.items()):
            return row["value"]
    return None


def target_text(record: TaskRecord) -> str | None:
    """What a task asks for, None where it gives no target."""
    target = record.target
    if target is msgspec.UNSET or (target is None and isinstance(record, CotRecord | PromptingRecord)):
        return None
    names = target if isinstance(target, list) else [target]
    return " or ".join("no tool" if name is None else str(name) for name in names) or "no tool"


def _passage(passage: Passage) -> dict[str, Any]:
    names = ("completion", "finish_reason", "n_prompt", "n_new", "truncation")
    return {name: getattr(passage, name) for name in names} | {"pieces": pieces(passage)}


def _tokens(task: TaskRun, passage: Passage, prefix: str = "") -> dict[str, Any]:
    """The generated tokens: of each the characters of the completion as the page has it, and its log-probability, nats.

    Nothing where the record does not say where tokens end, or the run did not keep log-probabilities.
    """
    counts, name = passage.token_characters, f"{prefix}log_probs"
    if counts is None or sum(counts) != len(passage.completion) or name not in task:
        return {}
    log_probs = [short(value) for value in task[name].tolist()]
    ends = list(accumulate(counts, initial=0))
    texts = [passage.completion[start:end] for start, end in pairwise(ends)]
    return {"token_lengths": [script_length(visible(text)) for text in texts], "log_probs": log_probs}


def pieces(passage: Passage) -> list[list[str | None]]:
    """The prompt as [label, text] in order; the label is None where a span's place in the text is not known.

    Spans are ranges of tokens. Where the record has each span's `text` it is used as it stands; otherwise a
    tool's definition is found as the JSON object that names it.
    """
    prompt = passage.prompt
    spans = [span for span in passage.spans if span.end <= passage.n_prompt]
    if spans and all(span.text is not None for span in spans):
        return [[span.label, span.text] for span in spans]
    out: list[list[str | None]] = []
    at = 0
    for span in spans:
        if (name := tool_of(span.label)) is not None:
            stretch = _json_naming(prompt, name, at)
            if stretch is not None:
                start, end = stretch
                out += [[None, prompt[at:start]], [span.label, prompt[start:end]]]
                at = end
    out.append([None, prompt[at:]])
    return [piece for piece in out if piece[1]]


def _json_naming(text: str, name: str, start: int) -> tuple[int, int] | None:
    """Range of the first JSON object from `start` on whose `name`, or whose function's, is `name`."""
    decoder = json.JSONDecoder()
    at = text.find("{", start)
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at = text.find("{", at + 1)
            continue
        inner = value.get("function", value)
        if isinstance(inner, dict) and inner.get("name") == name:
            return at, end
        at = text.find("{", end)
    return None


def _entries(decision: Decision, right: tuple[str | None, ...]) -> list[dict[str, Any]]:
    names = ("tool", "log_prob", "probability", "choice_probability")
    return [
        {name: getattr(entry, name) for name in names}
        | {
            "target": entry.tool in right,
            "chosen": entry.tool == decision.chosen,
            "tokens": entry.token_log_probs and [round(value, 2) for value in entry.token_log_probs],
        }
        for entry in decision.tool_probabilities
    ]


def _tool(task: TaskRun, record: ToolRecord, rows: list[dict[str, Any]]) -> dict[str, Any]:
    decision = record.decision
    names = ("candidate_mass", "called", "call_error", "opener_log_prob", "chosen_tool")
    attention = decision_attention(task)
    return {
        **{name: getattr(decision, name) for name in names},
        "call_prefix": record.call_prefix,
        "no_tool": record.no_tool,
        "entries": _entries(decision, record.right),
        "margin": value_of(rows, "margin"),
        "entropy": value_of(rows, "entropy", analyzer="tool"),
        "attention": None if attention is None else _attention(attention, rows),
        "scorers": _scorers(decision.names, rows),
        "orders": _orders(decision.names, rows),
        "why": why.of_task(decision.names, decision.chosen_tool, rows),
    }


def _agent(
    run: Run, task: TaskRun, record: AgentRecord, rows: list[dict[str, Any]], tables: reasoning.Tables
) -> dict[str, Any]:
    memory, lengths = memory_bytes(run, task), Counter(record.passage.lengths)
    return {
        "turns": [_turn(turn) for turn in record.turns],
        "steps": [_step(turn.turn, turn.text, lengths, memory) for turn in record.turns],
        "ended_by": record.ended_by,
        "answer": record.answer,
        "expected": None if record.expected_answer is None else str(record.expected_answer),
        "tokens": dict(lengths),
        "memory": memory,
        "cycle": reasoning.of_task(task, tables, rows, memory),
    }


def _step(k: int, text: str, lengths: Counter[str], memory: dict[str, int]) -> dict[str, Any]:
    label = step_label(k)
    return {"label": label, "text": text, "tokens": lengths[label], "bytes": memory.get(label)}


def _turn(turn: Turn) -> dict[str, Any]:
    names = (
        *(
            "turn",
            "start",
            "end",
            "text",
            "called",
            "call",
            "call_error",
            "chosen",
            "result",
            "slot",
            "candidate_mass",
        ),
        "opener_log_prob",
    )
    return {name: msgspec.to_builtins(getattr(turn, name)) for name in names} | {
        "entries": _entries(turn, ())
    }


def _scorers(tools: list[str | None], rows: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """P(tool | context) by scorer, aligned with `tools`; None where a scorer leaves no-tool out."""
    by_scorer: dict[str, dict[str | None, float]] = {}
    for row in rows:
        if row["name"] == "probability_scorer":
            by_scorer.setdefault(row["scorer"], {})[row["tool"]] = row["value"]
    return {
        name: [short(by_scorer[name].get(tool)) for tool in tools] for name in SCORERS if name in by_scorer
    }


def _orders(tools: list[str | None], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The choice with the orders of the tools averaged: by entry, by slot, and how uneven both are."""
    p = {row["tool"]: estimate(row) for row in rows if row["name"] == "probability_orders"}
    if not p:
        return None
    biases = {row["name"]: estimate(row) for row in rows if row["name"] in ("position_bias", "tool_bias")}
    slots = [short(row["value"]) for row in rows if row["name"] == "slot_probability"]
    return {"entries": [p.get(tool) for tool in tools], "slots": slots, **biases}


def _attention(attention: Attention, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mass in parts per million as [layer][head][column]; columns are the tools, then bos and user.

    `norms` and `without_sink` are means over layers and heads, aligned with the tools; `elsewhere` is the same
    of the mass that no tool has.
    """
    columns = dict(attention.tools)
    beside = [label for label in (BOS, USER) if label in attention.labels]
    places = [*columns.values(), *(attention.labels.index(label) for label in beside)]
    mass = attention.mass[:, :, places]
    averaged = mass.size > NUMBERS
    if averaged:
        mass = mass.mean(1, keepdims=True)
    return {
        "layers": attention.layers,
        "n_heads": attention.mass.shape[1],
        "averaged": averaged,
        "tools": list(columns),
        "beside": beside,
        "tokens": attention.tokens[places].tolist(),
        "norms": [short(value_of(rows, "attention_norm", tool=tool, part=None)) for tool in columns],
        "without_sink": [
            short(value_of(rows, "attention_without_sink", tool=tool, part=None)) for tool in columns
        ],
        "elsewhere": [
            [row["span"], short(row["value"])]
            for row in rows
            if row["name"] in ("sink_mass", "attention_elsewhere")
        ],
        "ppm": np.rint(mass * 1e6).astype(int).tolist(),
    }


def _variant(task: TaskRun, record: PromptingRecord, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    passage = record.passages[name]
    choices = [
        {"choice": c.choice, "probability": c.probability, "log_prob": c.log_prob}
        for c in passage.choice_probabilities or ()
    ]
    return {
        **_passage(passage),
        **_tokens(task, passage, f"{name}/"),
        "variant": name,
        "chosen": passage.chosen,
        "score": passage.score,
        "choices": choices,
        "target": record.target,
        "candidate_mass": passage.candidate_mass,
        **{measure: value_of(rows, measure, variant=name) for measure in sorted(bias.OVERVIEW)},
    }


def _cot(
    run: Run, task: TaskRun, record: CotRecord, rows: list[dict[str, Any]], tables: reasoning.Tables
) -> dict[str, Any]:
    memory = memory_bytes(run, task)
    lengths = Counter(record.passage.lengths)
    steps = [_step(k, text, lengths, memory) for k, text in enumerate(record.steps, 1)]
    errors = [row["value"] for row in rows if row["name"] == "reconstruction_error"]
    return {
        "steps": steps,
        "answer": record.answer,
        "answer_tokens": lengths[ANSWER],
        "answer_bytes": memory.get(ANSWER),
        "answer_forced": record.answer_forced,
        "target": target_text(record),
        "score": record.score,
        "memory": memory,
        "reconstruction_error": max(errors) if errors else None,
        "tokens": dict(lengths),
        "cycle": reasoning.of_task(task, tables, rows, memory),
    }
