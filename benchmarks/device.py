"""`python -m benchmarks.device`: is a device right, and what does capture cost on it? One command, within minutes.

For random weights of true shapes: every captured site and P(tool) against transformers, time and peak memory of
captured generation against plain `generate`, and estimated against allocated memory of training steps. What the time
does not reach is said. Without a device it runs tiny shapes on the CPU, where it checks itself and times nothing of worth.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from benchmarks import __main__ as command
from benchmarks import agreement, finetune_memory, inputs, machine, others, table
from benchmarks import ours as engine
from benchmarks.generation import NONE, OURS, PLAIN
from benchmarks.memory import MIB
from benchmarks.table import Check, Figure, Ratio, Section, Target
from benchmarks.timing import run_rounds

SHAPES = {"cuda": ("gemma-2b", "smollm2-1.7b", "gemma-7b"), "cpu": ("tiny-llama", "tiny-gemma2")}
DTYPES = ("float32", "bfloat16")
BATCHES = {"cuda": (1, 8, 32), "cpu": (1, 2)}
STATIC = "plain generate, static cache"
COMPARED = 4
"""Tasks whose captures are compared."""
NEAR = {"float32": 1e-3, "bfloat16": 0.25}
"""max |Δ log P(tool)| in nats beyond which a device is wrong and not merely rounded: other kernels add in another order."""
STEPS = 20
"""Training steps whose memory is compared."""


@click.command()
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    help="Of random weights [default: by device]. May be given more than once.",
)
@click.option(
    "--batch", "batches", multiple=True, type=int, help="Tasks at once [default: 1, 8, 32; on a CPU 1, 2]."
)
@click.option("--new", default=32, show_default=True, help="Tokens generated for each task.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--steps", default=STEPS, show_default=True, help="Training steps whose memory is compared.")
@click.option("--minutes", default=8.0, show_default=True, help="Nothing new is begun after these.")
@click.option(
    "--json", "file", type=click.Path(path_type=Path), help="Instead of benchmarks/results/; .md beside it."
)
def main(
    device: str,
    shapes: tuple[str, ...],
    batches: tuple[int, ...],
    new: int,
    rounds: int,
    steps: int,
    minutes: float,
    file: Path | None,
) -> None:
    """Exit code 1 where a site or P(tool) differs, a tensor is not finite, or on CUDA a step's memory is more than 5 % off."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    kind = "cuda" if device.startswith("cuda") else "cpu"
    shapes, batches = shapes or SHAPES[kind], batches or BATCHES[kind]
    settings = {
        "device": device,
        "shapes": list(shapes),
        "batches": list(batches),
        "new": new,
        "rounds": rounds,
    }
    end = time.monotonic() + 60 * minutes
    sections: list[Section] = []
    for section in measure(device, shapes, batches, new, rounds, steps, lambda: time.monotonic() < end):
        sections.append(section)
        click.echo(table.as_text(section))
    described = machine.describe(device, torch.get_num_threads())
    click.echo(table.summary(sections))
    path = file or command.RESULTS / f"{time.strftime('%Y-%m-%d')}-device-{kind}.json"
    command.write(path, {"model": "random weights", "dtype": "several"} | settings, described, sections)
    sys.exit(1 if any(section.failed for section in sections) else 0)


def measure(
    device: str,
    shapes: tuple[str, ...],
    batches: tuple[int, ...],
    n_new: int,
    rounds: int,
    steps: int,
    in_time: Callable[[], bool],
) -> Iterator[Section]:
    """Parity first: a speed without it means nothing."""
    for shape in shapes:
        for dtype in DTYPES:
            section = Section(f"{shape}, {dtype}", f"{shape}, {dtype}, random weights")
            if not in_time():
                section.notes.append("Not measured: the time was over.")
                yield section
                continue
            ours = engine.load(f"random:{shape}", dtype, device)
            section.checks += parity(ours, min(n_new, 8))
            for size in batches:
                if not in_time():
                    section.notes.append(f"Batch of {size}: not measured, the time was over.")
                    continue
                _speed(section, ours, size, n_new, rounds)
            yield section
            del ours
            _release(device)
    yield training(device, steps, in_time)


