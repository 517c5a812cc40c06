"""Reads csrc/systems.toml: writes the README's table of systems, checks it (--check), and lists missing rooms."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- systems: generated from csrc/systems.toml by .ci/systems.py -->\n"
END = "<!-- /systems -->"
ROOMS = {  # a pattern with several matches, such as {py,cpp}, needs one of them
    "header": ["csrc/include/torch_ext/{area}/{name}.h"],
    "source": ["csrc/{area}/{name}/{name}.cpp"],
    "face": ["torch_ext/{area}/{name}.py"],
    "reference": ["torch_ext/reference/{area}/{name}.py"],
    "cpp_test": ["tests/cpp/{area}/test_{name}.cpp"],
    "python_test": ["tests/python/{area}/test_{name}.py"],
    "benchmark": ["benchmarks/{area}/bench_{name}.py", "benchmarks/{area}/bench_{name}.cpp"],
    "example": ["examples/python/{name}.py", "examples/cpp/{name}.cpp"],
}
KERNEL_ROOMS = {
    "functor": ["csrc/{area}/{name}/{name}_functor.h"],
    "kernel_header": ["csrc/{area}/{name}/{name}_kernel.h"],
    "kernel_cpu": ["csrc/{area}/{name}/{name}_kernel.cpp"],
    "kernel_cuda": ["csrc/{area}/{name}/{name}_kernel.cu"],
}
SHARED = {"optim/base"}  # public, but no component
AUTOGRAD_ROOMS = {"autograd": ["csrc/{area}/{name}/{name}_autograd.cpp"]}


def systems() -> list[dict[str, Any]]:
    with open(ROOT / "csrc" / "systems.toml", "rb") as file:
        return tomllib.load(file)["system"]


def missing_rooms() -> list[str]:
    """What a component should have and has not, and exceptions that are not (or no longer) needed."""
    problems = []
    for system in systems():
        for component, settings in system["components"].items():
            area, name = component.split("/")
            rooms = dict(ROOMS)
            rooms |= KERNEL_ROOMS if settings.get("kernel") else {}
            rooms |= AUTOGRAD_ROOMS if settings.get("differentiable") else {}
            without = settings.get("without", {})
            problems += [f"{component}: 'without' names the unknown room '{room}'" for room in without.keys() - rooms]
            for room, patterns in rooms.items():
                paths = [pattern.format(area=area, name=name) for pattern in patterns]
                exists = any((ROOT / path).exists() for path in paths)
                if not exists and room not in without:
                    problems.append(f"{component}: {' or '.join(paths)} is missing")
                if exists and room in without:
                    problems.append(f"{component}: the room '{room}' exists, so 'without' need not name it")
    listed = {component for system in systems() for component in system["components"]}
    for source in sorted(ROOT.glob("csrc/*/*/*.cpp")):  # csrc/<area>/<name>/<name>.cpp with a public header
        component = f"{source.parent.parent.name}/{source.stem}"
        header = ROOT / "csrc/include/torch_ext" / f"{component}.h"
        if source.stem == source.parent.name and component not in listed | SHARED and header.exists():
            problems.append(f"{component}: not in csrc/systems.toml")
    return problems


def table() -> str:
    lines = [
        "| system | components | paper | memory per parameter | extra passes | devices | status |",
        "|---|---|---|---|---|---|---|",
    ]
    for system in systems():
        components = ", ".join(f"`{component.replace('/', '.')}`" for component in system["components"])
        paper = f"[{system['arxiv']}](https://arxiv.org/abs/{system['arxiv']})" if system.get("arxiv") else "-"
        cells = [system["name"], components, paper, *(system[key] for key in ("memory", "passes", "devices", "status"))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text() if readme.exists() else ""
    if BEGIN not in text or END not in text:
        print(f"README.md has no lines '{BEGIN.strip()}' and '{END}' to hold the table of systems", file=sys.stderr)
        return 1
    before, rest = text.split(BEGIN, 1)
    updated = before + BEGIN + table() + END + rest.split(END, 1)[1]
    if "--check" not in sys.argv:
        readme.write_text(updated)
    elif updated != text:
        print("README.md: the table of systems is out of date; run 'make format'", file=sys.stderr)
        return 1
    problems = missing_rooms()
    print("\n".join(problems), end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
