"""A run on a local Ray cluster of three nodes of which one is killed: `python -m benchmarks.cluster --tasks 200`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import probe
from benchmarks.kills import OPTIONS, compared, report_of, tasks
from probe.harness.runner import SilentProgress


class NodeKiller(SilentProgress):
    """Kills a node, once a third of the tasks are committed."""

    def __init__(self, nodes: Any, victim: Any, after: int):
        self._nodes, self._victim, self._after = nodes, victim, after
        self.committed, self.killed, self.lines = 0, 0, list[str]()

    def log(self, message: str) -> None:
        self.lines.append(message)

    def done(self, n_tokens: int, count: int = 1) -> None:
        self.committed += count
        if self.committed >= self._after and not self.killed:
            self.killed = 1
            self.at = self.committed
            threading.Thread(
                target=self._nodes.remove_node, args=(self._victim,), kwargs={"allow_graceful": False}
            ).start()


def trial(folder: Path, count: int) -> dict[str, Any]:
    """Run `count` tasks alone and on three nodes of a CPU each, one of which is killed. `folder` is a new one."""
    import os

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

    file = folder / "tasks.jsonl"
    file.write_text("".join(json.dumps(task) + "\n" for task in tasks(count)))
    whole = probe.run(file, out=folder / "whole", **OPTIONS)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        others = [nodes.add_node(num_cpus=1) for _ in range(2)]
        nodes.wait_for_nodes()
        killer = NodeKiller(nodes, others[0], count // 3)
        started = time.perf_counter()
        probe.run(file, out=folder / "r", ray=nodes.address, workers=3, progress=killer, **OPTIONS)
        seconds = time.perf_counter() - started
    finally:
        nodes.shutdown()
    return {
        "tasks": count,
        "nodes": 3,
        "nodes_killed": killer.killed,
        "committed_when_killed": getattr(killer, "at", None),
        "said": killer.lines,
        **compared(whole, folder / "r"),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=200)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = trial(Path(folder), given.tasks)
    sys.exit(report_of(result))


if __name__ == "__main__":
    main()
