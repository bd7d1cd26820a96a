"""Who may import whom, for what import-linter can't read: adapters are single modules."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ADAPTERS = sorted((ROOT / "adapters").glob("*.py"))
ALLOWED = {"adapter", "anatomy", "discovery", "errors", "markers", "routing", "weights"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: path.stem)
def test_an_adapter_knows_the_contract_and_torch_and_nothing_else(path: Path) -> None:
    for name in imported(path):
        top, _, rest = name.partition(".")
        if top == "geohooks":
            assert rest in ALLOWED, name
        else:
            assert top in {"torch", "transformers"} or top in sys.stdlib_module_names, name


def test_nothing_imports_an_adapter_or_another_plugin() -> None:
    adapters = {path.stem for path in ADAPTERS}
    plugins = {path.name for path in (ROOT / "plugins").iterdir() if path.is_dir()}
    assert adapters
    assert plugins
    for path in [*(ROOT / "geohooks").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        own = path.relative_to(ROOT / "plugins").parts[0] if path.is_relative_to(ROOT / "plugins") else ""
        for name in imported(path):
            top = name.partition(".")[0]
            assert top not in adapters, f"{path}: {name}"
            assert top not in plugins - {own}, f"{path}: {name}"
