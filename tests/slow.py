"""Scores under masks and head ablations, computed the slow plain way: the oracle of interventions.

One full forward of transformers' own eager attention for each candidate: no cache, no batch, no packing, nothing
of probe's. A mask is added to the layer's additive mask, a head is replaced where its read enters the output
projection, both by hooks on the attention modules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_OUT_PROJECTIONS = ("o_proj", "c_proj", "dense", "out_proj")

Head = tuple[int, int]
"""(layer, query head)."""


def slow_scores(
    hf,
    prompt_ids: Sequence[int],
    candidates: Sequence[Sequence[int]],
    *,
    masked: Iterable[range] = (),
    rows_from: int = 0,
    rows_to: int | None = None,
    layers: Collection[int] | None = None,
    zero_heads: Iterable[Head] = (),
    reads: Mapping[Head, Tensor] | None = None,
) -> list[float]:
    """Σ log P of each candidate's tokens after the prompt, nats.

    Rows rows_from … rows_to − 1 (by default to the end, the candidate's own rows included) do not see the key
    positions in `masked`, in the given layers (None: all); what they do see is renormalised. In the same rows the
    reads of `zero_heads` are zero before W_O, and those of `reads` are the given vectors [d_head]. A row that would
    see no key is an error.
    """
    collected = []
    for candidate in candidates:
        ids = [*prompt_ids, *candidate]
        with intervened(hf, masked, rows_from, rows_to, layers, zero_heads, reads), torch.no_grad():
            logits = hf(torch.tensor([ids[:-1]], device=hf.device), use_cache=False).logits[0].double()
        log_probs = logits[len(prompt_ids) - 1 :].log_softmax(-1)
        collected.append(float(sum(log_probs[row, token] for row, token in enumerate(candidate))))
    return collected


def slow_attention(hf, token_ids: Sequence[int], **intervention) -> Tensor:
    """Attention after softmax, [layer, head, query position, key position], from one eager forward."""
    with intervened(hf, **intervention), torch.no_grad():
        out = hf(torch.tensor([list(token_ids)], device=hf.device), use_cache=False, output_attentions=True)
    return torch.stack([pattern[0] for pattern in out.attentions])


def slow_reads(hf, token_ids: Sequence[int], row: int) -> Tensor:
    """What each head reads at one row, before W_O: [layer, head, d_head]."""
    kept: dict[int, Tensor] = {}
    hooks = [
        projection.register_forward_pre_hook(
            lambda _, inputs, layer=layer: kept.__setitem__(layer, inputs[0])
        )
        for layer, (_, projection) in _attention(hf).items()
    ]
    try:
        with eager(hf), torch.no_grad():
            hf(torch.tensor([list(token_ids)], device=hf.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    n_heads = hf.config.num_attention_heads
    return torch.stack([kept[layer][0, row].view(n_heads, -1) for layer in sorted(kept)])


@contextmanager
def eager(hf) -> Iterator[None]:
    """transformers' plain attention for a while."""
    configs = {id(m.config): m.config for m in hf.modules() if hasattr(m, "config")}.values()
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


@contextmanager
def intervened(
    hf,
    masked: Iterable[range] = (),
    rows_from: int = 0,
    rows_to: int | None = None,
    layers: Collection[int] | None = None,
    zero_heads: Iterable[Head] = (),
    reads: Mapping[Head, Tensor] | None = None,
) -> Iterator[None]:
    """The model with keys masked and heads replaced, as `slow_scores` says."""
    rows = slice(rows_from, rows_to)
    keys = sorted({key for span in masked for key in span})
    d_head = next(iter(_attention(hf).values()))[1].weight.numel() // (
        hf.config.num_attention_heads * hf.config.hidden_size
    )
    replaced: dict[int, dict[int, Tensor]] = {}
    for (layer, head), read in [
        *(((*at,), torch.zeros(d_head)) for at in zero_heads),
        *(reads or {}).items(),
    ]:
        replaced.setdefault(layer, {})[head] = read
    hooks = []
    for layer, (module, projection) in _attention(hf).items():
        if keys and (layers is None or layer in layers):
            hooks.append(module.register_forward_pre_hook(_hider(keys, rows), with_kwargs=True))
        if layer in replaced:
            hooks.append(projection.register_forward_pre_hook(_replacer(replaced[layer], rows, d_head)))
    try:
        with eager(hf):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _hider(keys: list[int], rows: slice):
    def hook(_module, args, kwargs):
        mask = kwargs["attention_mask"].clone()  # [batch or 1, 1, query, key], added to the scores
        n_rows, n_keys = mask.shape[-2:]
        shown = [key for key in keys if key < n_keys]
        lowest = torch.finfo(mask.dtype).min
        block = mask[..., rows, :]
        block[..., shown] = lowest
        assert (block > lowest / 2).any(-1).all(), f"a row among {rows} of {n_rows} would see no key"
        return args, {**kwargs, "attention_mask": mask}

    return hook


def _replacer(reads: Mapping[int, Tensor], rows: slice, d_head: int):
    def hook(_module, inputs):
        z = inputs[0].clone()  # [batch, row, head · d_head]
        for head, read in reads.items():
            z[:, rows, head * d_head : (head + 1) * d_head] = read.to(z)
        return (z, *inputs[1:])

    return hook


def _attention(hf) -> dict[int, tuple[Any, Any]]:
    """Per layer the attention module and its output projection."""
    by_name: dict[int, tuple[Any, Any]] = {}
    for module in hf.modules():
        names = [name for name in _OUT_PROJECTIONS if hasattr(module, name)]
        if hasattr(module, "layer_idx") and len(names) == 1:
            by_name[int(module.layer_idx)] = (module, getattr(module, names[0]))
    assert sorted(by_name) == list(range(hf.config.num_hidden_layers)), "an attention layer was not found"
    return by_name
