"""Generation by transformers itself: no recorder, no cache of ours. The oracle of a run's own tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from probe.model.hooked import Model


@contextmanager
def _without_defaults(model: Model) -> Iterator[None]:
    """`generate` fills in from the model's own generation config whatever the one that it is given leaves open."""
    from transformers import GenerationConfig

    held, model.hf.generation_config = model.hf.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.hf.generation_config = held


def generate_tokens(
    model: Model,
    token_ids: Sequence[int],
    max_new_tokens: int,
    stop_ids: Collection[int],
    *,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
) -> tuple[list[int], list[float]]:
    """The tokens that `generate` puts behind `token_ids`, and their log-probabilities before temperature, nats.

    What else the model's generation config asks for (penalties, sampling) is left out, as a run leaves it out. `seed` is of torch's
    global stream, which is given back as it was.
    """
    from transformers import GenerationConfig

    drawn = {"temperature": temperature, "top_p": top_p or 1.0, "top_k": top_k or 0} if temperature else {}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=min(stop_ids, default=0),
        do_sample=bool(temperature),
        return_dict_in_generate=True,
        output_logits=True,
        **drawn,
    )
    shown = torch.tensor([list(token_ids)], device=model.device)
    with _without_defaults(model), torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        out = model.hf.generate(shown, attention_mask=torch.ones_like(shown), generation_config=settings)
    new_ids = out.sequences[0, len(token_ids) :].tolist()
    log_probs = [
        float(logits[0].float().log_softmax(-1)[token])
        for logits, token in zip(out.logits, new_ids, strict=True)
    ]
    return new_ids, log_probs
