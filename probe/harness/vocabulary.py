"""Texts of tokens where no model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from probe.errors import ModelUnavailable
from probe.harness.plan import Options, codec_of
from probe.harness.sizes import Shape

if TYPE_CHECKING:
    from probe.prompts import Codec


class Vocabulary:
    """Texts of tokens: those that the headers of runs have, the others from the model's tokenizer where it can be had."""

    def __init__(self, headers: Sequence[Mapping[str, Any]], choices: Options, log: Callable[[str], None]):
        self._known = {
            token: text for header in headers for token, text in (header.get("token_texts") or {}).items()
        }
        self._choices, self._log = choices, log

    def text(self, token: int) -> str | None:
        """The text of a token; None where it cannot be had here."""
        text = self._known.get(str(token))
        return text if text is not None or self._codec is None else self._codec.decode([token])

    @cached_property
    def _codec(self) -> Codec | None:
        from probe.model import outline

        choices = self._choices
        try:
            facts = outline(choices.model, revision=choices.revision, offline=choices.offline)
        except ModelUnavailable as error:
            self._log(f"some listed tokens of prompting tasks have no text: {error}")
            return None
        return codec_of(facts["tokenizer"], Shape(**facts["shape"]).n_ctx, choices)
