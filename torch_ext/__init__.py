"""Optimizers for PyTorch in C++ and Python: the same kernels, the same numbers, the same checkpoint file.

The areas carry the same names as in C++: ``torch_ext.optim``, ``torch_ext.nn``, ``torch_ext.ops``,
``torch_ext.curvature``, ``torch_ext.moe``, ``torch_ext.solvers``.
"""

from pathlib import Path as _Path

from torch_ext._loader import build_info, load

load()

from . import curvature, moe, nn, ops, optim, solvers  # noqa: E402  (they need the operators)

__version__: str = build_info()["version"]

#: For CMake: ``-DCMAKE_PREFIX_PATH=$(python -c 'import torch_ext; print(torch_ext.cmake_prefix_path)')``, then
#: ``find_package(TorchExt)`` and ``TorchExt::torch_ext``. Only in an installed package, not in the source tree.
cmake_prefix_path = str(_Path(__file__).resolve().parent / "share" / "cmake")

__all__ = ["__version__", "build_info", "cmake_prefix_path", "curvature", "moe", "nn", "ops", "optim", "solvers"]
