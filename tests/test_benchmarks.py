"""Every benchmark runs, and prints its figures; the host's counts of calls, which no load moves, are held to."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


def smoke(script: Path) -> str:
    command = [sys.executable, str(script), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", [one for one in SCRIPTS if one.stem != "host"], ids=lambda script: script.stem)
def test_a_benchmark_prints_figures(script: Path) -> None:
    assert len(re.findall(r"\d+\.\d+", smoke(script))) >= 4


def test_hearing_a_layer_costs_few_calls() -> None:
    printed = smoke(ROOT / "benchmarks" / "host.py")
    calls = {name.strip(): float(count) for name, count in re.findall(r"^  (.{24}) +(\d+\.\d)$", printed, re.MULTILINE)}
    assert calls["geohooks, 1 plugin"] <= 12
    assert calls["geohooks, 5 plugins"] <= 18
    assert calls["geohooks, no listener"] == 0
    assert "hooks with no listener: 0" in printed
