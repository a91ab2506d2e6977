"""The body of `probe distribution`: what is looked at, what is asked of it, and how it is said."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.errors import UsageError

if TYPE_CHECKING:
    from probe.distribution.look import Choices
    from probe.distribution.source import Distribution
    from probe.model.hooked import Model
    from probe.prompts import Codec
    from probe.runs import Run

_COLDEST, _HOTTEST = 1e-9, 1e9
"""Temperatures whose tempered logits float32 can hold, with room for their squares in float64."""


@dataclass(frozen=True)
class Request:
    """The options of the command, as given."""

    run: Path | None = None
    task: str | None = None
    passage: str | None = None
    decision: int | None = None
    row: int | None = None
    every: bool = False
    prompt: str | None = None
    before: str | None = None
    texts: Path | None = None
    against: Path | None = None
    model: str | None = None
    student: str | None = None
    device: str = "cpu"
    offline: bool = False
    temperature: str | None = None
    entropies: tuple[float, ...] = ()
    rules: tuple[tuple[str, float], ...] = ()
    plot: Path | None = None


def execute(asked: Request, log: Callable[[str], None]) -> dict[str, Any]:
    """The document of what was asked; with `plot`, the figure is written. Raises UsageError and what sources raise."""
    from probe.distribution import gap, look, plot

    _check(asked)
    choices = choices_of(asked)
    if asked.plot:
        plot.check_output(asked.plot)
    if asked.texts is not None:
        document = _texts(asked, choices, log)
        draw = lambda path: plot.plot_gap(document, path)  # noqa: E731
    elif asked.every:
        document = look.survey(_every(asked, log), choices) | _origin(asked)
        draw = lambda path: plot.plot_run(document, path)  # noqa: E731
    else:
        seen, student = _single(asked, log)
        document = look.look(seen, choices, student)
        draw = lambda path: plot.plot_distribution(seen.logits, document, path)  # noqa: E731
    if asked.texts is None and asked.every and asked.prompt is not None:
        document["tokens"] = None if len(document["decisions"]) < 2 else gap.summary(_token_rows(document))
    if asked.plot:
        draw(asked.plot)
        document["plot"] = str(asked.plot)
    return document


def choices_of(asked: Request) -> Choices:
    """Temperatures and rules. `--temperature` takes one number, several ("0.5,1,2"), or a grid ("0.1:10:20")."""
    from probe.distribution.look import TAUS, Choices
    from probe.maths.distribution import TRUNCATIONS

    taus = _taus(asked.temperature) if asked.temperature else TAUS
    for entropy in asked.entropies:
        if not entropy > 0 or not math.isfinite(entropy):
            raise UsageError(
                f"--entropy {entropy:g}: an entropy that a temperature can reach is positive, in nats"
            )
    import torch

    for rule, number in asked.rules:
        try:
            TRUNCATIONS[rule](torch.zeros(2), number)
        except ValueError as error:
            raise UsageError(f"--{rule} {number:g}: {error}") from None
    # Rules act at the one temperature that is asked for; on a grid, at τ = 1.
    return Choices(taus, asked.entropies, asked.rules, taus[0] if len(taus) == 1 else 1.0)


def _taus(text: str) -> tuple[float, ...]:
    try:
        if ":" in text:
            low, high, n = text.split(":")
            start, end, count = float(low), float(high), int(n)
            if not (0 < start < end < math.inf and 2 <= count <= 10_000):
                raise ValueError
            ratio = (math.log(end) - math.log(start)) / (count - 1)
            taus = tuple(start * math.exp(ratio * at) for at in range(count))
        else:
            taus = tuple(float(part) for part in text.split(","))
    except (ValueError, OverflowError):
        taus = ()
    if not taus or not all(0 < tau < math.inf for tau in taus):
        raise UsageError(
            f"--temperature {text}: give a positive number, several as 0.5,1,2, or a grid LOW:HIGH:COUNT "
            "as 0.1:10:20 (a temperature of 0 is argmax)"
        )
    if min(taus) < _COLDEST or max(taus) > _HOTTEST:
        raise UsageError(
            f"--temperature {text}: must lie between {_COLDEST:g}, where nothing but the most probable token is "
            f"left, and {_HOTTEST:g}, where all tokens are alike"
        )
    return taus


def _check(asked: Request) -> None:
    given = [asked.run is not None, asked.prompt is not None, asked.texts is not None]
    if sum(given) != 1:
        raise UsageError(
            "say what to look at, one of: a run directory (`probe distribution RUN`), --prompt TEXT, --texts FILE"
        )
    if asked.run is None and (asked.task or asked.passage or asked.decision is not None):
        raise UsageError("--task, --passage and --decision name a place in a run: give its directory")
    if asked.against is not None and asked.texts is None:
        raise UsageError("--against FILE is compared with --texts FILE: give both")
    if asked.before is not None and asked.run is not None:
        raise UsageError("--before is for --prompt and --texts: what stands in front in a run is recorded")
    if asked.decision is not None and asked.row is not None:
        raise UsageError("--decision and --row both name a position: give one of them")
    if asked.every and (asked.row is not None or asked.decision is not None):
        raise UsageError("--all takes every position: leave --row and --decision out")
    if asked.student and (asked.every or asked.texts):
        raise UsageError("--student is compared at one distribution: leave --all and --texts out")
    if asked.model and asked.run is not None and asked.row is None and not asked.student:
        raise UsageError("--model is for --prompt and --texts: captured decisions of a run need none")


def _origin(asked: Request) -> dict[str, Any]:
    return {"run": str(asked.run)} if asked.run is not None else {"prompt": asked.prompt}


# -- what is looked at -------------------------------------------------------------------------------------------


def _single(asked: Request, log: Callable[[str], None]) -> tuple[Distribution, Distribution | None]:
    from probe.distribution import source

    student = None
    if asked.run is not None:
        run = _open(asked.run)
        if asked.student:
            raise UsageError("--student sees the same text as its teacher: give the text by --prompt")
        if asked.row is None:
            return source.of_run(run, asked.task, asked.passage, asked.decision or 0), None
        model, _ = _load(asked.model or run.run["model"]["name"], asked, log)
        return source.of_row(run, model, asked.task, asked.passage, asked.row), None
    assert asked.prompt is not None
    row = -1 if asked.row is None else asked.row
    model, codec = _load(asked.model, asked, log)
    teacher = source.of_prompt(model, codec, asked.prompt, row, asked.before)
    if asked.student:
        student = source.of_prompt(*_load(asked.student, asked, log), asked.prompt, row, asked.before)
    return teacher, student


def _every(asked: Request, log: Callable[[str], None]) -> Iterator[Distribution]:
    from probe.analyzers.distribution import decisions
    from probe.distribution import source
    from probe.runs.read import finished

    if asked.prompt is not None:
        loaded = _load(asked.model, asked, log)
        yield from source.each_position(*loaded, asked.prompt, "prompt", asked.before)
        return
    assert asked.run is not None
    run = _open(asked.run)
    for task in finished(run) if asked.task is None else [run[asked.task]]:
        for decision in decisions(task):
            if asked.passage in (None, decision.passage):
                yield source.seen(decision)


def _texts(asked: Request, choices: Choices, log: Callable[[str], None]) -> dict[str, Any]:
    from probe.distribution import gap, source

    assert asked.texts is not None
    files = [path for path in (asked.texts, asked.against) if path is not None]
    texts = [source.read_texts(path) for path in files]
    model, codec = _load(asked.model, asked, log)
    sets = []
    for path, lines in zip(files, texts, strict=True):
        rows = []
        for at, text in enumerate(lines, 1):
            positions = source.each_position(model, codec, text, f"{path}:{at}", asked.before)
            rows += gap.tokens(positions, choices.temperature)
        sets.append({"file": str(path), **gap.summary(rows), "rows": rows})
    out = {"model": model.source.name, "temperature": choices.temperature, "gauge": "centred", "texts": sets}
    if len(sets) == 2:
        out["gap"] = gap.gap(sets[0]["rows"], sets[1]["rows"])
    return out


def _token_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for row in document["decisions"]:
        if "token" in row:
            loss, energy = row["token"]["by_tau"][0]["cross_entropy"], row["token"]["energy"]["centred"]
            free = energy - document["temperature"] * loss
            numbers = {
                "cross_entropy": loss,
                "energy": energy,
                "free_energy": free,
                "entropy": row["entropy"],
            }
            rows.append({"task_id": row["task_id"], **numbers})
    return rows


def _open(path: Path) -> Run:
    from probe.runs import Run

    return Run(path)


def _load(name: str | None, asked: Request, log: Callable[[str], None]) -> tuple[Model, Codec]:
    from probe.model import load
    from probe.prompts import Codec

    name = name or "smollm2-135m"
    log(f"loading {name}")
    model = load(name, device=asked.device, offline=asked.offline, log=log)
    return model, Codec(model.tokenizer, model.facts.n_ctx, model.switches, model.stop_ids)


# -- how it is said ----------------------------------------------------------------------------------------------


def lines(document: dict[str, Any]) -> Iterator[str]:
    """The document as plain lines."""
    if "texts" in document:
        yield from _gap_lines(document)
    elif "rules" in document:
        yield from _survey_lines(document)
    else:
        yield from _look_lines(document)
    if "plot" in document:
        yield f"figure: {document['plot']}"


def _look_lines(document: dict[str, Any]) -> Iterator[str]:
    yield "  ".join(
        f"{key} {value!r}" if key in ("prompt", "before") else f"{key} {value}"
        for key, value in document["source"].items()
    )
    yield ""
    yield "most probable tokens, τ = 1"
    for row in document["top"][:5]:
        yield f"  {row['token']:7d}  {row['probability']:.4f}  {_text(row)}"
    yield ""
    yield "temperature  entropy   top-1   KL to τ=1      ⟨E⟩        F      C      |F−(⟨E⟩−τS)|   (raw gauge; nats, logits)"
    for row in document["temperature"]:
        raw = row["raw"]
        yield (
            f"{row['tau']:11.4g} {row['entropy']:8.4f} {row['top1']:7.4f} {row['kl']:11.4f} {raw['energy_mean']:9.3f}"
            f" {raw['free_energy']:8.3f} {row['heat_capacity']:7.3f}        {row['identity_error']:.1e}"
        )
    if peak := document["heat_capacity_peak"]:
        yield f"heat capacity is highest at τ = {peak['tau']:.4g}: C = {peak['heat_capacity']:.4g} nats"
    for row in document["wanted"]:
        yield f"entropy {row['entropy']:g} nats at τ = {row['tau']:.6g}"
    yield ""
    yield "rule            tokens kept      mass   KL from full   entropy"
    for row in document["truncation"]:
        name = f"{row['rule']} {row['number']:g}"
        yield f"{name:14} {row['size']:12,d}  {row['mass']:8.5f}  {row['kl']:13.5f}  {row['entropy']:8.4f}"
    if token := document["token"]:
        yield ""
        yield f"token that follows: {token['token']} {_text(token)}: −log p = (E − F)/τ"
        for row in token["by_tau"]:
            yield f"  τ {row['tau']:<8.4g} {row['cross_entropy']:.4f} nats"
    yield ""
    yield "soft targets (student: " + _student(document["distillation"]) + ")"
    yield "temperature      KL  ‖gradient‖  τ²‖gradient‖  off the limit (z−v)/(Nτ²)  off autograd"
    for row in document["distillation"]["by_tau"]:
        off = f"{row['limit_error']:25.3f}" if "limit_error" in row else f"{'-':>25}"
        yield (
            f"{row['tau']:11.4g} {row['kl']:7.4f} {row['gradient_norm']:11.3e} {row['scaled_norm']:13.3e}"
            f"  {off}  {row['gradient_error']:12.1e}"
        )
    yield document["gauge"]


def _student(soft: dict[str, Any]) -> str:
    return soft["student"] if isinstance(soft["student"], str) else str(soft["student"].get("model"))


def _text(row: dict[str, Any]) -> str:
    return repr(row["text"]) if "text" in row else ""


def _survey_lines(document: dict[str, Any]) -> Iterator[str]:
    rows = document["decisions"]
    yield f"{len(rows):,} distributions of {len({row['task_id'] for row in rows}):,} tasks, τ = {document['temperature']:g}"
    yield "rule            tokens kept: min  median     max     mean mass   mean KL   rank correlation of size and entropy"
    for rule in document["rules"]:
        rho = rule["follows_entropy"]
        follows = _with_interval(rho, ".2f") if rho else "- (constant, or fewer than 3)"
        yield (
            f"{rule['rule'] + ' ' + format(rule['number'], 'g'):14} {rule['min']:17,d} {rule['median']:7,d} {rule['max']:7,d}"
            f"     {rule['mass']['value']:9.4f} {rule['kl']['value']:9.4f}   {follows}"
        )
    if document["fixed_k"]:
        yield "fixed k against the nucleus: share of the distributions where k keeps fewer or more tokens than top-p"
    for row in document["fixed_k"]:
        yield (
            f"top-k {row['k']:<4g} top-p {row['p']:<5g} too small {_with_interval(row['too_small'], '4.0%'):32} "
            f"too large {_with_interval(row['too_large'], '4.0%')}"
        )
    if document.get("tokens"):
        yield f"mean cross-entropy of the tokens that follow: {document['tokens']['cross_entropy']['value']:.4f} nats"


def _gap_lines(document: dict[str, Any]) -> Iterator[str]:
    yield f"model {document['model']}, τ = {document['temperature']:g}: cross-entropy = (E − F)/τ, centred gauge"
    for entry in document["texts"]:
        yield f"{entry['file']}: {entry['tokens']:,} tokens of {entry['texts']:,} texts"
        for name in ("cross_entropy", "energy", "free_energy", "entropy"):
            yield f"  {name:14} {_with_interval(entry[name], '.4f')} {entry[name]['unit']}"
    if "gap" in document:
        yield "gap, the second file minus the first"
        for name, entry in document["gap"].items():
            yield f"  {name:14} {_with_interval(entry, '+.4f')} {entry['unit']}"
    else:
        yield "token                     E          F     (E−F)/τ"
        for row in document["texts"][0]["rows"]:
            yield f"{row['text']!r:20} {row['energy']:9.3f}  {row['free_energy']:9.3f}  {row['cross_entropy']:9.4f}"


def _with_interval(estimate: dict[str, Any], form: str) -> str:
    text = format(estimate["value"], form)
    if estimate["low"] is None:
        return f"{text} (n = {estimate['n']})"
    return f"{text} [{format(estimate['low'], form)}, {format(estimate['high'], form)}] (95 %, n = {estimate['n']})"
