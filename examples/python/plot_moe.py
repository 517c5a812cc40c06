"""Draws what train_moe.cpp or train_moe.py wrote: MaxVio over steps, and the load of every expert before and after.

python examples/python/plot_moe.py FILE.json [--output moe.png]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from train_moe import draw


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="written with --json")
    parser.add_argument("--output", default="moe.png")
    args = parser.parse_args()
    draw(json.loads(Path(args.file).read_text())["runs"], args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
