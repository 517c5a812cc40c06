"""Interleaved rounds on a noisy machine: report medians of per-round ratios, never a lone time."""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

Side = tuple[Callable[[], object], int]  # what to run, and how many iterations one run stands for


def rounds(
    sides: dict[str, Side], count: int = 15, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds per iteration of every side in every round; the order is drawn anew for each round.

    A fixed order would give each side the same predecessor, whose traces in cache and heap then count as its own.

    ``time.thread_time`` as the clock leaves out what other programs take; for work on one thread only.
    The first side runs twice a round, the second time as ``self``: ``self`` / first says how far to trust a ratio.
    """
    first = next(iter(sides))
    everything = {**sides, "self": sides[first]}
    for run, _ in sides.values():
        run()
    names = list(everything)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(count):
        for name in random.Random(number).sample(names, len(names)):
            run, iterations = everything[name]
            start = clock()
            run()
            times[name].append((clock() - start) / iterations)
    return times


def ratio(times: dict[str, list[float]], a: str, b: str) -> float:
    """Median over rounds of a / b."""
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))


def milliseconds(times: dict[str, list[float]], name: str) -> float:
    return statistics.median(times[name]) * 1e3


def peak(run: Callable[[], object]) -> int:
    """Bytes that the CPU allocator held above those at the start."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = most = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def steady_heap() -> None:
    """Keeps glibc from giving memory back between iterations, for all sides alike.

    Whether it does depends on what happens to lie at the top of the heap; when it does, the next iteration pays 10^5
    page faults (a fifth of a ResNet-20 iteration here), whichever optimizer made the last allocation.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_mmap_max, 0)


def machine() -> str:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return (
        f"{model}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, Python {platform.python_version()}"
    )


Results = Iterable[tuple[str, dict[str, float]]]


def main(
    description: str | None,
    measure: Callable[[argparse.Namespace], Results],
    *,
    add_arguments: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
    name: Callable[[], str] = machine,
) -> None:
    """A benchmark program: one thread, prints tables as `measure` yields them, writes them with --json FILE."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds behind each median")
    add_arguments(parser)
    arguments = parser.parse_args()
    steady_heap()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results: dict[str, object] = {"machine": name()}
    print(results["machine"])
    for title, values in measure(arguments):
        results[title] = values
        print(title)
        for label, value in values.items():
            print(f"  {label:50s} {value:10.4g}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
