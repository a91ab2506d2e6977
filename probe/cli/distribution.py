"""`distribution`: temperature, truncation and energies of one distribution or of all of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from probe.cli import console


def _rule(
    _ctx: click.Context, parameter: click.Parameter, values: tuple[float, ...]
) -> list[tuple[str, float]]:
    assert parameter.name is not None
    return [(parameter.name.replace("_", "-"), value) for value in values]


def _rule_option(name: str, help_text: str) -> Callable:
    kind = int if name == "top-k" else float
    return click.option(f"--{name}", type=kind, multiple=True, callback=_rule, help=help_text)


@console.main.command("distribution")
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option("--task", metavar="ID", help="Task of the run [default: the first that keeps logits].")
@click.option("--passage", metavar="NAME", help="Variant of a prompting task [default: the first].")
@click.option("--decision", type=console.Count(), help="Captured decision of the task, from 0 [default: 0].")
@click.option(
    "--row",
    type=console.Count(),
    help="Position instead: generated token of the run, or token of the prompt.",
)
@click.option(
    "--all", "every", is_flag=True, help="Every decision of the run, or every position of the prompt."
)
@click.option("--prompt", metavar="TEXT", help="Look at what follows this text.")
@click.option(
    "--before",
    metavar="TOKEN",
    help="Special token in front of --prompt and --texts; '' for none [default: the model's attention sink].",
)
@click.option(
    "--texts", metavar="FILE", type=click.Path(path_type=Path), help="Loss of these texts, one a line."
)
@click.option(
    "--against", metavar="FILE", type=click.Path(path_type=Path), help="The gap from --texts to these."
)
@click.option("--model", metavar="NAME", help="Model for --prompt and --texts [default: smollm2-135m].")
@click.option(
    "--student", metavar="NAME", help="Model that is distilled, with --prompt [default: a uniform one]."
)
@click.option("--device", default="cpu", show_default=True)
@click.option("--offline", is_flag=True, help="Never look for anything outside this machine.")
@click.option(
    "--temperature",
    metavar="T|T,T|LOW:HIGH:COUNT",
    help="Temperature of tokens [default: a grid, rules at 1].",
)
@click.option("--entropy", "entropies", type=float, multiple=True, help="Find the τ with this entropy, nats.")
@_rule_option("top-p", "Smallest most probable set of this mass; rules may be repeated.")
@_rule_option("top-k", "This many most probable tokens.")
@_rule_option("min-p", "At least this share of the highest probability.")
@_rule_option("typical", "Surprisal nearest to the entropy, up to this mass.")
@_rule_option("epsilon", "At least this probability.")
@_rule_option("eta", "At least min(ε, √ε·exp(−entropy)).")
@click.option("--plot", metavar="FILE", type=click.Path(path_type=Path), help="Write figures: .png or .svg.")
@console.json_option
def distribution(as_json: bool, **asked: Any) -> None:
    """An output distribution: temperature, truncation, and its energies.

    \b
    probe distribution RUN                      the run's first captured decision
    probe distribution RUN --all                all of them: does the nucleus follow the entropy?
    probe distribution --prompt "The cat"       what follows a text
    probe distribution --texts A --against B    loss as energy against free energy, and the gap of B from A

    docs/distribution.md defines every number.
    """
    from probe.distribution.command import Request, execute, lines

    names = ("top_p", "top_k", "min_p", "typical", "epsilon", "eta")
    rules = tuple(rule for name in names for rule in asked.pop(name))
    document = execute(Request(**asked, rules=rules), console.say)
    if as_json:
        console.dump(document)
        return
    for line in lines(document):
        console.echo(console.printable(line))
