"""A sweep as a picture: training and validation loss, forgetting, and forgetting against what was learnt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probe.errors import UsageError


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Write a PNG or SVG by the name's ending. Raises UsageError for another."""
    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"--plot {path}: a name that ends in .png or .svg")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss, forgotten, trade) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    colors = plt.get_cmap("viridis")
    for number, (rank, curves) in enumerate(found["curves"].items()):
        color = "black" if rank == "full" else colors(number / max(1, len(found["curves"]) - 1))
        label = "all weights" if rank == "full" else f"rank {rank}"
        for index, curve in enumerate(curves):
            looks = curve["looks"]
            steps = [look["step"] for look in looks]
            named = label if index == 0 else None
            loss.plot(steps, [look["validation_loss"] for look in looks], color=color, label=named)
            loss.plot(steps, [look["train_loss"] for look in looks], color=color, linestyle=":")
            forgotten.plot(steps, [look["text_kl"] for look in looks], color=color, label=named)
            trade.plot(
                [look["validation_loss"] for look in looks],
                [look["text_kl"] for look in looks],
                color=color,
                marker=".",
                label=named,
            )
    loss.set(xlabel="step", ylabel="nats a token", title="loss: validation (line), training (dots)")
    forgotten.set(xlabel="step", ylabel="nats a token", title="forgetting: KL(base‖tuned) on unrelated text")
    trade.set(
        xlabel="validation loss, nats a token", ylabel="KL on text", title="forgetting at equal learning"
    )
    trade.invert_xaxis()
    loss.legend(frameon=False, fontsize="small")
    figure.savefig(path)
    plt.close(figure)
