"""Fine-tuning: `memory` and `lora`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from probe.cli import console
from probe.errors import (
    UsageError,
)


class _OrAdapter(click.Group):
    """A first word that is no command is the argument of `adapter`: `probe lora PATH`."""

    default = "adapter"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = [self.default, *args]
        return super().parse_args(ctx, args)


@console.main.group("lora", cls=_OrAdapter)
def lora() -> None:
    """Low-rank adapters: measure one (`probe lora ADAPTER`), compare ranks, compare runs before and after."""


@lora.command("adapter")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--base", metavar="MODEL", help="Compare with this model's weights; auto: the one it names.")
@click.option(
    "--alpha", type=float, help="Alpha of a single file without adapter_config.json; the scale is alpha / r."
)
@click.option("--modules", is_flag=True, help="One line for each module [default: for each kind of module].")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write the measures to this .parquet, .jsonl or .csv file.",
)
@click.option("--offline", is_flag=True, help="Never look for anything outside this machine.")
@console.json_option
def lora_adapter(
    adapter: Path,
    base: str | None,
    alpha: float | None,
    modules: bool,
    output: Path | None,
    offline: bool,
    as_json: bool,
) -> None:
    """Measure every B A of a PEFT LoRA adapter: norms, ranks, and with --base what it did to the weights.

    ADAPTER is a safetensors file, a directory, or a tree with several adapters. docs/lora.md defines the measures.
    """
    from probe.training.lora import command

    documents, measures = command.examine(adapter, base, alpha=alpha, offline=offline, log=console.say)
    if output:
        command.write_measures(measures, output)
    if as_json:
        console.dump({"adapters": documents})
        return
    for document in documents:
        for line in command.lines(document, modules):
            console.echo(console.printable(line))


@lora.command("sweep")
@click.option("--ranks", callback=console.numbers(int), help="Ranks [default: 1,2,4,8,16,64; --quick 4,64].")
@click.option(
    "--seeds", type=console.Count(1), help="Trainings of each method at its chosen rate [default: 3]."
)
@click.option(
    "--rates", callback=console.numbers(float), help="Learning rates of adapters [default: 3e-4,1e-3,3e-3]."
)
@click.option(
    "--full-rates",
    callback=console.numbers(float),
    help="Learning rates of full fine-tuning [default: 3e-5,1e-4,3e-4].",
)
@click.option("--no-full", is_flag=True, help="Leave full fine-tuning out.")
@click.option(
    "--steps", type=console.Count(1), help="Optimizer steps of a training [default: 400; --quick 12]."
)
@click.option("--batch-size", "batch", type=console.Count(1), help="Lines in each step [default: 8].")
@click.option("--low", type=console.Count(1), help="The low rank of the claim [default: 4, else the lowest].")
@click.option("--quick", is_flag=True, help="Minutes instead of hours: a look, not a result.")
@click.option("--model", default="smollm2-135m", show_default=True, help="The model that is fine-tuned.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="train, selection, validation, text .jsonl [default: Tarn].",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Directory of the sweep [default: runs/lora-sweep(-quick)].",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Write the figure to this .png or .svg file.")
@click.option("--offline", is_flag=True, help="Never look for anything outside this machine.")
@console.json_option
def lora_sweep(
    output: Path | None,
    plot: Path | None,
    data: Path | None,
    offline: bool,
    low: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Fine-tune at several ranks and put to the test that a low rank forgets and overfits less than a high one.

    Every finished training is kept: the same command continues a sweep that was stopped. docs/lora.md defines
    the measures and says how to read them.
    """
    from probe.training.lora import command

    setting = command.setting(given)
    command.check_plot(plot)
    directory = output or Path("runs") / ("lora-sweep-quick" if setting.quick else "lora-sweep")
    document = command.sweep(
        directory, setting, low, data=data, offline=offline, log=console.say, watch=_trainings
    )
    if plot:
        command.draw(document, plot)
    if as_json:
        console.dump(document)
        return
    for line in command.sweep_lines(document):
        console.echo(console.printable(line))


