"""Shared models. Nothing here needs a hub; the default model comes from its wheel on first use."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny models lose by threads: they wait for each other, seven times as long on two busy cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

from tests.browser import MISSING

DEAREST = (
    "test_agent",
    "test_cli",
    "test_interventions",
    "test_memory",
    "test_report",
    "test_docs",
    "test_store",
    "test_extending",
    "test_calls",
    "test_planted",
    "test_analyzers",
    "test_compare",
    "test_tool_context",
    "test_prefixes",
    "test_lora_sweep",
    "test_shell",
    "test_replay",
    "test_damage",
    "test_benchmarks",
    "test_models",
)
"""Files that take longest, the longest first."""
TINY = ("tiny-llama", "tiny-gemma", "tiny-gpt2", "tiny-neox", "tiny-mistral", "tiny-gemma2", "tiny-qwen3")

MECHANISMS = ("tiny-llama", "tiny-gemma2", "tiny-gpt2")
"""Of them one of each sort, for tests that take seconds a model: groups of heads, soft caps with windows, learned positions."""


def pytest_collection_modifyitems(items):
    """The dearest files first, so that workers that take a file at a time (`--dist loadfile`) end together."""
    place = {name: number for number, name in enumerate(DEAREST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@cache
def tiny(name: str):
    """A tiny random model, loaded once a session."""
    import probe

    return probe.load(f"random:{name}")


@pytest.fixture(scope="session", params=TINY)
def tiny_model(request):
    return tiny(request.param)


@pytest.fixture(
    scope="session",
    params=[*MECHANISMS, *(pytest.param(n, marks=pytest.mark.slow) for n in TINY if n not in MECHANISMS)],
)
def mechanism(request):
    return tiny(request.param)


@pytest.fixture(scope="session")
def smollm2():
    import probe

    return probe.load("smollm2-135m")


def pytest_terminal_summary(terminalreporter):
    skipped = [
        report for report in terminalreporter.stats.get("skipped", ()) if MISSING in str(report.longrepr)
    ]
    if skipped:
        terminalreporter.line(f"browser tests skipped ({len(skipped)}): {MISSING}")


@contextmanager
def stopped_after(n: int | None) -> Iterator[list[str]]:
    """Ablations and grids are stopped by a signal after n calls of the scorer; the ids of the tasks that were scored."""
    from probe.experiments.tool.score import Scorer

    scored: list[str] = []
    outcomes, n_calls = Scorer.outcomes, itertools.count()

    def counted(self: Any, conditions: Any, *ran: Any) -> Any:
        if next(n_calls) == n:
            raise KeyboardInterrupt
        scored.extend(task_id for task_id, _ in conditions)
        return outcomes(self, conditions, *ran)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "outcomes", counted)
        yield scored


@pytest.fixture(scope="module")
def two_calls() -> Any:
    """What the two calls scored that made the planted run's experiment, the first of which was stopped."""
    return SimpleNamespace()
