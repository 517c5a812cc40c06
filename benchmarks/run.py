"""Runs all benchmarks and writes docs/benchmarks.md: python benchmarks/run.py --build build [--cuda] [--rounds 15].

Only the figures between the markers of the page are rewritten; the text around them stays.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- figures: written by benchmarks/run.py -->\n", "<!-- /figures -->"
NOT_COUNTERS = {"name", "run_name", "run_type", "family_index", "per_family_instance_index", "repetitions", "time_unit"}
NOT_COUNTERS |= {"repetition_index", "threads", "iterations", "real_time", "cpu_time"}


def run_cpp(program: Path, folder: Path) -> dict[str, Any]:
    out = folder / f"{program.name}.json"
    subprocess.run([program, f"--benchmark_out={out}", "--benchmark_out_format=json"], check=True)
    return {
        f"{program.name}: {row['name'].removesuffix('/iterations:1')}": {
            name: value for name, value in row.items() if name not in NOT_COUNTERS
        }
        for row in json.loads(out.read_text())["benchmarks"]
    }


def run_python(script: Path, folder: Path, rounds: int) -> dict[str, Any]:
    out = folder / f"{script.stem}.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, script, "--json", out, "--rounds", str(rounds)], check=True, env=environment)
    results: dict[str, Any] = json.loads(out.read_text())
    return results


def table(results: dict[str, Any]) -> str:
    lines = []
    for title, values in results.items():
        lines += [f"**{title}**", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=ROOT / "build")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cuda", action="store_true", help="only the CUDA benchmarks; prints, leaves the page alone")
    arguments = parser.parse_args()
    scripts = sorted(ROOT.glob("benchmarks/*/bench_*.py"))
    programs = [arguments.build.resolve() / "bin" / path.stem for path in sorted(ROOT.glob("benchmarks/*/bench_*.cpp"))]
    scripts = [script for script in scripts if script.stem.endswith("_cuda") == arguments.cuda]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for program in programs if not arguments.cuda else []:
            results |= run_cpp(program, Path(folder))
        for script in scripts:
            results |= run_python(script, Path(folder), arguments.rounds)
    machine = results.pop("machine", "unknown machine")
    heading = f"{datetime.date.today().isoformat()}, {machine}\n\n"
    if arguments.cuda:
        print(heading + table(results))
        return
    page = ROOT / "docs" / "benchmarks.md"
    before, rest = page.read_text().split(BEGIN, 1)
    page.write_text(before + BEGIN + "\n" + heading + table(results) + END + rest.split(END, 1)[1])
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
