"""Runs that leave and come back: a stand-in of the hub in a folder, whose calls must be ones that the real client takes."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

import probe
from probe.cli import main
from probe.errors import ArtifactCorrupt, DiskError, RunDirectoryError, UsageError
from probe.runs import Run, RunWriter, publish, verify
from probe.runs.files import encode_signed
from tests.golden import GOLDEN

REPOSITORY = "me/run"


class Hub:
    """A dataset repository in a folder; every call must fit the signature of `huggingface_hub.HfApi`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def __getattribute__(self, name: str) -> Any:
        part = object.__getattribute__(self, name)
        if not callable(part) or name.startswith("_"):
            return part

        def call(*args: Any, **given: Any) -> Any:
            bound = inspect.signature(getattr(HfApi, name)).bind(None, *args, **given)
            bound.arguments.pop("self")
            self.asked.append((name, dict(bound.arguments)))
            assert bound.arguments["repo_type"] == "dataset"
            return part(**bound.arguments)

        return call

    def create_repo(self, repo_id: str, **_: Any) -> None:
        assert repo_id == REPOSITORY
        self.folder.mkdir(exist_ok=True)

    def create_commit(self, repo_id: str, operations: Any, **_: Any) -> Any:
        for operation in operations:
            path = self.folder / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                path.write_bytes(file.read())
        return SimpleNamespace(oid="c0ffee")

    def repo_info(self, repo_id: str, **_: Any) -> Any:
        if repo_id != REPOSITORY:
            response: Any = httpx.Response(404, request=httpx.Request("GET", "http://x"))
            raise RepositoryNotFoundError("none", response=response)
        return SimpleNamespace(sha="c0ffee")

    def hf_hub_download(self, repo_id: str, filename: str, local_dir: str, revision: str, **_: Any) -> None:
        assert revision == "c0ffee"
        if not (self.folder / filename).exists():
            raise EntryNotFoundError(f"no {filename}")
        shutil.copy(self.folder / filename, Path(local_dir) / filename)
        (Path(local_dir) / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)

    def snapshot_download(
        self, repo_id: str, allow_patterns: list[str], local_dir: str, revision: str, **_: Any
    ) -> None:
        assert revision == "c0ffee"
        for name in allow_patterns:
            if (self.folder / name).exists():
                (Path(local_dir) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.folder / name, Path(local_dir) / name)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(publish, "_api", lambda api: hub)
    return hub


def files(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name != ".lock"
    }


@pytest.fixture
def pushed(hub) -> Hub:
    publish.push(Run(GOLDEN / "tiny-llama-memory"), REPOSITORY)
    return hub


def test_a_run_comes_back_byte_for_byte_from_a_private_repository(pushed, tmp_path):
    golden = GOLDEN / "tiny-llama-memory"
    assert dict(pushed.asked)["create_repo"]["private"] is True
    (pushed.folder / "stranger.py").write_text("not the run's")
    run = publish.pull(REPOSITORY, tmp_path / "copy")
    assert files(run.path) == files(golden)
    (tmp_path / "empty").mkdir()
    assert files(publish.pull(REPOSITORY, tmp_path / "empty").path) == files(golden)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "empty", "hub"]
    with pytest.raises(RunDirectoryError, match="holds a run already"):
        publish.pull(REPOSITORY, run.path)


def test_an_altered_a_missing_and_a_straying_file_are_refused_and_nothing_appears(pushed, tmp_path):
    manifest = (pushed.folder / "manifest.json").read_bytes()
    victim = next((pushed.folder / "tasks").rglob("record.json"))
    data = victim.read_bytes()
    victim.write_bytes(data.replace(b'"status":"ok"', b'"status":"no"'))
    with pytest.raises(ArtifactCorrupt, match="altered"):
        publish.pull(REPOSITORY, tmp_path / "copy")
    victim.unlink()
    with pytest.raises(ArtifactCorrupt, match="missing"):
        publish.pull(REPOSITORY, tmp_path / "copy")
    victim.write_bytes(data)
    for name in ("../evil.json", "/etc/evil", "tasks/../../evil", ".hidden"):
        changed = json.loads(manifest)
        changed["files"].append({"path": name, "bytes": 1, "blake3": "0" * 64})
        (pushed.folder / "manifest.json").write_bytes(encode_signed(changed))
        with pytest.raises(ArtifactCorrupt, match="lists"):
            publish.pull(REPOSITORY, tmp_path / "copy")
    (pushed.folder / "manifest.json").unlink()
    with pytest.raises(UsageError, match="holds no run"):
        publish.pull(REPOSITORY, tmp_path / "copy")
    with pytest.raises(UsageError, match="no such dataset repository"):
        publish.pull("me/other", tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_what_is_damaged_or_has_not_ended_is_not_pushed(hub, tmp_path):
    damaged = Path(shutil.copytree(GOLDEN / "tiny-llama-memory", tmp_path / "damaged"))
    run = Run(damaged)
    next((damaged / "tasks").rglob("record.json")).write_text("{}")
    with pytest.raises(ArtifactCorrupt, match="is damaged"):
        publish.push(run, REPOSITORY)
    with RunWriter.create(tmp_path / "begun", {"model": {"name": "m"}, "task_ids": ["t"], "options": {}}):
        with pytest.raises(RunDirectoryError, match="has not ended"):
            publish.push(Run(tmp_path / "begun"), REPOSITORY)
    assert hub.asked == []


def test_the_card_says_what_ran_and_no_name_breaks_out_of_it(hub, tmp_path):
    name = "m|`</code><script>alert(1)</script>\n---\n# x"
    with RunWriter.create(
        tmp_path / "run", {"model": {"name": name}, "task_ids": [], "options": {}}
    ) as writer:
        writer.finish("done")
    text = publish.card(Run(tmp_path / "run"), REPOSITORY)
    (row,) = [line for line in text.splitlines() if "alert" in line]
    assert row == "| `model` | `m </code><script>alert(1)</script> --- # x` |"
    assert text.count("\n---\n") == 1 and f"probe pull {REPOSITORY}" in text


def test_a_hub_that_cannot_be_reached_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(DiskError, match="cannot be used"):
        publish.pull(REPOSITORY, tmp_path / "copy", api=HfApi(endpoint="http://127.0.0.1:9"))
    with pytest.raises(UsageError, match="is no name of a repository"):
        publish.pull("a/b/c", tmp_path / "copy", api=HfApi(endpoint="http://127.0.0.1:9"))
    assert list(tmp_path.iterdir()) == []


def test_the_commands_push_and_pull(hub, tmp_path):
    def invoke(*args: Any) -> Any:
        result = CliRunner().invoke(main, [*map(str, args), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    assert invoke("push", GOLDEN / "tiny-llama-memory", REPOSITORY, "--public")["commit"] == "c0ffee"
    assert dict(hub.asked)["create_repo"]["private"] is False
    document = invoke("pull", REPOSITORY, "--out", tmp_path / "copy")
    assert verify(Path(document["run"])).complete and document["tasks"] == len(probe.open(tmp_path / "copy"))
