"""Names and words that a sentence states: what is said of whom, not who else is mentioned.

Stated is a subject ("Ben is the tallest"), or what is said to be it ("the tallest is Ben"). What is denied ("not Ben"), compared with
("taller than Kim"), left open ("Ben or Kim") or one of several ("Ben and Kim") is not.
"""

from __future__ import annotations

import re

ARTICLES = ("a", "an", "the")
OUTER_MARKS = ".,;:!?\"'`()[]{}*_“”‘’«»…。！？、"
CONCLUDES = re.compile(
    r"\b(?:so|therefore|thus|hence|which means|(?:final )?answer(?: is|:))[,:]?\s", re.IGNORECASE
)
NEAR = 100
"""Characters around a place that say what is said of it."""


def bare(text: str) -> str:
    """Words in small letters, without articles and the marks around them."""
    words = [bare for word in text.casefold().split() if (bare := word.strip(OUTER_MARKS))]
    # An answer may be an article alone (option A) or a mark alone.
    return " ".join([word for word in words if word not in ARTICLES] or words or text.split())


_VERBS = [
    "is", "are", "was", "were", "be", "been", "has", "have", "had", "will", "would", "must", "can",
    "could", "does", "did", "owns", "lives", "sits", "finished", "arrived", "comes", "came", "goes",
    "went", "wins", "won", "belongs",
]  # fmt: skip
_SENTENCE = re.compile(rf"\w.*(?:\s(?:{'|'.join(_VERBS)})|'s|n't)\s+\w", re.IGNORECASE | re.DOTALL)
_NO_NAMES = frozenset([
    "a", "after", "all", "an", "and", "any", "anyone", "answer", "as", "at", "because", "before", "both",
    "but", "by", "each", "either", "else", "everyone", "final", "finally", "from", "he", "hence", "her",
    "here", "his", "i", "if", "in", "it", "it's", "its", "last", "let", "my", "neither", "next", "nobody",
    "no", "none", "not", "now", "of", "on", "one", "only", "or", "our", "second", "since", "she", "so",
    "that", "that's", "the", "their", "then", "there", "therefore", "they", "this", "thus", "to", "we",
    "what", "when", "where", "which", "while", "who", "who's", "with", "yes", "you", "your",
])  # fmt: skip
"""Words that may be capital at the beginning of a sentence and name nobody."""
_COPULA = re.compile(
    r"(?:\b(?:is|are|was|were|be|named|called)|'s|[=:]|->|→)\s+"
    r"(?:(?:probably|clearly|definitely|likely|then|by|in|on|at|to|the|a|an|named|called)\s+)*[\"'(]*\Z",
    re.IGNORECASE,
)
_NEGATED_BEFORE = re.compile(
    r"(?:\b(?:not|never|neither|nor|cannot|except|without|instead of|rather than|unlike|than|no)|n't)\s+(?:\w+\s+){0,3}[\"'(]*\Z",
    re.IGNORECASE,
)
_EXCEPTED = re.compile(
    r"\b(?:anyone|anybody|anything|everyone|everybody|everything|all|nobody|no one|none) but\s+(?:the\s+)?\Z",
    re.IGNORECASE,
)
_COMPARED_BEFORE = re.compile(
    r"\b(?:after|before|since|between|of|from|or|either)\s+(?:(?:an?|the|in|on|at|to)\s+)*[\"'(]*\Z",
    re.IGNORECASE,
)
_NEGATED_BEHIND = re.compile(
    r"[\"')]*\s*(?:\w+n't\b|(?:\w+\s+)?(?:is|are|was|were|does|did|do|has|have|had|can|could|will|would|must)?\s*(?:not|never)\b)",
    re.IGNORECASE,
)
_PART_BEHIND = re.compile(r"\s*[-+*/^=]\s*\w|'s?\s+(?!(?:not|the|an?)\b)\w")
"""What makes it a part of something else: a sum, or what belongs to it."""
_SINGLE_VERB = re.compile(
    rf"\s+(?:{'|'.join(verb for verb in _VERBS if verb not in ('are', 'were', 'have', 'do'))})\b"
)
_JOINED_BEFORE = re.compile(r"(?<![\w'-])([A-Z][\w'-]*)(?:,|,?\s+and|\s*&)\s+\Z")
_LISTED_BEHIND = re.compile(
    r"\s*(?:,\s*(?:and\s+)?|and\s+|&\s*)[A-Z][\w-]*"
    r"(?:(?=\s*(?:,|or\b|and\b|[.!]?\s*\Z))|(?<=\w)(?=\s+(?:is|are|was|were)\b))"
)
_LEFT_OPEN = re.compile(r"(?:\s+[a-z]+)?\s*,?\s+(?:or|nor)\b")


