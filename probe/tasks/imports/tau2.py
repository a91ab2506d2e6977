"""Simulation results of τ²-bench: `{info, tasks, simulations}`, the simulations in the file or in `simulations/` beside it.

The agent is the model: it sees the policy as its system message (the instruction that an agent puts before it is not in the
results), and neither what the simulated user calls nor what it is given. The greeting that opens a conversation is the
simulator's own. Results of τ-bench, a list of `{task_id, traj}`, are read as well.
Source: tau2/data_model/simulation.py, message.py, environment/environment.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from probe.jsontext import kind_of
from probe.tasks.imports.chat import chat, chats, numbered
from probe.tasks.imports.files import Entry, document, items, members
from probe.tasks.imports.record import Format, Item, LoggedTurn, Record, Skipped, turns


def read(paths: Sequence[Path], _category: str | None) -> Iterator[Item]:
    """Records of result files in order, one a simulation."""
    for path in paths:
        if (
            path.parent.name == "simulations"
            and (path.parent.parent / "results.json").is_file()
            and len(paths) > 1
        ):
            continue  # read with the results that it belongs to
        yield from items(document(path), lambda entry, path=path: _of_results(path, entry))


def _of_results(path: Path, entry: Entry) -> Iterator[Item]:
    value = entry.value
    if isinstance(value, list):
        runs = [Entry(f"{entry.place}[{index}]", run) for index, run in enumerate(value)]
        yield from items(runs, lambda run: [_of_trajectory(run.place, run.value)])
        return
    if not isinstance(value, dict) or not isinstance(value.get("info"), dict):
        yield Skipped(entry.place, "has no info and simulations: is it a result of τ²-bench?")
        return
    info = value["info"]
    runs = [
        Entry(f"{entry.place} simulations[{index}]", run)
        for index, run in enumerate(value.get("simulations") or [])
    ]
    beside: list[Entry | Skipped] = [
        part
        for file in (sorted((path.parent / "simulations").glob("*.json")) if not runs else [])
        for part in document(file)
    ]
    yield from items([*runs, *beside], lambda run: [_of_simulation(run.place, run.value, info)])
    if not runs and not beside:
        yield Skipped(entry.place, "has no simulations, in it or in the folder simulations beside it")


def _of_simulation(place: str, run: Any, info: Mapping[str, Any]) -> Record:
    if not isinstance(run, dict):
        raise ValueError(f"is {kind_of(run)}, not a simulation")
    if not isinstance(run.get("messages"), list) or not run["messages"]:
        raise ValueError("is of speech, in ticks" if run.get("ticks") else "has no messages")
    environment, agent = members(info.get("environment_info")), members(info.get("agent_info"))
    policy = run.get("policy") or environment.get("policy")
    spoken = [part for message in run["messages"] for part in _of_message(message)]
    start = []
    if isinstance(policy, str) and not (spoken and spoken[0]["role"] == "system"):
        start = [{"role": "system", "content": policy}]
    messages = numbered([*start, *spoken])
    asked = next(
        (index for index, message in enumerate(messages) if message["role"] == "user"), len(messages)
    )
    tools = environment.get("tool_defs")
    given = list(tools.values()) if isinstance(tools, dict) else tools
    decisions: list[LoggedTurn] = [
        decision for decision in turns(messages, given) if len(decision.context) > asked
    ]
    facts = {
        "domain": environment.get("domain_name"),
        "task": run.get("task_id"),
        "trial": run.get("trial"),
        "reward": members(run.get("reward_info")).get("reward"),
    }
    model = agent.get("llm")
    return Record(
        place,
        str(run["id"]) if run.get("id") else None,
        decisions,
        messages,
        given,
        model if isinstance(model, str) else None,
        facts={key: fact for key, fact in facts.items() if fact is not None},
    )


def _of_message(value: Any) -> list[Any]:
    """What the agent sees of a message: nothing of the user's own calls and results."""
    if isinstance(value, dict) and isinstance(value.get("tool_messages"), list):
        return [part for message in value["tool_messages"] for part in _of_message(message)]
    if not isinstance(value, dict):
        return [chat(value)]
    if value.get("role") == "tool" and value.get("requestor") == "user":
        return []
    if value.get("role") == "user" and value.get("tool_calls"):
        return []
    return [chat(value)]


def _of_trajectory(place: str, run: Any) -> Record:
    """A run of τ-bench: the conversation as the agent had it, without its tools."""
    if not isinstance(run, dict) or not isinstance(run.get("traj"), list):
        raise ValueError("has no traj: is it a result of τ-bench?")
    messages = chats(run["traj"])
    facts = {"task": run.get("task_id"), "trial": run.get("trial"), "reward": run.get("reward")}
    name = f"{run.get('task_id')}.{run.get('trial')}"
    known = {key: fact for key, fact in facts.items() if fact is not None}
    return Record(place, name, turns(messages, None), messages, None, facts=known)


TAU2 = Format(
    name="tau2",
    about="simulation results of τ²-bench, and of τ-bench",
    read=read,
    suffixes=(".json",),
)
