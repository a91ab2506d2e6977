"""`run`: render every task, run them in batches of like length, commit each task as soon as it is whole."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from probe.errors import BadInput, DiskError, RunDirectoryError, UsageError
from probe.harness.batches import failed_task, n_tokens, prefill_batch, run_batch
from probe.harness.generators import OWN, Generator, TokenSource, open_generator, refuse_other_generator
from probe.harness.plan import (
    Inputs,
    Options,
    TaskPlan,
    codec_of,
    make_options,
    notices,
    plan,
    read_given,
    read_inputs,
    repeated_calls,
)
from probe.harness.schedule import batch_budget, schedule
from probe.harness.stop import RunStopped, stopping
from probe.harness.vocabulary import Vocabulary
from probe.tasks import Task, kind_named

if TYPE_CHECKING:
    from probe.capture.edits import Steering
    from probe.model.hooked import Model
    from probe.runs import Run, RunWriter


class Progress(Protocol):
    """Who watches: a message, the number of tasks, each task with the tokens it ran, and the end."""

    def start(self, total: int, unit: str = "tasks") -> None: ...
    def expect(self, total: int) -> None: ...
    def log(self, message: str) -> None: ...
    def done(self, n_tokens: int, count: int = 1) -> None: ...
    def end(self) -> None: ...


Execute = Callable[[Path, "Model", list[TaskPlan], Options, Progress], None]
"""Runs the tasks of a run that is prepared."""


class SilentProgress:
    """Nobody watches."""

    def start(self, total: int, unit: str = "tasks") -> None: ...
    def expect(self, total: int) -> None: ...
    def log(self, message: str) -> None: ...
    def done(self, n_tokens: int, count: int = 1) -> None: ...
    def end(self) -> None: ...


def run(
    tasks: str | Path,
    *,
    model: str | Path | Model = "smollm2-135m",
    out: str | Path | None = None,
    progress: Progress | None = None,
    argv: Sequence[str] | None = None,
    edits: Sequence[Steering] = (),
    execute: Execute | None = None,
    **options: Any,
) -> Run:
    """Run a task file and return its run, opened; `model` may be a loaded one, `edits` change its states. `execute` is
    what runs the tasks once the run is prepared, in place of this process.

    Raises BadInput, ModelUnavailable, RunDirectoryError or DiskError before or while running; tasks that fail
    are recorded with their status and do not stop the run.
    """
    from probe.runs import Run, RunWriter, default_path, prepare
    from probe.runs.files import EDITS

    progress = progress or SilentProgress()
    model = str(model) if isinstance(model, Path) else model
    name = model if isinstance(model, str) else model.source.name
    if not isinstance(model, str):  # what resume has to load again
        options |= {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
        options["revision"] = model.source.revision
    choices = make_options(name, options)
    choices = replace(choices, batch_bytes=None if choices.batch_size else batch_budget(choices))
    given = read_inputs(Path(tasks), choices)
    path = Path(out) if out is not None else default_path(Path("runs"))
    prepare(path)
    loaded = load_model(model, choices, progress)
    loaded.check_edits([edit.everywhere for edit in edits])
    plans = plan(given.tasks, loaded.tokenizer, loaded.facts, choices, edits)
    _refuse_oversize(plans, loaded, choices)
    generator = open_generator(choices, loaded)
    header, inputs = _header(given, _anchored(choices), loaded, plans, argv), _kept(given)
    if edits:
        from probe.runs.edits import encode_edits

        inputs[EDITS] = encode_edits(edits)
        sha256 = hashlib.sha256(inputs[EDITS]).hexdigest()
        header["edits"] = {"sha256": sha256, "states": [edit.document() for edit in edits]}
    if choices.generator != OWN:
        header["generator"] = {"name": choices.generator} if generator is None else generator.describe()
    with RunWriter.create(path, header, inputs) as writer:
        if execute is None:
            _execute(writer, loaded, plans, choices, generator, progress)
    if execute is not None:
        execute(path, loaded, plans, choices, progress)
    return Run(path)


def resume(
    path: str | Path,
    *,
    progress: Progress | None = None,
    load: Callable[[Options], Model] | None = None,
    execute: Execute | None = None,
) -> Run:
    """Run what is missing of an interrupted run; the result is that of an uninterrupted one, to the bit on the same
    machine: batches are those of the whole file, and run whole. Calls of committed tasks are not made again; those of
    tasks that had begun are, which is said. `load` gives its model, where there is another way; `execute` runs it in place of this
    process."""
    from probe.runs import Run, RunWriter
    from probe.runs.edits import kept_edits

    progress = progress or SilentProgress()
    handed_over: tuple[Model, list[TaskPlan], Options] | None = None
    with RunWriter.resume(Path(path)) as writer:
        choices, chosen = reopen(Path(path), writer.run)
        if any(task.id not in writer.committed for task in chosen):
            loaded = load(choices) if load else load_model(choices.model, choices, progress)
            refuse_other_weights(writer.run, loaded)
            edits = kept_edits(Path(path), writer.run)
            plans = plan(chosen, loaded.tokenizer, loaded.facts, choices, edits, writer.record)
            anew = [entry for entry in plans if entry.task.id not in writer.committed]
            if notice := repeated_calls(anew, choices):
                progress.log(notice)
            generator = open_generator(choices, loaded)
            refuse_other_generator(writer.run, generator)
            if execute is None:
                _execute(writer, loaded, plans, choices, generator, progress)
            else:
                handed_over = loaded, plans, choices
        else:
            texts = token_texts(writer, Vocabulary([writer.run], choices, progress.log).text)
            writer.finish(end_status(writer), **texts)
            progress.end()
    if execute is not None and handed_over is not None:
        execute(Path(path), *handed_over, progress)
    return Run(Path(path))


def options_of(path: Path, header: dict[str, Any]) -> Options:
    """The options that the run `path` began with. Raises a Fault of run.json where they are none."""
    from probe.runs.files import RUN, FileFault, header_faults

    with header_faults(path):
        saved = dict(header["options"])
        if not saved.get("date"):  # older runs took the clock's
            saved["date"] = str(header["created"])[:19]
    try:
        return msgspec.convert({key: value for key, value in saved.items() if value is not None}, Options)
    except msgspec.ValidationError as error:
        raise FileFault(path / RUN, "altered", f"options: {error}") from error


def reopen(path: Path, header: dict[str, Any]) -> tuple[Options, tuple[Task, ...]]:
    """The options and tasks that a run began with, from the copy that it keeps.

    Raises RunDirectoryError where what it does not keep has changed: tool files, and all of it in earlier versions.
    """
    from probe.runs.files import CATALOGUE, TASK_FILE, header_faults
    from probe.runs.manifest import checked_inputs

    choices = options_of(path, header)
    kept = checked_inputs(path, header)
    if kept:
        given = read_given(kept[TASK_FILE], kept.get(CATALOGUE), choices)
    else:
        with header_faults(path):
            file = Path(header["task_file"]["path"])
        if not file.exists():
            raise RunDirectoryError(
                f"{path}: its task file {file} is not there, and runs of earlier versions keep no copy: put it back, "
                "or go to the folder in which the run began"
            )
        given = read_inputs(file, choices)
    with header_faults(path):
        unchanged = given.file.sha256 == header["task_file"]["sha256"]
    if not unchanged:
        raise RunDirectoryError(
            f"{path}: the task file {given.file.path} has changed since this run began; start a new run"
        )
    if tools_hash(given.tasks, choices) != header.get("tools_sha256"):
        changed = choices.tool_files or given.catalogue
        raise RunDirectoryError(
            f"{path}: the tools in {changed} have changed since this run began; start a new run"
        )
    return choices, given.tasks


# -- preparing ---------------------------------------------------------------------------------------------------


def load_model(model: str | Model, choices: Options, progress: Progress) -> Model:
    if not isinstance(model, str):
        return model
    from probe.model import load

    progress.log(f"loading {model}")
    return load(
        model,
        dtype=choices.dtype,
        device=choices.device,
        revision=choices.revision,
        offline=choices.offline,
        log=progress.log,
    )


def _refuse_oversize(plans: list[TaskPlan], model: Model, choices: Options) -> None:
    if choices.max_bytes is None:
        return
    from probe.harness.estimate import estimate

    predicted = estimate(plans, model.facts, model.dtype.itemsize, choices)
    if refusal := predicted.refusal(choices.max_bytes):
        raise UsageError(refusal)


def _anchored(choices: Options) -> Options:
    """Options that mean the same in any folder: paths of models and tool files from the root."""
    from probe.model.names import anchored

    files = tuple(str(Path(file).absolute()) for file in choices.tool_files)
    return replace(choices, model=anchored(choices.model), tool_files=files)


def _kept(given: Inputs) -> dict[str, bytes]:
    """What a run keeps of its inputs, to be resumed and analyzed wherever it is: the task file and the catalogue."""
    from probe.runs.files import CATALOGUE, TASK_FILE

    try:
        data = Path(given.file.path).read_bytes()
    except OSError:
        data = b""
    if hashlib.sha256(data).hexdigest() != given.file.sha256:
        raise BadInput([f"{given.file.path}:1:1: file: changed while the model was loaded: run it again"])
    if given.tools is None:
        return {TASK_FILE: data}
    catalogue = {"tools": [tool.document() for tool in given.tools.values()]}
    return {TASK_FILE: data, CATALOGUE: json.dumps(catalogue, ensure_ascii=False).encode()}


def _header(
    given: Inputs,
    choices: Options,
    model: Model,
    plans: list[TaskPlan],
    argv: Sequence[str] | None,
) -> dict[str, Any]:
    from probe.model import describe

    kinds = sorted({plan.task.kind for plan in plans})
    specs = {kind: choices.capture_spec(kind, model.facts.n_layers) for kind in kinds}
    tool_prompts = [
        prompt for entry in plans for prompt in entry.prompts[:1] if prompt.call_prefix is not None
    ]
    template = next((entry.prompts[0].template for entry in plans if entry.prompts), {})
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": list(sys.argv if argv is None else argv),
        "seed": choices.seed,
        "options": {key: value for key, value in asdict(choices).items() if key != "offline"},
        "task_file": {"path": given.file.path, "sha256": given.file.sha256, "n_tasks": len(plans)},
        "catalogue": str(given.catalogue) if given.catalogue else None,
        "tools_sha256": tools_hash([plan.task for plan in plans], choices),
        "task_ids": [plan.task.id for plan in plans],
        **shard_entry(given, choices),
        "kinds": kinds,
        "model": describe(model),
        "template": template
        | {
            "chat_template_sha256": _sha(getattr(model.tokenizer, "chat_template", None)),
            "asks_date": "strftime_now" in str(getattr(model.tokenizer, "chat_template", None)),
        },
        "call_prefix": tool_prompts[0].call_prefix if tool_prompts else None,
        "no_tool": tool_prompts[0].no_tool if tool_prompts else None,
        "generation": {kind: asdict(choices.generation(kind)) for kind in kinds},
        "reasoning": choices.reasoning,
        "tool_choice": choices.tool_choice,
        "capture": {
            kind: {
                "sites": sorted(spec.sites),
                "layers": spec.layer_list(model.facts.n_layers),
                "rows": sorted(spec.rows),
                "all_rows": spec.all_rows,
            }
            for kind, spec in specs.items()
        },
        "packages": _packages(),
        "git_commit": _git_commit(),
    }


def shard_entry(given: Inputs, choices: Options) -> dict[str, Any]:
    """`shard` for run.json: which part it is, and how many tasks of the selection belong to no part but others."""
    if choices.shard is None:
        return {}
    number, count = map(int, choices.shard.split("/"))
    others = given.n_selected - len(given.tasks)
    return {"shard": {"number": number, "of": count, "n_tasks_elsewhere": others}}


def _sha(text: Any) -> str | None:
    return hashlib.sha256(str(text).encode()).hexdigest() if text else None


def tools_hash(tasks: Sequence[Task], choices: Options) -> str | None:
    """Hash of the tools as shown and of the user's tool files: that of the task file covers neither."""
    shown = [getattr(task, "tools", ()) for task in tasks]
    try:
        files = [Path(path).read_bytes() for path in choices.tool_files]
    except OSError as error:
        raise BadInput([f"{error.filename}:1:1: file: cannot be read ({error.strerror})"]) from None
    return _sha([shown, files] if files else shown)


