"""Who may use a session now: one generation at a time, whole generations one after the other."""

from __future__ import annotations

import threading


class Turns:
    """A lock for generations that pause between their segments and may go on in another thread, or never.

    Other threads wait until a generation gives its turn back. The thread in which a generation paused does
    not wait for it, because it would wait for itself: it takes the turn over, and the paused generation
    queues again when it goes on.
    """

    def __init__(self) -> None:
        self._changed = (
            threading.Condition()
        )  # re-entrant: the garbage collector may give back inside of take
        self._holder: object = None
        self._paused_in: threading.Thread | None = None  # thread that last ran the holder, while it is paused

    def take(self, turn: object, *, from_any_paused: bool = False) -> None:
        """Wait for the turn; at once when `turn` already has it."""
        thread = threading.current_thread()
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._holder is None
                    or self._holder is turn
                    or self._paused_in is thread
                    or (from_any_paused and self._paused_in is not None)
                )
            )
            self._holder, self._paused_in = turn, None

    def pause(self, turn: object) -> None:
        """Keep the turn, but do not use it before the next `take`."""
        with self._changed:
            if self._holder is turn:
                self._paused_in = threading.current_thread()
                self._changed.notify_all()

    def give_back(self, turn: object) -> None:
        """End the turn; nothing happens when another one took it over."""
        with self._changed:
            if self._holder is turn:
                self._holder = self._paused_in = None
                self._changed.notify_all()
