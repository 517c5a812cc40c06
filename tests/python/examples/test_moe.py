"""The mixture-of-experts programs: a few steps of each run, their file and picture; experts on several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples" / "python"
RUNS = ["nothing", "aux loss", "sign", "proportional", "momentum", "quantile"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_train_moe(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"".join(f"line {i * i} of a text\n".encode() for i in range(6000)))
    done = run(EXAMPLES / "train_moe.py", "--text", text, "--steps", 3, "--batch", 4, "--length", 16, "--quiet",
               "--json", tmp_path / "moe.json", "--output", tmp_path / "moe.png")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[2:]] == RUNS
    runs = json.loads((tmp_path / "moe.json").read_text())["runs"]
    assert [run["name"] for run in runs] == RUNS
    for run_ in runs:
        assert len(run_["loss"]) == len(run_["max_vio"]) == 3
        assert run_["loss"][0] == pytest.approx(runs[0]["loss"][0])  # the same start and batch
        assert [sum(layer) for layer in run_["first_loads"]] == [4 * 16 * 2] * 2
    assert (tmp_path / "moe.png").stat().st_size > 10_000
    drawn = run(EXAMPLES / "plot_moe.py", tmp_path / "moe.json", "--output", tmp_path / "again.png")
    assert drawn.returncode == 0, drawn.stderr


def test_train_moe_refuses(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_text("too short")
    for file, message in ((short, "9 bytes, expected at least 100000"), (tmp_path / "none", "cannot be read")):
        done = run(EXAMPLES / "train_moe.py", "--text", file)
        assert done.returncode == 1
        assert message in done.stderr


@pytest.mark.parametrize("processes", [2, 4])
def test_expert_parallel(processes: int) -> None:
    done = run(EXAMPLES / "expert_parallel.py", "--processes", processes, "--tokens", 64)
    assert done.returncode == 0, done.stderr
    assert f"{processes} processes equal one" in done.stdout