@contextmanager
def _trainings(total: int) -> Iterator[Callable[[str], None]]:
    """A bar over the trainings of a sweep on a terminal, a line a training elsewhere."""
    if console.plain():
        count = iter(range(1, total + 1))
        yield lambda message: console.say(f"{next(count)}/{total} {message}")
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("trainings"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("trainings", total=total)

        def done(message: str) -> None:
            bar.console.print(message, markup=False, highlight=False)
            bar.advance(task)

        yield done


@lora.command("compare")
@click.argument("base", type=click.Path(path_type=Path), metavar="RUN_BASE")
@click.argument("adapted", type=click.Path(path_type=Path), metavar="RUN_ADAPTED")
@click.option("--all", "every", is_flag=True, help="Every measure, not only those that changed.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write the differences to this .parquet, .jsonl or .csv file.",
)
@console.pager_option
@console.json_option
def lora_compare(
    base: Path, adapted: Path, every: bool, output: Path | None, no_pager: bool, as_json: bool
) -> None:
    """What fine-tuning changed: `probe compare` of two runs, before and after."""
    from probe.cli.compare import print_comparison

    print_comparison((base, adapted), None, every, output, no_pager, as_json)


@console.main.command("memory")
@click.argument("model", required=False)
@click.option("--list-gpus", is_flag=True, help="The GPUs that --gpu knows, and their memory.")
@click.option(
    "--rule-of-thumb", "rule", is_flag=True, help="The half-precision rule, and what it leaves out."
)
@click.option("--gpu", help="Such as rtx-4090, a100-80gb, or a size such as 24GiB.")
@click.option("--method", default="full", show_default=True, help="full, lora or qlora.")
@click.option(
    "--precision", default="mixed", show_default=True, help="mixed: 16 bits, float32 masters; autocast; …"
)
@click.option("--optimizer", default="adamw", show_default=True, help="adamw is torch's fused one.")
@click.option(
    "--batch", type=console.Count(), default=1, show_default=True, help="Sequences at once on a GPU."
)
@click.option("--length", type=console.Count(), default=512, show_default=True, help="Tokens of a sequence.")
@click.option("--attention", default="sdpa", show_default=True, help="sdpa, flash or eager.")
@click.option("--checkpointing", is_flag=True, help="Gradient checkpointing, layer by layer.")
@click.option("--offload-activations", "offload", is_flag=True, help="What checkpointing keeps, on the host.")
@click.option(
    "--loss", default="whole", show_default=True, help="whole logits, chunked, or fused with the head."
)
@click.option("--compile", is_flag=True, help="Layers and loss by torch.compile.")
@click.option("--optimizer-in-backward", is_flag=True, help="Step each weight as its gradient comes.")
@click.option("--repeat-kv", is_flag=True, help="Keys and values copied for every query head.")
@click.option(
    "--accumulation", type=console.Count(), default=1, show_default=True, help="Batches before a step."
)
@click.option("--rank", type=console.Count(), default=16, show_default=True, help="Rank of LoRA.")
@click.option("--targets", help="Layers LoRA adapts, such as q_proj,v_proj [default: all of a layer].")
@click.option(
    "--adapter-precision", default="float32", show_default=True, help="float32, or base: the base's own type."
)
@click.option("--adapter-dropout", is_flag=True, help="Adapters drop some of their input.")
@click.option("--no-double-quantization", is_flag=True, help="QLoRA with float32 constants.")
@click.option(
    "--zero", type=console.Count(), default=0, show_default=True, help="ZeRO stage; 3 is FSDP's full shard."
)
@click.option(
    "--gpus", "n_gpus", type=console.Count(), default=1, show_default=True, help="GPUs that share the states."
)
@click.option(
    "--measure",
    type=click.Choice(["tracked", "real"]),
    is_flag=False,
    flag_value="tracked",
    help="Follow one step without its memory, or run one.",
)
@click.option("--device", default="cpu", show_default=True, help="Device of --measure real: cpu or cuda.")
@click.option("--plot", help="Write a figure of the step to this .png or .svg file.")
@click.option("--revision", help="Hub revision of the model.")
@click.option("--offline", is_flag=True, help="Never look for anything outside this machine.")
@console.json_option
def memory(
    model: str | None, list_gpus: bool, rule: bool, gpu: str | None, as_json: bool, **options: Any
) -> None:
    """Memory that fine-tuning MODEL takes, by its configuration alone: weights, gradients, optimizer, activations.

    With --rule-of-thumb MODEL may be a number of parameters, such as 2B. Exit code 0 also where it does not fit.
    """
    from probe.training.memory import command

    if model is None and not list_gpus:
        raise UsageError(
            "give a MODEL such as gemma-2b, or a number of parameters such as 2B with --rule-of-thumb"
        )
    document, rows = command.cards() if list_gpus else command.examine(model or "", rule, gpu, options)
    if as_json:
        console.dump(document)
        return
    from rich.console import Console

    screen = Console(no_color=bool(os.environ.get("NO_COLOR")), soft_wrap=True, highlight=False)
    for row in rows:
        screen.print(row)
