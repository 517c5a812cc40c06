"""The transport programs run, print their table and do what the examples' page says of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CPP = ROOT / os.environ.get("BUILD_DIR", "build") / "bin" / "balanced_assignment"


def test_colour_transfer(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    program = ROOT / "examples" / "python" / "sinkhorn_colour.py"
    picture = tmp_path / "out.png"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, program, "--samples", "100", "--steps", "4", "--quiet", "--output", picture],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert result.stderr == ""
    rows = [line.split() for line in result.stdout.splitlines()[2:]]
    for row in rows[:2]:  # name of three words, divergence before and after, steps, passes, error
        assert float(row[4]) < 0.3 * float(row[3])
        assert float(row[7]) <= 1e-9


@pytest.mark.skipif(not CPP.exists(), reason="the C++ examples are not built")
def test_balanced_assignment() -> None:
    run = [CPP, "--quiet", "--data", ROOT / "examples" / "data" / "digits.csv"]
    table = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    nearest, balanced = (line.split() for line in table[2:])
    assert nearest[1] == "0"
    assert 170 <= int(balanced[1]) <= int(balanced[2]) <= 190
    assert float(balanced[3]) > float(nearest[3]) + 0.1
    assert int(balanced[5]) < int(balanced[4])


@pytest.mark.skipif(not CPP.exists(), reason="the C++ examples are not built")
def test_a_missing_file_is_named() -> None:
    result = subprocess.run([CPP, "--data", "nofile"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("nofile: cannot be read")
