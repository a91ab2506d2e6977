"""Damage to a finished run, and what every command that reads it makes of it: `python -m benchmarks.damages`.

A small run of every kind of task is made, with its experiments, measures and report. Each damage then alters one of its
files, every command runs on the damaged copy, and what it prints and writes is compared with what it gives of the whole
run. A command may refuse (exit code 5 or 7, with the path) or give the same as before; a changed number without a word and a
traceback are faults. Damage that is signed anew (all checksums right) may change numbers: nobody could tell it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import click
from click.testing import CliRunner

from probe.cli import main as probe_command
from probe.runs.files import encode_json, encode_signed, entry_of
from probe.runs.manifest import encode_checksums, listed_files, listing, read_checksums, read_manifest

TOOLS = [
    {
        "name": name,
        "description": text,
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
    }
    for name, text in (("calc", "Adds numbers."), ("search", "Finds pages."), ("clock", "Tells the time."))
]
TASKS = [
    *(
        {"id": f"tool-{n}", "kind": "tool_selection", "input": text, "tools": TOOLS, "target": target}
        for n, (text, target) in enumerate(
            [("What is 2 + 2?", "calc"), ("When is it?", "clock"), ("Hello!", None)]
        )
    ),
    {
        "id": "prompting",
        "kind": "prompting",
        "input": "hot ->",
        "variants": [{"name": "few", "examples": [{"input": "up ->", "output": " down"}]}],
        "choices": [" cold", " warm"],
        "target": " cold",
    },
    {"id": "cot", "kind": "cot", "question": "2 + 2?", "answer": 4, "steps": ["2 + 2 = 4.", "So four."]},
    {
        "id": "agent",
        "kind": "agent",
        "input": "What is 2 + 2?",
        "tools": TOOLS[:2],
        "target": "calc",
        "max_turns": 2,
    },
]
VALUES = [None, -1, 10**9, 1.5, 1e308, "", "x", True, [], {}, [None], ["x"], {"x": 1}, [[1]]]
REFUSED = (5, 7)
HARMLESS = ("refused", "same", "said", "signed")
"""Verdicts that are no fault."""
DAMAGED = "damaged"
"""Name of the copy that is damaged; commands run in the folder that holds it."""


@dataclass(frozen=True)
class Damage:
    """What is wrong with a run: files by name with their new bytes (None: gone), and whether all checksums fit them."""

    sentence: str
    files: dict[str, bytes | None]
    signed: bool = False

    def inflict(self, run: Path) -> None:
        for name, data in self.files.items():
            if data is None:
                (run / name).unlink()
            else:
                (run / name).write_bytes(data)


def make_run(folder: Path, model: Any = "random:tiny-llama") -> Path:
    """A finished run of every kind of task, with experiments, measures and report."""
    import probe

    tasks = folder / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(task) + "\n" for task in TASKS))
    run = probe.run(tasks, model=model, out=folder / "whole", max_new_tokens=4)
    probe.analyze(run.path, ["mask_all", "swap", "lens", "knockouts"])
    return run.path


def damages(run: Path, n: int, seed: int) -> Iterator[Damage]:
    """`n` damages to the run, each file in turn: bytes flipped, zeroed, cut, added, exchanged, values changed, files gone."""
    draw = random.Random(seed)
    names = sorted(
        str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and path.name[0] != "."
    )
    for number in range(n):
        name = names[number % len(names)]
        yield _damage(run, name, names, draw)


def _damage(run: Path, name: str, names: list[str], draw: random.Random) -> Damage:
    data = (run / name).read_bytes()
    at = draw.randrange(len(data))
    ways = ["flip", "zero", "cut", "empty", "append", "gone", "exchange"]
    ways += ["value", "value", "signed", "signed"] if name.endswith(".json") else []
    way = draw.choice(ways)
    if way == "flip":
        bit = draw.randrange(8)
        new = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        return Damage(f"{name}: bit {bit} of byte {at} flipped", {name: new})
    if way == "zero":
        return Damage(
            f"{name}: 512 bytes from {at} are zero",
            {name: data[:at] + bytes(len(data[at:][:512])) + data[at + 512 :]},
        )
    if way == "cut":
        return Damage(f"{name}: cut to {at} bytes", {name: data[:at]})
    if way == "empty":
        return Damage(f"{name}: empty", {name: b""})
    if way == "append":
        return Damage(f"{name}: a byte more", {name: data + b"\n"})
    if way == "exchange":
        alike = [
            other for other in names if Path(other).suffix == Path(name).suffix and other != name
        ] or names
        other = draw.choice(alike)
        return Damage(f"{name}: holds what {other} holds", {name: (run / other).read_bytes()})
    if way in ("value", "signed") and isinstance(document := json.loads(data), dict):
        changed, what = mutated(document, draw)
        if way == "value" or Path(name).name not in ("record.json", "run.json"):
            return Damage(f"{name}: {what}", {name: encode_json(changed)})
        return Damage(f"{name}: {what}, signed", signed_anew(run, name, changed), signed=True)
    return Damage(f"{name}: gone", {name: None})


def mutated(document: dict[str, Any], draw: random.Random) -> tuple[dict[str, Any], str]:
    """A document with one value deleted, repeated or of another type, at any depth; and what was done."""
    document = copy.deepcopy(document)
    every = list(_places(document))
    depth = draw.choice(sorted({len(place) for place in every}))
    *way, last = draw.choice([place for place in every if len(place) == depth])
    parent: Any = document
    for key in way:
        parent = parent[key]
    how = draw.randrange(6)
    before = parent[last]
    if how == 0:
        del parent[last]
        return document, f"{[*way, last]} is missing"
    if how == 1 and isinstance(parent, list):
        parent.append(before)
    elif how == 2 and isinstance(before, int | float):
        parent[last] = before + 1
    elif how == 2 and isinstance(before, str):
        parent[last] = before[::-1]
    else:
        parent[last] = draw.choice(VALUES)
    return document, f"{[*way, last]} → {parent[last]!r}"[:200]


def _places(value: object, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    parts: Any = ()
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value[:3])
    for key, part in parts:
        yield from _places(part, (*at, key))


def signed_anew(run: Path, name: str, document: dict[str, Any]) -> dict[str, bytes | None]:
    """The files that put a document into a run as somebody would who can write there: all checksums are right."""
    data = {name: encode_signed(document) if name == "run.json" else encode_json(document)}
    if name != "run.json":
        folder = Path(name).parent
        data[f"{folder}/checksums.json"] = encode_checksums(
            read_checksums(run / folder) | {"record.json": entry_of(data[name])}
        )
    manifest = read_manifest(run)
    assert manifest is not None
    files = listed_files(run, manifest) | {key: entry_of(value) for key, value in data.items()}
    data["manifest.json"] = encode_signed(manifest | {"files": listing(files)})
    return dict(data)


# -- commands --------------------------------------------------------------------------------------------------------

CHEAP = (
    ("show", DAMAGED),
    ("show", DAMAGED, "TASK", "--full"),
    ("ls", ".", "--scores", "--json"),
    ("verify", DAMAGED),
    ("diff", "whole", DAMAGED),
    ("diff", DAMAGED, "whole"),
    ("compare", "whole", DAMAGED),
    ("export", DAMAGED, "-o", "out"),
    ("export", DAMAGED, "-o", "out.csv"),
    ("distribution", DAMAGED, "--all"),
)
DEAR = (
    ("report", DAMAGED, "-o", "out.html"),
    ("figures", DAMAGED, "--format", "csv", "-o", "out"),
    ("analyze", DAMAGED, "--no-model"),
    ("resume", DAMAGED),
    ("open",),
)
"""Those that take a second or more."""


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit code, standard output and error, files, and an exception that escaped."""

    code: int
    stdout: str
    stderr: str
    written: dict[str, bytes]
    left: dict[str, bytes]
    """All files that are there afterwards."""
    escaped: str | None

    def tells(self, other: Outcome) -> bool:
        """Whether this says and writes what the other does; a file that it does not write is as it was."""
        names = self.written.keys() | other.written.keys()
        files = all(self.left.get(name) == other.left.get(name) for name in names)
        return files and (self.code, _told(self.stdout)) == (other.code, _told(other.stdout))


