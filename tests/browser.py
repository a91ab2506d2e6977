"""A page in headless Chromium. Without one the tests that need it are skipped; under CI=true they fail."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = (
    "there is no Chromium here, so nothing says that the report's scripts work (apt-get install chromium)"
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --dump-dom"
)

browser = pytest.mark.skipif(CHROMIUM is None and os.environ.get("CI") != "true", reason=MISSING)


def dom_of(page: Path, fragment: str = "", virtual: bool = True) -> tuple[str, list[str]]:
    """The document after its script ran, and what it wrote to the console; with `virtual`, timers have run too."""
    assert CHROMIUM is not None, MISSING
    flags = FLAGS.split() + ["--virtual-time-budget=3000"] * virtual
    with TemporaryDirectory(prefix="probe-browser-", ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *flags, f"--user-data-dir={profile}", f"{page.as_uri()}{fragment}"]
        out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return out.stdout, [line for line in out.stderr.splitlines() if "CONSOLE" in line]
