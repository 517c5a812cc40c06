"""The Lipschitz example runs, writes what it says and draws its curves."""

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
        [sys.executable, ROOT / "examples" / "python" / "lipschitz_digits.py", "--quiet", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curves, picture = tmp_path / "curves.json", tmp_path / "curves.png"
    result = run("--steps", "10", "--weights", "0", "0.05", "--json", curves, "--output", picture)
    assert result.returncode == 0, result.stderr
    runs = json.loads(curves.read_text())["runs"]
    assert [r["weight"] for r in runs] == [0, 0.05]
    assert all(c >= s for r in runs for c, s in zip(r["certified"], r["sampled"], strict=True))
    assert runs[1]["certified"][-1] < runs[0]["certified"][-1]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_names_a_file_that_cannot_be_used(tmp_path: Path) -> None:
    result = run("--data", tmp_path / "none.csv")
    assert result.returncode == 2
    assert "none.csv: cannot be read" in result.stderr
