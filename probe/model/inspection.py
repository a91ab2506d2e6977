"""What a model is like, judged when it is loaded: what its facts say is seen in a short forward, or is a size of its configuration.

A model that is another thing is refused. The judge is the plain model: eight tokens, whole and in parts, must give its logits, and
each layer's W_O must map what heads read to what the attention gives. So support for an architecture is never a claim about
its name.
"""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from probe.errors import ModelUnavailable
from probe.model import rope
from probe.model.attention import KVCache, Piece, Recorder, UnnumberedLayer
from probe.model.exact import in_float32
from probe.model.gates import gate_gaps, normed_reads
from probe.model.structure import (
    LayerFacts,
    ModelFacts,
    attention_facts,
    context_length,
    float32_residual,
    has_no_memory,
    is_plain,
    is_projection,
    mlp_width,
    selected_keys,
    state_facts,
    watched_modules,
)
from probe.model.sublayers import states_of
from probe.model.unregistered import adds_residual

Model = Any
"""A `probe.model.hooked.Model` whose facts are not known yet: it is what is looked at here, and what looks itself over."""

LOOSE = {True: 1e-3, False: 6e-2}
"""Largest difference of logits from the plain model's, of their maximum, in float32 and in less."""
_AS_NEAR = 1.5
"""How much further from float32 than the plain model's its logits may be where both round."""
_FAILURES = (AttributeError, TypeError, ValueError, RuntimeError, LookupError, AssertionError)
"""What a model that is not built as others are raises when it runs with another cache and another attention."""


class OutOfMemory(ModelUnavailable):
    """A model may be one that can be captured, and its device has no memory left to see."""


@dataclass(frozen=True)
class PlainPass:
    """A short forward of the plain model, and what it shows."""

    tokens: Tensor
    """[1, position]"""
    logits: Tensor
    """[1, position, d_vocab]"""
    product: Tensor
    """What the unembedding gives of the last states, alike: the logits before any factor and softcap"""
    n_ctx: int
    rotary: dict[nn.Module, int]
    """Modules whose frequencies depend on the length; see `probe.model.rope`"""
    switches: tuple[int, ...]
    states: list[Any]
    """By block the states [1, position, d_model] behind it, and whatever else it gives"""


def plain_pass(model: Model) -> PlainPass:
    """Run the plain model on a few tokens; refuses one that is not laid out as decoders are, gives NaN or fails by itself."""
    config, n_layers = model.config, len(model.blocks)
    if config.num_hidden_layers != n_layers:
        if getattr(config, "encoder_layers", None):
            raise refusal(model, "it is the decoder of a model that has an encoder as well")
        configured = config.num_hidden_layers
        raise refusal(
            model,
            f"its configuration says that it has {configured} layers, and it has {n_layers} decoder blocks",
        )
    tokens = torch.arange(2, 10)[None] % config.vocab_size
    calls: dict[nn.Module, tuple] = {}
    states: list[Any] = []
    n_ctx = context_length(config)
    if n_ctx < tokens.shape[1]:
        limit = "a query sees all of" if selected_keys(config) == n_ctx else "its context has"
        raise ModelUnavailable(
            f"{model.source.name}: {limit} {n_ctx} positions, and a prompt of {tokens.shape[1]} tokens is what it is checked "
            "with: take a model with more"
        )
    hooks = [block.register_forward_hook(lambda _m, _i, out: states.append(out)) for block in model.blocks]
    last: list[Tensor] = []
    hooks.append(model.decoder.register_forward_hook(lambda _m, _i, out: last.append(out[0])))
    with torch.inference_mode(), rope.watched(model.decoder, calls):
        try:
            logits = model.hf(input_ids=tokens.to(model.device), use_cache=False).logits.float()
        except _FAILURES as error:
            refuse_without_memory(error, model, "a short forward pass of the plain model ran")
            words = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise refusal(model, f"transformers' own forward pass of it fails: {words}") from error
        finally:
            for hook in hooks:
                hook.remove()
    if bool(torch.isnan(logits).any()):
        raise ModelUnavailable(f"{model.source.name}: {_not_finite(model)}")
    with torch.inference_mode():
        rotary, switches = rope.switches(calls, n_ctx)
    head = model.hf.get_output_embeddings()
    with torch.inference_mode():
        product = head(last[-1].to(head.weight.device, head.weight.dtype)).float()
    return PlainPass(tokens, logits, product, n_ctx, rotary, switches, states)


