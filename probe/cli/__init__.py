"""The command line: parse, call one function, print. stdout carries data, stderr progress and messages.

    console        the group, errors and their exit codes, printing, progress
    run            run, resume
    sweep          sweep
    artifacts      analyze, features, show, report, view, figures, verify, diff, export
    folder         ls, rm, init, completion
    compare        compare
    publish        push, pull
    pack           pack, unpack
    workers        worker, merge
    inputs         tasks, tools, models, doctor
    distribution   distribution
    finetune       memory, lora
    pytest_plugin  fixtures that hold runs in a test suite

Only what parses is imported here; a command imports what it calls.
"""

from __future__ import annotations

from probe.cli import (
    artifacts,
    compare,
    distribution,
    finetune,
    folder,
    inputs,
    pack,
    publish,
    run,
    sweep,
    workers,
)
from probe.cli.console import main

__all__ = [
    "artifacts",
    "compare",
    "distribution",
    "finetune",
    "folder",
    "inputs",
    "main",
    "pack",
    "publish",
    "run",
    "sweep",
    "workers",
]
