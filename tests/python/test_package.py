"""The package itself: what it was built with, what a failing import says, and that every component has its rooms."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import torch_ext
from torch_ext import _loader

ROOT = Path(__file__).resolve().parents[2]


def load_systems() -> ModuleType:
    spec = importlib.util.spec_from_file_location("systems", ROOT / ".ci" / "systems.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_build_info_names_versions_and_knobs() -> None:
    info = torch_ext.build_info()
    assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert info["python"] == "{}.{}.{}".format(*sys.version_info)
    assert {"cuda", "cuda_archs", "compiler", "cxx_standard", "cxx11_abi"} <= info.keys()
    assert {"TORCH_EXT_CUDA", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST"} <= info.keys()


def test_version_is_written_once() -> None:
    version = re.search(r"project\(torch_ext VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())
    assert version is not None
    assert torch_ext.__version__ == version[1]


def import_copy(folder: Path) -> str:
    """Imports the copy of torch_ext in the folder in a new process; its error output."""
    code = "import torch_ext"
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    return result.stderr


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "torch_ext", tmp_path / "torch_ext", ignore=ignore)
    (tmp_path / "torch_ext" / "lib").mkdir(exist_ok=True)
    return tmp_path


def test_import_without_a_build_says_how_to_build(package_copy: Path) -> None:
    shutil.rmtree(package_copy / "torch_ext" / "lib")
    error = import_copy(package_copy)
    assert "ImportError: torch_ext cannot be loaded" in error
    assert "libtorch_ext.so is missing" in error
    assert "pip install --no-build-isolation" in error
    (package_copy / "CMakeLists.txt").touch()  # now it looks like a source tree
    assert f"make -C '{package_copy}' build" in import_copy(package_copy)


def test_import_on_another_torch_names_both_versions(package_copy: Path) -> None:
    info = {**torch_ext.build_info(), "torch": "2.10.0", "cuda": "12.8"}
    (package_copy / "torch_ext" / "lib" / "torch_ext_build.json").write_text(json.dumps(info))
    (package_copy / "torch_ext" / "lib" / "libtorch_ext.so").touch()
    error = import_copy(package_copy)
    assert "built for another minor version of torch" in error
    assert re.search(r"built for: torch 2\.10\.0, CUDA 12\.8, Python [\d.]+, C\+\+11 ABI True", error)
    assert f"found:     torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}" in error
    assert "rebuild:" in error


def test_import_of_a_broken_library_keeps_the_loader_message(package_copy: Path) -> None:
    lib = package_copy / "torch_ext" / "lib"
    (lib / "torch_ext_build.json").write_text(json.dumps(torch_ext.build_info()))
    (lib / "libtorch_ext.so").write_text("not a library")
    error = import_copy(package_copy)
    assert "ImportError: torch_ext cannot be loaded" in error
    assert "invalid ELF header" in error or "file too short" in error
    assert "built for: torch" in error


def test_loader_message_without_toolkit_names_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_loader, "build_info", lambda: {**torch_ext.build_info(), "cuda": ""})
    assert "CUDA none" in _loader._explain("reason")


def test_every_component_has_all_its_rooms() -> None:
    assert load_systems().missing_rooms() == []


def test_readme_shows_the_current_table_of_systems() -> None:
    assert load_systems().table() in (ROOT / "README.md").read_text()


def test_top_level_holds_nothing_else() -> None:
    allowed = {"csrc", "torch_ext", "tests", "examples", "benchmarks", "docs", "CMakeLists.txt", "Makefile", "LICENSE"}
    allowed |= {"setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in tracked.splitlines()}
    assert {name for name in top - allowed if not name.startswith(".")} == set()
