"""`Model`: weights, tokenizer and facts of one causal LM, and the forward pass that can be recorded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from probe.errors import ModelUnavailable, UsageError
from probe.maths.reads import write_norm_factor
from probe.model import rope
from probe.model.attention import (
    NAME,
    Forward,
    KVCache,
    Piece,
    Recorder,
    active,
    current_lengths,
    edited,
)
from probe.model.edits import Edit, ResidualPatch, StateEdit, refuse_misfits
from probe.model.exact import in_float32
from probe.model.gates import gate_gaps
from probe.model.mixers import by_run, recurrents
from probe.model.names import Source
from probe.model.products import FEW_ROWS_UNEMBEDDED, few_rows, fits, stand_ins
from probe.model.structure import (
    LayerFacts,
    ModelFacts,
    accepted,
    attention_facts,
    blocks_entered,
    context_length,
    decoder_of,
    has_no_memory,
    is_projection,
    mlp_width,
    state_facts,
    watched_modules,
)
from probe.model.sublayers import Writers, see_writers, states_of
from probe.model.unregistered import adapted, adapters, adds_residual, needed_inputs

_LOOSE = {True: 1e-3, False: 6e-2}
"""Largest difference of logits from the plain model's, of their maximum, in float32 and in less."""
_FAILURES = (AttributeError, TypeError, ValueError, RuntimeError, LookupError, AssertionError)
"""What a model that is not built as others are raises when it runs with another cache and another attention."""
_AS_NEAR = 1.5
"""How much further from float32 than the plain model's its logits may be where both round."""


