"""How much a chat template may do: the bounds that make a hostile one end soon and in little memory.

A template comes with a model file, so its author is a stranger. Templates have no `while`, but nested
loops, macros that call themselves and values that double take any time and memory all the same. Hence every
operation that repeats (loop step, call, filter) or makes a value (concatenation, list, slice) reports here;
what is made is paid by the character, so all that lives at once is bounded too. Containers carry the weight
they would have when written out, because `[x, x]` built sixty times is small in memory and without end when
printed or compared.

Nothing here knows jinja2: these are rules about plain values.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

MAX_SOURCE_CHARS = 1 << 17
MAX_VALUE_CHARS = 1 << 22
MAX_TOTAL_CHARS = 1 << 27
MAX_SECONDS = 1.5
MAX_DEPTH = 64
MAX_RANGE = 100_000
_MAX_INT_BITS = 4096
_STEP_COST = 64
_CONTAINER_COST = 512
_CHECK_EVERY = 1 << 12

_STR_METHODS = frozenset(
    str.split(
        "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit "
        "islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix "
        "removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip "
        "swapcase title upper"
    )
)
_DICT_METHODS = frozenset(("copy", "get", "items", "keys", "values"))
_LIST_METHODS = frozenset(("copy", "count", "index"))


class LimitError(Exception):
    """A template wants more than it may have; the text says what."""


class Selected(list):
    """What a filter selects: a list, as chained generators overflow the C stack, but true as they are."""

    def __bool__(self) -> bool:
        return True


class Budget:
    """What one rendering has spent. Not for several threads at once."""

    def __init__(self) -> None:
        self._left = MAX_TOTAL_CHARS
        self._next_check = self._left
        self._deadline = time.thread_time() + MAX_SECONDS
        # Containers never change in the sandbox. Keeping them here keeps their ids unique.
        self._weighed: dict[int, tuple[object, int, int]] = {}

    def spend(self, chars: int = 0) -> None:
        """Pays for one step that makes a value of so many characters."""
        self.check_length(chars)
        self.pay(chars)

    def pay(self, chars: int) -> None:
        """Pays for one step that costs as much as so many characters, in whatever pieces."""
        self._left -= chars + _STEP_COST
        if self._left < self._next_check:
            self._next_check = self._left - _CHECK_EVERY
            if self._left < 0:
                raise LimitError("it takes too many steps")
            if time.thread_time() > self._deadline:
                raise LimitError(f"it takes longer than {MAX_SECONDS:g} seconds")

    def check_length(self, chars: int) -> None:
        """Refuses a text of so many characters."""
        if chars > MAX_VALUE_CHARS:
            raise LimitError(f"it makes a value of {chars} characters; {MAX_VALUE_CHARS} are allowed")

    def step(self, value: Any) -> Any:
        """The value itself, after paying for a step."""
        self.spend()
        return value

    def made(self, value: Any) -> Any:
        """The value itself, after paying for its characters or elements."""
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.spend(8 * len(value))
            self.weigh(value)
        else:
            self.spend()
        return value

    def each(self, values: Iterable[Any]) -> Iterator[Any]:
        """The elements, paying for a step each."""
        for value in values:
            self.spend()
            yield value

    def weigh(self, value: Any) -> tuple[int, int]:
        """(characters, depth) of a value of plain data when written out; LimitError if that is too much."""
        if isinstance(value, str):
            return len(value) + 2, 0
        if isinstance(value, int):
            return 8 + value.bit_length() // 3, 0
        if not isinstance(value, (list, tuple, dict)):
            return 32, 0
        known = self._weighed.get(id(value))
        if known is not None:
            return known[1], known[2]
        self.spend(_CONTAINER_COST)
        weight, depth = 2, 0
        for child in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
            child_weight, child_depth = self.weigh(child)
            weight, depth = weight + child_weight, max(depth, child_depth)
        if weight > MAX_VALUE_CHARS or depth >= MAX_DEPTH:
            raise LimitError(f"it makes a list of {weight} characters in {depth + 1} levels")
        self._weighed[id(value)] = (value, weight, depth + 1)
        return weight, depth + 1

    def text(self, value: Any) -> str:
        """What a template prints for a value."""
        if not isinstance(value, str):
            self.weigh(value)
            value = str(value)
        self.spend(len(value))
        return value

    def join(self, parts: Iterable[Any], between: str = "") -> str:
        """The texts of the parts, joined."""
        texts = [self.text(part) for part in parts]
        self.spend(sum(map(len, texts)) + len(between) * len(texts))
        return between.join(texts)

    def replace(self, text: str, old: str, new: str, count: int = -1) -> str:
        """text.replace, if the result is not too long."""
        times = text.count(old) if count < 0 else min(count, text.count(old))
        self.spend(len(text) + max(times * (len(new) - len(old)), 0))
        return text.replace(old, new, count)

    def operate(self, operator: str, left: Any, right: Any, operate: Any) -> Any:
        """A binary operator, refused before it makes too long a value."""
        if operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            self.spend(len(left) + len(right))
        elif operator == "*":
            self._check_product(left, right)
        elif operator == "**":
            bits = left.bit_length() * abs(right) if isinstance(left, int) and isinstance(right, int) else 0
            self._check_bits(bits)
        elif operator == "%" and isinstance(left, str):
            self.check_format(left, right)
        return self.made(operate(left, right))

    def _check_product(self, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            self._check_bits(left.bit_length() + right.bit_length())
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, (str, list, tuple)) and isinstance(times, int):
                self.spend(len(sequence) * max(times, 0))

    def _check_bits(self, bits: int) -> None:
        if bits > _MAX_INT_BITS:
            raise LimitError(f"it makes a number of {bits} bits; {_MAX_INT_BITS} are allowed")

    def check_format(self, template: str, values: Any) -> None:
        """Refuses %-formats and str.format texts that pad without bound."""
        if re.search(r"\*|\d{3}|:[^{}]*\{", template):
            raise LimitError("it formats with a width of three digits or more")
        weight = self.weigh(list(values) if isinstance(values, (tuple, list)) else values)[0]
        fields = template.count("%") + template.count("{")
        self.spend(len(template) + fields * (100 + weight))

    def to_json(self, value: Any, indent: int | None, **options: Any) -> str:
        """json.dumps, if the result is not too long."""
        weight, depth = self.weigh(value)
        if indent is not None and not 0 <= indent <= 8:
            raise LimitError(f"it writes JSON with indent {indent}; 0 to 8 are allowed")
        self.spend(weight + weight * depth * (indent or 0) // 2)
        return self.made(json.dumps(value, indent=indent, **options))

    def call_method(self, method: Any, arguments: Sequence[Any]) -> Any:
        """Calls a method of a plain value, if its result is in proportion to what it gets."""
        owner, name = method.__self__, method.__name__
        allowed = {str: _STR_METHODS, dict: _DICT_METHODS, list: _LIST_METHODS, tuple: _LIST_METHODS}
        kind = next((kind for kind in allowed if isinstance(owner, kind)), None)
        if kind is None or name not in allowed[kind]:
            raise LimitError(f"it calls {type(owner).__name__}.{name}, which templates may not call here")
        if name == "join" and len(arguments) == 1:
            return self.join(self.each(arguments[0]), owner)
        if name == "replace" and 2 <= len(arguments) <= 3:
            return self.replace(owner, *arguments)
        self.pay(4 * len(owner) if name in ("split", "rsplit", "splitlines") else 0)
        result = method(*arguments)
        # Views print their whole dictionary but have no weight: a list has.
        return self.made(list(result) if name in ("items", "keys", "values") else result)

    def numbers(self, start: int, stop: int | None = None, step: int = 1) -> range:
        """range(), not too long."""
        found = range(start, stop, step) if stop is not None else range(start)
        if len(found) > MAX_RANGE:
            raise LimitError(f"it makes a range of {len(found)} numbers; {MAX_RANGE} are allowed")
        return found


def plain(value: Any, text: Any = str, depth: int = 0) -> Any:
    """A copy of JSON-like data, every string passed through `text`; ValueError says what is none."""
    if isinstance(value, str):
        return text(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if depth >= MAX_DEPTH // 2:
        raise ValueError(f"data nested more than {MAX_DEPTH // 2} levels deep")
    if isinstance(value, Mapping):
        return {plain(key, text): plain(item, text, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, text, depth + 1) for item in value]
    raise ValueError(f"a {type(value).__name__}")
