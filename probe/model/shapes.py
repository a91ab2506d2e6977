"""`random:NAME`: true architectures and sizes with random weights, and a tokenizer that needs no download.

The weights depend on NAME and the parameter's own name alone, so the same NAME is the same model everywhere.
They are scaled so that attention has structure (not uniform) and logits have a spread of about one nat, and
norms and biases are perturbed, so that a forgotten norm weight or bias changes the numbers.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from probe.errors import ModelUnavailable

_GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
_NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 50304,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}
_GEMMA = {
    "model_type": "gemma",
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_LLAMA = {
    "model_type": "llama",
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}
_TINY = {"vocab_size": 272, "max_position_embeddings": 8192}


def _llama(d: int, layers: int, heads: int, kv: int, mlp: int, **more: Any) -> dict[str, Any]:
    return {
        **_LLAMA,
        "hidden_size": d,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": mlp,
        **more,
    }


def _gemma(d: int, layers: int, heads: int, kv: int, mlp: int, **more: Any) -> dict[str, Any]:
    return {**_GEMMA, **_llama(d, layers, heads, kv, mlp), **_GEMMA, **more}


def _neox(d: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        **_NEOX,
        "hidden_size": d,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * d,
        **more,
    }


def _gpt2(d: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {**_GPT2, "n_embd": d, "n_layer": layers, "n_head": heads, **more}


SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": _llama(576, 30, 9, 3, 1536, rms_norm_eps=1e-5),
    "smollm2-360m": _llama(960, 32, 15, 5, 2560, rms_norm_eps=1e-5),
    "smollm2-1.7b": _llama(2048, 24, 32, 32, 8192, rms_norm_eps=1e-5),
    "gemma-2b": _gemma(2048, 18, 8, 1, 16384),
    "gemma-7b": _gemma(3072, 28, 16, 16, 24576),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "pythia-70m": _neox(512, 6, 8),
    "pythia-160m": _neox(768, 12, 12),
    "pythia-410m": _neox(1024, 24, 16),
    "pythia-1b": _neox(2048, 16, 8),
    "pythia-1.4b": _neox(2048, 24, 16),
    "pythia-2.8b": _neox(2560, 32, 32, vocab_size=50304),
    # One tiny model for each way attention is built, small enough for a regression run of a few kB a task.
    "tiny-llama": _llama(48, 4, 6, 2, 96, **_TINY),
    "tiny-gemma": _gemma(48, 4, 4, 1, 96, **_TINY, head_dim=16),
    "tiny-gpt2": _gpt2(48, 4, 4, vocab_size=272, n_positions=8192),
    "tiny-neox": _neox(48, 4, 4, **_TINY),
    "tiny-mistral": _llama(48, 4, 6, 2, 96, **_TINY, model_type="mistral", sliding_window=24, head_dim=8),
    "tiny-gemma2": {
        **_gemma(48, 4, 4, 2, 96, **_TINY, head_dim=16),
        "model_type": "gemma2",
        "sliding_window": 24,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "tiny-gptoss": _llama(
        48,
        4,
        6,
        2,
        32,
        **_TINY,
        model_type="gpt_oss",
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=24,
    )
    | {"tie_word_embeddings": False},
    "tiny-qwen3": _llama(48, 4, 6, 2, 96, **_TINY, model_type="qwen3", head_dim=8),
}

_SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def random_config(name: str):
    """The transformers configuration of a known shape."""
    from transformers import AutoConfig

    values = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **SHAPES[name]}
    return AutoConfig.for_model(**values)


def random_model(name: str, dtype):
    """A causal LM of the shape NAME on the CPU, weights fixed by NAME."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = random_config(name)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    _fill(model, name)
    return model.eval()


def _fill(model, name: str) -> None:
    import torch

    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            digest = hashlib.sha256(f"{name}/{key}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            if parameter.ndim < 2:
                # RMSNorm of the Gemma family multiplies by (1 + w); every other norm multiplies by w.
                centre = 1.0 if "norm" in key or "ln_" in key else 0.0
                if key.endswith("bias") or (centre and "gemma" in model.config.model_type):
                    centre = 0.0
                _normal(parameter, 0.1, generator)
                parameter.add_(centre)
            elif parameter is embedding:
                _normal(parameter, parameter.shape[-1] ** -0.5, generator)
            else:
                # GPT-2's Conv1D stores [in, out]; everything else [out, in].
                fan_in = parameter.shape[0] if model.config.model_type == "gpt2" else parameter.shape[-1]
                _normal(parameter, 1.5 * fan_in**-0.5, generator)


def _normal(parameter, std: float, generator, block: int = 1 << 22) -> None:
    """Fill with normal draws; large tensors repeat one block of 4 M draws under block-wise signs.

    2.5 billion independent draws take minutes on two cores; the repetition is invisible to anything that
    reads shapes, memory and times, which is what the large random models are for.
    """
    import torch

    flat = parameter.view(-1)
    draws = torch.randn(min(block, flat.numel()), generator=generator) * std
    draws = draws.to(flat.dtype)
    for index, start in enumerate(range(0, flat.numel(), block)):
        piece = flat[start : start + block]
        torch.mul(draws[: piece.numel()], -1.0 if index % 2 else 1.0, out=piece)


_COUNTS_LAYERS = re.compile(
    r"n_layers?|num_(hidden_)?layers|num_(encoder|decoder)_layers|depth|n_blocks?|num_blocks"
)
MOST_LAYERS = 2_000
"""Ten times the deepest model that is known. A configuration is data of others: building 10⁷ layers never ends."""


def refuse_endless(name: str, config: dict[str, Any]) -> None:
    """Raise ModelUnavailable where a configuration, or a part of it, has more layers than any model."""
    for key, value in config.items():
        if isinstance(value, dict):
            refuse_endless(name, value)
        elif isinstance(value, int) and value > MOST_LAYERS and _COUNTS_LAYERS.fullmatch(str(key)):
            raise ModelUnavailable(
                f"{name}: its configuration has {value:,} layers ({key}), and no model has more than {MOST_LAYERS:,}"
            )


def byte_tokenizer(vocab_size: int):
    """A byte-level tokenizer without merges: ids 0–4 special, then 256 bytes, then `<unused:N>` fillers.

    Every id decodes, so that a random model's output is always text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = _byte_alphabet()
    words = [*_SPECIAL, *alphabet]
    words += [f"<unused:{index}>" for index in range(len(words), vocab_size)]
    backend = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_SPECIAL[0],
        bos_token=_SPECIAL[1],
        eos_token=_SPECIAL[2],
        additional_special_tokens=list(_SPECIAL[3:]),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    # TransformerBridge reads both; without the second it would look the tokenizer up on the hub.
    tokenizer.init_kwargs.update(name_or_path="random", add_bos_token=True)
    return tokenizer


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins in byte order: printable Latin-1 maps to itself, the rest to U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]
