"""How many tokens texts have, by a model's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.simulation.workloads.records import WorkloadError

_AT_ONCE = 1000
"""Texts: the tokens of more take much memory."""


def count_tokens(texts: Sequence[str], model: str) -> list[int]:
    """Tokens of each text, without special ones.

    Args:
        texts: To count.
        model: A packaged model, a folder, or a hub id, of which the tokenizer alone is fetched.

    Raises:
        WorkloadError: its tokenizer cannot be had.
    """
    # Most workloads need no tokenizer.
    from tokenizers import Tokenizer

    from instance.model.resolve import PACKAGED, ModelNotFoundError, resolve_model

    try:
        if model in PACKAGED or Path(model).is_dir():
            tokenizer = Tokenizer.from_file(str(resolve_model(model) / "tokenizer.json"))
        else:
            tokenizer = Tokenizer.from_pretrained(model)
    except ModelNotFoundError as error:
        raise WorkloadError(f"tokenizer: {error}") from None
    except Exception as error:  # the library raises bare ones
        raise WorkloadError(f"tokenizer: {model}: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [
        len(encoded.ids)
        for start in range(0, len(texts), _AT_ONCE)
        for encoded in tokenizer.encode_batch_fast(
            texts[start : start + _AT_ONCE], add_special_tokens=False
        )
    ]
