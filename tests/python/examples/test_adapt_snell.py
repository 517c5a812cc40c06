"""The SNELL example runs, writes what it says and draws its curves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, ROOT / "examples" / "python" / "adapt_snell.py", "--quiet", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curves, picture = tmp_path / "curves.json", tmp_path / "curves.png"
    result = run("--steps", "6", "--json", curves, "--output", picture)
    assert result.returncode == 0, result.stderr
    runs = json.loads(curves.read_text())["runs"]
    assert len(runs) == 8
    assert all(len(r["loss"]) == 6 and r["loss"][-1] < r["loss"][0] for r in runs)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "layers.0.self_attn.q_proj.lora_in" in result.stdout
    counts = {line.split("   ")[2].strip() for line in result.stdout.splitlines() if "1e-" in line or "0.0" in line}
    assert len({c for c in counts if c.isdigit()}) <= 1  # all adapters train the same number


def test_names_a_file_that_cannot_be_used(tmp_path: Path) -> None:
    result = run("--data", tmp_path / "none.csv")
    assert result.returncode == 2
    assert "none.csv: cannot be read" in result.stderr
