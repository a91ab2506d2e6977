"""`Model`: weights, tokenizer and facts of one causal LM, and the forward pass that can be recorded."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from probe.errors import UsageError
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
from probe.model.inspection import LOOSE, failures_refused, logit_factor, plain_pass, traced_facts
from probe.model.mixers import by_run, recurrents
from probe.model.names import Source
from probe.model.products import FEW_ROWS_UNEMBEDDED, few_rows, fits, stand_ins
from probe.model.structure import accepted, decoder_of
from probe.model.sublayers import Writers, see_writers, states_of
from probe.model.unregistered import adapted, adapters, needed_inputs


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
        self.switches: tuple[int, ...]
        """Lengths beyond which rotary frequencies are others, for the whole sequence; see `probe.model.rope`."""
        self.logit_factor: float
        """What the unembedding's product is multiplied with before any softcap."""
        self.sinks: list[Tensor | None]
        """By layer a learned score [head] that takes part in the softmax; None where there is none."""
        self.blocks: list[torch.nn.Module] = []
        with failures_refused(self):
            self.device: torch.device = hf.get_input_embeddings().weight.device
            self.config = hf.config.get_text_config()
            """What the configuration says of the decoder; of a multimodal model its text part."""
            self.decoder, self.blocks = decoder_of(hf)
            self._configs = {id(m.config): m.config for m in hf.modules() if hasattr(m, "config")}
            self._inputs = accepted(self.decoder)
            self._needed = needed_inputs(self.decoder, self.device)
            self.adapters = adapters(self.blocks)
            """What stands in for attention that does not go through transformers' attention interface."""
            self.recurrent = recurrents(self.blocks)
            """layer → its module whose memory is a state of constant size (`probe.model.recurrent`)"""
            plain = plain_pass(self)
            self._tuples = [isinstance(states, tuple | list) for states in plain.states]
            self._rotary, self.switches = plain.rotary, plain.switches
            self.logit_factor = logit_factor(self, plain)
            self.facts, self._w_o, self.sinks = traced_facts(self, plain)

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
        loose = LOOSE[self.dtype == torch.float32]
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
        """Logits, float32, from final-normed hidden states [..., d_model], after any factor and softcap."""
        logits = self.uncapped_logits(hidden)
        if (cap := self.softcap) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def uncapped_logits(self, hidden: Tensor) -> Tensor:
        """As `unembed`, before any softcap: linear in `hidden`."""
        head = self.hf.get_output_embeddings()
        logits = _project(head, hidden.to(head.weight.device))
        return (logits if self.logit_factor == 1.0 else logits * self.logit_factor).float()

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
        methods = []
        for block, as_tuple in zip(taken, self._tuples, strict=False):
            assert patch is not None
            states = (patch.states[None] if flat else patch.states[:, None]).to(self.dtype)
            methods.append((block, ("forward", _standing_in((states,) if as_tuple else states))))
        with adapted(methods):
            yield


def _project(head: torch.nn.Module, hidden: Tensor) -> Tensor:
    """head(hidden), of few rows with the weights first (`probe.model.products`)."""
    # Mamba's residual stream is float32 in 16 bits as well; in `in_float32`, which stands in for the head, all is.
    if head.weight.dtype in (torch.bfloat16, torch.float16) and "forward" not in head.__dict__:
        hidden = hidden.to(head.weight.dtype)
    if fits(head) and "forward" not in head.__dict__:
        logits = few_rows(head, hidden, FEW_ROWS_UNEMBEDDED, None)
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
