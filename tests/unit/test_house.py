"""Rules of the house: who may import whom, and what a tracked file may hold."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.config import ServeConfig
from cluster.flags import flags_of

ROOT = Path(__file__).resolve().parents[2]

LAYERS = ("protos", "instance", "cluster", "bench")
"""A layer imports itself and those before it."""

INSTANCE_CORES = (
    "instance/request.py",
    "instance/token_counts.py",
    "instance/config.py",
    "instance/executor.py",
    "instance/load.py",
    "instance/fairness.py",
    "instance/leases.py",
    "instance/draft.py",
    "instance/limits.py",
    "instance/model/cuda/sizing.py",
    "instance/budget.py",
    "instance/fit.py",
    "instance/priority.py",
    "instance/queues.py",
    "instance/planner.py",
    "instance/scheduler.py",
    "instance/step_cost.py",
    "instance/stretch.py",
    "instance/migration/messages.py",
    "instance/migration/epochs.py",
    "instance/migration/source.py",
    "instance/migration/destination.py",
    "instance/migration/protocol.py",
)
GATEWAY_CORES = (
    "cluster/gateway/home.py",
    "cluster/gateway/home_actions.py",
    "cluster/gateway/served.py",
    "cluster/gateway/stop_strings.py",
)
SIMULATION_CORES = (
    "cluster/replay/results.py",
    "cluster/simulation/profile.py",
    "cluster/simulation/profile_check.py",
    "cluster/simulation/profile_fit.py",
    "cluster/simulation/scatter.py",
    "cluster/simulation/scatter_fit.py",
)
CORE_FOLDERS = ("instance/kv", "cluster/dispatcher", "cluster/simulation/workloads")
SHELLS = {
    "copier.py",
    "actor.py",
    "operators.py",
    "sources.py",
    "catalogue.py",
    "token_counting.py",
    "store.py",
    "__init__.py",
}
"""Modules of the core folders that do I/O."""

PURE = {
    *("__future__", "abc", "array", "bisect", "collections", "contextlib", "copy", "csv"),
    *("dataclasses", "enum", "fractions", "functools", "hashlib", "heapq", "itertools", "json"),
    *(
        "math",
        "numbers",
        "numpy",
        "operator",
        "re",
        "statistics",
        "string",
        "struct",
        "types",
        "typing",
    ),
}
"""Packages a core may import: none does I/O, and none knows a clock, a thread or chance."""
IMPURE_CALLS = {"open", "print", "input", "exec", "eval", "__import__"}

# Split, so that this file does not hold what it looks for.
MACHINE_PATHS = re.compile(
    "|".join(("/" + "work/", "/" + "root/", "/" + "home/", r"[A-Z]:\\+Users"))
)


def layer_modules() -> list[Path]:
    files = [path for layer in LAYERS for path in (ROOT / layer).rglob("*.py")]
    return sorted(path.relative_to(ROOT) for path in files if "_pb2" not in path.name)


def cores() -> list[Path]:
    files = [path for folder in CORE_FOLDERS for path in (ROOT / folder).glob("*.py")]
    found = [path.relative_to(ROOT) for path in files if path.name not in SHELLS]
    return sorted(
        [
            *found,
            *map(Path, INSTANCE_CORES),
            *map(Path, GATEWAY_CORES),
            *map(Path, SIMULATION_CORES),
        ]
    )


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str, package: bool) -> Iterator[str]:
    """Full names of the modules that ``tree`` imports, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + package]
                base = ".".join([*parts, *filter(None, [node.module])])
            yield base
            # `from a import b` may name a module b.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> list[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return list(imports(tree, module_name(path), path.name == "__init__.py"))


def tracked_files() -> list[Path]:
    """Files under version control, or all that a source archive holds."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        files = [Path(name) for name in listing.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        hidden = (".venv", "__pycache__", ".egg-info", "_cache", ".git", ".hypothesis", "build")
        every = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        files = [path for path in every if not any(part.endswith(hidden) for part in path.parts)]
    return sorted(path for path in files if (ROOT / path).is_file())


def text_of(path: Path) -> str:
    return (ROOT / path).read_bytes().decode("utf-8", errors="ignore")


@pytest.mark.parametrize("path", layer_modules(), ids=str)
def test_imports_run_downward(path: Path) -> None:
    own = LAYERS.index(path.parts[0])
    upward = {*LAYERS[own + 1 :], "tests"}
    assert [name for name in imports_of(path) if name.split(".")[0] in upward] == []


@pytest.mark.parametrize("path", cores(), ids=str)
def test_cores_are_pure(path: Path) -> None:
    own = {module_name(core) for core in cores()}
    foreign = []
    for name in imports_of(path):
        top = name.split(".")[0]
        if top in LAYERS:
            # `from core import name` yields both core and core.name.
            if name not in own and name.rpartition(".")[0] not in own and name not in LAYERS:
                foreign.append(name)
        elif top not in PURE:
            foreign.append(name)
    assert foreign == []
    calls = [
        node.func.id
        for node in ast.walk(ast.parse(text_of(path)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    assert IMPURE_CALLS.isdisjoint(calls)


def test_cores_are_type_checked_strictly() -> None:
    settings = tomllib.loads(text_of(Path("pyproject.toml")))["tool"]["mypy"]["overrides"]
    strict = {
        name for entry in settings if entry.get("disallow_untyped_defs") for name in entry["module"]
    }
    assert {module_name(path) for path in cores()} <= strict


def test_the_import_rule_sees_every_form() -> None:
    source = "import bench\ndef f():\n    from cluster.dispatcher import core\nfrom .. import up\n"
    seen = set(imports(ast.parse(source), "instance.kv.blocks", package=False))
    assert {"bench", "cluster.dispatcher", "cluster.dispatcher.core", "instance.up"} <= seen


@pytest.mark.parametrize("path", layer_modules(), ids=str)
def test_modules_say_what_they_are(path: Path) -> None:
    tree = ast.parse(text_of(path))
    assert not tree.body or ast.get_docstring(tree)


def test_no_path_of_one_machine() -> None:
    files = tracked_files()
    assert Path("pyproject.toml") in files
    found = [
        f"{path}: {match[0]}" for path in files if (match := MACHINE_PATHS.search(text_of(path)))
    ]
    assert found == []


@pytest.mark.parametrize(
    "path", [path for path in tracked_files() if path.suffix == ".md"], ids=str
)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text_of(path))
    local = [target for target in targets if "://" not in target]
    assert [one for one in local if not (ROOT / path.parent / one).exists()] == []


def test_every_flag_is_documented_and_no_other() -> None:
    page = text_of(Path("docs/configuration.md"))
    documented = set(re.findall(r"^\| `(?:--)?([a-z0-9-]+)", page, re.MULTILINE))
    assert documented == {name.replace("_", "-") for name in flags_of(ServeConfig)}
