"""A sweep as tables of text, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from probe.errors import UsageError

_END = (
    ("train_loss", "training", ".3f"),
    ("validation_loss", "validation", ".3f"),
    ("gap", "gap", ".3f"),
    ("rise", "rise", ".3f"),
    ("base_kl", "KL", ".4f"),
    ("perplexity_ratio", "ppl ×", ".3f"),
    ("frobenius_norm", "‖ΔW‖_F", ".2f"),
    ("effective_rank", "eff. rank", ".1f"),
    ("stable_rank", "stable", ".1f"),
    ("intruder_dimensions", "intruders", ".2f"),
)
_MATCHED = (
    ("base_kl at validation_loss", "KL, validation"),
    ("base_kl at train_loss", "KL, training"),
    ("base_kl at frobenius_norm", "KL, ‖ΔW‖_F"),
    ("gap at train_loss", "gap, training"),
    ("gap at frobenius_norm", "gap, ‖ΔW‖_F"),
)
_PLACES = {
    "end": "at the end",
    "train_loss": "at equal training loss",
    "validation_loss": "at equal validation loss",
    "frobenius_norm": "at equal ‖ΔW‖_F",
}
_PICTURES = (".png", ".svg")


def sweep_lines(document: dict[str, Any]) -> list[str]:
    """What a terminal shows of a sweep: two tables, the claim part by part, notes."""
    setting, places = document["setting"], document["places"]
    lines = [
        f"{setting['model']}: {setting['steps']} steps of {setting['batch']} lines, seeds {setting['seeds']}, "
        "rates chosen on selection lines; nats a token; mean ± half a 95 % interval over seeds",
        "",
        "at the end of training",
    ]
    head = ["", "rate", *(title for _, title, _ in _END)]
    body = [
        [
            entry["method"],
            f"{entry['rate']:g}",
            *(_cell(entry["end"].get(key), form) for key, _, form in _END),
        ]
        for entry in document["methods"]
    ]
    lines += _table([head, *body])
    if places:
        lines += [
            "",
            f"where all had a validation loss of {places['validation_loss']:.3f}, a training loss of "
            f"{places['train_loss']:.3f}, or ‖ΔW‖_F = {places['frobenius_norm']:.3f}",
        ]
        head = ["", *(title for _, title in _MATCHED)]
        body = [
            [entry["method"], *(_cell(entry["matched"].get(key), ".4f") for key, _ in _MATCHED)]
            for entry in document["methods"]
        ]
        lines += _table([head, *body])
    lines += ["", f"claim: {document['claim']}"]
    lines.append(f"verdict: {document['says']}, from these parts")
    for part in document["verdict"]:
        lines.append(f"  {part['says']}: {part['part']}")
        lines += [f"      {_evidence(entry)}" for entry in part["from"]]
    return lines + [f"note: {note}" for note in document["notes"]]


def _evidence(entry: dict[str, Any]) -> str:
    if "margin" in entry:
        return f"margin to the limit, {_PLACES[entry['place']]}: {_interval(entry['margin'])}"
    at = "" if entry["at"] is None else f" ({entry['at']:.3f})"
    return f"{_PLACES[entry['place']]}{at}: difference {_interval(entry['difference'])}, {entry['says']}"


def _interval(number: dict[str, Any]) -> str:
    limits = "one seed" if number["low"] is None else f"[{number['low']:+.4f}, {number['high']:+.4f}]"
    return f"{number['value']:+.4f} {number['unit']} {limits}, n = {number['n']}"


def _cell(number: dict[str, Any] | None, form: str) -> str:
    if number is None:
        return "-"
    if number["low"] is None:
        return format(number["value"], form)
    return f"{number['value']:{form}} ± {(number['high'] - number['low']) / 2:{form}}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def check_plot(path: Path | None) -> None:
    """Raise UsageError for a picture that could not be written, before hours of training."""
    if path is None:
        return
    if path.suffix.lower() not in _PICTURES:
        raise UsageError(f"--plot {path}: a name that ends in {' or '.join(_PICTURES)}")
    if path.is_dir():
        raise UsageError(f"--plot {path}: is a directory; give the name of a file")


def draw(document: dict[str, Any], path: Path) -> None:
    """Four panels: losses over steps, forgetting against learning, forgetting against norm, singular values."""
    import io

    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from probe.runs.export import write_file

    check_plot(path)
    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    losses, learned, moved, spectrum = figure.subplots(2, 2).flat
    methods = list(document["trajectories"])
    for index, method in enumerate(methods):
        color = "black" if method == "full" else colormaps["viridis"](0.9 * index / max(1, len(methods) - 1))
        for number, run in enumerate(document["trajectories"][method]):
            points = run["points"]
            label = method if number == 0 else None
            steps, validation, kl = (
                [point[key] for point in points] for key in ("step", "validation_loss", "base_kl")
            )
            losses.plot(steps, validation, color=color, label=label)
            losses.plot(steps, [point["train_loss"] for point in points], color=color, linestyle=":")
            learned.plot(validation, kl, color=color, marker=".", label=label)
            moved.plot(
                [point["frobenius_norm"] for point in points], kl, color=color, marker=".", label=label
            )
        for number, values in enumerate(document["singular_values"][method].values()):
            if values and values[0] > 0:
                x = range(1, len(values) + 1)
                relative = [value / values[0] for value in values]
                spectrum.plot(x, relative, color=color, alpha=0.4, label=method if number == 0 else None)
    _dress(losses, "Loss over training (dotted: on training lines)", "step", "nats/token")
    _dress(
        learned,
        "Forgotten for what was learned",
        "validation loss, nats/token",
        "KL(base‖adapted), nats/token",
    )
    learned.invert_xaxis()
    _dress(moved, "Forgotten for how far it moved", "‖ΔW‖_F", "KL(base‖adapted), nats/token")
    _dress(spectrum, "Singular values of ΔW, one line a matrix", "index", "σ / σ₁")
    spectrum.set_yscale("log")
    spectrum.set_ylim(1e-4, 1.5)
    title = f"{document['setting']['model']}, {document['setting']['seeds']} seeds"
    figure.suptitle(title + (", quick" if document["setting"]["quick"] else ""))
    buffer = io.BytesIO()
    stamp = {"Software": None} if path.suffix.lower() == ".png" else {"Date": None}
    figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=130, metadata=stamp)
    write_file(path, buffer.getvalue())


def _dress(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
