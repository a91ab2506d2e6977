"""One run by many workers: each renders the whole file, claims chunks of the plan of the whole file, and runs them.

Batches and shared prefixes are those of a single process, so that the results are its results. A chunk is some batches
side by side. A worker begins within a long stretch that nobody has claimed and goes on as far as nobody has, so that it
keeps what shared prefixes left; where it begins it runs the prompts whose prefixes it needs.
"""

from __future__ import annotations

import hashlib
import random
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from probe.errors import RunDirectoryError
from probe.harness.batches import failed_task, n_tokens, prefill_batch, run_batch
from probe.harness.generators import TokenSource, open_generator, refuse_other_generator
from probe.harness.plan import Options, TaskPlan, codec_of, notices, plan, repeated_calls
from probe.harness.runner import (
    Progress,
    SilentProgress,
    end_status,
    load_model,
    options_of,
    refuse_other_weights,
    reopen,
    token_texts,
)
from probe.harness.schedule import Group, schedule
from probe.harness.stop import RunStopped, stopping
from probe.harness.vocabulary import Vocabulary
from probe.tasks import kind_of

if TYPE_CHECKING:
    from probe.capture import Capturer, Job
    from probe.model.hooked import Model
    from probe.runs import Run, RunWriter
    from probe.runs.claims import ChunkClaim, Claims

MOST_CHUNKS = 16_384
"""Chunks of a plan: every worker lists their claims."""
_POLLS_S = (0.2, 5.0)
"""First and longest wait for chunks of other workers, which may come to be free."""


class WorkChunk(NamedTuple):
    """Batches `start` … `end` − 1 of a group; the group None has the tasks that cannot be run."""

    group: int | None
    start: int
    end: int