def logit_factor(model: Model, plain: PlainPass) -> float:
    """What a model multiplies its logits with (Cohere, Granite, Falcon-H1), seen by what it does: names and signs differ.

    A number of the configuration, or one over it, where it is as good as one of these: what is seen has been rounded.
    """
    logits, cap, config = plain.logits, model.softcap, model.config
    if cap is not None:
        logits = cap * torch.atanh((logits / cap).clamp(-1 + 1e-6, 1 - 1e-6))
    seen = float((logits * plain.product).sum() / plain.product.square().sum())
    named = [getattr(config, name, None) for name in ("logit_scale", "logits_scaling")]
    loose = 1e-4 if model.dtype == torch.float32 else 2e-2
    for numbers in ([1.0, *named], config.to_dict().values()):
        plain_numbers = [float(n) for n in numbers if isinstance(n, int | float) and n]
        candidates = [*plain_numbers, *(1 / n for n in plain_numbers)]
        nearest = min(candidates, key=lambda number: abs(number - seen))
        if abs(nearest - seen) < loose * abs(seen):
            return nearest
    return seen


def traced_facts(model: Model, plain: PlainPass) -> tuple[ModelFacts, dict[int, Any], list[Tensor | None]]:
    """Trace one short forward and refuse a model that probe would not capture faithfully: its facts, layer → W_O, and sinks by
    layer.

    Checks: every layer's attention came through the interface, W_O maps the recorded reads to the
    attention's own output, and logits equal those of the plain model.
    """
    config, n_layers, tokens = model.config, len(model.blocks), plain.tokens
    with watched_modules(model.blocks) as exchanges:
        logits, recorder, calls, cache = _trace(model, tokens[0].tolist())
    for layer, block in enumerate(model.blocks):
        if block not in exchanges:
            raise refusal(model, f"layer {layer} is not run on text alone")
        if (times := calls.get(layer, {}).get("times", 1)) > 1:
            raise refusal(
                model, f"layer {layer} calls its attention {times} times: a head reads more than one thing"
            )
        if layer not in calls and layer not in model.recurrent and not has_no_memory(config, layer):
            raise refusal(
                model, f"the attention of layer {layer} does not go through transformers' attention interface"
            )
    for layer, block in enumerate(model.blocks):
        if exchanges[block][1].ndim != 3 or exchanges[block][1].shape[2] != config.hidden_size:
            raise refusal(model, f"layer {layer} hands on several residual streams")
    _check_logits(
        model,
        logits,
        plain.logits.expand(2, -1, -1),
        _first_difference(model, plain, logits, exchanges),
        lambda: _trace(model, tokens[0].tolist())[0],
        {"input_ids": tokens.to(model.device)},
    )
    for switch in model.switches:
        _check_switch(model, switch, tokens)
    sinks = [calls[layer]["sink"] if layer in calls else None for layer in range(n_layers)]
    reads = recorder.states["z"]
    projections = {
        layer: _projection(model, layer, call["module"], reads[layer], exchanges)
        for layer, call in sorted(calls.items())
    }
    others = {
        layer: call["module"]
        for layer, call in calls.items()
        if not _takes(exchanges[projections[layer]][0], reads[layer])
    }
    normed = {
        layer: attention
        for layer, attention in others.items()
        if normed_reads(attention, projections[layer], reads[layer], exchanges, _takes)
    }
    others = {layer: attention for layer, attention in others.items() if layer not in normed}
    gated = _gated(model, others, projections, tokens[0].tolist()) | normed.keys()
    states = {layer: next(iter(by_row[1].values())).state for layer, by_row in cache.points.items()}
    layers = tuple(
        attention_facts(
            calls[layer],
            cache.handed.get(layer),
            states[layer].nbytes if layer in states else 0,
            layer in gated,
        )
        if layer in calls
        else state_facts(states.get(layer))
        for layer in range(n_layers)
    )
    first = next((of_layer for of_layer in layers if of_layer.n_heads), LayerFacts("none"))
    for layer, of_layer in enumerate(layers):
        if of_layer.n_heads not in (0, first.n_heads):
            raise refusal(
                model,
                f"layer {layer} has {of_layer.n_heads} heads, another has {first.n_heads}: layers must have as many",
            )
    facts = ModelFacts(
        n_layers=n_layers,
        n_heads=first.n_heads,
        n_kv_heads=first.n_kv_heads,
        d_model=int(config.hidden_size),
        d_head=first.d_head,
        d_value=first.d_value,
        d_mlp=mlp_width(config),
        d_vocab=int(model.hf.get_output_embeddings().weight.shape[0]),
        n_ctx=plain.n_ctx,
        n_params=model.hf.num_parameters(),
        model_type=str(config.model_type),
        attention=tuple(calls[layer]["facts"] if layer in calls else None for layer in range(n_layers)),
        layers=layers,
        # In float32 nothing tells: then as `outline` says.
        float32_residual=float32_residual(config)
        if model.dtype == torch.float32
        else all(states_of(given).dtype == torch.float32 for given in plain.states),
    )
    return facts, projections, sinks


