"""Options that commands share, so that they are called and explained alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_PATH = click.Path(path_type=Path)
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

threads_option = click.option(
    "-t", "--threads", type=click.IntRange(1, 256), help="Threads.  [as many as may be used]"
)


def model_and_texts(explanation: str) -> Decorator:
    """MODEL --text FILE FILES...: parameters model, texts, and more, which are texts as well."""
    words = f"Plain text, UTF-8{explanation}."
    texts = click.option("--text", "texts", multiple=True, type=_PATH, metavar="FILES...", help=words)
    more = click.argument("more", nargs=-1, type=_PATH, metavar="")
    return lambda command: click.argument("model", type=_PATH)(more(texts(command)))
