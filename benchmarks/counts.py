"""`python -m benchmarks.counts`: what a run costs, in figures that need no quiet machine.

Passes through the model, tokens in them, floating-point operations and bytes on disk, for shipped tasks on a tiny random
model. They are the same on every machine, so that a test holds them to those recorded in `benchmarks/results/counts.json`.
`--record` writes them anew: only with a reason that the commit gives.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from benchmarks.ours import ROOT

RECORDED = ROOT / "benchmarks" / "results" / "counts.json"
MODEL = "random:tiny-llama"
RUNS: dict[str, dict[str, Any]] = {
    "tools": {"limit": 4, "max_new_tokens": 4},
    "cot": {"limit": 2, "reasoning": "reference", "max_new_tokens": 4},
    "prompting": {"limit": 2, "max_new_tokens": 4},
    "agent": {"limit": 1, "max_new_tokens": 32},
}
EXPERIMENTS = ("mask_all", "swap")
"""Of the tool tasks: masked keys on a shared prompt, and changed prompts."""


@click.command()
@click.option("--record", is_flag=True, help="Write what was counted as the new bound.")
def main(record: bool) -> None:
    """Count, compare with what is recorded; exit code 1 where a figure has grown."""
    counted = count()
    if record:
        RECORDED.write_text(json.dumps(counted, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    worse = grown(counted, recorded())
    for name, figures in counted.items():
        click.echo(f"{name}: " + ", ".join(f"{value:,} {what}" for what, value in figures.items()))
    for line in worse:
        click.echo(line)
    sys.exit(1 if worse else 0)


def recorded() -> dict[str, dict[str, int]]:
    """The bounds, by part and figure."""
    return json.loads(RECORDED.read_text(encoding="utf-8"))


def grown(counted: dict[str, dict[str, int]], bounds: dict[str, dict[str, int]]) -> list[str]:
    """A line for each figure above its bound, or without one."""
    return [
        f"{name}: {value:,} {what}, {bounds.get(name, {}).get(what, 0):,} recorded"
        for name, figures in counted.items()
        for what, value in figures.items()
        if value > bounds.get(name, {}).get(what, 0)
    ]


def count() -> dict[str, dict[str, int]]:
    """Passes, tokens, floating-point operations and bytes of each run, and of the experiments on the first."""
    import probe
    from probe.experiments import intervene

    model = probe.load(MODEL)
    counted: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in RUNS.items():
            with _counting(model) as figures:
                tasks = ROOT / "tasks" / f"{name}.jsonl"
                run = probe.run(tasks, model=model, out=Path(folder) / name, analyze=False, **options)
            figures["bytes"] = sum(file.stat().st_size for file in run.path.glob("tasks/**/*.safetensors"))
            counted[name] = dict(figures)
            if name == "tools":
                with _counting(model) as figures:
                    intervene(run, ["base", *EXPERIMENTS], model=model)
                counted["experiments"] = dict(figures)
    return counted


@contextmanager
def _counting(model: Any) -> Iterator[Counter[str]]:
    """Counts while the model runs; decoding and scoring go through its forward as prompts do."""
    from torch.utils.flop_counter import FlopCounterMode

    figures: Counter[str] = Counter()

    def before(_module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = next(
            value
            for value in (*given, named.get("input_ids"), named.get("inputs_embeds"))
            if value is not None
        )
        figures["passes"] += 1
        figures["tokens"] += ids.shape[0] * ids.shape[1]

    handle = model.hf.base_model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with FlopCounterMode(display=False) as flops:
            yield figures
    finally:
        handle.remove()
    figures["flops"] = flops.get_total_flops()


if __name__ == "__main__":
    main()