def _first_difference(
    model: Model, plain: PlainPass, logits: Tensor, exchanges: dict[nn.Module, tuple]
) -> str:
    """What is first another thing than in the plain model: a layer's states, the logits, or those of a sequence in parts."""
    loose = LOOSE[model.dtype == torch.float32]
    if _gap(logits[1:], plain.logits) < loose:
        return "run in parts, on what it keeps of the parts before, its logits"
    for layer, (block, expected) in enumerate(zip(model.blocks, plain.states, strict=False)):
        # The traced pass has the whole sequence behind a part of it.
        whole = exchanges[block][1][:, -plain.tokens.shape[1] :]
        if not _gap(whole, states_of(expected)) < loose:
            return f"layer {layer} computes something that probe does not see: logits"
    return "more than one matrix stands between the last states and the logits: these"


def _trace(model: Model, tokens: list[int]) -> tuple[Tensor, Recorder, dict[int, dict], KVCache]:
    """Logits [2, position, d_vocab] of a sequence in two ways, what was recorded on the way, the attention calls, and the
    cache.

    The first row runs in three parts, the last of them a step, beside the second row, which runs whole: positions,
    cache and masks of both must be theirs.
    """
    recorder, cache = Recorder(z=True, layers=frozenset(range(len(model.blocks)))), KVCache(2, len(tokens))
    first, last = len(tokens) // 2 + 1, len(tokens) - 1
    with model.recording(recorder):
        both, current = model.forward(
            [Piece(0, 0, tokens[:first]), Piece(1, 0, tokens)], cache, recorder, trace=True
        )
        middle, _ = model.forward([Piece(0, first, tokens[first:last])], cache)
        end, _ = model.step(tokens[last:], cache, [last])
        in_parts = torch.cat([both[:, :first], middle, end], 1)
        logits = model.unembed(torch.cat([in_parts, both[:, first:]]))
    return logits, recorder, current.calls or {}, cache


