"""Packs: tasks sealed together read, verify, resume and come apart as if each lay in its own folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

import probe.runs.pack as pack_module
from probe.cli import main
from probe.errors import ArtifactCorrupt, DiskError, RunDirectoryError
from probe.runs import Array, Run, RunWriter, diff, list_runs, pack_run, remove_run, unpack_run, verify
from probe.runs.files import encode_signed, entry_of
from probe.runs.publish import pull, push
from tests import test_store
from tests.golden import GOLDEN
from tests.test_publish import hub
from tests.test_store import (
    arrays,
    counting,
    flatten,
    make_run,
    measures,
    memory_path,
    read_everything,
    record,
)

assert memory_path and hub  # fixtures

IDS = ("a", "b", "c/d", "é", "e")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "r", IDS)


def files_of(path: Path) -> dict[str, bytes]:
    """Every file of a run, but for what says when it was written."""
    files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return {name: data for name, data in files.items() if name not in (".lock", "manifest.json")}


def contents(path: Path) -> dict[str, Any]:
    """What a reader has of a run."""
    return {
        task.id: (
            task.record,
            task.metadata,
            {name: (task.axes(name), task.dtype(name), task[name].tolist()) for name in task},
        )
        for task in Run(path)
    }


def test_a_packed_run_reads_as_before_and_holds_five_files_a_pack(run):
    before, manifest = contents(run), Run(run).manifest
    done = pack_run(run)
    assert (done.n_tasks, done.n_packs, done.n_files) == (5, 1, 15)
    assert contents(run) == before and Run(run).task_ids == list(IDS)
    assert len([name for name in files_of(run) if name.startswith("packs/")]) == 5
    assert not list((run / "tasks").iterdir())
    report, after = verify(run), Run(run).manifest
    assert report.complete and report.problems == [] and report.notes == []
    assert (report.n_tasks, report.counts) == (5, {"ok": 5})
    assert {key: after[key] for key in ("n_tasks", "counts", "complete", "status")} == {
        key: manifest[key] for key in ("n_tasks", "counts", "complete", "status")
    }
    assert after["tasks"] == {} and list(after["packs"].values()) == [5] and len(after["files"]) == 6
    [row] = list_runs(run.parent)
    assert (row["tasks_done"], row["tasks_total"], row["problem"]) == (5, 5, None)
    assert pack_run(run).n_packs == 0, "there is nothing more to pack"


def test_a_part_of_a_packed_tensor_is_that_part(run):
    whole = {task.id: task["keys"] for task in Run(run)}
    pack_run(run)
    for task in Run(run):
        assert torch.equal(task.slice("keys")[1], whole[task.id][1])
        assert torch.equal(task.slice("keys")[:, :, 2:4, :], whole[task.id][:, :, 2:4, :])
        assert task.slice("keys")[0].dtype == torch.bfloat16


def test_the_files_of_a_pack_are_what_other_programs_read(run):
    before = {task.id: task["resid_post"] for task in Run(run)}
    pack_run(run)
    (folder,) = (run / "packs").iterdir()
    tensors = safetensors.torch.load_file(folder / "tensors.safetensors")
    index, table = pd.read_parquet(folder / "index.parquet"), pd.read_parquet(folder / "tasks.parquet")
    assert len(tensors) == len(index) == 15 and set(index["pack"]) == {folder.name}
    data = (folder / "tensors.safetensors").read_bytes()
    for row in index.to_dict("records"):
        key = table.set_index("task")["hash"][row["task"]] + "/" + row["tensor"]
        kept = tensors[key].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert data[row["offset"] : row["offset"] + row["bytes"]] == kept
        if row["tensor"] == "resid_post":
            assert torch.equal(tensors[key], before[row["task"]])
    import pyarrow as pa

    lines = pa.CompressedInputStream(pa.OSFile(str(folder / "records.jsonl.zst")), "zstd").read().splitlines()
    assert [json.loads(line)["id"] for line in lines] == list(IDS)


def test_unpacking_gives_every_file_back_byte_for_byte(run):
    before, manifest = files_of(run), (run / "manifest.json").read_bytes()
    pack_run(run, 300)
    assert len(list((run / "packs").iterdir())) > 1
    done = unpack_run(run)
    assert done.n_tasks == 5 and files_of(run) == before and not (run / "packs").exists()
    assert (run / "manifest.json").read_bytes() == manifest


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir()))
def test_a_golden_run_of_an_earlier_layout_packs_without_a_difference(name, tmp_path):
    path = Path(shutil.copytree(GOLDEN / name, tmp_path / "r"))
    pack_run(path)
    assert diff(Run(GOLDEN / name), Run(path)) == [] and verify(path).problems == []


def test_frames_of_records_and_packs_are_cut_where_they_are_full(run, monkeypatch):
    before = contents(run)
    monkeypatch.setattr(pack_module, "FRAME_BYTES", 100)
    pack_run(run, pack_bytes=1)
    assert len(list((run / "packs").iterdir())) == 5 and contents(run) == before
    unpack_run(run)
    monkeypatch.setattr(pack_module, "PACK_TENSORS", 7)
    pack_run(run)
    assert len(list((run / "packs").iterdir())) == 3 and contents(run) == before
    assert verify(run).problems == []


def test_a_task_without_tensors_or_with_an_empty_one_is_packed(tmp_path):
    with RunWriter.create(tmp_path / "r", {"task_ids": ["a", "b"]}) as writer:
        writer.commit(record("a", status="error", error="x"), {}, {})
        empty = {"x": Array(torch.zeros(0, 3), ("row", "d_model")), "y": Array(torch.tensor(2.5), ())}
        writer.commit(record("b"), empty, {})
        writer.finish("failed")
    before = contents(tmp_path / "r")
    pack_run(tmp_path / "r")
    assert contents(tmp_path / "r") == before and verify(tmp_path / "r").counts == {"error": 1, "ok": 1}
    assert Run(tmp_path / "r")["b"].slice("x")[:1].shape == (0, 3)


@pytest.mark.parametrize("status", ["interrupted", None])
def test_a_packed_run_that_has_not_ended_is_resumed_and_then_is_half_packed(tmp_path, status):
    with RunWriter.create(tmp_path / "r", {"task_ids": list(IDS)}) as writer:
        for number, task_id in enumerate(IDS[:3]):
            writer.commit(record(task_id), arrays(number), {"labels": json.dumps(["bos", "user"])})
        if status:
            writer.finish(status)
    path = tmp_path / "r"
    pack_run(path)
    assert verify(path).problems == [] and Run(path).task_ids == list(IDS[:3])
    assert not Run(path).manifest["complete"] and Run(path).manifest["n_tasks"] == 3
    with RunWriter.resume(path) as writer:
        assert writer.committed == dict.fromkeys(IDS[:3], "ok")
        for number, task_id in enumerate(IDS[3:], 3):
            writer.commit(record(task_id), arrays(number), {"labels": json.dumps(["bos", "user"])})
        writer.finish("done")
    whole = make_run(tmp_path / "whole", IDS)
    assert verify(path).complete and verify(path).problems == [] and contents(path) == contents(whole)
    assert len(list((path / "tasks").glob("??/*"))) == 2
    Run(path).write_table("measures", measures())
    assert verify(path).complete and Run(path).has_measures
    pack_run(path)
    assert verify(path).complete and verify(path).problems == [] and contents(path) == contents(whole)
    assert len(list((path / "packs").iterdir())) == 2 and Run(path).has_measures


def test_a_run_of_both_layouts_is_packed_and_what_comes_back_lies_as_in_new_runs(tmp_path):
    path = flatten(make_run(tmp_path / "r", ("a", "b"), "interrupted"))
    before = contents(path)
    pack_run(path)
    assert contents(path) == before and verify(path).problems == []
    unpack_run(path)
    assert (
        contents(path) == before and verify(path).problems == [] and len(list(path.glob("tasks/??/*"))) == 2
    )


def test_the_commands_pack_and_unpack_say_what_they_did_and_every_command_reads_a_packed_run(tmp_path):
    path = Path(shutil.copytree(GOLDEN / "tiny-llama-states", tmp_path / "r"))
    invoke = CliRunner().invoke
    n = len(Run(path))

    def call(*arguments: object) -> str:
        result = invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    assert f"{n} tasks" in call("pack", path, "--dry-run") and not (path / "packs").exists()
    shown = json.loads(call("show", path, "--json"))
    document = json.loads(call("pack", path, "--pack-bytes", "2e9", "--json"))
    assert (document["n_tasks"], document["n_packs"], document["n_files"], document["dry_run"]) == (
        n,
        1,
        3 * n,
        False,
    )
    assert json.loads(call("show", path, "--json")) == shown
    assert json.loads(call("show", path, Run(path).task_ids[0], "--json"))["tensors"]
    call("verify", path)
    call("diff", GOLDEN / "tiny-llama-states", path)
    call("analyze", path, "--no-model")
    call("report", path)
    call("export", path, "--format", "csv", "-o", tmp_path / "out")
    call("export", path, "-o", tmp_path / "out.eval")
    assert json.loads(call("ls", tmp_path, "--json"))[0]["tasks_done"] == n
    assert f"{n} tasks" in (told := call("unpack", path))
    assert f"{3 * n} files in place of 5" in told
    call("verify", path)
    assert invoke(main, ["pack", str(tmp_path / "none")]).exit_code == 4
    call("pack", path)
    call("rm", "--yes", path)


def test_a_packed_run_is_pushed_and_pulled(hub, tmp_path):
    path = Path(shutil.copytree(GOLDEN / "tiny-llama-states", tmp_path / "r"))
    pack_run(path)
    push(Run(path), "me/run", api=hub)
    assert contents(pull("me/run", tmp_path / "copy", api=hub).path) == contents(path)


def test_a_dry_run_says_what_would_be_done_and_does_nothing(run):
    before = files_of(run)
    told, done = pack_run(run, 300, dry_run=True), None
    assert files_of(run) == before and not (run / "packs").exists()
    done = pack_run(run, 300)
    assert told == done and told.n_packs > 1
    before = files_of(run)
    told = unpack_run(run, dry_run=True)
    assert files_of(run) == before and told == unpack_run(run)


# Damage


@pytest.mark.parametrize(
    "name", ["tensors.safetensors", "records.jsonl.zst", "tasks.parquet", "index.parquet", "pack.json"]
)
@pytest.mark.parametrize("manifest", [True, False])
def test_every_damaged_file_of_a_pack_is_found_by_verify_and_by_reading(tmp_path, name, manifest):
    path = make_run(tmp_path / "r", IDS, "done" if manifest else None)
    pack_run(path)
    (folder,) = (path / "packs").iterdir()
    victim, place = folder / name, f"packs/{folder.name}/{name}"
    data = victim.read_bytes()
    for at in (0, len(data) // 2, len(data) - 3):
        victim.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert any(problem.startswith(f"{place}: ") for problem in verify(path).problems), at
        with pytest.raises(ArtifactCorrupt):
            RunWriter.resume(path)
    victim.write_bytes(data[:-8])
    with pytest.raises(ArtifactCorrupt, match=name):
        read_everything(path)
    victim.unlink()
    assert any(problem.startswith(f"{place}: missing") for problem in verify(path).problems)
    with pytest.raises(ArtifactCorrupt, match=name):
        read_everything(path)
    victim.write_bytes(data)
    assert verify(path).problems == []
    (folder / "more").write_bytes(b"x")
    assert verify(path).problems == [f"packs/{folder.name}/more: extra"]


def test_a_pack_that_names_a_task_twice_is_a_problem_for_verify_and_for_reading(run):
    pack_run(run)
    (folder,) = (run / "packs").iterdir()
    table = pq.read_table(folder / "tasks.parquet")
    _rewrite(folder, "tasks.parquet", pa.concat_tables([table, table.slice(0, 1)]))
    assert verify(run).problems == [f"packs/{folder.name}/tasks.parquet: altered (names a task twice)"]
    with pytest.raises(ArtifactCorrupt, match="names a task twice"):
        _ = Run(run)["é"]


def test_row_groups_of_an_index_that_readers_would_not_look_into_are_a_problem(run):
    pack_run(run)
    (folder,) = (run / "packs").iterdir()
    _rewrite(folder, "index.parquet", pq.read_table(folder / "index.parquet"), row_group_size=2)
    (problem,) = verify(run).problems
    assert problem.startswith(f"packs/{folder.name}/index.parquet: altered (row group 0 has 2 rows")


def _rewrite(folder: Path, name: str, table: pa.Table, **options: int) -> None:
    """Put another table into a pack of a run without a manifest, with the checksums of it."""
    pq.write_table(table, folder / name, **options)
    content = json.loads((folder / "pack.json").read_bytes())
    content["files"][name] = entry_of((folder / name).read_bytes())._asdict()
    (folder / "pack.json").write_bytes(encode_signed(content))
    (folder.parent.parent / "manifest.json").unlink()
    header = folder.parent.parent / "run.json"
    header.write_bytes(encode_signed(json.loads(header.read_bytes()) | {"status": "started"}))


def test_a_damaged_task_is_not_packed_and_nothing_is_removed(run):
    victim = Run(run)["é"].path / "tensors.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    before = files_of(run)
    with pytest.raises(ArtifactCorrupt, match=r"tensors.safetensors: altered"):
        pack_run(run)
    assert files_of(run) == before and not list((run / "packs").iterdir())


def test_a_strange_pack_beside_the_manifest_is_extra_and_a_lost_one_missing(run, tmp_path):
    pack_run(run)
    other = make_run(tmp_path / "s", ("x",))
    pack_run(other)
    (strange,) = (other / "packs").iterdir()
    shutil.copytree(strange, run / "packs" / strange.name)
    problems = verify(run).problems
    assert len(problems) == 5 and all(problem.endswith(": extra") for problem in problems)
    shutil.rmtree(run / "packs" / strange.name)
    shutil.rmtree(next((run / "packs").iterdir()))
    assert any("missing" in problem for problem in verify(run).problems)
    with pytest.raises(ArtifactCorrupt, match="missing"):
        _ = Run(run).task_ids


def test_what_writes_to_a_run_waits_for_the_packing_and_a_packed_run_is_removed_whole(run):
    with RunWriter.resume(run), pytest.raises(RunDirectoryError, match="busy"):
        pack_run(run)
    pack_run(run)
    assert remove_run(run) > 0 and not run.exists()


# Killed, or the disk fails


ALL_CALLS = (*test_store.CALLS, "pwrite", "rmdir")
CUTS = [
    pytest.param("pack", "done", "killed", ("rename", "replace", "fsync"), id="pack"),
    pytest.param("unpack", None, "killed", ("rename", "replace", "fsync"), id="unpack"),
    *(
        pytest.param(name, status, end, ALL_CALLS, id=f"{name}-{status}-{end}", marks=pytest.mark.slow)
        for name in ("pack", "unpack")
        for status in ("done", None)
        for end in ("killed", "fails")
    ),
]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(("name", "status", "end", "calls"), CUTS)
def test_cut_at_any_disk_call_nothing_is_lost_and_the_next_one_ends_it(
    memory_path, monkeypatch, name, status, end, calls
):
    """A process of its own is killed before each rename, write, fsync, unlink; or that call fails."""
    monkeypatch.setattr(test_store, "CALLS", calls)
    whole, path = memory_path / "whole", memory_path / "r"
    make_run(whole, ("a", "b"), status)
    if name == "unpack":
        pack_run(whole, 300)
    before, n_notes = contents(whole), len(verify(whole).notes)

    def act() -> None:
        pack_run(path, 300) if name == "pack" else unpack_run(path)

    shutil.copytree(whole, path)
    with monkeypatch.context() as patch:
        total = counting(patch, -1, lambda: None)
        act()
    shutil.rmtree(path)
    assert total[0] > 15
    for at in range(1, total[0] + 1):
        shutil.copytree(whole, path)
        _cut(act, at, end, monkeypatch)
        assert verify(path).problems == [], at
        assert contents(path) == before, at
        assert list_runs(memory_path)[0]["tasks_done"] == 2
        act()
        assert (
            verify(path).problems == [] and len(verify(path).notes) == n_notes and contents(path) == before
        ), at
        assert bool(list(path.glob("tasks/??/*"))) == (name == "unpack")
        shutil.rmtree(path)


def _cut(act: Callable[[], None], at: int, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut an act before its call number `at` that changes the disk."""
    if end == "fails":

        def fail() -> None:
            raise OSError(errno.ENOSPC, "No space")

        with monkeypatch.context() as patch, suppress(DiskError):
            counting(patch, at, fail)
            act()
        return
    pid = os.fork()
    if pid == 0:
        try:
            counting(monkeypatch, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
            act()
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
