"""The Python interface: `load` a model, `run` or `resume` tasks with analyses and report.

Everything heavy is imported where it is used: a bad task file is refused before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas  # pyright: ignore[reportMissingTypeStubs]

    from probe.analyzers.registry import Measure
    from probe.capture.model import CapturingModel
    from probe.harness.runner import Progress
    from probe.model.hooked import Model
    from probe.runs import Run

_COMMANDS = ("probe.training.lora.measure", "probe.training.lora.compare", "probe.training.memory.rule")
"""Modules outside the analyzers whose commands write measures."""


def load(
    name: str = "smollm2-135m",
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
        name, dtype=dtype, device=device, revision=revision, offline=offline, build=CapturingModel
    )
    assert isinstance(model, CapturingModel)
    return model


def run(
    tasks: str | Path,
    *,
    model: str | Model = "smollm2-135m",
    out: str | Path | None = None,
    analyze: bool = True,
    progress: Progress | None = None,
    argv: Sequence[str] | None = None,
    **options: Any,
) -> Run:
    """Run a task file, analyze it, write the report, and return the run. The same as `probe run`.

    `model` may be a loaded one; `options` are those of the command with underscores. Raises BadInput,
    ModelUnavailable, RunDirectoryError or DiskError; tasks that fail are recorded with their status and do not
    stop the run.
    """
    from probe.harness import runner

    progress = progress or runner.SilentProgress()
    done = runner.run(tasks, model=model, out=out, progress=progress, argv=argv, **options)
    if analyze:
        finish(done, progress)
    return done


def resume(path: str | Path, *, analyze: bool = True, progress: Progress | None = None) -> Run:
    """Run what is missing of an interrupted run; the result is that of an uninterrupted one."""
    from probe.harness import runner

    progress = progress or runner.SilentProgress()
    done = runner.resume(path, progress=progress)
    if analyze:
        finish(done, progress)
    return done


def definitions() -> list[Measure]:
    """The definition of every measure: of this package's analyzers and commands, and of installed analyzers."""
    from probe.analyzers import all_measures

    return all_measures(_COMMANDS)


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
    from probe.analyzers import analyze
    from probe.report import write_report

    progress.log("analyzing")
    try:
        analyze(run)
    finally:  # an analyzer of another package that fails does not cost the report
        write_report(run)