def _projection(
    model: Model, layer: int, attention: nn.Module, read: Tensor, exchanges: dict[nn.Module, tuple]
) -> nn.Module:
    """The module W_O of an attention: given the reads [1, head, query, d_head] it gives the attention's output."""
    loose, output = LOOSE[model.dtype == torch.float32], exchanges[attention][1]
    ways = [
        (module, given)
        for module in attention.modules()
        if is_projection(module)
        and module in exchanges
        and (given := exchanges[module][0]) is not None
        and given.numel() == read.numel()
    ]
    taking = [module for module, given in ways if _takes(given, read)] or [
        # Behind a gate (`_gated`) it is told by what it gives.
        module
        for module, _ in ways
        if exchanges[module][1].numel() == output.numel()
        and _gap(exchanges[module][1].reshape(output.shape), output) < loose
    ]
    if len(taking) != 1:
        raise refusal(
            model,
            f"layer {layer}: W_O does not map the heads' reads to the attention output: "
            f"{len(taking)} projections of {type(attention).__name__} take them",
        )
    weight: Any = taking[0].weight
    if not is_plain(weight):
        raise refusal(
            model,
            f"layer {layer}: W_O is stored as {str(weight.dtype).removeprefix('torch.')}, and what heads write is measured with "
            "its numbers: take a checkpoint that is not quantised, or a GGUF file, which is dequantised",
        )
    given, gave = exchanges[taking[0]]
    matrix = weight.T if type(taking[0]).__name__ == "Conv1D" else weight
    bias = getattr(taking[0], "bias", None)
    with torch.inference_mode():
        product = nn.functional.linear(given.to(matrix), matrix, bias)
    if not _gap(gave.reshape(product.shape), product) < loose:
        raise refusal(
            model,
            f"layer {layer}: W_O ({type(taking[0]).__name__}) gives something else than its weights times what it is given",
        )
    if not adds_residual(attention) and not _gap(gave.reshape(output.shape), output) < loose:
        raise refusal(model, f"layer {layer}: the attention output is not what W_O gives")
    return taking[0]


def _takes(given: Tensor | None, read: Tensor) -> bool:
    """Whether a module is given the reads [1, head, query, d_head], head behind head."""
    flat = read.transpose(1, 2).flatten(2)
    if given is None or given.numel() != flat.numel():
        return False
    return _gap(given.reshape(flat.shape), flat) < LOOSE[read.dtype == torch.float32]


def _gated(
    model: Model,
    attentions: dict[int, nn.Module],
    projections: dict[int, nn.Module],
    tokens: list[int],
) -> frozenset[int]:
    """These layers, whose W_O is given another thing than the reads; refused where that is not the reads times a gate."""

    def run() -> None:
        with model.recording(None):
            model.forward([Piece(0, 0, tokens)], KVCache(1, len(tokens)))

    if attentions:
        gaps = gate_gaps(attentions, projections, run)
        for layer in attentions:
            if not gaps[layer] < LOOSE[model.dtype == torch.float32]:
                raise refusal(
                    model,
                    f"layer {layer}: W_O is given neither the heads' reads nor these times a gate or in an RMS norm",
                )
    return frozenset(attentions)


def _not_finite(model: Model) -> str:
    """Why the plain model gives NaN, and what to do."""
    names = [
        name
        for name, weight in model.hf.state_dict().items()
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all())
    ]
    if names:
        more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
        return f"its weights are not finite: {names[0]}{more} hold NaN or infinity; get the weights again"
    return f"it gives NaN in {str(model.dtype).removeprefix('torch.')}: try --dtype float32"


