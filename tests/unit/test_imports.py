"""Who may import whom, and what an answer on the command line may cost."""

from __future__ import annotations

import ast
import functools
import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vissl_like import registry
from vissl_like.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "torchvision", "timm", "transformers", "faiss", "wandb", "matplotlib", "sklearn", "scipy", "submitit")
UNASKED = ("torchvision", "torch._dynamo", "torch.distributed.fsdp", "timm", "transformers", "sklearn", "matplotlib")
TORCH_FREE = ("config/", "launch/main.py", "errors.py", "registry.py", "optim/scaling.py", "data/order.py")


def modules() -> list[Path]:
    return sorted(path for path in (ROOT / "vissl_like").rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "vissl_like").as_posix()


def imports(tree: ast.AST, *, everywhere: bool) -> Iterator[str]:
    """Imported modules, without those for type checkers; `everywhere`: also inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(node, everywhere=everywhere)


@functools.cache
def imported_by(path: Path, *, everywhere: bool = True) -> list[str]:
    return list(imports(ast.parse(path.read_text("utf-8")), everywhere=everywhere))


def offenders(names: list[str], forbidden: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(name == bad or name.startswith(bad + ".") for bad in forbidden)]


@pytest.mark.parametrize("path", [path for path in modules() if name_of(path).startswith(TORCH_FREE)], ids=name_of)
def test_configuration_is_free_of_heavy_libraries(path: Path) -> None:
    assert not offenders(imported_by(path, everywhere=False), HEAVY)


@pytest.mark.parametrize("package", ["losses", "models", "data", "optim"])
def test_components_know_their_section_not_the_root(package: str) -> None:
    for path in (ROOT / "vissl_like" / package).glob("*.py"):
        assert not offenders(imported_by(path), ("vissl_like.config.schema", "vissl_like.config.compose")), name_of(
            path
        )


def test_core_knows_no_engine() -> None:
    for path in (ROOT / "vissl_like" / "core").glob("*.py"):
        assert not offenders(imported_by(path), ("vissl_like.engines", "vissl_like.launch")), name_of(path)


def test_quick_imports_leave_the_collector_as_it_was() -> None:
    assert gc.isenabled()
    with pytest.raises(ConfigError, match="cannot import 'no_such_plugin'"):
        registry.load_plugins(["no_such_plugin"])
    assert gc.isenabled()
    gc.disable()
    try:
        registry.resolve("loss", "cross_entropy", key="LOSS.NAME")
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_nobody_imports_tools() -> None:
    for path in modules():
        assert not offenders(imported_by(path), ("tools", "vissl_like.tools")), name_of(path)


def test_hydra_has_one_home() -> None:
    users = [name_of(path) for path in modules() if offenders(imported_by(path), ("hydra",))]
    assert users in (["config/compose.py"], [])


def test_answers_without_heavy_imports() -> None:
    found = loaded_after(["vissl_like.config.reference", "vissl_like.config.compose", "vissl_like.launch.main"], HEAVY)
    assert not any(found.values()), found


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, table in registry.COMPONENTS.items() for name in table], ids=str
)
def test_every_registered_component_exists(kind: str, name: str) -> None:
    assert callable(registry.resolve(kind, name, key="TEST"))


def test_an_engine_loads_no_library_that_its_job_may_not_need() -> None:
    """torchvision brings PyTorch's compiler: 170 MB in each process, and seconds. So image code imports it when used."""
    engines = [f"vissl_like.engines.{name}" for name in ("train", "extract_features", "cluster_features", "evaluate")]
    found = loaded_after(engines, UNASKED)
    assert not any(found.values()), found


def loaded_after(modules: list[str], names: tuple[str, ...]) -> dict[str, list[str]]:
    """Which of these libraries are loaded after each of the modules, imported one after the other in a new process."""
    program = f"""
import importlib, json, sys
found = {{}}
for module in {modules!r}:
    importlib.import_module(module)
    found[module] = [name for name in {names!r} if name in sys.modules]
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    found = json.loads(done.stdout)
    assert list(found) == modules
    return found
