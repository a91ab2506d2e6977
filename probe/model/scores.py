"""What a layer's queries and keys are made of: the linear maps that they are of the residual stream, norms held.

With the scale of the norm before the attention, and of norms of queries and keys (Qwen 3), held at the value that each has at a
position, queries and keys are linear in the residual stream there, rotary embedding included, up to a constant from
biases. So a score q·k before the softmax is a sum over what earlier layers wrote, on either side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from probe.errors import ModelUnavailable
from probe.model.attention import KVCache, Piece, Recorder
from probe.model.norms import norm_form
from probe.model.sublayers import states_of
from probe.model.unregistered import adapted

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from probe.model.hooked import Model

_NAME = "probe_scores"


class _QueriesAndKeys(Exception):
    """Queries and keys of a layer: the rest of the block is not run."""

    def __init__(self, query: Tensor, key: Tensor):
        super().__init__()
        self.query, self.key = query, key


def _attend(_module, query: Tensor, key: Tensor, *_args: Any, **_kwargs: Any):
    raise _QueriesAndKeys(query, key)


AttentionInterface.register(_NAME, _attend)


@dataclass
class _Block:
    """What a block was given in the forward pass that is taken apart."""

    inputs: tuple = ()
    named: dict[str, Any] = field(default_factory=dict)
    norms: dict[nn.Module, Tensor] = field(default_factory=dict)
    """Norms on the way to queries and keys → what each was given."""


class Writes:
    """What each layer wrote at every position of a sequence, and how a layer's queries and keys read it."""

    def __init__(self, model: Model, token_ids: Sequence[int], layers: Collection[int]):
        """`layers`: those whose queries and keys will be asked for. Raises ModelUnavailable for a family whose scores cannot
        be split."""
        if model.adapters:
            raise ModelUnavailable(
                f"{model.source.name}: attention of {model.facts.model_type} does not go through transformers' attention "
                "interface: scores cannot be split"
            )
        self.model = model
        n_layers = model.facts.n_layers
        writers = [of_layer.attention for of_layer in model.writers]
        recorder = Recorder(embedding=True, resid=True, queries=True, layers=frozenset(range(n_layers)))
        cache = KVCache(1, len(token_ids))
        self._blocks = {layer: _Block() for layer in layers}
        attention: dict[int, Tensor] = {}
        hooks = [
            writer.register_forward_hook(
                lambda _m, _i, out, layer=layer: attention.__setitem__(layer, states_of(out)[0])
            )
            for layer, writer in enumerate(writers)
            if writer is not None
        ]
        for layer, seen in self._blocks.items():
            hooks += self._watch(layer, seen)
        try:
            with model.recording(recorder):
                recorder.begin()
                model.forward([Piece(0, 0, list(token_ids))], cache, recorder)
        finally:
            for hook in hooks:
                hook.remove()
        factor = float(getattr(model.config, "residual_multiplier", None) or 1.0)
        before = recorder.states["embedding"][0][0]
        self.names: list[tuple[str, int | None]] = [("embedding", None)]
        """What wrote each part: its name and its layer."""
        parts = [before]
        for layer in range(max(self._blocks, default=0)):
            after = recorder.states["resid"][layer][0]
            parts += [attention[layer] * factor, after - before - attention[layer] * factor]
            self.names += [("attention", layer), ("mlp", layer)]
            before = after
        self._parts = torch.stack(parts)
        self._used = {
            layer: (recorder.states["queries"][layer][0].float(), cache.keys[layer][0].float())
            for layer in layers
        }
        """layer → queries and keys of the forward pass: [head, position, d_head]"""

    def _watch(self, layer: int, seen: _Block) -> list[Any]:
        block = self.model.blocks[layer]

        def keep(_module, inputs, named):
            seen.inputs, seen.named = inputs, dict(named)

        def norm(module, inputs):
            seen.norms[module] = inputs[0]

        inside = {module for part in (block, *block.children()) for module in part.children()} | {
            *block.children()
        }
        return [
            block.register_forward_pre_hook(keep, with_kwargs=True),
            *(m.register_forward_pre_hook(norm) for m in inside if norm_form_of(m) is not None),
        ]

    def read(self, layer: int, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Queries [part, head, position, d_head] and keys [part, kv_head, …] that a layer makes at some positions of what was
        written before it, in the order of `names`; the last part is what biases add. Their sum is what the layer uses.

        Raises ModelUnavailable where it is not, as behind a norm that `probe.model.norms` does not know.
        """
        seen, at = self._blocks[layer], torch.tensor(list(positions), device=self.model.device)
        n_parts = 1 + 2 * layer
        parts = self._parts[:n_parts, at]
        asked = torch.cat([parts, torch.zeros_like(parts[:1])])
        named = {name: _at(value, at, self._parts.shape[1]) for name, value in seen.named.items()}
        named |= {
            name: None
            for name, value in named.items()
            if name == "attention_mask" or isinstance(value, KVCache)
        }
        named |= {"use_cache": False} if "use_cache" in named else {}
        if "hidden_states" in named:
            named["hidden_states"], inputs = asked, ()
        else:
            inputs = (asked, *(_at(value, at, self._parts.shape[1]) for value in seen.inputs[1:]))
            inputs = tuple(None if isinstance(value, KVCache) else value for value in inputs)
        with torch.inference_mode(), self._held(seen, at), _routed(self.model):
            try:
                self.model.blocks[layer](*inputs, **named)
            except _QueriesAndKeys as stopped:
                query, key = stopped.query.float(), stopped.key.float()
            else:
                raise RuntimeError(f"layer {layer} computed no scores")
        query, key = (torch.cat([states[:-1] - states[-1:], states[-1:]]) for states in (query, key))
        loose = 1e-3 if self.model.dtype == torch.float32 else 6e-2
        for states, used in zip((query, key), self._used[layer], strict=True):
            used = used[:, at]
            if not (states.sum(0) - used).abs().max() <= loose * used.abs().max():
                raise ModelUnavailable(
                    f"{self.model.source.name}: queries and keys of layer {layer} are no sums of what was written before: scores "
                    "cannot be split"
                )
        return query, key

    @contextmanager
    def _held(self, seen: _Block, at: Tensor) -> Iterator[None]:
        """The norms before queries and keys, each at the scale that it had; undone on leaving."""
        methods = []
        for module, given in seen.norms.items():
            form = norm_form_of(module)
            assert form is not None
            scale = form.scale(given.float().index_select(1, at))
            bias = 0.0 if form.bias is None else form.bias.to(given.device)

            def linear(x, form=form, scale=scale, bias=bias):
                return (form.centred(x.float()) * scale * form.weight.to(x.device) + bias).to(x)

            methods.append((module, ("forward", linear)))
        with adapted(methods):
            yield


def norm_form_of(module: nn.Module):
    """`norm_form` of a module that has one vector of weights; None of another."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or any(True for _ in module.children()):
        return None
    return norm_form(module, weight.shape[0])


@contextmanager
def _routed(model: Model) -> Iterator[None]:
    """Attention goes to `_attend`; undone on leaving."""
    configs = {id(m.config): m.config for m in model.hf.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = _NAME
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def _at(value: Any, at: Tensor, n_positions: int) -> Any:
    """What of a block's arguments belongs to these positions: tensors whose second axis are positions."""
    if isinstance(value, tuple | list):
        return type(value)(_at(entry, at, n_positions) for entry in value)
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == n_positions:
        return value.index_select(1, at)
    return value
