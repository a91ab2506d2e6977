"""Tasks for the planted models, and the same tasks changed."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from probe.prompts import Codec, Prompt
from probe.tasks import read_tasks, render

KEYS = ("alpha", "beta", "gamma", "delta", "kappa", "sigma", "theta", "omega")
NAMES = ("tovex", "mirlo", "bakun", "quell", "drast", "fimbo", "gelp", "hosk")


def rendered(codec: Codec, tasks: Sequence[Mapping[str, Any]]) -> list[Prompt]:
    """The prompts of task lines."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "tasks.jsonl"
        file.write_text("".join(json.dumps(task) + "\n" for task in tasks))
        read = read_tasks(file, None).tasks
    return [prompt for task in read for prompt in render(task, codec, max_new_tokens=1)]


# -- made ----------------------------------------------------------------------------------------------------------

_VERBS = ("Handles", "Finds and sorts", "Answers every question on", "Keeps", "Looks up and then reports")
_TAILS = ("records.", "matters of the office.", "figures, old and new alike.", "files for the whole house.")
_REQUESTS = (
    "Please look up the newest {} figures for me.",
    "I would like to hear about the {} records.",
    "Could you sort out my {} files today?",
    "There is a question, it is on {} matters.",
)
Pairs = Callable[[random.Random, str, str, int], list[tuple[str, str]]]


def matching_tasks(names: Sequence[str], pairs: Pairs, n: int = 48) -> tuple[dict[str, Any], ...]:
    """Tasks with three or four tools; target name, keyword, slot and request are balanced and drawn apart."""
    rng = random.Random(0)
    wanted = _shuffled(rng, names, n), _shuffled(rng, KEYS, n), _shuffled(rng, _REQUESTS, n)
    slots = _shuffled(rng, [(k, slot) for k in (3, 4) for slot in range(k) for _ in range(12 // k)], n)
    tasks = []
    for index, (name, key, request, (k, slot)) in enumerate(zip(*wanted, slots, strict=True)):
        (name, key_word), *rest = pairs(rng, name, key, k)
        rest.insert(slot, (name, key_word))
        tools = [_tool(rng, *pair) for pair in rest]
        tasks.append(_task(f"t{index:02}", request.format(key), tools, name))
    return tuple(tasks)


def _shuffled(rng: random.Random, items: Sequence[Any], n: int) -> list[Any]:
    out = [items[i % len(items)] for i in range(n)]
    rng.shuffle(out)
    return out


def random_pairs(rng: random.Random, name: str, key: str, k: int) -> list[tuple[str, str]]:
    """(name, keyword of its description), the target first: names say nothing about keywords."""
    names = rng.sample([other for other in NAMES if other != name], k - 1)
    keys = rng.sample([other for other in KEYS if other != key], k - 1)
    return [(name, key), *zip(names, keys, strict=True)]


def contrary_pairs(rng: random.Random, name: str, key: str, k: int) -> list[tuple[str, str]]:
    """The target's name belongs to the keyword of the request, which stands in another tool's description."""
    keys = [key, *rng.sample([other for other in KEYS if other != key], k - 1)]
    return [(f"{name_key}_desk", text_key) for name_key, text_key in zip(keys, [*keys[1:], key], strict=True)]


def state_tasks(states: Sequence[str], tools: Sequence[str], n: int = 40) -> tuple[dict[str, Any], ...]:
    rng = random.Random(0)
    words = zip(_shuffled(rng, states, n), _shuffled(rng, _REQUESTS, n), strict=True)
    tasks = []
    for index, (state, request) in enumerate(words):
        shown = rng.sample([_plain_tool(name) for name in tools], len(tools))
        tasks.append(
            _task(f"t{index:02}", request.format(state), shown, tools[0]) | {"metadata": {"state": state}}
        )
    return tuple(tasks)


def _task(name: str, request: str, tools: list[dict[str, Any]], target: str) -> dict[str, Any]:
    return {"id": name, "kind": "tool_selection", "input": request, "tools": tools, "target": target}


def _tool(rng: random.Random, name: str, key: str) -> dict[str, Any]:
    description = f"{rng.choice(_VERBS)} {key} {rng.choice(_TAILS)}"
    properties = {"item": {"type": "string"}} if rng.random() < 0.5 else {}
    parameters = {"type": "object", "properties": properties}
    return {"name": name, "description": description, "parameters": parameters}


def _plain_tool(name: str) -> dict[str, Any]:
    return {"name": name, "description": "Does what it does."}


# -- changed tasks -------------------------------------------------------------------------------------------------


def swapped(task: Mapping[str, Any], first: str, other: str) -> dict[str, Any]:
    """Description and parameters of two tools exchanged; names stay."""
    by_name = {tool["name"]: tool for tool in task["tools"]}
    give = {first: by_name[other], other: by_name[first]}
    return {**task, "tools": [{**give.get(t["name"], t), "name": t["name"]} for t in task["tools"]]}


def renamed(task: Mapping[str, Any], name: str, new: str) -> dict[str, Any]:
    tools = [{**tool, "name": new} if tool["name"] == name else tool for tool in task["tools"]]
    return {**task, "tools": tools, "target": new if task["target"] == name else task["target"]}


def reordered(task: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    by_name = {tool["name"]: tool for tool in task["tools"]}
    return {**task, "tools": [by_name[name] for name in names]}


def removed(task: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The tool is not shown; a task whose target it was has no target."""
    tools = [tool for tool in task["tools"] if tool["name"] != name]
    return {**task, "tools": tools, "target": None if task["target"] == name else task["target"]}


def with_request(task: Mapping[str, Any], text: str) -> dict[str, Any]:
    return {**task, "input": text}