def occurrences(text: str, want: str) -> list[tuple[int, int]]:
    """Where the words of a text stand in another, as whole words, articles and case aside."""
    words = [
        word for word in want.split() if word.casefold().strip(OUTER_MARKS) not in ARTICLES
    ] or want.split()
    words = [word.strip(OUTER_MARKS) or word for word in words]
    if not words:
        return []
    pattern = r"\s+".join(map(re.escape, words))
    before, behind = (
        (r"(?<![\w'])" if words[0][:1].isalnum() else ""),
        (r"(?!\w)" if words[-1][-1:].isalnum() else ""),
    )
    return [match.span() for match in re.finditer(before + pattern + behind, text, re.IGNORECASE)]


def affirmed(text: str, start: int, end: int) -> bool:
    """Whether what stands at a place of a sentence is neither denied, nor left open, nor one of several."""
    before, behind = text[max(0, start - NEAR) : start], text[end : end + NEAR]
    clause = re.split(r"[,;]\s|\bbut\s", before)[-1]
    if _NEGATED_BEFORE.search(clause) or _EXCEPTED.search(before) or _COMPARED_BEFORE.search(before):
        return False
    if _NEGATED_BEHIND.match(behind) or _LEFT_OPEN.match(behind) or _PART_BEHIND.match(behind):
        return False
    joined = _JOINED_BEFORE.search(before)
    name = joined and (joined[1] == "A" or joined[1].casefold() not in _NO_NAMES)
    if name and not _SINGLE_VERB.match(behind):
        return False
    listed = _LISTED_BEHIND.match(behind)
    # "The tallest is Ben and Kim is the shortest" has two clauses and no list.
    return not listed or bool(_SINGLE_VERB.match(behind, listed.end()) and _COPULA.search(before))


def names(text: str) -> list[re.Match[str]]:
    """Capital words that may be names."""
    return [
        match
        for match in re.finditer(r"(?<![\w'])[A-Z][\w-]*(?:\s+[A-Z][\w-]*)*", text)
        if match[0].casefold() not in _NO_NAMES and match[0].split()[0].casefold() not in _NO_NAMES
    ]


def _sentence_states(text: str, want: str) -> bool | None:
    """Whether a sentence states a text; None where it states nothing."""
    if text.rstrip().endswith("?"):
        return None
    named = want[:1].isupper()
    others = [match for match in names(text) if named and affirmed(text, *match.span())]
    for start, end in occurrences(text, want):
        if not affirmed(text, start, end):
            continue
        before = text[max(0, start - NEAR) : start]
        first = re.search(r"([A-Z][\w'-]*)\s+\Z", before)
        if named and first and first[1].casefold() not in _NO_NAMES:
            continue  # part of a longer name
        if _COPULA.search(before) or not any(match.end() <= start for match in others):
            return True
    return False if any(match[0].casefold() != want.casefold() for match in others) else None


def stated(text: str, want: str) -> bool | None:
    """Whether a text states words or a name; None where it states nothing of the kind.

    The first of its sentences that states something decides; behind "so" or "the answer is" only what follows counts.
    """
    for match in reversed(list(CONCLUDES.finditer(text))):
        behind = text[match.end() :]
        if names(behind) or occurrences(behind, want):
            text = behind
            break
    for sentence in re.split(r"(?<=[.!?;])\s+", text):
        states = _sentence_states(sentence, want)
        if states is not None:
            return states
    return None


def is_sentence(text: str) -> bool:
    return _SENTENCE.search(text) is not None
