"""Tokenizers: that of a model, and the one that an adapter brings of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from probe.model.names import Source


def load_tokenizer(*location: Any, **options: Any) -> Any:
    """The tokenizer; transformers makes an empty one of a model saved without, which reads all text as unknown."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(*location, **options)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError("it has no tokenizer: save one with the tokenizer's save_pretrained")
    return tokenizer


def adapter_tokenizer(source: Source) -> Any:
    """The tokenizer saved with an adapter, None where it has the base's."""
    path = Path(source.location)
    if not (path / "tokenizer_config.json").is_file():
        return None
    return load_tokenizer(str(path), trust_remote_code=False, local_files_only=True)
