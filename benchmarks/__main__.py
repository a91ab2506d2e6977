"""`python -m benchmarks`: run the sections, print the table, write it to benchmarks/results/."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import click

from benchmarks import machine, table
from benchmarks.table import Section

SECTIONS = ("generation", "roofline", "nnsight", "candidates", "prefix", "reasoning", "memory")
RESULTS = Path(__file__).parent / "results"
_AT_LEAST_ONE = click.IntRange(min=1)
READING = """\
How to read this: a ratio compares runs that took turns in one process on the same inputs, and is the median over
the rounds, with the smallest and largest. Seconds are of this machine at that hour; compare them with nothing else.
What one ratio says is within its min–max; one round says little. `README.md` beside this folder says more."""


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--batch", default=8, show_default=True, type=_AT_LEAST_ONE, help="Tasks of the generated batch."
)
@click.option(
    "--new",
    default=48,
    show_default=True,
    type=_AT_LEAST_ONE,
    help="Tokens everybody generates for each task.",
)
@click.option(
    "--tasks",
    default=60,
    show_default=True,
    type=_AT_LEAST_ONE,
    help="Tasks over one catalogue, for the shared prefix.",
)
@click.option(
    "--tools",
    default=37,
    show_default=True,
    type=click.IntRange(1, 45),
    help="Tools of the larger prompt that is scored.",
)
@click.option(
    "--rounds",
    default=3,
    show_default=True,
    type=_AT_LEAST_ONE,
    help="Of the quick contestants; slow ones run in a third.",
)
@click.option("--threads", default=2, show_default=True, type=_AT_LEAST_ONE)
@click.option("--only", multiple=True, type=click.Choice(SECTIONS), help="May be given more than once.")
@click.option(
    "--json", "file", type=click.Path(path_type=Path), help="Instead of benchmarks/results/; .md beside it."
)
def main(
    model: str,
    dtype: str,
    device: str,
    batch: int,
    new: int,
    tasks: int,
    tools: int,
    rounds: int,
    threads: int,
    only: tuple[str, ...],
    file: Path | None,
) -> None:
    """Measure probe against others on the same inputs. Exit code 1 when results disagree."""
    settings = {
        "model": model,
        "dtype": dtype,
        "device": device,
        "batch": batch,
        "new": new,
        "tasks": tasks,
        "tools": tools,
        "rounds": rounds,
        "threads": threads,
    }
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.set_num_threads(threads)
    load, started = machine.Load(), time.perf_counter()
    sections: list[Section] = []
    for section in measure(settings, only or SECTIONS):
        sections.append(section)
        click.echo(table.as_text(section))
    described = machine.describe(device, threads)
    described["cpu_time_of_others"] = _percent(load.share_of_others())
    described["seconds_in_all"] = round(time.perf_counter() - started)
    click.echo(table.summary(sections))
    click.echo("\n".join(machine.as_lines(described)) + "\n\n" + READING)
    path = file or RESULTS / f"{date.today()}-{_slug(model)}-{dtype}.json"
    write(path, settings, described, sections)
    sys.exit(1 if any(section.failed for section in sections) else 0)


def measure(settings: dict[str, Any], wanted: tuple[str, ...]) -> Iterator[Section]:
    """The wanted sections, each as soon as it is there."""
    from benchmarks import candidates, generation, memory, nnsight_pair, prefix, reasoning
    from benchmarks import ours as engine

    size, n_new, rounds = settings["batch"], settings["new"], settings["rounds"]
    ours = engine.load(settings["model"], settings["dtype"], settings["device"])
    few = max(1, rounds // 3)
    if {"generation", "roofline"} & set(wanted):
        everybody = "generation" in wanted
        contest, roofline = generation.measure(
            ours, size=size, n_new=n_new, rounds=rounds, everybody=everybody
        )
        yield contest
        if "roofline" in wanted:
            yield roofline
    rooms: dict[str, Callable[[], Section]] = {
        "nnsight": lambda: nnsight_pair.measure(
            ours, size=size, n_new=n_new, rounds=few, threads=settings["threads"]
        ),
        "candidates": lambda: candidates.measure(ours, n_tools=settings["tools"], rounds=rounds),
        "prefix": lambda: prefix.measure(ours, n_tasks=settings["tasks"], rounds=few),
        "reasoning": lambda: reasoning.measure(ours, rounds=rounds),
        "memory": lambda: memory.measure(
            name=settings["model"],
            dtype=settings["dtype"],
            device=settings["device"],
            threads=settings["threads"],
            size=size,
            n_new=n_new,
            rounds=few,
        ),
    }
    for name, room in rooms.items():
        if name in wanted:
            yield room()


def write(path: Path, settings: dict[str, Any], described: dict[str, Any], sections: list[Section]) -> None:
    """The JSON at `path` and the same as Markdown beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "schema": 1,
        "date": str(date.today()),
        "settings": settings,
        "machine": described,
        "sections": {section.name: section.as_json() for section in sections},
    }
    path.write_text(
        json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    heading = f"# {settings['model']}, {settings['dtype']}, {settings['device']}: {date.today()}\n"
    about = "\n".join(f"- {line}" for line in [*machine.as_lines(described), *_settings_lines(settings)])
    parts = [
        heading,
        READING.replace("`README.md` beside this folder", "`benchmarks/README.md`"),
        "",
        about,
        "",
    ]
    text = "\n".join(parts + [table.as_markdown(section) for section in sections])
    path.with_suffix(".md").write_text(text, encoding="utf-8")


def _settings_lines(settings: dict[str, Any]) -> list[str]:
    return ["settings: " + ", ".join(f"{key} {value}" for key, value in settings.items())]


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.0%}"


def _slug(name: str) -> str:
    """A model's name as part of a file name; of a path, its last part."""
    return re.sub(r"[^a-z0-9.]+", "-", Path(name).name.lower()).strip("-.") or "model"


if __name__ == "__main__":
    main()