def _check_switch(model: Model, switch: int, tokens: Tensor) -> None:
    """Two runs in one pass, one that ends with the switch and one that crosses it, against the plain model."""
    n_tokens = tokens.shape[1]
    starts = [max(switch - n_tokens, 0), switch - n_tokens // 2]
    pieces = [
        Piece(row, 0, tokens[0].tolist(), torch.arange(n_tokens) + start, length=start + n_tokens)
        for row, start in enumerate(starts)
    ]

    def recorded() -> Tensor:
        with model.recording(None):
            hidden, _ = model.forward(pieces, KVCache(2, n_tokens))
            return model.unembed(hidden[0].view(2, n_tokens, -1))

    logits = recorded()
    for row, start in enumerate(starts):
        with torch.inference_mode():
            inputs = {
                "input_ids": tokens.to(model.device),
                "position_ids": (torch.arange(n_tokens)[None] + start).to(model.device),
            }
            expected = model.hf(**inputs, use_cache=False).logits.float()
        _check_logits(
            model,
            logits[row : row + 1],
            expected,
            f"behind position {start} logits",
            lambda row=row: recorded()[row : row + 1],
            inputs,
        )


def _check_logits(
    model: Model,
    logits: Tensor,
    expected: Tensor,
    what: str,
    recorded: Callable[[], Tensor],
    inputs: dict[str, Tensor],
) -> None:
    """Refuses a model whose logits [batch, position, d_vocab] are not those of the plain model, `expected`.

    In less than float32 both round, and part where a router then takes another expert, at that position and behind it.
    They pass if the same passes agree in float32, and some position is as near to that as the plain model's are.
    """
    gap = _gap(logits, expected)
    if gap < LOOSE[model.dtype == torch.float32]:
        return
    if model.dtype != torch.float32:
        with in_float32(model.hf, model.decoder), torch.inference_mode():
            exact = model.hf(**inputs, use_cache=False).logits.to(logits.device)
            again = recorded()
        plain, ours = ((given.to(exact) - exact).norm(dim=-1) for given in (expected, logits))
        if _gap(again, exact) < LOOSE[True] and bool(ours.min() <= _AS_NEAR * plain.median()):
            return
    raise refusal(model, f"{what} differ from the plain model's by {gap:.1e} of their maximum")


def _gap(states: Tensor, expected: Tensor) -> float:
    """Largest difference, of the largest number that is expected (heads may read nothing on the traced tokens)."""
    return float((states - expected.to(states)).abs().max() / (expected.abs().max() or 1.0))


def refusal(model: Model, why: str) -> ModelUnavailable:
    kind = model.hf.config.model_type
    return ModelUnavailable(f"{model.source.name}: architecture {kind} cannot be captured faithfully: {why}")


@contextmanager
def failures_refused(model: Model) -> Iterator[None]:
    """What a model raises that is built as no other is becomes a refusal, with the layer and the reason."""
    try:
        yield
    except _FAILURES as error:
        refuse_without_memory(error, model, "a short forward pass ran")
        raise refusal(model, _why(error, model.blocks)) from error


def refuse_without_memory(error: Exception, model: Model, what: str) -> None:
    """Raises OutOfMemory where an error is that of a device, or of the CPU, that has no memory left."""
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        raise OutOfMemory(
            f"{model.source.name}: out of memory while {what}: take a smaller dtype, a shorter context or another device"
        ) from error


def _why(error: Exception, blocks: Sequence[nn.Module]) -> str:
    """The reason in a sentence: what an error was raised by and over; its own words, which speak of the code, follow where that
    is a guess."""
    if isinstance(error, UnnumberedLayer):
        return str(error)
    if isinstance(error, AttributeError) and isinstance(error.obj, PretrainedConfig):
        return f"its configuration says nothing of `{error.name}`, as those of decoders do"
    inside = [
        (module, frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if isinstance(module := frame.f_locals.get("self"), nn.Module)
        and str(frame.f_globals.get("__name__")).startswith("transformers.models")
    ]
    words = ": ".join((type(error).__name__, *str(error).strip().splitlines()[:1]))
    if not inside:
        return f"its forward pass fails ({words})"
    module, file, line = inside[-1]
    part, code = type(module).__name__, linecache.getline(file, line)
    layers = [layer for layer, block in enumerate(blocks) if any(block is entered for entered, *_ in inside)]
    where = f"layer {layers[0]}: {part}" if layers else part
    if any(word in f"{code} {error}" for word in ("cache", "past_key_values")):
        return f"{where} keeps a memory that is neither keys and values nor a state which probe knows"
    if "mask" in code:
        return f"{where} computes with a mask of its own, and probe masks in the attention alone"
    return (
        f"{where} cannot run on several sequences in one pass, without padding, as probe runs them ({words})"
    )
