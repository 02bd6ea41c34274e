"""Write a GGUF again with other tensor types, as one call."""

from __future__ import annotations

import os
from collections.abc import Callable

from pyinfer.gguf_file import open_gguf
from pyinfer.names import GGMLType
from pyinfer_convert.pipeline import Summary, plan, write
from pyinfer_convert.recipe import QUANTS
from pyinfer_convert.sources import GGUFSource

TYPES = {name: quant.type for name, quant in QUANTS.items()}


def requantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type_: GGMLType,
    *,
    output_type: GGMLType | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Write `source` again as `target` with matrices of `type_`.

    output_type : type of the output head instead of the recipe's;  force : replace an existing file
    progress : called with (bytes read, bytes to read)
    raises InputError (target), FormatError or UnsupportedError (source), CapacityError (no space)
    """
    opened = GGUFSource(open_gguf(source))
    try:
        planned = plan(opened, QUANTS[type_.name.lower()], output_type=output_type)
        return write(planned, target, force=force, progress=progress)
    finally:
        opened.close()
