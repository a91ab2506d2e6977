"""Figures of `probe distribution`, written by matplotlib as PNG or SVG."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.errors import DiskError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

_CURVE = 80


def check_output(path: Path) -> None:
    """Refuse, before anything is computed, a figure that could not be written."""
    from importlib.util import find_spec

    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"{path}: a figure is a .png or .svg file")
    if find_spec("matplotlib") is None:
        raise UsageError(
            "figures need matplotlib: install it with `pip install matplotlib`, or leave --plot out"
        )


def plot_distribution(logits: Tensor, document: dict[str, Any], path: Path) -> None:
    """One distribution: against τ, its nucleus, the energies of its tokens and its heat capacity."""
    import torch

    from probe.maths.distribution import boltzmann, gauge_shift

    z = logits.double()
    z = z[torch.isfinite(z)]
    peak = document["heat_capacity_peak"]
    taus = [row["tau"] for row in document["temperature"]]
    if peak:
        taus += [peak["tau"] / 5, peak["tau"] * 5]
    low, high = math.log10(min(taus)), math.log10(max(taus))
    low, high = (low, high) if high > low else (low - 1, high + 1)
    grid = torch.logspace(low, high, _CURVE, dtype=torch.float64).tolist()
    states = [boltzmann(z, tau) for tau in grid]
    figure, axes = _figure(2, 2, (10, 7))
    _against_tau(axes[0, 0], z, grid, states)
    _nucleus(axes[0, 1], z, document)
    _energies(axes[1, 0], gauge_shift(z, "centred") - z)
    panel = axes[1, 1]
    panel.semilogx(grid, [float(state.heat_capacity) for state in states], color="C3")
    if peak:
        panel.plot(peak["tau"], peak["heat_capacity"], "o", color="C3")
        text = f"τ = {peak['tau']:.3g}, C = {peak['heat_capacity']:.3g}"
        panel.annotate(
            text, (peak["tau"], peak["heat_capacity"]), xytext=(6, -12), textcoords="offset points"
        )
    panel.set(xlabel="temperature τ", ylabel="heat capacity C (nats)", title="Heat capacity Var(E)/τ²")
    _save(figure, path)


def _against_tau(panel: Any, z: Tensor, grid: list[float], states: list[Any]) -> None:
    panel.semilogx(grid, [float(state.entropy) for state in states], color="C0")
    panel.set(xlabel="temperature τ", ylabel="entropy (nats)", title="Entropy and top-1 probability")
    panel.yaxis.label.set_color("C0")
    other = panel.twinx()
    other.semilogx(grid, [float((z / tau).softmax(-1).max()) for tau in grid], color="C1")
    other.set_ylabel("top-1 probability", color="C1")
    other.set_ylim(0, 1.02)
    panel.axvline(1, color="0.7", linewidth=0.8)


def _nucleus(panel: Any, z: Tensor, document: dict[str, Any]) -> None:
    from probe.maths.distribution import temper

    temperature = document["truncation"][0]["temperature"] if document["truncation"] else 1.0
    p = temper(z, temperature).softmax(-1).sort(descending=True).values
    panel.semilogx(range(1, len(p) + 1), p.cumsum(-1).tolist(), color="C0")
    for i, rule in enumerate(dict.fromkeys(row["rule"] for row in document["truncation"])):
        rows = [row for row in document["truncation"] if row["rule"] == rule]
        panel.plot(
            [r["size"] for r in rows], [r["mass"] for r in rows], "o^sDvP"[i], color=f"C{i + 1}", label=rule
        )
    if document["truncation"]:
        panel.legend(loc="lower right", frameon=False)
    panel.set(
        xlabel="tokens kept", ylabel="probability mass kept", title=f"Truncation at τ = {temperature:g}"
    )


def _energies(panel: Any, energies: Tensor) -> None:
    import torch

    values = energies.numpy()
    panel.hist(values, bins=100, density=True, color="0.75", label="all tokens")
    weights = torch.softmax(-energies, -1).numpy()
    panel.hist(
        values, bins=100, density=True, weights=weights, histtype="step", color="C0", label="weighted by p"
    )
    panel.legend(frameon=False)
    panel.set(xlabel="energy E = −z, centred gauge (logits)", ylabel="density per logit", title="Energies")


def plot_run(document: dict[str, Any], path: Path) -> None:
    """All decisions of a run: how many tokens each rule keeps, and the mass of it, against the entropy."""
    entropy = [row["entropy"] for row in document["decisions"]]
    figure, axes = _figure(1, 2, (11, 4.5))
    for i, rule in enumerate(document["rules"]):
        kept = [row["truncation"][i] for row in document["decisions"]]
        label = f"{rule['rule']} {rule['number']:g}"
        style = {
            "s": 14,
            "alpha": 0.7,
            "color": f"C{i % 10}",
            "marker": "o^sDvP*Xhd<>"[i % 12],
            "label": label,
        }
        axes[0, 0].scatter(entropy, [point["size"] for point in kept], **style)
        axes[0, 1].scatter(entropy, [point["mass"] for point in kept], **style)
    axes[0, 0].set(xlabel="entropy (nats)", ylabel="tokens kept", yscale="log", title="Size by decision")
    axes[0, 1].set(xlabel="entropy (nats)", ylabel="probability mass kept", title="Mass by decision")
    axes[0, 1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def plot_gap(document: dict[str, Any], path: Path) -> None:
    """Tokens of texts: energy against free energy, the line on which nothing is lost, and the losses."""
    figure, axes = _figure(1, 2, (11, 4.5))
    for i, text in enumerate(document["texts"]):
        label, color = Path(text["file"]).name, f"C{i}"
        free = [row["free_energy"] for row in text["rows"]]
        axes[0, 0].scatter(
            free, [row["energy"] for row in text["rows"]], s=8, alpha=0.5, color=color, label=label
        )
        losses = [row["cross_entropy"] for row in text["rows"]]
        axes[0, 1].hist(losses, bins=60, density=True, histtype="step", color=color, label=label)
        axes[0, 1].axvline(text["cross_entropy"]["value"], color=color, linestyle="--", linewidth=0.8)
    low, high = axes[0, 0].get_xlim()
    axes[0, 0].plot([low, high], [low, high], color="0.6", linewidth=0.8)
    axes[0, 0].set(xlabel="free energy F (logits, centred)", ylabel="energy of the token (logits, centred)")
    axes[0, 0].set_title("Loss is the height above the line, over τ")
    axes[0, 1].set(xlabel="−log p of the token (nats)", ylabel="density per nat", title="Loss by token")
    axes[0, 1].legend(frameon=False)
    _save(figure, path)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: Path) -> None:
    import matplotlib

    try:
        with matplotlib.rc_context({"svg.hashsalt": "probe", "svg.fonttype": "none"}):
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror or error}") from error
