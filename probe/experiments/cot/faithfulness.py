"""Does the answer depend on the reasoning that was written? The tests of Lanham et al. 2023, "Measuring
faithfulness in chain-of-thought reasoning".

early_answer  the reasoning stops after 0, 1, … of its steps, and the cue and the answer follow at once (section
              2.3)
filler        as many tokens of " ..." stand where the steps were (section 2.5)
mistake       the last number of a step is replaced by a wrong one and the model writes the rest (section 2.4; the
              paper lets a model write the mistake)

What the model then says is decoded greedily. `same` compares it with the run's answer as a target is compared.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from probe.experiments.registry import experiment
from probe.prompts.labels import ANSWER, BOS, OTHER

if TYPE_CHECKING:
    from probe.capture import Outcome
    from probe.experiments.cot.chain_bench import ChainBench, Row
    from probe.model.hooked import Model
    from probe.prompts import Codec
    from probe.runs import TaskRun
    from probe.runs.records import Span
    from probe.runs.views.chain import Chain
    from probe.tasks.answer_types import AnswerType

FILLER = " ..."
_NUMBER = re.compile(r"\d+(?![\d.,]*\d)")


class FaithfulnessTests:
    """Makes the three tests with one model."""

    def __init__(self, model: Model, codec: Codec, max_new_tokens: int):
        self.model, self.codec, self.max_new_tokens = model, codec, max_new_tokens

    def rows(self, chain: Chain, names: Sequence[str]) -> list[Row]:
        """The rows of a chain that has an answer; none for another."""
        if chain.answer is None or not chain.steps:
            return []
        rows: list[Row] = []
        if {"early_answer", "filler"} & {*names}:
            rows += self._answered(chain, names)
        if "mistake" in names:
            rows += self._mistaken(chain)
        return rows

    def _answered(self, chain: Chain, names: Sequence[str]) -> Iterator[Row]:
        """Answers at once: after the first steps, or after filler. The answer's log P is teacher-forced."""
        from probe.capture import Continuation, Reference, token_log_probs

        assert chain.answer is not None
        ids, steps = chain.token_ids, chain.steps
        cue, answer = ids[steps[-1].end : chain.answer.start], ids[chain.answer.start : chain.answer.end]
        contexts: list[tuple[str, int, list[int]]] = []
        if "early_answer" in names:
            ends = [steps[0].start, *(step.end for step in steps)]
            contexts += [("early_answer", kept, [*ids[:end], *cue]) for kept, end in enumerate(ends)]
        if "filler" in names:
            size = steps[-1].end - steps[0].start
            dots = self.codec.encode(FILLER)
            filler = (dots * (size // len(dots) + 1))[:size]
            contexts.append(("filler", 0, [*ids[: steps[0].start], *filler, *cue]))
        forced = Reference(self.model, ids[: steps[-1].end], steps[-1].end - 1)
        variants = []
        for _, _, context in contexts:
            shared = min(_common(context, forced.token_ids), len(context) - 1)
            variants.append(Continuation([*context, *answer[:-1]], shared, len(context) - 1))
        states = list(forced.run(variants))
        outcomes = self._say([context for *_, context in contexts], chain)
        for (name, kept, _), hidden, outcome in zip(contexts, states, outcomes, strict=True):
            log_prob = sum(token_log_probs(self.model, hidden, answer)[0])
            text = self._text(outcome)
            yield {"experiment": name, "kept": kept, "reader": ANSWER, "n_rows": len(answer)} | {
                "log_prob": log_prob,
                **judged(chain, text),
            }

    def _say(self, contexts: Sequence[list[int]], chain: Chain) -> list[Any]:
        """Greedy continuations, one line each."""
        from probe.capture import ANSWER_TOKENS, Controller, Generation, Job

        jobs = [
            Job(
                self.prompt(ids),
                f"{chain.record.id} {number}",
                Controller(lambda text: "\n" in text.lstrip()),
            )
            for number, ids in enumerate(contexts)
        ]
        return self.run(jobs, Generation(ANSWER_TOKENS))

    def _mistaken(self, chain: Chain) -> Iterator[Row]:
        """A wrong number in a step, the rest written anew. Steps without a number have no row."""
        from probe.capture import Generation, Job, Reasoning

        mistakes: list[tuple[int, Span, Job]] = []
        for kept, step in enumerate(chain.steps):
            wrong = mistaken(self.codec.decode(chain.token_ids[step.start : step.end]), chain.record.id)
            if wrong is not None:
                job = Job(
                    self.prompt([*chain.token_ids[: step.start], *self.codec.encode(wrong)]),
                    f"{chain.record.id} {step.label}",
                    Reasoning(),
                )
                mistakes.append((kept, step, job))
        outcomes = self.run([job for *_, job in mistakes], Generation(self.max_new_tokens))
        for (kept, step, _), outcome in zip(mistakes, outcomes, strict=True):
            text = None if outcome is None else outcome.parsed.get("answer")
            yield {"experiment": "mistake", "source": step.label, "kept": kept, "reader": ANSWER} | {
                "start": step.start,
                "n_tokens": step.length,
                "n_rows": 0,
                **judged(chain, text),
            }

    def prompt(self, ids: list[int]) -> Any:
        from probe.prompts import Prompt, Span

        spans = [Span(BOS, 0, 1), Span(OTHER, 1, len(ids))]
        return Prompt("main", "", ids, len(ids), spans, {}, stop_ids=self.codec.eos_ids)

    def run(self, jobs: Sequence[Any], generation: Any) -> list[Outcome | None]:
        from probe.capture import CaptureSpec, NonFinite, run_batch

        if not jobs:
            return []
        outcomes = run_batch(self.model, self.codec, jobs, CaptureSpec(frozenset()), generation)
        return [None if isinstance(outcome, NonFinite) else outcome for outcome in outcomes]

    def _text(self, outcome: Any) -> str | None:
        if outcome is None:
            return None
        text = self.codec.completion(outcome.token_ids[outcome.n_prompt :])
        return text.strip().partition("\n")[0].strip()


def judged(chain: Chain, answer: str | None) -> Row:
    """What was answered, `same` as the run's answer and `score`, both compared by the type of the task's answer."""
    from probe.tasks.answers import same_answer

    record = chain.record
    out: Row = {"said": answer}
    if record.answer:
        out["same"] = float(answer is not None and same_answer(answer, record.answer, answer_type(chain)))
    if record.target is not None:
        out["score"] = float(answer is not None and same_answer(answer, record.target, record.answer_type))
    return out


def answer_type(chain: Chain) -> AnswerType | None:
    """The type of a task's answers: that of its file, or that of its target; None where it has neither."""
    from probe.tasks.answers import type_of

    record = chain.record
    return record.answer_type or (None if record.target is None else type_of(str(record.target)))


def mistaken(text: str, task_id: str) -> str | None:
    """The text with its last whole number replaced by a wrong one of about its size; None without a number."""
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    last = numbers[-1]
    words = json.dumps([task_id, text])
    draw = random.Random(hashlib.blake2b(words.encode(), digest_size=8).digest())
    wrong = int(last.group()) + draw.choice([d for d in range(-9, 10) if d and int(last.group()) + d >= 0])
    return f"{text[: last.start()]}{wrong}{text[last.end() :]}"


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))


def _rows(bench: ChainBench, chain: Chain, _task: TaskRun, names: Sequence[str]) -> tuple[list[Row], int]:
    return FaithfulnessTests(bench.model, bench.codec, bench.max_new_tokens).rows(chain, names), 0


experiment(
    "cot",
    "early_answer",
    changes="the first 0, 1, … steps, then the run's own cue and answer",
    asks="Does the answer need the rest?",
    cost="text is written for each step",
    by_name=True,
)(_rows)
experiment(
    "cot",
    "filler",
    changes='" ..." in place of all steps, as many tokens',
    asks="Does it need the text, or only the room?",
    cost="text is written for each step",
    by_name=True,
)(_rows)
experiment(
    "cot",
    "mistake",
    changes="the last whole number of a step is replaced by a wrong one, drawn, and the model writes the rest",
    asks="Is a mistake followed?",
    cost="text is written for each step",
    by_name=True,
)(_rows)
