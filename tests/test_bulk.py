"""A tensor of all tasks as one array, and data sets of tasks and tokens."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

import probe
from probe.errors import ArtifactCorrupt, UsageError
from probe.runs import Run, bulk, pack_run
from probe.runs.datasets import write_tasks, write_tokens
from tests.golden import GOLDEN
from tests.test_store import make_run


@pytest.fixture(scope="module", params=["in folders", "packed"])
def run(request, tmp_path_factory) -> Run:
    path = Path(shutil.copytree(GOLDEN / "tiny-llama-states", tmp_path_factory.mktemp("bulk") / "r"))
    if request.param == "packed":
        pack_run(path)
    return probe.open(path)


def opened(path: str) -> Any:
    return datasets.load_from_disk(path)


def prefix(task) -> str:
    return "base/" if "base/rows" in task else ""


def test_a_tensor_of_all_tasks_is_what_each_task_has(run):
    for checked in (False, True):
        taken = run.tensor("resid_post", layer=1, checked=checked)
        assert taken.axes == ("task", "d_model") and taken.values.dtype == np.float32
        assert taken.ids == run.task_ids and list(taken.labels.index) == taken.ids
        for task, values in zip(run, taken.values, strict=True):
            rows, decisions = (task[f"{prefix(task)}{name}"].tolist() for name in ("rows", "decisions"))
            expected = task[f"{prefix(task)}resid_post"][1, rows.index(decisions[0])].numpy()
            assert np.array_equal(values, expected)
    every = run.tensor("resid_post")
    assert every.axes == ("task", "layer", "d_model") and np.array_equal(every.values[:, 1], taken.values)
    logits = run.tensor("logits")
    for task, values in zip(run, logits.values, strict=True):
        assert np.array_equal(values, task[f"{prefix(task)}logits"][0].numpy())
    means = run.tensor("resid_span_mean", layer=0, row=None, span="bos")
    assert means.values.shape == (len(run), taken.values.shape[1])
    reads = run.tensor("attn_to_spans", layer=0, span="bos")
    for task, values in zip(run, reads.values, strict=True):
        rows, decisions = (task[f"{prefix(task)}{name}"].tolist() for name in ("rows", "decisions"))
        column = task.labels("base" if prefix(task) else "main").index("bos")
        name = f"{prefix(task)}attn_to_spans"
        assert np.array_equal(values, task[name][0, :, rows.index(decisions[0]), column].numpy())


def test_states_that_differ_in_shape_or_are_not_there_are_refused_with_what_to_do(run):
    with pytest.raises(UsageError, match="the number of rows differs"):
        run.tensor("resid_post", layer=0, row=None)
    for where in ({"layer": 99}, {"span": "nobody"}, {"passage": "nowhere"}):
        with pytest.raises(UsageError, match="no task has"):
            run.tensor("attn_to_spans", **where)
    for name, where in (("resid_post", {"layer": 1, "span": "user"}), ("logits", {"layer": 99})):
        with pytest.raises(UsageError, match=f"and no {list(where)[-1]}"):
            run.tensor(name, **where)
    with pytest.raises(UsageError, match="give 'decision'"):
        run.tensor("resid_post", row="last")


def test_no_more_is_read_than_the_array_takes(run, monkeypatch):
    read = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: read.append(preadv(*args)) or read[-1])
    taken = run.tensor("resid_post", layer=1)
    seen = sum(read)
    small = sum(task[f"{prefix(task)}{name}"].nbytes for task in run for name in ("rows", "decisions"))
    assert seen == taken.values.nbytes + small


def test_a_large_number_of_pieces_is_read_as_one(run, monkeypatch):
    few = run.tensor("attn_to_spans", span="bos").values
    monkeypatch.setattr(bulk, "MOST_READS", 1)
    assert np.array_equal(run.tensor("attn_to_spans", span="bos").values, few)


@pytest.mark.parametrize("packed", [False, True])
def test_every_dtype_comes_as_a_number_and_a_truncated_file_is_named(tmp_path, packed):
    path = make_run(tmp_path / "r")
    expected = np.stack([task["keys"].float().numpy()[2] for task in Run(path)])
    if packed:
        pack_run(path)
    assert np.array_equal(Run(path).tensor("keys", layer=2).values, expected)
    assert Run(path).tensor("token_ids").values.tolist() == [list(range(7))] * 2
    victim = next(path.rglob("tensors.safetensors"))
    os.truncate(victim, victim.stat().st_size - 8)
    with pytest.raises(ArtifactCorrupt, match="tensors.safetensors"):
        Run(path).tensor("keys", layer=2)
        Run(path).tensor("token_ids")


def test_tasks_are_a_data_set(run, tmp_path):
    write_tasks(run, tmp_path / "plain", None)
    plain = opened(str(tmp_path / "plain"))
    assert plain["id"][:] == run.task_ids and set(plain["status"][:]) == {"ok"}
    write_tasks(run, tmp_path / "states", bulk.TensorChoice("resid_post", 1))
    rows = opened(str(tmp_path / "states")).with_format("numpy")
    assert np.array_equal(rows["resid_post"][:], run.tensor("resid_post", layer=1).values)
    with pytest.raises(probe.errors.RunDirectoryError, match="not empty"):
        write_tasks(run, tmp_path / "states", None)


def test_tokens_are_a_data_set_in_one_order_over_all_tasks(run, tmp_path):
    write_tokens(run, tmp_path / "a", 1, seed=3, shard_rows=7)
    tokens = opened(str(tmp_path / "a")).with_format("numpy")
    expected = {}
    for task in run:
        for name in (name for name in task if name.endswith("resid_post")):
            before = name.removesuffix("resid_post")
            for number, position in enumerate(task[f"{before}rows"].tolist()):
                key = (task.id, before.rstrip("/") or "main", position)
                expected[key] = (task[f"{before}token_ids"][position].item(), task[name][1, number].numpy())
    rows = list(
        zip(
            *(tokens[name][:] for name in ("task", "passage", "position", "token_id", "resid_post")),
            strict=True,
        )
    )
    assert len(rows) == len(expected) > 20
    for task, passage, position, token, state in rows:
        assert expected[str(task), str(passage), int(position)][0] == token
        assert np.array_equal(expected[str(task), str(passage), int(position)][1], state)
    order = [str(row[0]) for row in rows]
    assert order != sorted(order, key=run.task_ids.index), "shuffled"
    assert len(set(order[:7])) > 1, "a file is of several tasks"
    write_tokens(run, tmp_path / "b", 1, seed=3, shard_rows=10**6)
    again = opened(str(tmp_path / "b")).with_format("numpy")
    assert np.array_equal(again["resid_post"][:], tokens["resid_post"][:])
    write_tokens(run, tmp_path / "c", 1, seed=4)
    other = opened(str(tmp_path / "c")).with_format("numpy")
    assert not np.array_equal(other["resid_post"][:], tokens["resid_post"][:])
    with pytest.raises(UsageError, match="no task has"):
        write_tokens(run, tmp_path / "d", 99)
