"""What analyses, reports and checks of many tasks cost, in counts: tables, reads, comparisons and what is held."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from scipy.stats import multivariate_normal, sem, t

import probe
import probe.runs.pack as pack_module
from probe.analyzers import prompting
from probe.analyzers.prompting import manifold, pattern
from probe.analyzers.rows import Grid, Row, to_table
from probe.cli import main
from probe.errors import ArtifactCorrupt
from probe.maths.auroc import pair_wins
from probe.runs import Run, datasets, pack_run, read, unpack_run, verify
from probe.runs.datasets import write_tasks
from probe.runs.files import decode_json
from probe.runs.folder import TaskFolder
from probe.runs.manifest import check_record, check_record_bytes, listed_files
from probe.runs.records import PromptingRecord
from probe.runs.views import heads
from probe.runs.views.prompting import items_of


def _row(number: int) -> Row:
    return Row(task_id=f"t{number}", analyzer="tool", name="margin", value=number, unit="nats", n=1, low=0.0)


def _grid(number: int) -> Grid:
    values = np.array([[1.0, np.nan], [3.0, float(number)]])
    axes = [{"layer": [0, 4]}, {"tool": ["a", None], "span": [None, "no_tool"]}]
    return Grid(task_id=f"t{number}", analyzer="tool", name="log_prob", unit="nats", values=values, axes=axes)


def test_rows_of_a_thousand_tasks_become_one_table(monkeypatch):
    """A table of more than fifty columns for each grid took most of the time of an analysis."""
    tables, make = [], pa.table
    monkeypatch.setattr(pa, "table", lambda *args, **more: tables.append(1) or make(*args, **more))
    items = [item for number in range(1000) for item in (_row(number), _grid(number))]
    table = to_table(items)
    assert len(tables) == 1
    assert len(table) == 4000
    rows = table.slice(4 * 7, 4).to_pylist()
    given = [{key: value for key, value in row.items() if value is not None} for row in rows]
    common = {"task_id": "t7", "analyzer": "tool", "unit": "nats", "n": 1}
    assert given == [
        common | {"name": "margin", "value": 7.0, "low": 0.0},
        common | {"name": "log_prob", "value": 1.0, "layer": 0, "tool": "a"},
        common | {"name": "log_prob", "value": 3.0, "layer": 4, "tool": "a"},
        common | {"name": "log_prob", "value": 7.0, "layer": 4, "span": "no_tool"},
    ]
    with pytest.raises(ValueError, match="no axis colour"):
        to_table([Row(**{**_fields(_row(0)), "place": {"colour": 1}})])


def _fields(row: Row) -> dict:
    return {name: getattr(row, name) for name in row.__slots__}


# -- prompting -------------------------------------------------------------------------------------------------------


def _slow_dimension(states: np.ndarray) -> int:
    rows, d_model = states.shape
    totals = []
    for k in range(1, min(rows - 1, d_model)):
        total = 0.0
        for out in range(rows):
            _, s, v = np.linalg.svd(np.delete(states, out, axis=0), full_matrices=False)
            spectrum = s**2 / (rows - 1)
            noise = spectrum[k:].sum() / (d_model - k)
            covariance = (v[:k].T * (spectrum[:k] - noise)) @ v[:k] + noise * np.eye(d_model)
            total += multivariate_normal.logpdf(states[out], np.zeros(d_model), covariance)
        totals.append(total)
    return int(np.argmax(totals)) + 1


def _planted(rows: int, d_model: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    along = np.linalg.qr(rng.standard_normal((d_model, 3)))[0].T
    return rng.standard_normal((rows, 3)) @ along * 4 + 0.3 * rng.standard_normal((rows, d_model))


@pytest.mark.parametrize(("rows", "d_model"), [(12, 40), (20, 9), (32, 12)])
def test_the_dimension_of_a_subspace_is_that_of_a_loop_over_scipys_densities(rows, d_model):
    states = [_planted(rows, d_model, seed) for seed in range(3)]
    assert [manifold.dimension(of) for of in states] == [_slow_dimension(of) for of in states]


def test_more_states_than_features_have_a_dimension_below_the_features():
    """Once a noise of 0 by 0 directions was taken for the best."""
    assert manifold.dimension(_planted(200, 8, 0)) == 3
    assert manifold.dimension(np.repeat(_planted(4, 16, 0), 5, axis=0)) == 4


def test_a_subspace_of_many_tasks_is_fitted_as_often_as_that_of_fifty(monkeypatch):
    fits, svd = [], np.linalg.svd
    monkeypatch.setattr(
        np.linalg, "svd", lambda *args, **more: fits.append(len(args[0])) or svd(*args, **more)
    )

    def fitted(n: int) -> int:
        fits.clear()
        passage = SimpleNamespace(score=1.0)
        families = {
            family: [SimpleNamespace(id=f"{family}{k}", outcomes={"x": passage}) for k in range(n)]
            for family in "ab"
        }
        rows = np.concatenate([_planted(n, 8, 0), _planted(n, 8, 1)])
        ids = [item.id for members in families.values() for item in members]
        states = manifold._States({(name, "x"): row for name, row in zip(ids, rows, strict=True)})
        points = defaultdict(list)
        aligned = list(manifold._at_layer(states, families, "x", 0, points))  # pyright: ignore[reportArgumentType]
        assert max(row.n for row in aligned if row.name == "manifold_alignment") == 2 * n
        assert max(fits) <= manifold.SPANNING
        return len(fits)

    angles = 1
    assert fitted(50) == fitted(400) == 2 * (manifold.FITS + 1) + angles


def test_a_subspace_without_a_part_is_that_of_the_states_without_that_part():
    states = _planted(40, 20, 0)
    spanned = manifold._Spanned(states, [f"t{k}" for k in range(40)])
    part = spanned.part_of("t35")
    assert part == 3 == spanned.part_of("t3")
    without = manifold.basis(np.delete(states, [3, 35], axis=0), spanned.size)
    assert np.allclose(
        spanned.basis(spanned.size, part).T @ spanned.basis(spanned.size, part), without.T @ without
    )
    whole = manifold.basis(states, 5)
    assert np.allclose(spanned.basis(5).T @ spanned.basis(5), whole.T @ whole)


def test_the_states_of_random_subspaces_are_of_every_variant():
    keys = [(f"t{task}", variant) for task in range(manifold.POOL) for variant in "abcd"]
    states = manifold._States({key: np.array([ord(key[1])]) for key in keys})
    drawn = Counter(manifold._pool(states, keys, set())[:, 0].tolist())
    assert sum(drawn.values()) == manifold.POOL and min(drawn[ord(name)] for name in "abcd") > 200
    assert manifold._spread(9, 10).tolist() == [*range(9)]


def test_cosines_of_pairs_are_those_of_the_matrix_of_all_pairs():
    rng = np.random.default_rng(0)
    units = rng.standard_normal((30, 5)) + 1
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    family = rng.integers(3, size=30)
    matrix = units @ units.T
    alike = family[:, None] == family
    for (sums, counts), kept in zip(
        pattern.cosine_sums(units, family), (alike & ~np.eye(30, dtype=bool), ~alike), strict=True
    ):
        assert np.allclose(sums, np.where(kept, matrix, 0).sum(1)) and (counts == kept.sum(1)).all()
        value, interval = pattern.pair_mean(sums, counts)
        without = []
        for out in range(30):
            left = kept.copy()
            left[out] = left[:, out] = False
            without.append(matrix[left].mean())
        pseudo = 30 * value - 29 * np.array(without)
        low, high = t.interval(0.95, 29, pseudo.mean(), sem(pseudo))
        assert value == pytest.approx(matrix[kept].mean())
        assert interval == pytest.approx((low, high))


@pytest.fixture(scope="module")
def prompting_run(tmp_path_factory):
    variants = [{"name": name, "prefix": f"{name} "} for name in ("one", "two", "three")]
    common = {"kind": "prompting", "choices": [" a", " b"], "target": " a", "variants": variants}
    tasks = [
        {
            "id": f"p{k}",
            "input": f"say {k}",
            "metadata": {"family": "ab"[k % 2], "number": k, "mixed": [0, "x", None][k % 3]},
        }
        | common
        for k in range(12)
    ]
    path = tmp_path_factory.mktemp("prompting") / "run"
    return probe.run(tasks, model="random:tiny-llama", out=path, analyze=False)


def test_of_prompting_tasks_no_record_is_held(prompting_run):
    items = items_of(Run(prompting_run.path))
    gc.collect()
    held = [thing for thing in gc.get_objects() if type(thing) is PromptingRecord]
    assert len(items) == 12 and len(held) <= 1


def test_a_prompting_task_is_opened_a_fixed_number_of_times_however_many_variants_it_has(
    prompting_run, monkeypatch
):
    """Whole files are compared with their checksums when they are opened."""
    reads = Counter()
    read = TaskFolder.header.func
    spied = cached_property(lambda folder: reads.update([folder.path.name]) or read(folder))
    spied.__set_name__(TaskFolder, "header")
    monkeypatch.setattr(TaskFolder, "header", spied)
    assert list(prompting.measures(Run(prompting_run.path)))
    assert set(reads.values()) == {4}  # shifts, sums of shifts, their products, states


# -- verify ----------------------------------------------------------------------------------------------------------


def test_verify_opens_every_file_once_and_looks_at_every_folder_once(prompting_run, monkeypatch):
    opens, looks = Counter(), Counter()
    plain_open, lstat = os.open, os.lstat
    monkeypatch.setattr(
        os, "open", lambda path, *more, **how: opens.update([str(path)]) or plain_open(path, *more, **how)
    )
    monkeypatch.setattr(
        os, "lstat", lambda path, *more, **how: looks.update([str(path)]) or lstat(path, *more, **how)
    )
    report = verify(prompting_run.path)
    assert (report.problems, report.n_tasks) == ([], 12)
    inside = [str(path) for path in (prompting_run.path / "tasks").rglob("*") if path.is_file()]
    assert len(inside) == 36 and {opens[path] for path in inside} == {1}
    folders = {path.rpartition("/")[0] for path in inside}
    assert max(looks[folder] for folder in folders) <= 2  # once more when its names are listed


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.replace(b'"prompting"', b"NaN", 1),
        lambda data: data.replace(b'"seconds":', b'"seconds":0', 1),
        lambda data: data.replace(b"say", b"s\xffy", 1),
        lambda data: data.replace(b"say", b"s\ny", 1),
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data + b"{}",
        lambda data: b"[" + data.rstrip() + b"]",
        lambda data: data.replace(b'"status":"', b'"status":0,"state":"', 1),
        lambda data: data.replace(b'"id":"', b'"id":"z', 1),
        lambda data: b'{"id":' + b"[" * 100_000,
        lambda data: data.replace(b'{"id":', b'{"more":' + b"1" * 4301 + b',"id":', 1),
    ],
)
def test_a_record_is_refused_whether_it_is_read_or_looked_through(prompting_run, damage):
    """Of what is looked through no object is made: it may pass nothing that reading refuses."""
    path = next((prompting_run.path / "tasks").glob("*/*")) / "record.json"
    data, name = path.read_bytes(), path.parent.name
    record = check_record(path, decode_json(path, data), name)
    assert check_record_bytes(path, data, name) == (record["id"], record["status"])
    bad = damage(data)
    assert bad != data
    with pytest.raises(ArtifactCorrupt) as read:
        check_record(path, decode_json(path, bad), name)
    with pytest.raises(ArtifactCorrupt) as looked_through:
        check_record_bytes(path, bad, name)
    assert str(looked_through.value) == str(read.value)


# -- ls and show -----------------------------------------------------------------------------------------------------

NEEDLESS = {
    *(
        "attr",
        "http.client",
        "jinja2",
        "jsonlines",
        "numpy",
        "pyarrow",
        "rich",
        "ssl",
        "torch",
        "urllib.request",
    ),
    *("probe.harness.runner", "probe.prompts", "probe.tasks.kinds", "probe.tools.calls"),
}


def test_ls_and_show_of_a_task_import_little_and_list_no_folder_of_tasks(prompting_run):
    code = (
        "import os, sys\nfrom probe.cli import main\nlisted = []\nplain = os.listdir\n"
        "os.listdir = lambda path='.': listed.append(str(path)) or plain(path)\n"
        "main(['ls', sys.argv[1]], standalone_mode=False)\n"
        "main(['show', sys.argv[1] + '/run', 'p7', '--no-pager'], standalone_mode=False)\n"
        f"print('imported:', sorted({NEEDLESS!r} & set(sys.modules)))\n"
        "print('listed:', [path for path in listed if 'tasks' in path])"
    )
    command = [sys.executable, "-c", code, str(prompting_run.path.parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "12/12" in lines[1] and any(line.startswith("p7  prompting  ok") for line in lines)
    assert lines[-2:] == ["imported: []", "listed: []"]


def test_a_manifest_lists_nothing_outside_the_run_whatever_its_names_hold(tmp_path):
    good = ["run.json", "tasks/ab/ab00000000000000/record.json", "packs/0000000000000000/pack.json"]
    entry = {"bytes": 1, "blake3": ""}
    assert list(listed_files(tmp_path, {"files": [{"path": name} | entry for name in good]})) == good
    for bad in (
        "../run.json",
        "run.json\n",
        "a\nb",
        "/etc/passwd",
        "tasks/ab/../x",
        "",
        "tasks/ab/x/record.json",
    ):
        with pytest.raises(ArtifactCorrupt):
            listed_files(tmp_path, {"files": [{"path": name} | entry for name in (*good, bad)]})


# -- packs and exports -----------------------------------------------------------------------------------------------


@pytest.fixture
def copied_run(prompting_run, tmp_path):
    return Path(shutil.copytree(prompting_run.path, tmp_path / "run"))


def command(*words: object):
    return CliRunner().invoke(main, [str(word) for word in words])


def test_a_pack_of_an_earlier_version_names_tensors_in_the_column_site(copied_run, monkeypatch):
    before = Run(copied_run)["p3"]["base/logits"]
    write = pack_module._parquet

    def earlier(rows, schema, *more):
        names = ["site" if name == "tensor" else name for name in schema.names]
        fields = [field.with_name(name) for field, name in zip(schema, names, strict=True)]
        renamed = [{"site" if key == "tensor" else key: value for key, value in row.items()} for row in rows]
        return write(renamed, pa.schema(fields), *more)

    monkeypatch.setattr(pack_module, "_parquet", earlier)
    pack_run(copied_run)
    (index,) = copied_run.glob("packs/*/index.parquet")
    assert "site" in pq.read_schema(index).names
    assert verify(copied_run).problems == []
    assert torch.equal(Run(copied_run)["p3"]["base/logits"], before)
    unpack_run(copied_run)
    assert verify(copied_run).problems == []


def test_pack_reads_the_header_of_a_task_once_and_says_what_it_would_remove(
    copied_run, monkeypatch, tmp_path
):
    reads, read = Counter(), pack_module.read_header
    monkeypatch.setattr(pack_module, "read_header", lambda path: reads.update([str(path)]) or read(path))
    assert command("pack", copied_run).exit_code == 0
    assert len(reads) == 12 and set(reads.values()) == {1}
    shutil.copytree(copied_run / "packs", tmp_path / "packs")
    assert command("unpack", copied_run).exit_code == 0
    shutil.copytree(
        tmp_path / "packs", copied_run / "packs"
    )  # as a packing leaves it that was cut before its manifest
    document = json.loads(command("pack", copied_run, "--dry-run", "--json").stdout)
    assert (document["n_left"], document["n_tasks"]) == (1, 12)
    assert (
        "1 traces of an earlier one that was stopped would be removed"
        in command("pack", copied_run, "--dry-run").stdout
    )
    assert pack_run(copied_run).n_left == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--format", "csv", "--site", "z"], "--site: is for --format arrow and tokens"),
        (["--format", "csv", "--layer", 1], "--layer: is for --format arrow and tokens"),
        (["--format", "tokens", "--layer", 1, "--row", "-1"], "--row: is for --format arrow"),
        (["--format", "arrow", "--layer", 1, "--seed", 2], "--seed: is for --format tokens"),
        (["--format", "arrow", "--row", "-1"], "give --layer too"),
        (["--format", "arrow", "--layer", 1, "--shard-rows", 2], "--shard-rows: is for --format tokens"),
    ],
)
def test_an_option_that_an_export_does_not_take_is_refused(prompting_run, tmp_path, options, reason):
    done = command("export", prompting_run.path, "-o", tmp_path / "out", *options)
    assert done.exit_code == 2 and reason in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_arrow_export_has_the_metadata_of_the_tasks(prompting_run, tmp_path):
    write_tasks(Run(prompting_run.path), tmp_path / "out", None)
    (file,) = (tmp_path / "out").glob("*.arrow")
    table = pa.ipc.open_stream(file.read_bytes()).read_all()
    frame = Run(prompting_run.path).tasks()
    assert table["metadata.family"].to_pylist() == frame["metadata.family"].tolist() == [*"ab"] * 6
    assert table["metadata.number"].to_pylist() == [*range(12)]
    assert table["metadata.mixed"].to_pylist() == ["0", '"x"', None] * 4


def test_tasks_that_are_asked_for_by_id_take_one_look_through_the_manifest_and_not_one_each(
    prompting_run, monkeypatch
):
    looks, look = [], read.listed_in
    monkeypatch.setattr(read, "listed_in", lambda *args: looks.append(1) or look(*args))
    opened = Run(prompting_run.path)
    assert [opened[name].id for name in prompting_run.task_ids] == prompting_run.task_ids
    assert len(looks) == 1 < len(prompting_run.task_ids)


def test_numbers_of_which_a_float_would_lose_digits_are_exported_as_json(
    prompting_run, tmp_path, monkeypatch
):
    numbers = {"a": 2**53 + 1, "b": 0.5}
    monkeypatch.setattr(
        datasets, "metadata_of", lambda task: {"n": numbers[task.record["metadata"]["family"]], "m": 2**53}
    )
    write_tasks(Run(prompting_run.path), tmp_path / "out", None)
    (file,) = (tmp_path / "out").glob("*.arrow")
    table = pa.ipc.open_stream(file.read_bytes()).read_all()
    assert table["metadata.n"].to_pylist() == ["9007199254740993", "0.5"] * 6
    assert table["metadata.m"].to_pylist() == [2**53] * 12


def test_a_full_folder_of_temporary_files_is_named_and_not_the_output(prompting_run, tmp_path, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", "/a/folder")  # as TEMP has it
    done = command("export", prompting_run.path, "-o", tmp_path / "log.eval")
    assert done.exit_code == 7
    assert "/a/folder: cannot hold temporary files: No space left on device" in done.stderr
    assert "log.eval" not in done.stderr


# -- heads -----------------------------------------------------------------------------------------------------------


def test_permutations_of_targets_are_drawn_some_at_a_time_to_the_same_p(monkeypatch):
    rng = np.random.default_rng(0)
    n_tools = rng.integers(2, 6, size=40)
    task = np.repeat(np.arange(40), n_tools)
    slot = np.concatenate([np.arange(n) for n in n_tools])
    shown = heads._ListedTools(
        *([f"t{k}" for k in range(40)], [0], rng.random((len(task), 3)), task, slot),
        *(np.ones(len(task)), slot == 0, np.zeros(40, int)),
    )
    wins = pair_wins(shown.n_tools, shown.scores)
    whole = heads._permutation_test(shown, wins, 100)
    shapes, empty = [], np.empty
    monkeypatch.setattr(
        np, "empty", lambda shape, *more, **how: shapes.append(shape) or empty(shape, *more, **how)
    )
    monkeypatch.setattr(heads, "_DRAWN", 7 * len(task))
    parted = heads._permutation_test(shown, wins, 100)
    assert all(np.array_equal(first, second) for first, second in zip(whole, parted, strict=True))
    assert max(shape[0] for shape in shapes if isinstance(shape, tuple) and shape[1] == len(task)) == 7


def test_halves_of_many_strata_sort_them_once(monkeypatch):
    compared = []

    class Stratum(int):
        def __lt__(self, other):
            compared.append(1)
            return int(self) < int(other)

        __hash__ = int.__hash__

    def comparisons(n: int) -> int:
        compared.clear()
        heads.halves([f"t{k}" for k in range(n)], [Stratum(k % (n // 4)) for k in range(n)])
        return len(compared)

    assert comparisons(400) < 3 * comparisons(200)
