"""The run directory: durable, atomic, checked."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from probe.errors import ArtifactCorrupt, DiskError, ProbeError, RunDirectoryError, UsageError
from probe.runs import (
    MEASURE_FIELDS,
    SCHEMA,
    Array,
    NotInRun,
    Run,
    RunWriter,
    default_path,
    export,
    list_runs,
    measure_schema,
    prepare,
    verify,
)
from probe.runs import write as write_module
from probe.runs.files import disk_errors
from tests.clock import within

ROOT = Path(__file__).parents[1]


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: for tests of a thousand fsyncs that need no real disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="probe-test-", dir=memory) as name:
        yield Path(name)


def record(task_id: str, **more: Any) -> dict[str, Any]:
    return {
        "id": task_id,
        "kind": "tool_selection",
        "status": "ok",
        "seconds": 0.5,
        "target": "search",
    } | more


def arrays(seed: int = 0) -> dict[str, Array]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "token_ids": Array(torch.arange(7), ("position",)),
        "resid_post": Array(torch.randn(3, 2, 4, generator=generator), ("layer", "row", "d_model")),
        "keys": Array(
            torch.randn(3, 1, 6, 2, generator=generator).bfloat16(),
            ("layer", "kv_head", "position", "d_head"),
        ),
    }


def make_run(path: Path, ids: tuple[str, ...] = ("a", "b"), status: str | None = "done") -> Path:
    with RunWriter.create(
        path, {"task_ids": list(ids), "model": {"name": "tiny", "dtype": "float32"}}
    ) as writer:
        for number, task_id in enumerate(ids):
            writer.commit(record(task_id), arrays(number), {"labels": json.dumps(["bos", "user"])})
        writer.flush()
        if status:
            writer.finish(status)
    return path


def measures(n: int = 2) -> Any:
    import pyarrow as pa

    row = {
        "task_id": "a",
        "analyzer": "tool",
        "name": "margin",
        "value": 0.25,
        "unit": "nats",
        "n": 1,
        "layer": 3,
    }
    rows = [{name: None for name in MEASURE_FIELDS} | row | {"value": float(number)} for number in range(n)]
    return pa.Table.from_pylist(rows, schema=measure_schema())


def task_dir(path: Path, number: int = 0) -> Path:
    return sorted((path / "tasks").glob("[0-9a-f][0-9a-f]/[0-9a-f]*"))[number]


def place(folder: Path) -> str:
    """A task's folder, from its run on."""
    return f"tasks/{folder.parent.name}/{folder.name}"


def read_everything(path: Path) -> None:
    """What a reader touches; any damage must surface as a ProbeError."""
    run = Run(path)
    _ = run.manifest, len(run)
    for task in run:
        _ = task.record, task.metadata, task.labels()
        for name in task:
            task[name].double().sum()
            task.slice(name)[:1].double().sum()
    if run.has_measures:
        run.measures(arrow=True)


# What is written is what is read


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (0, 4), ()], ids=str)
def test_a_tensor_comes_back_bit_for_bit_and_the_library_agrees(tmp_path, dtype, shape):
    tensor = (torch.randn(shape) * 9).to(dtype)
    axes = tuple(f"axis{number}" for number in range(tensor.ndim))
    odd = torch.arange(3, dtype=torch.uint8)  # an odd number of bytes beside it, to test the alignment
    with RunWriter.create(tmp_path / "r", {}) as writer:
        writer.commit(record("t"), {"x": Array(tensor, axes), "odd": Array(odd, ("axis",))}, {"note": "é"})
    task = Run(tmp_path / "r")["t"]
    assert torch.equal(task["x"], tensor) and task["x"].dtype == dtype
    assert task.axes("x") == axes and task.shape("x") == shape and task.metadata["note"] == "é"
    library = safetensors.torch.load_file(task.path / "tensors.safetensors")
    assert torch.equal(library["x"], tensor) and torch.equal(library["odd"], odd)


def test_views_and_tensors_with_gradients_are_saved_as_their_values(tmp_path):
    base = torch.randn(4, 6, requires_grad=True)
    view = base[:, ::2].t()
    with RunWriter.create(tmp_path / "r", {}) as writer:
        writer.commit(record("t"), {"x": Array(view, ("a", "b"))}, {})
    assert torch.equal(Run(tmp_path / "r")["t"]["x"], view.detach())


def test_a_slice_reads_one_layer(tmp_path):
    run = Run(make_run(tmp_path / "r"))
    assert torch.equal(run["b"].slice("keys")[1], arrays(1)["keys"].tensor[1])


def test_a_task_without_tensors_has_none(tmp_path):
    with RunWriter.create(tmp_path / "r", {}) as writer:
        writer.commit(record("t", status="error", error="too long"), {}, {})
    task = Run(tmp_path / "r")["t"]
    assert task.keys() == [] and "keys" not in task
    with pytest.raises(NotInRun, match="no tensor at all"):
        task["keys"]
    assert verify(tmp_path / "r").problems == []


def test_tasks_come_in_the_order_of_the_task_file(tmp_path):
    with RunWriter.create(tmp_path / "r", {"task_ids": ["z", "a", "m"]}) as writer:
        for task_id in ("a", "z", "other"):
            writer.commit(record(task_id), {}, {})
    run = Run(tmp_path / "r")
    assert run.task_ids == ["z", "a", "other"] and len(run) == 3 and [task.id for task in run] == run.task_ids
    with pytest.raises(NotInRun, match="has not run yet.*resume"):
        run["m"]
    with pytest.raises(KeyError, match="did you mean 'other'"):
        run["othr"]


def test_labels_and_layers_are_found_for_a_passage_and_for_all(tmp_path):
    metadata = {"labels": json.dumps({"base": ["bos"], "v": ["bos", "user"]}), "v/layers": "[4, 9]"}
    with RunWriter.create(tmp_path / "r", {}) as writer:
        writer.commit(record("t"), {}, metadata)
    task = Run(tmp_path / "r")["t"]
    assert task.labels("v") == ["bos", "user"] and task.labels("base") == ["bos"]
    assert task.listed("layers", "v") == [4, 9] and task.listed("layers", "base") is None
    with pytest.raises(NotInRun, match="no span labels"):
        task.labels("main")


@pytest.mark.parametrize(
    "umask, file_mode, dir_mode", [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (2, 0o664, 0o775)]
)
def test_permissions_follow_the_umask(tmp_path, umask, file_mode, dir_mode):
    before = os.umask(umask)
    try:
        path = make_run(tmp_path / "r")
    finally:
        os.umask(before)
    for name in path.rglob("*"):
        assert stat.S_IMODE(name.stat().st_mode) == (dir_mode if name.is_dir() else file_mode), name


