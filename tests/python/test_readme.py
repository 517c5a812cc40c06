"""What README.md says is true: its programs run, its commands exist, and the links of all documents lead somewhere.

How each kind of block of the README is checked:

- ``python``: all blocks in their order, in one namespace and one empty folder, as by a reader who types along.
- ``cpp`` with ``cmake``: ``main.cpp`` and ``CMakeLists.txt`` of a project outside the tree, built with the README's own
  cmake commands against ``cmake --install`` of the build folder (only ``$(python -c ...)``, which needs an installed
  package, is replaced by that prefix), then run in the folder that the Python blocks have filled. Skipped without a
  build.
- ``bash``: nothing is downloaded or rebuilt here. ``make TARGET`` must be a target of the Makefile and of .ci/tasks,
  and one that .ci/run runs (bench and gpu-check excepted: CI has no quiet machine and no GPU). For ``pip install``
  every variable must be one that setup.py reads, every option one that pip knows, and every package one that
  pyproject.toml or .ci/run names; the installations themselves are .ci/run's stages wheel and torch-2.15. ``cmake`` is
  run, see above.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / os.environ.get("BUILD_DIR", "build")
README = (ROOT / "README.md").read_text()
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "csrc/README.md", "docs/*.md", "examples/**/*.md"]
PATHS = sorted(path for pattern in DOCUMENTS for path in ROOT.glob(pattern))
NOT_IN_CI = {"bench", "gpu-check"}
PREFIX_COMMAND = "$(python -c 'import torch_ext; print(torch_ext.cmake_prefix_path)')"


def blocks(language: str) -> list[tuple[int, str]]:
    """Line number (of the first line within) and text of each block."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [(README.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def commands() -> list[str]:
    return [line for _, text in blocks("bash") for line in text.splitlines() if line and not line.startswith("#")]


def run_python_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    for line, text in blocks("python"):
        exec(compile("\n" * (line - 1) + text, "README.md", "exec"), names)


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    assert set(re.findall(r"^```(\S*)$", README, re.MULTILINE)) <= {"", "python", "cpp", "cmake", "bash"}
    assert len(blocks("python")) >= 1
    assert len(blocks("cpp")) == len(blocks("cmake")) == 1


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng():
        run_python_blocks(tmp_path, monkeypatch)
    assert re.search(r"Python: loss 0\.\d+", capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_cpp_block_builds_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if not (BUILD / "lib" / "libtorch_ext.so").exists():
        pytest.skip(f"no library in {BUILD}: run 'make build'")
    if shutil.which("cmake", path=environment["PATH"]) is None:
        pytest.skip("no cmake")

    def run(command: str, folder: Path) -> str:
        result = subprocess.run(
            ["bash", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
        return result.stdout

    prefix, project = tmp_path / "sdk prefix", tmp_path / "project"
    project.mkdir()
    (project / "CMakeLists.txt").write_text(blocks("cmake")[0][1])
    line, text = blocks("cpp")[0]
    (project / "main.cpp").write_text(f'#line {line} "README.md"\n{text}')
    run(f"cmake --install {shlex.quote(str(BUILD))} --prefix {shlex.quote(str(prefix))}", tmp_path)
    (build,) = (text for _, text in blocks("bash") if text.startswith("cmake -S ."))
    assert build.count(PREFIX_COMMAND) == 1
    run(build.replace(PREFIX_COMMAND, str(prefix)), project)

    with torch.random.fork_rng():
        run_python_blocks(tmp_path, monkeypatch)
    before = (tmp_path / "optimizer.pt").read_bytes()
    assert re.search(r"C\+\+: loss [\d.]+", run("project/build/program", tmp_path))
    assert (tmp_path / "optimizer.pt").read_bytes() != before
    calls = torch.load(tmp_path / "optimizer.pt", weights_only=True)["state"][0]["global_calls"]
    assert int(calls) == 100  # fifty steps in each language


def check_make(arguments: list[str]) -> None:
    (target,) = arguments
    assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=False).returncode == 0
    function = f"run_{target.replace('-', '_')}()"
    assert function in (ROOT / ".ci" / "tasks").read_text()
    assert f".ci/tasks {target}" in (ROOT / ".ci" / "run").read_text() or target in NOT_IN_CI


def check_pip(variables: list[str], arguments: list[str]) -> None:
    setup = (ROOT / "setup.py").read_text()
    for variable in variables:
        assert f'"{variable.split("=")[0]}"' in setup, f"setup.py does not read {variable}"
    pip_help = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--help"], capture_output=True, text=True, check=True
    ).stdout
    known = (ROOT / "pyproject.toml").read_text() + (ROOT / ".ci" / "run").read_text()
    assert arguments[0] == "install"
    for argument in arguments[1:]:
        if argument.startswith("-"):
            assert argument in pip_help
        elif argument != ".":
            assert re.search(rf"\b{re.escape(argument)}\b", known), (
                f"neither pyproject.toml nor .ci/run names {argument}"
            )


@pytest.mark.parametrize("command", commands())
def test_command_exists(command: str) -> None:
    words = shlex.split(command)
    variables = [word for word in words if re.match(r"[A-Z_]+=", word)]
    program, *arguments = words[len(variables) :]
    if program == "make":
        check_make(arguments)
    elif program == "pip":
        check_pip(variables, arguments)
    else:
        assert program == "cmake", f"no check for the command '{command}'"  # run by test_cpp_block_builds_and_runs
        assert not variables


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{target} does not exist"
        if anchor:
            headings = re.findall(r"^#+ +(.+)$", file.read_text(), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{target}: no such heading"
