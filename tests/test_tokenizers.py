"""Tokenizers of other kinds than bytes: a prompt's tokens say its text, and begin as the tokenizer begins."""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.implementations import (
    ByteLevelBPETokenizer,
    SentencePieceBPETokenizer,
    SentencePieceUnigramTokenizer,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from probe.capture import CaptureSpec, Generation, Job, NonFinite, run_batch
from probe.errors import BadInput
from probe.prompts import Codec, Segment, prompt_of
from tests.conftest import tiny

WORDS = [
    "How many apples are there?",
    "The capital of France is Paris.",
    "Country: What is 2 plus 3? 100 200",
] * 20
SPECIAL = ["<unk>", "<s>", "</s>"]


@cache
def tokenizer(kind: str):
    if kind == "slow":
        return ByT5Tokenizer()
    if kind == "unigram":
        trained = SentencePieceUnigramTokenizer()
        trained.train_from_iterator(
            WORDS, vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    elif kind == "pieces":
        trained = SentencePieceBPETokenizer()
        trained.train_from_iterator(WORDS, vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    else:
        trained = ByteLevelBPETokenizer(add_prefix_space=kind == "prefix_space")
        special = [] if kind == "none" else SPECIAL
        trained.train_from_iterator(WORDS, vocab_size=300, special_tokens=special, show_progress=False)
    names = {} if kind == "none" else dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **names)


KINDS = ["unigram", "pieces", "prefix_space", "none", "slow", "bytes"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_raw_prompt_has_the_tokens_of_the_whole_text(kind):
    codec = Codec(tokenizer(kind), 512)
    for text in ("How many?", "apples are there", "The capital of France is", " 100"):
        ids = prompt_of(text, codec, 1).token_ids
        whole = tokenizer(kind)(text, add_special_tokens=False)["input_ids"]
        assert ids[len(ids) - len(whole) :] == whole
        assert ids[: len(ids) - len(whole)] == ([] if codec.sink is None else [codec.sink])


@pytest.mark.parametrize("kind", KINDS)
def test_segments_say_the_text_that_they_hold(kind):
    codec = Codec(tokenizer(kind), 512)
    texts = ["How many", " apples", " are there?", " The capit", "al", " of", " France"]
    prompt = prompt_of([Segment(text, f"l{number}") for number, text in enumerate(texts)], codec, 1)
    shown_text = codec.decode([i for i in prompt.token_ids if i != codec.sink])
    assert shown_text.strip() == "".join(texts)
    for span in prompt.spans[1 if codec.sink is not None else 2 :]:
        shown = codec.decode(prompt.token_ids[span.start : span.end])
        assert shown.strip() == texts[int(span.label[1:])].strip()


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_is_found_behind_an_opener(kind):
    codec = Codec(tokenizer(kind), 512)
    ids, ends = codec.encode_with_offsets("The capital of France", True)
    assert ids == codec.encode("The capital of France", True) and len(ids) == len(ends)
    assert ends[-1] == len("The capital of France") and ends == sorted(ends)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _byte_fallback():
    """Pieces with a leading blank, bytes for what they lack, and a decoder that drops a first blank: as Llama's."""
    vocabulary = {piece: index for index, piece in enumerate([*SPECIAL, *BYTES, "▁", "▁foo", "bar", "▁▁"])}
    pieces = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    pieces.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("kind", ["byte_fallback", "prefix_space", "slow", "bytes"])
def test_tokens_end_where_a_decoding_of_all_before_them_says(kind):
    hf = _byte_fallback() if kind == "byte_fallback" else tokenizer(kind)
    codec = Codec(hf, 512)
    text = "a 😀é  漢字\n  foo bar\n" * 4
    whole = hf.convert_tokens_to_ids
    ids = (
        [
            *whole(["▁foo", *[BYTES[byte] for byte in "😀é\n".encode()], "▁▁", "▁foo", "bar", "▁"]) * 4,
            *whole([BYTES[byte] for byte in "漢".encode()][:2]),
        ]
        if kind == "byte_fallback"
        else codec.encode(text)
    )
    slowly = [codec.decode(ids[: n + 1]) for n in range(len(ids))]
    assert codec.token_ends(ids) == [len(text) for text in slowly]
    end = [hf.eos_token_id]
    characters = codec.characters(ids + end)
    assert characters is not None and characters[-1] == 0
    complete = [0]
    for before in slowly:  # the characters that nothing which follows changes
        same = next((n for n, (a, b) in enumerate(zip(before, slowly[-1], strict=False)) if a != b), None)
        complete.append(max(complete[-1], min(len(before), len(slowly[-1])) if same is None else same))
    assert characters[:-1] == [b - a for a, b in zip(complete, complete[1:], strict=False)]
    assert sum(characters) == len(codec.completion(ids + end)) and characters.count(0) > 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["a 😀é  漢字\n  foo bar\n" * 2, "漢字😀é" * 4, "한국어 é ñ " * 4])
def test_windows_of_tokens_say_the_same_wherever_they_begin(kind, text):
    codec = Codec(tokenizer(kind), 512)
    for lead in range(13):
        ids = codec.encode("x" * lead + text)
        assert codec.token_ends(ids) == [len(codec.decode(ids[: n + 1])) for n in range(len(ids))]


def test_tokens_without_a_text_alone_are_decoded_few_together(monkeypatch):
    """CJK and emoji in byte tokens: the cost grows with the tokens, not with their square."""
    for kind in ("bytes", "slow"):
        codec, decode, decoded = Codec(tokenizer(kind), 512), Codec.decode, []
        ids = codec.encode("漢字😀" * 60)
        monkeypatch.setattr(
            codec, "decode", lambda ids, d=decode, c=codec, n=decoded: n.append(len(ids)) or d(c, ids)
        )
        assert codec.token_ends(ids)[-1] == 180 and max(decoded) < 20


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_tokens_that_end_a_turn_complete_no_character_however_many_and_wherever_they_stand(kind):
    """A window may begin with any of them, behind the end of the completion."""
    hf: Any = tokenizer(kind)
    codec = Codec(hf, 512)
    for lead in range(1, 14):
        ids = codec.encode("x" * lead)
        alone = codec.characters(ids)
        assert alone is not None
        for n_ends in range(13):
            assert codec.characters([*ids, *[hf.eos_token_id] * n_ends]) == [*alone, *[0] * n_ends]


def test_tokens_whose_text_does_not_come_apart_have_no_characters(monkeypatch):
    codec = Codec(tokenizer("bytes"), 512)
    monkeypatch.setattr(codec, "decode", lambda ids: "".join(sorted(chr(97 + token) for token in ids)))
    assert codec.characters([*range(4, 20)]) == [1] * 16
    assert codec.characters([*range(4, 20), 3]) is None


def test_a_prompt_that_its_tokens_cannot_say_is_refused():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "How": 2, "many": 3}, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    lossy = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>")
    codec = Codec(lossy, 64)
    assert len(prompt_of("How many", codec, 1).token_ids) == 3
    assert codec.decode(prompt_of("How good many", codec, 1).token_ids) == "<s> How <unk> many"
    words.normalizer = normalizers.Replace("a", "")
    codec = Codec(PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>"), 64)
    with pytest.raises(BadInput, match="cannot write the text of a prompt"):
        prompt_of("How many", codec, 1)


def test_without_special_tokens_nothing_is_put_in_front_and_nothing_is_called_bos():
    codec = Codec(tokenizer("none"), 512)
    prompt = prompt_of("How many apples are there?", codec, 1)
    assert codec.decode(prompt.token_ids) == "How many apples are there?"
    assert {span.label for span in prompt.spans} == {"user"}


def test_generation_ends_where_the_models_own_configuration_says(monkeypatch):
    """Against transformers' generate: its list of stop tokens may hold more than the tokenizer's."""
    model = tiny("tiny-llama")
    prompt = prompt_of("The cat sat on the mat", model.codec, 12)
    ids = torch.tensor([prompt.token_ids])
    free = model.hf.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    stop = next(token for token in free[3:] if token not in free[:3])
    monkeypatch.setattr(model.hf.generation_config, "eos_token_id", [2, stop])
    expected = model.hf.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()
    codec = Codec(model.tokenizer, 512, (), model.stop_ids)
    (outcome,) = run_batch(model, codec, [Job(prompt, "t")], CaptureSpec(frozenset()), Generation(12))
    assert not isinstance(outcome, NonFinite)
    assert outcome.token_ids == expected and outcome.finish_reason == "eos"
    assert len(expected) < len(prompt.token_ids) + 12


@cache
def composed(model: str, normalizer: str, prefix: bool, added: str) -> Any:
    """A small tokenizer of these parts, as tokenizer.json files put them together."""
    blank: dict[str, Any] = {"prepend_scheme": "always" if prefix else "never"}
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    if model == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer, backend.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=prefix),
            decoders.ByteLevel(),
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    elif model == "pieces":
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(**blank)
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(**blank)])
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *fallback])
    elif model == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer, backend.decoder = (
            pre_tokenizers.Metaspace(**blank),
            decoders.Metaspace(**blank),
        )
        trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>")
    else:
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))  # type: ignore[call-arg]
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL)
    if normalizer != "none":
        backend.normalizer = {
            "NFKC": normalizers.NFKC(),
            "lowercase": normalizers.Lowercase(),
            "no accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
            "BERT": normalizers.BertNormalizer(),
        }[normalizer]
    trainer.show_progress = False
    backend.train_from_iterator([*WORDS, "na\u00efve caf\u00e9 \ufb01ne \u6f22\u5b57 \U0001f600"], trainer)
    out: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    if added:
        out.add_tokens(
            [
                AddedToken(
                    "<tool>",
                    lstrip="l" in added,
                    rstrip="r" in added,
                    normalized="n" in added,
                    special="s" in added,
                )
            ]
        )
    return out


