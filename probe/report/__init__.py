"""The report: one HTML file that opens from the disk, draws itself and asks nothing of any network."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probe.runs import Run

__all__ = ["FORMATS", "render", "write_report"]

FORMATS = ("pdf", "svg", "png", "vega", "csv")
"""Formats of figures; vega: a Vega-Lite specification as JSON."""

_SCRIPTS = (
    *("dom.js", "charts.js", "plot.js", "tool.js", "why.js", "certainty.js", "choices.js", "inside.js"),
    "foresight.js",
    "attribution.js",
    "patching.js",
    "steering.js",
    *("canvas.js", "reasoning.js", "agent.js", "prompting.js", "bias.js", "cot.js"),
    *("distribution.js", "more.js", "view.js"),
)

_OPTIONAL = {"patching.js": ("patching", "patchingCard"), "steering.js": ("steering", "steeringCard")}
"""Scripts that draw what few runs have: the card, and the function that is nothing in a page without it."""


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


def render(run: Run) -> str:
    """The report's HTML. Its content security policy allows its own script and style, by hash, and nothing else."""
    import jinja2
    from markupsafe import Markup

    from probe.report.data import collect

    data = collect(run)
    style = _asset("style.css")
    # Without indentation and the lines that are comments: a sixth of the bytes.
    scripts = (_script(name, data["cards"]) for name in _SCRIPTS)
    lines = (line.lstrip() for text in scripts for line in text.splitlines())
    lines = (line for line in lines if line and not _is_comment(line))
    script = "(() => {\n" + "\n".join(lines) + "\n})();\n"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_asset("template.html")).render(
        run=data["run"],
        headlines=data["headlines"],
        analyzed=data["analyzed"],
        bias=data["cards"]["bias"],
        n_tasks=len(data["tasks"]),
        planned=data["planned"],
        limit=data["limit"],
        style=Markup(style),
        script=Markup(script),
        style_hash=_source_hash(style),
        script_hash=_source_hash(script),
        data=Markup(_embedded(data)),
    )


def _script(name: str, cards: dict[str, Any]) -> str:
    card, function = _OPTIONAL.get(name, (None, ""))
    return _asset(name) if card is None or cards[card] else f"const {function} = () => null;"


def _is_comment(line: str) -> bool:
    return line.startswith("//") or (line.startswith("/**") and line.endswith("*/"))


def _asset(name: str) -> str:
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
