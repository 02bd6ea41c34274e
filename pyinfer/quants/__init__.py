"""GGUF tensor types: one file each, found by its name; a new file is a new type.

A file says TYPE, LAYOUT, BLOCK, BLOCK_BYTES and `pack`, the kernel that turns blocks into panels
(`pyinfer.quants.panels`).
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from types import ModuleType

from pyinfer.errors import UnsupportedError
from pyinfer.names import GGMLType


def names() -> list[str]:
    """Types that can be read, as file names."""
    files = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in files if name.upper() in GGMLType.__members__)


@cache
def quant(type_: GGMLType) -> ModuleType:
    """The file of a tensor type. Raises UnsupportedError that lists the known ones."""
    name = type_.name.lower()
    if name not in names():
        raise UnsupportedError(
            f"tensor type {type_.name} is not supported; supported are {', '.join(names())}"
        )
    return import_module(f"pyinfer.quants.{name}")
