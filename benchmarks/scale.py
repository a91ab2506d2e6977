"""A thousand workers and a million tasks on paper: `python -m benchmarks.scale`.

What one claim, one listing and one commit take is measured in a folder of this machine. Then the choice of claims
(`probe.harness.workers.first_claim`) is simulated with many workers that see the claims late, by the latency of a file server:
how many claims are made in vain, and how much of the time workers wait. Last, what the commits ask of a file server and of
an object store, against rates that these are known for.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from probe.harness.workers import MOST_CHUNKS, first_claim
from probe.runs import Array, RunWriter
from probe.runs.claims import ChunkClaim, Claims, Lease

CALLS_OF_A_COMMIT = 12
"""Changes of names and syncs: three files are made, written and synced, a folder is made, synced and renamed, its parent synced."""
FILE_SERVER_CALLS_S = 5_000
"""Changes of metadata that a file server is taken to do in a second."""
STORE_PUTS_S = 3_500
"""PUTs a second and prefix that Amazon S3 names as its least."""
PREFIXES = 256
PUT_DOLLARS = 0.005 / 1000


def local(folder: Path, chunks: int) -> dict[str, float]:
    """Seconds that a claim, a listing of all claims and a commit take here, each the median of its repeats."""
    lease = Lease(folder)
    claims = Claims(lease)
    times = [_seconds(lambda number=number: claims.take(ChunkClaim(number, 0))) for number in range(chunks)]
    listing = [_seconds(lambda: claims.states(chunks)) for _ in range(5)]
    lease.release()
    with RunWriter.create(folder / "run", {}) as writer:
        tensor = {"x": Array(torch.zeros(30, 8, 576), ("layer", "row", "d_model"))}

        def commit(number: int) -> None:
            writer.commit({"id": f"task {number}", "status": "ok"}, tensor, {})
            writer.flush()

        commits = [_seconds(lambda number=number: commit(number)) for number in range(200)]
    return {
        "claim_s": statistics.median(times),
        "listing_s": statistics.median(listing),
        "commit_s": statistics.median(commits),
    }


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def simulate(
    workers: int, chunks: int, chunk_s: float, latency_s: float, start_s: float, seed: int = 0
) -> dict[str, float]:
    """Workers that start within `start_s`, chunks that take `chunk_s` (± a half, evenly), and claims that others see
    `latency_s` after they were made. A worker whose claim is in vain looks again."""
    chance = random.Random(seed)
    claimed = [False] * chunks
    seen: list[tuple[float, int]] = []
    free = set(range(chunks))
    events = [(chance.uniform(0, start_s), worker, -1) for worker in range(workers)]
    heapq.heapify(events)
    vain = looks = claims = 0
    busy, end = 0.0, 0.0
    while events:
        now, worker, before = heapq.heappop(events)
        while seen and seen[0][0] <= now:
            free.discard(heapq.heappop(seen)[1])
        if 0 <= before < chunks - 1 and before + 1 in free:
            wanted = before + 1
        else:
            looks += 1
            claim = first_claim([ChunkClaim(number, 0) for number in sorted(free)], chance)
            if claim is None:
                continue
            wanted = claim.chunk
        claims += 1
        if claimed[wanted]:
            vain += 1
            heapq.heappush(events, (now + latency_s, worker, -1))
            continue
        claimed[wanted] = True
        heapq.heappush(seen, (now + latency_s, wanted))
        seconds = chunk_s * chance.uniform(0.5, 1.5)
        busy += seconds
        end = max(end, now + latency_s + seconds)
        heapq.heappush(events, (now + latency_s + seconds, worker, wanted))
    return {
        "seconds": end,
        "ideal_s": busy / workers,
        "used": busy / (workers * end),
        "claims": claims,
        "in_vain": vain,
        "looks": looks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--task-seconds", type=float, default=1.0, help="of one worker")
    parser.add_argument("--latency", type=float, default=0.005, help="of the file server, seconds")
    given = parser.parse_args()
    batches = -(-given.tasks // given.batch)
    size = -(-batches // MOST_CHUNKS)
    chunks = -(-batches // size)
    chunk_s = given.task_seconds * given.tasks / chunks
    result: dict[str, Any] = {"chunks": chunks, "tasks_a_chunk": given.tasks / chunks}
    with tempfile.TemporaryDirectory() as folder:
        result["here"] = local(Path(folder), chunks)
    for name, start_s in (("all_at_once", 0.0), ("within_100_s", 100.0)):
        result[name] = simulate(given.workers, chunks, chunk_s, given.latency, start_s)
    rate = given.workers / given.task_seconds
    result["commits"] = {
        "tasks_a_second": rate,
        "file_server_calls_a_second": rate * CALLS_OF_A_COMMIT,
        "file_server_holds_workers": FILE_SERVER_CALLS_S / CALLS_OF_A_COMMIT * given.task_seconds,
        "puts_a_second": rate * 3,
        "store_holds_puts_a_second": STORE_PUTS_S * PREFIXES,
        "dollars_of_puts": given.tasks * 3 * PUT_DOLLARS,
        "dollars_of_puts_a_chunk_an_object": chunks * PUT_DOLLARS,
    }
    sys.stdout.write(f"{json.dumps(result, indent=1)}\n")


if __name__ == "__main__":
    main()
