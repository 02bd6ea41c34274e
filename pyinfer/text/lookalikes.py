"""Texts that look like control tokens, made harmless without a visible change.

A private character, the mark, goes between their letters before a template is rendered. Whoever looks for
control tokens in the result does not find them, and takes the mark out afterwards.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from pyinfer.errors import InputError


def unused_char(texts: Iterable[str]) -> str:
    """A private-use character that occurs in none of the texts."""
    seen: set[str] = set()
    for text in texts:
        seen.update(re.findall("[\ue000-\uf8ff]", text))
    for code in range(0xE000, 0xF900):
        if chr(code) not in seen:
            return chr(code)
    raise InputError("the messages use every private character of Unicode; leave some out")


class Marker:
    """Puts the mark into each text of a control token, and where one could cross the border of the text."""

    def __init__(self, controls: frozenset[str], mark: str):
        self._controls, self._starts, self._ends = _borders(controls)
        self._mark = mark

    def __call__(self, text: str) -> str:
        for name in self._controls:
            while name in text:
                text = text.replace(name, name[0] + self._mark + name[1:])
        body = text.rstrip()
        if any(body.endswith(start) for start in self._starts.get(body[-1:], ())):
            text = body + self._mark + text[len(body) :]
        body = text.lstrip()
        if any(body.startswith(end) for end in self._ends.get(body[:1], ())):
            text = text[: len(text) - len(body)] + self._mark + body
        return text


@functools.lru_cache(maxsize=8)
def _borders(controls: frozenset[str]) -> tuple[list[str], dict[str, set[str]], dict[str, set[str]]]:
    """Names longer than a character; their proper beginnings by last character, their ends by first."""
    longer = [name for name in controls if len(name) > 1]
    starts: dict[str, set[str]] = {}
    ends: dict[str, set[str]] = {}
    for name in longer:
        for cut in range(1, min(len(name), 64)):
            starts.setdefault(name[cut - 1], set()).add(name[:cut])
            ends.setdefault(name[cut], set()).add(name[cut:])
    return longer, starts, ends
