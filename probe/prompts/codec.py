"""Text to token ids and back, with one tokenizer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from probe.prompts.parts import PromptFault, ToolPart
from probe.prompts.template import ChatTemplate

_ANCHORS = ("\n", "x", ".", "1", ")")
"""Texts that a segment may be encoded behind, see `Codec._anchor`; not a line break where it is read as a blank."""

_WINDOW = 8
"""Tokens that are decoded together, where each is placed in a text."""
_CUT = "\ufffd"
"""What tokenizers write for bytes that are no whole character."""
_BYTE_DECODERS = ("ByteLevel", "ByT5Tokenizer")
"""Classes that decode bytes and nothing else: what stands behind a whole character does not depend on what stands before it."""

_REMEMBERED = 2048
_REMEMBERED_CHARACTERS = 2000
"""Texts whose tokens are remembered, and the longest: tools and instructions recur from task to task, and a call of the
tokenizer costs 0.2 ms whatever it is given."""


def carriers(parts: Sequence[ToolPart], ends: Sequence[int], first: int, last: int) -> list[ToolPart]:
    """The tokens first … last − 1 that carry each of these stretches of a text; `ends` are the characters that tokens reach.

    A token on a border belongs to the first of two parts; a part that has no token of its own is left out.
    """
    if not parts:
        return []
    begins, begin, before = [], 0, 0
    for end in ends[:last]:
        if end > before:  # tokens that are bytes of one character end together: each carries it
            begin, before = before, end
        begins.append(begin)
    covered: list[ToolPart] = []
    for part in parts:
        at = [n for n in range(first, last) if begins[n] < part.end and ends[n] > part.start]
        if at:
            first = at[-1] + 1
            covered.append(ToolPart(part.part, at[0], first))
    return covered


def _any_of(texts: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, texts))) if texts else None


class Codec:
    """Encodes and decodes with one tokenizer; knows its chat template, sink, turn ends and special tokens."""

    def __init__(
        self,
        tokenizer,
        n_ctx: int,
        switches: Sequence[int] = (),
        stop_ids: Collection[int] = (),
        *,
        template_arguments: Mapping[str, Any] | None = None,
        date: str | None = None,
    ):
        """`n_ctx`, `switches` and `stop_ids` of the model: see `probe.model.hooked.Model`.

        `date` (ISO 8601) is the one that the chat template is told; None: that of the clock.
        """
        self.tokenizer, self.n_ctx, self.switches = tokenizer, n_ctx, switches
        self._remembered = lru_cache(_REMEMBERED)(self._tokenized)
        self.stop_ids = frozenset(stop_ids)
        self.special_ids = frozenset(tokenizer.all_special_ids)
        self.template = ChatTemplate(tokenizer, template_arguments, date)
        self.markup_tokens = self._find_markup_tokens()
        plain = [token for token in self.markup_tokens if token not in tokenizer.all_special_tokens]
        self._calls = _any_of(plain)
        self._anywhere = _any_of(self.markup_tokens)
        self._marks = self.special_ids - {tokenizer.unk_token_id}
        # SentencePiece's dummy prefix and `add_prefix_space` put a space in front of what is encoded by itself.
        self._anchors = [text for text in _ANCHORS if self.decode(self._raw(text, False)).strip(" ") == text]
        before, joint = self._raw("\n", False), self._raw("\nx", False)
        self._begins_apart = joint != [*before, *self._raw("x", False)]
        self._begins_again = self._begins_behind_special()
        alike = self._normalized("A\u00e9")
        composed = unicodedata.normalize(
            "NFC", alike
        ).casefold()  # one may write an accent as a character of its own
        self._without_capitals, self._without_accents = (
            "a" in alike,
            "e" in composed and "\u00e9" not in composed,
        )
        decoder = tokenizer.backend_tokenizer.decoder if tokenizer.is_fast else tokenizer
        self._in_bytes = type(decoder).__name__ in _BYTE_DECODERS
        self.sink = self._find_sink()
        self.eos_ids = frozenset(i for i in self._eos() if i is not None)

    def encode(self, text: str, markup: bool = False, after: int | None = None) -> list[int]:
        """Token ids of one segment, without added tokens; special tokens in data stay text.

        `after` is the token before it where that is known: some tokenizers begin anew behind a special token.
        """
        anchor = "" if self._begins_again and after in self.special_ids else self._anchor(text, markup)
        return self._raw(anchor + text, markup)[len(self._raw(anchor, markup)) :]

    def encode_first(self, text: str, markup: bool = False) -> list[int]:
        """The same of the first text of a prompt, as the tokenizer begins a text."""
        return self._raw(text, markup)

    def encode_with_offsets(self, text: str, markup: bool) -> tuple[list[int], list[int]]:
        """Token ids of a segment and the character offset each token reaches."""
        if not self.tokenizer.is_fast:
            ids = self.encode(text, markup)
            return ids, self.token_ends(ids)
        anchor = self._anchor(text, markup)
        out = self.tokenizer(
            anchor + text,
            add_special_tokens=False,
            split_special_tokens=not markup,
            return_offsets_mapping=True,
        )
        skip = len(self._raw(anchor, markup))
        ends = [end - len(anchor) for _, end in out["offset_mapping"]]
        return list(out["input_ids"])[skip:], ends[skip:]

    def covering(
        self, text: str, markup: bool, ids: Sequence[int], parts: Sequence[ToolPart]
    ) -> list[ToolPart]:
        """The tokens that carry each of these stretches of a segment, whose token ids are `ids`.

        A token on a border belongs to the first of two parts. A part that has no token of its own, or that cannot be
        placed because the tokens spell another text, is left out.
        """
        if not parts:
            return []
        encoded, ends = self.encode_with_offsets(text, markup)
        if encoded != list(ids):
            if self.decode(ids) != text:
                return []
            ends = self.token_ends(ids)
        return carriers(parts, ends, 0, len(ends))

    def ends_of(self, text: str, ids: Sequence[int]) -> list[int]:
        """The character of a rendered text that each of its tokens reaches."""
        if not self.tokenizer.is_fast:
            return self.token_ends(ids)
        out = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True
        )
        return [end for _, end in out["offset_mapping"]]

    def _anchor(self, text: str, markup: bool) -> str:
        """A text whose tokens are the same with `text` behind it, so that those of `text` are the rest."""
        if self._begins_apart:
            for anchor in self._anchors:
                before = self._raw(anchor, markup)
                if self._raw(anchor + text, markup)[: len(before)] == before:
                    return anchor
        return ""

    def _begins_behind_special(self) -> bool:
        token = next(iter(self.tokenizer.all_special_tokens), None)
        if token is None or not self._begins_apart:
            return False
        return self._raw(f"{token}x", True)[1:] == self._raw("x", False)

    def folded(self, text: str) -> str:
        """A text without what the tokenizer makes alike: capitals (GPT), accents."""
        if self._without_capitals:
            text = text.casefold()
        if self._without_accents:
            text = "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))
        return text

    def _normalized(self, text: str) -> str:
        """A text as the tokenizer's own normaliser makes it; of one without any as its tokens say it."""
        if self.tokenizer.is_fast:
            normalizer = self.tokenizer.backend_tokenizer.normalizer
            return text if normalizer is None else normalizer.normalize_str(text)
        return self.decode(self._raw(text, False))

    def room(self, n_prompt: int) -> int:
        """Tokens that a sequence with such a prompt may have in all: none crosses a switch while it is generated, for
        behind it the keys before it would be others."""
        return next(
            (max(switch, n_prompt + 1) - 1 for switch in self.switches if n_prompt <= switch), self.n_ctx
        )

    def decode(self, token_ids: Sequence[int], skip_special: bool = False) -> str:
        return self.tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )

    def completion(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens, without the token that ended the turn."""
        ids = list(token_ids)
        while ids and ids[-1] in self.eos_ids:
            ids.pop()
        return self.decode(ids)

    def token_ends(self, token_ids: Sequence[int]) -> list[int]:
        """For each token, how many characters of the decoded text are complete after it."""
        return [begin + len(text) for begin, text in self._windows(token_ids)]

    def characters(self, token_ids: Sequence[int]) -> list[int] | None:
        """How many characters of their `completion` each of these tokens completes; None where its text does not come apart so.

        A token that only begins a character completes none of it, nor does one that ends the turn.
        """
        whole, reached = self.completion(token_ids), [0]
        for begin, text in self._windows(token_ids):
            while text and not whole.startswith(text, begin):
                text = text[:-1]
            reached.append(max(reached[-1], min(begin + len(text), len(whole))))
        return [after - before for before, after in pairwise(reached)] if reached[-1] == len(whole) else None

    def _windows(self, token_ids: Sequence[int]) -> Iterator[tuple[int, str]]:
        """For each token a text that ends with it, and the character at which that begins in the text of all.

        Windows are short, so that the cost is linear. Each begins with a token whose text is known, for a decoder may drop a
        blank that begins a text; where tokens are bytes, behind any whole character. Other tokenizers spell what they
        lack in bytes that have no text alone: over a stretch of these the cost is quadratic.
        """
        first, begin, before = 0, 0, ""
        for index, token in enumerate(token_ids):
            text = self.decode(token_ids[first : index + 1])
            yield begin, text
            if index - first >= _WINDOW:
                alone, grown = self.decode([token]), text[len(before) :]
                if self._in_bytes and text != before and not text.endswith(_CUT):
                    first, begin, text = index + 1, begin + len(text), ""
                elif _CUT not in alone and grown and grown in (alone, f" {alone}"):
                    first, begin, text = index, begin + len(text) - len(alone), alone
            before = text

    def _raw(self, text: str, markup: bool) -> list[int]:
        short = len(text) <= _REMEMBERED_CHARACTERS
        return list(self._remembered(text, markup)) if short else self._tokenized(text, markup)

    def _tokenized(self, text: str, markup: bool) -> list[int]:
        ids = self._in_pieces(text, markup, self._calls)
        if not markup and self._marks & set(ids):  # a Unigram model finds them among its own pieces
            return self._in_pieces(text, markup, self._anywhere)
        return ids

    def _in_pieces(self, text: str, markup: bool, marks: re.Pattern[str] | None) -> list[int]:
        """Tokens of a text that is cut within these marks unless they are markup."""
        cuts = [m.start() + 1 for m in marks.finditer(text)] if marks and not markup else []
        ids: list[int] = []
        if not text:
            return ids
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            piece = self.tokenizer(text[start:end], add_special_tokens=False, split_special_tokens=not markup)
            ids += piece["input_ids"]
        return ids

    def _find_markup_tokens(self) -> list[str]:
        """Special tokens, and added ones that the template writes: Qwen's <tool_call> is not marked special."""
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if not token.special]
        written = [text for text in added if text.strip() and text in self.template.source]
        return [*self.tokenizer.all_special_tokens, *written]

    def _find_sink(self) -> int | None:
        """The token to put in front of a text; None where the tokenizer has none that carries no content."""
        tokenizer = self.tokenizer
        turn_marker = tokenizer.bos_token and tokenizer.bos_token in self.template.source
        if turn_marker and "<|endoftext|>" in tokenizer.all_special_tokens:
            # SmolLM2's bos opens a turn; between documents it saw <|endoftext|>.
            return int(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
        for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id, *sorted(self.special_ids)):
            if token_id is not None:
                return int(token_id)
        return None

    def _eos(self) -> set[int | None]:
        """End-of-sequence, the model's list, and whatever special token closes an assistant's turn in the template."""
        ends: set[int | None] = {self.tokenizer.eos_token_id, *self.stop_ids}
        if self.template:
            mark = "\ue000turn\ue001"
            try:
                text = self.template.render(
                    [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}],
                    open_turn=False,
                )
            except PromptFault:  # there is nothing to learn from it
                return ends
            after = self._raw(text.partition(mark)[2].lstrip(), True)  # some begin another line before it
            if after and after[0] in self.special_ids:
                ends.add(after[0])
        return ends
