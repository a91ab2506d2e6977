"""A run at a URL is the run itself: every record, table and tensor, of parts of files where the server gives parts."""

from __future__ import annotations

import json
import re
import shutil
import threading
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import probe
from probe.cli import main
from probe.errors import ArtifactCorrupt, DiskError, RunDirectoryError, UsageError
from probe.runs import Array, Run, RunWriter
from tests.golden import GOLDEN

NAME = "tiny-llama-states"


class _Files(SimpleHTTPRequestHandler):
    """Files below a folder, by range where `ranges` says so; counts what it sends."""

    def do_GET(self) -> None:
        server: Any = self.server
        path = Path(self.translate_path(self.path))
        server.asked[path.name] += 1
        if self.path.startswith("/elsewhere/"):
            self.send_response(302)
            self.send_header("Location", f"file://{GOLDEN}/{NAME}/run.json")
            self.end_headers()
            return
        login = self.headers.get("Authorization") == f"Basic {b64encode(b'me:pass').decode()}"
        if self.path.startswith("/locked/") and not ("key=s3cret" in self.path and login):
            return self.send_error(403)
        path = Path(str(path).replace("/locked/", "/"))
        if not path.is_file():
            return self.send_error(404)
        data, headers = path.read_bytes(), {}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        whole = len(data)
        if match and server.ranges:
            start, end = int(match[1]), min(int(match[2]) + 1, whole)
            headers = {"Content-Range": f"bytes {start}-{end - 1}/{whole}"}
            data = data[start:end]
        self.send_response(206 if headers else 200)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        server.sent[path.name] += len(data)
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(folder: Path, ranges: bool = True) -> Iterator[Any]:
    class Files(ThreadingHTTPServer):
        daemon_threads = True
        sent: Counter[str] = Counter()
        asked: Counter[str] = Counter()

        @property
        def url(self) -> str:
            return f"http://127.0.0.1:{self.server_address[1]}"

    Files.ranges = ranges  # pyright: ignore[reportAttributeAccessIssue]
    with Files(("127.0.0.1", 0), lambda *given: _Files(*given, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("ranges", [True, False])
def test_every_record_and_tensor_is_that_of_the_directory(ranges):
    local = probe.open(GOLDEN / NAME)
    with serving(GOLDEN, ranges) as server:
        run = probe.open(f"{server.url}/{NAME}/")
        assert run.task_ids == local.task_ids and run.run == local.run
        for task in local:
            remote = run[task.id]
            assert remote.record == task.record
            assert list(remote) == list(task) and remote.metadata == task.metadata
            for name in task:
                assert remote[name].dtype == task[name].dtype
                assert torch.equal(remote[name], task[name])
        assert run.tasks().equals(local.tasks())


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A run of one task whose tensors are larger than what is asked for at once."""
    path = tmp_path_factory.mktemp("large") / "run"
    record = next(iter(probe.open(GOLDEN / NAME))).record
    states = torch.arange(4 * 100 * 500, dtype=torch.float32).reshape(4, 100, 500)
    arrays = {
        "states": Array(states, ("layer", "row", "d_model")),
        "half": Array(states.to(torch.bfloat16), ("layer", "row", "d_model")),
        "one": Array(torch.tensor(3), ()),
        "none": Array(torch.empty((0, 7)), ("row", "d_model")),
    }
    with RunWriter.create(path, {"model": {"name": "m"}, "task_ids": [record["id"]]}) as writer:
        writer.commit(record, arrays, {})
        writer.finish("done")
    return path


def test_of_one_tensor_its_bytes_are_sent_and_of_an_index_those_of_its_rows(large):
    (local,) = probe.open(large)
    with serving(large.parent) as server:
        (task,) = probe.open(f"{server.url}/run")
        for key in (2, -1, np.s_[1:3], np.s_[:, 5], np.s_[2, 5:7], np.s_[::2], np.s_[..., 3], np.s_[3:1]):
            assert torch.equal(task.slice("states")[key], local["states"][key]), key
        for name in ("one", "none", "half"):
            assert torch.equal(task[name], local[name])
        before = server.sent["tensors.safetensors"]
        task.slice("states")[2]
        assert server.sent["tensors.safetensors"] - before == 100 * 500 * 4
        task["half"]
        assert server.sent["tensors.safetensors"] - before == 100 * 500 * 4 + 4 * 100 * 500 * 2
        assert task.slice("states").get_shape() == [4, 100, 500]


def test_a_file_url_is_its_directory():
    assert isinstance(probe.open((GOLDEN / NAME).as_uri()).path, Path)
    assert probe.open((GOLDEN / NAME).as_uri() + "/").task_ids == probe.open(GOLDEN / NAME).task_ids
    with pytest.raises(UsageError, match="this machine alone"):
        probe.open("file://server/run")
    with pytest.raises(UsageError, match="ftp:// is not read"):
        probe.open("ftp://server/run")


def test_what_is_damaged_missing_unfinished_or_out_of_reach_says_what_to_do(tmp_path):
    shutil.copytree(GOLDEN / NAME, tmp_path / "run")
    shutil.copytree(GOLDEN / NAME, tmp_path / "begun")
    with RunWriter.create(tmp_path / "open", {"model": {"name": "m"}, "task_ids": ["a"]}):
        pass
    record = next((tmp_path / "run").glob("tasks/**/record.json"))
    record.write_bytes(record.read_bytes().replace(b'"ok"', b'"oK"'))
    with serving(tmp_path) as server:
        run = Run(f"{server.url}/run")
        with pytest.raises(ArtifactCorrupt, match=r"http://.*record.json: altered"):
            [task.record for task in run]
        with pytest.raises(RunDirectoryError, match="no run lies there"):
            Run(f"{server.url}/nothing")
        with pytest.raises(RunDirectoryError, match="has not ended"):
            Run(f"{server.url}/open")
        with pytest.raises(DiskError, match="copy the run here"):
            Run(f"{server.url}/locked/begun")
        with pytest.raises(DiskError, match="cannot be"):
            Run(f"{server.url}/elsewhere/run")
        with pytest.raises(UsageError, match="read alone"):
            run.replace_report("<html>")
        url = server.url
    with pytest.raises(DiskError, match=r"cannot be reached: .*check the address"):
        Run(f"{url}/run")


def test_a_query_goes_to_every_name_and_no_message_or_page_has_it(tmp_path):
    shutil.copytree(GOLDEN / NAME, tmp_path / "run")
    with serving(tmp_path) as server:
        address = server.url.replace("//", "//me:pass@") + "/locked/run?key=s3cret"
        run = Run(address)
        assert len([task.record for task in run]) == len(run)
        assert not re.search("s3cret|pass", f"{run!r} {run.path} {run.path / 'x'} {run._repr_html_()}")


def test_commands_that_only_read_take_a_url_and_the_others_refuse_it(tmp_path):
    call = CliRunner().invoke
    with serving(GOLDEN) as server:
        url = f"{server.url}/{NAME}"
        shown = json.loads(call(main, ["show", url, "--json"]).stdout)
        local = json.loads(call(main, ["show", str(GOLDEN / NAME), "--json"]).stdout)
        assert {**shown, "run": ""} == {**local, "run": "", "report": shown["report"]}
        assert call(main, ["report", url, "-o", str(tmp_path / "page.html")]).exit_code == 0
        assert url in (tmp_path / "page.html").read_text()
        assert call(main, ["export", url, "--format", "csv", "-o", str(tmp_path / "tables")]).exit_code == 0
        assert call(main, ["diff", str(GOLDEN / NAME), url]).exit_code == 0
        for command in (["report", url], ["analyze", url], ["verify", url]):
            refused = call(main, command)
            assert refused.exit_code == 2 and "read alone" in refused.stderr, command
        missing = call(main, ["show", f"{server.url}/nothing"])
        assert missing.exit_code == 4
