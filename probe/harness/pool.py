"""Workers of one run as processes of this machine that share the weights' memory.

They are forked when the model is loaded and the tasks are rendered. Each computes with one thread: the threads of torch do
not survive a fork, and on a CPU many sequences are more to share out than the rows of a product.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from probe.errors import ProbeError, RunDirectoryError, UsageError, error_of
from probe.harness.plan import Options, TaskPlan, notices
from probe.harness.runner import Execute, Progress
from probe.harness.stop import RunStopped, stopping
from probe.harness.workers import WorkPlan, close, work

if TYPE_CHECKING:
    from probe.model.hooked import Model
    from probe.runs import RunWriter

MOST_DEATHS = 5
"""Workers that may die one after the other without a task committed in between."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE_S = 30.0
"""How long a worker may take to end its tasks' writing once it is asked to stop."""


def pool(n_workers: int) -> Execute:
    """What runs a run that was prepared with `n_workers` processes. Raises UsageError for less than one."""
    if n_workers < 1:
        raise UsageError(f"--workers {n_workers}: at least 1")

    def execute(
        path: Path, model: Model, plans: list[TaskPlan], choices: Options, progress: Progress
    ) -> None:
        if model.device.type != "cpu":
            raise UsageError(
                f"--workers: processes share weights on a CPU: on a GPU a `probe worker {path} --device cuda:N` for each, "
                "of a run that was begun with `probe run … --prepare`"
            )
        _Pool(path, WorkPlan.of(model, choices, plans), n_workers, progress).run()

    return execute


@dataclass
class _Child:
    number: int
    pid: int
    pipe: int
    text: bytes = b""
    error: dict[str, Any] = field(default_factory=dict)


class _Pool:
    def __init__(self, path: Path, prepared: WorkPlan, n_workers: int, progress: Progress):
        self._path, self._prepared, self._n, self._progress = path, prepared, n_workers, progress
        self._children: dict[int, _Child] = {}
        """By the descriptor of their pipes."""
        self._deaths = 0
        """Since the last task."""

    def run(self) -> None:
        """Run to the end, and write it. Raises the error of a worker that failed, and RunStopped."""
        try:
            stopped = self._run()
        except ProbeError:
            with suppress(ProbeError):  # the disk may be what failed; the first error is the one to show
                close(self._path, self._prepared, "failed")
            raise
        ended = close(self._path, self._prepared, "interrupted" if stopped is not None else None)
        if stopped is not None:
            raise stopped
        if ended is None:
            raise RunDirectoryError(
                f"{self._path}: other workers are still at it: the last one writes the run's end"
            )
        self._progress.end()

    def _run(self) -> RunStopped | None:
        from probe.runs import RunWriter

        stopped: RunStopped | None = None
        # Kept to the end, so that no worker takes itself for the last one.
        with RunWriter.join(self._path) as writer, selectors.DefaultSelector() as ready:
            missing = [entry for entry in self._prepared.plans if not writer.has(entry.task.id)]
            for line in notices(missing):
                self._progress.log(line)
            self._progress.start(len(missing))
            try:
                with stopping():
                    for number in range(1, self._n + 1):
                        self._start(number, writer, ready)
                    while self._children:
                        for key, _ in ready.select():
                            self._read(self._children[key.fd], writer, ready)
            except RunStopped as error:
                error.advice = f"`probe worker {self._path}` or `probe resume {self._path}` continues the run"
                stopped = error
            finally:
                self._stop()
        return stopped

    def _start(self, number: int, writer: RunWriter, ready: selectors.BaseSelector) -> None:
        reader, pipe = os.pipe()
        parent = os.getpid()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        # A signal waits until the child has handlers of its own, and the parent knows the child.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            if (pid := os.fork()) == 0:
                ready.close()
                os.close(reader)
                writer.leave()
                for child in self._children.values():
                    os.close(child.pipe)
                _run_child(self._path, self._prepared, pipe, parent)
            os.close(pipe)
            os.set_blocking(reader, False)
            self._children[reader] = _Child(number, pid, reader)
            ready.register(reader, selectors.EVENT_READ)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _read(self, child: _Child, writer: RunWriter, ready: selectors.BaseSelector) -> None:
        if data := os.read(child.pipe, 1 << 16):
            *lines, child.text = (child.text + data).split(b"\n")
            for line in lines:
                self._take(child, json.loads(line))
            return
        ready.unregister(child.pipe)
        del self._children[child.pipe]
        os.close(child.pipe)
        code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
        if code == 0:
            return
        if child.error:
            raise error_of(child.error["code"], child.error["error"])
        self._deaths += 1
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        what = f"worker {child.number} (process {child.pid}) was {how}"
        if self._deaths >= MOST_DEATHS:
            raise ProbeError(
                f"{what}: {self._deaths} died and no task was committed between: `probe resume {self._path}` runs the rest "
                "in one process"
            )
        self._progress.log(f"{what}: another takes its place")
        self._start(child.number, writer, ready)

    def _take(self, child: _Child, event: dict[str, Any]) -> None:
        if "tokens" in event:
            self._deaths = 0
            self._progress.done(event["tokens"])
        elif "log" in event:
            self._progress.log(f"worker {child.number}: {event['log']}")
        else:
            child.error = event

    def _stop(self) -> None:
        """Ask what still runs to stop, and end what does not."""
        for child in self._children.values():
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGTERM)
        deadline = time.monotonic() + _PATIENCE_S
        for child in self._children.values():
            os.close(child.pipe)
            while os.waitpid(child.pid, os.WNOHANG)[0] == 0:
                if time.monotonic() > deadline:
                    with suppress(ProcessLookupError):
                        os.kill(child.pid, signal.SIGKILL)
                time.sleep(0.02)
        self._children.clear()


class _PipeProgress:
    """What a worker's progress is for the process that forked it: a JSON object a line."""

    def __init__(self, pipe: int, parent: int):
        self._pipe, self._parent = pipe, parent

    def _send(self, **event: Any) -> None:
        data = json.dumps(event).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self._pipe, data) :]
        except BrokenPipeError:
            if os.getppid() != self._parent:  # killed: nobody watches any more
                raise RunStopped(signal.SIGTERM) from None

    def start(self, total: int, unit: str = "tasks") -> None: ...
    def expect(self, total: int) -> None: ...
    def end(self) -> None: ...

    def log(self, message: str) -> None:
        self._send(log=message)

    def done(self, n_tokens: int, count: int = 1) -> None:
        self._send(tokens=n_tokens)

    def fail(self, error: str, code: int) -> None:
        self._send(error=error, code=code)


def _run_child(path: Path, prepared: WorkPlan, pipe: int, parent: int) -> NoReturn:
    """A forked worker, to its end: nothing of the parent's runs in it behind this."""
    code = 1
    try:
        import torch

        os.setpgid(0, 0)  # a terminal's signals reach the parent, which passes them on once
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        torch.set_num_threads(1)
        progress = _PipeProgress(pipe, parent)
        try:
            work(path, progress=progress, prepared=prepared)
            code = 0
        except RunStopped as stopped:
            code = 128 + stopped.number
        except ProbeError as error:
            code = error.exit_code
            progress.fail(str(error), code)
        except Exception as error:
            traceback.print_exc()
            progress.fail(f"{type(error).__name__}: {error}", 1)
    finally:
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()
        os._exit(code)
