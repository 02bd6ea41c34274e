"""The pickle inside a file of torch.save, read without the pickle module: nothing in it can be executed.

A small stack machine knows the instructions that describe tensors in dictionaries and refuses all others. A
global of the pickle never becomes a Python object; it stays a name, and a few names mean something here.

Source: CPython's pickletools (instructions); torch.serialization and torch._utils (what the names mean).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from pyinfer.errors import FormatError, UnsupportedError
from pyinfer.gguf_metadata import quoted

# Room for 40,000 tensors; a hostile pickle costs some 70 times its size while it is read.
MAX_PICKLE_BYTES = 8 << 20

STORAGES = {
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
}
_REBUILD_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_REBUILD_PARAMETER = ("torch._utils", "_rebuild_parameter")
# Of tensors with attributes of their own, which are left out; the types are never made either.
_REBUILD_FROM_TYPE = ("torch._tensor", "_rebuild_from_type_v2")
_TENSOR_TYPES = (("torch", "Tensor"), ("torch.nn.parameter", "Parameter"))
_ORDERED_DICT = ("collections", "OrderedDict")
_KNOWN = (_REBUILD_TENSOR, _REBUILD_PARAMETER, _REBUILD_FROM_TYPE, _ORDERED_DICT, *_TENSOR_TYPES)


@dataclass(frozen=True)
class Storage:
    """Elements in the archive's member data/<key>, or behind the pickles of the older format."""

    dtype: str
    key: str
    elements: int


@dataclass(frozen=True)
class Rebuilt:
    """The arguments of a tensor as the pickle has them; nothing is checked yet but the storage's type."""

    storage: Storage
    offset: object
    shape: object
    stride: object


@dataclass(frozen=True)
class Pickles:
    """What several pickles describe: their values, all storages they name, and the place behind the last."""

    values: list[object]
    storages: dict[str, Storage]
    stop: int


class _Mark:
    pass


_MARK = _Mark()


def read_pickle(data: bytes, where: str) -> object:
    """What a pickle of tensors describes: dictionaries, lists, tuples, scalars and Rebuilt.

    where : file and member, for errors
    raises UnsupportedError (names module and name, or the instruction, that is refused), FormatError
    """
    return read_pickles(data, where, 1).values[0]


