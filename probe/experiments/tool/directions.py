"""Directions that turn a choice from one tool to another, and what a vector costs on text that has nothing to do with tools.

A direction is a unit vector of the residual stream behind a block; it is added with a length that is given in lengths of the
layer's own states, so that all of them are compared at the same length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from probe.experiments.prompting.patches import ROWS, fill, generator, resumed
from probe.maths.ridge import ridge_weights
from probe.runs.records import ToolProbability

if TYPE_CHECKING:
    from probe.model.hooked import Model
    from probe.prompts import Codec

MEAN_DIFFERENCE, UNEMBEDDING, PROBE, RANDOM = "mean_difference", "unembedding", "probe", "random"
DIRECTIONS = (MEAN_DIFFERENCE, UNEMBEDDING, PROBE, RANDOM)
LEAST = 2
"""Train tasks that must name a tool for it to have a mean."""
TEXTS = (
    "The river had frozen over in the night, and by morning the children were",
    "In the year that followed, the price of wheat in the northern provinces",
    "She put the letter back into its envelope and said that she would",
    "Most of the light that reaches the bottom of a clear lake is",
    "The committee met on Thursday to discuss the new bridge, which the mayor had",
    "Bread keeps longer when it is wrapped in a cloth, because the air",
    "He had never learned to swim, although his house stood only a few steps from the",
    "A triangle whose three sides are equally long has three angles that are",
)
"""Openings of sentences in which no tool is asked for; the next token of each is what a vector may spoil."""


@dataclass(frozen=True)
class Named:
    """A task whose choice has a state: the name that the model gives, and where it stands."""

    task_id: str
    name: str | None
    """The most probable name, None for the listed "no tool"."""
    half: int
    """0: what directions and doses are had from; 1: what they are tested on."""
    states: np.ndarray
    """[layer, d_model] at the row that emits the first token of the name, float32."""


class Directions:
    """Unit vectors by direction, layer and pair of names, from the tasks of half 0."""

    def __init__(self, model: Model, layers: Sequence[int], named: Sequence[Named], seed: int):
        """`layers`: those of the states, in their order."""
        self.model, self.layers, self.seed = model, list(layers), seed
        self._train = [task for task in named if task.half == 0]
        self._states = (
            np.stack([task.states for task in self._train])
            if self._train
            else np.zeros((0, len(layers), model.facts.d_model), np.float32)
        )
        self.lengths = {
            layer: float(np.linalg.norm(self._states[:, place], axis=-1).mean()) if self._train else 0.0
            for place, layer in enumerate(self.layers)
        }
        """Layer → mean length of a state."""

    def has_mean(self, name: str | None, without: str | None = None) -> bool:
        """Whether enough train tasks name it, one of them left out."""
        return sum(task.name == name and task.task_id != without for task in self._train) >= LEAST

    def difference(
        self, layer: int, tool: str | None, other: str | None, without: str | None = None
    ) -> np.ndarray | None:
        """Mean state of the train tasks that name `other`, less that of those that name `tool`: [d_model], a task left
        out. None where too few name one of them."""
        if not (self.has_mean(tool, without) and self.has_mean(other, without)):
            return None
        at, kept = self._states[:, self.layers.index(layer)].astype(np.float64), self._kept(without)
        means = [at[kept & self._naming(name)].mean(0) for name in (other, tool)]
        return means[0] - means[1]

    def vector(
        self,
        direction: str,
        layer: int,
        tool: str | None,
        other: str | None,
        token: int,
        without: str | None = None,
        draw: str = "",
    ) -> np.ndarray | None:
        """The unit vector [d_model], float32, that turns `tool` to `other`; None where there is none. `token` is the first
        of the other's name that is not the tool's, `draw` what a random vector depends on beside seed and pair."""
        if direction == MEAN_DIFFERENCE:
            arrow = self.difference(layer, tool, other, without)
        elif direction == UNEMBEDDING:
            arrow = self.model.hf.get_output_embeddings().weight[token].double().cpu().numpy()
        elif direction == PROBE:
            arrow = self._probe(layer, tool, other, without)
        else:
            drawn = generator(self.seed, "steering", draw, str(layer), repr(tool), repr(other))
            arrow = drawn.standard_normal(self.model.facts.d_model)
        if arrow is None or not (length := float(np.linalg.norm(arrow))) > 0:
            return None
        return (arrow / length).astype(np.float32)

    def _probe(
        self, layer: int, tool: str | None, other: str | None, without: str | None
    ) -> np.ndarray | None:
        """Gradient of a ridge regression on the train tasks' states: 1 where `other` is named, −1 where `tool` is."""
        if not (self.has_mean(tool, without) and self.has_mean(other, without)):
            return None
        kept = self._kept(without)
        goal = self._naming(other).astype(np.float64) - self._naming(tool)
        at = self._states[kept, self.layers.index(layer)].astype(np.float64)
        return ridge_weights(at, goal[kept, None])[0][:, 0]

    def _kept(self, without: str | None) -> np.ndarray:
        return np.array([task.task_id != without for task in self._train], dtype=bool)

    def _naming(self, name: str | None) -> np.ndarray:
        return np.array([task.name == name for task in self._train], dtype=bool)


