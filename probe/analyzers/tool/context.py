"""h_context = LayerNorm([h_task; h_tools]), from a run alone.

The states are means of the residual stream over the request and over each tool's definition, and the residual
at the decision. The model's own final norm, written down in run.json, is applied to each of them in each layer,
as a logit lens applies it: LN of the mean over positions, not the mean of LN, which a run does not keep. The concatenation is along the sequence and the norm acts on each position by itself:
LN([a; b]) = [LN a; LN b].
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from probe.prompts.labels import REQUESTS, tool_label, tool_of
from probe.runs.views.choice import decision_states

if TYPE_CHECKING:
    from probe.runs import Run, TaskRun


@dataclass(frozen=True)
class FinalNorm:
    """The norm before the unembedding: `rms` (Zhang & Sennrich 2019) or `layer` (Ba et al. 2016)."""

    kind: str
    eps: float
    weight: np.ndarray
    """[d_model]; for Gemma 1 + w."""
    bias: np.ndarray | None = None

    def __call__(self, states: np.ndarray) -> np.ndarray:
        """Normed states [..., d_model], float32."""
        x = np.asarray(states, dtype=np.float32)
        x = x - x.mean(-1, keepdims=True) if self.kind == "layer" else x
        # In float64: the square of a massive activation times the width passes what float32 resolves.
        size = np.square(x, dtype=np.float64).mean(-1, keepdims=True)
        normed = x * (1 / np.sqrt(size + self.eps)).astype(np.float32) * self.weight
        return normed if self.bias is None else normed + self.bias

    @classmethod
    def of(cls, run: Run) -> FinalNorm | None:
        """The norm that run.json holds; None where it holds none that can be read (`missing` says why)."""
        saved = (run.run.get("model") or {}).get("norm")
        if not isinstance(saved, dict) or saved.get("kind") not in ("rms", "layer"):
            return None
        try:
            weight, bias = (
                None
                if saved[name] is None
                else np.frombuffer(base64.b64decode(saved[name], validate=True), "<f4")
                for name in ("weight", "bias")
            )
            return None if weight is None else cls(saved["kind"], float(saved["eps"]), weight, bias)
        except (KeyError, TypeError, ValueError):
            return None


@dataclass(frozen=True)
class Context:
    """h_context of one task, by layer; None where a state was not captured."""

    layers: list[int]
    tools: list[str]
    """Tools in shown order."""
    h_tools: np.ndarray
    """[layer, tool, d_model]: the normed mean over each tool's definition: LN of the mean, not the mean of LN."""
    h_task: np.ndarray | None
    """[layer, d_model]: the normed mean over the request, the first label of `REQUESTS` that the task has."""
    decision: np.ndarray | None
    """[layer, d_model]: the normed residual of the row that emits the first token of the tool's name."""


def missing(run: Run) -> str | None:
    """Why the run has no h_context, and what would give it one; None where it has."""
    if FinalNorm.of(run) is None:
        model = run.run.get("model") or {}
        if "norm" in model:
            return (
                f"run.json has no RMSNorm or LayerNorm with weights as the final norm of {model.get('name')}"
            )
        return "the run was made before the model's final norm was kept in run.json: run the tasks again"
    if not any("resid_span_mean" in task for task in run):
        return (
            "resid_span_mean was not captured: run the tasks again with --capture resid_span_mean,resid_post"
        )
    return None


def h_context(task: TaskRun, norm: FinalNorm) -> Context | None:
    """The normed states of one task; None where `resid_span_mean` was not captured or no tool was seen."""
    if "resid_span_mean" not in task:
        return None
    labels = task.labels()
    tools = [name for name in map(tool_of, labels) if name is not None]
    if not tools:
        return None
    means = norm(task["resid_span_mean"].float().numpy())
    request = next((label for label in REQUESTS if label in labels), None)
    captured = decision_states(task)
    return Context(
        layers=task.layers("resid_span_mean"),
        tools=tools,
        h_tools=means[:, [labels.index(tool_label(name)) for name in tools]],
        # A copy: a view would keep the means of all labels.
        h_task=None if request is None else means[:, labels.index(request)].copy(),
        decision=None if captured is None else norm(captured[1]),
    )
