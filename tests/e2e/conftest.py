"""What the end-to-end tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.models import make_tiny_model


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model small enough for float64, whose text is then exact."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    return make_tiny_model(folder, "llama", max_len=4096, layers=4)