def parity(ours: engine.Ours, n_new: int) -> list[Check]:
    """Every captured site that transformers has as well, and P(tool), in float32 within the contract's tolerance."""
    batch = inputs.batch(ours, COMPARED, n_new)
    outcomes = engine.generate(ours, batch.plans, n_new, capture="default", out=None)
    observed = agreement.from_eager(others.eager(ours.hf, batch), batch)
    judged = ours.dtype == "float32"
    checks = agreement.check_captures("against eager transformers", outcomes, observed, judged)
    finite = all(bool(tensor.isfinite().all()) for outcome in outcomes for tensor in outcome.tensors.values())
    checks.append(Check("captured tensors", finite, "all finite" if finite else "some are not finite"))
    gaps = []
    for outcome, prompt in zip(outcomes, batch.prompts, strict=True):
        candidates = [list(candidate.token_ids) for candidate in prompt.candidates]
        expected = others.on_the_prompts_cache(ours.hf, prompt.token_ids, candidates)
        gaps += [abs(a - b) for a, b in zip(outcome.candidate_log_probs, expected, strict=True)]
    limit = NEAR[ours.dtype]
    finding = f"max |Δ| {max(gaps):.1e} nats over {len(gaps)} candidates (limit {limit:g})"
    return [*checks, Check("log P(tool) against transformers", max(gaps) <= limit, finding)]


def _speed(section: Section, ours: engine.Ours, size: int, n_new: int, rounds: int) -> None:
    """Time, and on CUDA peak memory, of one batch."""
    batch = inputs.batch(ours, size, n_new)
    peaks: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = iter(range(sys.maxsize))

        def write(given: inputs.Inputs) -> Any:
            out = Path(folder) / f"run-{next(runs)}"
            return engine.generate(ours, given.plans, given.n_new, capture="default", out=out)

        contestants: dict[str, Callable[[inputs.Inputs], Any]] = {
            PLAIN: lambda given: others.plain(ours.hf, given),
            STATIC: lambda given: others.plain(ours.hf, given, cache="static"),
            OURS: write,
            NONE: lambda given: engine.generate(ours, given.plans, given.n_new, capture="none", out=None),
        }
        for name in list(contestants):
            try:
                # A static cache compiles for the shapes that it is given.
                contestants[name](batch if name == STATIC else batch.first(1, 2))
            except (RuntimeError, ValueError, TypeError) as error:
                if name != STATIC:
                    raise
                del contestants[name]
                section.notes.append(f"{name}: not measured: {type(error).__name__}: {str(error)[:100]}")

        def bound(name: str) -> Callable[[], Any]:
            def call() -> None:
                _reset_peak(ours.device)
                contestants[name](batch)
                if ours.device.startswith("cuda"):
                    import torch

                    peaks.setdefault(name, []).append(torch.cuda.max_memory_allocated(ours.device) / MIB)

            return call

        timings = run_rounds(
            {name: bound(name) for name in contestants}, dict.fromkeys(contestants, rounds), ours.device
        )
    words = f"batch of {len(batch.plans)}, {max(batch.lengths)} + {n_new} tokens"
    for above, below, most in ((OURS, PLAIN, 1.05), (OURS, STATIC, 1.0), (NONE, PLAIN, None)):
        if below in contestants:
            judged = most is not None and ours.device.startswith("cuda")
            target = Target("at most", most) if judged else None
            section.ratios.append(Ratio(f"{words}: {above} / {below}", timings.ratios(above, below), target))
    section.figures += [Figure(f"{words}: {name}", took, "s") for name, took in timings.seconds.items()]
    section.figures += [Figure(f"{words}: peak of {name}", given, "MiB") for name, given in peaks.items()]


def training(device: str, steps: int, in_time: Callable[[], bool]) -> Section:
    """Estimated peak of training steps against the allocator's (on a CPU: the tracker's)."""
    from probe.training.memory.command import architecture
    from probe.training.memory.estimate import estimate, with_targets
    from probe.training.memory.tracker import real_step

    section = Section("training", "Memory of a training step: estimated / measured")
    grid = finetune_memory.GRID if device.startswith("cuda") else finetune_memory.QUICK
    for case in grid[:: max(1, len(grid) // steps)][:steps] if steps else ():
        words = ", ".join([case.shape, *(f"{key} {value}" for key, value in case.options)])
        if not in_time():
            section.notes.append(f"{words}: not measured, the time was over.")
            continue
        name = finetune_memory.saved(case.shape, case.few)
        arch, known = architecture(name)
        plan = with_targets(case.plan, known)
        _release(device)
        measured = real_step(name, plan, device)
        ratio = estimate(arch, plan).peak.total / measured["peak_bytes"]
        near = 0.95 <= ratio <= 1.05
        section.ratios.append(Ratio(words, [ratio]))
        section.checks.append(
            Check(
                f"memory: {words}",
                near if device.startswith("cuda") else None,
                f"{ratio - 1:+.1%}, {measured['how']}",
            )
        )
    return section


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def _release(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
