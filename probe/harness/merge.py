"""`merge`: runs of parts of a task file, made on machines that share no disk, as one run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from probe.errors import RunDirectoryError, UsageError
from probe.harness.plan import Inputs, Options, read_given
from probe.harness.runner import Progress, SilentProgress, options_of, token_texts, tools_hash
from probe.harness.vocabulary import Vocabulary
from probe.runs import Run, RunWriter, prepare
from probe.runs.files import CATALOGUE, SCHEMA, TASK_FILE, header_faults, is_locked
from probe.runs.manifest import checked_inputs

_FREE = {"generator_url", "shard", "offline", "max_bytes", "batch_bytes", "tools", "model", "device", "date"}
"""Options that may differ: they decide what is run where, or are compared by what they stand for."""


def merge(
    paths: Sequence[Path],
    out: Path,
    *,
    progress: Progress | None = None,
    argv: Sequence[str] | None = None,
) -> Run:
    """Put the tasks of several runs of one task file into a new run, every byte compared with its checksum on the way.

    The new run is of all tasks that the options select: those that no run has are missing, and `probe resume` runs them.
    Raises UsageError where weights, chat template, options, tools or task file differ, naming both runs and what, and
    where two runs have the same task; RunDirectoryError for a run at work; ArtifactCorrupt and DiskError.
    """
    progress = progress or SilentProgress()
    runs = [Run(path) for path in paths]
    if len({run.path.resolve() for run in runs}) < 2:
        raise UsageError("merge: give two runs or more, each once")
    for run in runs:
        if is_locked(run.path):
            raise RunDirectoryError(f"{run.path}: busy: a process is writing to it: wait for its end")
    prepare(out)
    problems = [line for run in runs[1:] for line in _differences(runs[0], run)]
    if problems:
        raise UsageError("\n".join(problems))
    choices = replace(options_of(runs[0].path, runs[0].run), shard=None)
    kept = checked_inputs(runs[0].path, runs[0].run)
    if TASK_FILE not in kept:
        raise RunDirectoryError(
            f"{runs[0].path}: a run of an earlier version keeps no task file: run it again"
        )
    given = read_given(kept[TASK_FILE], kept.get(CATALOGUE), choices)
    places = _places(runs)
    header = _header(runs, given, choices, argv)
    for line in _versions(runs):
        progress.log(line)
    with RunWriter.create(out, header, {name: path.read_bytes() for name, path in kept.items()}) as writer:
        progress.start(len(places))
        for task_id, run in places.items():
            writer.take(run[task_id].source)
            progress.done(0)
        missing = len({task.id for task in given.tasks} - writer.committed.keys())
        failed = {"error", "nonfinite"} & set(writer.committed.values())
        texts = token_texts(writer, Vocabulary([run.run for run in runs], choices, progress.log).text)
        writer.finish("interrupted" if missing else "failed" if failed else "done", **texts)
        progress.end()
    if missing:
        progress.log(f"{missing} tasks are in none of these runs: `probe resume {out}` runs them")
    return Run(out)


def _places(runs: Sequence[Run]) -> dict[str, Run]:
    """Task → the run that has it."""
    places: dict[str, Run] = {}
    for run in runs:
        for task_id in run.task_ids:
            if (before := places.setdefault(task_id, run)) is not run:
                raise UsageError(
                    f"merge: task {task_id!r} is in {before.path} and in {run.path}: leave one of them out"
                )
    return places


def _differences(first: Run, other: Run) -> Iterator[str]:
    """What keeps two runs from being parts of one, a line each."""
    a, b = first.run, other.run
    with header_faults(first.path), header_faults(other.path):
        pairs = {
            "task file": (a["task_file"]["sha256"], b["task_file"]["sha256"]),
            "weights": (a["model"]["weights_hash"], b["model"]["weights_hash"]),
            "tool catalogue": tuple(_input(run, CATALOGUE) for run in (a, b)),
            "model of the generator": tuple((run.get("generator") or {}).get("model") for run in (a, b)),
            "edits": tuple((run.get("edits") or {}).get("sha256") for run in (a, b)),
        }
        templates = [run.get("template") or {} for run in (a, b)]
    pairs["chat template"] = tuple(entry.get("chat_template_sha256") for entry in templates)
    before, after = (asdict(options_of(run.path, run.run)) for run in (first, other))
    pairs |= {
        f"--{name.replace('_', '-')}": (before[name], after[name]) for name in before if name not in _FREE
    }
    pairs["--device"] = tuple(options["device"].partition(":")[0] for options in (before, after))
    if any(entry.get("asks_date", True) for entry in templates):
        pairs["--date"] = (before["date"], after["date"])
    for what, (left, right) in pairs.items():
        if left != right:
            shown = f": {left} and {right}" if what.startswith("--") else ""
            why = ", which the chat template asks for: give all parts the same" if what == "--date" else ""
            yield f"merge: {first.path} and {other.path} differ in {what}{shown}{why}"


def _input(header: dict[str, Any], name: str) -> str | None:
    return ((header.get("inputs") or {}).get(name) or {}).get("blake3")


def _header(
    runs: Sequence[Run], given: Inputs, choices: Options, argv: Sequence[str] | None
) -> dict[str, Any]:
    """run.json of the whole: what all runs share, what each kind had where it ran, and where the tasks come from."""
    order = {task.id: number for number, task in enumerate(given.tasks)}
    ranked = sorted(
        runs, key=lambda run: min((order[name] for name in run.task_ids if name in order), default=len(order))
    )
    headers = [run.run for run in ranked]
    by_kind = {
        key: {kind: value for header in headers for kind, value in (header.get(key) or {}).items()}
        for key in ("generation", "capture")
    }
    first = {
        key: next((header[key] for header in headers if header.get(key) is not None), None)
        for key in ("call_prefix", "no_tool")
    }
    kinds = sorted({kind for header in headers for kind in header.get("kinds") or ()})
    content = {
        key: value
        for key, value in headers[0].items()
        if key not in ("id", "shard", "status", "inputs", "token_texts")
    }
    return (
        content
        | by_kind
        | first
        | {
            "schema": SCHEMA,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "argv": list(sys.argv if argv is None else argv),
            "options": {key: value for key, value in asdict(choices).items() if key != "offline"},
            "task_file": headers[0]["task_file"] | {"n_tasks": len(given.tasks)},
            "task_ids": [task.id for task in given.tasks],
            "tools_sha256": tools_hash(given.tasks, choices),
            "kinds": kinds,
            # Of the run whose options these are.
            **{key: runs[0].run[key] for key in ("generator",) if key in runs[0].run},
            "merged": [
                {"id": run.run.get("id"), "created": run.run.get("created"), "n_tasks": len(run)}
                | {
                    key: run.run[key]
                    for key in ("shard", "packages", "git_commit")
                    if run.run.get(key) is not None
                }
                for run in runs
            ],
        }
    )


def _versions(runs: Sequence[Run]) -> Iterator[str]:
    """Packages that differ: no reason to refuse, but to know."""
    names = sorted({name for run in runs for name in run.run.get("packages") or ()})
    for name in names:
        versions = {run.run.get("packages", {}).get(name): run.path for run in runs}
        if len(versions) > 1:
            yield f"{name} differs: " + ", ".join(
                f"{version} in {path}" for version, path in versions.items()
            )
