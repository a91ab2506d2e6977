"""A sequence in flight: what a batch knows of it while it runs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from probe.capture.controller import Controller
from probe.capture.spec import Job


@dataclass
class ActiveSequence:
    """A sequence in flight."""

    job: Job
    controller: Controller
    generator: torch.Generator
    unshared: bool = False
    """Whether nothing comes from a shared prefix, which keeps no rows of a prompt."""
    rows_before: list[int] = field(default_factory=list)
    """Positions before the last of the prompt whose states are recorded."""
    new_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    decisions: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    span_sums: dict[int, Tensor] = field(default_factory=dict)
    finish_reason: str | None = None
    candidate_log_probs: list[list[float]] = field(default_factory=list)
    opener_log_prob: float | None = None

    @property
    def shared(self) -> int:
        """Leading tokens that came from a shared prefix."""
        return 0 if self.unshared else self.job.shared

    @property
    def n_prefilled(self) -> int:
        return len(self.job.prompt.token_ids)

    @property
    def n_prompt(self) -> int:
        return self.job.prompt.n_prompt

    @property
    def length(self) -> int:
        """Tokens so far, the prompt included."""
        return self.job.prompt.n_prompt + len(self.new_ids)

    def decide(self, position: int, logits: Tensor) -> None:
        self.decisions.append(position)
        self.logits.append(logits)

    @property
    def first_row(self) -> int:
        """The first position from which on all states are recorded: it emits the first token."""
        return self.job.prompt.n_prompt - 1

    def recorded(self, n_run: int) -> list[int]:
        """Positions whose states were recorded, ascending, of a sequence whose first `n_run` tokens were run."""
        return [*self.rows_before, *range(self.first_row, n_run)]

    def fail(self) -> None:
        """End the sequence: what the model computed of it is not finite."""
        self.finish_reason = "error"
        self.new_ids.append(0)


def generator_of(seed: int, job: Job) -> torch.Generator:
    """The random stream of a passage: it depends on (seed, task id, passage) alone."""
    digest = hashlib.sha256(f"{seed}\n{job.task_id}\n{job.prompt.passage}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
