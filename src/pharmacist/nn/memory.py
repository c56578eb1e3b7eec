"""How much memory a piece of work took at its worst."""

import re
from pathlib import Path

import torch


class PeakMemory:
    """Measures from its making on.

    On a GPU what torch has allocated there; elsewhere what of this process is resident, so that a process which holds
    other things counts them too.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the process's high water mark starts again: see proc(5)
        except OSError:
            pass  # not Linux, or forbidden: the mark is that of the whole process

    def megabytes(self) -> float:
        """The peak so far, in 10^6 bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 1e6
        try:
            status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        except OSError:
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        kilobytes = re.search(r"^VmHWM:\s+(\d+) kB$", status, flags=re.M)
        return int(kilobytes[1]) * 1024 / 1e6 if kilobytes else 0.0
