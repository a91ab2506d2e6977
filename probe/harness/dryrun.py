"""`probe run --dry-run`: what a run would do and cost, without weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probe.capture.edits import Steering


def dry_run(
    tasks: Path, out: Path | None, options: dict[str, Any], edits: Sequence[Steering] = ()
) -> dict[str, Any]:
    """Validate the input, render every prompt, and predict bytes; raises what `run` would raise.

    A run that would pass `max_bytes` is not raised but told, under `refused`, beside its sizes.
    """
    from probe.harness import plan as planning
    from probe.harness.estimate import by_choice, estimate
    from probe.harness.sizes import Shape
    from probe.model import outline
    from probe.model.edits import refuse_misfits
    from probe.runs.write import prepare

    name = options["model"]
    choices = planning.make_options(name, {key: value for key, value in options.items() if key != "model"})
    chosen = planning.read_inputs(tasks, choices).tasks
    if out is not None:
        prepare(out)
    facts = outline(name, revision=choices.revision, offline=choices.offline)
    shape = Shape(**facts["shape"])
    refuse_misfits([edit.everywhere for edit in edits], shape)
    plans = planning.plan(chosen, facts["tokenizer"], shape, choices, edits)
    predicted = estimate(plans, shape, choices.itemsize, choices)
    first = next((entry for entry in plans if entry.prompts), None)
    return {
        "n_tasks": len(plans),
        "first_prompt": None
        if first is None
        else {
            "id": first.task.id,
            "text": first.prompts[0].text,
            "n_tokens": len(first.prompts[0].token_ids),
            "template": first.prompts[0].template,
        },
        "notices": planning.notices(plans),
        "without_prompt": {entry.task.id: entry.fault for entry in plans if entry.fault},
        "prompt_tokens": predicted.prompt_tokens,
        "new_tokens": predicted.new_tokens,
        "disk_bytes": predicted.disk_bytes,
        "memory_bytes": predicted.memory_bytes,
        "costliest": predicted.costliest(5),
        "by_choice": by_choice(plans, shape, choices.itemsize, choices, predicted.disk_bytes),
        "refused": predicted.refusal(choices.max_bytes),
    }
