"""How far a long work is, for command lines: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TextIO

DELAY_SECONDS = 0.3  # on a terminal, quick work shows nothing
REDRAW_SECONDS = 0.1
QUIET_SECONDS = 2.0  # elsewhere, work of this length shows nothing
LINE_SECONDS = 5.0
BAR_CHARACTERS = 24
DEFAULT_COLUMNS = 80


def format_amount(amount: float, unit: str) -> str:
    """An amount for people: 1536 bytes -> "1.5 KiB", 1536 tokens -> "1536 tokens"."""
    if unit != "bytes":
        return f"{amount:.0f} {unit}"
    if amount < 1024:
        return f"{amount:.0f} B"
    for prefix in ("Ki", "Mi", "Gi", "Ti"):
        amount /= 1024
        if amount < 1024 or prefix == "Ti":
            break
    return f"{amount:.1f} {prefix}B"


def format_seconds(seconds: float) -> str:
    """A time for people: "0:07", "12:34", "1:02:03"."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class Progress:
    """A callable (done, total) that writes to `stream` and nowhere else; total 0 means that it is unknown.

    unit : "bytes", or a plural word like "tokens";  clock : seconds, for tests
    On a terminal it redraws one line and erases it at the end. Elsewhere it writes a line every 5 seconds,
    nothing in the first 2. Use it as a context manager, or call `close`.
    """

    def __init__(
        self, stream: TextIO, label: str, unit: str = "bytes", *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream, self._label, self._unit, self._clock = stream, label, unit, clock
        self._on_terminal = bool(stream.isatty())
        self._began: float | None = None
        self._first_done = 0
        self._next = 0.0
        self._width = 0  # characters that now stand on the line
        self.note = ""  # shown at the end of the text

    def __call__(self, done: int, total: int) -> None:
        """Tell how much is done of how much."""
        now = self._clock()
        if self._began is None:
            self._began, self._first_done = now, done  # a resumed download does not begin at 0
            self._next = now + (DELAY_SECONDS if self._on_terminal else QUIET_SECONDS)
        if now < self._next:
            return
        self._next = now + (REDRAW_SECONDS if self._on_terminal else LINE_SECONDS)
        if self._on_terminal:
            self._redraw(done, total, now - self._began)
        else:
            self._write(self._text(done, total, now - self._began) + "\n")

    def close(self) -> None:
        """Erase the line. Afterwards it may be used again for other work."""
        if self._width:
            self._write("\r" + " " * self._width + "\r")
        self._width, self._began = 0, None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _text(self, done: int, total: int, seconds: float, *, columns: int = 0) -> str:
        """What to show; with a bar where `columns` have room for one."""
        rate = (done - self._first_done) / seconds if seconds > 0 else 0.0
        parts = [format_amount(done, self._unit)]
        fraction = min(done / total, 1.0) if total > 0 else 0.0
        if total > 0:
            amount = parts[0] if self._unit == "bytes" else str(done)
            parts = [f"{int(fraction * 100):3d} %", f"{amount} of {format_amount(total, self._unit)}"]
        if rate > 0:
            parts.append(f"{format_amount(rate, self._unit)}/s")
            if total > done:
                parts.append(f"{format_seconds((total - done) / rate)} left")
        room = min(BAR_CHARACTERS, columns - len("  ".join([self._label, *parts])) - len("  []"))
        if total > 0 and room >= BAR_CHARACTERS // 4:
            filled = int(fraction * room)
            parts.insert(0, "[" + "#" * filled + "." * (room - filled) + "]")
        return "  ".join([self._label, *parts, *([self.note] if self.note else [])])

    def _redraw(self, done: int, total: int, seconds: float) -> None:
        columns = self._columns() - 1  # a full line would wrap
        text = self._text(done, total, seconds, columns=columns)[:columns]
        self._write("\r" + text + " " * max(0, self._width - len(text)))
        self._width = len(text)

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or DEFAULT_COLUMNS
        except (OSError, ValueError, AttributeError):
            return DEFAULT_COLUMNS

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
