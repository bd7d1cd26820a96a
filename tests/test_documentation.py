"""Every snippet of the README and of the documentation runs; what they say exists, exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import geohooks
from geohooks.hookspecs import PluginSpecs
from geohooks.registry import installed

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_snippets_run_in_order(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, block {number}", "exec"), scope)
    assert capsys.readouterr().out


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_targets_of_the_readme_exist() -> None:
    targets = re.findall(r"^make (\w+)", "\n".join(blocks(ROOT / "README.md", "bash")), flags=re.MULTILINE)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_the_readme_names_every_installed_plugin_and_adapter() -> None:
    text = (ROOT / "README.md").read_text()
    for group in ("geohooks.plugins", "geohooks.adapters"):
        for entry in installed(group):
            if entry.distribution == "geohooks":
                assert f"| `{entry.name}` |" in text


def test_the_guide_names_every_event_hook() -> None:
    text = (ROOT / "docs" / "guide.md").read_text()
    for hook in vars(PluginSpecs):
        if hook.startswith("on_") and not hook.startswith(("on_call", "on_attach", "on_detach")):
            assert f"`{hook}`" in text


def test_every_hook_is_documented() -> None:
    for name, hook in vars(PluginSpecs).items():
        if not name.startswith("_"):
            assert hook.__doc__, name


def test_the_public_face_is_what_it_says() -> None:
    public = {name for name in vars(geohooks) if not name.startswith("_")}
    modules = {name for name in public if type(getattr(geohooks, name)).__name__ == "module"}
    assert public - modules - {"annotations"} == set(geohooks.__all__) - {"measures"}