def outcome(folder: Path, command: tuple[str, ...], task: str) -> Outcome:
    """Run a command of probe in `folder`, where `damaged` and `whole` are; "open" reads everything from Python."""
    before, home = _contents(folder), Path.cwd()
    os.chdir(folder)
    try:
        if command == ("open",):
            result = _open(Path(DAMAGED))
        else:
            ran = CliRunner().invoke(probe_command, [task if part == "TASK" else part for part in command])
            broken = ran.exception is not None and not isinstance(ran.exception, SystemExit)
            result = ran.exit_code, ran.stdout, ran.stderr, repr(ran.exception) if broken else None
    finally:
        os.chdir(home)
    after = _contents(folder)
    written = {name: data for name, data in after.items() if before.get(name) != data and ".lock" not in name}
    return Outcome(result[0], result[1], result[2], written, after, result[3])


def _open(path: Path) -> tuple[int, str, str, str | None]:
    import probe
    from probe.errors import ProbeError
    from probe.runs.tables import TableName

    lines: list[str] = []
    try:
        run = probe.open(path)
        lines += [repr(run.run), repr(run.task_ids)]
        for task in run:
            lines.append(repr(task.record))
            lines += [f"{name} {task[name].double().sum().item()}" for name in task]
        for name in get_args(TableName):
            lines += [run.table(name).to_csv()] if name != "measures" or run.has_measures else []
    except ProbeError as error:
        return error.exit_code, "", str(error), None
    except Exception as error:  # what escapes is the finding
        return 1, "", "", repr(error)
    return 0, "\n".join(lines), "", None


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def verdict(damage: Damage, result: Outcome, whole: Outcome) -> str:
    """`refused`, `same`, `said` or, of a fault, `traceback`, `silent`, `no path` or `exit N`."""
    if result.escaped is not None or "Traceback" in result.stderr:
        return "traceback"
    if result.code in REFUSED:
        return "refused" if DAMAGED in result.stderr + result.stdout else "no path"
    if result.tells(whole):
        return "same"
    name = next(iter(damage.files))
    if any(name in text or "not verified" in text for text in (result.stdout, result.stderr)):
        return "said"
    if result.code not in (0, 1):
        return f"exit {result.code}" if DAMAGED in result.stderr else "no path"
    return "signed" if damage.signed else "silent"


