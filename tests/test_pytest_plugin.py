"""The fixtures that hold runs in somebody's own test suite, used in one."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

import probe
from probe.errors import RunDirectoryError
from probe.runs import verify
from probe.runs.diff import Tolerance
from probe.runs.write import copy_run
from tests.golden import GOLDEN

RUN, OTHER = GOLDEN / "tiny-llama-states", GOLDEN / "tiny-gemma-states"
SUITE = f"""
def test_the_model_is_the_same(assert_same_run):
    assert_same_run({str(RUN)!r}, "baseline")

def test_the_tool(assert_tool):
    assert_tool({str(RUN)!r}, "choose", CHOSEN)
    assert_tool({str(RUN)!r}, "choose", CHOSEN, at_least=0.1)
"""


def suite(place, *options: str) -> tuple[int, str]:
    chosen = probe.open(RUN)["choose"].record["chosen"]
    (place / "test_mine.py").write_text(f"CHOSEN = {chosen!r}\n{SUITE}")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
        "--rootdir",
        ".",
    ]
    done = subprocess.run([*command, *options], cwd=place, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_suite_makes_its_baseline_holds_it_and_names_where_it_parts(tmp_path):
    assert suite(tmp_path, "--probe-update")[0] == 0
    assert verify(tmp_path / "baseline").problems == []
    shutil.rmtree(tmp_path / "baseline")
    shutil.copytree(OTHER, tmp_path / "baseline")
    code, text = suite(tmp_path)
    assert code == 1 and "1 failed, 1 passed" in text
    assert "is not baseline" in text and "task 'choose': " in text


def test_a_tool_that_is_not_chosen_or_not_probable_fails_with_all_probabilities(assert_tool):
    record = probe.open(RUN)["choose"].record
    chosen = record["chosen"]
    other = next(e["tool"] for e in record["tool_probabilities"] if e["tool"] not in (chosen, None))
    assert_tool(RUN, "choose", other, at_least=0.0)
    for tool, at_least, words in (
        (other, None, f"{other} is not chosen: "),
        (chosen, 1.1, "is below 1.1: "),
        ("nothing", None, "nothing is no candidate: "),
    ):
        with pytest.raises(pytest.fail.Exception, match=words) as failure:
            assert_tool(RUN, "choose", tool, at_least=at_least)
        assert all(str(e["tool"] or "no tool") in str(failure.value) for e in record["tool_probabilities"])


def test_a_tolerance_may_be_given(assert_same_run):
    with pytest.raises(pytest.fail.Exception):
        assert_same_run(RUN, OTHER, Tolerance(1e-9, 1e-9, 1e-9))
    with pytest.raises(
        pytest.fail.Exception, match="there is no baseline nowhere: pytest --probe-update makes it"
    ):
        assert_same_run(RUN, "nowhere")
    assert_same_run(RUN, RUN, Tolerance(0, 0, 0))


def test_what_is_no_run_is_not_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("dear")
    with pytest.raises(RunDirectoryError, match="holds no run"):
        copy_run(RUN, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "dear"


def test_the_plugin_imports_nothing_heavy_before_a_fixture_is_asked_for():
    code = (
        "import sys, probe.cli.pytest_plugin\n"
        "assert not {'torch', 'transformers', 'pandas', 'pyarrow', 'numpy', 'probe.runs'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
