"""Incremental detokenization and stop strings: exact, however text and tokens are split."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from cluster.gateway.detokenizer import (
    ByteLevelDetokenizer,
    OutputText,
    WindowDetokenizer,
    detokenizer_factory,
)
from cluster.gateway.stop_strings import StopStrings
from tests.unit.byte_tokenizer import EOS, byte_tokenizer


@functools.cache
def sentencepiece_tokenizer(strip: bool) -> Tokenizer:
    """Pieces with a metasymbol for spaces, and byte fallback: as Llama 2 and Gemma decode."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "a", "b", "▁c", "é", "�", ".", "▁▁"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


@functools.cache
def wordpiece_tokenizer() -> Tokenizer:
    """A decoder that treats the first token of a text differently."""
    pieces = ["[UNK]", "[CLS]", "hello", "##lo", "wor", "##ld", "é", "##s", "x"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["[CLS]"])
    return tokenizer


@functools.cache
def nested_byte_tokenizer() -> Tokenizer:
    """A byte-level decoder inside a sequence, which the fast path does not take."""
    tokenizer = byte_tokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel()])
    return tokenizer


BYTE = byte_tokenizer()


def pieces_of(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """Pieces of a streamed text, after checking them against decoding all at once."""
    detokenizer = detokenizer_factory(tokenizer)()
    pieces = [detokenizer.push(token) for token in tokens]
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
    return pieces


# Valid text, any bytes, and characters that are cut off, overlong or surrogates.
BYTES = st.lists(
    st.one_of(
        st.text(max_size=3).map(str.encode),
        st.binary(max_size=3),
        st.sampled_from([b"\xf0\x9f\x99", b"\xe4\xbd", b"\xed\xa0\x80", b"\xc0\x80", b"\xff"]),
    ),
    max_size=8,
).map(b"".join)


@given(data=BYTES, others=st.lists(st.integers(256, 263), max_size=4), places=st.randoms())
def test_every_byte_a_token(data: bytes, others: list[int], places) -> None:
    """Bytes, valid or not, among special, added and unknown tokens."""
    tokens = list(data)
    for token in others:
        tokens.insert(places.randrange(len(tokens) + 1), token)
    pieces_of(BYTE, tokens)


@given(tokens=st.lists(st.integers(0, 263), max_size=24))
def test_byte_level_inside_a_sequence(tokens: list[int]) -> None:
    pieces_of(nested_byte_tokenizer(), tokens)


@pytest.mark.parametrize("strip", [False, True])
@given(
    tokens=st.lists(
        st.one_of(
            st.integers(0, 270),
            st.integers(259, 268),  # pieces
            st.sampled_from([3 + byte for byte in "é€".encode()]),
        ),
        max_size=24,
    )
)
def test_byte_fallback(strip: bool, tokens: list[int]) -> None:
    pieces_of(sentencepiece_tokenizer(strip), tokens)


@given(tokens=st.lists(st.integers(0, 9), max_size=16))
def test_word_pieces(tokens: list[int]) -> None:
    pieces_of(wordpiece_tokenizer(), tokens)


def test_text_comes_as_soon_as_it_is_certain() -> None:
    """A character is out with its last byte; nothing is kept for the end."""
    assert pieces_of(BYTE, list("aé🙂".encode())) == ["a", "", "é", "", "", "", "🙂", ""]
    assert pieces_of(BYTE, list(b"a\xe4\xbd")) == ["a", "", "", "�"]
    for tokenizer, kind in (
        (BYTE, ByteLevelDetokenizer),
        (nested_byte_tokenizer(), WindowDetokenizer),
        (sentencepiece_tokenizer(True), WindowDetokenizer),
    ):
        assert isinstance(detokenizer_factory(tokenizer)(), kind)
    the, a = 260, 261
    assert pieces_of(sentencepiece_tokenizer(True), [the, the, a]) == ["the", " the", "a", ""]


# ---- stop strings


def reference(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """Character by character: the first stop string that completes, the longest of several."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            stop = max(done, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


ALPHABET = st.sampled_from("abé")


@given(
    pieces=st.lists(st.text(ALPHABET, max_size=5), max_size=12),
    stops=st.lists(st.text(ALPHABET, min_size=1, max_size=5), min_size=1, max_size=4),
    include=st.booleans(),
)
def test_stop_strings(pieces: list[str], stops: list[str], include: bool) -> None:
    text = "".join(pieces)
    expected, stop = reference(text, stops, include)
    matcher = StopStrings(stops, include)
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
        # What is out can never have to be taken back.
        assert expected.startswith(shown)
    assert matcher.matched == stop
    assert shown + matcher.flush() == expected


@given(
    pieces=st.lists(st.text(ALPHABET, max_size=5), max_size=8),
    stops=st.lists(st.text(ALPHABET, min_size=1, max_size=5), min_size=1, max_size=4),
)
def test_only_a_possible_stop_string_is_held_back(pieces: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    taken = shown = ""
    for piece in pieces:
        taken += piece
        shown += matcher.push(piece)
        if matcher.matched is not None:
            return
        held = taken[len(shown) :]
        assert shown == taken[: len(shown)]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def output(*stops: str, min_tokens: int = 0, include: bool = False) -> OutputText:
    return OutputText(
        detokenizer_factory(BYTE)(), stops, min_tokens=min_tokens, include_stop=include
    )


@given(
    data=st.text("ab🙂", max_size=12),
    stops=st.lists(st.text("ab🙂", min_size=1, max_size=3), max_size=3),
    size=st.integers(1, 5),
)
def test_stop_strings_over_tokens(data: str, stops: list[str], size: int) -> None:
    """A stop string is found wherever its bytes are split, and later tokens are not counted."""
    raw = data.encode()
    expected, stop = reference(data, stops, include=False)
    result = output(*stops)
    shown = "".join(result.push(raw[at : at + size]) for at in range(0, len(raw), size))
    shown += result.flush()
    assert (shown, result.matched) == (expected, stop)
    assert result.num_tokens == len((expected + (stop or "")).encode())


def test_stop_strings_wait_for_min_tokens() -> None:
    result = output("x", min_tokens=3)
    assert result.push(b"axbcx!") == "axbc"
    assert (result.matched, result.num_tokens) == ("x", 5)


def test_the_token_that_stopped_is_counted_but_no_text() -> None:
    for include, expected in ((False, "ab"), (True, "ab\n")):
        result = output(include=include)
        assert result.push(b"a") + result.push(b"b\n", last_stops=True) + result.flush() == expected
        assert result.num_tokens == 3
    special = output(include=True)
    assert special.push([97, EOS], last_stops=True) == "a"


def test_a_stop_string_may_stay_in_the_text() -> None:
    result = output("lo", include=True)
    assert result.push(b"hello there") == "hello"
    assert result.matched == "lo"


def test_an_invalid_end_can_complete_a_stop_string() -> None:
    result = output("�", "z")
    assert result.push(b"a\xe4") == "a"
    assert result.flush() == ""
    assert result.matched == "�"
