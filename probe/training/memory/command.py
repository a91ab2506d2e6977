"""`probe memory`: from a name and options to a document and its text."""

from __future__ import annotations

from typing import Any

from probe.errors import UsageError
from probe.training.memory.advice import verdict
from probe.training.memory.counter import ActivationCounter
from probe.training.memory.estimate import estimate, with_targets
from probe.training.memory.gpus import GPUS, Gpu
from probe.training.memory.gpus import gpu as find_gpu
from probe.training.memory.plan import Architecture, FineTuningPlan
from probe.training.memory.rule import HIDDEN, parameter_count, rule_of_thumb
from probe.training.memory.show import as_dict, both, lines


def cards() -> tuple[dict[str, Any], list[str]]:
    """The known GPUs, as a document and as lines."""
    document = {
        name: {"nominal_gib": card.nominal, "seen_gib": card.seen, "usable_bytes": card.usable_bytes}
        for name, card in GPUS.items()
    }
    rows = [f"  {'GPU':18} {'as sold':>10}  as torch sees it"]
    for name, card in GPUS.items():
        rows.append(
            f"  {name:18} {card.nominal:6.1f} GiB  {f'{card.seen:6.2f} GiB' if card.seen else '     -'}"
        )
    return document, rows


_OPTIONS: dict[str, Any] = {
    "measure": None,
    "device": "cpu",
    "plot": None,
    "revision": None,
    "offline": False,
    "no_double_quantization": False,
    "targets": None,
}
"""Options of the command that are no field of FineTuningPlan, without a value."""


def answer(model: str, rule: bool, gpu: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """The JSON document of `probe memory` for options in Python. Raises UsageError for one that there is not."""
    fields = [name for name in FineTuningPlan.__dataclass_fields__ if name != "double_quantization"]
    if unknown := [name for name in options if name not in (*_OPTIONS, *fields)]:
        raise UsageError(f"memory: no option {unknown[0]}; there are {', '.join((*_OPTIONS, *fields))}")
    targets = options.get("targets")
    given = _OPTIONS | options
    if targets is not None and not isinstance(targets, str):
        given["targets"] = ",".join(targets)
    return examine(model, rule, gpu, given)[0]


def examine(
    model: str, rule: bool, gpu: str | None, options: dict[str, Any]
) -> tuple[dict[str, Any], list[Any]]:
    """The JSON document and the lines of text (rich) that answer `probe memory`."""
    card = find_gpu(gpu) if gpu else None
    if rule:
        return _rule(model, card, options)
    if parameter_count(model) is not None:
        raise UsageError(
            f"{model}: activations need an architecture; give a model such as random:gemma-2b, or --rule-of-thumb"
        )
    wanted = dict(options)
    measure, device, picture = (wanted.pop(name) for name in ("measure", "device", "plot"))
    arch, known = architecture(model, wanted.pop("revision"), wanted.pop("offline"))
    wanted["double_quantization"] = not wanted.pop("no_double_quantization")
    given = wanted.pop("targets") or ""
    wanted["targets"] = tuple(part.strip() for part in given.split(",") if part.strip())
    plan = with_targets(FineTuningPlan(**wanted), known)
    estimated = estimate(arch, plan)
    usable = card.usable_bytes if card else None
    document, rows = as_dict(estimated, usable), lines(estimated, usable)
    if card:
        judged = verdict(arch, plan, card.usable_bytes, known)
        document |= {"gpu": card.name, "verdict": judged}
        rows += _judged(judged, card)
    if picture:
        from probe.training.memory.plot import draw

        draw(estimated, picture, (card.name, card.usable_bytes) if card else None)
    if measure:
        document["measured"], added = _measured(model, plan, measure, device, estimated.peak.total)
        rows += added
    return document, rows


def architecture(
    model: str, revision: str | None = None, offline: bool = False
) -> tuple[Architecture, tuple[str, ...]]:
    """The numbers of a model's configuration, and the layers that LoRA adapts by default. Raises ModelUnavailable."""
    from probe.training.outline import outline_for_training

    outline = outline_for_training(model, revision=revision, offline=offline)
    outline["parameters"] = tuple(outline["parameters"])
    known = outline.pop("adapted")
    kinds, chunk = outline.pop("kinds"), outline.pop("chunk")
    counted = None
    if outline["window"] or not outline["style"]:
        counted = ActivationCounter(model, outline["window"], kinds, chunk, outline["n_ctx"])
    return Architecture(**outline, counted=counted), known


def _rule(model: str, card: Gpu | None, options: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    count = parameter_count(model)
    if count is None:
        count = architecture(model, options["revision"], options["offline"])[0].n_params
    usable = card.usable_bytes if card else None
    rule = rule_of_thumb(count, usable)
    rows = [f"rule of thumb for {count:,} parameters in half precision"]
    rows += [
        f"  {name.removesuffix('_bytes'):12} {both(rule[name]):>24}" for name in rule if "_bytes" in name
    ]
    if card and usable is not None:
        rows.append(_margin(rule["fits"], usable - rule["total_bytes"], card))
    rows += ["what it leaves out:", *(f"  {words}" for words in HIDDEN)]
    return {"model": model, "rule_of_thumb": rule, "leaves_out": list(HIDDEN)}, rows


def _margin(fits: bool, margin: int, card: Gpu) -> str:
    seen = "as torch sees it" if card.seen else "nominal"
    word = f"fits, {both(margin)} to spare" if fits else f"does not fit: {both(-margin)} missing"
    return f"{card.name} ({both(card.usable_bytes)} {seen}): {word}"


def _judged(judged: dict[str, Any], card: Gpu) -> list[str]:
    rows = [_margin(judged["fits"], judged["margin_bytes"], card)]
    rows += [f"  would fit: {c['change']} ({both(c['total_bytes'])})" for c in judged["changes"]]
    if not judged["fits"] and not judged["changes"]:
        rows.append("  no single-GPU change makes it fit; shard it with --zero 3 --gpus N")
    for what in ("batch", "length"):
        largest = judged[f"largest_{what}"]
        rows.append(f"  largest {what}: {largest:,}" if largest else f"  no {what} fits")
    return rows


def _measured(
    model: str, plan: FineTuningPlan, how: str, device: str, estimated: int
) -> tuple[dict[str, Any], list[str]]:
    from probe.training.memory.tracker import real_step, tracked_step

    step = tracked_step(model, plan) if how == "tracked" else real_step(model, plan, device)
    step["estimate_bytes"] = estimated
    step["error"] = estimated / step["peak_bytes"] - 1
    words = (
        f"measured ({step['how']}): {both(step['peak_bytes'])}; the estimate is {step['error']:+.1%} from it"
    )
    return step, [words]
