"""`sweep`: a task file under every model, dtype, system message and seed of a grid, a run each, in one folder.

A finished run is not run again and an interrupted one is resumed; a cell that fails does not end the others. A model is
loaded once for all cells of a dtype, and not where they are finished.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.errors import (
    ArtifactCorrupt,
    DiskError,
    ModelUnavailable,
    ProbeError,
    RunDirectoryError,
    UsageError,
)
from probe.harness import runner
from probe.harness.plan import Options, make_options, read_inputs
from probe.model.names import anchored

if TYPE_CHECKING:
    from probe.harness.runner import Progress
    from probe.model.hooked import Model
    from probe.runs import Run

VARIED = ("model", "dtype", "system", "seed")
"""Options of a run that a sweep varies; all else its cells share."""
COSTS = ("n_tasks", "prompt_tokens", "new_tokens", "disk_bytes", "memory_bytes")
"""What is predicted of a cell; new tokens and bytes are the most that there can be."""


@dataclass(frozen=True)
class GridCell:
    """One run of a sweep."""

    model: str
    dtype: str
    seed: int
    system: str | None = None
    """Name of its system message; None: the tasks' own."""
    text: str | None = None
    """That message."""

    @property
    def name(self) -> str:
        """Name of its run directory."""
        parts = (self.model.rstrip("/").rpartition("/")[2], self.dtype, self.system, f"seed{self.seed}")
        return "_".join(re.sub(r"[^\w.-]+|^\.+", "-", part, flags=re.ASCII) for part in parts if part)

    def options(self) -> dict[str, Any]:
        """The options of a run that are this cell's own."""
        return {"dtype": self.dtype, "seed": self.seed, "system": self.text}


@dataclass(frozen=True)
class CellRun:
    """What became of a cell."""

    cell: GridCell
    path: Path
    status: str
    """As in run.json; `missing` where there is no run, `broken` where it is damaged."""
    problem: str | None = None
    """Why it failed, or why some of its tasks did."""

    def document(self) -> dict[str, Any]:
        """The cell and what became of it, as JSON values."""
        varied = {name: getattr(self.cell, name) for name in VARIED}
        return varied | {"run": str(self.path), "status": self.status, "problem": self.problem}


@dataclass(frozen=True)
class RunGrid:
    """A folder of runs, in the order of the grid."""

    path: Path
    cells: tuple[CellRun, ...]

    @property
    def runs(self) -> list[Run]:
        """The runs that ended, opened."""
        from probe.runs import Run

        return [Run(cell.path) for cell in self.cells if cell.status in ("done", "failed")]

    @property
    def problems(self) -> dict[str, str]:
        """Name of a cell → why it failed."""
        return {entry.cell.name: entry.problem for entry in self.cells if entry.problem}


def grid(
    models: Iterable[str], dtypes: Iterable[str], seeds: Iterable[int], systems: Mapping[str, str | None]
) -> list[GridCell]:
    """The cells, the last axis fastest: model, dtype, system message, seed. `systems` is name → text (None: the tasks' own).

    Raises UsageError for an empty axis, and for two cells that would share a directory.
    """
    texts: dict[str | None, str | None] = {**systems} if systems else {None: None}
    cells = [
        GridCell(model, dtype, seed, None if text is None else system, text)
        for model in dict.fromkeys(models)
        for dtype in dict.fromkeys(dtypes)
        for system, text in texts.items()
        for seed in dict.fromkeys(seeds)
    ]
    if any(cell.dtype == "auto" for cell in cells):
        raise UsageError("sweep: --dtype auto: name the dtypes to compare, as float32,bfloat16")
    if not cells:
        raise UsageError("sweep: give at least one model, one dtype and one seed")
    names = [cell.name for cell in cells]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(
            f"sweep: two cells would be the directory {twice}: give their models or files other names"
        )
    return cells


def sweep(
    tasks: str | Path,
    folder: Path,
    cells: Sequence[GridCell],
    options: Mapping[str, Any],
    *,
    finish: Callable[[Run], None] = lambda run: None,
    progress: Progress | None = None,
    argv: Sequence[str] | None = None,
) -> RunGrid:
    """Run what is missing of the cells; `options` are those of a run, of all cells alike; `finish` measures a run.

    Raises UsageError and BadInput before anything runs, RunDirectoryError where the folder is another's or was made with
    other options, DiskError. Every other failure is that of its cell.
    """
    from probe.runs.cells import cell_folder, settle

    progress = progress or runner.SilentProgress()
    for cell in cells:
        make_options(cell.model, dict(options) | cell.options())
    with cell_folder(folder, ".", "--out"), runner.stopping():
        choices = _choices(folder, cells, options)
        settle(folder, _shared(Path(tasks), choices), "--out")
        given = dict(options) | {"date": choices.date}
        ends: list[CellRun] = []
        before = states(folder, cells)
        for _, group in groupby(before, lambda entry: (entry.cell.model, entry.cell.dtype)):
            loader = _Loader(progress)
            for entry in group:
                known = "" if entry.status == "missing" else f", {entry.status}"
                progress.log(f"cell {len(ends) + 1} of {len(cells)}: {entry.cell.name}{known}")
                ends.append(_end(tasks, entry, loader, given, finish, progress, argv))
    return RunGrid(folder, tuple(ends))


