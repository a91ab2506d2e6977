"""What the figures were measured on, and what else ran meanwhile. No host name, path or user name."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

_CPU = Path("/sys/devices/system/cpu/cpu0")


def describe(device: str, threads: int) -> dict[str, Any]:
    """Processor, caches, memory, threads, governor and versions; what cannot be read is absent."""
    import torch

    facts: dict[str, Any] = {
        "cpu": _first(r"model name\s*:\s*(.+)", "/proc/cpuinfo")
        or platform.processor()
        or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "caches": _caches(),
        "memory_gib": _memory_gib(),
        "governor": _read(_CPU / "cpufreq/scaling_governor"),
        "system": platform.system(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
    }
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(device)
    for package in ("torch", "transformers", "transformer-lens"):
        facts[package] = importlib.metadata.version(package)
    return {key: value for key, value in facts.items() if value}


def as_lines(described: dict[str, Any]) -> list[str]:
    return [f"{key.replace('_', ' ')}: {value}" for key, value in described.items()]


class Load:
    """CPU time that others took while we measured, as a share of all that was used."""

    def __init__(self) -> None:
        self._start = _busy_seconds(), _own_seconds()

    def share_of_others(self) -> float | None:
        """0 to 1; None where the system does not tell."""
        busy, ours = _busy_seconds(), _own_seconds()
        if busy is None or self._start[0] is None or busy <= self._start[0]:
            return None
        used = busy - self._start[0]
        return max(0.0, used - (ours - self._start[1])) / used


def _busy_seconds() -> float | None:
    """Busy seconds of all processes and, on a virtual machine, what the host took (steal)."""
    line = (_read(Path("/proc/stat")) or "").split("\n")[0].split()
    if len(line) < 9:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, line[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _caches() -> str:
    parts = []
    for index in sorted(_CPU.glob("cache/index*")):
        level, kind, size = (_read(index / name) or "?" for name in ("level", "type", "size"))
        parts.append(f"L{level} {kind.lower()} {size}")
    return ", ".join(parts)


def _memory_gib() -> float | None:
    kibibytes = _first(r"MemTotal:\s*(\d+)", "/proc/meminfo")
    return round(int(kibibytes) / 2**20, 1) if kibibytes else None


def _first(pattern: str, path: str) -> str | None:
    match = re.search(pattern, _read(Path(path)) or "")
    return match.group(1).strip() if match else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
