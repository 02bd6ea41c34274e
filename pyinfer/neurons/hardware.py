"""What placing neurons needs to know of a machine: how fast each processor reads its memory, and what it
costs that both compute parts of one layer.

The CPU's bandwidth is measured. A GPU's is its maker's figure until a machine with one measures it, and so is
the time of a meeting of both, SYNC_SECONDS: an aim for a launch, a wait and the copy of one row, not a
measurement. A file keeps the figures as JSON, which may be written by hand.
"""

from __future__ import annotations

import json
import math
import os
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyinfer.errors import FormatError, InputError, ModelNotFoundError

VERSION_KEY, VERSION = "pyinfer_hardware", 1
MOST_FILE_BYTES = 1 << 16
SYNC_SECONDS = 20e-6

# Memory bandwidth in GB/s and memory in GiB, from the makers' data sheets.
GPUS: dict[str, tuple[int, int]] = {
    "rtx 2080 ti": (616, 11),
    "rtx 3060": (360, 12),
    "rtx 3090": (936, 24),
    "rtx 4060": (272, 8),
    "rtx 4070": (504, 12),
    "rtx 4090": (1008, 24),
    "rtx 5090": (1792, 32),
    "t4": (320, 16),
    "l4": (300, 24),
    "a100": (2039, 80),
    "h100": (3350, 80),
    "h200": (4800, 141),
}
USUAL_GPU = "rtx 4060"  # slow beside the others, so that its figures ask for too many neurons, not too few

# What a figure may be at most; the fields of a file are these and the three texts.
_MOST = {
    "cpu_bytes_per_second": 1e15,
    "gpu_bytes_per_second": 1e15,
    "sync_seconds": 1.0,
    "vram_bytes": float(1 << 50),
}


@dataclass(frozen=True)
class Hardware:
    """cpu, gpu : names;  vram_bytes : memory of the GPU;  sync_seconds : a meeting of both inside a layer
    measured : names of the figures that were measured on this machine, the others come from data sheets
    """

    cpu: str
    gpu: str
    cpu_bytes_per_second: float
    gpu_bytes_per_second: float
    sync_seconds: float
    vram_bytes: int
    measured: tuple[str, ...] = ()

    def least_neurons(self, neuron_bytes: int) -> int | None:
        """The fewest neurons of a layer, of so many bytes each, for which the GPU repays the meeting; None
        when no number does, because it reads no faster. Source: PowerInfer, section 6.3, equations 4 and 5.
        """
        gain = neuron_bytes / self.cpu_bytes_per_second - neuron_bytes / self.gpu_bytes_per_second
        return math.ceil(self.sync_seconds / gain) if gain > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {VERSION_KEY: VERSION, **asdict(self), "measured": list(self.measured)}


def measure_hardware(threads: int, gpu: str = USUAL_GPU) -> Hardware:
    """Measure how fast `threads` threads read memory, about a second; the GPU's figures are those of GPUS.

    raises InputError for an unknown GPU, MemoryError when there is no room for half a gigabyte
    """
    found = GPUS.get(gpu.lower())
    if found is None:
        raise InputError(f"GPU {gpu[:40]!r} is not known; known are {', '.join(GPUS)}")
    from pyinfer.jit import read_bandwidth  # brings the compiler with it

    return Hardware(
        cpu=f"{platform.system()} {platform.machine()}, {threads} thread{'s' if threads > 1 else ''}",
        gpu=gpu.lower(),
        cpu_bytes_per_second=read_bandwidth(threads),
        gpu_bytes_per_second=found[0] * 1e9,
        sync_seconds=SYNC_SECONDS,
        vram_bytes=found[1] << 30,
        measured=("cpu_bytes_per_second",),
    )


def hardware_from_dict(values: object, where: str) -> Hardware:
    """The figures of a JSON value. Raises FormatError that begins with `where` and names the fault."""
    if not isinstance(values, dict) or VERSION_KEY not in values:
        raise FormatError(f"{where}: has no key {VERSION_KEY}, expected what pyinfer-bench --hardware writes")
    if values[VERSION_KEY] != VERSION or isinstance(values[VERSION_KEY], bool):
        found = f"{values[VERSION_KEY]!r}"[:40]
        raise FormatError(f"{where}: {VERSION_KEY} is {found}, expected {VERSION}; measure again")
    numbers = {name: _number(values, name, most, where) for name, most in _MOST.items()}
    texts = {name: values.get(name, "") for name in ("cpu", "gpu")}
    measured = values.get("measured", [])
    for name, text in texts.items():
        if not isinstance(text, str) or len(text) > 200 or not text.isprintable():
            raise FormatError(f"{where}: {name} is no name, expected a text of at most 200 characters")
    if not isinstance(measured, list) or any(name not in list(_MOST) for name in measured):
        raise FormatError(f"{where}: measured is no list of figures, expected names like {', '.join(_MOST)}")
    vram_bytes = int(numbers.pop("vram_bytes"))
    return Hardware(**texts, **numbers, vram_bytes=vram_bytes, measured=tuple(measured))


def _number(values: dict[str, Any], name: str, most: float, where: str) -> float:
    if name not in values:
        raise FormatError(f"{where}: {name} is missing, expected a number above 0")
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
        raise FormatError(
            f"{where}: {name} is {f'{value!r}'[:40]}, expected a number above 0, at most {most:g}"
        )
    if name == "vram_bytes" and value < 1:
        raise FormatError(f"{where}: {name} is {value!r}, expected a whole number of bytes")
    return float(value)


def read_hardware(path: Path) -> Hardware:
    """The figures in a file. Raises ModelNotFoundError (no such file), FormatError (no figures in it)."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MOST_FILE_BYTES + 1)
    except OSError as error:
        raise ModelNotFoundError(
            f"{path}: cannot be read ({error.strerror}), expected a file of pyinfer-bench --hardware"
        ) from None
    if len(raw) > MOST_FILE_BYTES:
        raise FormatError(f"{path}: has more than {MOST_FILE_BYTES} bytes, expected a page of JSON")
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError):
        raise FormatError(f"{path}: is no JSON, expected what pyinfer-bench --hardware writes") from None
    return hardware_from_dict(values, str(path))


def write_hardware(path: Path, hardware: Hardware) -> None:
    """Write or replace the file; it is there whole or not at all. Raises InputError where that is refused."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(json.dumps(hardware.to_dict(), indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(part)
        if isinstance(error, OSError):
            raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
        raise
