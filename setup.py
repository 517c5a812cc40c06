"""A thin driver of CMake: configures, builds and installs the CMake project into the package.

Knobs, all environment variables: TORCH_EXT_CUDA=0|1 (default: on when nvcc is found), MAX_JOBS, TORCH_CUDA_ARCH_LIST.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CMAKE_LISTS = (ROOT / "CMakeLists.txt").read_text()
PINNED_TORCH = "2.11"


def torch_requirement() -> str:
    """The minor version of torch that is built against: C++ extensions do not load on another one."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        if {"sdist", "egg_info", "--version"} & set(sys.argv):
            return f"torch=={PINNED_TORCH}.*"
        sys.exit(
            "torch_ext needs torch to build without isolation. Run: "
            f"pip install torch=={PINNED_TORCH}.0 numpy setuptools wheel cmake ninja"
        )
    return "torch=={}.{}.*".format(*version.split(".")[:2])


def max_jobs() -> int:
    if os.environ.get("MAX_JOBS"):
        return int(os.environ["MAX_JOBS"])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // 2**31))  # 2 GiB a compiler


class CMakeBuild(build_ext):
    def run(self) -> None:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        cmake = shutil.which("cmake", path=path)
        if cmake is None:
            sys.exit("torch_ext needs CMake 3.25 or newer. Run: pip install cmake ninja")
        cuda = os.environ.get("TORCH_EXT_CUDA", "")
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        jobs = max_jobs()
        print(f"torch_ext: TORCH_EXT_CUDA={cuda or 'auto'} TORCH_CUDA_ARCH_LIST={archs or '(default)'} MAX_JOBS={jobs}")

        build = ROOT / "build" if self.inplace else Path(self.build_temp).resolve()
        configure = [cmake, "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"]
        configure += ["-DTORCH_EXT_TORCH_ROOT=", "-DTORCH_EXT_PYTHON=ON", "-DTORCH_EXT_TESTS=OFF"]
        configure += [f"-DTORCH_EXT_WHEEL={'OFF' if self.inplace else 'ON'}"]
        if not self.inplace:  # an earlier isolated build leaves paths that are gone
            configure += ["--fresh"]
        if shutil.which("ninja", path=path):
            configure += ["-G", "Ninja"]
        if cuda:
            configure += [f"-DTORCH_EXT_CUDA={'OFF' if cuda.upper() in ('0', 'OFF') else 'ON'}"]
        if archs:
            configure += [f"-DTORCH_EXT_CUDA_ARCHS={archs}"]
        env = {**os.environ, "PATH": path, "MAX_JOBS": str(jobs)}
        commands = [configure, [cmake, "--build", str(build), "--parallel", str(jobs)]]
        if not self.inplace:  # in place, the build itself copies the libraries into the tree
            prefix = str(Path(self.build_lib).resolve() / "torch_ext")
            install = [cmake, "--install", str(build), "--prefix", prefix, "--strip"]
            commands += [install, [*install, "--component", "python"]]
        for command in commands:
            if subprocess.run(command, env=env).returncode != 0:
                sys.exit(f"torch_ext: failed: {' '.join(command)}")

    def get_outputs(self) -> list[str]:
        return []


version = re.search(r"project\(torch_ext VERSION ([\d.]+)", CMAKE_LISTS)
assert version is not None
setup(
    version=version[1],
    install_requires=[torch_requirement(), "numpy"],
    ext_modules=[Extension("torch_ext._C", [])],
    cmdclass={"build_ext": CMakeBuild},
)