def _packages() -> dict[str, str]:
    names = ("probe", "torch", "transformers", "transformer-lens", "tokenizers", "safetensors", "numpy")
    versions = {"python": sys.version.split()[0]}
    for name in names:
        try:
            versions[name] = importlib.metadata.version("probe-harness" if name == "probe" else name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git_commit() -> str | None:
    """Commit of the source tree probe runs from, if it is one."""
    here = Path(__file__).parent
    try:
        out = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip() or None


def refuse_other_weights(saved: dict[str, Any], model: Model) -> None:
    from probe.model.weights import weights_hash

    if weights_hash(model.hf) != saved["model"]["weights_hash"]:
        raise RunDirectoryError(
            f"{saved['model']['name']} has other weights now than when this run began; start a new run"
        )
    before = (saved.get("template") or {}).get("chat_template_sha256")
    if _sha(getattr(model.tokenizer, "chat_template", None)) != before:
        raise RunDirectoryError(
            f"{saved['model']['name']} has another chat template now than when this run began; start a new run"
        )


# -- running -----------------------------------------------------------------------------------------------------


def _execute(
    writer: RunWriter,
    model: Model,
    plans: list[TaskPlan],
    choices: Options,
    generator: Generator | None,
    progress: Progress,
) -> None:
    from probe.capture import Capturer, Prefixes
    from probe.capture.sites import sequence_bytes

    codec = codec_of(model.tokenizer, model.facts.n_ctx, choices, model.switches, model.stop_ids)
    done = set(writer.committed)
    missing = [entry for entry in plans if entry.task.id not in done]
    source = TokenSource(generator, codec, choices)

    def commit(record: dict[str, Any], arrays: dict[str, Any], metadata: dict[str, str]) -> None:
        if record["id"] not in done:
            writer.commit(record, arrays, metadata)
            source.watch(record)
            progress.done(n_tokens(record))

    for notice in notices(missing):
        progress.log(notice)
    progress.start(len(missing))
    try:
        with stopping():
            for entry in missing:
                if entry.fault:
                    commit(*failed_task(entry, "error", entry.fault, 0.0))
            for group in schedule(plans, model.facts, choices):
                # What counts is the same on every machine, so that prefixes are dropped when they were before.
                prefixes = Prefixes(
                    bytes_of=partial(sequence_bytes, model.facts, model.dtype.itemsize, states=1)
                )
                capturer = Capturer(model, codec, group.spec, group.generation, prefixes)
                jobs = [[job for entry in batch for job in entry.jobs] for batch in group.batches]
                wanted = [
                    number
                    for number, batch in enumerate(group.batches)
                    if any(entry.task.id not in done for entry in batch)
                ]
                tokens = source.under(group.generation)
                what = capturer.expect(jobs, wanted)
                source.expect(
                    (job for each, doing in zip(jobs, what, strict=True) if doing == "run" for job in each),
                    group.generation,
                )
                for number, doing in enumerate(what):
                    if doing == "run":
                        run_batch(capturer, group.batches[number], commit, tokens)
                    elif doing == "prefill":
                        prefill_batch(capturer, group.batches[number], commit, tokens)
                    else:
                        capturer.skip(jobs[number])
            writer.flush()
    except RunStopped as stopped:
        stopped.advice = f"`probe resume {writer.path}` continues the run"
        writer.finish("interrupted")
        raise
    except BaseException:
        with suppress(DiskError):  # the disk may be what failed; the first error is the one to show
            writer.finish("failed")
        raise
    finally:
        source.close()
    if told := source.told_apart():
        progress.log(told)
    writer.finish(end_status(writer), **token_texts(writer, lambda token: codec.decode([token])))
    progress.end()


def token_texts(writer: RunWriter, decode: Callable[[int], str | None]) -> dict[str, dict[str, str]]:
    """`token_texts` for run.json: texts of the tokens that analyzers list by their numbers, for a run has no vocabulary.

    `decode` gives a token's text, None where it cannot be had.
    """
    from probe.runs import Run
    from probe.runs.views.prompting import items_of
    from probe.runs.views.shifts import listed_tokens

    kinds = [kind_named(name) for name in writer.run["kinds"]]
    if not any(kind is not None and kind.several for kind in kinds):
        return {}
    tokens = listed_tokens(items_of(Run(writer.path)))
    texts = {str(token): text for token in tokens if (text := decode(token)) is not None}
    return {"token_texts": texts} if texts else {}


def end_status(writer: RunWriter) -> str:
    """Status over all committed tasks: those of an earlier, interrupted part of the run count as well."""
    return "failed" if {"error", "nonfinite"} & set(writer.committed.values()) else "done"
