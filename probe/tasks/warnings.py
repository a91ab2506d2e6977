"""Warnings about a task file: what is allowed but may spoil a result."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from probe.jsontext import quoted


def mentions(text: str, name: str) -> bool:
    """Whether `name` stands in `text` as a word or number of its own, thousands separators and case aside."""
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", text).casefold()
    name = re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", name).casefold()
    return re.search(rf"(?<!\w)(?<!\w\.){re.escape(name)}(?!\w|\.\w)", text) is not None


def unbalanced(kind: str, targets: Sequence[str], options: Collection[str]) -> Iterator[str]:
    """Whether most tasks have one target, of those that they could have."""
    if not targets:
        return
    (name, most), total = Counter(targets).most_common(1)[0], len(targets)
    # Twice the even share, and more than half: with fewer than eight tasks that happens by chance.
    if total >= 8 and most > total / 2 and most > 2 * total / len(options):
        yield f"{most} of {total} {kind} targets are {quoted(name)}: balance them"
