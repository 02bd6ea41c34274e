"""Ctrl-C for a command that generates: it ends an answer between two tokens, and is never lost.

Handlers are installed for the time of a `with` and only by the command; the library installs none.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyinfer.llama import Llama


@contextlib.contextmanager
def interruptible(llm: Llama, began: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Once the answer `began`, the first Ctrl-C ends it between two tokens; others raise KeyboardInterrupt.

    What comes before may be the compilation of kernels, which looks at no cancellation.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers belong to the main thread
        return
    count = 0

    def on_interrupt(*_: object) -> None:
        nonlocal count
        count += 1
        llm.cancel()
        if count > 1 or not began():
            if callable(previous):
                previous(signal.SIGINT, None)  # who remembers interrupts
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def remembered_interrupts() -> Iterator[Callable[[], None]]:
    """Yields a check that raises KeyboardInterrupt for a Ctrl-C that came and was dropped.

    Python drops one that comes in a destructor or a callback, libraries in a bare except.
    """
    came = False

    def on_interrupt(*_: object) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    def report(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            previous_report(unraisable)

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    previous_report, sys.unraisablehook = sys.unraisablehook, report
    previous = signal.signal(signal.SIGINT, on_interrupt) if in_main else None
    try:
        yield check
    except Exception as error:
        if came:  # dropped in a callback, it broke what a library was doing, such as a compilation
            raise KeyboardInterrupt from error
        raise
    finally:
        sys.unraisablehook = previous_report
        if in_main:
            signal.signal(signal.SIGINT, previous)
