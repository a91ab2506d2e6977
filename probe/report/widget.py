"""The report as a widget of notebooks, its selection in Python. Needs the extra `notebook`.

The page stands in a frame that may run its own scripts and nothing else: it has no origin, so that it reaches neither the
notebook nor the network. What is open in it and what it asks for go over one message port.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets

from probe.report import asset, render
from probe.report.reader import TaskReader
from probe.report.text import visible

if TYPE_CHECKING:
    from probe.runs import Run

SHARED = ("tool", "layer", "head", "step", "q")
"""Parts of the page's address that are its `selection`."""


class ReportWidget(anywidget.AnyWidget):
    """The cards of a run's report. What its reader opens is in `task`, `card` and `selection`, and what is put there opens."""

    _esm = asset("widget.js")
    _page = traitlets.Unicode().tag(sync=True)
    height = traitlets.Int(720, help="Height in pixels.").tag(sync=True)
    task = traitlets.Unicode(None, allow_none=True, help="Id of the task that is open.").tag(
        sync=True,
        to_json=lambda value, _: visible(value),
        from_json=lambda value, widget: widget._ids.get(value, value),
    )
    card = traitlets.Unicode(
        "overview", help="Part of the report: overview, tasks, why, inside, calibration, output, provenance."
    ).tag(sync=True)
    selection = traitlets.Dict(
        help="Tool, layer, head, step and search (`q`) that are chosen, as texts."
    ).tag(sync=True)

    def __init__(self, run: Run, task: str | None = None, **traits: Any):
        self._reader = TaskReader(run)
        self._ids = {visible(name): name for name in run.task_ids}
        if task is not None:
            traits |= {"task": run[task].id, "card": "tasks"}
        super().__init__(_page=render(run, "embedded"), **traits)
        self.on_msg(self._answer)

    @traitlets.validate("selection")
    def _check_selection(self, proposal: Any) -> dict[str, str]:
        chosen = {name: value for name, value in proposal["value"].items() if name in SHARED}
        return {name: str(value) for name, value in chosen.items() if value is not None}

    def _answer(self, _: Any, asked: Any, buffers: Any) -> None:
        """Give the page the details of a task that it asks for by its place."""
        place = asked.get("place") if isinstance(asked, dict) else None
        if type(place) is not int or not 0 <= place < len(self._reader.run):
            return
        try:
            answer = {"details": json.loads(self._reader.read(place))}
        except Exception as error:  # the page says why; a widget's exceptions go to no reader
            answer = {"error": f"{type(error).__name__}: {error}"}
        self.send({"place": place} | answer)
