"""pytest fixtures that hold a model's runs: `assert_same_run`, `assert_tool`, and the option `--probe-update`.

pytest finds this module by its entry point in every project in which this package is installed; nothing is imported
before a fixture is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from probe.runs import Run
    from probe.runs.diff import Tolerance

_MOST = 10
"""Differences that a failure lists."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("probe", "runs of language models")
    group.addoption(
        "--probe-update",
        action="store_true",
        help="Make the runs of this session the baselines of assert_same_run.",
    )


@pytest.fixture
def assert_same_run(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`assert_same_run(run, baseline, tolerance=None)`: fail where a run is not that of the directory `baseline`.

    Tokens and choices are compared exactly, numbers within the tolerance of the run's dtype or the one given (of another device,
    say). The failure names the first task, site, layer and row. With `--probe-update` the run becomes the baseline.
    """

    def check(run: Run | str | Path, baseline: str | Path, tolerance: Tolerance | None = None) -> None:
        __tracebackhide__ = True
        from probe.runs import Run, diff
        from probe.runs.write import copy_run

        opened = run if isinstance(run, Run) else Run(run)
        if request.config.getoption("--probe-update"):
            copy_run(opened.path, Path(baseline))
            return
        if not Path(baseline).exists():
            pytest.fail(f"there is no baseline {baseline}: pytest --probe-update makes it", pytrace=False)
        differences = diff(Run(baseline), opened, tolerance)
        if differences:
            listed = [difference.message for difference in differences[:_MOST]]
            more = [f"and {len(differences) - _MOST} more"] if len(differences) > _MOST else []
            first = f"{opened.path} is not {baseline}: {len(differences)} differences"
            pytest.fail("\n".join([first, *listed, *more]), pytrace=False)

    return check


@pytest.fixture
def assert_tool() -> Callable[..., None]:
    """`assert_tool(run, task_id, tool, at_least=None)`: fail where a tool is not chosen, or P(tool | context) is below `at_least`.

    `tool` is None for no tool.
    """

    def check(
        run: Run | str | Path, task_id: str, tool: str | None, *, at_least: float | None = None
    ) -> None:
        __tracebackhide__ = True
        from probe.runs import Run
        from probe.runs.records import ToolRecord

        opened = run if isinstance(run, Run) else Run(run)
        decision = opened[task_id].typed(ToolRecord).decision
        probabilities = {entry.tool: entry.probability for entry in decision.tool_probabilities}
        listed = ", ".join(
            f"{name or 'no tool'} {p:.3f}"
            for name, p in sorted(probabilities.items(), key=lambda item: -item[1])
        )
        if tool not in probabilities:
            pytest.fail(f"task {task_id}: {tool} is no candidate: {listed}", pytrace=False)
        if at_least is None and decision.chosen != tool:
            pytest.fail(f"task {task_id}: {tool or 'no tool'} is not chosen: {listed}", pytrace=False)
        if at_least is not None and probabilities[tool] < at_least:
            pytest.fail(
                f"task {task_id}: P({tool or 'no tool'}) is below {at_least}: {listed}", pytrace=False
            )

    return check
