"""P(action | state) = Σ_I P(action | I) P(I | state): what the model says it wants, then what it does.

In the assistant's turn, behind a cue, the model states an intention; the call opener follows and the tools are scored.
The intention stands in the same context, so the sum over all intentions is the law of total probability for that
context, and each condition holds one P(action | I). Drawn intentions come from the model at temperature 1, untruncated,
so that their mean is unbiased; listed ones (`intentions` of a task) are each scored, and the sum over them is exact up
to the mass that they leave out.

A number that depends on the intentions depends on what they say only if others do not give it as well. So every drawn
intention has two controls, scored in its place: as many random tokens, and what was drawn for another task.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from probe.experiments.tool.conditions import Condition, Effort, Subject
from probe.experiments.tool.score import batches
from probe.prompts import Candidate, Codec, Prompt, continued

if TYPE_CHECKING:
    from probe.capture import Generation, Job, NonFinite, Outcome
    from probe.experiments.tool.score import Scorer
    from probe.model.hooked import Model

LEAD = "To answer this, I need to"
"""Behind it the default model goes on with a plan: the best of three on tasks of the dev half (docs/tool-use.md)."""
END = "\n"
"""What closes an intention that ends otherwise."""
MOST_TOKENS = 24
"""An intention that is not closed by then ends there, wherever it is drawn."""
FIRST_DRAWS = 8
"""Intentions that are drawn of each task before it is known how many more its standard error needs."""
DRAWN, ENUMERATED, RANDOM, OTHER_TASK = "drawn", "enumerated", "random", "other_task"
"""Kinds of intentions; the last two are controls of what is drawn."""


@dataclass(frozen=True)
class Intention:
    """An intention as it stands behind the cue."""

    token_ids: list[int]
    log_prob: float | None
    """log P(I | state), nats; None for a control."""
    kind: str
    """One of the kinds above."""


def is_closed(text: str) -> bool:
    """Whether an intention is over: at the end of its line or sentence, once it has a word."""
    # The point of a decimal or an abbreviation ends none; at the end of the text so far it may be one.
    return re.search(r"[^\W\d_].*?(?:\n|[.!?]\s|(?<!\d)(?<!\b\w)[.!?]\Z)", text, re.DOTALL) is not None


class IntentionWriter:
    """Makes a model state intentions, those of several tasks together, as many as a standard error asks for."""

    def __init__(self, model: Model, codec: Codec, effort: Effort, scorer: Scorer):
        self.model, self.codec, self.effort, self.scorer = model, codec, effort, scorer
        self._ordinary = sorted(set(codec.tokenizer.get_vocab().values()) - codec.special_ids - codec.eos_ids)

    def conditions(self, subjects: Sequence[Subject]) -> list[list[Condition]]:
        """The conditions of each task; none where the prompt leaves no room for an intention."""
        before = [continued(subject.prompt, self.codec, [LEAD], opener=False) for subject in subjects]
        conditions: list[list[Condition]] = [[] for _ in subjects]
        drawing: dict[int, Prompt] = {}
        for number, (subject, prompt) in enumerate(zip(subjects, before, strict=True)):
            if prompt is None:
                continue
            if subject.task.intentions:
                listed = self._listed(subject, prompt)
                conditions[number] = [c for i in listed if (c := self._condition(prompt, i)) is not None]
            else:
                drawing[number] = prompt
        drawn: dict[int, list[Intention | None]] = {number: [] for number in drawing}
        wanted = dict.fromkeys(drawing, self.effort.draws or FIRST_DRAWS)
        while any(wanted.values()):
            for number, intention in self._drawn(subjects, drawing, drawn, wanted):
                drawn[number].append(intention)
                condition = None if intention is None else self._condition(drawing[number], intention)
                if condition is not None:
                    conditions[number].append(condition)
            conditions = self._scored(subjects, conditions)
            wanted = {
                number: more_draws(self.effort, _laws(conditions[number]))
                for number in drawing
                if self.effort.draws is None and len(drawn[number]) == FIRST_DRAWS
            }
        for number, prompt in drawing.items():
            conditions[number] += self._controls(subjects, number, prompt, drawn)
        return conditions

    def _condition(self, before: Prompt, intention: Intention) -> Condition | None:
        """The prompt with the intention stated, up to the slot."""
        text = self.codec.decode(intention.token_ids)
        ending = [intention.token_ids, *([] if text.endswith(END) else [END])]
        prompt = continued(before, self.codec, ending, opener=True)
        if prompt is None:
            return None
        detail: dict[str, str | bool] = {"text": text.strip(), "kind": intention.kind}
        if intention.kind == DRAWN and len(intention.token_ids) == MOST_TOKENS and not is_closed(text + " "):
            detail["cut"] = True
        return Condition("intention", prompt, detail=detail, weight=intention.log_prob)

    def _drawn(
        self,
        subjects: Sequence[Subject],
        prompts: dict[int, Prompt],
        drawn: dict[int, list[Intention | None]],
        wanted: dict[int, int],
    ) -> list[tuple[int, Intention | None]]:
        """So many more draws of each task, the first with the next random stream of the task."""
        from probe.capture import Controller, Generation, Job, Outcome

        numbered = [
            (
                number,
                replace(prompts[number], passage=f"intention:{len(drawn[number]) + draw}", candidates=()),
            )
            for number, more in wanted.items()
            for draw in range(more)
        ]
        jobs = [Job(prompt, subjects[number].task.id, Controller(is_closed)) for number, prompt in numbered]
        drawing = Generation(MOST_TOKENS, temperature=1.0, seed=self.effort.seed)
        intentions: list[tuple[int, Intention | None]] = []
        for (number, _), outcome in zip(numbered, self._run(jobs, drawing, "log_probs"), strict=True):
            if not isinstance(outcome, Outcome):
                intentions.append((number, None))
                continue
            new = outcome.token_ids[outcome.n_prompt :]
            # The probability of a turn's end counts, but nothing follows it.
            kept = new[:-1] if new and outcome.finish_reason == "eos" else new
            log_prob = float(outcome.tensors["log_probs"].double().sum())
            intentions.append((number, Intention(kept, log_prob, DRAWN)))
        return intentions

    def _scored(
        self, subjects: Sequence[Subject], conditions: Sequence[Sequence[Condition]]
    ) -> list[list[Condition]]:
        """The same conditions with what their candidates score: how many more are needed depends on it."""
        flat = [
            (subject.task.id, condition)
            for subject, of_task in zip(subjects, conditions, strict=True)
            for condition in of_task
        ]
        outcomes = iter(self.scorer.outcomes(flat))
        return [
            [replace(condition, outcome=next(outcomes)) for condition in of_task] for of_task in conditions
        ]

    def _controls(
        self,
        subjects: Sequence[Subject],
        number: int,
        before: Prompt,
        drawn: dict[int, list[Intention | None]],
    ) -> list[Condition]:
        """In place of the first drawn intentions as many random tokens each, and as many that were drawn for the next tasks."""
        draw = subjects[number].random("random intention")
        stated = [intention for intention in drawn[number][:FIRST_DRAWS] if intention is not None]
        texts = [
            Intention(draw.choices(self._ordinary, k=max(1, len(intention.token_ids))), None, RANDOM)
            for intention in stated
        ]
        next_tasks = (*range(number + 1, len(subjects)), *range(number))
        others = [other for n in next_tasks for other in drawn.get(n, ()) if other is not None]
        texts += [replace(other, log_prob=None, kind=OTHER_TASK) for other in others[: len(stated)]]
        return [c for intention in texts if (c := self._condition(before, intention)) is not None]

    def _listed(self, subject: Subject, before: Prompt) -> list[Intention]:
        """Each listed intention with its closing mark, scored as the candidates of one prompt."""
        from probe.capture import Generation, Job, Outcome

        texts = subject.task.intentions or ()
        ids = [self.codec.encode(f"{text.strip()}{END}") for text in texts]
        candidates = tuple(Candidate(text, tuple(tokens)) for text, tokens in zip(texts, ids, strict=True))
        job = Job(replace(before, candidates=candidates), subject.task.id)
        (outcome,) = self._run([job], Generation(1))
        if not isinstance(outcome, Outcome):
            return []
        return [
            Intention(tokens, log_prob, ENUMERATED)
            for tokens, log_prob in zip(ids, outcome.candidate_log_probs, strict=True)
        ]

    def _run(self, jobs: Sequence[Job], generation: Generation, *sites: str) -> list[Outcome | NonFinite]:
        """Outcomes in the order of the jobs. The cache of the batches goes with the call: scoring has one of its own."""
        from probe.capture import Capturer, CaptureSpec, plan_shared

        capturer = Capturer(
            self.model, self.codec, CaptureSpec(frozenset(sites)), generation, self.scorer.prefixes
        )
        outcomes: dict[int, Outcome | NonFinite] = {}
        for batch in batches(self.model, jobs, plan_shared(jobs)):
            capturer.run(
                [jobs[index] for index in batch],
                lambda number, outcome, batch=batch: outcomes.__setitem__(batch[number], outcome),
            )
        return [outcomes[index] for index in range(len(jobs))]


def more_draws(effort: Effort, conditional: np.ndarray) -> int:
    """Draws that are missing until the mean of [draw, candidate] probabilities has the standard error that is asked for.

    By the variance of the first draws alone (Stein 1945, two stages), of the candidate whose probability varies most; at most
    `effort.most_draws` in all.
    """
    n = len(conditional)
    if n < 2:
        return 0
    wanted = math.ceil(conditional.var(0, ddof=1).max() / effort.standard_error**2)
    return max(0, min(wanted, effort.most_draws) - n)


def _laws(conditions: Sequence[Condition]) -> np.ndarray:
    """P(candidate | I) of each condition that has finite scores, [condition, candidate]."""
    from probe.capture import Outcome
    from probe.tasks.choice import tool_probabilities

    laws = [
        [
            entry["probability"]
            for entry in tool_probabilities(c.prompt, o.candidate_token_log_probs, o.opener_log_prob)
        ]
        for c in conditions
        if isinstance(o := c.outcome, Outcome)
    ]
    return np.array(laws)
