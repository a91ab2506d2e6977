"""What everybody runs: the same prompts, as plans for us and as left-padded tokens for the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks import ours as engine

if TYPE_CHECKING:
    from probe.harness.plan import TaskPlan
    from probe.prompts import Prompt

SHORTEST, LONGEST = 200, 600
LONG_PROMPT = 7900
LONG_NEW = 16
CATALOGUE = 12


def length(plan: TaskPlan) -> int:
    """Tokens of a task's prompt."""
    return len(plan.prompts[0].token_ids)


@dataclass(frozen=True)
class Inputs:
    """Rendered tasks and how many tokens everybody generates for each."""

    plans: list[TaskPlan]
    n_new: int

    @property
    def prompts(self) -> list[Prompt]:
        return [plan.prompts[0] for plan in self.plans]

    @property
    def lengths(self) -> list[int]:
        return [length(plan) for plan in self.plans]

    def padded(self) -> tuple[Tensor, Tensor]:
        """Tokens and mask [sequence, position], padded on the left as `generate` wants it."""
        width = max(self.lengths)
        tokens = torch.zeros(len(self.plans), width, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(self.prompts):
            tokens[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask[row, width - len(prompt.token_ids) :] = 1
        return tokens, mask

    def first(self, n_tasks: int, n_new: int) -> Inputs:
        return Inputs(self.plans[:n_tasks], n_new)


def batch(ours: engine.Ours, size: int, n_new: int) -> Inputs:
    """`size` neighbours in length from the middle of the tool tasks with a prompt of 200 to 600 tokens.

    Neighbours, as batches are formed in a run: nobody pays for padding. Where a tokenizer has too few such
    prompts (a byte-level one), the shortest of the same tasks with two tools each, tersely described.
    """
    tasks = engine.shipped_tasks()
    plans = sorted(engine.render(ours, tasks, n_new), key=length)
    chosen = [plan for plan in plans if SHORTEST <= length(plan) <= LONGEST]
    if len(chosen) < size:
        shorter = [_terse(task, task.tools[:2]) for task in tasks]
        chosen = sorted(engine.render(ours, shorter, n_new), key=length)[:size]
    start = (len(chosen) - size) // 2
    return Inputs(chosen[start : start + size], n_new)


def few_tools(ours: engine.Ours) -> Prompt:
    """The shipped task with 4 tools whose prompt is of median length, the tools alone as candidates.

    Tersely described where a tokenizer makes it longer than 600 tokens.
    """
    tasks = [task for task in engine.shipped_tasks() if len(task.tools) == 4]
    plans = sorted(engine.render(ours, tasks, 1), key=length)
    median = plans[len(plans) // 2]
    task: Any = median.task
    if length(median) > LONGEST:
        median = engine.render(ours, [_terse(task, task.tools)], 1)[0]
    return engine.without_no_tool(median.prompts[0])


def _terse(task: Any, tools: Sequence[Any]) -> Any:
    return engine.tool_task(task.id, task.messages[-1].content, map(engine.terse, tools))


def many_tools(ours: engine.Ours, n_tools: int) -> Prompt:
    """`n_tools` of 45, tersely described: the catalogue, and tools whose names begin as those of the catalogue do."""
    tools = engine.shipped_tools()
    planted = [
        engine.terse(tool, suffix, f"As {tool.name}, {how}.")
        for suffix, how in (("_batch", "for a list of inputs"), ("_draft", "without carrying it out"))
        for tool in tools
    ]
    shown = [*map(engine.terse, tools), *planted][:n_tools]
    task = engine.tool_task("many", "How many litres are in 12 US gallons?", shown)
    return engine.without_no_tool(engine.render(ours, [task], 1)[0].prompts[0])


def one_catalogue(ours: engine.Ours, n_tasks: int) -> list[TaskPlan]:
    """`n_tasks` requests of users that all see the same 12 tools, tersely described, and no other system text.

    Terse descriptions make the shared part shorter, which is to the disadvantage of sharing it.
    """
    tools = [engine.terse(tool) for tool in engine.shipped_tools()[:CATALOGUE]]
    texts = [task.messages[-1].content for task in engine.shipped_tasks()]
    tasks = [engine.tool_task(f"same-{i}", texts[i % len(texts)], tools) for i in range(n_tasks)]
    return engine.render(ours, tasks, 1)


def long_prompt(ours: engine.Ours) -> Inputs:
    """One prompt of at most 7,900 tokens (less where the model's context is shorter), 16 new tokens."""
    limit = min(LONG_PROMPT, ours.model.facts.n_ctx - LONG_NEW)
    sentence = " ".join(task.messages[-1].content for task in engine.shipped_tasks()[:12])
    tools = engine.shipped_tools()[:4]

    def rendered(words: Sequence[str]) -> TaskPlan:
        return engine.render(ours, [engine.tool_task("long", " ".join(words), tools)], LONG_NEW)[0]

    words = sentence.split() * (1 + 2 * limit // len(sentence.split()))
    low, high = 1, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        plan = rendered(words[:middle])
        if length(plan) <= limit and not plan.prompts[0].truncation:
            low = middle
        else:
            high = middle - 1
    return Inputs([rendered(words[:low])], LONG_NEW)
