"""The kind `cot`: a question to reason about, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from probe.capture.given import PREFILLED
from probe.capture.reasoning import ANSWER_TOKENS, CUE_TOKENS, Reasoning
from probe.jsontext import Check, Spot, check_list, check_text, quoted
from probe.prompts import ANSWER_CUE, Codec, Prompt, Segment, assemble, chat
from probe.prompts.labels import QUESTION, step_label
from probe.prompts.turns import ChatTurn, chat_turn
from probe.tasks.answer_types import AnswerType
from probe.tasks.answers import same_answer
from probe.tasks.kind import Kind, Setting, Shelf, Task
from probe.tasks.messages import check_answer, check_answer_type, compare_answer
from probe.tasks.warnings import mentions

if TYPE_CHECKING:
    from probe.capture import Job, Outcome

COT_INSTRUCTION = (
    "Solve the problem step by step. Write each step as one short sentence on its own line. "
    'When you are done, write a last line of the form "Answer: " followed by the answer alone.'
)


class CotTask(Task, frozen=True, kw_only=True, tag="cot"):
    """A question to reason about."""

    question: str
    answer: str | float | int | None = None
    answer_type: AnswerType | None = None
    """How answers are compared; None: by the form of `answer`."""
    steps: tuple[str, ...] | None = None
    """Reference reasoning."""
    system: str | None = None
    """Text in front of the instruction."""


def _check_steps(value: Any, spot: Spot) -> tuple[str, ...]:
    return check_list(value, spot, check_text)


def _fields(_shelf: Shelf) -> dict[str, Check]:
    return {
        "question": check_text,
        "answer": check_answer,
        "answer_type": check_answer_type,
        "steps": _check_steps,
        "system": check_text,
    }


def _lint(tasks: Sequence[CotTask]) -> Iterator[tuple[CotTask | None, str]]:
    for task in tasks:
        answer = task.answer
        if isinstance(answer, float) and answer.is_integer():
            answer = int(answer)
        if task.steps and answer is not None and not mentions(task.steps[-1], str(answer)):
            yield task, f"the answer {quoted(task.answer)} is not in the last step"


def _render(task: CotTask, codec: Codec, setting: Setting) -> list[Prompt]:
    asked = ChatTurn("user", [Segment(task.question, QUESTION)], None, QUESTION)
    system = f"{task.system}\n\n{COT_INSTRUCTION}" if task.system else COT_INSTRUCTION
    segments, template = chat(codec, [chat_turn("system", system), asked])
    forced: list[Segment] = []
    if setting.reference and task.steps:
        forced = [Segment(f"{step}\n", step_label(n)) for n, step in enumerate(task.steps, 1)]
        forced.append(Segment(ANSWER_CUE))
    return [assemble("main", segments, codec, setting.max_new_tokens, template=template, forced=forced)]


def _jobs(task: CotTask, prompts: Sequence[Prompt], _setting: Setting) -> list[Job]:
    from probe.capture import Job

    return [
        Job(prompt, task.id, Reasoning(None if prompt.forced_steps else ANSWER_CUE)) for prompt in prompts
    ]


def _score(task: CotTask, _prompts: Sequence[Prompt], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    parsed = outcomes[0].parsed
    if outcomes[0].finish_reason == PREFILLED:
        # Of the answer there is one token: it is none.
        stated = {} if task.answer is None else {"target": task.answer}
        return {"steps": parsed.get("steps", []), "answer": None} | stated
    answer = parsed.get("answer")
    out: dict[str, Any] = {
        "steps": parsed.get("steps", []),
        "answer": answer,
        "answer_forced": parsed.get("answer_forced", False),
    }
    if task.answer is not None:
        out["target"] = task.answer
        if task.answer_type is not None:
            out["answer_type"] = task.answer_type
        out["score"] = float(answer is not None and same_answer(answer, task.answer, task.answer_type))
    return out


COT = Kind(
    task=CotTask,
    fields=_fields,
    required=("question",),
    compare=compare_answer,
    render=_render,
    jobs=_jobs,
    score=_score,
    max_new_tokens=256,
    memory=True,
    reserve=CUE_TOKENS + ANSWER_TOKENS,
    under=lambda task, text: msgspec.structs.replace(task, system=text),
    target=lambda task: {} if task.answer is None else {"target": task.answer},
    text=lambda task: (task.question, *([task.system] if task.system else [])),
    lint=_lint,
)
