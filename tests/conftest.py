"""Shared models. Nothing here needs a hub; the default model comes from its wheel on first use."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny models lose by threads: they wait for each other, seven times as long on two busy cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from functools import cache

import pytest

from tests.browser import MISSING

TINY = ("tiny-llama", "tiny-gemma", "tiny-gpt2", "tiny-neox", "tiny-mistral", "tiny-gemma2", "tiny-qwen3")


@cache
def tiny(name: str):
    """A tiny random model, loaded once a session."""
    import probe

    return probe.load(f"random:{name}")


@pytest.fixture(scope="session", params=TINY)
def tiny_model(request):
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
