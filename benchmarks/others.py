"""The contestants that are not us: transformers, TransformerBridge, and one forward per candidate.

All of them generate the same number of tokens: no id ends a sequence. (`min_new_tokens` would forbid the end of
sequence instead, and so change the tokens.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import Inputs

BRIDGE_SITES = ("hook_resid_post", "attn.hook_pattern")
"""What the bridge keeps: blocks.N.hook_resid_post, and blocks.N.attn.hook_pattern, without which there is no
attention mass."""
NO_END = -1


def settings(n_new: int, cache: str | None = None) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=n_new,
        do_sample=False,
        eos_token_id=NO_END,
        pad_token_id=0,
        cache_implementation=cache,
    )


@contextmanager
def attention(hf: Any, name: str) -> Iterator[None]:
    """The named attention of transformers for a while, and gradients off; not sdpa where a model has none."""
    before = hf.config._attn_implementation
    if name == "sdpa" and not getattr(hf, "_supports_sdpa", True):
        name = before
    hf.set_attn_implementation(name)
    try:
        with torch.inference_mode():
            yield
    finally:
        hf.set_attn_implementation(before)


def plain(hf: Any, inputs: Inputs, cache: str | None = None) -> list[list[int]]:
    """`generate` with sdpa, one left-padded batch; the new tokens. A `static` cache compiles the step on CUDA."""
    tokens, mask = (tensor.to(hf.device) for tensor in inputs.padded())
    with attention(hf, "sdpa"):
        asked = settings(inputs.n_new, cache)
        out = hf.generate(input_ids=tokens, attention_mask=mask, generation_config=asked)
    return out[:, tokens.shape[1] :].tolist()


def plain_one_by_one(hf: Any, inputs: Inputs) -> list[list[int]]:
    return [plain(hf, Inputs([plan], inputs.n_new))[0] for plan in inputs.plans]


def eager(hf: Any, inputs: Inputs) -> Any:
    """`generate` with eager attention, one left-padded batch, that returns all transformers can return."""
    tokens, mask = (tensor.to(hf.device) for tensor in inputs.padded())
    with attention(hf, "eager"):
        return hf.generate(
            input_ids=tokens,
            attention_mask=mask,
            generation_config=settings(inputs.n_new),
            return_dict_in_generate=True,
            output_hidden_states=True,
            output_attentions=True,
            output_logits=True,
        )


def bridge(bridged: Any, inputs: Inputs) -> Tensor:
    """TransformerBridge's `generate`, one left-padded batch, nothing kept; prompts and new tokens, padded."""
    tokens, mask = (tensor.to(bridged.cfg.device) for tensor in inputs.padded())
    with torch.inference_mode():
        return bridged.generate(tokens, attention_mask=mask, **_bridge_settings(inputs.n_new))


def bridge_with_cache(bridged: Any, inputs: Inputs) -> list[tuple[list[int], Any]]:
    """`generate(return_cache=True, names_filter=…)`, one by one: the bridge refuses it for a batch.

    It keeps nothing while it generates: it runs prompt and completion once more, and caches that.
    """
    observed = []
    for prompt in inputs.prompts:
        tokens = torch.tensor([prompt.token_ids], device=bridged.cfg.device)
        with torch.inference_mode():
            out, cache = bridged.generate(
                tokens, return_cache=True, names_filter=wanted, **_bridge_settings(inputs.n_new)
            )
        observed.append((out[0, tokens.shape[1] :].tolist(), cache))
    return observed


def bridge_cache_of(bridged: Any, inputs: Inputs, out: Tensor) -> None:
    """What the bridge advises for a batch: `run_with_cache` on what its `generate` returned, left-padded."""
    mask = inputs.padded()[1].to(out.device)
    grown = torch.cat([mask, mask.new_ones(len(mask), inputs.n_new)], 1)
    with torch.inference_mode():
        bridged.run_with_cache(out, names_filter=wanted, attention_mask=grown)


def wanted(name: str) -> bool:
    return name.endswith(BRIDGE_SITES)


def _bridge_settings(n_new: int) -> dict[str, Any]:
    return {
        "max_new_tokens": n_new,
        "stop_at_eos": False,
        "do_sample": False,
        "return_type": "tokens",
        "verbose": False,
    }


def prompt_forward(hf: Any, token_ids: Sequence[int]) -> Tensor:
    """One forward of the prompt as `generate` begins: cache kept, logits of the last position."""
    with attention(hf, "sdpa"):
        return hf(input_ids=torch.tensor([token_ids], device=hf.device), logits_to_keep=1).logits


def forward_per_candidate(
    hf: Any, token_ids: Sequence[int], candidates: Sequence[Sequence[int]], batch_size: int
) -> list[float]:
    """Σ log P of each candidate with a whole forward each, as lm-evaluation-harness's HFLM does it.

    Prompt and candidate without its last token go through the model, padded on the right in batches; logits
    of all positions, log_softmax over all of them, the candidate's own are read.
    """
    sums: list[float] = []
    for start in range(0, len(candidates), batch_size):
        chunk = candidates[start : start + batch_size]
        rows = [[*token_ids, *candidate][:-1] for candidate in chunk]
        width = max(map(len, rows))
        padded = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=hf.device)
        with attention(hf, "sdpa"):
            log_probs = hf(input_ids=padded).logits.log_softmax(-1)
        for row, candidate, states in zip(rows, chunk, log_probs, strict=True):
            candidate_rows = states[len(row) - len(candidate) : len(row)]
            targets = torch.tensor(candidate, device=candidate_rows.device)
            sums.append(float(candidate_rows.gather(1, targets[:, None]).sum()))
        del log_probs
    return sums


def on_the_prompts_cache(
    hf: Any, token_ids: Sequence[int], candidates: Sequence[Sequence[int]]
) -> list[float]:
    """Σ log P of each candidate by plain transformers, each on a copy of the prompt's cache: an oracle, not timed."""
    log_probs = []
    with attention(hf, "sdpa"):
        prompt = hf(input_ids=torch.tensor([token_ids], device=hf.device), use_cache=True, logits_to_keep=1)
        first = prompt.logits[0, -1:]
        for candidate in candidates:
            logits = first
            if len(candidate) > 1:
                tokens = torch.tensor([candidate[:-1]], device=hf.device)
                cache = copy.deepcopy(prompt.past_key_values)
                logits = torch.cat([first, hf(input_ids=tokens, past_key_values=cache).logits[0]])
            targets = torch.tensor(candidate, device=hf.device)
            log_probs.append(float(logits.float().log_softmax(-1).gather(1, targets[:, None]).sum()))
    return log_probs
