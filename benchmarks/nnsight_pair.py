"""Section: nnsight against plain `generate`, both in one process of nnsight's own environment.

nnsight pins other versions than we do, so it is never imported here. Its ratio to plain `generate` can be put
next to ours; its seconds cannot, they come from another process.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import agreement, inputs
from benchmarks import ours as engine
from benchmarks.table import Check, Figure, Ratio, Section

PYTHON = Path(__file__).parent / ".nnsight-venv/bin/python"
SCRIPT = Path(__file__).parent / "nnsight_side.py"


def measure(ours: engine.Ours, *, size: int, n_new: int, rounds: int, threads: int) -> Section:
    section = Section("nnsight", "nnsight: resid_post of every layer and step kept while generating")
    if not PYTHON.exists():
        section.notes.append("Not measured: its environment is missing; `make bench` tries to install it.")
        return section
    batch = inputs.batch(ours, size, n_new)
    tokens, mask = batch.padded()
    base = type(ours.hf.base_model).__name__
    with tempfile.TemporaryDirectory() as folder:
        ours.hf.save_pretrained(folder)
        ours.model.tokenizer.save_pretrained(folder)
        answer = _ask(
            {
                "model": folder,
                "threads": threads,
                "device": ours.device,
                "dtype": ours.dtype,
                "tokens": tokens.tolist(),
                "mask": mask.tolist(),
                "blocks": block_paths(ours),
                "new": n_new,
                "rounds": rounds,
            },
        )
    if "error" in answer:
        section.notes.append(f"Not measured: {answer['error']}")
        return section
    timed = answer["rounds"]
    section.ratios = [Ratio("nnsight / plain generate", [r["nnsight"] / r["plain"] for r in timed])]
    section.figures = [
        Figure("nnsight", [r["nnsight"] for r in timed], "s"),
        Figure("plain generate, nnsight's process", [r["plain"] for r in timed], "s"),
    ]
    section.checks = _checks(ours, batch, answer)
    versions = ", ".join(f"{name} {version}" for name, version in answer["versions"].items())
    section.notes.append(f"{versions}; {base}; same batch, padded on the left; nothing is written.")
    return section


def block_paths(ours: engine.Ours) -> list[str]:
    """Dotted names of the decoder blocks inside the model."""
    names = {id(module): name for name, module in ours.hf.named_modules()}
    return [names[id(block)] for block in ours.model.blocks]


def _checks(ours: engine.Ours, batch: inputs.Inputs, answer: dict[str, Any]) -> list[Check]:
    """Its tokens are plain's, all steps are there, and the norms of its last rows are those of our rows."""
    judged = ours.dtype == "float32" and ours.device == "cpu"
    outcomes = engine.generate(ours, batch.plans, batch.n_new, capture="resid_post,log_probs", out=None)
    same = all(r["same_tokens"] for r in answer["rounds"])
    complete = all(r["steps"] == batch.n_new for r in answer["rounds"])
    checks = [
        Check("tokens: nnsight, its own plain generate", same, "identical" if same else "different"),
        Check("steps: nnsight", complete, f"{answer['rounds'][0]['steps']} of {batch.n_new} kept"),
        agreement.check_tokens("nnsight", outcomes, answer["tokens"], judged),
    ]
    worst = 0.0
    for row, outcome in enumerate(outcomes):
        for layer, states in enumerate(outcome.tensors["resid_post"].double()):
            expected = float(states[0].norm())
            worst = max(worst, abs(answer["norms"][layer][row] - expected) / expected)
    passed = worst <= agreement.RESID if judged else None
    limit = f"limit {agreement.RESID:.0e}"
    checks.append(
        Check("norm of resid_post, first row: nnsight", passed, f"max relative Δ {worst:.1e} ({limit})")
    )
    return checks


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    child = subprocess.run(
        [str(PYTHON), str(SCRIPT)], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    if child.returncode:
        last = child.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"error": f"its process ended with exit code {child.returncode}: {last[0][:200]}"}
    return json.loads(child.stdout.splitlines()[-1])
