"""The kind `prompting`: one input under several prompts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from probe.jsontext import (
    Check,
    Spot,
    check_distinct,
    check_fields,
    check_list,
    check_string,
    check_text,
    check_type,
    kind_of,
    nearest,
    quoted,
)
from probe.prompts import Codec, Prompt, Segment, assemble, chat, choice_candidates
from probe.prompts.labels import BASE, SYSTEM, USER, example_label
from probe.prompts.turns import ChatTurn, Turns, chat_turn
from probe.tasks.kind import Kind, Setting, Shelf, Task
from probe.tasks.messages import Message, check_choices, check_messages, text_of
from probe.tasks.passages import passage_record, softmax
from probe.tasks.warnings import unbalanced

if TYPE_CHECKING:
    from probe.capture import Outcome


class Pair(msgspec.Struct, frozen=True):
    """One worked example of a prompting variant."""

    input: str
    output: str


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """One way to prompt; all fields but the name absent is the reference, `base`."""

    name: str
    """1 to 64 of the characters A-Z a-z 0-9 _ . -: it prefixes names of tensors."""
    system: str | None = None
    examples: tuple[Pair, ...] = ()
    prefix: str | None = None
    suffix: str | None = None
    labels: Mapping[str, str] = {}
    """Choice → the text that stands for it under this variant, in examples and when it is scored."""


class PromptingTask(Task, frozen=True, kw_only=True, tag="prompting"):
    """One input under several prompts."""

    input: str | tuple[Message, ...]
    """A string is rendered raw; messages go through the chat template."""
    variants: tuple[Variant, ...] = (Variant(name=BASE),)
    """`base` is always among them."""
    choices: tuple[str, ...] | None = None
    target: str | None = None
    """One of `choices`."""


# -- fields -----------------------------------------------------------------------------------------------


def _check_input(value: Any, spot: Spot) -> Any:
    if isinstance(value, list):
        return check_messages(value, spot)
    if isinstance(value, str):
        return check_text(value, spot)
    fix = "write the text, or messages with role and content"
    spot.fault(f"must be a string or a list of messages, is {kind_of(value)}", fix)


def _check_pair(value: Any, spot: Spot) -> Pair:
    fields = check_fields(value, spot, _PAIR, _PAIR)
    return Pair(fields.get("input", ""), fields.get("output", ""))


def _check_examples(value: Any, spot: Spot) -> tuple[Pair, ...]:
    return check_list(value, spot, _check_pair, at_least=0)


def _check_variant_name(value: Any, spot: Spot) -> Any:
    # "." and ".." would turn the prefix of a tensor's name into a step through directories.
    if check_type(value, str, spot) and not re.fullmatch(r"(?!\.{1,2}\Z)[A-Za-z0-9_.-]{1,64}", value):
        spot.fault(
            f"{quoted(value)} cannot name a variant", "use 1 to 64 of the characters A-Z a-z 0-9 _ . -"
        )
    return value


def _check_labels(value: Any, spot: Spot) -> Any:
    if check_type(value, dict, spot):
        for choice, label in value.items():
            check_text(label, spot[choice])
    return value


def _check_variant(value: Any, spot: Spot) -> Variant:
    fields = check_fields(value, spot, _VARIANT, ["name"])
    if fields.get("name") == BASE and any(fields[name] for name in fields if name != "name"):
        spot.fault('"base" is the reference, which adds nothing', "give this variant another name")
    return Variant(**{"name": "", **fields})


def _check_variants(value: Any, spot: Spot) -> tuple[Variant, ...]:
    variants = check_list(value, spot, _check_variant, at_least=0)
    names = [variant.name or None for variant in variants]
    check_distinct(names, spot, "names two variants", "rename one", under="name")
    return variants if BASE in names else (Variant(name=BASE), *variants)


def _compare_choices(fields: Mapping[str, Any], spot: Spot) -> None:
    target, choices = fields.get("target"), fields.get("choices")
    if not isinstance(target, str):
        return
    if choices is None:
        spot["target"].fault("there are no choices that it could be one of", 'add "choices", or leave it out')
    elif target not in choices and (texts := tuple(text for text in choices if isinstance(text, str))):
        fix = f"the nearest is {quoted(nearest(target, texts))}"
        spot["target"].fault(f"{quoted(target)} is not one of the choices", fix)


def _compare_labels(fields: Mapping[str, Any], spot: Spot) -> None:
    """Labels stand for choices, each for one. `base` may have been put first without being in the file."""
    choices = tuple(text for text in fields.get("choices") or () if isinstance(text, str))
    for variant in fields.get("variants") or ():
        labels = variant.labels if isinstance(variant.labels, dict) else {}
        for choice in labels:
            if choice not in choices:
                fix = f"the nearest is {quoted(nearest(choice, choices))}" if choices else 'add "choices"'
                spot["variants"].fault(f"{variant.name} labels {quoted(choice)}, which is no choice", fix)
        words = [labels.get(choice, choice) for choice in choices]
        if labels and len({str(text) for text in words}) < len(words):
            spot["variants"].fault(
                f"{variant.name} says two choices with one text", "give each a label of its own"
            )


_PAIR: dict[str, Check] = {"input": check_string, "output": check_string}
_VARIANT: dict[str, Check] = {
    "name": _check_variant_name,
    "system": check_string,
    "examples": _check_examples,
    "prefix": check_string,
    "suffix": check_string,
    "labels": _check_labels,
}


def _fields(_shelf: Shelf) -> dict[str, Check]:
    return {
        "input": _check_input,
        "variants": _check_variants,
        "choices": check_choices,
        "target": check_string,
    }


def _compare(fields: dict[str, Any], spot: Spot) -> None:
    _compare_choices(fields, spot)
    _compare_labels(fields, spot)


def _lint(tasks: Sequence[PromptingTask]) -> Iterator[tuple[PromptingTask | None, str]]:
    for task in tasks:
        for short in task.choices or ():
            for long in task.choices or ():
                if long != short and long.startswith(short):
                    yield (
                        task,
                        f"choice {quoted(short)} begins {quoted(long)}: one token may not tell them apart",
                    )
    aimed = [task for task in tasks if task.target is not None]
    options = {choice for task in aimed for choice in task.choices or ()}
    for warning in unbalanced("prompting", [str(task.target) for task in aimed], options):
        yield None, warning


# -- prompts ----------------------------------------------------------------------------------------------


def _render(task: PromptingTask, codec: Codec, setting: Setting) -> list[Prompt]:
    return [_prompt(task, variant, codec, setting.max_new_tokens) for variant in task.variants]


def _prompt(task: PromptingTask, variant: Variant, codec: Codec, max_new_tokens: int) -> Prompt:
    if isinstance(task.input, str):
        segments = []
        if variant.system:
            segments += [Segment(variant.system, SYSTEM), Segment("\n\n")]
        for number, pair in enumerate(variant.examples, 1):
            output = variant.labels.get(pair.output, pair.output)
            segments.append(Segment(f"{pair.input}{output}\n", example_label(number)))
        segments.append(Segment(f"{variant.prefix or ''}{task.input}{variant.suffix or ''}", USER))
        template = {"name": "raw", "fallback": None}
    else:
        segments, template = chat(codec, _variant_messages(task.input, variant))
    words = [variant.labels.get(choice, choice) for choice in task.choices or ()]
    choices = tuple(
        replace(candidate, name=choice)
        for choice, candidate in zip(
            task.choices or (), choice_candidates(words, segments[-1], codec), strict=True
        )
    )
    return assemble(variant.name, segments, codec, max_new_tokens, template=template, candidates=choices)


def _variant_messages(messages: Sequence[Message], variant: Variant) -> Turns:
    turns: Turns = []
    given = [m for m in messages if m.role == "system"]
    system = variant.system or (given[0].content if given else None)
    if system:
        turns.append(chat_turn("system", system))
    for number, pair in enumerate(variant.examples, 1):
        output = variant.labels.get(pair.output, pair.output)
        turns.append(ChatTurn("user", [Segment(pair.input, example_label(number))]))
        turns.append(ChatTurn("assistant", [Segment(output, example_label(number))]))
    rest = [m for m in messages if m.role != "system"]
    last_user = max((i for i, m in enumerate(rest) if m.role == "user"), default=-1)
    for index, message in enumerate(rest):
        turn = message.turn()
        if index == last_user and (variant.prefix or variant.suffix):
            turn = chat_turn("user", f"{variant.prefix or ''}{message.content}{variant.suffix or ''}")
        turns.append(turn)
    return turns


# -- records ----------------------------------------------------------------------------------------------


def _score(task: PromptingTask, prompts: Sequence[Prompt], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    passages: dict[str, Any] = {}
    scores = []
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        passage = passage_record(prompt, outcome)
        if prompt.candidates:
            probabilities = softmax(outcome.candidate_log_probs)
            passage["choice_probabilities"] = [
                {"choice": c.name, "token_ids": list(c.token_ids), "log_prob": log_prob, "probability": p}
                for c, log_prob, p in zip(
                    prompt.candidates, outcome.candidate_log_probs, probabilities, strict=True
                )
            ]
            best = max(passage["choice_probabilities"], key=lambda entry: entry["log_prob"])
            passage["chosen"] = best["choice"]
            passage["candidate_mass"] = math.fsum(math.exp(value) for value in outcome.candidate_log_probs)
            if task.target is not None:
                passage["score"] = float(best["choice"] == task.target)
                scores.append(passage["score"])
        passages[prompt.passage] = passage
    out: dict[str, Any] = {"passages": passages}
    if task.target is not None:
        out["target"] = task.target
    if scores:
        out["score"] = sum(scores) / len(scores)
    return out


PROMPTING = Kind(
    task=PromptingTask,
    fields=_fields,
    required=("input", "variants"),
    compare=_compare,
    render=_render,
    score=_score,
    max_new_tokens=8,
    several=True,
    target=lambda task: {} if task.target is None else {"target": task.target},
    text=lambda task: (text_of(task.input),),
    lint=_lint,
)
