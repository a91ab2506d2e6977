"""From a wrong tool to a turned choice: was it to be foreseen, by which vector is it turned, and at what price?

    .venv/bin/python examples/turn_a_choice.py [TASKS] [MODEL]

Runs the tasks, adds vectors to their choices (`probe analyze RUN foresight steering`), and tells one held-out task.
docs/tool-use.md defines every number.
"""

from __future__ import annotations

import sys
from typing import Any

import probe


def main(tasks: str = "tasks/tools.jsonl", model: str = "smollm2-135m") -> None:
    run = probe.analyze(probe.run(tasks, model=model), ["foresight", "steering"])
    sys.stdout.write("\n".join([*story(run), ""]))


def story(run: probe.Run) -> list[str]:
    """The case in sentences, from a run that has the measures of foresight and steering."""
    rows = run.measures()
    rows = rows[rows.task_id == ""]

    def number(name: str, **place: Any) -> str:
        chosen = rows[rows.name == name]
        for axis, label in place.items():
            chosen = chosen[chosen[axis].isna() if label is None else chosen[axis] == label]
        if chosen.empty:
            return "not measured"
        row = chosen.iloc[0]
        interval = f" [{row.low:.2f}, {row.high:.2f}]" if row.low == row.low else ""
        return f"{row.value:.2f} {row.unit}{interval}, n = {row.n}"

    table = run.table("steering")
    settings = table[table.part == "setting"].set_index("direction")
    turned = table[
        (table.part == "switch") & (table.role == "right") & (table.half == 1) & (table.value == 1)
    ]
    turned = [
        row
        for row in turned.itertuples()
        if row.direction != "random"
        and row.direction in settings.index
        and tuple(settings.loc[row.direction, ["layer", "dose"]]) == (row.layer, row.dose)
    ]
    foreseen = (
        f"AUROC of the margin for a wrong choice: {number('auroc', signal='margin', rule='raw', layer=None)}"
    )
    if not turned:
        return [
            foreseen,
            "no wrong choice of the held-out half was turned to the right tool within the price",
        ]
    row = turned[0]
    tool, other = (name if isinstance(name, str) else "no tool" for name in (row.tool, row.other))
    place = {"direction": row.direction, "layer": row.layer, "dose": row.dose}
    return [
        f"wrong tool: {row.task_id} asks for {other}, the model names {tool}",
        f"foreseen: {foreseen}",
        f"turned: by {row.direction}, {row.dose:g} state lengths behind layer {row.layer}, log P({other}) goes from "
        f"{row.before:.2f} to {row.log_prob:.2f} nats",
        f"of all wrong choices: {number('steer_turned', role='right', direction=row.direction)}; by random vectors as long: "
        f"{number('steer_turned_random', role='right', direction=row.direction)}",
        f"the call that follows is valid: {number('steer_valid_call', role='right', direction=row.direction)}",
        f"price: {number('steer_kl', **place)} on unrelated text; accuracy on other tasks: "
        f"{number('steer_other_accuracy', direction=row.direction)}",
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
