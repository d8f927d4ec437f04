"""What benchmarks see of the processes that they start."""

from __future__ import annotations

import psutil


def processor_time() -> float:
    """Seconds of this process and all that it has started, those that have ended too."""
    own = psutil.Process()
    total = 0.0
    for process in [own, *own.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total