@dataclass
class WorkPlan:
    """What all workers of a run agree on, and what each has loaded."""

    model: Model
    choices: Options
    plans: list[TaskPlan]
    groups: list[Group]
    chunks: list[WorkChunk]
    digest: str
    """Of the chunks, and of the tasks and the token ids of every batch: two that agree in it plan the same."""

    @classmethod
    def of(cls, model: Model, choices: Options, plans: list[TaskPlan]) -> WorkPlan:
        groups = list(schedule(plans, model.facts, choices))
        n_batches = sum(len(group.batches) for group in groups)
        size = max(1, -(-n_batches // MOST_CHUNKS))
        chunks = [WorkChunk(None, 0, 0)] if any(entry.fault for entry in plans) else []
        for number, group in enumerate(groups):
            ends = range(0, len(group.batches), size)
            chunks += [WorkChunk(number, start, min(start + size, len(group.batches))) for start in ends]
        return cls(model, choices, plans, groups, chunks, _digest(groups, chunks))

    def entries(self, chunk: WorkChunk) -> list[TaskPlan]:
        """The tasks of a chunk."""
        if chunk.group is None:
            return [entry for entry in self.plans if entry.fault]
        batches = self.groups[chunk.group].batches[chunk.start : chunk.end]
        return [entry for batch in batches for entry in batch]


def _digest(groups: Sequence[Group], chunks: Sequence[WorkChunk]) -> str:
    digest = hashlib.sha256(repr([tuple(chunk) for chunk in chunks]).encode())
    for group in groups:
        for batch in group.batches:
            digest.update(b"\0batch")
            for entry in batch:
                digest.update(entry.task.id.encode(errors="surrogatepass"))
                for job in entry.jobs:
                    digest.update(array("q", [job.shared, *job.prompt.token_ids]).tobytes())
    return digest.hexdigest()


def work(
    path: str | Path,
    *,
    progress: Progress | None = None,
    device: str | None = None,
    lease_s: float | None = None,
    prepared: WorkPlan | None = None,
) -> Run | None:
    """Join a run that has begun or was prepared, run what nobody else does, and return when every task is committed.

    Any number of processes may do so, on any machine that sees the directory; results are those of one process. The last
    one that ends writes the manifest and returns the run; None for the others. `device` is this worker's, where it differs
    from that of the run; `lease_s` how long others wait before they take over what it was at, when it gives no sign of life;
    `prepared` what the process that forked this one has loaded. Raises as `resume`.
    """
    from probe.runs import Run, RunWriter
    from probe.runs.claims import LEASE_S, Claims, Lease
    from probe.runs.edits import kept_edits
    from probe.runs.files import ENDED

    path, progress = Path(path), progress or SilentProgress()
    run = Run(path)
    if run.run.get("status") in ENDED and set(run.run.get("task_ids") or ()) <= set(run.task_ids):
        progress.log("every task is committed: nothing is left to do")
        return run
    worker: _Worker | None = None
    stopped: RunStopped | None = None
    with RunWriter.join(path) as writer:
        choices, chosen = reopen(path, writer.run)
        missing = [task for task in chosen if not writer.has(task.id)]
        if missing:
            if prepared is None:
                model = load_model(choices.model, replace(choices, device=device or choices.device), progress)
                refuse_other_weights(writer.run, model)
                edits = kept_edits(path, writer.run)
                plans = plan(chosen, model.tokenizer, model.facts, choices, edits, writer.record)
                prepared = WorkPlan.of(model, choices, plans)
                ids = {task.id for task in missing}
                for line in notices([entry for entry in plans if entry.task.id in ids]):
                    progress.log(line)
            lease = Lease(path, lease_s or LEASE_S)
            try:
                claims = Claims(lease)
                if claims.agree(prepared.digest) != prepared.digest:
                    raise RunDirectoryError(
                        f"{path}: its workers plan other batches than this one: the same versions of probe, transformers and "
                        "tokenizers are needed on every machine"
                    )
                worker = _Worker(writer, claims, prepared, progress, path)
                with stopping():
                    worker.run(len(missing))
                if told := worker.source.told_apart():
                    progress.log(told)
            except RunStopped as error:
                error.advice = (
                    f"`probe worker {path}` joins the run again, `probe resume {path}` ends it alone"
                )
                stopped = error
            finally:
                lease.release()
                if worker is not None:
                    worker.source.close()
    ended = close(path, prepared, "interrupted" if stopped is not None else None)
    if stopped is not None:
        raise stopped
    progress.end()
    return ended


def leave_to_workers(
    path: Path, model: Model, plans: list[TaskPlan], choices: Options, progress: Progress
) -> None:
    """Run nothing of a prepared run; say what whoever runs it should know."""
    for line in notices(plans):
        progress.log(line)


def close(path: Path, prepared: WorkPlan | None, status: str | None = None) -> Run | None:
    """Write the end of a run whose workers are gone; None where some are at work, or another one does it.

    A run that lacks tasks gets the `status` (interrupted, failed), and stays as it is without one."""
    from probe.runs import Run, RunWriter
    from probe.runs.files import ENDED, read_run_json
    from probe.runs.manifest import wanted_ids

    try:
        writer = RunWriter.resume(path)
    except RunDirectoryError:
        return None
    with writer:
        if writer.run.get("status") in ENDED:
            return Run(path)
        if set(wanted_ids(writer.run)) <= writer.committed.keys():
            texts = token_texts(writer, _decoder(writer, prepared))
            writer.finish(end_status(writer), **texts)
        elif status is not None:
            writer.finish(status)
    return Run(path) if read_run_json(path).get("status") in ENDED else None


def _decoder(writer: RunWriter, prepared: WorkPlan | None) -> Callable[[int], str | None]:
    if prepared is None:
        return Vocabulary([writer.run], options_of(writer.path, writer.run), lambda _line: None).text
    model = prepared.model
    codec = codec_of(model.tokenizer, model.facts.n_ctx, prepared.choices, model.switches, model.stop_ids)
    return lambda token: codec.decode([token])


class _Worker:
    """Runs chunks until every chunk is done, by this worker or others."""

    def __init__(
        self,
        writer: RunWriter,
        claims: Claims,
        prepared: WorkPlan,
        progress: Progress,
        path: Path,
    ):
        self._writer, self._claims, self._plan, self._progress = writer, claims, prepared, progress
        self._path = path
        self._chance = random.Random()
        model, choices = prepared.model, prepared.choices
        self._codec = codec_of(model.tokenizer, model.facts.n_ctx, choices, model.switches, model.stop_ids)
        generator = open_generator(choices, model)
        refuse_other_generator(writer.run, generator)
        self.source = TokenSource(generator, self._codec, choices)

    def run(self, n_missing: int) -> None:
        self._progress.start(n_missing)
        while (claim := self._next()) is not None:
            chunk = self._plan.chunks[claim.chunk]
            if claim.number and (notice := repeated_calls(self._missing(chunk), self._plan.choices)):
                self._progress.log(notice)
            if chunk.group is None:
                for entry in self._missing(chunk):
                    self._commit(*failed_task(entry, "error", entry.fault or "", 0.0))
                self._end(claim)
            elif not self._missing(chunk):
                self._end(claim)
            else:
                self._walk(claim, self._plan.groups[chunk.group])

    def _missing(self, chunk: WorkChunk) -> list[TaskPlan]:
        return [entry for entry in self._plan.entries(chunk) if not self._writer.has(entry.task.id)]

    def _commit(self, record: dict[str, Any], arrays: dict[str, Any], metadata: dict[str, str]) -> None:
        if not self._writer.has(record["id"]):
            self._writer.commit(record, arrays, metadata)
            self.source.watch(record)
            self._progress.done(n_tokens(record))

    def _next(self) -> ChunkClaim | None:
        """A claim, as soon as one can be made; None when every chunk is done, or the run has ended."""
        wait, longest = _POLLS_S
        while True:
            free, busy = self._claims.states(len(self._plan.chunks))
            if not free and not busy:
                return None
            if (claim := first_claim(free, self._chance)) is None:
                time.sleep(wait)
                wait = min(2 * wait, longest)
            elif self._claims.take(
                claim
            ):  # else somebody was quicker, and may be in the same stretch: look again
                return claim

    def _end(self, claim: ChunkClaim) -> None:
        self._writer.flush()
        self._claims.finish(claim.chunk)

    def _walk(self, claim: ChunkClaim, group: Group) -> None:
        """Run a claimed chunk of a group and what follows, chunk by chunk, as long as nobody has claimed it."""
        from probe.capture import Capturer, Prefixes
        from probe.capture.sites import sequence_bytes

        model = self._plan.model
        prefixes = Prefixes(bytes_of=partial(sequence_bytes, model.facts, model.dtype.itemsize, states=1))
        capturer = Capturer(model, self._codec, group.spec, group.generation, prefixes)
        jobs = [[job for entry in batch for job in entry.jobs] for batch in group.batches]
        start = self._plan.chunks[claim.chunk].start
        for number, doing in enumerate(capturer.expect(jobs, range(start, len(jobs)))):
            if number < start:
                if doing == "prefill":
                    self._prefill(capturer, group.batches[number], group)
                else:
                    capturer.skip(jobs[number])
                continue
            if number == self._plan.chunks[claim.chunk].end:
                self._end(claim)
                following = self._claims.fresh(claim.chunk + 1)
                if following is None or not self._claims.take(following):
                    return
                claim = following
            if not self._claims.holds(claim):
                return
            self._run(capturer, group.batches[number], jobs[number], group)
        self._end(claim)

    def _run(self, capturer: Capturer, batch: list[TaskPlan], jobs: list[Job], group: Group) -> None:
        done = [entry for entry in batch if self._writer.has(entry.task.id)]
        if len(done) < len(batch):
            self._recall(done)
            run_batch(capturer, batch, self._commit, self.source.under(group.generation))
        elif any(job.shared for job in jobs):
            self._prefill(capturer, batch, group)
        else:
            capturer.skip(jobs)

    def _prefill(self, capturer: Capturer, batch: list[TaskPlan], group: Group) -> None:
        self._recall([entry for entry in batch if self._writer.has(entry.task.id)])
        prefill_batch(capturer, batch, self._commit, self.source.under(group.generation))

    def _recall(self, entries: Sequence[TaskPlan]) -> None:
        """What was committed since this worker made its plan calls no tools again: results come from the record."""
        plans = self._plan
        for entry in entries:
            if kind_of(entry.task).calls and self._writer.record(entry.task.id) is not None:
                edits = [job.edits for job in entry.jobs]
                again = plan(
                    [entry.task],
                    plans.model.tokenizer,
                    plans.model.facts,
                    plans.choices,
                    (),
                    self._writer.record,
                )[0]
                for old, new, changes in zip(entry.jobs, again.jobs, edits, strict=True):
                    new.shared, new.edits = old.shared, changes
                    new.prefix_ends, new.prefix_rows = old.prefix_ends, old.prefix_rows
                entry.jobs = again.jobs


def first_claim(free: Sequence[ChunkClaim], chance: random.Random) -> ChunkClaim | None:
    """The claim to make first of those that are free, by chunk: the first chunk where nobody has claimed, else one in the
    middle half of a long stretch that is free. Drawn, so that workers that look at the same time do not all want the same."""
    if not free:
        return None
    stretches: list[tuple[int, int]] = []
    first = 0
    for number in range(1, len(free) + 1):
        if number == len(free) or free[number].chunk != free[number - 1].chunk + 1:
            stretches.append((first, number - first))
            first = number
    if len(stretches) == 1 and free[0] == (0, 0):
        return free[0]
    longest = max(length for _, length in stretches)
    long = [(start, length) for start, length in stretches if 2 * length >= longest]
    start, length = chance.choices(long, weights=[length for _, length in long])[0]
    return free[start + length // 4 + chance.randrange(max(1, length // 2))]
