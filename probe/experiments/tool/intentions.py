"""P(action | state) = Σ_I P(action | I) P(I | state): what the model says it wants, then what it does.

In the assistant's turn, after a fixed lead, the model states an intention; the call opener follows and the
tools are scored. The intention stands in the same context, so the sum over all intentions is the law of total
probability for that context, and each condition holds one P(action | I). Drawn intentions come from the model
at temperature 1, untruncated, so that their mean is unbiased; listed ones (`intentions` of a task) are each
scored, and the sum over them is exact up to the mass that they leave out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from probe.experiments.tool.conditions import Condition, Effort, Subject
from probe.experiments.tool.score import batches
from probe.prompts import Candidate, Codec, Prompt, continued

if TYPE_CHECKING:
    from probe.capture import Generation, Job, NonFinite, Outcome
    from probe.capture.prefixes import Prefixes
    from probe.model.hooked import Model

LEAD = "My plan in one line:\n"
END = "\n"
"""What closes an intention."""
MOST_TOKENS = 16
"""An intention that is not closed by then ends there, wherever it is drawn."""


@dataclass(frozen=True)
class Intention:
    """One intention and log P(I | state), nats."""

    token_ids: list[int]
    log_prob: float
    kind: str
    """`drawn` or `enumerated`."""


class IntentionWriter:
    """Makes a model state intentions, those of several tasks together."""

    def __init__(self, model: Model, codec: Codec, effort: Effort, prefixes: Prefixes):
        self.model, self.codec, self.effort, self.prefixes = model, codec, effort, prefixes

    def conditions(self, subjects: Sequence[Subject]) -> list[list[Condition]]:
        """The conditions of each task; none where the prompt leaves no room for an intention."""
        before = [continued(subject.prompt, self.codec, [LEAD], opener=False) for subject in subjects]
        drawn = [
            (number, replace(prompt, passage=f"intention:{draw}", candidates=()))
            for number, (subject, prompt) in enumerate(zip(subjects, before, strict=True))
            if prompt is not None and not subject.task.intentions
            for draw in range(self.effort.draws)
        ]
        intentions: list[list[Intention]] = [[] for _ in subjects]
        for (number, _), intention in zip(drawn, self._drawn(subjects, drawn), strict=True):
            if intention is not None:
                intentions[number].append(intention)
        for number, (subject, prompt) in enumerate(zip(subjects, before, strict=True)):
            if prompt is not None and subject.task.intentions:
                intentions[number] = self._listed(subject, prompt)
        return [
            [
                condition
                for intention in of_task
                if (condition := self._condition(prompt, intention)) is not None
            ]
            if prompt is not None
            else []
            for prompt, of_task in zip(before, intentions, strict=True)
        ]

    def _condition(self, before: Prompt, intention: Intention) -> Condition | None:
        """The prompt with the intention stated, up to the slot."""
        text = self.codec.decode(intention.token_ids)
        ending = [intention.token_ids, *([] if text.endswith(END) else [END])]
        prompt = continued(before, self.codec, ending, opener=True)
        if prompt is None:
            return None
        detail = {"text": text.strip(), "kind": intention.kind}
        return Condition("intention", prompt, detail=detail, weight=intention.log_prob)

    def _drawn(
        self, subjects: Sequence[Subject], drawn: Sequence[tuple[int, Prompt]]
    ) -> list[Intention | None]:
        from probe.capture import Controller, Generation, Job, Outcome

        jobs = [
            Job(prompt, subjects[number].task.id, Controller(lambda text: END in text))
            for number, prompt in drawn
        ]
        drawing = Generation(MOST_TOKENS, temperature=1.0, seed=self.effort.seed)
        outcomes = self._run(jobs, drawing, "log_probs")
        intentions: list[Intention | None] = []
        for outcome in outcomes:
            if not isinstance(outcome, Outcome):
                intentions.append(None)
                continue
            new = outcome.token_ids[outcome.n_prompt :]
            if (
                new and outcome.finish_reason == "eos"
            ):  # its probability counts, but nothing follows a turn's end
                new = new[:-1]
            intentions.append(Intention(new, float(outcome.tensors["log_probs"].double().sum()), "drawn"))
        return intentions

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
            Intention(tokens, log_prob, "enumerated")
            for tokens, log_prob in zip(ids, outcome.candidate_log_probs, strict=True)
        ]

    def _run(self, jobs: Sequence[Job], generation: Generation, *sites: str) -> list[Outcome | NonFinite]:
        """Outcomes in the order of the jobs. The cache of the batches goes with the call: scoring has one of its own."""
        from probe.capture import Capturer, CaptureSpec, plan_shared

        capturer = Capturer(self.model, self.codec, CaptureSpec(frozenset(sites)), generation, self.prefixes)
        outcomes: dict[int, Outcome | NonFinite] = {}
        for batch in batches(self.model, jobs, plan_shared(jobs)):
            capturer.run(
                [jobs[index] for index in batch],
                lambda number, outcome, batch=batch: outcomes.__setitem__(batch[number], outcome),
            )
        return [outcomes[index] for index in range(len(jobs))]
