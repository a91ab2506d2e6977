"""A run as a log of Inspect: an `.eval` archive that its viewer and its library open, one sample a passage.

A sample's input is the prompt as the model was given it, its output what it wrote; an agent's turns are messages with calls and
results. What a chat message has no place for, P(tool|context) and the numbers beside it, is in the sample's metadata under
`probe`. Source: inspect_ai, log/_log.py, log/_recorders/eval.py.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

import msgspec

from probe.errors import UsageError
from probe.runs.files import temporary_files
from probe.runs.read import Run
from probe.runs.records import AgentRecord, Decision, Passage, TaskRecord, ToolRecord, struct_of
from probe.runs.summary import Totals
from probe.runs.task import TaskRun

_VERSION = 2
_SCORER = "probe"
_STATUS = {"done": "success", "failed": "success", "interrupted": "cancelled"}
"""Status of a run → of a log; a run whose tasks failed in part is a log whose samples have errors."""
_ENDS = {"eos": "stop", "stop": "stop", "length": "max_tokens"}
NO_TOOL = "(no tool)"
_SHORT = 1024
"""Characters of an input that the list of samples repeats."""
_CHUNK = 1 << 20


def eval_log(run: Run) -> Iterator[bytes]:
    """The archive piece by piece: `samples/ID_epoch_1.json`, `_journal/start.json`, `summaries.json` and `header.json`.

    Each record is read once, and no more than one sample is held. Raises ArtifactCorrupt, UsageError for a task whose id is
    that of another's variant.
    """
    totals, summaries = Totals(), []
    ids: set[str] = set()
    with temporary_files(), tempfile.TemporaryFile() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:

            def put(name: str, document: Any) -> None:
                # A fixed time: the same run is the same bytes.
                entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, json.dumps(document, ensure_ascii=False))

            for task in run:
                totals.add(task)
                for sample in _samples(task, _model(run)):
                    sample["id"] = _member(sample["id"])
                    if sample["id"] in ids:
                        raise UsageError(
                            f"{run.path}: two samples would be called {sample['id']!r}: export another format"
                        )
                    ids.add(sample["id"])
                    summaries.append(_summary(sample))
                    put(f"samples/{sample['id']}_epoch_1.json", sample)
            header = _header(run, summaries, totals)
            put("_journal/start.json", {"version": _VERSION, "eval": header["eval"], "plan": header["plan"]})
            put("summaries.json", summaries)
            put("header.json", header)
        file.seek(0)
        while chunk := file.read(_CHUNK):
            yield chunk


def _member(ident: str) -> str:
    """An id as Inspect looks for it: in the name of a file of the archive, as it stands. One that would lead out of a folder when the
    archive is unpacked, or that no name can hold, is percent-encoded there and in the sample."""
    plain = (
        ident.isprintable()
        and not ident.startswith("/")
        and not {"\\", ":", ".."} & {*ident, *ident.split("/")}
    )
    return ident if plain else quote(ident, safe=" ")


def _summary(sample: dict[str, Any]) -> dict[str, Any]:
    """What the list of samples says of one."""
    names = ("id", "epoch", "target", "scores", "total_time", "completed")
    kept = {name: sample[name] for name in names if name in sample}
    return kept | {"input": sample["input"][:_SHORT]} | _error(sample)


def _error(sample: dict[str, Any]) -> dict[str, Any]:
    return {"error": sample["error"]["message"]} if "error" in sample else {}


def _model(run: Run) -> str:
    return str((run.run.get("model") or {}).get("name") or "unknown")


def _header(run: Run, samples: Sequence[dict[str, Any]], totals: Totals) -> dict[str, Any]:
    facts, status = run.run, str(run.run.get("status"))
    file = facts.get("task_file") or {}
    created = _time(facts.get("created"))
    identity = hashlib.sha256(str(facts.get("id")).encode()).hexdigest()[:22]
    scores = [
        {
            "name": f"{_SCORER}/{kind}", "scorer": _SCORER, "scored_samples": value["n"], "unscored_samples": value["n_failed"],
            "metrics": {
                name: {"name": name, "value": value[key]}
                for name, key in (("mean", "mean"), ("low of 95 %", "low"), ("high of 95 %", "high"))
                if value[key] is not None
            },
        }
        for kind, value in totals.accuracy().items()
    ]  # fmt: skip
    options = {
        key: value for key, value in (facts.get("options") or {}).items() if value not in (None, [], ())
    }
    failed = sum("error" in sample for sample in samples)
    return {
        "version": _VERSION,
        "status": _STATUS.get(status, "started"),
        "eval": {
            "eval_id": identity, "run_id": str(facts.get("id")), "task_id": identity, "created": created,
            "task": str(file.get("path") or "tasks"), "dataset": {"name": str(file.get("path") or "tasks"), "samples": len(samples),
                        "sample_ids": [sample["id"] for sample in samples]},
            "model": _model(run), "model_args": options, "config": {}, "packages": facts.get("packages") or {},
            "metadata": {"probe": {"run": str(facts.get("id")), "weights": (facts.get("model") or {}).get("weights_hash")}},
        },
        "plan": {"name": "plan", "steps": []},
        "results": {"total_samples": len(samples), "completed_samples": len(samples) - failed, "scores": scores},
        "stats": {"started_at": created, "completed_at": ""},
    }  # fmt: skip


def _time(text: Any) -> str:
    """A time as run.json has it; the beginning of time where it has none, for Inspect takes no log without."""
    try:
        return datetime.fromisoformat(str(text)).isoformat()
    except ValueError:
        return "1970-01-01T00:00:00+00:00"


def _samples(task: TaskRun, model: str) -> Iterator[dict[str, Any]]:
    record = task.typed(struct_of(task.record))
    probe = {"kind": record.kind, "status": record.status}
    base = {
        "epoch": 1,
        "target": _target(record),
        "metadata": {**(record.metadata or {}), "probe": probe},
        "total_time": record.seconds,
    }
    if record.error is not None:
        yield base | {
            "id": record.id, "input": "", "messages": [],
            "error": {"message": record.error, "traceback": "", "traceback_ansi": ""},
        }  # fmt: skip
        return
    several = len(task.passages) > 1
    for name, passage in task.passages.items():
        messages = [{"role": "user", "content": passage.prompt, "id": "prompt"}, *_written(record, passage)]
        last = next(message for message in reversed(messages) if message["role"] == "assistant")
        end = _ENDS.get(passage.finish_reason, "unknown")
        more: dict[str, Any] = {}
        score = getattr(passage, "score", None) if several else record.score
        if score is not None:
            answer = getattr(passage, "chosen", None) if several else _answer(record)
            more["scores"] = {_SCORER: {"value": score, "answer": answer}}
        yield base | more | {
            "id": f"{record.id}/{name}" if several else record.id,
            "metadata": base["metadata"] | {"probe": probe | _numbers(record)},
            "input": passage.prompt,
            "messages": messages,
            "output": {"model": model, "choices": [{"message": last, "stop_reason": end}], "completion": passage.completion},
            "completed": True,
        }  # fmt: skip


def _target(record: TaskRecord) -> str | list[str]:
    """What is right; empty where the task does not say, which for a choice of tools is another thing than no tool."""
    target = record.target
    if isinstance(target, list):
        return [NO_TOOL if entry is None else str(entry) for entry in target]
    if target is None and record.kind in ("tool_selection", "agent", "replay"):
        return NO_TOOL
    return "" if target is None or target is msgspec.UNSET else str(target)


def _answer(record: TaskRecord) -> str | None:
    if isinstance(record, ToolRecord):
        return record.decision.chosen or NO_TOOL
    answer = getattr(record, "answer", None)
    return None if answer is None else str(answer)


def _numbers(record: TaskRecord) -> dict[str, Any]:
    """What a choice among tools is in numbers."""
    if not isinstance(record, ToolRecord):
        return {}
    shares = {entry.tool or NO_TOOL: entry.probability for entry in record.decision.tool_probabilities}
    return {"tool_probabilities": shares, "candidate_mass": record.decision.candidate_mass}


def _written(record: TaskRecord, passage: Passage) -> list[dict[str, Any]]:
    """Messages behind the prompt: one of the assistant, of an agent one a turn with what came back."""
    if isinstance(record, AgentRecord):
        return [message for turn in record.turns for message in _turn(turn)]
    calls = _calls(record.decision, "call") if isinstance(record, ToolRecord) else []
    return [_message(passage.completion, "completion", calls)]


def _turn(turn: Any) -> list[dict[str, Any]]:
    name = f"turn-{turn.turn}"
    calls = _calls(turn, name)
    messages = [_message(turn.text, name, calls)]
    if turn.result is not None:
        result = {
            "role": "tool",
            "id": f"{name}-result",
            "content": turn.result.content,
            "function": turn.called,
        }
        messages.append(result | ({"tool_call_id": calls[0]["id"]} if calls else {}))
    return messages


def _message(text: str, name: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {"role": "assistant", "id": name, "content": text, "source": "generate"} | (
        {"tool_calls": calls} if calls else {}
    )


def _calls(decision: Decision, name: str) -> list[dict[str, Any]]:
    """The calls that were read from the text, of arguments that are an object."""
    every = decision.calls or ([decision.call] if decision.call is not None else [])
    return [
        {"id": f"{name}-{number}", "type": "function", "function": call.name}
        | (
            {"arguments": call.arguments}
            if isinstance(call.arguments, dict)
            else {"arguments": {}, "parse_error": "no object"}
        )
        for number, call in enumerate(every)
        if call.name is not None
    ]
