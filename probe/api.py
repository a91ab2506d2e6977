"""The Python interface: `load` a model, `run`, `resume` or `analyze` tasks with analyses and report.

Everything heavy is imported where it is used: a bad task file is refused before torch is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import pandas  # pyright: ignore[reportMissingTypeStubs]

    from probe.analyzers.comparison import Comparison
    from probe.analyzers.registry import Measure
    from probe.capture.edits import Steering
    from probe.capture.model import CapturingModel
    from probe.harness.runner import Execute, Progress
    from probe.harness.sweep import RunGrid
    from probe.model.hooked import Model
    from probe.report.figures import MeasureFigure
    from probe.report.widget import ReportWidget
    from probe.runs import Packing, Run
    from probe.tasks.imports.lines import Account, Import, Imported

_COMMANDS = ("probe.training.lora.measure", "probe.training.memory.rule")
"""Modules outside the analyzers whose commands write measures."""


def load(
    name: str | Path = "smollm2-135m",
    *,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    offline: bool = False,
) -> CapturingModel:
    """Load a model by name: the default, a TransformerLens alias, a hub id, a directory, `random:NAME`.

    Raises ModelUnavailable with what to do, UsageError for an impossible dtype or device.
    """
    from probe.capture.model import CapturingModel
    from probe.model import load as load_model

    model = load_model(
        str(name), dtype=dtype, device=device, revision=revision, offline=offline, build=CapturingModel
    )
    assert isinstance(model, CapturingModel)
    return model


def run(
    tasks: str | Path | Mapping[str, Any] | Iterable[Mapping[str, Any]],
    *,
    model: str | Path | Model = "smollm2-135m",
    out: str | Path | None = None,
    analyze: bool = True,
    progress: Progress | None = None,
    argv: Sequence[str] | None = None,
    edits: str | Path | Iterable[Steering] = (),
    workers: int | None = None,
    ray: str | None = None,
    prepare: bool = False,
    **options: Any,
) -> Run:
    """Run a task file, analyze it, write the report, and return the run. The same as `probe run`.

    `tasks` may also be tasks, the objects that a file has one a line: they are written to RUN.tasks.jsonl beside the run.
    `workers` processes of this machine share the run, or as many actors of the Ray cluster at the address `ray`; with `prepare` it only begins, for `probe worker` to run.
    `model` may be a loaded one; `edits` (`Steering`, or the file that `write_edits` writes) change its states in every task
    and every generated token; `options` are those of the command with underscores. Raises BadInput, UsageError,
    ModelUnavailable, RunDirectoryError or DiskError; tasks that fail are recorded with their status and do not
    stop the run.
    """
    from probe.harness import runner

    progress = progress or runner.SilentProgress()
    edits = read_edits(edits) if isinstance(edits, str | Path) else tuple(edits)
    execute = _executed_by(workers, ray, prepare)
    if isinstance(tasks, str | Path):
        done = runner.run(
            tasks, model=model, out=out, progress=progress, argv=argv, edits=edits, execute=execute, **options
        )
    else:
        from probe.runs import default_path

        out = Path(out) if out is not None else default_path()
        file = _task_file(tasks, out)
        try:
            done = runner.run(
                file,
                model=model,
                out=out,
                progress=progress,
                argv=argv,
                edits=edits,
                execute=execute,
                **options,
            )
        finally:
            if not out.exists():  # the run could not begin, so nothing is left of it
                file.unlink(missing_ok=True)
    if analyze and not prepare:
        finish(done, progress)
    return done


def _executed_by(workers: int | None, ray: str | None, prepare: bool) -> Execute | None:
    from probe.errors import UsageError

    if prepare and (workers is not None or ray is not None):
        option = "--workers" if ray is None else "--ray"
        raise UsageError(f"{option} with --prepare: a prepared run is run by `probe worker RUN`")
    if ray is not None:
        from probe.harness.cluster import cluster

        return cluster(ray, workers)
    if workers is not None:
        from probe.harness.pool import pool

        return pool(workers)
    if not prepare:
        return None
    from probe.harness.workers import leave_to_workers

    return leave_to_workers


def work(
    run: str | Path,
    *,
    analyze: bool = True,
    device: str | None = None,
    lease_s: float | None = None,
    progress: Progress | None = None,
) -> Run | None:
    """Join a run that has begun or was prepared and run what no other worker does. The same as `probe worker`.

    Returns the run where this worker was the last one, which analyzes it and writes the report; else None. Raises as
    `resume`.
    """
    from probe.harness import runner, workers

    progress = progress or runner.SilentProgress()
    done = workers.work(run, progress=progress, device=device, lease_s=lease_s)
    if done is not None and analyze and not done.has_measures:
        finish(done, progress)
    return done


def sweep(
    tasks: str | Path,
    *,
    models: Sequence[str | Path] = ("smollm2-135m",),
    dtypes: Sequence[str] = ("float32",),
    seeds: Sequence[int] = (0,),
    systems: Mapping[str, str | None] | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    argv: Sequence[str] | None = None,
    **options: Any,
) -> RunGrid:
    """Run a task file under every model, dtype, system message (name → text, None: the tasks' own) and seed, a run each, in
    the folder `out`. The same as `probe sweep`; `probe.compare(sweep.runs)` puts them side by side.

    What is finished there is not run again. A cell that fails is in `problems` and does not end the others. Raises as
    `run` for what is wrong before any cell runs.
    """
    from probe.harness.runner import SilentProgress
    from probe.harness.sweep import grid
    from probe.harness.sweep import sweep as run_cells

    progress = progress or SilentProgress()
    cells = grid(map(str, models), dtypes, seeds, systems or {})
    return run_cells(
        tasks,
        Path(out) if out is not None else sweep_folder(tasks),
        cells,
        options,
        finish=lambda done: finish(done, progress),
        progress=progress,
        argv=argv,
    )


def sweep_folder(tasks: str | Path) -> Path:
    """Where a sweep of a task file goes that is not told, so that the same command continues it."""
    return (
        Path("runs") / f"sweep-{str(tasks).removeprefix('probe:').rpartition('/')[2].removesuffix('.jsonl')}"
    )


def read_edits(path: str | Path) -> tuple[Steering, ...]:
    """The edits of a file that `write_edits` wrote. Raises BadInput for another file."""
    from probe.runs import edits

    return edits.read_edits(path)


def write_edits(path: str | Path, edits: Sequence[Steering]) -> Path:
    """Write edits to a file for `probe run --edit`. Raises DiskError."""
    from probe.runs.edits import encode_edits
    from probe.runs.export import write_file

    return write_file(Path(path), encode_edits(edits))


def figures(run: Run | str | Path, *names: str) -> list[MeasureFigure]:
    """Measures of a run as figures: each has `frame` (a DataFrame), `draw(axes)` (matplotlib), `vega()` (Vega-Lite) and `save`.

    Names are MEASURE or ANALYZER.MEASURE; without any, all that are more than one number. Raises UsageError for a name of which
    the run has no row, RunDirectoryError where it was not analyzed.
    """
    from probe.report.figures import figures as of_measures
    from probe.runs import Run

    return of_measures(run if isinstance(run, Run) else Run(run), names)


def widget(run: Run | str | Path, task: str | None = None, **traits: Any) -> ReportWidget:
    """The report of a run as a widget of a notebook, opened at a task where one is named.

    `widget.task`, `widget.card` and `widget.selection` say what is open in it, and open what is put there; `traits` are these
    and `height`, in pixels. Raises UsageError where the extra `notebook` is not installed, NotInRun for an unknown task.
    """
    from probe.errors import UsageError
    from probe.runs import Run

    try:
        from probe.report.widget import ReportWidget
    except ModuleNotFoundError as error:
        if error.name not in ("anywidget", "traitlets"):
            raise
        raise UsageError(
            "the widget needs anywidget: pip install 'probe-harness[notebook]', then restart the kernel"
        ) from None
    return ReportWidget(run if isinstance(run, Run) else Run(run), task, **traits)


def _task_file(tasks: Mapping[str, Any] | Iterable[Mapping[str, Any]], run: Path) -> Path:
    """A task file beside the run directory, from which it can be resumed and analyzed."""
    from probe.errors import UsageError
    from probe.runs.export import write_file
    from probe.runs.write import prepare

    prepare(run)
    try:
        entries = [cast("Mapping[str, Any]", tasks)] if isinstance(tasks, Mapping) else list(tasks)
        lines = [json.dumps(task, ensure_ascii=False) for task in entries]
    except (TypeError, ValueError) as error:
        raise UsageError(f"tasks: give a path, or a list of objects as in a task file: {error}") from None
    return write_file(
        run.with_name(f"{run.name}.tasks.jsonl"), "".join(f"{line}\n" for line in lines).encode()
    )


def resume(
    path: str | Path, *, analyze: bool = True, workers: int | None = None, progress: Progress | None = None
) -> Run:
    """Run what is missing of an interrupted run; the result is that of an uninterrupted one. `workers` processes share it, as in
    `run`."""
    from probe.harness import runner

    progress = progress or runner.SilentProgress()
    done = runner.resume(path, progress=progress, execute=_executed_by(workers, None, False))
    if analyze:
        finish(done, progress)
    return done


def merge(
    runs: Iterable[str | Path],
    out: str | Path,
    *,
    analyze: bool = True,
    progress: Progress | None = None,
    argv: Sequence[str] | None = None,
) -> Run:
    """Put runs of the shards of a task file together in the new run `out`. The same as `probe merge`.

    Raises UsageError where weights, chat template, options or task file differ, RunDirectoryError, ArtifactCorrupt and
    DiskError.
    """
    from probe.harness.merge import merge as put_together
    from probe.harness.runner import SilentProgress

    progress = progress or SilentProgress()
    done = put_together([Path(path) for path in runs], Path(out), progress=progress, argv=argv)
    if analyze:
        finish(done, progress)
    return done


def analyze(
    run: Run | str | Path,
    names: str | Sequence[str] = (),
    *,
    model: bool | Model = True,
    quick: bool = False,
    train: Run | str | Path | None = None,
    prompted: Run | str | Path | None = None,
    progress: Progress | None = None,
    **effort: Any,
) -> Run:
    """Make experiments on a run, measure it, renew its report, and return the run. The same as `probe analyze`.

    `names` are experiments or analyzers; without any, experiments that are missing are made and all analyzers run. `model`
    may be a loaded one; False makes no experiment. `quick` makes the deciding experiments alone. `train` is another run, on
    which `foresight` fits what it tests on this one, and `prompted` one of the same tasks under another prompt. `effort` has `orders`,
    `draws`, `standard_error`, `most_draws`, `every_tool`, `pairs`, `systems`, `between` and `seed`, as the command, and of
    steering `steer_layers`, `doses` and `most_kl`. Raises UsageError, and for an experiment that is named BadInput,
    ModelUnavailable and RunDirectoryError.
    """
    from probe.analyzers import analyze as compute
    from probe.analyzers import analyzers, not_captured
    from probe.errors import BadInput, ModelUnavailable, RunDirectoryError, UsageError
    from probe.experiments import EXPERIMENTS, Effort, intervene
    from probe.harness.runner import SilentProgress
    from probe.report import write_report
    from probe.runs import Run

    opened = run if isinstance(run, Run) else Run(run)
    named = [names] if isinstance(names, str) else list(names)
    _refuse_unknown(named, [*analyzers(), *EXPERIMENTS])
    asked = [name for name in named if name in EXPERIMENTS]
    chosen = [name for name in named if name not in EXPERIMENTS]
    if model is False and (asked or quick):
        raise UsageError(f"{asked[0] if asked else '--quick'} with --no-model: an experiment needs the model")
    others = {
        name: path if isinstance(path, Run) else Run(path)
        for name, path in (("train", train), ("prompted", prompted))
        if path is not None
    }
    if others and named and "foresight" not in named:
        raise UsageError(f"--{next(iter(others))} with {', '.join(named)}: it is for foresight")
    if others:
        from probe.analyzers.foresight import refuse_misfits

        refuse_misfits(opened, others.get("train"), others.get("prompted"))
    try:
        wanted = Effort(**effort)
    except TypeError:
        raise UsageError(f"analyze: options are {', '.join(Effort.__dataclass_fields__)}") from None
    progress = progress or SilentProgress()
    if model is not False and (asked or quick or not named):
        loaded = None if isinstance(model, bool) else model
        try:
            intervene(opened, asked, quick=quick, model=loaded, effort=wanted, progress=progress)
        except (BadInput, ModelUnavailable, RunDirectoryError) as error:
            if asked:
                raise
            progress.log(f"no experiments: {error}")
    chosen += dict.fromkeys(
        EXPERIMENTS[name].analyzer for name in asked if EXPERIMENTS[name].analyzer not in chosen
    )
    compute(opened, chosen, **others)
    for line in not_captured(opened, chosen):
        progress.log(line)
    if opened.has_report:
        write_report(opened)
    return opened


def features(
    run: Run | str | Path,
    sae: str | Path,
    *,
    layer: int | None = None,
    model: bool | Model = True,
    top: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> Run:
    """Apply a sparse autoencoder to the residual stream that a run holds, ablate its features, measure both, and return the run.
    The same as `probe features`.

    `sae` is a directory, or OWNER/REPOSITORY/FOLDER of the hub, in the format of SAELens or Gemma Scope; `layer` where its
    files do not say behind which it was trained; `model` as in `analyze`, False ablates nothing; `top` features of a tool are
    ablated. Raises UsageError, BadInput, ModelUnavailable and RunDirectoryError.
    """
    from probe.experiments import Effort, encode
    from probe.runs import Run

    opened = run if isinstance(run, Run) else Run(run)
    if model is False:
        encode(opened, Effort(sae=str(sae), sae_layer=layer))
    return analyze(
        opened,
        ["features"] if model is False else ["feature_ablation"],
        model=model,
        progress=progress,
        sae=str(sae),
        sae_layer=layer,
        top=top,
        seed=seed,
    )


def _refuse_unknown(names: Sequence[str], known: Sequence[str]) -> None:
    """Before the experiments, which take minutes."""
    from difflib import get_close_matches

    from probe.errors import UsageError

    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise UsageError(f"no analyzer or experiment {name!r}: {hint}")


def import_tasks(
    format: str,
    paths: str | Path | Iterable[str | Path],
    output: str | Path | None = None,
    *,
    kind: str | None = None,
    category: str | None = None,
    tools: str | Path | None = None,
) -> Imported:
    """Tasks of logs and data sets of other programs, and what of these could not be taken. The same as `probe tasks import`.

    `format` is one of `openai`, `anthropic`, `inspect`, `scout`, `tau2`, `mcp`, `hf`, `vllm` and `bfcl`; `paths` are files or
    folders. `kind` is `tool_selection` (a task a decision) or `replay` (one a conversation), `category` one of the
    leaderboard's, and `tools` a catalogue for logs that have no definitions. The tasks are written to `output` where it is
    given. Raises BadInput where nothing can be taken, UsageError and DiskError.
    """
    from probe.runs.export import write_file
    from probe.tasks.imports.lines import Imported, encode

    importing = _importing(format, paths, kind, category, tools)
    lines = list(importing.lines())
    if output is not None:
        write_file(Path(output), encode(lines, Path(output), importing.format))
    return Imported(lines, importing.account)


def import_file(
    format: str,
    paths: Iterable[str | Path],
    output: Path,
    *,
    kind: str | None = None,
    category: str | None = None,
    tools: str | Path | None = None,
) -> Account:
    """`import_tasks` into a file alone, a task at a time: a log of any length takes the memory of one of its records."""
    from probe.runs.export import write_file
    from probe.tasks.imports.lines import encode

    importing = _importing(format, paths, kind, category, tools)
    write_file(output, encode(importing.lines(), output, importing.format))
    return importing.account


def _importing(
    format: str,
    paths: str | Path | Iterable[str | Path],
    kind: str | None,
    category: str | None,
    tools: str | Path | None,
) -> Import:
    from probe.errors import UsageError
    from probe.tasks.imports.lines import Import
    from probe.tasks.imports.registry import FORMATS
    from probe.tools.definitions import read_catalogue

    if format not in FORMATS:
        raise UsageError(f"format {format!r}: is none: give one of {', '.join(FORMATS)}")
    given = [paths] if isinstance(paths, str | Path) else paths
    catalogue = read_catalogue(Path(tools)).values() if tools is not None else ()
    return Import(
        FORMATS[format], [Path(path) for path in given], kind=kind, category=category, tools=tuple(catalogue)
    )


def memory(
    model: str | Path, *, gpu: str | None = None, rule_of_thumb: bool = False, **options: Any
) -> dict[str, Any]:
    """The memory that fine-tuning `model` takes, as a document. The same as `probe memory MODEL --json`.

    `options` are those of the command with underscores, such as `method="lora"`, `loss="chunked"`, `batch=2`, and
    `measure="tracked"`; `targets` may be a list. Raises UsageError and ModelUnavailable.
    """
    from probe.training.memory.command import answer

    return answer(str(model), rule_of_thumb, gpu, options)


def definitions() -> list[Measure]:
    """The definition of every measure: of this package's analyzers and commands, and of installed analyzers."""
    from probe.analyzers import all_measures

    return all_measures(_COMMANDS)


def push(run: Run | str | Path, repository: str, *, public: bool = False, message: str | None = None) -> str:
    """Upload a run to the dataset repository OWNER/NAME of the hub, private unless `public`; returns the commit. The same as
    `probe push`. Raises RunDirectoryError (not ended), ArtifactCorrupt, UsageError (no such repository) and DiskError."""
    from probe.runs import Run as Opened
    from probe.runs import publish

    return publish.push(
        run if isinstance(run, Opened) else Opened(run), repository, public=public, message=message
    )


def pull(repository: str, out: str | Path, *, revision: str | None = None) -> Run:
    """Download a run that `push` uploaded into `out`, new or empty, and open it. The same as `probe pull`. Raises as `push`."""
    from probe.runs import publish

    return publish.pull(repository, Path(out), revision=revision)


def pack(run: Run | str | Path, *, pack_bytes: int | None = None, dry_run: bool = False) -> Packing:
    """Seal the finished tasks of a run into packs of about `pack_bytes` bytes (2 GiB); returns what was done, as numbers. The same
    as `probe pack`. A run that was open is to be opened again. Raises RunDirectoryError (busy), ArtifactCorrupt and DiskError."""
    from probe.runs import PACK_BYTES, pack_run

    path = run if isinstance(run, str | Path) else run.path
    return pack_run(path, PACK_BYTES if pack_bytes is None else pack_bytes, dry_run=dry_run)


def unpack(run: Run | str | Path, *, dry_run: bool = False) -> Packing:
    """Put every packed task back into a folder of its own, byte for byte. The same as `probe unpack`. Raises as `pack`."""
    from probe.runs import unpack_run

    return unpack_run(run if isinstance(run, str | Path) else run.path, dry_run=dry_run)


def compare(runs: Sequence[str | Path | Run], *, by: str | None = None) -> Comparison:
    """Runs of the same tasks side by side, each paired with the first one: DataFrames `runs`, `differences`, `flips`,
    `layers` and `strata`. The same as `probe compare`; docs/compare.md says how intervals and tests are made.

    `by` is `variant` or `metadata.KEY` and takes one run or more. Raises UsageError for runs that cannot be compared.
    """
    from probe.analyzers.comparison import compare as put_side_by_side
    from probe.runs import Run as Opened

    return put_side_by_side([run if isinstance(run, Opened) else Opened(run) for run in runs], by)


def measures() -> pandas.DataFrame:
    """Definitions of all measures, one a row: analyzer, name, unit, of, axes, means, source, interval, needs, figure.

    `of`, `axes` and `needs` are words with blanks between them or commas (`needs`); an axis with `?` is null in some
    rows; `figure` is the kind of figure that the report draws, or why it draws none.
    """
    import pandas  # pyright: ignore[reportMissingTypeStubs]

    columns = ("analyzer", "name", "unit", "of", "axes", "means", "source", "interval", "needs", "figure")
    rows = [defined.document() for defined in definitions()]
    return pandas.DataFrame(rows, columns=pandas.Index(columns))


def finish(run: Run, progress: Progress) -> None:
    """First analyses and the report, from the run alone."""
    from probe.analyzers import analyze, not_captured
    from probe.harness.runner import RunStopped, stopping
    from probe.report import write_report

    progress.log("analyzing")
    try:
        with stopping():
            try:
                analyze(run)
            except Exception:  # an analyzer of another package that fails does not cost the report
                write_report(run)
                raise
            for line in not_captured(run):
                progress.log(line)
            write_report(run)
    except RunStopped as stopped:
        stopped.advice = f"every task is kept: `probe analyze {run.path} --no-model` measures them"
        raise
