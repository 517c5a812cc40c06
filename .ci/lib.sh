# Shared by .ci/tasks and .ci/run; sourced in the repository's root.
export PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 CLICOLOR=${CLICOLOR:-0}
venv=$PWD/.venv
python=$venv/bin/python

die() { echo "torch_ext: $*" >&2; exit 1; }

# --- set-up ----------------------------------------------------------------------------------------------------------
missing=()
need() { # need DEBIAN_PACKAGE COMMAND...: the package is needed unless the command succeeds
  local package=$1; shift
  "$@" >/dev/null 2>&1 || missing+=("$package")
}
header() { echo "#include <$1>" | "${CXX:-c++}" -std=c++17 -E -x c++ -; }
install_missing() {
  ((${#missing[@]})) || return 0
  [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null || die "missing: ${missing[*]}. Run: sudo apt-get install ${missing[*]}"
  echo "Installing ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  missing=()
}
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      base_python=$candidate
      return
    fi
  done
  die "missing: Python 3.10 or newer. Run: sudo apt-get install python3, or set PYTHON=/path/to/python3"
}
requirements() { # the pinned lists of pyproject.toml; pip brings the TOML reader that Python 3.10 lacks
  "$python" - <<'PY'
try:
    import tomllib
except ImportError:
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
print(*(line for extra in extras.values() for line in extra), sep="\n")
PY
}
setup() {
  find_python
  need g++ command -v "${CXX:-c++}"
  need libgtest-dev header gtest/gtest.h
  need libbenchmark-dev header benchmark/benchmark.h
  need libcli11-dev header CLI/CLI.hpp
  need python3-dev "$base_python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")'
  [[ -x $python ]] || need python3-venv "$base_python" -c 'import ensurepip, venv'
  install_missing

  local stamp
  stamp=$venv/.torch_ext-$(sed -n '/^\[project.optional-dependencies\]/,/^\[tool/p' pyproject.toml | cksum | cut -d' ' -f1)
  if [[ -e $stamp ]]; then return; fi
  [[ -x $python ]] || "$base_python" -m venv "$venv" || die "no virtual environment. Run: sudo apt-get install python3-venv"
  echo "Installing the pinned packages into .venv (once; torch is large)"
  requirements >"$venv/requirements.txt"
  "$python" -m pip install --quiet -r "$venv/requirements.txt" || die "pip failed; the first run needs the package index"
  rm -f "$venv"/.torch_ext-*
  touch "$stamp"
}

# --- build -----------------------------------------------------------------------------------------------------------
jobs() { # MAX_JOBS, else one per core but no more than one per 2 GiB of free memory
  local memory count
  memory=$(($(awk '/MemAvailable/ {print $2}' /proc/meminfo) / 2097152))
  count=$(nproc)
  if ((count > memory)); then count=$((memory > 0 ? memory : 1)); fi
  echo "${MAX_JOBS:-$count}"
}
configure() { # configure FOLDER ARGUMENT...; more arguments in CMAKE_ARGS
  local folder=$1 generator=() extra=()
  shift
  PATH="$(dirname "$python"):$PATH" # pip's cmake and ninja
  command -v cmake >/dev/null || die "missing: cmake. Run: sudo apt-get install cmake, or pip install cmake"
  if command -v ninja >/dev/null; then generator=(-G Ninja); fi
  read -ra extra <<<"${CMAKE_ARGS:-}"
  mkdir -p "$folder"
  cmake -S . -B "$folder" "${generator[@]}" -DPython_EXECUTABLE="$python" "$@" "${extra[@]}" >"$folder/configure.log" 2>&1 ||
    { cat "$folder/configure.log" >&2; die "CMake failed"; }
  grep -- '-- torch_ext ' "$folder/configure.log"
}
compile() { # compile FOLDER ARGUMENT...
  local folder=$1
  shift
  cmake --build "$folder" --parallel "$(jobs)" "$@"
}
