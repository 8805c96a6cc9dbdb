"""Token ids to text, incrementally and exactly.

The pieces joined equal the decoding of all ids at once, also where a character is split
over tokens and where bytes are invalid.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from tokenizers import Tokenizer

from cluster.gateway.stop_strings import StopStrings


class Detokenizer(Protocol):
    """Text of one sequence of tokens."""

    def push(self, token: int) -> str:
        """Take the next token; returns the text that is certain now."""

    def flush(self) -> str:
        """No token follows: returns the text that was not certain before."""


def detokenizer_factory(tokenizer: Tokenizer) -> Callable[[], Detokenizer]:
    """The detokenizer that is exact for the tokenizer's kind of decoder. Special tokens are
    left out of the text."""
    special = frozenset(
        token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special
    )
    decoder = json.loads(tokenizer.to_str()).get("decoder")
    if decoder is not None and decoder["type"] == "ByteLevel":
        table = _ByteTable(tokenizer, special)
        return lambda: ByteLevelDetokenizer(table)
    byte_fallback = "ByteFallback" in json.dumps(decoder)
    return lambda: WindowDetokenizer(tokenizer, special, byte_fallback)


def token_bytes_factory(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """Bytes of single tokens, special ones included: what a token stands for by itself, and
    so not always UTF-8."""
    decoder = json.loads(tokenizer.to_str()).get("decoder")
    if decoder is not None and decoder["type"] == "ByteLevel":
        return _ByteTable(tokenizer, frozenset()).__getitem__

    def piece_bytes(token: int) -> bytes:
        piece = tokenizer.id_to_token(token) or ""
        if _is_byte(piece):
            return bytes((int(piece[3:5], 16),))
        return piece.replace("▁", " ").encode()  # SentencePiece's sign for a space

    return piece_bytes


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _byte_alphabet() -> dict[str, int]:
    """Byte by the printable character that byte-level BPE writes for it (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update((chr(256 + index), byte) for index, byte in enumerate(others))
    return alphabet


class _ByteTable(dict[int, bytes]):
    """Bytes of each token, found when first asked for."""

    _ALPHABET = _byte_alphabet()

    def __init__(self, tokenizer: Tokenizer, special: frozenset[int]) -> None:
        super().__init__((token, b"") for token in special)
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> bytes:
        # A model's vocabulary may be padded beyond that of its tokenizer.
        piece = self._tokenizer.id_to_token(token) or ""
        try:
            value = bytes(self._ALPHABET[char] for char in piece)
        except KeyError:
            # An added token with characters outside the alphabet stands for itself.
            value = piece.encode()
        self[token] = value
        return value


class ByteLevelDetokenizer:
    """For byte-level BPE: each token is some bytes, and their joined UTF-8 is the text."""

    def __init__(self, table: _ByteTable) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._table[token])

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For any decoder: decodes a window of the last tokens with and without the new ones,
    and lets out the difference once no later token can change it.

    The window starts with tokens whose text is out already, so that decoders that treat
    the first token of a text differently do so in both.
    """

    def __init__(self, tokenizer: Tokenizer, special: frozenset[int], byte_fallback: bool) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._byte_fallback = byte_fallback
        self._window: list[int] = []
        self._known = 0
        self._known_text = ""

    def push(self, token: int) -> str:
        if token in self._special:
            return ""
        self._window.append(token)
        if self._byte_fallback and self._is_byte(token):
            # A run of byte tokens is decoded as a whole, and all of it is replaced if any
            # part is invalid: nothing is certain before it ends.
            return ""
        text = self._decode(self._window)
        if len(text) <= len(self._known_text) or (text.endswith("�") and not self._byte_fallback):
            return ""
        fresh = text[len(self._known_text) :]
        del self._window[: self._known]
        self._known = len(self._window)
        self._known_text = self._decode(self._window)
        return fresh

    def flush(self) -> str:
        text = self._decode(self._window)
        fresh = text[len(self._known_text) :]
        self._known = len(self._window)
        self._known_text = text
        return fresh

    def _is_byte(self, token: int) -> bool:
        return _is_byte(self._tokenizer.id_to_token(token) or "")

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class OutputText:
    """Text of one choice: detokenized, and ended at stop strings.

    Args:
        detokenizer: A fresh one.
        stops: Stop strings.
        include_stop: The stop string, or the token that stopped the sequence, stays in the
            text.
        min_tokens: Stop strings are not looked for in the text of the first ``min_tokens``.
        offsets: Keep where in the text each token begins, for ``take_offsets``.

    Attributes:
        num_tokens: Tokens taken.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
        offsets: bool = False,
    ) -> None:
        self.num_tokens = 0
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops, include_stop) if stops else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._offsets: list[int] | None = [] if offsets else None
        self._length = 0

    def take_offsets(self) -> list[int]:
        """Where in the text, in characters, each token taken since the last call begins.

        A token within a character begins where that character does.
        """
        offsets, self._offsets = self._offsets or [], []
        return offsets

    @property
    def matched(self) -> str | None:
        """The stop string at which the text ended."""
        return None if self._stops is None else self._stops.matched

    def push(self, tokens: Iterable[int], *, last_stops: bool = False) -> str:
        """Take the next tokens; returns the text that can be shown now.

        Tokens after a stop string are neither taken nor counted.

        Args:
            tokens: Token ids.
            last_stops: The last of them is the token that stopped the sequence. It counts,
                but is no text (as in vLLM).
        """
        tokens = list(tokens)
        hidden = tokens.pop() if last_stops and tokens and not self._include_stop else None
        shown: list[str] = []
        for token in tokens:
            if self.matched is not None:
                break
            self.num_tokens += 1
            text = self._detokenizer.push(token)
            if self._offsets is not None:
                self._offsets.append(self._length)
                self._length += len(text)
            if self._stops is not None and self.num_tokens > self._min_tokens:
                text = self._stops.push(text)
            shown.append(text)
        if hidden is not None and self.matched is None:
            self.num_tokens += 1
            if self._offsets is not None:
                self._offsets.append(self._length)
        return "".join(shown)

    def flush(self) -> str:
        """No token follows: returns the rest of the text."""
        if self.matched is not None:
            return ""
        text = self._detokenizer.flush()
        if self._stops is None:
            return text
        if self.num_tokens > self._min_tokens:
            text = self._stops.push(text)
        return text if self.matched is not None else text + self._stops.flush()
