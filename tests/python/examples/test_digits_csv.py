"""A CSV file that cannot be used ends both digits programs with status 2 and a message that names file and line."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
CPP = ROOT / os.environ.get("BUILD_DIR", "build") / "bin" / "train_digits"
PYTHON = ROOT / "examples" / "python" / "train_digits.py"

BROKEN = {  # name: (content, what is written after the file's name)
    "too few columns": ("a,b,label\n1,2,0\n3,1\n", ":3: 2 columns, expected 3"),
    "too many columns": ("1,2,0\n3,4,1\n5,6,7,1\n", ":3: 4 columns, expected 3"),
    "not a number": ("1,2,0\n3,n/a,1\n", ":2: column 2: 'n/a' is not a number"),
    "empty field": ("1,2,0\n,4,1\n", ":2: column 1: '' is not a number"),
    "two numbers in a field": ("1,2,0\n3,4 5,1\n", ":2: column 2: '4 5' is not a number"),
    "nan": ("1,2,0\nnan,4,1\n", ":2: column 1: 'nan' is not a number"),
    "overflow": ("1,2,0\n1e39,4,1\n", ":2: column 1: '1e39' is not a number"),
    "quotes": ('1,2,0\n"3",4,1\n', ":2: column 1: '\"3\"' is not a number"),
    "label no number": ("1,2,0\n3,4,cat\n", ":2: column 3: 'cat' is not a number"),
    "negative label": ("1,2,0\n3,4,-1\n", ":2: label '-1' is not an integer from 0 to 9999"),
    "fractional label": ("1,2,0\n3,4,0.5\n", ":2: label '0.5' is not an integer from 0 to 9999"),
    "huge label": ("1,2,0\n3,4,250000\n", ":2: label '250000' is not an integer from 0 to 9999"),
    "after a blank line": ("a,b,label\r\n\r\n1,2,0\r\n1,x,0\r\n", ":4: column 2: 'x' is not a number"),
    "semicolons": ("a;b;label\n1;2;0\n", ":1: 1 column, expected comma separated features and a label"),
    "binary": ("\x7fELF\x00\x01\x02\n\x03", ":1: 1 column, expected comma separated features and a label"),
    "blank lines": ("\n\n", ":2: the file is empty"),
    "empty": ("", ":1: the file is empty"),
    "only a header": ("a,b,label\n", ":1: 0 data rows, expected at least 2"),
    "one row": ("a,b,label\n1,2,0\n", ":2: 1 data rows, expected at least 2"),
}
GOOD = {
    "header": "a,b,label\n1,2,0\n-4e0,.5,2\n",
    "no header": "1,2,0\n-4,0.5,2\n",
    "no final newline": "1,2,0\n-4,0.5,2",
    "windows": "\ufeffa,b,label\r\n1, 2, 0\r\n\r\n-4 ,+0.5,2.0\r\n",
}


@pytest.fixture(scope="module")
def common() -> ModuleType:
    spec = importlib.util.spec_from_file_location("examples_common", ROOT / "examples" / "python" / "common.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(program: list[str | Path], data: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [*program, "--data", data, "--epochs", "1", "--quiet"]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)


def write(folder: Path, content: str) -> Path:
    path = folder / "my data.csv"
    path.write_text(content, encoding="utf-8", newline="")
    return path


needs_cpp = pytest.mark.skipif(not CPP.exists(), reason=f"{CPP} is not built (TORCH_EXT_EXAMPLES=ON)")


@pytest.mark.parametrize("broken", BROKEN)
def test_python_reader_names_file_and_line(common: ModuleType, tmp_path: Path, broken: str) -> None:
    path = write(tmp_path, BROKEN[broken][0])
    with pytest.raises(common.CsvError) as error:
        common.read_csv(str(path))
    assert str(error.value) == f"{path}{BROKEN[broken][1]}"


@needs_cpp
@pytest.mark.parametrize("broken", BROKEN)
def test_cpp_program_names_file_and_line(tmp_path: Path, broken: str) -> None:
    path = write(tmp_path, BROKEN[broken][0])
    result = train([CPP], path)
    assert (result.returncode, result.stderr, result.stdout) == (2, f"{path}{BROKEN[broken][1]}\n", "")


def test_python_program_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, "1,2,0\n3,4,-1\n")
    result = train([sys.executable, PYTHON], path)
    expected = f"{path}:2: label '-1' is not an integer from 0 to 9999\n"
    assert (result.returncode, result.stderr, result.stdout) == (2, expected, "")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("missing.csv", "No such file or directory"), (".", "Is a directory")],
    ids=["missing", "folder"],
)
def test_unreadable_file(common: ModuleType, tmp_path: Path, name: str, reason: str) -> None:
    path = tmp_path / name
    with pytest.raises(common.CsvError) as error:
        common.read_csv(str(path))
    assert str(error.value) == f"{path}: cannot be read: {reason}"
    if CPP.exists():
        result = train([CPP], path)
        assert (result.returncode, result.stderr) == (2, f"{path}: cannot be read: {reason}\n")


@pytest.mark.parametrize("good", GOOD)
def test_good_file(common: ModuleType, tmp_path: Path, good: str) -> None:
    path = write(tmp_path, GOOD[good])
    x, y, classes = common.read_csv(str(path))
    torch.testing.assert_close(x, torch.tensor([[1, 2], [-4, 0.5]]), rtol=0, atol=0)
    assert (y.tolist(), classes) == ([0, 2], 3)
    if CPP.exists():
        assert train([CPP], path).returncode == 0


def test_scale_features(common: ModuleType) -> None:
    x = torch.tensor([[0.0, 2.0, 100.0], [0.0, -4.0, 50.0]])
    torch.testing.assert_close(common.scale_features(x, per_column=False), x / 100)
    torch.testing.assert_close(common.scale_features(x, per_column=True), torch.tensor([[0, 0.5, 1], [0, -1, 0.5]]))


def test_shipped_digits(common: ModuleType) -> None:
    x, y, classes = common.read_csv(str(ROOT / "examples" / "data" / "digits.csv"))
    assert (tuple(x.shape), classes, x.min().item(), x.max().item()) == ((1797, 64), 10, 0, 16)
    assert torch.equal(x, x.round())
    assert y.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
