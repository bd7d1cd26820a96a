"""A built wheel, in a fresh environment, gives every plugin and adapter by entry point."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROBE = """
import json, sys
from importlib import metadata
import geohooks
from geohooks import zoo
from geohooks.registry import adapter_for, installed, load_plugin
groups = ("geohooks.plugins", "geohooks.adapters")
found = {group: [(e.name, e.error is None) for e in installed(group)] for group in groups}
host = geohooks.instrument(zoo.untrained("qwen3_moe"), ["signals"])
print(json.dumps({"found": found, "file": geohooks.__file__, "adapter": host.anatomy.adapter.name, "zoo": zoo.names()}))
"""


def run(*command: str | Path) -> str:
    # Elsewhere than in the source, which would be imported before what is installed.
    words = [str(part) for part in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tempfile.gettempdir())
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    run("git", "clone", "--quiet", ROOT, source) if (ROOT / ".git").exists() else source.symlink_to(ROOT)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source)
    return next(folder.glob("geohooks-*.whl"))


def test_the_wheel_works_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # What geohooks depends on is seen through this environment's folder; its own editable install is not.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    answer = json.loads(run(python, "-c", PROBE).splitlines()[-1])
    assert answer["file"].startswith(str(site))
    assert dict(answer["found"]["geohooks.plugins"])["signals"]
    adapters = {"llama", "qwen", "deepseek", "t5", "vit", "structural"}
    assert adapters <= {name for name, loaded in answer["found"]["geohooks.adapters"] if loaded}
    assert answer["adapter"] == "qwen"
    assert "signals" in run(tmp_path / "env" / "bin" / "geohooks", "plugins")
    assert {"qwen3-moe-tiny-base", "qwen3-moe-tiny-tuned"} <= set(answer["zoo"])


def test_the_wheel_is_typed_licensed_and_small(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        models = sum(entry.file_size for entry in archive.infolist() if "/zoo/models/" in entry.filename)
    assert "geohooks/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert 0 < models < 8 * 2**20
