"""An estimate as a picture: the peak as a stacked bar, the step in time as stacked areas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from probe.errors import UsageError
from probe.training.memory.estimate import COMPONENTS, StepEstimate

FILLS = {  # light enough for black words on them
    "weights": "#7799cc",
    "gradients": "#cc6699",
    "optimizer": "#ccbb44",
    "activations": "#55aa55",
    "logits": "#66ccee",
    "temporary": "#ee6677",
    "cuda_context": "#bbbbbb",
    "fragmentation": "#888888",
}


def draw(estimate: StepEstimate, path: str, gpu: tuple[str, int] | None = None) -> None:
    """Write the picture of `estimate` to `path` (.png or .svg); `gpu` is a name and its bytes, drawn as a line.

    Raises UsageError for another ending or a folder that does not exist.
    """
    target = Path(path)
    if target.suffix not in (".png", ".svg"):
        raise UsageError(f"--plot {path}: end it in .png or .svg")
    if not target.parent.is_dir():
        raise UsageError(f"--plot {path}: there is no folder {target.parent}")
    import matplotlib
    from matplotlib.figure import Figure

    plan = estimate.plan
    with matplotlib.rc_context({"svg.hashsalt": "probe", "font.size": 9}):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 3.2), sharey=True)
        top = 1.08 * max(estimate.total_bytes, gpu[1] if gpu else 0)
        _bar(left, estimate, top)
        _areas(right, estimate)
        if gpu:
            for axes in (left, right):
                axes.axhline(gpu[1] / 1e9, color="black", linestyle="--", linewidth=1)
            right.annotate(
                gpu[0], (0.995, gpu[1] / 1e9), xycoords=("axes fraction", "data"), ha="right", va="bottom"
            )
        left.set_ylim(0, top / 1e9)
        figure.suptitle(
            f"{Path(estimate.architecture.name).name}: {plan.method}, {plan.precision}, {plan.optimizer}, "
            f"{plan.attention} attention, batch {plan.batch} × {plan.length} tokens"
            + (", gradient checkpointing" if plan.checkpointing else "")
        )
        figure.savefig(target, dpi=150, metadata={"Date": None} if target.suffix == ".svg" else None)


def _bar(axes: Any, estimate: StepEstimate, axes_top: float) -> None:
    reached = 0.0
    for name, size in (estimate.peak.bytes | estimate.outside).items():
        axes.bar(0, size / 1e9, bottom=reached, color=FILLS[name], width=0.6)
        if size > 0.035 * axes_top:
            words = f"{name.replace('_', ' ')} {size / 1e9:.2f}"
            axes.text(0, reached + size / 2e9, words, ha="center", va="center", fontsize=7.5)
        reached += size / 1e9
    axes.set_xticks([0], [f"at its highest: {reached:.2f} GB\n({estimate.peak.phase})"])
    axes.set_ylabel("GB (10⁹ bytes)")


def _areas(axes: Any, estimate: StepEstimate) -> None:
    steps = range(len(estimate.timeline))
    layers = [[moment.bytes[name] / 1e9 for moment in estimate.timeline] for name in COMPONENTS]
    axes.stackplot(steps, layers, labels=COMPONENTS, colors=[FILLS[name] for name in COMPONENTS])
    starts = {"forward, layer 0": "forward", "loss, forward": "loss", "optimizer": "optimizer"}
    last = f"backward, layer {estimate.architecture.n_layers - 1}"
    shown = [(i, (starts | {last: "  backward"}).get(m.phase)) for i, m in enumerate(estimate.timeline)]
    shown = [(i, words) for i, words in shown if words]
    axes.set_xticks([i for i, _ in shown], [words for _, words in shown], ha="left")
    axes.set_xlim(0, len(estimate.timeline) - 1)
    axes.set_title("the step in time, tensors alone", fontsize=9)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(COMPONENTS), fontsize=8, frameon=False
    )