@pytest.mark.parametrize(
    "task_id", ["../../etc/passwd", "/abs", "..", "a\0b", "x" * 5000, "日本\n", ".tmp-1", "con:"]
)
def test_no_id_becomes_a_path(tmp_path, task_id):
    path = make_run(tmp_path / "r", (task_id,))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["r"]
    assert re.fullmatch("[0-9a-f]{16}", task_dir(path).name)
    assert Run(path)[task_id].record["id"] == task_id and verify(path).problems == []


def test_lone_surrogates_are_replaced_everywhere(tmp_path):
    with RunWriter.create(tmp_path / "r", {"task_ids": ["\ud800"], "argv": ["\udcff"]}) as writer:
        x = Array(torch.zeros(1), ("position",))
        writer.commit(record("\ud800", completion="a\udfffb"), {"v\ud812/x": x}, {"note": "\udead"})
        writer.finish("done")
    run = Run(tmp_path / "r")
    assert run["\ud800"].record["completion"] == "a\ufffdb" and run.task_ids == ["\ufffd"]
    assert run["\ufffd"].keys() == ["v\ufffd/x"]
    assert verify(tmp_path / "r").complete
    run.replace_report("<p>\ud800</p>")
    assert (tmp_path / "r/report.html").read_text() == "<p>\ufffd</p>"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_json_lacks_is_refused_with_its_place(tmp_path, number):
    with RunWriter.create(tmp_path / "r", {}) as writer:
        with pytest.raises(ValueError, match=r"task 't': decisions\.1\.log_prob"):
            writer.commit(record("t", decisions=[{}, {"log_prob": number}]), {}, {})
        writer.commit(record("t"), {}, {})
    assert len(Run(tmp_path / "r")) == 1


@pytest.mark.parametrize(
    "task, tensors, complaint",
    [
        ({"status": "ok"}, {}, "id and status"),
        ({"id": "t"}, {}, "id and status"),
        (record("t"), {"x": Array(torch.zeros(2, 2), ("row",))}, "axes"),
        (record("t"), {"x": Array(torch.zeros(2, dtype=torch.complex64), ("row",))}, "complex64"),
        (record("a"), {}, "already committed"),
    ],
)
def test_a_commit_that_makes_no_sense_is_refused_at_once(tmp_path, task, tensors, complaint):
    with RunWriter.create(tmp_path / "r", {}) as writer:
        writer.commit(record("a"), {}, {})
        with pytest.raises(ValueError, match=complaint):
            writer.commit(task, tensors, {})


# Starting, resuming, finishing


def test_run_json_is_there_first_and_says_started(tmp_path):
    with RunWriter.create(tmp_path / "deep/er", {"seed": 3}) as writer:
        run = json.loads((tmp_path / "deep/er/run.json").read_text())
        checksum = run.pop("blake3")
        assert run["status"] == "started" and run["seed"] == 3 and writer.run == run and len(checksum) == 64
        assert re.fullmatch("[a-z0-9-]{1,64}", run["id"]) and run["created"].endswith("Z")
        assert Run(tmp_path / "deep/er").manifest["complete"] is False


@pytest.mark.parametrize("status", ["done", "failed", "interrupted"])
def test_finish_rewrites_run_json_and_lists_every_file(tmp_path, status):
    with RunWriter.create(tmp_path / "r", {"task_ids": ["a", "b"]}) as writer:
        writer.commit(record("a"), arrays(), {})
        writer.commit(record("b", status="nonfinite"), arrays(), {})
        writer.finish(status, seconds=1.5)
    run = Run(tmp_path / "r")
    assert run.run["status"] == status and run.run["seconds"] == 1.5
    manifest = run.manifest
    assert (
        manifest["complete"] and manifest["counts"] == {"nonfinite": 1, "ok": 1} and manifest["schema"] == 2
    )
    files = {str(name.relative_to(run.path)) for name in run.path.rglob("*") if name.is_file()}
    assert {file["path"] for file in manifest["files"]} == files - {".lock", "manifest.json"}
    assert manifest["tasks"] == {task.id: place(task.path) for task in run}


def test_a_run_that_lacks_tasks_is_not_complete_even_with_a_manifest(tmp_path):
    with RunWriter.create(tmp_path / "r", {"task_ids": ["a", "b"]}) as writer:
        writer.commit(record("a"), {}, {})
        writer.finish("interrupted")
    report = verify(tmp_path / "r")
    assert not report.complete and report.problems == [] and any("1 tasks" in note for note in report.notes)
    assert Run(tmp_path / "r").manifest["complete"] is False


def test_resume_knows_what_is_committed_and_reopens_a_closed_run(tmp_path):
    path = make_run(tmp_path / "r", ("a", "b"), "interrupted")
    with RunWriter.resume(path) as writer:
        assert writer.committed == {"a": "ok", "b": "ok"} and writer.run["model"]["name"] == "tiny"
        assert (path / "manifest.json").exists(), "nothing changes before the first commit"
        writer.commit(record("c"), arrays(2), {})
        writer.flush()
        assert not (path / "manifest.json").exists() and Run(path).run["status"] == "started"
        assert verify(path).problems == []
        writer.finish("done")
    assert verify(path).complete and Run(path).task_ids == ["a", "b", "c"]


def flatten(path: Path) -> Path:
    """A run as schema 1 has it: a task's folder in tasks/ itself."""
    from probe.runs.files import encode_signed, entry_of

    for folder in (path / "tasks").glob("*/*"):
        folder.rename(path / "tasks" / folder.name)
    for prefix in (path / "tasks").glob("[0-9a-f][0-9a-f]"):
        prefix.rmdir()
    header = encode_signed(json.loads((path / "run.json").read_bytes()) | {"schema": 1})
    (path / "run.json").write_bytes(header)
    if (path / "manifest.json").exists():
        manifest = json.loads(re.sub(r"tasks/[0-9a-f]{2}/", "tasks/", (path / "manifest.json").read_text()))
        files = [file for file in manifest["files"] if file["path"] != "run.json"]
        manifest["files"] = [*files, {"path": "run.json", **entry_of(header)._asdict()}]
        (path / "manifest.json").write_bytes(encode_signed(manifest | {"schema": 1}))
    return path


@pytest.mark.parametrize("status", ["interrupted", None])
def test_a_run_of_schema_1_is_read_verified_and_resumed_and_then_has_both_layouts(tmp_path, status):
    path = flatten(make_run(tmp_path / "r", status=status))
    kept = {folder.name for folder in (path / "tasks").iterdir()}
    assert verify(path).problems == [] and verify(path).n_tasks == 2 and Run(path).run["schema"] == 1
    read_everything(path)
    with RunWriter.resume(path) as writer:
        assert writer.committed == {"a": "ok", "b": "ok"}
        writer.commit(record("c"), arrays(2), {"labels": json.dumps(["bos", "user"])})
        writer.finish("done")
    assert verify(path).problems == [] and Run(path).run["schema"] == 2
    assert Run(path).task_ids == ["a", "b", "c"]
    assert [place(Run(path)["c"].path)] == [
        str(path.relative_to(tmp_path / "r")) for path in path.glob("tasks/??/*")
    ]
    assert {folder.name for folder in (path / "tasks").iterdir() if len(folder.name) == 16} == kept
    read_everything(path)


