"""Counting in a text."""

from __future__ import annotations

import re
import unicodedata

from probe.tools.execution.failure import Failure


def count(text: str, of: str | None = None) -> dict[str, int]:
    """`{characters, letters, words, lines}` of a text, or `{occurrences}` of a letter, word or phrase in it.

    Letters and other parts of words are counted wherever they stand and without overlap; case and the way an
    accent is encoded make no difference.
    """
    text = unicodedata.normalize("NFC", text)
    if of is not None:
        part = unicodedata.normalize("NFC", of).casefold()
        if not part:
            raise Failure("there is nothing to count: give a letter, a word or a phrase")
        return {"occurrences": text.casefold().count(part)}
    return {
        "characters": len(text),
        "letters": sum(character.isalpha() for character in text),
        "words": len(re.findall(r"\w+(?:['’-]\w+)*", text)),
        "lines": len(text.splitlines()),
    }
