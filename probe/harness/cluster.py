"""Workers of one run as actors of a Ray cluster whose nodes see the run directory.

An actor is `probe worker` with a model of its own. One that is lost with its node is started anew elsewhere; what it was at is
claimed by the others meanwhile.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.errors import ProbeError, UsageError, error_of
from probe.harness.plan import Options, TaskPlan, notices
from probe.harness.runner import Execute, Progress
from probe.harness.stop import RunStopped, stopping
from probe.harness.workers import WorkPlan, close, work
from probe.runs.claims import LEASE_S

if TYPE_CHECKING:
    from probe.model.hooked import Model

MOST_RESTARTS = 5
"""How often an actor is started anew."""
_STAGGER_S = 0.1
"""Between the starts of two actors, which all read the weights first."""
_LOOK_S = 1.0
"""Between two counts of the tasks that are committed."""
_END_S = 30.0
"""How long the other actors may take to see that every task is committed."""
_QUIET = 60
"""Counts without a new task after which that is said."""


def cluster(address: str, n_workers: int | None = None) -> Execute:
    """What runs a prepared run with actors of the Ray cluster at `address` (HOST:PORT, `auto` for the one that is here, `local`
    for a new one). Without `n_workers` an actor for each GPU, on a CPU one for each CPU that the cluster has.

    Raises UsageError where ray is not installed, ProbeError where there is no cluster or every actor is lost.
    """
    if n_workers is not None and n_workers < 1:
        raise UsageError(f"--workers {n_workers}: at least 1")
    ray = _ray()

    def execute(
        path: Path, model: Model, plans: list[TaskPlan], choices: Options, progress: Progress
    ) -> None:
        _connect(ray, address)
        try:
            for line in notices(plans):
                progress.log(line)
            _Cluster(ray, path.absolute(), WorkPlan.of(model, choices, plans), n_workers, progress).run()
        finally:
            ray.shutdown()

    return execute


def _ray() -> Any:
    # Before it is imported: nothing of a run is told to anybody.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError("--ray: ray is not installed: pip install 'probe-harness[ray]'") from None
    return ray


def _connect(ray: Any, address: str) -> None:
    local = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, logging_level="WARNING", log_to_driver=False, **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ProbeError(
            f"--ray {address}: no cluster there: {error}: `ray start --head` begins one"
        ) from None


class ActorWorker:
    """The worker loop in a process of a Ray node."""

    def __init__(self, path: str, device: str, n_threads: int):
        import torch

        self._path, self._device = path, device
        if device == "cpu":
            torch.set_num_threads(n_threads)

    def work(self) -> dict[str, Any]:
        """Run what no other worker does, to the end of the run. An error comes back as its exit code and its text: not every
        error survives being sent."""
        try:
            work(self._path, device=self._device)
        except RunStopped:
            raise SystemExit(0) from None
        except ProbeError as error:
            return {"code": error.exit_code, "error": str(error)}
        return {}


class _Cluster:
    def __init__(self, ray: Any, path: Path, prepared: WorkPlan, n_workers: int | None, progress: Progress):
        self._ray, self._path, self._prepared, self._progress = ray, path, prepared, progress
        self._gpu = prepared.model.device.type != "cpu"
        self._n = n_workers or max(1, int(ray.cluster_resources().get("GPU" if self._gpu else "CPU", 1)))
        self._committed = 0

    def run(self) -> None:
        from probe.runs import RunWriter

        stopped: RunStopped | None = None
        actors: list[Any] = []
        with RunWriter.join(self._path):
            self._progress.log(f"{self._n} workers on the cluster")
            self._progress.start(len(self._prepared.plans))
            try:
                with stopping():
                    calls = {}
                    for number in range(1, self._n + 1):
                        actors.append(self._actor())
                        calls[actors[-1].work.remote()] = number
                        time.sleep(_STAGGER_S)
                    self._watch(calls)
            except RunStopped as error:
                error.advice = f"`probe worker {self._path}` or `probe resume {self._path}` continues the run"
                stopped = error
            finally:
                for actor in actors:
                    self._ray.kill(actor)
        # The lease of an actor that was lost, or killed by a signal, holds until its time is over.
        until = time.monotonic() + LEASE_S + _END_S
        while (ended := close(self._path, self._prepared, "interrupted" if stopped else None)) is None:
            if stopped is not None or time.monotonic() > until:
                break
            time.sleep(_LOOK_S)
        if stopped is not None:
            raise stopped
        if ended is None:
            raise ProbeError(
                f"{self._path}: workers are still at it: `probe worker {self._path}` writes the end"
            )
        self._progress.end()

    def _actor(self) -> Any:
        options: dict[str, Any] = {
            "num_cpus": 1,
            "max_restarts": MOST_RESTARTS,
            "max_task_retries": -1,
        }
        if self._gpu:
            options["num_gpus"] = 1
        # Ray shows an actor its own GPU alone.
        device = "cuda" if self._gpu else "cpu"
        return self._ray.remote(ActorWorker).options(**options).remote(str(self._path), device, 1)

    def _watch(self, calls: dict[Any, int]) -> None:
        """Until one actor has ended, which it does when every task is committed. Those that are lost cost only themselves as
        long as another one is at work; Ray starts them anew where there is room."""
        failure, quiet = "", 0
        while calls:
            ready, _ = self._ray.wait(list(calls), timeout=_LOOK_S)
            quiet = 0 if self._count() else quiet + 1
            if quiet == _QUIET:
                self._progress.log(
                    f"no task committed for {quiet * _LOOK_S:.0f} s: `ray status` says whether there is room"
                )
            for call in ready:
                number = calls.pop(call)
                try:
                    told = self._ray.get(call)
                except self._ray.exceptions.RayError as error:
                    cause = getattr(error, "cause", None)
                    failure = f"worker {number} is lost: {cause or str(error).splitlines()[0]}"
                    self._progress.log(failure)
                    continue
                if told:
                    raise error_of(told["code"], told["error"])
                if calls:  # they find that nothing is left, and give up their leases
                    self._ray.wait(list(calls), num_returns=len(calls), timeout=_END_S)
                return
        raise ProbeError(f"{failure}: `probe worker {self._path}` goes on without the cluster")

    def _count(self) -> bool:
        """Whether tasks were committed since it was last asked."""
        from probe.runs.layout import task_places

        new = len(task_places(self._path)) - self._committed
        if new > 0:
            self._progress.done(0, new)
            self._committed += new
        return new > 0