def test_a_task_that_lies_in_both_layouts_is_named(tmp_path):
    path = make_run(tmp_path / "r")
    shutil.copytree(task_dir(path), path / "tasks" / task_dir(path).name)
    assert any("the task lies in" in problem for problem in verify(path).problems)
    with pytest.raises(ArtifactCorrupt, match="the task lies in"):
        _ = Run(path).task_ids


def test_resume_removes_what_an_interrupted_write_left(tmp_path):
    path = make_run(tmp_path / "r", status=None)
    stale = task_dir(path).with_name(f".tmp-{'0' * 32}")
    stale.mkdir()
    (stale / "record.json").write_text("{")
    (path / f".tmp-run.json-{'a' * 32}").write_text("{")
    (path / ".tmp-mine").write_text("not the store's own")
    report = verify(path)
    assert report.problems == [] and len([note for note in report.notes if "interrupted write" in note]) == 2
    assert Run(path).task_ids == ["a", "b"]
    RunWriter.resume(path).close()
    assert not stale.exists() and sorted(name.name for name in path.iterdir()) == [
        ".lock", ".tmp-mine", "run.json", "tasks"
    ]  # fmt: skip


def test_resume_refuses_a_damaged_task_and_names_its_file(tmp_path):
    path = make_run(tmp_path / "r", status=None)
    with open(task_dir(path) / "record.json", "r+b") as file:
        file.truncate(10)
    with pytest.raises(ArtifactCorrupt, match="record.json: truncated"):
        RunWriter.resume(path)
    with pytest.raises(ArtifactCorrupt):
        RunWriter.resume(path)  # and the lock was freed: still the same error


def test_create_refuses_a_directory_with_content_and_leaves_no_trace(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="not empty.*notes.txt"):
        RunWriter.create(tmp_path, {})
    assert os.listdir(tmp_path) == ["notes.txt"]
    with pytest.raises(RunDirectoryError, match="not a directory"):
        RunWriter.create(tmp_path / "notes.txt", {})
    path = make_run(tmp_path / "r")
    with pytest.raises(RunDirectoryError, match="probe resume"):
        RunWriter.create(path, {})
    assert verify(path).complete


def test_create_takes_an_empty_directory_and_the_traces_of_a_failed_start(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "tasks").mkdir()
    (tmp_path / f".tmp-run.json-{'0' * 32}").touch()
    make_run_in = RunWriter.create(tmp_path, {})
    make_run_in.finish("done")
    make_run_in.close()
    assert verify(tmp_path).complete and verify(tmp_path).notes == []


@pytest.mark.parametrize("use", [Run, verify, RunWriter.resume], ids=["open", "verify", "resume"])
def test_what_is_no_run_is_refused(tmp_path, use):
    make_run(tmp_path / "runs/one")
    (tmp_path / "file").touch()
    for path, words in [("runs", "not a run directory"), ("nowhere", "no such"), ("file", "no such")]:
        with pytest.raises(RunDirectoryError, match=words):
            use(tmp_path / path)


def test_a_run_of_a_newer_layout_is_refused(tmp_path):
    path = make_run(tmp_path / "r")
    (path / "run.json").write_text(json.dumps({"schema": SCHEMA + 1}))
    with pytest.raises(RunDirectoryError, match="upgrade"):
        Run(path)


def test_default_path_is_a_fresh_safe_name():
    paths = {
        default_path(Path("runs"), hint) for hint in ("", "", "tools.jsonl", "../../x", "É" * 99, "a" * 99)
    }
    assert len(paths) == 6
    assert all(path.parent == Path("runs") and re.fullmatch("[a-z0-9-]{1,64}", path.name) for path in paths)


# Locking


HOLD = """
import sys, time
from probe.runs import RunWriter
writer = RunWriter.create(sys.argv[1], {})
writer.commit({"id": "a", "status": "ok"}, {}, {})
writer.flush()
print("ready", flush=True)
time.sleep(60)
"""


def child(script: str, *args: str, **options: Any) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", script, *args], env=environment, text=True, stdout=subprocess.PIPE, **options
    )


@pytest.mark.timing
def test_a_second_process_is_refused_quickly_and_a_killed_one_frees_the_run(tmp_path):
    path = tmp_path / "r"
    with child(HOLD, str(path)) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
            for use in (lambda: RunWriter.create(path, {}), lambda: RunWriter.resume(path)):
                start = time.monotonic()
                with pytest.raises(RunDirectoryError, match=f"busy: process {holder.pid}"):
                    use()
                assert within(1, time.monotonic() - start)
            with pytest.raises(RunDirectoryError, match="busy"):
                Run(path).replace_report("x")
            assert [(row["active"], row["tasks_done"]) for row in list_runs(tmp_path)] == [(True, 1)]
        finally:
            holder.kill()
    assert list_runs(tmp_path)[0]["active"] is False
    with RunWriter.resume(path) as writer:
        assert writer.committed == {"a": "ok"}


def test_the_lock_outlives_no_writer_and_no_failed_start(tmp_path):
    path = make_run(tmp_path / "r")
    for _ in range(2):
        with RunWriter.resume(path):
            with pytest.raises(RunDirectoryError, match="busy"):
                RunWriter.resume(path)
        with pytest.raises(RunDirectoryError, match="holds a run already"):
            RunWriter.create(path, {})


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_does_not_keep_a_closed_run_locked(tmp_path):
    with RunWriter.create(tmp_path / "r", {}):
        pid = os.fork()
        if pid == 0:
            time.sleep(30)
            os._exit(0)
    try:
        RunWriter.resume(tmp_path / "r").close()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# Crashes: a real SIGKILL


