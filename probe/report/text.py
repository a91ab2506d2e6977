"""Text of models and tasks on a page, where it is data.

`visible` makes its control characters visible, so that it can neither reorder a line nor hide in it; that it cannot become
markup is the template's and the script's part.
"""

from __future__ import annotations

import math
import re
from typing import Any

# C0 but tab and line feed, DEL and C1, line and paragraph separators, and what changes the direction of text.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(value: Any) -> Any:
    """A JSON tree in which control and direction characters are spelled out, and infinities are words."""
    if isinstance(value, str):
        return _INVISIBLE.sub(lambda match: f"⟨U+{ord(match.group()):04X}⟩", value)
    if isinstance(value, dict):
        return {visible(key): visible(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [visible(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("∞" if value > 0 else "−∞")
    return value


def script_length(text: str) -> int:
    """Length of a text as a script counts it: in code units of UTF-16."""
    return len(text) + sum(character > "\uffff" for character in text)
