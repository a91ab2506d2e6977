"""Which worker runs which chunk of a run, where many processes add tasks to it, on one machine or on many.

    .workers/plan                    a link to the digest of the plan whose chunks are claimed
    .workers/<worker>                a worker's lease: a JSON object whose file is renewed as long as the worker lives
    .workers/claims/<chunk>.<n>      the n-th claim of a chunk: a link to the name of a worker, which holds it while no
                                     later claim is there
    .workers/claims/<chunk>.done     every task of the chunk is committed

A claim is one call that makes a symbolic link: it succeeds for one worker, and the link has its content from the first
instant, so that a process killed at any moment leaves a whole claim or none. Claims are never removed while the run goes
on: a lost worker's chunk is taken over by claim n + 1, which again one worker gets. The links point to nothing and are
never followed. All of it can be lost without harm: a task is committed by one rename onto a name that is not there yet,
whoever runs it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from probe.errors import ArtifactCorrupt, DiskError
from probe.runs.files import WORKERS, boot_id, disk_errors, opened, read_at, write_new

LEASE_S = 120.0
"""How long a worker on another machine may give no sign of life; more than the minute that NFS may remember a file's times."""
_RENEWALS = 8
"""Signs of life within a lease."""
_CLAIM = re.compile(r"([0-9]{1,9})\.([0-9]{1,6}|done)")


class ChunkClaim(NamedTuple):
    """One worker's claim of one chunk."""

    chunk: int
    number: int


class Lease:
    """A worker's sign of life in a run directory: a file with a lock of the kernel, renewed by a thread of its own."""

    def __init__(self, run: Path, seconds: float = LEASE_S):
        host = re.sub(r"[^a-z0-9]+", "-", socket.gethostname().lower())[:32].strip("-") or "host"
        self.worker = f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
        self.folder = run / WORKERS
        self.seconds = seconds
        self.lost = False
        """Whether its file is gone: the run has ended, or was removed."""
        content = {"host": socket.gethostname(), "boot": boot_id(), "pid": os.getpid(), "lease_s": seconds}
        self._path = self.folder / self.worker
        temporary = self.folder / f".tmp-{uuid.uuid4().hex}"
        with disk_errors(self._path):
            (self.folder / "claims").mkdir(parents=True, exist_ok=True)
            write_new(temporary, [json.dumps(content).encode()])
            self._descriptor = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            with suppress(OSError):  # without locks the renewals alone count
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(temporary, self._path)  # nobody sees the lease without its lock
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="worker-lease", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._ended.wait(self.seconds / _RENEWALS):
            try:
                os.utime(self._path, follow_symlinks=False)
            except FileNotFoundError:
                self.lost = True
                return
            except OSError:  # a server that does not answer now may do so later
                continue

    def release(self) -> None:
        """Give up all claims at once."""
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            os.unlink(self._path)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Claims:
    """The chunks of a run as one worker sees them, and its claims."""

    def __init__(self, lease: Lease):
        self._lease = lease
        self._folder = lease.folder / "claims"
        self._last_sign: dict[str, tuple[int, float]] = {}
        """Worker → time of its lease's file, and when this process first saw that time."""

    def agree(self, digest: str) -> str:
        """The digest of the plan that this run's chunks are of: the given one where no worker has begun yet."""
        path = self._lease.folder / "plan"
        with disk_errors(path):
            with suppress(FileExistsError):
                os.symlink(digest, path)
            return os.readlink(path)

    def states(self, n_chunks: int) -> tuple[list[ChunkClaim], int]:
        """The claims that can be made now, by chunk, and how many chunks are with workers that live. As long as there are
        chunks that nobody has claimed these alone are given, and nobody is asked for a sign of life."""
        last: dict[int, int] = {}
        done: set[int] = set()
        with disk_errors(self._folder):
            try:
                names = os.listdir(self._folder)
            except FileNotFoundError:  # the run has ended
                return [], 0
        for name in names:
            if match := _CLAIM.fullmatch(name):
                chunk = int(match[1])
                if match[2] == "done":
                    done.add(chunk)
                else:
                    last[chunk] = max(last.get(chunk, -1), int(match[2]))
        if free := [
            ChunkClaim(chunk, 0) for chunk in range(n_chunks) if chunk not in done and chunk not in last
        ]:
            return free, 0
        busy = 0
        alive: dict[str, bool] = {}
        for chunk in range(n_chunks):
            if chunk in done:
                continue
            worker = self._worker(ChunkClaim(chunk, last[chunk]))
            if worker not in alive:
                alive[worker] = self._lives(worker)
            if alive[worker]:
                busy += 1
            else:
                free.append(ChunkClaim(chunk, last[chunk] + 1))
        return free, busy

    def take(self, claim: ChunkClaim) -> bool:
        """Make a claim; False where another worker has it."""
        path = self._path(claim)
        with disk_errors(path):
            try:
                os.symlink(self._lease.worker, path)
            except (
                FileExistsError
            ):  # by this very call, where a server's answer was lost and it was sent again
                return self._worker(claim) == self._lease.worker
            except FileNotFoundError:  # the run has ended
                return False
        return True

    def fresh(self, chunk: int) -> ChunkClaim | None:
        """The first claim of a chunk, None where it is done or was claimed before."""
        known = (self._folder / f"{chunk}.done", self._path(ChunkClaim(chunk, 0)))
        return None if any(map(os.path.lexists, known)) else ChunkClaim(chunk, 0)

    def holds(self, claim: ChunkClaim) -> bool:
        """Whether a claim of this worker was not taken over."""
        return not self._lease.lost and not os.path.lexists(
            self._path(ChunkClaim(claim.chunk, claim.number + 1))
        )

    def finish(self, chunk: int) -> None:
        """Say that every task of a chunk is committed."""
        path = self._folder / f"{chunk}.done"
        with disk_errors(path), suppress(FileExistsError, FileNotFoundError):
            os.symlink(self._lease.worker, path)

    def _path(self, claim: ChunkClaim) -> Path:
        return self._folder / f"{claim.chunk}.{claim.number}"

    def _worker(self, claim: ChunkClaim) -> str:
        try:
            return os.readlink(self._path(claim))
        except OSError:
            return ""

    def _lives(self, worker: str) -> bool:
        """Whether a worker may still be at work. Of one under this kernel the lock on its lease tells at once; of another one,
        and of one that hangs, that its lease's file was not renewed for the time of its lease, by the clock of this process."""
        path = self._lease.folder / worker
        if not re.fullmatch(r"[a-z0-9-]+", worker):
            return False
        try:
            with opened(path) as (descriptor, size):
                renewed = os.fstat(descriptor).st_mtime_ns
                lease = json.loads(read_at(descriptor, size))
                if lease["boot"] == boot_id():
                    with suppress(OSError):  # locked, or a file system without locks: then the renewals count
                        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                        return False
                seconds = float(lease["lease_s"])
        except (ArtifactCorrupt, DiskError, ValueError, KeyError, TypeError):
            return False
        now = time.clock_gettime(time.CLOCK_BOOTTIME)  # goes on while the machine sleeps
        if self._last_sign.get(worker, (-1, 0.0))[0] != renewed:
            self._last_sign[worker] = renewed, now
        return now - self._last_sign[worker][1] < seconds


def remove_claims(run: Path) -> None:
    """Remove what workers left of their claims; only under the lock of a run that has ended."""
    with disk_errors(run / WORKERS), suppress(FileNotFoundError):
        shutil.rmtree(run / WORKERS)