def parting(tool: ToolProbability, other: ToolProbability) -> tuple[int, int] | None:
    """How many first tokens two names share, and the other's next one; None where one name begins the other."""
    pairs = zip(tool.token_ids, other.token_ids, strict=False)
    return next(((place, second) for place, (first, second) in enumerate(pairs) if first != second), None)


class UnrelatedText:
    """The next token of texts without tools, and how far a vector moves its law."""

    def __init__(self, model: Model, codec: Codec, layers: Sequence[int]):
        import torch

        from probe.capture import CaptureSpec, Generation, Job, Outcome, run_batch
        from probe.model.attention import KVCache
        from probe.prompts import prompt_of

        self.model = model
        jobs = [Job(prompt_of(text, codec, 1), text) for text in TEXTS]
        spec = CaptureSpec(frozenset({"resid_post"}), tuple(layers))
        outcomes = run_batch(model, codec, jobs, spec, Generation(1))
        whole = [(j.prompt, o) for j, o in zip(jobs, outcomes, strict=True) if isinstance(o, Outcome)]
        self._states: Mapping[int, np.ndarray] = {
            layer: np.stack([o.tensors["resid_post"][place, 0].float().numpy() for _, o in whole])
            for place, layer in enumerate(layers)
        }
        """layer → [text, d_model]"""
        self._rows = max(1, ROWS // len(whole)) * len(whole)
        prompts = [whole[row % len(whole)][0] for row in range(self._rows)]
        self._positions = [prompt.n_prompt - 1 for prompt in prompts]
        self._cache = KVCache(self._rows, max(self._positions) + 1)
        fill(model, self._cache, [prompt.token_ids[: prompt.n_prompt - 1] for prompt in prompts])
        last = layers[-1]
        self._plain = resumed(
            model, self._cache, self._positions, last, self._states[last][np.arange(self._rows) % len(whole)]
        )
        assert isinstance(self._plain, torch.Tensor)

    @property
    def tokens(self) -> int:
        """Positions that are run for each vector, through the blocks above its layer."""
        return len(next(iter(self._states.values())))

    def divergence(self, layer: int, vectors: np.ndarray) -> np.ndarray:
        """KL(without ‖ with), nats, of the next token's law, mean over the texts, of vectors [vector, d_model] that are added
        behind a block at the last position: [vector]."""
        states = self._states[layer]
        step, out = self._rows // len(states), []
        for start in range(0, len(vectors), step):
            chunk = vectors[start : start + step]
            moved = (chunk[:, None] + states[None]).reshape(-1, states.shape[1])
            n = len(moved)
            log_q = resumed(self.model, self._cache, self._positions[:n], layer, moved)
            log_p = self._plain[:n]
            kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)
            out.append(kl.view(len(chunk), -1).mean(1).double().cpu().numpy())
        return np.concatenate(out) if out else np.zeros(0)
