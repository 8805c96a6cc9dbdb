"""Parameters of the OpenAI API, and of vLLM's extensions to it, that are refused.

They would change the answer and are not implemented; harmless values of them are accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cluster.gateway.errors import invalid


def _is(*harmless: Any) -> Callable[[Any], bool]:
    return lambda value: any(value == one for one in harmless)


_never = _is()

UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    "length_penalty": _is(1),
    "prompt_logprobs": _never,
    "tools": _is([]),
    "functions": _is([]),
    "tool_choice": _is("none", "auto"),
    "function_call": _is("none", "auto"),
    "modalities": _is(["text"]),
    "audio": _never,
    "prediction": _never,
    "web_search_options": _never,
    "reasoning_effort": _is("none"),
    "verbosity": _never,
    "suffix": _is(""),
    "use_beam_search": _is(False),
    "bad_words": _is([]),
    "allowed_token_ids": _never,
    "logits_processors": _is([]),
    "truncate_prompt_tokens": _never,
    "prompt_embeds": _never,
    "skip_special_tokens": _is(True),
    "spaces_between_special_tokens": _is(True),
    "chat_template": _never,
    "documents": _is([]),
    "guided_whitespace_pattern": _never,
    "cache_salt": _never,
    "return_token_ids": _is(False),
    "return_tokens_as_token_ids": _is(False),
    "kv_transfer_params": _never,
}
"""Parameter -> whether a value, other than null, asks for nothing special."""


IN_CHATS = {"echo": _is(False)}
IN_COMPLETIONS = {"top_logprobs": _is(0)}

_FUNCTIONS = (("tools", "tool_choice"), ("functions", "function_call"))


def refuse_unsupported(body: Mapping[str, Any], more: Mapping[str, Callable[[Any], bool]]) -> None:
    """Refuse a body that asks for something special that is not implemented.

    Args:
        body: As sent.
        more: Further parameters of its kind, as in ``UNSUPPORTED``.

    Raises:
        ApiError: 400 that names the parameter.
    """
    checks = {**UNSUPPORTED, **more}
    for functions, choice in _FUNCTIONS:
        if body.get(choice) == "none":
            del checks[functions]  # the model is not to call them
        elif body.get(functions):
            raise invalid(
                f"function calling is not supported by this server: leave out '{functions}' or "
                f"set '{choice}' to 'none'",
                functions,
                "unsupported_parameter",
            )
    for name in body.keys() & checks.keys():
        value = body[name]
        if value is not None and not checks[name](value):
            raise invalid(
                f"the value of '{name}' is not supported by this server",
                name,
                "unsupported_parameter",
            )
