"""The golden runs: small committed runs whose activations are regression tests. `make golden` renews them.

Renew them only when a change of the numbers is meant, and say so in the changelog.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import probe

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "runs" / "golden"
MODELS = ("tiny-llama", "tiny-gemma", "tiny-gpt2", "tiny-neox")
STATES = "resid_post,resid_span_mean,attn_to_spans,value_to_spans,logits,log_probs"
RUNS = {"states": ("golden.jsonl", STATES), "memory": ("golden-memory.jsonl", "all")}


def make(model, kind: str, out: Path):
    """Run one golden file on a loaded model (or a name)."""
    tasks, sites = RUNS[kind]
    path = Path(__file__).parent / "data" / tasks
    argv = ["probe", "run", f"tests/data/{tasks}"]
    return probe.run(
        path.relative_to(ROOT) if Path.cwd() == ROOT else path,
        model=model,
        out=out,
        analyze=False,
        argv=argv,
        capture=sites,
        reasoning="reference",
        max_new_tokens=6,
    )


def main() -> None:
    for model in MODELS:
        for kind in RUNS:
            out = GOLDEN / f"{model}-{kind}"
            shutil.rmtree(out, ignore_errors=True)
            make(f"random:{model}", kind, out)
            (out / ".lock").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
