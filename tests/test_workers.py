"""Many workers, one run: claims, commits, lost workers, and what stays the same as with one process."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

import probe
from benchmarks.kills import OPTIONS, contents, tasks, trial
from benchmarks.scale import simulate
from probe.api import work
from probe.errors import (
    ArtifactCorrupt,
    BadInput,
    DiskError,
    ModelUnavailable,
    ProbeError,
    RunDirectoryError,
    UsageError,
    error_of,
)
from probe.harness import pool as pool_module
from probe.harness import workers
from probe.harness.runner import SilentProgress
from probe.harness.stop import RunStopped
from probe.runs import Array, Run, RunWriter, list_runs, remove_run, verify
from probe.runs.claims import ChunkClaim, Claims, Lease, remove_claims
from tests.test_cli import call, write

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
CLI_OPTIONS = ("--model", "random:tiny-llama", "--no-analyze", "--max-new-tokens", 8, "--batch-size", 4)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A folder with a task file and its run by one process."""
    folder = tmp_path_factory.mktemp("given")
    probe.run(write(folder / "t.jsonl", list(tasks(20))), out=folder / "whole", **OPTIONS)
    return folder


def prepared(given: Path, out: Path) -> Path:
    probe.run(given / "t.jsonl", out=out, prepare=True, **OPTIONS)
    return out


def opened(path: Path) -> RunWriter:
    """A writer that has begun a run of the tasks a and b, which others may join."""
    RunWriter.create(path, {"task_ids": ["a", "b"]}).close()
    return RunWriter.join(path)


def commit(writer: RunWriter, task_id: str, value: float) -> None:
    tensor = Array(torch.full((2, 3), value), ("layer", "row"))
    writer.commit({"id": task_id, "kind": "cot", "status": "ok"}, {"x": tensor}, {})
    writer.flush()


# -- the whole ---------------------------------------------------------------------------------------------------


def test_workers_killed_at_random_instants_leave_every_task_once_as_one_process_does(tmp_path):
    result = trial(tmp_path, count=24, workers=3, kills=4, seed=1)
    assert result["killed"] == 4
    assert (result["records"], result["folders"], result["missing"], result["extra"]) == (24, 24, 0, 0)
    assert (result["differ"], result["problems"], result["complete"], result["status"]) == (
        0,
        0,
        True,
        "done",
    )


@pytest.mark.slow
def test_a_thousand_tasks_and_fifty_kills_leave_every_task_once(tmp_path):
    result = trial(tmp_path, count=1000, workers=4, kills=50, seed=0)
    assert (result["killed"], result["records"], result["folders"]) == (50, 1000, 1000)
    assert (result["differ"], result["problems"], result["complete"]) == (0, 0, True)


def test_a_prepared_run_is_run_by_workers_and_is_that_of_one_process(given, tmp_path):
    path = tmp_path / "r"
    shown = call("run", given / "t.jsonl", *CLI_OPTIONS, "--out", path, "--prepare")
    assert f"`probe worker {path}`" in shown.stderr
    assert shown.stdout.splitlines()[-1] == str(path)
    assert (verify(path).status, len(Run(path))) == ("started", 0)
    assert "20 ok" in call("worker", path, "--no-analyze").stderr
    assert contents(Run(path)) == contents(Run(given / "whole"))
    assert Run(path).run["token_texts"] == Run(given / "whole").run["token_texts"]
    assert call("verify", path).stdout.startswith("complete: 0")
    before = (path / "manifest.json").read_bytes()
    assert "nothing is left" in call("worker", path, "--no-analyze").stderr
    assert (path / "manifest.json").read_bytes() == before


def test_the_last_worker_analyzes_and_reports(given, tmp_path):
    done = work(prepared(given, tmp_path / "r"))
    assert done is not None and done.has_measures and done.report_path is not None