class Model:
    """A causal LM whose forward pass can be recorded.

    `hf` is the plain transformers model and stays plain: the attention name and the hooks are set for the
    time of a recorded forward only.
    """

    def __init__(self, hf: Any, tokenizer: Any, source: Source, origin: dict[str, Any]):
        self.hf = hf.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.source, self.origin = source, origin
        self.dtype: torch.dtype = hf.dtype
        self.device: torch.device = hf.get_input_embeddings().weight.device
        self.config = hf.config.get_text_config()
        """What the configuration says of the decoder; of a multimodal model its text part."""
        self.decoder, self.blocks = decoder_of(hf)
        self.switches: tuple[int, ...] = ()
        """Lengths beyond which rotary frequencies are others, for the whole sequence; see `probe.model.rope`."""
        self._rotary: dict[torch.nn.Module, int] = {}
        self._configs = {id(m.config): m.config for m in hf.modules() if hasattr(m, "config")}
        self._inputs = accepted(self.decoder)
        self._needed = needed_inputs(self.decoder, self.device)
        self.adapters = adapters(self.blocks)
        """What stands in for attention that does not go through transformers' attention interface."""
        self.recurrent = recurrents(self.blocks)
        """layer → its module whose memory is a state of constant size (`probe.model.recurrent`)"""
        self._tuples: list[bool] = []
        with blocks_entered(self.blocks) as entered:
            try:
                self.facts, self._w_o = self._inspect()
            except _FAILURES as error:
                where = f" in layer {entered[-1]}" if entered else ""
                raise self._refusal(
                    f"its forward pass fails{where} ({type(error).__name__}: {error})"
                ) from error

    def __repr__(self) -> str:
        facts, dtype = self.facts, str(self.dtype).removeprefix("torch.")
        shape = f"{facts.n_layers} layers × {facts.n_heads} heads, d_model {facts.d_model}"
        return f"<{type(self).__name__} {self.source.name}: {shape}, {dtype} on {self.device}>"

    # -- reading -------------------------------------------------------------------------------------------

    @cached_property
    def bridge(self):
        """A TransformerLens TransformerBridge on the same weights (structure copied, tensors shared)."""
        from transformer_lens.model_bridge import TransformerBridge

        shared = {id(t): t for t in [*self.hf.parameters(), *self.hf.buffers()]}
        twin = copy.deepcopy(self.hf, shared)
        return TransformerBridge.boot_transformers(
            str(self.origin["resolved"]), hf_model=twin, tokenizer=self.tokenizer, device=str(self.device)
        )

    @cached_property
    def write_norms(self) -> dict[int, Tensor]:
        """Layer with attention → [head, d_head, d_head]: ‖x W_O^h‖ = ‖R_h x‖, see `probe.maths.reads.write_norm_factor`."""
        return {layer: write_norm_factor(self.w_o(layer)) for layer in self._w_o}

    @cached_property
    def writers(self) -> list[Writers]:
        """The modules of each block that write to the residual stream, seen in one short forward."""

        def run() -> None:
            with self.recording(None):
                self.forward([Piece(0, 0, list(range(2, 10)))], KVCache(1, 8))

        factor = float(getattr(self.config, "residual_multiplier", None) or 1.0)
        loose = _LOOSE[self.dtype == torch.float32]
        # What a layer without attention has in its place is recurrent; with both no single module is the rest of the block.
        mixers = [self._w_o.get(layer) or self.recurrent.get(layer) for layer in range(len(self.blocks))]
        return see_writers(self.blocks, mixers, run, factor=factor, loose=loose)

    def w_o(self, layer: int) -> Tensor:
        """W_O of a layer by head: [head, d_head, d_model]."""
        projection = self._w_o[layer]
        weight = projection.weight if type(projection).__name__ == "Conv1D" else projection.weight.T
        return weight.view(self.facts.layers[layer].n_heads, -1, weight.shape[-1])

    def out_projection(self, layer: int) -> torch.nn.Module:
        """The module that maps a layer's reads to its attention's output."""
        return self._w_o[layer]

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits, float32, from final-normed hidden states [..., d_model], after any scale and softcap."""
        logits = self.uncapped_logits(hidden)
        if (cap := self.softcap) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def uncapped_logits(self, hidden: Tensor) -> Tensor:
        """As `unembed`, before any softcap: linear in `hidden`."""
        head = self.hf.get_output_embeddings()
        logits = _project(head, hidden.to(head.weight.device))
        config = self.config
        if (scale := getattr(config, "logit_scale", None)) is not None:
            logits = logits * scale
        if (divisor := getattr(config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        return logits.float()

    @property
    def softcap(self) -> float | None:
        """Logits become softcap · tanh(logits / softcap) (Gemma 2, RecurrentGemma)."""
        names = ("final_logit_softcapping", "logits_soft_cap")
        return next((cap for name in names if (cap := getattr(self.config, name, None)) is not None), None)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a generation by the model's own generation configuration."""
        ends = getattr(getattr(self.hf, "generation_config", None), "eos_token_id", None)
        return frozenset(ends if isinstance(ends, list | tuple) else [] if ends is None else [ends])

    def switched(self, length: int) -> int:
        """How many switches of rotary frequencies a sequence of that length lies beyond: keys of sequences that
        differ in it must not be shared."""
        return sum(length > switch for switch in self.switches)

    # -- running -------------------------------------------------------------------------------------------

    @contextmanager
    def recording(self, recorder: Recorder | None, edits: Iterable[Edit] = (), *, gradients: bool = False):
        """Route attention through probe and the residual stream into `recorder`; undone on leaving.

        `edits` are those that may be given inside: states of layers are changed at no other sites than theirs. With
        `gradients` torch can differentiate by what is recorded, on a cache that no other pass has written to.
        """
        before = {key: config._attn_implementation for key, config in self._configs.items()}
        hooks = self._edit_hooks([edit for edit in edits if isinstance(edit, StateEdit)])
        if recorder is not None:
            if "embedding" in recorder.wanted:
                hooks.append(
                    self.blocks[0].register_forward_pre_hook(_embedding_hook(recorder), with_kwargs=True)
                )
            for layer, block in enumerate(self.blocks):
                hooks.append(block.register_forward_hook(_resid_hook(layer, recorder)))
            if "gate" in recorder.wanted:
                hooks += [
                    self._w_o[layer].register_forward_pre_hook(_gate_hook(layer, recorder))
                    for layer in sorted(recorder.layers)
                    if self.facts.layers[layer].gated
                ]
            for site in sorted(recorder.wanted & {"attn_out", "mlp_out"}):
                for layer in sorted(recorder.layers):
                    hooks.append(
                        self._writer(site, layer).register_forward_hook(_written_hook(site, layer, recorder))
                    )
        for config in self._configs.values():
            config._attn_implementation = NAME
        try:
            graph = torch.enable_grad() if gradients else torch.inference_mode()
            products = [] if gradients else list(stand_ins(self.decoder))
            with (
                graph,
                rope.by_sequence(list(self._rotary), current_lengths),
                adapted([*self.adapters, *(by_run(*each) for each in self.recurrent.items()), *products]),
            ):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for key, config in self._configs.items():
                config._attn_implementation = before[key]

    def check_edits(self, edits: Sequence[StateEdit]) -> None:
        """Raise UsageError for a layer, head, size or part of a block that the model does not have."""
        if edits:
            refuse_misfits(edits, self.facts)
        for edit in edits:
            if edit.site in ("attn_out", "mlp_out"):
                self._writer(edit.site, edit.layer)

    def _edit_hooks(self, edits: Sequence[StateEdit]) -> list[Any]:
        """Hooks that apply the edits of the pass that runs at their sites; those of heads act in the attention."""
        self.check_edits(edits)
        places = sorted({(edit.site, edit.layer) for edit in edits if edit.site != "z"})
        modules = [self.blocks[layer] if s == "resid_post" else self._writer(s, layer) for s, layer in places]
        return [
            module.register_forward_hook(_edit_hook(*place))
            for place, module in zip(places, modules, strict=True)
        ]

    def _writer(self, site: str, layer: int) -> torch.nn.Module:
        module = self.writers[layer].at(site)
        if module is None:
            raise UsageError(
                f"an edit of {site}: no single module of a block of {self.facts.model_type} writes it; edit resid_post"
            )
        return module

    def forward(
        self,
        pieces: Sequence[Piece],
        cache: KVCache,
        recorder: Recorder | None = None,
        *,
        copies: Sequence[tuple[int, int, int]] = (),
        trace: bool = False,
        patch: ResidualPatch | None = None,
    ) -> tuple[Tensor, Forward]:
        """Run runs of tokens on top of their sequences' cache, as one flat sequence without padding.

        `copies`: see `KVCache.aim_pieces`. With a `patch`, whose states [query, d_model] are those of the runs one behind the
        other, only the blocks behind its layer are run. Only inside `recording`. Returns final-normed hidden states
        [1, query, d_model], the runs one behind the other, and the pass.
        """
        tokens = torch.tensor([[token for piece in pieces for token in piece.tokens]], device=self.device)
        positions = torch.cat(
            [
                torch.arange(piece.start, piece.n_keys) if piece.positions is None else piece.positions
                for piece in pieces
            ]
        )
        cache.aim_pieces(pieces, copies)
        current = Forward(positions[None].to(self.device), cache, pieces, recorder=recorder)
        current.calls = {} if trace else None
        with self._handing_on(patch, flat=True):
            return self._pass(tokens, current)

    def step(
        self,
        tokens: Sequence[int],
        cache: KVCache,
        positions: Sequence[int],
        recorder: Recorder | None = None,
        edits: Sequence[Sequence[Edit]] = (),
        patch: ResidualPatch | None = None,
    ) -> tuple[Tensor, Forward]:
        """Run one token of each of the first sequences of the cache, at its position; `edits` by sequence.

        With a `patch` only the blocks behind its layer are run, from its states; the tokens then say nothing.
        Only inside `recording`. Returns final-normed hidden states [sequence, 1, d_model] and the pass.
        """
        uneven, n_keys = len(set(positions)) > 1, max(positions) + 1
        at = torch.tensor(positions, device=self.device)
        cache.aim_step(at if uneven else positions[0], n_keys)
        current = Forward(at[:, None], cache, n_keys=n_keys, uneven=uneven, recorder=recorder)
        current.edits = edits
        with self._handing_on(patch):
            return self._pass(torch.tensor(tokens, device=self.device)[:, None], current)

    def _pass(self, tokens: Tensor, current: Forward) -> tuple[Tensor, Forward]:
        # A copy of the positions: XGLM adds to them in place.
        given = {
            "position_ids": current.positions.clone(),
            **dict.fromkeys(("past_key_values", "cache_params"), current.cache),
            "use_cache": True,
        }
        given = {name: value for name, value in given.items() if name in self._inputs}
        with active(current):
            out = self.decoder(input_ids=tokens, **given, **self._needed)
        return out.last_hidden_state, current

    @contextmanager
    def _handing_on(self, patch: ResidualPatch | None, *, flat: bool = False):
        """Blocks up to the patch's layer hand on its states instead of computing, in a `flat` pass or a step; undone on
        leaving."""
        taken = [] if patch is None else self.blocks[: patch.layer + 1]
        try:
            for block, as_tuple in zip(taken, self._tuples, strict=False):
                assert patch is not None
                states = (patch.states[None] if flat else patch.states[:, None]).to(self.dtype)
                block.forward = _standing_in((states,) if as_tuple else states)
            yield
        finally:
            for block in taken:
                block.__dict__.pop("forward", None)

    # -- looking at the architecture -------------------------------------------------------------------------

    def _inspect(self) -> tuple[ModelFacts, dict[int, Any]]:
        """Trace one short forward and refuse a model that probe would not capture faithfully.

        Checks: every layer's attention came through the interface, W_O maps the recorded reads to the
        attention's own output, and logits equal those of the plain model.
        """
        config, n_layers = self.config, len(self.blocks)
        if config.num_hidden_layers != n_layers:
            raise self._refusal(
                f"{config.num_hidden_layers} layers configured, {n_layers} decoder blocks found"
            )
        tokens = torch.arange(2, 10)[None] % config.vocab_size
        rotary: dict[torch.nn.Module, tuple] = {}
        n_ctx = context_length(config)
        if n_ctx < tokens.shape[1]:
            raise ModelUnavailable(
                f"{self.source.name}: its context has {n_ctx} positions, and a prompt of {tokens.shape[1]} tokens is what "
                "it is checked with: take a model with a longer context"
            )
        tuples = [
            block.register_forward_hook(
                lambda _m, _i, out: self._tuples.append(isinstance(out, tuple | list))
            )
            for block in self.blocks
        ]
        with torch.inference_mode(), rope.watched(self.decoder, rotary):
            try:
                expected = self.hf(input_ids=tokens.to(self.device), use_cache=False).logits.float()
            finally:
                for hook in tuples:
                    hook.remove()
        if bool(torch.isnan(expected).any()):
            raise ModelUnavailable(f"{self.source.name}: {self._not_finite()}")
        with torch.inference_mode():
            self._rotary, self.switches = rope.switches(rotary, n_ctx)
        with watched_modules(self.blocks) as exchanges:
            logits, recorder, calls, cache = self._trace(tokens[0].tolist())
        for layer in range(n_layers):
            if layer not in calls and layer not in self.recurrent and not has_no_memory(config, layer):
                raise self._refusal(
                    f"the attention of layer {layer} does not go through transformers' attention interface"
                )
        for layer, block in enumerate(self.blocks):
            if exchanges[block][1].ndim != 3 or exchanges[block][1].shape[2] != config.hidden_size:
                raise self._refusal(f"layer {layer} hands on several residual streams")
        self._check_logits(
            logits,
            expected.expand(2, -1, -1),
            "recorded",
            lambda: self._trace(tokens[0].tolist())[0],
            {"input_ids": tokens.to(self.device)},
        )
        for switch in self.switches:
            self._check_switch(switch, tokens)
        self.sinks = [calls[layer]["sink"] if layer in calls else None for layer in range(n_layers)]
        reads = recorder.states["z"]
        projections = {
            layer: self._projection(layer, call["module"], reads[layer], exchanges)
            for layer, call in sorted(calls.items())
        }
        others = {
            layer: call["module"]
            for layer, call in calls.items()
            if not self._takes(exchanges[projections[layer]][0], reads[layer])
        }
        gated = self._gated(others, projections, tokens[0].tolist())
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
                raise self._refusal(
                    f"layer {layer} has {of_layer.n_heads} heads, another has {first.n_heads}: layers must have as many"
                )
        facts = ModelFacts(
            n_layers=n_layers,
            n_heads=first.n_heads,
            n_kv_heads=first.n_kv_heads,
            d_model=int(config.hidden_size),
            d_head=first.d_head,
            d_value=first.d_value,
            d_mlp=mlp_width(config),
            d_vocab=int(self.hf.get_output_embeddings().weight.shape[0]),
            n_ctx=n_ctx,
            n_params=self.hf.num_parameters(),
            model_type=str(config.model_type),
            attention=tuple(calls[layer]["facts"] if layer in calls else None for layer in range(n_layers)),
            layers=layers,
        )
        return facts, projections

    def _trace(self, tokens: list[int]) -> tuple[Tensor, Recorder, dict[int, dict], KVCache]:
        """Logits [2, position, d_vocab] of a sequence in two ways, what was recorded on the way, the attention calls, and the
        cache.

        The first row runs in three parts, the last of them a step, beside the second row, which runs whole: positions,
        cache and masks of both must be theirs.
        """
        recorder, cache = Recorder(z=True, layers=frozenset(range(len(self.blocks)))), KVCache(2, len(tokens))
        first, last = len(tokens) // 2 + 1, len(tokens) - 1
        with self.recording(recorder):
            both, current = self.forward(
                [Piece(0, 0, tokens[:first]), Piece(1, 0, tokens)], cache, recorder, trace=True
            )
            middle, _ = self.forward([Piece(0, first, tokens[first:last])], cache)
            end, _ = self.step(tokens[last:], cache, [last])
            in_parts = torch.cat([both[:, :first], middle, end], 1)
            logits = self.unembed(torch.cat([in_parts, both[:, first:]]))
        return logits, recorder, current.calls or {}, cache

    def _projection(
        self, layer: int, attention: torch.nn.Module, read: Tensor, exchanges: dict[torch.nn.Module, tuple]
    ) -> torch.nn.Module:
        """The module W_O of an attention: given the reads [1, head, query, d_head] it gives the attention's output."""
        loose, output = _LOOSE[self.dtype == torch.float32], exchanges[attention][1]
        ways = [
            (module, given)
            for module in attention.modules()
            if is_projection(module)
            and module in exchanges
            and (given := exchanges[module][0]) is not None
            and given.numel() == read.numel()
        ]
        takes = [module for module, given in ways if self._takes(given, read)] or [
            # Behind a gate (`_gated`) it is told by what it gives.
            module
            for module, _ in ways
            if exchanges[module][1].numel() == output.numel()
            and _gap(exchanges[module][1].reshape(output.shape), output) < loose
        ]
        if len(takes) != 1:
            raise self._refusal(
                f"layer {layer}: W_O does not map the heads' reads to the attention output: "
                f"{len(takes)} projections of {type(attention).__name__} take them"
            )
        weight: Any = takes[0].weight
        if not weight.is_floating_point() or weight.itemsize < 2:
            raise self._refusal(
                f"layer {layer}: W_O is stored as {str(weight.dtype).removeprefix('torch.')}, and what heads write is measured with "
                "its numbers: take a checkpoint that is not quantised, or a GGUF file, which is dequantised"
            )
        gave = exchanges[takes[0]][1]
        if not adds_residual(attention) and not _gap(gave.reshape(output.shape), output) < loose:
            raise self._refusal(f"layer {layer}: the attention output is not what W_O gives")
        return takes[0]

    def _takes(self, given: Tensor | None, read: Tensor) -> bool:
        """Whether a module is given the reads [1, head, query, d_head], head behind head."""
        flat = read.transpose(1, 2).flatten(2)
        return (
            given is not None and _gap(given.reshape(flat.shape), flat) < _LOOSE[self.dtype == torch.float32]
        )

    def _gated(
        self,
        attentions: dict[int, torch.nn.Module],
        projections: dict[int, torch.nn.Module],
        tokens: list[int],
    ) -> frozenset[int]:
        """These layers, whose W_O is given another thing than the reads; refused where that is not the reads times a gate."""

        def run() -> None:
            with self.recording(None):
                self.forward([Piece(0, 0, tokens)], KVCache(1, len(tokens)))

        if attentions:
            gaps = gate_gaps(attentions, projections, run)
            for layer in attentions:
                if not gaps[layer] < _LOOSE[self.dtype == torch.float32]:
                    raise self._refusal(
                        f"layer {layer}: W_O is given neither the heads' reads nor these times a gate"
                    )
        return frozenset(attentions)

    def _not_finite(self) -> str:
        """Why the plain model gives NaN, and what to do."""
        names = [
            name
            for name, weight in self.hf.state_dict().items()
            if weight.is_floating_point() and not bool(torch.isfinite(weight).all())
        ]
        if names:
            more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
            return f"its weights are not finite: {names[0]}{more} hold NaN or infinity; get the weights again"
        return f"it gives NaN in {str(self.dtype).removeprefix('torch.')}: try --dtype float32"

    def _check_switch(self, switch: int, tokens: Tensor) -> None:
        """Two runs in one pass, one that ends with the switch and one that crosses it, against the plain model."""
        n_tokens = tokens.shape[1]
        starts = [max(switch - n_tokens, 0), switch - n_tokens // 2]
        pieces = [
            Piece(row, 0, tokens[0].tolist(), torch.arange(n_tokens) + start, length=start + n_tokens)
            for row, start in enumerate(starts)
        ]

        def recorded() -> Tensor:
            with self.recording(None):
                hidden, _ = self.forward(pieces, KVCache(2, n_tokens))
                return self.unembed(hidden[0].view(2, n_tokens, -1))

        logits = recorded()
        for row, start in enumerate(starts):
            with torch.inference_mode():
                inputs = {
                    "input_ids": tokens.to(self.device),
                    "position_ids": (torch.arange(n_tokens)[None] + start).to(self.device),
                }
                expected = self.hf(**inputs, use_cache=False).logits.float()
            self._check_logits(
                logits[row : row + 1],
                expected,
                f"behind position {start}",
                lambda row=row: recorded()[row : row + 1],
                inputs,
            )

    def _check_logits(
        self,
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
        if gap < _LOOSE[self.dtype == torch.float32]:
            return
        if self.dtype != torch.float32:
            with in_float32(self.hf, self.decoder), torch.inference_mode():
                exact = self.hf(**inputs, use_cache=False).logits.to(logits.device)
                again = recorded()
            plain, ours = ((given.to(exact) - exact).norm(dim=-1) for given in (expected, logits))
            if _gap(again, exact) < _LOOSE[True] and bool(ours.min() <= _AS_NEAR * plain.median()):
                return
        raise self._refusal(f"{what} logits differ from the plain model's by {gap:.1e} of their maximum")

    def _refusal(self, why: str) -> ModelUnavailable:
        kind = self.hf.config.model_type
        return ModelUnavailable(
            f"{self.source.name}: architecture {kind} cannot be captured faithfully: {why}"
        )


def _gap(states: Tensor, expected: Tensor) -> float:
    """Largest difference, of the largest number that is expected (heads may read nothing on the traced tokens)."""
    return float((states - expected.to(states)).abs().max() / (expected.abs().max() or 1.0))


def _project(head: torch.nn.Module, hidden: Tensor) -> Tensor:
    """head(hidden), of few rows with the weights first (`probe.model.products`)."""
    # Mamba's residual stream is float32 in 16 bits as well; in `in_float32`, which stands in for the head, all is.
    if head.weight.dtype in (torch.bfloat16, torch.float16) and "forward" not in head.__dict__:
        hidden = hidden.to(head.weight.dtype)
    if fits(head) and "forward" not in head.__dict__:
        logits = few_rows(head, hidden, FEW_ROWS_UNEMBEDDED)
        if logits is not None:
            return logits
    return head(hidden)


def _embedding_hook(recorder: Recorder):
    def hook(_module, inputs, named):
        recorder.on_embedding(inputs[0] if inputs else named["hidden_states"])

    return hook


def _resid_hook(layer: int, recorder: Recorder):
    def hook(_module, _inputs, output):
        recorder.on_resid(layer, states_of(output))

    return hook


def _gate_hook(layer: int, recorder: Recorder):
    def hook(_module, inputs):
        recorder.on_gated(layer, inputs[0])

    return hook


def _written_hook(site: str, layer: int, recorder: Recorder):
    def hook(_module, _inputs, output):
        recorder.on_written(site, layer, states_of(output))

    return hook


def _edit_hook(site: str, layer: int):
    def hook(_module, _inputs, output):
        states = edited(site, layer, states_of(output))
        return (states, *output[1:]) if isinstance(output, tuple | list) else states

    return hook


def _standing_in(output: Any):
    def forward(*_args, **_kwargs):
        return output

    return forward
