"""A run together with what made it: its options, its tasks and its model, each loaded when it is first needed."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from probe.errors import RunDirectoryError
from probe.harness.plan import codec_of
from probe.harness.runner import load_model, options_of, refuse_other_weights, reopen
from probe.tasks import Setting, kind_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from probe.harness.runner import Progress
    from probe.model.hooked import Model
    from probe.prompts import Codec
    from probe.runs import Run


class LoadedRun:
    """Raises where the model, the task file or the tools are not those of the run: ModelUnavailable, BadInput,
    RunDirectoryError."""

    def __init__(self, run: Run, model: Model | None, progress: Progress):
        self.run, self._given, self._progress = run, model, progress
        self.options = options_of(run.path, run.run)

    @cached_property
    def tasks(self) -> dict[str, Any]:
        """The tasks of the file (`probe.tasks`), by id; unchanged since the run began."""
        return {task.id: task for task in reopen(self.run.path, self.run.run)[1]}

    @cached_property
    def model(self) -> Model:
        """The model of the run, loaded once for all experiments."""
        if self.run.run.get("edits"):
            raise RunDirectoryError(
                f"{self.run.path}: was run under edits, and experiments would run without them: make them on the run "
                "without edits; `--no-model` measures what this run has"
            )
        model = self._given or load_model(self.options.model, self.options, self._progress)
        refuse_other_weights(self.run.run, model)
        return model

    @cached_property
    def codec(self) -> Codec:
        """Raises RunDirectoryError where a prompt is rendered differently now than in the record."""
        codec = codec_of(
            self.model.tokenizer,
            self.model.facts.n_ctx,
            self.options,
            self.model.switches,
            self.model.stop_ids,
        )
        for record in self._examples():
            self._refuse_other_prompt(record, codec)
        return codec

    def _examples(self) -> Iterator[dict[str, Any]]:
        """The first finished task of each kind."""
        kinds = set()
        for task in self.run:
            record = task.record
            if record["status"] == "ok" and record["kind"] not in kinds:
                kinds.add(record["kind"])
                yield record

    def _refuse_other_prompt(self, record: dict[str, Any], codec: Codec) -> None:
        task = self.tasks[record["id"]]
        kind = kind_of(task)
        room = self.max_new_tokens(kind.name) + kind.reserve
        setting = Setting(room, reference=self.options.reasoning == "reference")
        passages = record.get("passages", {"main": record})
        for prompt in kind.render(task, codec, setting):
            n_prompt = prompt.n_prompt
            if prompt.token_ids[:n_prompt] != passages[prompt.passage]["token_ids"][:n_prompt]:
                raise RunDirectoryError(
                    f"the prompt of {task.id!r} is rendered differently now than in the record ({prompt.passage}): "
                    "the versions that run.json names, or the model's tokenizer, have changed; start a new run"
                )

    def max_new_tokens(self, kind: str) -> int:
        """How many tokens a task of this kind was allowed to generate."""
        return self.options.generation(kind).max_new_tokens
