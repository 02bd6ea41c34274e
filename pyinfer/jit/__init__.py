"""How Python becomes machine code: SIMD words, atomics, kernel cache, a team of threads."""

from __future__ import annotations

from pyinfer.jit.kernel_cache import kernel_cache_is_cold

__all__ = ["kernel_cache_is_cold", "read_bandwidth"]


def read_bandwidth(threads: int) -> float:
    """Bytes per second that so many threads read from memory (the best of a few passes over 512 MiB)."""
    from pyinfer.jit.bandwidth import read_bandwidth as measure

    return measure(threads)