def test_a_worker_goes_on_with_a_run_that_was_interrupted(given, tmp_path):
    class Stop(SilentProgress):
        def done(self, n_tokens: int, count: int = 1) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunStopped, match="probe worker"):
        workers.work(prepared(given, tmp_path / "r"), progress=Stop())
    assert 0 < len(Run(tmp_path / "r")) < 20
    assert verify(tmp_path / "r").status == "interrupted"
    assert workers.work(tmp_path / "r") is not None
    assert contents(Run(tmp_path / "r")) == contents(Run(given / "whole"))


def test_workers_share_what_is_missing_of_a_resumed_run(given, tmp_path):
    class Stop(SilentProgress):
        def done(self, n_tokens: int, count: int = 1) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunStopped):
        probe.run(given / "t.jsonl", out=tmp_path / "r", progress=Stop(), **OPTIONS)
    assert 0 < len(Run(tmp_path / "r")) < 20
    done = probe.resume(tmp_path / "r", workers=2, analyze=False)
    assert contents(done) == contents(Run(given / "whole")) and verify(done.path).complete


def test_resume_ends_a_run_whose_workers_are_gone(given, tmp_path):
    path = prepared(given, tmp_path / "r")
    with RunWriter.join(path):
        Claims(Lease(path)).take(ChunkClaim(0, 0))
    call("resume", path, "--no-analyze")
    assert contents(Run(path)) == contents(Run(given / "whole"))
    assert not (path / ".workers").exists()


@pytest.mark.parametrize("end", [lambda path: probe.resume(path, analyze=False), workers.work])
def test_a_run_whose_last_worker_was_killed_before_it_wrote_the_end_gets_the_same_end(
    end, given, tmp_path, monkeypatch
):
    path = prepared(given, tmp_path / "r")
    with monkeypatch.context() as patch:
        patch.setattr(workers, "close", lambda *_: None)
        workers.work(path)
    assert verify(path).status == "started"
    end(path)
    assert verify(path).complete
    assert Run(path).run["token_texts"] == Run(given / "whole").run["token_texts"]


# -- processes that share the weights ------------------------------------------------------------------------------


def test_a_signal_reaches_every_worker_and_the_run_is_interrupted(given, tmp_path):
    class Stop(SilentProgress):
        def done(self, n_tokens: int, count: int = 1) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    before = set(psutil.Process().children())  # of other tests
    with pytest.raises(RunStopped, match="continues the run"):
        probe.run(given / "t.jsonl", out=tmp_path / "r", workers=2, progress=Stop(), **OPTIONS)
    assert set(psutil.Process().children()) <= before
    assert verify(tmp_path / "r").status == "interrupted"
    probe.resume(tmp_path / "r", analyze=False)
    assert contents(Run(tmp_path / "r")) == contents(Run(given / "whole"))


def test_workers_that_die_again_and_again_end_the_run_with_a_word(given, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_module, "work", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ProbeError, match=r"killed by SIGKILL: 5 died and no task .*`probe resume"):
        probe.run(given / "t.jsonl", out=tmp_path / "r", workers=2, **OPTIONS)
    assert verify(tmp_path / "r").problems == []


def test_an_error_of_a_worker_is_that_of_the_run(given, tmp_path, monkeypatch):
    def full(*_, **__):
        raise DiskError("no space here")

    monkeypatch.setattr(pool_module, "work", full)
    with pytest.raises(DiskError, match="no space here"):
        probe.run(given / "t.jsonl", out=tmp_path / "r", workers=2, **OPTIONS)


def test_workers_and_prepare_exclude_each_other(given, tmp_path):
    call("run", given / "t.jsonl", *CLI_OPTIONS, "--workers", 2, "--prepare", "--out", tmp_path / "r", code=2)
    assert not (tmp_path / "r").exists()


# -- claims ------------------------------------------------------------------------------------------------------