def read_pickles(data: bytes, where: str, count: int) -> Pickles:
    """`count` pickles that follow one another from the beginning of `data`. Raises as `read_pickle`."""
    machine = _Machine(data, where)
    try:
        return Pickles([machine.run() for _ in range(count)], machine.storages, machine.at)
    except (struct.error, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(
            f"{where}: byte {machine.at} of the pickle makes no sense ({type(error).__name__}); "
            "fetch the file again"
        ) from None


class _Machine:
    def __init__(self, data: bytes, where: str):
        self.data, self.where = data, where
        self.at = 0
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}
        self.storages: dict[str, Storage] = {}

    def run(self) -> object:
        self.stack, self.memo = [], {}
        while True:
            code = self.data[self.at]
            self.at += 1
            if code == ord("."):
                return self.stack.pop()
            step = _STEPS.get(code)
            if step is None:
                raise UnsupportedError(
                    f"{self.where}: the pickle has instruction {code:#04x} at byte {self.at - 1}, which no "
                    "file of plain tensors needs; it is refused, get the model as safetensors"
                )
            step(self)

    def take(self, form: str) -> int | float:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def bytes(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError
        self.at += count
        return self.data[self.at - count : self.at]

    def line(self) -> str:
        stop = self.data.index(b"\n", self.at)
        text = self.data[self.at : stop].decode()
        self.at = stop + 1
        return text

    def since_mark(self) -> list[object]:
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise ValueError
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def fold(self, count: int) -> None:
        items = self.stack[-count:]
        if len(items) < count:
            raise ValueError
        self.stack[-count:] = [tuple(items)]

    def set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError
        # Hashing tuples of tuples of the same tuple takes forever.
        if not all(type(key) in (str, int) for key in items[::2]):
            raise ValueError
        target.update(zip(items[::2], items[1::2]))

    def append(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ValueError
        target.extend(items)

    def name(self, module: object, name: object) -> None:
        """A global: pushed as the pair of its names if it is one of the few that describe tensors."""
        if type(module) is not str or type(name) is not str:
            raise ValueError
        if (module, name) not in _KNOWN and not (module == "torch" and name in STORAGES):
            raise UnsupportedError(
                f"{self.where}: the pickle asks for {quoted(f'{module}.{name}')}, which is not one of the "
                "names that plain tensors need; it is refused and nothing was executed, get the model as "
                "safetensors"
            )
        self.stack.append(_Name(module, name))

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise ValueError
        pair = (function.module, function.name)
        if pair == _ORDERED_DICT and not arguments:
            self.stack.append({})
        elif pair == _REBUILD_PARAMETER and len(arguments) == 3 and isinstance(arguments[0], Rebuilt):
            self.stack.append(arguments[0])
        elif pair == _REBUILD_TENSOR:
            self.stack.append(_rebuilt(arguments))
        elif pair == _REBUILD_FROM_TYPE and len(arguments) == 4:
            self.stack.append(self.from_type(*arguments))
        else:
            raise ValueError

    def from_type(self, function: object, kind: object, arguments: object, state: object) -> Rebuilt:
        """The tensor of a tensor with attributes; all that may be asked for is a plain one."""
        for found, known in ((function, (_REBUILD_TENSOR,)), (kind, _TENSOR_TYPES)):
            if not isinstance(found, _Name) or (found.module, found.name) not in known:
                said = f"{found.module}.{found.name}" if isinstance(found, _Name) else type(found).__name__
                raise UnsupportedError(
                    f"{self.where}: the pickle asks for a tensor made by {quoted(said)}, expected "
                    f"{' or '.join(map('.'.join, known))}; it is refused and nothing was executed, get the "
                    "model as safetensors"
                )
        if not isinstance(arguments, tuple) or not isinstance(state, dict):
            raise ValueError
        return _rebuilt(arguments)

    def storage(self) -> None:
        kind, storage, key, _, elements, *view = self.stack.pop()  # type: ignore[misc]
        if kind != "storage" or not isinstance(storage, _Name) or storage.name not in STORAGES:
            raise ValueError
        if type(key) is not str or type(elements) is not int or elements < 0 or view not in ([], [None]):
            raise ValueError
        found = Storage(STORAGES[storage.name], key, elements)
        self.storages.setdefault(key, found)
        self.stack.append(found)

    def build(self) -> None:
        """State of an object: only the notes that torch keeps beside a dictionary of tensors."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise ValueError


@dataclass(frozen=True)
class _Name:
    module: str
    name: str


def _rebuilt(arguments: tuple[object, ...]) -> Rebuilt:
    if not 6 <= len(arguments) <= 7 or not isinstance(arguments[0], Storage):
        raise ValueError
    return Rebuilt(*arguments[:4])


_STEPS: dict[int, Callable[[_Machine], object]] = {
    0x80: lambda m: m.take("<B"),  # PROTO
    0x95: lambda m: m.take("<Q"),  # FRAME
    ord("("): lambda m: m.stack.append(_MARK),
    ord("N"): lambda m: m.stack.append(None),
    0x88: lambda m: m.stack.append(True),
    0x89: lambda m: m.stack.append(False),
    ord("J"): lambda m: m.stack.append(m.take("<i")),
    ord("K"): lambda m: m.stack.append(m.take("<B")),
    ord("M"): lambda m: m.stack.append(m.take("<H")),
    0x8A: lambda m: m.stack.append(int.from_bytes(m.bytes(m.take("<B")), "little", signed=True)),  # LONG1
    ord("G"): lambda m: m.stack.append(m.take(">d")),
    ord("X"): lambda m: m.stack.append(m.bytes(m.take("<I")).decode("utf-8", "surrogatepass")),
    0x8C: lambda m: m.stack.append(m.bytes(m.take("<B")).decode("utf-8", "surrogatepass")),
    ord(")"): lambda m: m.stack.append(()),
    ord("t"): lambda m: m.stack.append(tuple(m.since_mark())),
    0x85: lambda m: m.fold(1),
    0x86: lambda m: m.fold(2),
    0x87: lambda m: m.fold(3),
    ord("]"): lambda m: m.stack.append([]),
    ord("a"): lambda m: m.append([m.stack.pop()]),
    ord("e"): lambda m: m.append(m.since_mark()),
    ord("}"): lambda m: m.stack.append({}),
    ord("s"): lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    ord("u"): lambda m: m.set_items(m.since_mark()),
    ord("q"): lambda m: m.memo.__setitem__(m.take("<B"), m.stack[-1]),
    ord("r"): lambda m: m.memo.__setitem__(m.take("<I"), m.stack[-1]),
    0x94: lambda m: m.memo.__setitem__(len(m.memo), m.stack[-1]),  # MEMOIZE
    ord("h"): lambda m: m.stack.append(m.memo[m.take("<B")]),
    ord("j"): lambda m: m.stack.append(m.memo[m.take("<I")]),
    ord("c"): lambda m: m.name(m.line(), m.line()),
    0x93: lambda m: m.name(m.stack.pop(-2), m.stack.pop()),  # STACK_GLOBAL
    ord("R"): lambda m: m.call(),
    ord("Q"): lambda m: m.storage(),
    ord("b"): lambda m: m.build(),
}
