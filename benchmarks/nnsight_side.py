"""nnsight against plain `generate`; run by the interpreter of nnsight's environment, where `probe` is not installed.

Reads one JSON request from standard input (model directory, left-padded tokens, mask, block names, settings) and
writes one JSON answer as the last line of standard output.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import nnsight  # pyright: ignore[reportMissingImports]
import torch
import transformers
from nnsight.modeling.transformers import TransformersModel  # pyright: ignore[reportMissingImports]


class Side:
    """One model, run plainly and through nnsight."""

    def __init__(self, request: dict[str, Any]):
        self.request, self.device = request, request["device"]
        dtype = getattr(torch, request["dtype"])
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(request["model"], dtype=dtype)
        self.model: Any = model.to(self.device).eval().requires_grad_(False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(request["model"])
        self.traced = TransformersModel(self.model, tokenizer=tokenizer, task="text-generation")
        self.inputs = {
            "input_ids": torch.tensor(request["tokens"], device=self.device),
            "attention_mask": torch.tensor(request["mask"], device=self.device),
        }
        self.blocks = [self._node(path) for path in request["blocks"]]

    def plain(self, inputs: dict[str, Any], n_new: int) -> Any:
        return self.model.generate(**inputs, generation_config=_settings(n_new))

    def nnsight(self, inputs: dict[str, Any], n_new: int) -> tuple[Any, Any]:
        """(tokens, cache): every block's output of every step is kept."""
        with self.traced.generate(**inputs, generation_config=_settings(n_new)) as tracer:
            cache = tracer.cache(modules=self.blocks)
            tokens = tracer.result.save()
        return tokens, cache

    def timed(self, contestant: Any) -> tuple[float, Any]:
        started = self._now()
        with torch.inference_mode():
            result = contestant(self.inputs, self.request["new"])
        return self._now() - started, result

    def outputs(self, cache: Any, path: str) -> list[Any]:
        """A block's outputs, one a step: [sequence, query, d_model]."""
        outputs = cache["model." + path].output
        outputs = outputs if isinstance(outputs, list) else [outputs]
        return [value[0] if isinstance(value, tuple) else value for value in outputs]

    def _node(self, path: str) -> Any:
        node: Any = self.traced
        for part in path.split("."):
            node = node[int(part)] if part.isdigit() else getattr(node, part)
        return node

    def _now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()


def _settings(n_new: int) -> Any:
    # No id ends a sequence: everybody generates the same number of tokens.
    return transformers.GenerationConfig(
        max_new_tokens=n_new, do_sample=False, eos_token_id=-1, pad_token_id=0
    )


def main() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    side = Side(request)
    first = {name: tensor[:1] for name, tensor in side.inputs.items()}
    with torch.inference_mode():
        side.plain(first, 2)
        side.nnsight(first, 2)
    rounds, states, tokens = [], [], None
    for _ in range(request["rounds"]):
        plain, expected = side.timed(side.plain)
        kept, (tokens, cache) = side.timed(side.nnsight)
        states = [side.outputs(cache, path) for path in request["blocks"]]
        same = bool((expected == tokens).all())
        rounds.append({"plain": plain, "nnsight": kept, "same_tokens": same, "steps": min(map(len, states))})
    assert tokens is not None
    answer = {
        "rounds": rounds,
        "tokens": tokens[:, len(request["tokens"][0]) :].tolist(),
        # The last position of a left-padded prompt is the row that emitted the first token.
        "norms": [steps[0][:, -1].double().norm(dim=-1).tolist() for steps in states],
        "versions": {module.__name__: module.__version__ for module in (nnsight, torch, transformers)},
    }
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
