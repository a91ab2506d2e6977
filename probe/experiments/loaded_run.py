"""A run together with what made it: its options, its tasks and its model, each loaded when it is first needed."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from probe.harness.runner import load_model, options_of, refuse_other_weights, reopen

if TYPE_CHECKING:
    from probe.harness.runner import Progress
    from probe.model.hooked import Model
    from probe.prompts import Codec
    from probe.runs import Run


class LoadedRun:
    """Raises where the model, the task file or the tools are not those of the run: ModelUnavailable, BadInput,
    RunDirectoryError."""

    def __init__(self, run: Run, model: Model | None, progress: Progress):
        self.run, self._given, self._progress = run, model, progress
        self.options = options_of(run.run)

    @cached_property
    def tasks(self) -> dict[str, Any]:
        """The tasks of the file (`probe.tasks`), by id; unchanged since the run began."""
        return {task.id: task for task in reopen(self.run.path, self.run.run)[1]}

    @cached_property
    def model(self) -> Model:
        """The model of the run, loaded once for all experiments."""
        model = self._given or load_model(self.options.model, self.options, self._progress)
        refuse_other_weights(self.run.run, model)
        return model

    @cached_property
    def codec(self) -> Codec:
        from probe.prompts import Codec

        return Codec(self.model.tokenizer, self.model.facts.n_ctx, self.model.switches, self.model.stop_ids)

    def max_new_tokens(self, kind: str) -> int:
        """How many tokens a task of this kind was allowed to generate."""
        return self.options.generation(kind).max_new_tokens
