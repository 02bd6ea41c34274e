"""The most memory this process has used, without any package."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far, mapped file pages included; 0 where it cannot be told."""
    if sys.platform == "win32":
        return _windows()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would also count what the parent had before it started this process
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Counters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of psapi.h."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("page_faults", ctypes.c_uint32),
        *((name, ctypes.c_size_t) for name in ("peak", "working", "a", "b", "c", "d", "e", "f")),
    )


def _windows() -> int:
    kernel = ctypes.WinDLL("kernel32")
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    kernel.K32GetProcessMemoryInfo.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32)
    counters = _Counters(size=ctypes.sizeof(_Counters))
    done = kernel.K32GetProcessMemoryInfo(
        kernel.GetCurrentProcess(), ctypes.byref(counters), ctypes.sizeof(counters)
    )
    return counters.peak if done else 0
