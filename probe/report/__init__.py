"""The report: one HTML file that opens from the disk, draws itself and asks nothing of any network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from probe.runs import Run

__all__ = ["FORMATS", "page", "render", "write_report"]

FORMATS = ("pdf", "svg", "png", "vega", "csv")
"""Formats of figures; vega: a Vega-Lite specification as JSON."""

_TOOLS = ("tool_selection",)
_STEPS = ("cot", "agent", "replay")
_SCRIPTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(("dom.js", "address.js", "charts.js", "plot.js", "tokens.js"), ((), ())),
    "tool.js": (_TOOLS, ("toolDetail",)),
    "why.js": (("why", *_TOOLS), ("whyOverview", "whyFigure")),
    "certainty.js": (("certainty",), ("certaintyCard",)),
    "choices.js": (
        ("scorers", "confusion", "orders", *_TOOLS),
        ("scorerCard", "confusionCard", "orderCard", "otherScores"),
    ),
    "inside.js": (("heads", "layers", "actions"), ("headCard", "layerCard", "actionCard")),
    "foresight.js": (("foresight",), ("foresightCard",)),
    "attribution.js": (("attribution",), ("attributionCard",)),
    "patching.js": (("patching",), ("patchingCard",)),
    "steering.js": (("steering",), ("steeringCard",)),
    "canvas.js": (_STEPS, ("paintWaiting",)),
    "reasoning.js": (("reasoning", *_STEPS), ("cycleFigures", "reasoningCard")),
    "agent.js": (("agent", "replay"), ("agentDetail",)),
    "prompting.js": (("prompting",), ("promptingDetail", "variantOverview")),
    "bias.js": (("bias",), ("biasCard",)),
    "cot.js": (("cot",), ("cotDetail",)),
    "distribution.js": (("distribution",), ("distributionCard",)),
    "served.js": (("served",), ("detailsFromServer",)),
    "embedded.js": (("embedded",), ("detailsFromNotebook",)),
    **dict.fromkeys(("more.js", "drawing.js", "take.js", "verdict.js", "list.js", "view.js"), ((), ())),
}
"""Scripts in their order: the kinds of task and the cards that need each, none where every page does; and the functions
that are nothing in a page without it."""


def write_report(run: Run, output: Path | None = None) -> Path:
    """Write the report of a run and return its path; without `output` it becomes the run's report.html.

    Raises UsageError (a name of no HTML file), RunDirectoryError (busy), ArtifactCorrupt and DiskError.
    """
    from probe.runs.export import file_format

    if output is not None:
        file_format(output, ("html", "htm"))
    html = render(run)
    default = run.path / "report.html"
    if output is None or output.resolve() == default.resolve():
        run.replace_report(html)
        return default
    from probe.runs.files import disk_errors, replace_file

    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(output, html.encode())
    return output


def render(run: Run, asks: Literal["served", "embedded"] | None = None, **more: Any) -> str:
    """The report's HTML. Its content security policy allows its own script and style, by hash, and nothing else.

    A page that `asks` holds no details of tasks: it has each from the server that it came from, or from the widget that it
    is embedded in. `more` is added to its data.
    """
    from probe.report.data import collect

    data = collect(run, 0 if asks else None) | more
    present = {row["kind"] for row in data["tasks"]} | {name for name, card in data["cards"].items() if card}
    present |= {asks} if asks else set()
    scripts = [
        name for name, (needed_by, _) in _SCRIPTS.items() if not needed_by or present.intersection(needed_by)
    ]
    missing = [
        function for name, (_, functions) in _SCRIPTS.items() if name not in scripts for function in functions
    ]
    return page(
        "template.html",
        scripts,
        data,
        [f"const {function} = () => null;" for function in missing],
        run=data["run"],
        notices=data["notices"],
        command=data["command"],
        asks=asks,
        headlines=data["headlines"],
        analyzed=data["analyzed"],
        bias=data["cards"]["bias"],
        n_tasks=len(data["tasks"]),
        limit=data["limit"],
    )


def page(template: str, scripts: Sequence[str], data: Any, lines: Sequence[str] = (), **values: Any) -> str:
    """A template of this folder with its style, scripts and data inside it; `lines` of script come behind "use strict"."""
    import jinja2
    from markupsafe import Markup

    style = asset("style.css")
    # Without indentation and the lines that are comments: a sixth of the bytes.
    kept = (line.lstrip() for name in scripts for line in asset(name).splitlines())
    kept = [line for line in kept if line and not _is_comment(line)]
    script = "(() => {\n" + "\n".join([kept[0], *lines, *kept[1:]]) + "\n})();\n"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(asset(template)).render(
        style=Markup(style),
        script=Markup(script),
        style_hash=_source_hash(style),
        script_hash=_source_hash(script),
        data=Markup(_embedded(data)),
        **values,
    )


def _is_comment(line: str) -> bool:
    return line.startswith("//") or (line.startswith("/**") and line.endswith("*/"))


def asset(name: str) -> str:
    """The text of a file of this folder."""
    return resources.files("probe.report").joinpath(name).read_text(encoding="utf-8")


def _source_hash(text: str) -> str:
    """A hash source of the content security policy, over exactly what stands between the tags."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element or open another."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
