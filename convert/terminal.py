"""What the commands of `pyinfer-convert` have in common with a terminal: notes, signals and exit codes.

Everything they say goes to standard error. Exit codes: 0 done, 1 something is wrong with the input (one
sentence), 2 wrong usage, 128 and the number of the signal that ended it (130: Ctrl-C).
"""

from __future__ import annotations

import contextlib
import signal
import threading
import traceback
from collections.abc import Callable, Iterator

import click

from pyinfer.errors import PyInferError

SIGNALLED = 128  # and the signal's number is the exit code, as shells have it
# Ctrl-C, a request to end, a closed terminal (Windows: a closed window or Ctrl-Break). No system has all.
_ENDING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)
]


def note(text: str) -> None:
    """A line on standard error; the terminal may be gone."""
    with contextlib.suppress(OSError):
        click.echo(text, err=True)


class Signals:
    """Ctrl-C, requests to end and a closed terminal, each a KeyboardInterrupt.

    While `holding` the first one waits for the next `check`: raised in the middle of a job of the team, an
    exception would leave its threads waiting for the one that is gone.
    """

    def __init__(self) -> None:
        self.holding = False
        self.received: int | None = None

    def __call__(self, number: int, frame: object) -> None:
        again, self.received = self.received is not None, number
        if again or not self.holding:
            self.check()

    def check(self) -> None:
        if self.received is not None:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holding for the time of a `with`."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False

    def checked(self, progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """`progress`, with a check before each call."""

        def follow(done: int, total: int) -> None:
            self.check()
            progress(done, total)

        return follow


@contextlib.contextmanager
def handled(signals: Signals) -> Iterator[None]:
    """The process's signals go to `signals` for the time of a `with`."""
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers belong to the main thread
        return
    # What is ignored stays ignored: nohup means a conversion to outlive its terminal.
    previous = {
        number: signal.signal(number, signals)
        for number in _ENDING
        if signal.getsignal(number) not in (signal.SIG_IGN, None)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def exit_code(work: Callable[[Signals], None], interrupted: str, *, verbose: bool) -> int:
    """Do the work of a command; its exit code.

    interrupted : what to say of the state after a signal;  verbose : tracebacks of errors, too
    """
    signals = Signals()
    try:
        with handled(signals):
            work(signals)
        return 0
    except KeyboardInterrupt:
        note(f"\ninterrupted; {interrupted}")
        return SIGNALLED + (signals.received or signal.SIGINT)
    except (PyInferError, OSError, MemoryError) as error:
        if signals.received is not None:
            return SIGNALLED + signals.received  # writing to a terminal that is gone fails, too
        if verbose:
            traceback.print_exc()
        note(f"error: {str(error) or type(error).__name__}")
        return 1
