"""The model's tokenizer and chat template, off the event loop where that takes long."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cluster.gateway.detokenizer import Detokenizer, detokenizer_factory, token_bytes_factory
from cluster.gateway.errors import invalid

T = TypeVar("T")

INLINE_CHARS = 4096
"""Texts up to this length are tokenized on the event loop: a hand-over to a thread costs more."""


class ModelTokenizer:
    """Texts and chats to token ids, and back.

    Args:
        tokenizer: A transformers tokenizer with a ``tokenizers`` backend.

    Raises:
        ValueError: if it has no such backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(
                f"{type(tokenizer).__name__} is not supported: the gateway needs a model with a "
                "tokenizer.json"
            )
        # Limits saved with a model would cut prompts silently.
        backend.no_truncation()
        backend.no_padding()
        self._tokenizer = tokenizer
        self._backend = backend
        self._detokenizer = detokenizer_factory(backend)
        self.token_bytes = token_bytes_factory(backend)
        """Bytes of one token by itself; special tokens as they are written."""
        self._pool = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="tokenizer")
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.has_chat_template = bool(tokenizer.chat_template)

    @classmethod
    def load(cls, folder: Path) -> ModelTokenizer:
        """Load the tokenizer in a model's folder; nothing is fetched or executed from it."""
        return cls(AutoTokenizer.from_pretrained(folder, local_files_only=True))

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return await self._run(len(text), lambda: self._encode(text, add_special_tokens))

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a chat, rendered with the model's template.

        Raises:
            ApiError: 400 if the model has no template or the template refuses the chat.
        """
        if not self.has_chat_template:
            raise invalid(
                "this model has no chat template; use /v1/completions", "messages", "no_template"
            )
        size = sum(len(message.get("content") or "") for message in messages)

        def render() -> list[int]:
            try:
                text = self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    **(template_kwargs or {}),
                )
            except (TemplateError, TypeError, ValueError, KeyError) as error:
                raise invalid(f"the chat template refuses this: {error}", "messages") from None
            return self._encode(str(text), add_special_tokens)

        return await self._run(size, render)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of all tokens at once."""
        return str(self._backend.decode(tokens, skip_special_tokens=skip_special_tokens))

    def detokenizer(self) -> Detokenizer:
        """A fresh incremental detokenizer; its pieces joined equal :meth:`decode`."""
        return self._detokenizer()

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The vocabulary's own strings of the tokens."""
        return [self._backend.id_to_token(token) or "" for token in tokens]

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    async def _run(self, size: int, work: Callable[[], T]) -> T:
        if size <= INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)