def leased(path: Path, boot: str, name: str = "other", seconds: float = 100.0) -> Path:
    """The lease of a worker under another kernel, or of one that is gone."""
    (path / ".workers" / "claims").mkdir(parents=True, exist_ok=True)
    file = path / ".workers" / name
    file.write_text(json.dumps({"host": "elsewhere", "boot": boot, "pid": 1, "lease_s": seconds}))
    return file


def test_of_many_that_claim_a_chunk_at_once_one_gets_it(tmp_path):
    leases = [Lease(tmp_path) for _ in range(8)]
    views = [Claims(lease) for lease in leases]
    for number in range(50):
        barrier, got = threading.Barrier(8), list[bool]()

        def take(view: Claims, number: int = number, barrier=barrier, got=got) -> None:
            barrier.wait()
            got.append(view.take(ChunkClaim(number, 0)))

        threads = [threading.Thread(target=take, args=(view,)) for view in views]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(got) == [False] * 7 + [True]
    assert views[0].states(51) == ([ChunkClaim(50, 0)], 0)
    assert views[0].states(50) == ([], 50)
    for lease in leases:
        lease.release()
    assert len(views[0].states(50)[0]) == 50


def test_the_claim_of_a_killed_process_is_free_at_once_and_taken_over_by_one(tmp_path):
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        Claims(Lease(tmp_path)).take(ChunkClaim(0, 0))
        os.write(writer, b"!")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    first, second = Lease(tmp_path), Lease(tmp_path)
    a, b = Claims(first), Claims(second)
    assert a.states(1) == ([], 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert a.states(1) == b.states(1) == ([ChunkClaim(0, 1)], 0)
    assert (a.take(ChunkClaim(0, 1)), b.take(ChunkClaim(0, 1))) == (True, False)
    assert b.states(1) == ([], 1)
    assert a.holds(ChunkClaim(0, 1)) and not a.holds(ChunkClaim(0, 0))
    a.finish(0)
    assert b.states(1) == ([], 0)
    for lease in (first, second):
        lease.release()


def test_a_worker_elsewhere_lives_as_long_as_its_lease_is_renewed_by_the_clock_of_who_looks(tmp_path):
    lease = Lease(tmp_path)
    file = leased(tmp_path, "another kernel", seconds=0.5)
    os.symlink("other", tmp_path / ".workers" / "claims" / "0.0")
    os.utime(file, (1, 1))  # its machine's clock says nothing
    claims = Claims(lease)
    assert claims.states(1) == ([], 1)
    time.sleep(0.3)
    os.utime(file, (2, 2))
    assert claims.states(1) == ([], 1)
    time.sleep(0.3)
    assert claims.states(1) == ([], 1)
    time.sleep(0.3)
    assert claims.states(1) == ([ChunkClaim(0, 1)], 0)
    lease.release()


def test_a_claim_names_a_worker_and_never_a_path(tmp_path):
    lease = Lease(tmp_path)
    os.symlink("../../etc/passwd", tmp_path / ".workers" / "claims" / "0.0")
    assert Claims(lease).states(1) == ([ChunkClaim(0, 1)], 0)
    lease.release()


def test_a_machine_that_plans_other_batches_is_refused(given, tmp_path):
    path = prepared(given, tmp_path / "r")
    with RunWriter.join(path):
        lease = Lease(path)
        Claims(lease).agree("of another version")
        with pytest.raises(RunDirectoryError, match="plan other batches"):
            workers.work(path)
        lease.release()


def test_hundreds_of_workers_that_start_at_once_claim_every_chunk_once_and_seldom_in_vain():
    result = simulate(workers=300, chunks=2000, chunk_s=60.0, latency_s=0.005, start_s=0.0)
    assert result["claims"] - result["in_vain"] == 2000
    assert result["in_vain"] < 2 * 300, "one for the first chunk, and few besides"
    assert result["used"] > 0.7


# -- commits -------------------------------------------------------------------------------------------------------


def test_a_slow_worker_that_commits_what_another_did_changes_nothing_and_counts_nothing(tmp_path):
    path = tmp_path / "r"
    with opened(path) as quick, RunWriter.join(path) as slow:
        commit(quick, "a", 1.0)
        before = {file.name: file.read_bytes() for file in Run(path)["a"].path.iterdir()}
        assert slow.has("a")
        commit(slow, "a", 2.0)
        assert {file.name: file.read_bytes() for file in Run(path)["a"].path.iterdir()} == before
        commit(slow, "b", 2.0)
    with RunWriter.resume(path) as writer:
        assert writer.committed == {"a": "ok", "b": "ok"}
        writer.finish("done")
    report = verify(path)
    assert (report.problems, report.notes, report.counts, report.complete) == ([], [], {"ok": 2}, True)


def test_what_needs_the_run_alone_is_refused_while_workers_are_at_it(tmp_path):
    path = tmp_path / "r"
    with opened(path), RunWriter.join(path):
        for use in (
            lambda: RunWriter.resume(path),
            lambda: remove_run(path),
            lambda: Run(path).replace_report(""),
        ):
            with pytest.raises(RunDirectoryError, match="busy: workers are at it"):
                use()
        assert list_runs(tmp_path)[0]["active"] is True
    assert list_runs(tmp_path)[0]["active"] is False
    with RunWriter.resume(path), pytest.raises(RunDirectoryError, match="busy: process"):
        RunWriter.join(path, patience_s=0)


def test_workers_on_another_machine_keep_the_run_busy_where_locks_do_not_reach(tmp_path):
    path = tmp_path / "r"
    opened(path).close()
    file = leased(path, "another kernel")
    with pytest.raises(RunDirectoryError, match="busy: workers on elsewhere"):
        RunWriter.resume(path)
    assert list_runs(tmp_path)[0]["active"] is True
    long_ago = time.time() - 101
    os.utime(file, (long_ago, long_ago))
    with RunWriter.resume(path) as writer:
        writer.finish("interrupted")
    assert not (path / ".workers").exists()


def test_less_than_one_worker_is_refused(given, tmp_path):
    with pytest.raises(UsageError, match="at least 1"):
        probe.run(given / "t.jsonl", out=tmp_path / "r", workers=0, **OPTIONS)
    assert not (tmp_path / "r").exists()


# -- Ray ---------------------------------------------------------------------------------------------------------


def test_without_ray_the_option_says_how_it_is_installed(given, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"probe-harness\[ray\]"):
        probe.run(given / "t.jsonl", out=tmp_path / "r", ray="auto", **OPTIONS)
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_node_leaves_every_task_once(tmp_path):
    pytest.importorskip("ray")
    from benchmarks.cluster import trial as on_cluster

    result = on_cluster(tmp_path, count=200)
    assert result["nodes_killed"] == 1
    assert (result["records"], result["missing"], result["extra"], result["differ"]) == (200, 0, 0, 0)
    assert (result["problems"], result["complete"]) == (0, True)


def test_a_worker_that_comes_back_after_the_end_has_nothing_to_claim(tmp_path):
    RunWriter.create(tmp_path / "r", {"task_ids": ["a"]}).close()
    lease = Lease(tmp_path / "r")
    claims = Claims(lease)
    lease.release()
    remove_claims(tmp_path / "r")
    assert claims.states(3) == ([], 0)
    assert not claims.take(ChunkClaim(0, 0))


def test_an_error_of_another_process_is_the_error_that_it_was_there():
    for kind in (UsageError, RunDirectoryError, ArtifactCorrupt, ModelUnavailable, DiskError, ProbeError):
        error = error_of(kind.exit_code, "what: and why")
        assert type(error) is kind and str(error) == "what: and why"
    assert isinstance(error_of(3, "f:1:1: x"), BadInput) and str(error_of(3, "f:1:1: x")) == "f:1:1: x"
