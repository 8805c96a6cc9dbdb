"""The generated protocol code is what the .proto files say."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROTOS = sorted(path.name for path in (ROOT / "protos").glob("*.proto"))


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like protos/ whose code was generated just now, as ``make protos`` does it."""
    root = tmp_path_factory.mktemp("root")
    (root / "protos").mkdir()
    for name in PROTOS:
        shutil.copy(ROOT / "protos" / name, root / "protos")
    outputs = ["--python_out=.", "--pyi_out=.", "--grpc_python_out=."]
    sources = [f"protos/{name}" for name in PROTOS]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, *sources]
    subprocess.run(command, cwd=root, check=True)
    return root / "protos"


def test_there_are_protos() -> None:
    assert "generate.proto" in PROTOS
    assert "migration.proto" in PROTOS


def test_generator_is_the_one_that_old_protobuf_runtimes_accept() -> None:
    # Generated code refuses a runtime older than its generator's; 1.76 asks for 6.31.1.
    assert importlib.metadata.version("grpcio-tools") == "1.76.0"


@pytest.mark.parametrize("name", PROTOS)
@pytest.mark.parametrize("suffix", ["_pb2.py", "_pb2.pyi", "_pb2_grpc.py"])
def test_generated_code_is_current(regenerated: Path, name: str, suffix: str) -> None:
    generated = name.removesuffix(".proto") + suffix
    committed = (ROOT / "protos" / generated).read_bytes()
    assert committed == (regenerated / generated).read_bytes(), "run `make protos`"


def test_no_generated_code_without_a_proto(regenerated: Path) -> None:
    committed = {path.name for path in (ROOT / "protos").glob("*_pb2*.py*")}
    assert committed == {path.name for path in regenerated.glob("*_pb2*.py*")}