WRITE_MANY = """
import os, sys, torch
from probe.runs import Array, RunWriter

def work(path):
    writer = RunWriter.resume(path) if os.path.exists(path + "/run.json") else RunWriter.create(path, {})
    done = len(writer.committed)
    for number in range(done, done + 10_000):
        tensor = torch.full((3, 2000), float(number))
        writer.commit({"id": f"task {number}", "status": "ok"}, {"x": Array(tensor, ("layer", "row"))}, {})
        if number % 3 == 0:
            writer.flush()
            os.write(1, f"{number}\\n".encode())

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        work(sys.argv[1])
    print("pid", pid, flush=True)
    print("end", os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.mark.slow
def test_kill_9_at_random_moments_loses_and_tears_nothing(tmp_path):
    path, chance, acknowledged = tmp_path / "r", random.Random(0), -1
    with child(WRITE_MANY, str(path), stdin=subprocess.PIPE) as forker:
        assert forker.stdin is not None and forker.stdout is not None
        for attempt in range(14):
            forker.stdin.write("go\n")
            forker.stdin.flush()
            pid = 0
            for line in forker.stdout:
                if line.startswith("pid"):
                    pid = int(line.split()[1])
                    time.sleep(chance.uniform(0.002, 0.25) if attempt else 0.3)
                    os.kill(pid, signal.SIGKILL)
                elif line.startswith("end"):
                    assert int(line.split()[1]) == signal.SIGKILL
                    break
                else:
                    acknowledged = max(acknowledged, int(line))
            report = verify(path)
            assert report.problems == [] and not report.complete
            run = Run(path)
            for number in range(len(run)):
                assert run[f"task {number}"]["x"].eq(number).all()
            assert len(run) > acknowledged
        forker.stdin.close()
    assert acknowledged > 20, "the test wrote too little to mean anything"
    with RunWriter.resume(path) as writer:
        writer.finish("interrupted")
    assert verify(path).problems == []


def script_of_a_run(path: Path, acknowledge: Callable[[str], None]) -> None:
    """Every kind of write, in the order of a run that is stopped once and resumed."""
    for number, (task_id, status) in enumerate([("a", "interrupted"), ("b", "failed"), ("b", "done")]):
        resume = (path / "run.json").exists()
        with RunWriter.resume(path) if resume else RunWriter.create(path, {"task_ids": ["a", "b"]}) as writer:
            if task_id not in writer.committed:
                writer.commit(record(task_id), arrays(number), {})
                writer.flush()
                acknowledge(task_id)
            writer.finish(status)
    run = Run(path)
    run.replace_report("<p>one</p>")
    run.replace_report("<p>two</p>")


CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink")


def counting(monkeypatch: pytest.MonkeyPatch, at: int, action: Callable[[], None]) -> list[int]:
    """Run `action` instead of the `at`-th call that changes the disk; returns the live count."""
    count = [0]

    def wrap(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            reading = name == "open" and not args[1] & (os.O_CREAT | os.O_DIRECTORY)
            if not reading:
                count[0] += 1
                if count[0] == at:
                    action()
            return call(*args, **options)

        return counted

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(getattr(os, name), name))
    return count


def task_bytes(path: Path) -> dict[str, bytes]:
    names = ("record.json", "tensors.safetensors", "checksums.json")
    return {
        f"{entry.name}/{name}": (entry / name).read_bytes()
        for entry in (path / "tasks").glob("*/*")
        for name in names
    }


def killed_run(path: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Wait status, and the tasks acknowledged by a process that is killed before its `at`-th disk call."""
    reader, writer = os.pipe()
    write = os.write

    def acknowledge(task_id: str) -> None:
        write(writer, task_id.encode())

    pid = os.fork()
    if pid == 0:
        try:
            counting(monkeypatch, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
            script_of_a_run(path, acknowledge)
        finally:
            os._exit(1)  # never back into pytest
    os.close(writer)
    with open(reader) as acknowledged:
        return os.waitpid(pid, 0)[1], acknowledged.read()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_kill_9_before_every_single_disk_call_loses_and_tears_nothing(memory_path, monkeypatch):
    whole = memory_path / "whole"
    with monkeypatch.context() as patch:
        total = counting(patch, -1, lambda: None)
        script_of_a_run(whole, lambda _: None)
    assert total[0] > 60
    for at in range(1, total[0] + 1):
        path = memory_path / str(at)
        status, tasks = killed_run(path, at, monkeypatch)
        assert status == signal.SIGKILL, f"call {at} was not reached"
        if (path / "run.json").exists():
            assert verify(path).problems == [], f"killed before call {at}"
            run = Run(path)
            assert [run[task_id].record["id"] for task_id in tasks] == list(tasks)
        else:
            assert tasks == ""
        script_of_a_run(path, lambda _: None)
        assert verify(path).complete and verify(path).problems == []
        assert task_bytes(path) == task_bytes(whole)
        shutil.rmtree(path)


def test_every_byte_is_synced_before_its_name_and_every_name_before_the_flush_returns(tmp_path, monkeypatch):
    """What a power cut needs: no rename of unsynced bytes or names, and no unsynced name after a flush."""
    paths: dict[int, str] = {}
    dirty: set[str] = set()
    calls = {name: getattr(os, name) for name in (*CALLS, "close")}

    def opened(path: Any, flags: int, *args: Any, **options: Any) -> int:
        descriptor = calls["open"](path, flags, *args, **options)
        paths[descriptor] = os.fspath(path)
        if flags & os.O_CREAT and not str(path).endswith(".lock"):
            dirty.update((str(path), os.path.dirname(path)))
        return descriptor

    def renamed(source: Any, target: Any) -> None:
        inside = [path for path in dirty if path == str(source) or path.startswith(f"{source}/")]
        assert not inside, f"{inside} renamed before fsync"
        calls["rename"](source, target)
        dirty.update((os.path.dirname(source), os.path.dirname(target)))

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "write", lambda d, data: dirty.add(paths[d]) or calls["write"](d, data))
    monkeypatch.setattr(os, "fsync", lambda d: dirty.discard(paths[d]) or calls["fsync"](d))
    monkeypatch.setattr(os, "close", lambda d: (paths.pop(d, None) and None) or calls["close"](d))
    monkeypatch.setattr(os, "mkdir", lambda p, *a: dirty.add(os.path.dirname(p)) or calls["mkdir"](p, *a))
    monkeypatch.setattr(os, "unlink", lambda p: dirty.add(os.path.dirname(p)) or calls["unlink"](p))
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, renamed)
    path = tmp_path / "r"
    with RunWriter.create(path, {}) as writer:
        assert not dirty
        for task_id in ("a", "b"):
            writer.commit(record(task_id), arrays(), {})
            writer.flush()
            assert not dirty
        writer.finish("done")
        assert not dirty
    Run(path).replace_report("x")
    assert not dirty


# A disk that fails


@pytest.mark.parametrize(
    "number",
    [errno.ENOSPC, *(pytest.param(number, marks=pytest.mark.slow) for number in (errno.EIO, errno.EROFS))],
    ids=errno.errorcode.get,
)
def test_every_failing_disk_call_is_a_disk_error_and_keeps_the_earlier_tasks(
    memory_path, monkeypatch, number
):
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        total = counting(patch, -1, fail)
        script_of_a_run(memory_path / "whole", lambda _: None)
    for at in range(1, total[0] + 1):
        path, acknowledged = memory_path / str(at), []
        with monkeypatch.context() as patch:
            counting(patch, at, fail)
            try:
                script_of_a_run(path, acknowledged.append)
            except DiskError as error:
                assert str(path) in str(error) and os.strerror(number) in str(error)
        if (path / "run.json").exists():
            assert verify(path).problems == [], f"call {at} failed"
            assert set(acknowledged) <= set(Run(path).task_ids)
        script_of_a_run(path, lambda _: None)
        assert verify(path).complete and verify(path).problems == []
        assert task_bytes(path) == task_bytes(memory_path / "whole")
        shutil.rmtree(path)


