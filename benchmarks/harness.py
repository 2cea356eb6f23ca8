"""What all benchmarks share: timing, the machine, and the JSON object that is printed last."""

import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from bov_lightning.run.directory import git_commit

clock = time.perf_counter
"""What is measured; `time.process_time` on a machine that others use too, with one thread."""


def side_by_side(
    actions: dict[str, Callable[[], object]], repeats: int, at_least: float = 4.0
) -> dict[str, float]:
    """Median seconds of each action by `clock`; they take turns, after one turn of warming up.

    Short actions are repeated until they took ``at_least`` seconds together, or 50 times.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    turn, begin = 0, time.perf_counter()
    while turn <= repeats or (turn <= 50 and time.perf_counter() - begin < at_least):
        for name, action in actions.items():
            started = clock()
            action()
            if turn or repeats == 0:
                seconds[name].append(clock() - started)
        turn += 1
    return {name: statistics.median(values) for name, values in seconds.items()}


def median_seconds(action: Callable[[], object], repeats: int) -> float:
    """Median wall-clock seconds of ``action`` over ``repeats`` runs."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def machine() -> str:
    """Processor, cores, Python."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().split("\n") if line.startswith("model name")]
        model = names[0].partition(": ")[2] if names else model
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}"


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def report(benchmark: str, settings: dict, seconds: dict, ratios: dict, **more: object) -> None:
    """Prints the result as the last line."""
    result = {
        "benchmark": benchmark,
        "machine": machine(),
        "commit": git_commit(),
        "settings": settings,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "ratios": {name: round(value, 4) for name, value in ratios.items()},
        **more,
    }
    print(json.dumps(result))
