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
    all_rows: bool = False
    """Whether every position is captured: a shared prefix keeps no rows of a prompt, so nothing comes from one then."""
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
        return 0 if self.all_rows else self.job.shared

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
        """The first position whose states are captured."""
        return 0 if self.all_rows else self.job.prompt.n_prompt - 1

    def fail(self) -> None:
        """End the sequence: what the model computed of it is not finite."""
        self.finish_reason = "error"
        self.new_ids.append(0)


def generator_of(seed: int, job: Job) -> torch.Generator:
    """The random stream of a passage: it depends on (seed, task id, passage) alone."""
    digest = hashlib.sha256(f"{seed}\n{job.task_id}\n{job.prompt.passage}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