def test_short_writes_are_completed(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data[:7])))
    assert verify(make_run(tmp_path / "r")).problems == []


def test_an_error_says_where_how_much_and_what_to_do_and_stops_the_writer(tmp_path, monkeypatch):
    writer = RunWriter.create(tmp_path / "r", {"task_ids": ["a", "b"]})
    writer.commit(record("a"), arrays(), {})
    writer.flush()

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        writer.commit(record("b"), arrays(), {})
        with pytest.raises(
            DiskError,
            match=r"tasks/[0-9a-f]{2}/[0-9a-f]{16}.*\(\d+ bytes to write\).*No space.*free some space",
        ):
            writer.flush()
    for attempt in (writer.flush, lambda: writer.commit(record("b"), {}, {}), lambda: writer.finish("done")):
        with pytest.raises(DiskError):
            attempt()
    writer.finish("failed")
    writer.close()  # the error was told: not again
    assert Run(tmp_path / "r").run["status"] == "failed" and verify(tmp_path / "r").counts == {"ok": 1}
    assert not list((tmp_path / "r/tasks").rglob(".tmp*"))
    with RunWriter.resume(tmp_path / "r") as again:
        again.commit(record("b"), {}, {})
        again.finish("done")
    assert verify(tmp_path / "r").complete


@pytest.mark.parametrize("leave", ["close", "with"])
def test_an_error_that_nobody_asked_for_surfaces_when_the_run_is_closed(tmp_path, monkeypatch, leave):
    writer = RunWriter.create(tmp_path / "r", {})
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "")))
    with pytest.raises(DiskError, match="Input/output error"):
        if leave == "close":
            writer.commit(record("a"), {}, {})
            writer.close()
        else:
            with writer:
                writer.commit(record("a"), {}, {})
    monkeypatch.undo()
    RunWriter.resume(tmp_path / "r").close()  # the lock is free


def test_after_an_error_nothing_that_waited_is_written(tmp_path, monkeypatch):
    gate, write_task, calls = threading.Event(), write_module._write_task, []

    def fail_once(path: Path, job: Any, *given: Any) -> Any:
        gate.wait(10)
        calls.append(job.id)
        if len(calls) == 1:
            raise DiskError("full")
        return write_task(path, job, *given)

    monkeypatch.setattr(write_module, "_write_task", fail_once)
    writer = RunWriter.create(tmp_path / "r", {})
    for task_id in "abc":
        writer.commit(record(task_id), {}, {})
    gate.set()
    with pytest.raises(DiskError):
        writer.flush()
    writer.close()
    assert calls == ["a"] and len(Run(tmp_path / "r")) == 0


def test_an_error_on_its_way_is_not_hidden_by_one_of_the_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "")))
    with pytest.raises(KeyboardInterrupt), RunWriter.create(tmp_path / "r", {}) as writer:
        writer.commit(record("a"), {}, {})
        raise KeyboardInterrupt


FILL = """
import ctypes, os, subprocess, sys, torch
from probe.errors import DiskError
from probe.runs import Array, Run, RunWriter, verify
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", sys.argv[1]]).returncode:
    sys.exit(77)
path, done = sys.argv[1] + "/r", 0
writer = RunWriter.create(path, {})
try:
    for number in range(99):
        x = Array(torch.full((5000,), float(number)), ("position",))
        writer.commit({"id": str(number), "status": "ok"}, {"x": x}, {})
        writer.flush()
        done += 1
except DiskError as error:
    print(error)
writer.close()
run = Run(path)
assert 5 < done < 99 and len(run) == done, (done, len(run))
assert all(run[str(number)]["x"].eq(number).all() for number in range(done))
assert verify(path).problems == []
subprocess.run(["mount", "-o", "remount,size=4m", sys.argv[1]], check=True)
with RunWriter.resume(path) as writer:
    writer.commit({"id": "more", "status": "ok"}, {}, {})
    writer.finish("done")
assert verify(path).complete and len(Run(path)) == done + 1
subprocess.run(["mount", "-o", "remount,ro", sys.argv[1]], check=True)
for attempt in (lambda: RunWriter.create(sys.argv[1] + "/s", {}), lambda: RunWriter.resume(path)):
    try:
        attempt()
    except DiskError as error:
        print(error)
assert verify(path).complete
"""


def test_a_disk_that_is_really_full_or_read_only(tmp_path):
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode
    ):
        pytest.skip("no private mounts here; the injected faults above stand in")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", FILL, str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if result.returncode == 77:
        pytest.skip("no tmpfs here; the injected faults above stand in")
    assert result.returncode == 0, result.stderr
    full, *read_only = result.stdout.splitlines()
    assert re.search(
        r"tasks/[0-9a-f]{2}/[0-9a-f]{16}: cannot write \(20\d\d\d bytes to write\): No space left on device",
        full,
    )
    assert len(read_only) == 2 and all("Read-only file system" in line for line in read_only)


# Back-pressure


@pytest.mark.parametrize("bound", ["QUEUE_TASKS", "QUEUE_BYTES"])
def test_commit_waits_while_too_much_waits_to_be_written(tmp_path, monkeypatch, bound):
    gate, write_task = threading.Event(), write_module._write_task
    monkeypatch.setattr(write_module, bound, 1)

    def slowly(*args: Any) -> Any:
        gate.wait(10)
        return write_task(*args)

    monkeypatch.setattr(write_module, "_write_task", slowly)
    with RunWriter.create(tmp_path / "r", {}) as writer:
        writer.commit(record("a"), arrays(), {})
        second = threading.Thread(target=writer.commit, args=(record("b"), arrays(), {}))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        gate.set()
        second.join(5)
        assert not second.is_alive()
    assert Run(tmp_path / "r").task_ids == ["a", "b"]


# Damage


