"""`probe lora`: from a path or options to a document, lines for a terminal, and measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from probe.analyzers.rows import Row, to_table
from probe.errors import UsageError
from probe.training.lora.base import BaseVectors
from probe.training.lora.files import Adapter, read_adapters
from probe.training.lora.findings import findings
from probe.training.lora.measure import against_base, document, rows, spectra
from probe.training.lora.page import check_plot, draw, sweep_lines
from probe.training.lora.sweep import SweepSetting, run_sweep

__all__ = ["check_plot", "draw", "examine", "lines", "setting", "sweep", "sweep_lines", "write_parquet"]

_COLUMNS = (
    ("rank", "r", ".0f"),
    ("nuclear_norm", "‖·‖_*", ".4g"),
    ("frobenius_norm", "‖·‖_F", ".4g"),
    ("spectral_norm", "‖·‖₂", ".4g"),
    ("stable_rank", "stable", ".2f"),
    ("effective_rank", "effective", ".2f"),
    ("cauchy_schwarz_ratio", "C–S", ".3f"),
    ("share_of_base", "of ‖W‖", ".2%"),
    ("base_overlap_left", "overlap", ".3f"),
    ("intruder_dimensions", "intruders", ".0f"),
    ("intruder_dimensions_with_magnitude", "with DoRA's", ".0f"),
)


def examine(
    path: Path,
    base: str | None = None,
    *,
    alpha: float | None = None,
    offline: bool = False,
    log: Callable[[str], None] = lambda message: None,
) -> tuple[list[dict[str, Any]], list[Row]]:
    """Documents and measures of all adapters at `path`; with `base` (a model name, or `auto` for the one in the
    adapter's configuration) also against the base's weights. Raises what `read_adapters` and loading raise.
    """
    adapters = read_adapters(path, alpha)
    weights = _weights(adapters, base, offline, log) if base else None
    vectors: dict[str, BaseVectors] = {}
    documents, measures = [], []
    for adapter in adapters:
        decomposed = spectra(adapter)
        compared = None
        if weights is not None and adapter.moved_base:
            adapter.notes.append(
                f"not compared with the base: init_lora_weights={adapter.moved_base} changed its weights, and W + B A "
                "is in no model; save the adapter with peft's path_initial_model_for_weight_conversion"
            )
        elif weights is not None:
            log(f"{adapter.name}: {len(decomposed)} weights of the base decomposed and compared")
            replication = adapter.config.get("layer_replication")
            compared = against_base(adapter, lambda module, r=replication: weights(module, r), vectors)
            left_out = [delta.module for delta in adapter.deltas if delta.module not in compared]
            if left_out:
                adapter.notes.append(
                    f"not compared with the base (no weight of its own): {', '.join(left_out[:4])}"
                )
        measured = rows(adapter.name, decomposed, compared)
        documents.append(document(adapter, decomposed, measured))
        measures += measured
    return documents, measures


def _weights(adapters: list[Adapter], base: str, offline: bool, log: Callable[[str], None]) -> Any:
    from probe.model.base import base_weights

    if base == "auto":
        named = {adapter.base for adapter in adapters}
        if len(named) != 1 or None in named:
            raise UsageError(f"--base auto: the adapters name {len(named - {None})} base models; give one")
        base = str(named.pop())
    return base_weights(base, offline=offline, log=log)


def write_parquet(measures: list[Row], path: Path) -> None:
    """The measures as a parquet file with the columns of a run's measures."""
    import io

    import pyarrow.parquet as pq

    from probe.runs.export import write_file

    buffer = io.BytesIO()
    pq.write_table(to_table(measures), buffer)
    write_file(path, buffer.getvalue())


def lines(document: dict[str, Any], every_module: bool) -> list[str]:
    """One adapter as lines of text; modules are summed by their last name unless each is asked for."""
    settings = ", ".join(f"{key}={value}" for key, value in document["settings"].items() if value)
    text = [
        f"{document['adapter']}: {document['n_matrices']} matrices, {document['total']['parameters']:,.0f} parameters"
    ]
    text += [f"  {settings}", f"  base {document['base'] or 'not named'}", ""]
    entries = document["modules"] if every_module else _by_kind(document["modules"])
    shown = [column for column in _COLUMNS if any(entry.get(column[0]) is not None for entry in entries)]
    width = max(len(entry["module"]) for entry in entries)
    text.append(f"{'module':{width}}  " + "".join(f"{title:>12}" for _, title, _ in shown))
    for entry in entries:
        cells = [format(entry[key], form) if entry.get(key) is not None else "-" for key, _, form in shown]
        text.append(f"{entry['module']:{width}}  " + "".join(f"{cell:>12}" for cell in cells))
    total = document["total"]
    text.append("")
    text.append(f"all matrices: ‖ΔW‖_* = {total['nuclear_norm']:.6g}, ‖ΔW‖_F = {total['frobenius_norm']:.6g}")
    if "intruder_dimensions" in total:
        text.append(
            f"intruder dimensions: {total['intruder_dimensions']:.0f} in {document['n_matrices']} matrices"
        )
    for entry in document["not_low_rank"][:8]:
        text.append(f"not low-rank: {entry['tensor']} {entry['shape']}: {entry['what']}")
    if len(document["not_low_rank"]) > 8:
        text.append(
            f"… and {len(document['not_low_rank']) - 8} more tensors that are not low-rank (--json lists them)"
        )
    return text + [f"note: {note}" for note in document["notes"]]


def _by_kind(modules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over layers of modules that are called alike; intruders are summed."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in modules:
        groups.setdefault(entry["module"].rpartition(".")[2], []).append(entry)
    shown = []
    for kind, entries in groups.items():
        row: dict[str, Any] = {
            "module": f"{kind} ({len(entries)}×)" if len(entries) > 1 else entries[0]["module"]
        }
        for key, _, _ in _COLUMNS:
            values = [entry[key] for entry in entries if entry.get(key) is not None]
            if values:
                row[key] = sum(values) / (1 if key.startswith("intruder") else len(values))
        shown.append(row)
    return shown


def setting(given: dict[str, Any]) -> SweepSetting:
    """The setting of a sweep from its options; None is the default. Raises UsageError."""
    chosen = SweepSetting(model=given.pop("model"), full=not given.pop("no_full"))
    chosen = chosen.quickened() if given.pop("quick") else chosen
    return replace(chosen, **{key: value for key, value in given.items() if value is not None}).checked()


def sweep(path: Path, chosen: SweepSetting, low: int | None = None, **how: Any) -> dict[str, Any]:
    """Run what is missing of a sweep (`run_sweep`) and give its document."""
    if low is not None and low not in chosen.ranks:
        raise UsageError(f"--low {low}: is not among the ranks {','.join(map(str, chosen.ranks))}")
    return findings(run_sweep(path, chosen, **how), low)
