"""What a run imports before its first task, and garbage collection around loading."""

from __future__ import annotations

import gc
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from probe.cli import console, main
from probe.errors import ModelUnavailable, UsageError
from probe.model import load, outline

TASK = {"id": "c", "kind": "cot", "question": "2 + 2?", "answer": 4, "steps": ["2 + 2 = 4.", "So four."]}
# What transformers itself imports where it is installed (scikit-learn, torchvision) is not probe's to avoid.
NEEDLESS = {"datasets", "gguf", "matplotlib", "pandas", "pyarrow", "rich", "transformer_lens", "wandb"}


@pytest.fixture
def tasks(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(TASK) + "\n")
    return path


@pytest.fixture(autouse=True)
def collecting():
    """Each test starts as an ordinary process does, and must leave it so."""
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    yield
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def run(tasks, out, *more: str):
    command = ["run", str(tasks), "--model", "random:tiny-llama", "--out", str(out), "--no-analyze", *more]
    return CliRunner().invoke(main, command)


def in_a_process_of_its_own(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_run_imports_nothing_for_analyses_reports_or_other_models(tasks, tmp_path):
    code = (
        "import sys\nfrom probe.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        f"print('imported:', *{NEEDLESS!r} & set(sys.modules))"
    )
    options = ("--model", "random:tiny-llama", "--no-analyze", "--out", tmp_path / "run")
    text = in_a_process_of_its_own(code, "run", tasks, *options).splitlines()
    assert text[-1] == "imported:"
    assert (tmp_path / "run" / "run.json").is_file()


def test_a_task_file_with_a_mistake_is_refused_before_torch_is_imported(tmp_path):
    (tmp_path / "tasks.jsonl").write_text("{")
    code = (
        "import sys\nfrom probe.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)"
    )
    assert in_a_process_of_its_own(code, "run", tmp_path / "tasks.jsonl").split() == ["3", "False"]


@pytest.mark.slow
def test_the_interpreter_ends_without_looking_through_everything_once_more(tasks, tmp_path):
    """Registered first, the function runs last of all at the end of the process."""
    code = (
        "import atexit, gc, sys\n"
        "atexit.register(lambda: print('frozen at the end:', gc.get_freeze_count() > 100_000))\n"
        "from probe.cli import main\nmain(sys.argv[1:])"
    )
    options = ("--model", "random:tiny-llama", "--no-analyze", "--out", tmp_path / "run")
    assert "frozen at the end: True" in in_a_process_of_its_own(code, "run", tasks, *options)


def test_garbage_is_collected_again_when_the_tasks_begin(tasks, tmp_path, monkeypatch):
    seen = {}

    class Watching(console.ProgressBar):
        def log(self, message):
            seen["while loading"] = gc.isenabled()
            super().log(message)

        def done(self, n_tokens, count=1):
            seen["at a task's end"] = gc.isenabled()
            super().done(n_tokens)

    monkeypatch.setattr(console, "ProgressBar", Watching)
    assert run(tasks, tmp_path / "run").exit_code == 0
    assert seen == {"while loading": False, "at a task's end": True}


def test_garbage_is_collected_again_for_the_analyses_of_a_resumed_run(tasks, tmp_path, monkeypatch):
    """Nothing is missing of the run, so no model is loaded and no task begins."""
    seen = []
    assert run(tasks, tmp_path / "run").exit_code == 0
    monkeypatch.setattr("probe.api.finish", lambda run, progress: progress.log("analyzing"))
    monkeypatch.setattr(console, "say", lambda message: seen.append((message, gc.isenabled())))
    assert CliRunner().invoke(main, ["resume", str(tmp_path / "run")]).exit_code == 0
    assert ("analyzing", True) in seen


def test_garbage_is_collected_again_after_a_run_that_could_not_begin(tasks, tmp_path):
    # The fixture looks once the run is over.
    assert run(tasks, tmp_path / "a", "--model", "random:no-such-shape").exit_code == 6
    assert run(tasks, tmp_path / "b", "--max-bytes", "1").exit_code == 2


@pytest.mark.parametrize("enabled", [True, False])
def test_loading_leaves_garbage_collection_as_it_was(enabled):
    (gc.enable if enabled else gc.disable)()
    try:
        load("random:tiny-llama")
        assert gc.isenabled() is enabled
        with pytest.raises(UsageError):
            load("random:tiny-llama", device="cuda:99")
        assert gc.isenabled() is enabled
        outline("random:tiny-llama")
        with pytest.raises(ModelUnavailable):
            outline("random:no-such-shape")
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
