"""Peak memory of a piece of work, and the memory that is available."""

import os
import re
import resource
import sys
from pathlib import Path

import torch


_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files with a container's limit of memory, in cgroups of version 2 and 1."""


class PeakMemory:
    """Peak memory since the object was made: on a GPU allocated by torch, elsewhere resident in the process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the process's high water mark: see proc(5)
        except OSError:
            pass  # not Linux, or forbidden: the mark is that of the whole process

    def megabytes(self) -> float:
        """The peak so far, in 10^6 bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 1e6
        kilobytes = _kilobytes("/proc/self/status", "VmHWM")
        if kilobytes is None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            kilobytes = peak // 1024 if sys.platform == "darwin" else peak  # see getrusage(2) of either
        return kilobytes * 1024 / 1e6


def available_memory() -> int:
    """Bytes of main memory that this process can still allocate, on the machine or in its container."""
    kilobytes = _kilobytes("/proc/meminfo", "MemAvailable")
    if kilobytes is None:  # not Linux: all memory of the machine
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resident = 1024 * (_kilobytes("/proc/self/status", "VmRSS") or 0)
    limits = [int(text) - resident for text in map(_read, _LIMITS) if text.strip().isdigit()]
    return max(0, min([1024 * kilobytes, *limits]))


def _kilobytes(path: str, key: str) -> int | None:
    """A line ``key: 123 kB`` of a file under /proc."""
    found = re.search(rf"^{key}:\s+(\d+) kB$", _read(path), flags=re.M)
    return int(found[1]) if found else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