def letters(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).casefold()
    return "".join(c for c in plain if not c.isspace() and not unicodedata.combining(c))


PIECES = [
    "How many",
    " apples",
    "<tool>",
    " <tool> x",
    "\ufb01ne",
    "e\u0301",
    " ",
    "\n",
    "\u6f22\u5b57",
    "\U0001f600",
    "</s>",
    "<s>",
    "\u200b",
    "",
]


@settings(max_examples=120, deadline=None)
@given(
    model=st.sampled_from(["bytes", "pieces", "unigram", "wordpiece"]),
    normalizer=st.sampled_from(["none", "NFKC", "lowercase", "no accents", "BERT"]),
    prefix=st.booleans(),
    added=st.sampled_from(["", "-", "l", "lr", "n", "slr"]),
    texts=st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), min_size=1, max_size=6),
)
def test_spans_of_any_tokenizer_divide_the_prompt_and_say_their_texts_and_no_data_is_a_special_token(
    model, normalizer, prefix, added, texts
):
    used = composed(model, normalizer, prefix, added)
    codec = Codec(used, 512)
    try:
        prompt = prompt_of([Segment(text, f"l{number}") for number, text in enumerate(texts)], codec, 1)
    except BadInput:  # only where the tokenizer itself loses a part of the text
        whole = "".join(texts)
        back = used.decode(used(whole, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        assert letters(back) != letters(whole)
        return
    assert [span.start for span in prompt.spans] == [0, *(span.end for span in prompt.spans[:-1])]
    assert prompt.spans[-1].end == prompt.n_prompt
    unknown = {used.unk_token_id}
    assert not (codec.special_ids - unknown) & set(prompt.token_ids[1:])
    if unknown & set(prompt.token_ids):
        return
    for span in prompt.spans[1:]:
        text = codec.decode(prompt.token_ids[span.start : span.end])
        assert "\ufffd" in text or letters(text) == letters(texts[int(span.label[1:])])


def test_a_tokenizer_without_capitals_or_accents_writes_a_prompt_that_has_them():
    """GPT's own: what it makes alike is not lost text, and transformers gives the same tokens."""
    used = composed("pieces", "BERT", False, "")
    prompt = prompt_of("How MANY caf\u00e9s", Codec(used, 64), 1)
    assert prompt.token_ids[1:] == used("How MANY caf\u00e9s", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("form", ["NFD", "NFC", "NFKD"])
def test_a_normaliser_that_writes_accents_as_characters_of_their_own_keeps_them(form):
    hf = tokenizer("bytes")
    used = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(hf.backend_tokenizer.to_str()))
    used.backend_tokenizer.normalizer = getattr(normalizers, form)()
    assert Codec(used, 64).folded("\u00c9") == "\u00c9"
    used.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    assert Codec(used, 64).folded("\u00c9") == "E"


def test_a_prompt_without_any_token_is_refused():
    with pytest.raises(BadInput, match="a prompt has no token"):
        prompt_of("", Codec(tokenizer("none"), 64), 1)
