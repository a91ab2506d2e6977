"""All candidates of all prompts of a batch in one short forward on top of the prompts' cache.

A prompt's candidates form a prefix tree: what they share is computed once, leaves are never run (their
log-probability is read at their parent).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from probe.model.attention import Piece
from probe.model.edits import Edit
from probe.prompts import Candidate

_UNEMBED_ROWS = 256
"""Rows of one product with the unembedding: at 64 it took a quarter longer a row."""

_NORM_ROWS = 8
"""Rows that are normed at a time: what that takes on the way stays near the processor, in two fifths of the time."""


class Tree:
    """The candidates of one prompt; a node is a token that some candidate continues."""

    def __init__(self, candidates: Sequence[Candidate]):
        self.candidates = candidates
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        inner: dict[tuple[int, ...], int] = {}
        for candidate in candidates:
            for depth in range(1, len(candidate.token_ids)):
                path = candidate.token_ids[:depth]
                if path not in inner:
                    inner[path] = len(self.tokens)
                    self.tokens.append(path[-1])
                    self.parents.append(inner[path[:-1]] if depth > 1 else -1)
                    self.depths.append(depth - 1)
        self._inner = inner

    @property
    def n_nodes(self) -> int:
        return len(self.tokens)

    def edges(self) -> list[tuple[int, int, int]]:
        """(node, candidate number, next token) of every token after a candidate's first."""
        return [
            (self._inner[candidate.token_ids[:depth]], number, candidate.token_ids[depth])
            for number, candidate in enumerate(self.candidates)
            for depth in range(1, len(candidate.token_ids))
        ]


def piece(tree: Tree, row: int, tokens: Sequence[int], start: int, edits: Sequence[Edit] = ()) -> Piece:
    """The last tokens of a prompt, from position `start` on (none, where they were run before), and the tree
    behind them: rotary positions by depth, and a mask that lets a node see the prompt, its ancestors and itself."""
    n_tokens, nodes = len(tokens), tree.n_nodes
    end = start + n_tokens
    seen = torch.ones(n_tokens + nodes, end + nodes, dtype=torch.bool).tril_(start)
    seen[n_tokens:, end:] = False
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            seen[n_tokens + node] = seen[n_tokens + parent]
        seen[n_tokens + node, end + node] = True
    positions = torch.cat([torch.arange(start, end), end + torch.tensor(tree.depths)])
    return Piece(row, start, [*tokens, *tree.tokens], positions, seen, edits, end, nodes)


def read(
    trees: Sequence[Tree],
    slots: Sequence[Tensor],
    hidden: Tensor | None,
    unembed: Callable[[Tensor], Tensor],
) -> list[list[list[float]]]:
    """log P of each candidate's tokens, nats, by sequence and candidate.

    `slots` are the logits [d_vocab] at each prompt's slot, `hidden` [node, d_model] the final-normed states of
    the packed forward, tree by tree (None where every candidate is a single token).
    """
    by_token: list[list[list[float]]] = []
    for tree, logits in zip(trees, slots, strict=True):
        first = [candidate.token_ids[0] for candidate in tree.candidates]
        log_probs = (logits[first] - logits.logsumexp(-1)).tolist() if first else []
        by_token.append([[log_prob] for log_prob in log_probs])
    targets: list[list[int]] = []
    owners: list[list[tuple[int, int]]] = []
    for index, tree in enumerate(trees):
        offset = len(targets)
        targets += [[] for _ in tree.tokens]
        owners += [[] for _ in tree.tokens]
        for node, number, token in tree.edges():
            targets[offset + node].append(token)
            owners[offset + node].append((index, number))
    if hidden is None:
        return by_token
    for owner, log_probs in zip(owners, log_probs_of(hidden, targets, unembed), strict=True):
        for (index, number), log_prob in zip(owner, log_probs, strict=True):
            by_token[index][number].append(log_prob)  # a node lies behind its ancestors
    return by_token


def log_probs_of(
    hidden: Tensor,
    targets: Sequence[Sequence[int]],
    unembed: Callable[[Tensor], Tensor],
    most_probable: list[int] | None = None,
) -> list[list[float]]:
    """log P of each row's target tokens, nats. `hidden` [row, d_model] is unembedded in blocks of rows,
    so that no [row, d_vocab] tensor of a long prompt is made. The most probable token of each row is put behind those
    that `most_probable` has."""
    log_probs: list[list[float]] = []
    for start in range(0, len(targets), _UNEMBED_ROWS):
        block = targets[start : start + _UNEMBED_ROWS]
        logits = unembed(hidden[start : start + len(block)])
        norm = torch.cat([few.logsumexp(-1) for few in logits.split(_NORM_ROWS)])
        row = [r for r, tokens in enumerate(block) for _ in tokens]
        flat = [token for tokens in block for token in tokens]
        values = iter((logits[row, flat] - norm[row]).tolist())
        log_probs += [[next(values) for _ in tokens] for tokens in block]
        if most_probable is not None:
            most_probable += logits.argmax(-1).tolist()
    return log_probs
