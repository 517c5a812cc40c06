"""Loads the library of operators and the module ``_C``; when that fails, names both sets of versions and the remedy."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent
_LIBRARY = _PACKAGE / "lib" / "libtorch_ext.so"
_BUILD_FILE = _PACKAGE / "lib" / "torch_ext_build.json"


def build_info() -> dict[str, Any]:
    """What this torch_ext was built with: versions of torch, CUDA, Python and compiler, and the build's knobs."""
    info: dict[str, Any] = json.loads(_BUILD_FILE.read_text())
    return info


def _rebuild_command() -> str:
    if (_PACKAGE.parent / "CMakeLists.txt").exists():  # a source tree
        return f"make -C '{_PACKAGE.parent}' build"
    return "pip install --no-build-isolation --no-deps --force-reinstall <folder or sdist of torch_ext>"


def _explain(reason: str) -> str:
    found_cuda = torch.version.cuda or "none"
    found_python = "{}.{}.{}".format(*sys.version_info)
    found_abi = f"C++11 ABI {torch.compiled_with_cxx11_abi()}"
    built = "nothing (it has not been built)"
    if _BUILD_FILE.exists():
        info = build_info()
        abi = f"C++11 ABI {info['cxx11_abi']}"
        cuda = info["cuda"] or "none"
        built = f"torch {info['torch']}, CUDA {cuda}, Python {info['python']}, {abi}"
    return (
        f"torch_ext cannot be loaded: {reason}\n"
        f"  built for: {built}\n"
        f"  found:     torch {torch.__version__}, CUDA {found_cuda}, Python {found_python}, {found_abi}\n"
        f"  rebuild:   {_rebuild_command()}"
    )


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def load() -> None:
    """Raises ImportError with both sets of versions and the command that rebuilds."""
    if not (_LIBRARY.exists() and _BUILD_FILE.exists()):
        raise ImportError(_explain(f"{_LIBRARY} is missing"))
    if _minor(build_info()["torch"]) != _minor(torch.__version__):  # do not even try: the C++ ABI differs
        raise ImportError(_explain("it was built for another minor version of torch"))
    try:
        torch.ops.load_library(str(_LIBRARY))  # type: ignore[no-untyped-call]
        importlib.import_module("torch_ext._C")
    except (OSError, ImportError) as error:
        raise ImportError(_explain(str(error))) from error
