"""Train a sparse autoencoder on the states of your own runs, and ask whether the choice of a tool needs its features.

    .venv/bin/python examples/train_an_autoencoder.py [MODEL] [LAYER]

It is trained on the tokens of other tasks than those that are measured, and written as SAELens writes one, so that
`probe features RUN --sae autoencoder` reads it, here or later. Published autoencoders see a billion tokens; this one sees the
shipped tasks, a few tens of thousands, each some tens of times. `sae_unexplained` says what that is worth.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import probe

TRAIN = ("tasks/steering.jsonl", "tasks/cot.jsonl", "tasks/prompting.jsonl", "tasks/chains.jsonl")
MEASURED = "tasks/tools.jsonl"
SHOWN = (
    "sae_unexplained",
    "sae_l0",
    "sae_dead",
    "feature_tools",
    "feature_flip_rate",
    "feature_flip_difference",
)


def main(model: str = "smollm2-135m", layer: str = "19") -> None:
    states = torch.cat([token_states(tasks, model, int(layer)) for tasks in TRAIN])
    write_autoencoder(train(states), Path("autoencoder"), int(layer))
    run = probe.run(MEASURED, model=model, analyze=False)
    probe.features(run, "autoencoder")
    sys.stdout.write("\n".join([f"trained on {len(states)} tokens", *figures(run), ""]))


def token_states(tasks: str, model: str, layer: int) -> torch.Tensor:
    """The residual stream behind a layer at every token of a task file, float32 [token, d_model].

    The first token of a text is left out: nearly all attention rests there, and its state is many times longer.
    """
    run = probe.run(
        tasks, model=model, capture="resid_post:all", layers=[layer], max_new_tokens=1, analyze=False
    )
    return torch.cat(
        [task[name][0, 1:].float() for task in run for name in task if name.endswith("resid_post")]
    )


def train(
    states: torch.Tensor, wider: int = 4, k: int = 32, steps: int = 2000, batch: int = 512
) -> dict[str, torch.Tensor]:
    """A top-k autoencoder of states [token, d_in] with `wider` times as many features [Gao et al. 2024], k of them active."""
    torch.manual_seed(0)
    d_in = states.shape[1]
    mean, scale = states.mean(0), states.sub(states.mean(0)).norm(dim=1).mean() / d_in**0.5
    x = (states - mean) / scale
    w_dec = torch.nn.functional.normalize(torch.randn(wider * d_in, d_in), dim=1)
    w_enc, w_dec = w_dec.T.clone().requires_grad_(), w_dec.requires_grad_()
    b_enc, b_dec = torch.zeros(wider * d_in, requires_grad=True), torch.zeros(d_in, requires_grad=True)
    optimizer = torch.optim.Adam([w_enc, w_dec, b_enc, b_dec], lr=1e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, 5 * (1 - step / steps))
        rows = x[torch.randint(len(x), (batch,))]
        best = ((rows - b_dec) @ w_enc + b_enc).topk(k)
        features = torch.zeros(batch, wider * d_in).scatter(1, best.indices, best.values.relu())
        loss = (features @ w_dec + b_dec - rows).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            w_dec.div_(w_dec.norm(dim=1, keepdim=True))
    # In the units of the model: f((x − mean)/scale − b) is f of x once the scale is in the weights and the mean in the bias.
    tensors = {"W_enc": w_enc / scale, "W_dec": w_dec * scale, "b_enc": b_enc, "b_dec": b_dec * scale + mean}
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def write_autoencoder(tensors: dict[str, torch.Tensor], directory: Path, layer: int, k: int = 32) -> None:
    """cfg.json and sae_weights.safetensors, as SAELens 6 writes them."""
    d_in, d_sae = tensors["W_enc"].shape
    config = {
        "architecture": "topk",
        "d_in": d_in,
        "d_sae": d_sae,
        "k": k,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {"hook_name": f"blocks.{layer}.hook_resid_post"},
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "cfg.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, directory / "sae_weights.safetensors")


def figures(run: probe.Run) -> list[str]:
    """A line a number of the whole run, with its interval and n."""
    rows = run.measures()
    rows = rows[(rows.task_id == "") & rows.name.isin(SHOWN)]
    lines = []
    for row in rows.itertuples():
        place = [
            getattr(row, axis)
            for axis in ("state", "features", "replacement")
            if isinstance(getattr(row, axis), str)
        ]
        interval = f" [{row.low:.2f}, {row.high:.2f}]" if row.low == row.low else ""
        lines.append(f"{' '.join([row.name, *place])}: {row.value:.2f} {row.unit}{interval}, n = {row.n}")
    return lines


if __name__ == "__main__":
    main(*sys.argv[1:])
