"""What the example programs share: reading a labelled CSV file, showing progress, printing a table."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch

try:
    from tqdm import tqdm
except ImportError:  # then there are plain lines
    tqdm = None

MAX_LABEL = 9999  # a larger "label" is a quantity, not a class


class Dataset(NamedTuple):
    x: torch.Tensor  # [rows, features] float32, as in the file
    y: torch.Tensor  # [rows] int64, the last column
    classes: int  # largest label + 1


class CsvError(ValueError):
    """A file that cannot be used: "FILE:LINE: reason", or "FILE: reason" when no line is to blame."""


def _number(field: str) -> float | None:
    """Plain decimal numbers only: no nan, inf, hexadecimal or quotes."""
    try:
        value = float(field) if set(field) <= set("+-.0123456789eE") else math.nan
    except ValueError:
        return None
    return value if abs(value) < 2.0**128 else None


def read_csv(path: str) -> Dataset:
    """Comma separated numbers, the last column an integer label from 0. Line 1 is a header if it ends in no number."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as file:
            lines = file.read().removesuffix("\n").split("\n")
    except OSError as error:
        raise CsvError(f"{path}: cannot be read: {error.strerror}") from None

    features: list[list[float]] = []
    labels: list[int] = []
    columns = 0
    for number, line in enumerate(lines, start=1):
        fields = [field.strip(" \t\r") for field in line.split(",")]
        if fields == [""]:
            continue  # blank line
        if columns == 0:
            columns = len(fields)
            if columns < 2:
                raise CsvError(f"{path}:{number}: 1 column, expected comma separated features and a label")
            if _number(fields[-1]) is None:
                continue  # header
        if len(fields) != columns:
            raise CsvError(f"{path}:{number}: {len(fields)} columns, expected {columns}")
        values = []
        for column, field in enumerate(fields, start=1):
            value = _number(field)
            if value is None:
                raise CsvError(f"{path}:{number}: column {column}: '{field}' is not a number")
            values.append(value)
        if not (0 <= values[-1] <= MAX_LABEL and values[-1].is_integer()):
            raise CsvError(f"{path}:{number}: label '{fields[-1]}' is not an integer from 0 to {MAX_LABEL}")
        features.append(values[:-1])
        labels.append(int(values[-1]))
    if columns == 0:
        raise CsvError(f"{path}:{len(lines)}: the file is empty")
    if len(labels) < 2:
        raise CsvError(f"{path}:{len(lines)}: {len(labels)} data rows, expected at least 2")
    return Dataset(torch.tensor(features), torch.tensor(labels), max(labels) + 1)


def scale_features(x: torch.Tensor, per_column: bool) -> torch.Tensor:
    """Brings the features into [-1, 1]: all by the same factor, or each column by its own."""
    largest = x.abs().amax(0) if per_column else x.abs().max()
    return x / torch.where(largest > 0, largest, 1.0)


class Progress:
    """A progress bar on a terminal; where standard error is a file or a pipe, a plain line at each quarter."""

    def __init__(self, label: str, total: int, quiet: bool) -> None:
        self.label, self.total, self.quiet = label, total, quiet
        on_terminal = tqdm is not None and not quiet and sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=label, file=sys.stderr) if on_terminal else None

    def update(self, done: int, status: str) -> None:
        """Reports that `done` of the total is done; `status` is the news, such as "loss 0.012"."""
        if self.bar is not None:
            self.bar.set_postfix_str(status, refresh=False)
            self.bar.update(done - self.bar.n)
            if done == self.total:
                self.bar.close()
        elif not self.quiet and (done % max(1, self.total // 4) == 0 or done == self.total):
            print(f"{self.label} {done:>{len(str(self.total))}}/{self.total}  {status}", file=sys.stderr, flush=True)


def print_table(rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Prints rows of text in aligned columns, the first `left` columns to the left; rows[0] is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        cells = zip(row, widths, strict=True)
        print("   ".join(cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(cells)))