def states(folder: Path, cells: Sequence[GridCell]) -> list[CellRun]:
    """What is there of each cell, without running anything. Raises RunDirectoryError for a run of another cell."""
    return [_state(folder / cell.name, cell) for cell in cells]


def predict(
    tasks: str | Path, folder: Path, cells: Sequence[GridCell], options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The cells, what is there of each, and what those that are missing would cost, without weights.

    Raises as `sweep`; a model that is not available is the problem of its cells.
    """
    from probe.harness.dryrun import dry_run
    from probe.runs.cells import check_shared, refuse_foreign

    refuse_foreign(folder, "--out")
    check_shared(folder, _shared(Path(tasks), _choices(folder, cells, options)), "--out")
    documents: list[dict[str, Any]] = []
    for entry in states(folder, cells):
        document = entry.document()
        if entry.status in ("missing", "interrupted"):
            try:
                costs = dry_run(
                    Path(tasks), None, dict(options) | entry.cell.options() | {"model": entry.cell.model}
                )
                document |= {key: costs[key] for key in COSTS}
            except ModelUnavailable as error:
                document["problem"] = str(error)
        documents.append(document)
    return documents


class _Loader:
    """The model of some cells, loaded when the first of them needs it; where that failed, it fails again at once."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._model: Model | None = None
        self._problem: ProbeError | None = None

    def model(self, choices: Options) -> Model:
        if self._problem is not None:
            raise self._problem
        if self._model is None:
            try:
                self._model = runner.load_model(choices.model, choices, self._progress)
            except ProbeError as error:
                self._problem = error
                raise
        return self._model


def _choices(folder: Path, cells: Sequence[GridCell], options: Mapping[str, Any]) -> Options:
    """The options that all cells have alike, dated as the cells that are there."""
    from probe.runs.cells import read_shared

    date = options.get("date") or read_shared(folder).get("date")
    return make_options(cells[0].model, dict(options) | {"date": date})


def _shared(tasks: Path, choices: Options) -> dict[str, Any]:
    """What makes the runs of a sweep comparable."""
    given = read_inputs(tasks, choices)
    apart = (*VARIED, "offline", "batch_bytes", "tools")
    given_files = {"task_file": given.file.sha256, "tools": runner.tools_hash(given.tasks, choices)}
    return given_files | {key: value for key, value in asdict(choices).items() if key not in apart}


def _state(path: Path, cell: GridCell) -> CellRun:
    from probe.runs import Run
    from probe.runs.files import RUN
    from probe.runs.manifest import wanted_ids

    if not (path / RUN).exists():
        return CellRun(cell, path, "missing")
    try:
        run = Run(path)
        before = run.run.get("options") or {}
        ended = set(wanted_ids(run.run)) <= set(run.task_ids) and run.run.get("status") in ("done", "failed")
    except ProbeError as error:
        return CellRun(cell, path, "broken", str(error))
    wanted = {"model": anchored(cell.model)} | cell.options()
    if other := [f"{key} {before.get(key)!r}" for key, value in wanted.items() if before.get(key) != value]:
        raise RunDirectoryError(
            f"{path}: holds a run with {', '.join(other)}, which is not this cell's: give another directory with --out"
        )
    return CellRun(cell, path, str(run.run["status"]) if ended else "interrupted")


def _end(
    tasks: str | Path,
    before: CellRun,
    loader: _Loader,
    options: dict[str, Any],
    finish: Callable[[Run], None],
    progress: Progress,
    argv: Sequence[str] | None,
) -> CellRun:
    """Run, resume or leave one cell as it is."""
    from probe.runs import Run

    cell, path = before.cell, before.path
    if before.status == "broken":
        return before
    try:
        if before.status == "missing":
            cell_options = options | cell.options()
            model = loader.model(make_options(cell.model, cell_options))
            # The loaded model says its own dtype, device and revision.
            for key in ("dtype", "device", "revision"):
                cell_options.pop(key, None)
            run = runner.run(tasks, model=model, out=path, progress=progress, argv=argv, **cell_options)
        elif before.status == "interrupted":
            run = runner.resume(path, progress=progress, load=loader.model)
        else:
            run = Run(path)
        if run.has_measures and run.report_path:
            run.measures(
                arrow=True
            )  # where they are damaged, that is this cell's problem and not the comparison's
        else:
            finish(run)
    except DiskError:
        raise
    except runner.RunStopped as stopped:
        stopped.advice = "the same command goes on with what is missing"
        raise
    except Exception as error:  # whatever a cell raises is its own failure and not the sweep's end
        what = str(error) if isinstance(error, ProbeError) else f"{type(error).__name__}: {error}"
        progress.log(f"{cell.name} failed: {what}")
        damaged = isinstance(error, ArtifactCorrupt)
        return CellRun(cell, path, "broken" if damaged else _state(path, cell).status, what)
    status = str(run.run["status"])
    return CellRun(
        cell,
        path,
        status,
        f"some tasks failed; `probe show {path}` names them" if status == "failed" else None,
    )