def damages(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(kind, bytes) of a file of these bytes after some accident."""
    chance = random.Random(len(data))
    for offset in {0, 1, 7, 8, 9, len(data) - 1, *(chance.randrange(len(data)) for _ in range(16))}:
        if offset < len(data):
            flipped = bytearray(data)
            flipped[offset] ^= 1 << chance.randrange(8)
            yield "altered", bytes(flipped)
            yield "truncated", data[:offset]
    yield "altered", data + b"\0"
    yield "altered", bytes(len(data))


def all_files(path: Path) -> list[Path]:
    return sorted(name for name in path.rglob("*") if name.is_file() and name.name != ".lock")


def complaints(path: Path, name: Path) -> list[str]:
    """Problems that verify reports about one file; none may be about another."""
    problems = verify(path).problems
    relative = str(name.relative_to(path))
    assert problems and all(problem.startswith(f"{relative}: ") for problem in problems), problems
    return problems


def try_to_read(path: Path) -> None:
    try:
        read_everything(path)
    except ProbeError:
        pass


def test_with_a_manifest_every_damage_is_named_and_no_read_crashes(tmp_path):
    path = make_run(tmp_path / "r")
    Run(path).write_table("measures", measures())
    Run(path).replace_report("<p>report</p>")
    files = all_files(path)
    assert {name.name for name in files} == {
        "run.json", "manifest.json", "measures.parquet", "report.html",
        "record.json", "tensors.safetensors", "checksums.json",
    }  # fmt: skip
    for name in files:
        data = name.read_bytes()
        for kind, damaged in damages(data):
            name.write_bytes(damaged)
            problems = complaints(path, name)
            if name.name not in ("run.json", "manifest.json"):
                assert len(problems) == 1 and f": {kind} (" in problems[0]
            refuses_to_read_or_sign(path, but=name.name in ("report.html", "checksums.json"))
        name.unlink()
        assert complaints(path, name)[0].endswith(": missing")
        if name.name != "manifest.json":
            refuses_to_read_or_sign(path, but=name.name in ("report.html", "checksums.json"))
        name.write_bytes(data)
    assert verify(path).complete


def refuses_to_read_or_sign(path: Path, but: bool = False) -> None:
    """No number comes out of a run with a damaged file, and no writer lists it anew; `but` may be read."""
    before = {name: name.read_bytes() for name in all_files(path)}
    with nullcontext() if but else pytest.raises((ArtifactCorrupt, RunDirectoryError)):
        run = Run(path)
        for task in run:
            assert task.record["kind"]
            assert all(task[name].numel() >= 0 for name in task)
        run.measures(arrow=True)
    with pytest.raises((ArtifactCorrupt, RunDirectoryError)):
        RunWriter.resume(path)
    assert {name: name.read_bytes() for name in all_files(path)} == before


@pytest.mark.parametrize("status", ["interrupted", None])
def test_a_flipped_bit_beside_the_tasks_is_found_by_every_reader_and_signed_by_none(tmp_path, status):
    path = make_run(tmp_path / "r", status=status)
    Run(path).write_table("measures", measures())
    for name in (path / "run.json", path / "measures.parquet"):
        data = name.read_bytes()
        for place in range(0, len(data), max(1, len(data) // 40)):
            name.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
            assert verify(path).problems, place
            refuses_to_read_or_sign(path)
        name.write_bytes(data)
    with RunWriter.resume(path) as writer:
        writer.finish("done")
    assert verify(path).problems == [] and len(Run(path).measures(arrow=True)) == len(measures())


def test_a_run_that_lost_its_manifest_gets_one_from_what_checks_by_itself(tmp_path):
    path = make_run(tmp_path / "r")
    Run(path).write_table("measures", measures())
    (path / "manifest.json").unlink()
    assert verify(path).problems == ["manifest.json: missing"]
    with pytest.raises(ArtifactCorrupt, match=r"manifest.json: missing .*probe resume"):
        Run(path)
    with RunWriter.resume(path) as writer:
        writer.finish("done")
    assert verify(path).complete and verify(path).problems == []
    assert not Run(path).has_measures  # nothing said that they were right


def test_a_task_whose_name_is_not_durable_is_not_committed(tmp_path, monkeypatch):
    """EIO on the directory's fsync behind the rename: what is on the disk is what the manifest lists."""
    sync = write_module.sync_directory

    def failing(directory: Path) -> None:
        if directory.name == "tasks":
            raise OSError(errno.EIO, "Input/output error")
        sync(directory)

    with pytest.raises(DiskError), RunWriter.create(tmp_path / "r", {"task_ids": ["a"]}) as writer:
        monkeypatch.setattr(write_module, "sync_directory", failing)
        writer.commit(record("a"), arrays(0), {"labels": json.dumps(["bos", "user"])})
        with pytest.raises(DiskError):
            writer.flush()
        writer.finish("failed")
        raise DiskError("as the runner does")
    monkeypatch.undo()
    assert verify(tmp_path / "r").problems == [] and Run(tmp_path / "r").task_ids == []


def test_a_disk_that_fails_while_it_is_read_is_exit_7_with_the_path(tmp_path, monkeypatch):
    path = make_run(tmp_path / "r")
    real = os.read

    def failing(descriptor: int, size: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("record.json"):
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, size)

    monkeypatch.setattr(os, "read", failing)
    with pytest.raises(DiskError, match=r"record.json: cannot be read: Input/output error"):
        _ = Run(path)["a"].record


@pytest.mark.parametrize("left", ["", "task_file.jsonl"])
def test_a_start_that_was_killed_before_run_json_is_begun_again(tmp_path, left):
    path = tmp_path / "r"
    (path / "tasks").mkdir(parents=True)
    (path / ".lock").touch()
    if left:
        (path / left).write_text("half")
    prepare(path)
    with pytest.raises(RunDirectoryError, match=r"probe run TASKS --out"):
        RunWriter.resume(path)
    with RunWriter.create(path, {}, {"task_file.jsonl": b"{}\n"}) as writer:
        writer.finish("done")
    assert verify(path).complete and (path / "task_file.jsonl").read_bytes() == b"{}\n"
    # The same name in a folder that is not ours is somebody's file.
    (tmp_path / "own").mkdir()
    (tmp_path / "own/task_file.jsonl").write_text("mine")
    with pytest.raises(RunDirectoryError, match="not empty"):
        prepare(tmp_path / "own")


def test_a_write_to_a_run_removes_what_killed_writes_left(tmp_path):
    path = make_run(tmp_path / "r")
    (path / f".tmp-measures.parquet-{'0' * 32}").write_bytes(b"half")
    Run(path).write_table("measures", measures())
    assert not list(path.glob(".tmp-*")) and verify(path).complete


def test_without_a_manifest_every_damage_to_a_task_is_named(tmp_path):
    path = make_run(tmp_path / "r", status=None)
    for name in all_files(task_dir(path)):
        data = name.read_bytes()
        for _, damaged in damages(data):
            name.write_bytes(damaged)
            # A wrong digit in checksums.json cannot be told from a wrong byte in the file: both are named.
            assert all(
                str(name.relative_to(path.joinpath("tasks")).parent) in line for line in verify(path).problems
            )
            assert any(name.name in line for line in verify(path).problems)
            try_to_read(path)
        name.unlink()
        assert complaints(path, name)[0].endswith(": missing")
        try_to_read(path)
        name.write_bytes(data)
    report = verify(path)
    assert report.problems == [] and not report.complete and "no manifest.json" in report.notes[0]


def test_a_truncated_tensor_is_an_error_and_not_a_bus_error(tmp_path):
    path = make_run(tmp_path / "r")
    name = task_dir(path) / "tensors.safetensors"
    data = name.read_bytes()
    task = next(task for task in Run(path) if task.path == name.parent)
    task.keys()  # the header is read; now the file shrinks
    for size in range(0, len(data), 16):
        name.write_bytes(data[:size])
        with pytest.raises(ArtifactCorrupt, match="tensors.safetensors: truncated"):
            task["keys"]
        with pytest.raises(ArtifactCorrupt, match="tensors.safetensors: (truncated|unreadable)"):
            Run(path)[task.id]["keys"]


@pytest.mark.parametrize("manifest", [True, False])
def test_what_does_not_belong_there_is_named(tmp_path, manifest):
    path = make_run(tmp_path / "r", status="done" if manifest else None)
    (path / "tasks/notes.txt").write_text("x")
    (path / "stray.bin").write_text("x")
    (task_dir(path) / "more.json").write_text("x")
    (path / ".DS_Store").write_text("x")
    expected = {"tasks/notes.txt: extra", "stray.bin: extra", f"{place(task_dir(path))}/more.json: extra"}
    assert set(verify(path).problems) == expected


def test_a_task_directory_beside_the_manifest_is_extra(tmp_path):
    path, other = make_run(tmp_path / "r"), make_run(tmp_path / "s", ("c",))
    shutil.copytree(task_dir(other), path / place(task_dir(other)))
    problems = verify(path).problems
    assert len(problems) == 3 and all(problem.endswith(": extra") for problem in problems)
    with pytest.raises(ArtifactCorrupt, match="extra"):
        _ = Run(path).task_ids


@pytest.mark.parametrize("manifest", [True, False])
def test_a_missing_or_swapped_task_is_found(tmp_path, manifest):
    path = make_run(tmp_path / "r", status="done" if manifest else None)
    first, second = task_dir(path, 0), task_dir(path, 1)
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    problems = verify(path).problems
    assert {problem.split(":")[0].split("/")[2] for problem in problems} == {first.name, second.name}
    with pytest.raises(ArtifactCorrupt, match="its checksum is not" if manifest else "belongs in"):
        _ = Run(path)["a"].record
    shutil.rmtree(first)
    problems = verify(path).problems
    assert (f"{place(first)}: missing" in problems) == manifest


@pytest.mark.parametrize("what", ["record.json", "tensors.safetensors", "checksums.json", "", "..", "../.."])
def test_links_inside_a_run_are_not_followed(tmp_path, what):
    path = make_run(tmp_path / "r")
    target = Path(os.path.normpath(task_dir(path) / what))
    moved = tmp_path / "moved"
    target.rename(moved)
    target.symlink_to(moved)
    report = verify(path)
    assert report.problems and all("symbolic link" in problem for problem in report.problems)
    with pytest.raises(ArtifactCorrupt, match="symbolic link"):
        RunWriter.resume(path)
    if what != "checksums.json":  # which reading does not need
        with pytest.raises(ArtifactCorrupt, match="symbolic link"):
            read_everything(path)


def test_a_pipe_in_the_place_of_a_file_does_not_hang_the_reader(tmp_path):
    path = make_run(tmp_path / "r")
    name = task_dir(path) / "record.json"
    name.unlink()
    os.mkfifo(name)
    assert verify(path).problems == [f"{place(name.parent)}/record.json: unreadable (not a regular file)"]
    with pytest.raises(ArtifactCorrupt, match="not a regular file"):
        read_everything(path)


def test_a_run_is_found_through_a_link_to_it(tmp_path):
    make_run(tmp_path / "r", status="interrupted")
    (tmp_path / "latest").symlink_to("r")
    with RunWriter.resume(tmp_path / "latest") as writer:
        writer.finish("done")
    read_everything(tmp_path / "latest")
    assert verify(tmp_path / "latest").complete


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"id": NaN}', "[1]", "\ufeff{}", '{"id": "a"}', '{"id": 1, "status": "ok"}']
)
def test_a_record_that_is_no_record_is_named(tmp_path, text):
    path = make_run(tmp_path / "r", ("a",))
    (task_dir(path) / "record.json").write_text(text)
    with pytest.raises(ArtifactCorrupt, match="record.json"):
        read_everything(path)


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"x": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        {"x": [], "__metadata__": {"axes": "{}"}},
        {
            "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "__metadata__": {"axes": '{"x": ["a", "b"]}'},
        },
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {"axes": 3}},
    ],
)
def test_a_hostile_tensor_header_is_named(tmp_path, header):
    path = make_run(tmp_path / "r", ("a",))
    text = json.dumps({"__metadata__": {"axes": '{"x": ["a"]}'}} | header).encode()
    (task_dir(path) / "tensors.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ArtifactCorrupt, match="tensors.safetensors"):
        read_everything(path)


def test_a_manifest_cannot_point_out_of_the_run(tmp_path):
    from probe.runs.files import encode_signed as encode_manifest

    path = make_run(tmp_path / "r")
    manifest = Run(path).manifest
    for name in ("../secret", "/etc/passwd", "tasks/../../secret", "tasks/01/0123456789abcdef/../x", ""):
        entry = {"path": name, "bytes": 1, "blake3": "0"}
        (path / "manifest.json").write_bytes(encode_manifest(manifest | {"files": [entry]}))
        assert any(problem.startswith("manifest.json: altered") for problem in verify(path).problems)


# Lists


def test_list_runs_tells_what_there_is_and_survives_broken_runs(tmp_path):
    make_run(tmp_path / "whole", ("a", "b", "c"))
    make_run(tmp_path / "part", ("a", "b"), None)
    make_run(tmp_path / "bad")
    (tmp_path / "bad/run.json").write_text("{")
    make_run(tmp_path / "gone")
    (tmp_path / "gone/run.json").unlink()
    (tmp_path / "no-run").mkdir()
    (tmp_path / "file").touch()
    rows = {Path(row["path"]).name: row for row in list_runs(tmp_path)}
    assert set(rows) == {"whole", "part", "bad", "gone"}
    whole = rows["whole"]
    assert (whole["status"], whole["model"], whole["tasks_done"], whole["tasks_total"]) == (
        "done",
        "tiny",
        3,
        3,
    )
    on_disk = sum(name.stat().st_size for name in (tmp_path / "whole").rglob("*") if name.is_file())
    assert whole["bytes"] == on_disk and whole["problem"] is None and whole["created"].endswith("Z")
    assert rows["part"]["status"] == "started" and rows["part"]["active"] is False
    assert rows["bad"]["status"] == "broken" and "run.json: unreadable" in rows["bad"]["problem"]
    assert "run.json: missing" in rows["gone"]["problem"]
    assert list_runs(tmp_path / "nowhere") == []
    with pytest.raises(RunDirectoryError):
        list_runs(tmp_path / "file")


def test_listing_verifying_and_reading_records_loads_neither_torch_nor_tables(tmp_path):
    make_run(tmp_path / "runs/r")
    script = """
import sys
from probe.runs import Run, list_runs, verify
assert len(list_runs(sys.argv[1])) == 1 and verify(sys.argv[1] + "/r").complete
run = Run(sys.argv[1] + "/r")
assert run["a"].record and run["a"].keys() and run["a"].labels() and run.manifest
heavy = {"torch", "pyarrow", "pandas", "numpy", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    with child(script, str(tmp_path / "runs")) as process:
        assert process.wait() == 0


# Measures and export


def test_measures_keep_their_types_and_their_nulls(tmp_path):
    import pandas as pd

    run = Run(make_run(tmp_path / "r"))
    with pytest.raises(RunDirectoryError, match="probe analyze"):
        run.measures()
    run.write_table("measures", measures(3))
    assert verify(run.path).complete and run.measures(arrow=True).equals(measures(3))
    frame = run.measures()
    assert list(frame) == list(MEASURE_FIELDS) and list(frame.value) == [0.0, 1.0, 2.0]
    assert frame.layer.dtype == pd.Int32Dtype() and frame[["head", "tool"]].isna().to_numpy().all()
    run.write_table("measures", measures(1))
    assert len(run.measures()) == 1 and verify(run.path).problems == []


def test_measures_of_another_shape_are_refused(tmp_path):
    import pyarrow as pa

    run = Run(make_run(tmp_path / "r"))
    table = measures()
    nothing = pa.nulls(len(table), pa.string())
    for wrong in (
        table.drop_columns(["span"]),
        table.append_column("heads", nothing),
        table.set_column(table.column_names.index("unit"), "unit", nothing),
        table.set_column(table.column_names.index("n"), "n", pa.array(["x", "y"])),
    ):
        with pytest.raises(ValueError, match="measures"):
            run.write_table("measures", wrong)
    run.write_table("measures", table.select(table.column_names[::-1]))
    assert run.measures(arrow=True).column_names == list(MEASURE_FIELDS)


def test_an_incomplete_run_can_be_analyzed_too(tmp_path):
    run = Run(make_run(tmp_path / "r", status=None))
    run.write_table("measures", measures())
    run.replace_report("x")
    assert verify(run.path).problems == [] and not (run.path / "manifest.json").exists()
    with RunWriter.resume(run.path) as writer:
        writer.finish("done")
    assert verify(run.path).complete and "report.html" in {file["path"] for file in run.manifest["files"]}


def analyzed(tmp_path: Path) -> Run:
    with RunWriter.create(tmp_path / "r", {"task_ids": ["a", "p"]}) as writer:
        more = {"completion": "=1+1\n", "score": 1.0, "target": ["x", "y"], "n_prompt": 4, "chosen": "x"}
        writer.commit(record("a", **more), {}, {})
        passages = {"base": {"completion": "plain", "n_new": 2}, "v": {"completion": "other"}}
        writer.commit({"id": "p", "kind": "prompting", "status": "ok", "passages": passages}, {}, {})
        writer.finish("done")
    run = Run(tmp_path / "r")
    run.write_table("measures", measures())
    return run


def test_export_writes_both_tables_into_a_directory(tmp_path):
    import csv

    import pyarrow.parquet as pq

    run = analyzed(tmp_path)
    for format in ("parquet", "jsonl", "csv"):
        written = export(run, format, tmp_path / "out")
        assert [path.name for path in written] == [f"measures.{format}", f"tasks.{format}"]
    rows = [json.loads(line) for line in (tmp_path / "out/tasks.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["a", "p"]
    assert (
        rows[0]["target"] == '["x", "y"]' and rows[0]["completion"] == "=1+1\n" and rows[0]["n_new"] is None
    )
    assert rows[1]["completion"] == "plain" and rows[1]["n_new"] == 2 and rows[1]["score"] is None
    assert pq.read_table(tmp_path / "out/tasks.parquet").to_pylist() == rows
    assert pq.read_table(tmp_path / "out/measures.parquet").equals(measures())
    with open(tmp_path / "out/tasks.csv", newline="") as file:
        cells = list(csv.DictReader(file))
    assert cells[0]["completion"] == "'=1+1\n" and cells[1]["score"] == "" and cells[0]["n_prompt"] == "4"


def test_a_spreadsheet_runs_no_cell(tmp_path):
    from probe.runs.export import _cell

    assert [_cell(text) for text in ("=a", "+a", "-a", "@a", "\ta", "a=", "")] == [
        "'=a",
        "'+a",
        "'-a",
        "'@a",
        "'\ta",
        "a=",
        "",
    ]
    assert _cell(-1.5) == -1.5 and _cell(None) is None


def test_a_bare_carriage_return_splits_no_row(tmp_path):
    import csv
    import io

    name = "a\r=1+cmd|x!A1"
    path = make_run(tmp_path / "r", (name, "b"))
    (written,) = export(Run(path), "csv", tmp_path / "out")
    text = written.read_bytes().decode()
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert [row[0] for row in rows] == ["id", "b", name] or [row[0] for row in rows] == ["id", name, "b"]
    import pandas as pd

    assert set(pd.read_csv(written, lineterminator=None)["id"]) == {name, "b"}


def test_export_to_a_file_writes_the_measures(tmp_path):
    import pyarrow.parquet as pq

    run = analyzed(tmp_path)
    assert export(run, "parquet", tmp_path / "m.parquet") == [tmp_path / "m.parquet"]
    assert pq.read_table(tmp_path / "m.parquet").equals(measures())
    with pytest.raises(UsageError, match="does not fit"):
        export(run, "csv", tmp_path / "m.parquet")
    with pytest.raises(UsageError, match="unknown format"):
        export(run, "xml", tmp_path / "m.xml")
    with pytest.raises(UsageError, match="is a file"):
        (tmp_path / "plain").touch()
        export(run, "csv", tmp_path / "plain")
    plain = Run(make_run(tmp_path / "plain-run"))
    with pytest.raises(RunDirectoryError, match="probe analyze"):
        export(plain, "csv", tmp_path / "m.csv")
    assert [path.name for path in export(plain, "csv", tmp_path / "out")] == ["tasks.csv"]


def test_a_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    run, target = analyzed(tmp_path), tmp_path / "m.csv"
    target.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "")))
    with pytest.raises(DiskError, match="m.csv"):
        export(run, "csv", target)
    assert target.read_text() == "old" and sorted(path.name for path in tmp_path.iterdir()) == ["m.csv", "r"]


def test_a_full_disk_says_what_goes_on_with_a_run_that_has_ended_and_with_one_that_has_not(tmp_path):
    for ended, goes_on in (
        (False, "or give another --out.*`probe resume"),
        (True, "space; .* the same command goes on"),
    ):
        path = tmp_path / str(ended)
        with RunWriter.create(path, {}) as writer:
            if ended:
                writer.finish("done")
        with pytest.raises(DiskError, match=goes_on), disk_errors(path / "packs"):
            raise OSError(errno.ENOSPC, "")
