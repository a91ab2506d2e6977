"""Workers of one run killed at random instants: `python -m benchmarks.kills --tasks 1000 --workers 4 --kills 50`.

One process runs the tasks; then as many workers as asked for do, and SIGKILL hits one of them again and again. At the end
every task has to be committed once, its record and its tensors byte for byte those of the one process (the clock's `seconds`
apart), and the run has to verify.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

import probe
from probe.errors import ProbeError
from probe.harness.runner import SilentProgress
from probe.runs import Run, verify
from probe.runs.layout import task_places

OPTIONS: dict[str, Any] = {
    "model": "random:tiny-llama",
    "max_new_tokens": 8,
    "batch_size": 4,
    "analyze": False,
}


def tasks(count: int) -> Iterator[dict[str, Any]]:
    """Prompting tasks that share prefixes, and among them chains of thought."""
    for number in range(count):
        if number % 5 == 4:
            yield {"id": f"task {number}", "kind": "cot", "question": f"{number} + 2?", "answer": number + 2}
        else:
            example = {"input": "up ->", "output": " down"}
            yield {
                "id": f"task {number}",
                "kind": "prompting",
                "input": f"the word number {number} ->",
                "variants": [{"name": "few", "examples": [example] * (number % 3 + 1)}],
                "choices": [" cold", " warm"],
                "target": " cold",
            }


class Killer(SilentProgress):
    """Watches a run, and kills one of this process's children at random instants until `kills` were hit."""

    def __init__(self, count: int, kills: int, seed: int):
        chance = random.Random(seed)
        self._chance = chance
        self._due = sorted(chance.randrange(max(1, count - 2)) for _ in range(kills))
        """How many tasks are committed when the next kill is due."""
        self.committed, self.lines = 0, list[str]()
        self._hit = set[int]()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._kill, daemon=True)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def killed(self) -> int:
        """Workers that got the signal."""
        return len(self._hit)

    def done(self, n_tokens: int, count: int = 1) -> None:
        self.committed += count

    def log(self, message: str) -> None:
        self.lines.append(message)

    def _kill(self) -> None:
        while self._due and not self._ended.wait(self._chance.uniform(0, 0.02)):
            if self.committed < self._due[0]:
                continue
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                alive = (child for child in psutil.Process().children() if child.pid not in self._hit)
                pids = [child.pid for child in alive if child.status() != psutil.STATUS_ZOMBIE]
                if not pids:
                    continue
                pid = self._chance.choice(pids)
                os.kill(pid, signal.SIGKILL)
                self._hit.add(pid)
                self._due.pop(0)


def contents(run: Run) -> dict[str, tuple[bytes, str]]:
    """What each task left but for the time that it took."""
    return {
        task.id: (
            (task.path / "tensors.safetensors").read_bytes(),
            json.dumps({key: value for key, value in task.record.items() if key != "seconds"}),
        )
        for task in run
    }


def compared(whole: Run, path: Path) -> dict[str, Any]:
    """What became of a run's tasks, beside those of the whole run of one process."""
    run, report = Run(path), verify(path)
    expected, actual = contents(whole), contents(run)
    return {
        "folders": len(task_places(path)),
        "records": len(actual),
        "missing": len(expected.keys() - actual.keys()),
        "extra": len(actual.keys() - expected.keys()),
        "differ": sum(actual.get(name) != content for name, content in expected.items()),
        "status": report.status,
        "complete": report.complete,
        "problems": len(report.problems),
    }


def report_of(result: dict[str, Any]) -> int:
    """Print what became of a run; the exit code, 0 where it is that of one process."""
    sys.stdout.write(f"{json.dumps(result, indent=1)}\n")
    faults = ("missing", "extra", "differ", "problems")
    sound = result["complete"] and not any(result[name] for name in faults)
    sound = sound and result.get("killed") == result.get("kills")
    return 0 if sound and result["records"] == result["folders"] == result["tasks"] else 1


def trial(folder: Path, count: int, workers: int, kills: int, seed: int) -> dict[str, Any]:
    """Run `count` tasks alone and by workers that are killed; what became of them. `folder` is a new one."""
    file = folder / "tasks.jsonl"
    file.write_text("".join(json.dumps(task) + "\n" for task in tasks(count)))
    started = time.perf_counter()
    whole = probe.run(file, out=folder / "whole", **OPTIONS)
    alone = time.perf_counter() - started
    started = time.perf_counter()
    failures = 0
    with Killer(count, kills, seed) as killer:
        try:
            probe.run(file, out=folder / "killed", workers=workers, progress=killer, **OPTIONS)
        except ProbeError:  # too many died in a row: as a user would, go on
            failures += 1
            probe.resume(folder / "killed", analyze=False)
    seconds = time.perf_counter() - started
    return {
        "tasks": count,
        "workers": workers,
        "kills": kills,
        "killed": killer.killed,
        "replaced": sum("another takes its place" in line for line in killer.lines),
        "given_up": failures,
        **compared(whole, folder / "killed"),
        "seconds_alone": round(alone, 1),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("tasks", 1000), ("workers", 4), ("kills", 50), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = trial(Path(folder), given.tasks, given.workers, given.kills, given.seed)
    sys.exit(report_of(result))


if __name__ == "__main__":
    main()
