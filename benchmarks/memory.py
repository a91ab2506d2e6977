"""Section: peak memory, each contestant in a process of its engine.

The process loads the model, resets its high-water mark, runs once and reads the mark: VmHWM of
/proc/self/status, or on CUDA torch.cuda.max_memory_allocated. Run as `python -m benchmarks.memory` with a JSON
request on standard input, it is that process.

Resident memory is what the system counts, and it holds also what the C library keeps of freed memory: the same
work in two fresh processes may differ by a fifth. So the memory in use is sampled as well (`mallinfo2`), which
repeats within a percent.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from benchmarks import inputs, others
from benchmarks import ours as engine
from benchmarks.table import Figure, Ratio, Section, Target

PLAIN, OURS = "plain generate", "ours, default capture, written"
BATCH, LONG = "batch", "long"
MIB = 2**20


def measure(
    *, name: str, dtype: str, device: str, threads: int, size: int, n_new: int, rounds: int
) -> Section:
    section = Section("memory", "Peak memory, each contestant in a fresh process")
    request = {
        "model": name,
        "dtype": dtype,
        "device": device,
        "threads": threads,
        "size": size,
        "new": n_new,
    }
    for workload, limit in ((BATCH, 1.10), (LONG, 1.2)):
        answers: dict[str, list[dict[str, Any]]] = {PLAIN: [], OURS: []}
        for _ in range(rounds):
            for who, given in answers.items():
                given.append(_ask(request | {"who": who, "workload": workload}))
        broken = {answer["error"] for given in answers.values() for answer in given if "error" in answer}
        if broken:
            section.notes += [f"{workload}: not measured: {error}" for error in sorted(broken)]
        else:
            _compare(section, answers, Target("at most", limit))
    section.notes += [
        "The peak includes the weights and all libraries; both sides load the model the same way.",
        "Resident is what the system counts, freed memory that the C library keeps included: it differs by up to "
        "a fifth between equal processes. In use is what was allocated and not freed, sampled.",
    ]
    return section


def _compare(section: Section, answers: dict[str, list[dict[str, Any]]], target: Target) -> None:
    first = answers[PLAIN][0]
    words = f"{first['tasks']} × {max(first['lengths'])} + {first['new']} tokens"

    def ratios(figure: Any) -> list[float]:
        return [figure(a) / figure(b) for a, b in zip(answers[OURS], answers[PLAIN], strict=True)]

    section.ratios.append(Ratio(f"{words}: peak resident, ours / plain", ratios(lambda a: a["peak"]), target))
    if all(answer["in_use"] for given in answers.values() for answer in given):
        section.ratios.append(Ratio(f"{words}: peak in use, ours / plain", ratios(_in_use)))
    for who, given in answers.items():
        rows = {"peak resident": [a["peak"] for a in given], "rise of it": [_rise(a) for a in given]}
        if all(a["in_use"] for a in given):
            rows["peak in use"] = [_in_use(a) for a in given]
        section.figures += [
            Figure(f"{words}: {who}: {row}", [value / MIB for value in values], "MiB")
            for row, values in rows.items()
        ]


def _rise(answer: dict[str, Any]) -> int:
    """Above the loaded model."""
    return answer["peak"] - answer["loaded"]


def _in_use(answer: dict[str, Any]) -> int:
    """The loaded model and the most that was allocated on top of it."""
    return answer["loaded"] + answer["in_use"]


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=engine.ROOT,
    )
    if child.returncode:
        last = child.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"error": f"exit code {child.returncode}: {last[0][:200]}"}
    return json.loads(child.stdout.splitlines()[-1])


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Load, run once, and say how much memory that took, bytes."""
    import torch

    torch.set_num_threads(request["threads"])
    loaded = engine.load(request["model"], request["dtype"], request["device"])
    if request["workload"] == LONG:
        given = inputs.long_prompt(loaded)
    else:
        given = inputs.batch(loaded, request["size"], request["new"])
    before = _reset(loaded.device)
    with Sampler(loaded.device) as sampler:
        if request["who"] == PLAIN:
            others.plain(loaded.hf, given)
        else:
            with tempfile.TemporaryDirectory() as folder:
                engine.generate(loaded, given.plans, given.n_new, capture="default", out=Path(folder) / "run")
    return {
        "loaded": before,
        "peak": _peak(loaded.device),
        "in_use": sampler.rise,
        "tasks": len(given.plans),
        "lengths": given.lengths,
        "new": given.n_new,
    }


class _MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2; uordblks and hblkhd are bytes in use, in heaps and mapped on their engine."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


class Sampler:
    """The most memory in use above that at the start, looked at every few milliseconds.

    `rise` is 0 where the C library does not tell, and on CUDA, whose peak is exact already.
    """

    def __init__(self, device: str):
        self.rise = 0
        self._told = None if device.startswith("cuda") else getattr(ctypes.CDLL(None), "mallinfo2", None)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Sampler:
        if self._told is not None:
            self._told.restype = _MallInfo
            self._start = self._in_use()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._told is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.rise = max(self.rise, self._in_use() - self._start)

    def _in_use(self) -> int:
        assert self._told is not None
        info = self._told()
        return info.uordblks + info.hblkhd


def _reset(device: str) -> int:
    """Forget the peak so far; returns what is in use now."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident
    return _status("VmRSS")


def _peak(device: str) -> int:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(field: str) -> int:
    match = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}: memory can be measured on Linux only")
    return int(match.group(1)) * 1024


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answer(json.load(sys.stdin))) + "\n")
