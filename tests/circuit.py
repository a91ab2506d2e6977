"""Setting a GPT-2's weights by hand: named features in the residual stream, heads as lists of terms.

A feature is a pair of coordinates that hold (x, −x), read as their half difference: LayerNorm's mean is then zero
whatever is written. The first feature is a constant so large that LayerNorm's deviation is it alone, so
LayerNorm is the identity up to |x|² / (2 · CONSTANT²), about 1e-6. The MLPs write nothing.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

CONSTANT = 1e4
N_CTX = 1024
DEAD = ("dead:0", "dead:1", "dead:2", "dead:3")
"""Features that nothing reads."""
_SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>")
UNKNOWN = _SPECIAL[3]
# What a call is written with is one token each, a word takes the space before it along.
_PIECE = r'\{"name": "|", "|": \{\}\}|": "| ?[\w-]+|\n|.'

_WORD = re.compile(r"[\w-]+")

Terms = Mapping[str, Mapping[str, float]]


class Circuit:
    """Token embeddings, heads and logits over named features; `save` writes model and tokenizer.

    `embed` gives the features of words; a word with a space before it means the same. "1" is the constant 1,
    "position" runs from 0 to 1.
    """

    def __init__(
        self,
        embed: Mapping[str, Mapping[str, float]],
        features: Iterable[str],
        texts: Iterable[str],
        *,
        n_layers: int = 2,
        n_heads: int = 6,
        d_head: int = 32,
    ):
        # With and without the space: a segment that begins with the word is tokenised on its own.
        words = {piece.removeprefix(" ") for text in texts for piece in re.findall(_PIECE, text)} | {*embed}
        seen = {form for word in words for form in ((word, f" {word}") if _WORD.fullmatch(word) else (word,))}
        first = [*_SPECIAL, *(word for word in embed if word not in _SPECIAL)]
        rest = {" ", *seen, *string.punctuation, *string.digits} - {"", *first}
        self.tokens = {token: index for index, token in enumerate([*first, *sorted(rest)])}
        given = [name for group in embed.values() for name in group]
        self.features = {
            name: index
            for index, name in enumerate(dict.fromkeys(["1", "position", *given, *features, *DEAD]))
        }
        self.n_layers, self.n_heads, self.d_head = n_layers, n_heads, d_head
        self.d_model = n_heads * d_head
        if 2 * len(self.features) > self.d_model:
            raise ValueError(f"{len(self.features)} features do not fit into {self.d_model} coordinates")
        self._used: set[tuple[int, int]] = set()
        self._hf: Any = self._blank()
        with torch.no_grad():
            for token, index in self.tokens.items():
                word = token.removeprefix(" ") if token != " " else token
                row = {"1": CONSTANT, **embed.get(word, {})}
                self._hf.transformer.wte.weight[index] = self._written(row)
            for position in range(N_CTX):
                self._hf.transformer.wpe.weight[position] = self._written({"position": position / N_CTX})

    def group(self, prefix: str) -> list[str]:
        return [name.partition(":")[2] for name in self.features if name.startswith(f"{prefix}:")]

    def head(
        self, layer: int, head: int, scores: Terms, copies: Sequence[tuple[str, str, float]] = ()
    ) -> None:
        """A head whose score is Σ coefficient · (feature of the query) · (feature of the key), by `scores[query
        feature][key feature]`, and that adds coefficient · (feature of the key) to a feature, by `copies`."""
        if max(len(scores), len(copies)) > self.d_head:
            raise ValueError(f"head {layer}.{head} needs more than {self.d_head} dimensions")
        attention = self._hf.transformer.h[layer].attn
        start = head * self.d_head
        with torch.no_grad():
            for dim, (asked, keys) in enumerate(scores.items(), start):
                attention.c_attn.weight[:, dim] = self._read({asked: self.d_head**0.5})
                attention.c_attn.weight[:, self.d_model + dim] = self._read(keys)
            for dim, (source, target, factor) in enumerate(copies, start):
                attention.c_attn.weight[:, 2 * self.d_model + dim] = self._read({source: 1.0})
                attention.c_proj.weight[dim] = self._written({target: factor})
        self._used.add((layer, head))

    def fill(self, seed: int = 0) -> tuple[tuple[int, int], ...]:
        """Give every head not yet set random scores and random writes into dead features; returns them."""
        draw = torch.Generator().manual_seed(seed)
        names = [name for name in self.features if name not in ("1", *DEAD)]

        def some(n: int) -> list[str]:
            return [names[i] for i in torch.randperm(len(names), generator=draw)[:n].tolist()]

        def weight() -> float:
            return 2 * float(torch.randn((), generator=draw))

        free = [
            (layer, head)
            for layer in range(self.n_layers)
            for head in range(self.n_heads)
            if (layer, head) not in self._used
        ]
        for layer, head in free:
            scores = {asked: {key: weight() for key in some(8)} for asked in ("1", *some(6))}
            self.head(layer, head, scores, [(name, DEAD[i % 4], weight()) for i, name in enumerate(some(16))])
        return tuple(free)

    def logit(self, token: str, terms: Mapping[str, float]) -> None:
        """The token's logit is Σ coefficient · feature of the last residual stream. Other tokens have logit 0."""
        with torch.no_grad():
            self._hf.lm_head.weight[self.tokens[token]] = self._read(terms)

    def save(self, path: Path) -> int:
        """Write the model and its tokenizer; returns the size of the vocabulary."""
        self._hf.save_pretrained(path)
        _tokenizer(self.tokens).save_pretrained(path)
        return len(self.tokens)

    def _blank(self) -> GPT2LMHeadModel:
        config = GPT2Config(
            vocab_size=len(self.tokens),
            n_positions=N_CTX,
            n_embd=self.d_model,
            n_layer=self.n_layers,
            n_head=self.n_heads,
            n_inner=4,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        hf = GPT2LMHeadModel(config)
        with torch.no_grad():
            for name, parameter in hf.named_parameters():
                parameter.zero_()
                if "ln_" in name and name.endswith("weight"):
                    parameter.fill_(CONSTANT * (2 / self.d_model) ** 0.5)
        return hf

    def _written(self, terms: Mapping[str, float]) -> Tensor:
        out = torch.zeros(self.d_model)
        for name, value in terms.items():
            index = 2 * self.features[name]
            out[index], out[index + 1] = value, -value
        return out

    def _read(self, terms: Mapping[str, float]) -> Tensor:
        scaled = {name: value / (CONSTANT if name == "1" else 1.0) for name, value in terms.items()}
        return self._written(scaled) / 2


def _tokenizer(tokens: Mapping[str, int]) -> PreTrainedTokenizerFast:
    """Whole words and pieces of the call's JSON; text comes back as it was, but for unknown words."""
    backend = Tokenizer(models.WordLevel(vocab=dict(tokens), unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_SPECIAL[0],
        bos_token=_SPECIAL[1],
        eos_token=_SPECIAL[2],
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