def _told(text: str) -> str:
    """Standard output without the bytes that lie in a folder, which `ls` counts: those of a cut file are fewer."""
    return re.sub(r'"bytes": \d+', "", text)


def trial(
    folder: Path, damage: Damage, commands: Any, wholes: dict[Any, Outcome]
) -> Iterator[tuple[str, str, Outcome]]:
    """Each command on a fresh copy of the run in `folder` with the damage: its name, the verdict and what it did."""
    name = next(iter(damage.files))
    task = task_of(folder / "whole", name)
    for command in commands:
        restore(folder)
        whole = wholes.get((command, task))
        if whole is None:
            whole = wholes[command, task] = outcome(folder, command, task)
            restore(folder)
        damage.inflict(folder / DAMAGED)
        result = outcome(folder, command, task)
        yield command[0], verdict(damage, result, whole), result


def task_of(run: Path, name: str) -> str:
    """The task whose file `name` is, or the first that there is."""
    record = run / Path(name).parent / "record.json"
    if not record.exists():
        record = min(run.glob("tasks/*/*/record.json"))
    return json.loads(record.read_text())["id"]


def restore(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name.startswith("out"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(folder / DAMAGED, ignore_errors=True)
    shutil.copytree(folder / "whole", folder / DAMAGED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=500, help="Damages.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--every", type=int, default=8, help="One damage in so many is tried on the dear commands too."
    )
    parser.add_argument("--first", type=int, default=0, help="Leave out the damages before this one.")
    choices = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, wholes, counts = Path(place), {}, Counter()
        make_run(folder)
        for number, damage in enumerate(damages(folder / "whole", choices.n, choices.seed)):
            if number < choices.first:
                continue
            commands = CHEAP + (DEAR if number % choices.every == 0 else ())
            for command, what, result in trial(folder, damage, commands, wholes):
                counts[command, what] += 1
                if what not in HARMLESS:
                    line = re.sub(r"\s+", " ", result.escaped or result.stderr or result.stdout)[:300]
                    click.echo(f"{number}: {command}: {what}: {damage.sentence}: {line}")
        for (command, what), count in sorted(counts.items()):
            click.echo(f"{command:14} {what:10} {count}")


if __name__ == "__main__":
    main()
