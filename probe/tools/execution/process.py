"""One call of a tool in a process of its own: started, watched and ended on time."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

_CHILD = Path(__file__).with_name("child.py")
_START_SECONDS = 60
"""Time to start the interpreter, which is not the tool's: a busy machine takes seconds."""
_SURE = {"PATH", "SYSTEMROOT", "MONTY_BIN"}
"""Environment variables that a tool inherits: none that could hold a credential."""


class ProcessResult(NamedTuple):
    """Outcome of one process."""

    answer: dict[str, Any]
    """`{"value": …}`, or `{"error": kind, "message": …}`."""
    printed: str
    """What it wrote to its standard output and error, at most the limit."""
    seconds: float
    """Seconds that the tool alone took."""


def run(request: dict[str, Any]) -> ProcessResult:
    """Run what a request names (see `child.py`) and wait for it, at most its `limits.seconds`.

    When this returns or raises, the process and what it started in its group have ended. Raises OSError if no
    process can be started.
    """
    with tempfile.TemporaryDirectory(prefix="probe-tool-") as scratch:
        path = Path(scratch, "request.json")
        path.write_text(json.dumps(request), encoding="utf-8")
        ours, theirs = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-X", "utf8", str(_CHILD), str(path), str(theirs)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs,),
                cwd=scratch,
                env=_environment(scratch),
                start_new_session=True,
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        try:
            return _Watch(process, ours, request["limits"]).result()
        finally:
            _end(process)
            os.close(ours)


def _environment(scratch: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in _SURE}
    fixed = {"HOME": scratch, "TMPDIR": scratch, "LC_ALL": "C.UTF-8", "TZ": "UTC", "PYTHONHASHSEED": "0"}
    return kept | fixed | {"OMP_NUM_THREADS": "1"}


def _end(process: subprocess.Popen[bytes]) -> None:
    # The group first: once the leader is waited for, its number may belong to somebody else.
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()
    if process.stdout:
        process.stdout.close()


class _Watch:
    """Reads what a process prints and answers until it is done, too late or too loud."""

    def __init__(self, process: subprocess.Popen[bytes], channel: int, limits: dict[str, Any]):
        self.process = process
        self.channel = channel
        self.limits = limits
        self.printed = bytearray()
        self.answered = bytearray()
        self.started: float | None = None

    def result(self) -> ProcessResult:
        began = time.monotonic()
        answer = self._read(began + _START_SECONDS) or self._answer()
        seconds = time.monotonic() - (self.started or began)
        text = bytes(self.printed[: self.limits["output_bytes"]]).decode("utf-8", "replace")
        return ProcessResult(answer, text, seconds)

    def _read(self, deadline: float) -> dict[str, Any] | None:
        """Read until the process has answered or ended; an error where it passes a limit."""
        assert self.process.stdout
        printed = self.process.stdout.fileno()
        sinks = {printed: self.printed, self.channel: self.answered}
        with selectors.DefaultSelector() as selector:
            for descriptor in sinks:
                selector.register(descriptor, selectors.EVENT_READ)
            while selector.get_map():
                left = deadline - time.monotonic()
                if left <= 0:
                    return self._late()
                # What a tool started may hold its pipes open after it: look for its end as well.
                ready = selector.select(min(left, 0.05))
                if not ready and self.process.poll() is not None:
                    return None
                for key, _ in ready:
                    if data := os.read(key.fd, 65536):
                        sinks[key.fd] += data
                    else:
                        selector.unregister(key.fd)
                if self.started is None and self.answered.startswith(b"started\n"):
                    self.started = time.monotonic()
                    deadline = self.started + self.limits["seconds"]
                if wrong := self._loud():
                    return wrong
                if self.answered.count(b"\n") > 1 and printed not in {key.fd for key, _ in ready}:
                    return None
        return None

    def _loud(self) -> dict[str, Any] | None:
        most = self.limits["output_bytes"]
        if len(self.printed) > most:
            message = f"the tool printed more than {most:,} bytes and was stopped: ask for less"
        # JSON writes one byte as six at most.
        elif len(self.answered) > 6 * most + 1000:
            message = f"the result is longer than {most:,} bytes: ask for less"
        else:
            return None
        return {"error": "output_limit", "message": message}

    def _late(self) -> dict[str, Any]:
        if self.started is None:
            return {"error": "crashed", "message": f"the tool did not start in {_START_SECONDS} s"}
        seconds = self.limits["seconds"]
        return {"error": "timeout", "message": f"the tool took longer than {seconds:g} s and was stopped"}

    def _answer(self) -> dict[str, Any]:
        lines = self.answered.split(b"\n")
        if len(lines) > 2:
            try:
                return json.loads(lines[1])
            except RecursionError:
                return {"error": "bad_result", "message": "the tool returned a value nested too deep"}
        code = self.process.wait()
        how = f"exit code {code}" if code >= 0 else signal.strsignal(-code) or f"signal {-code}"
        return {"error": "crashed", "message": f"the tool ended without a result ({how})"}
