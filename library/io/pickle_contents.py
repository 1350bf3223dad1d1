"""What a pickle says, read by a machine that can only put plain values together.

Python's own unpickler calls what the file names, and where it is kept from that, numbers in the file still decide how
much it allocates and how long it computes hashes. Here nothing is ever called or imported: a class is a name, an object
of an unknown class is an empty place, and only texts and numbers become keys of a table.
"""

import pickletools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

_MOST_STEPS = 2_000_000
"""A tensor takes about 40; ten thousand tensors are far more than any model has in one file."""

Rebuild = Callable[[Sequence[Any]], Any]


class Global(NamedTuple):
    """A class or function that the file names."""

    module: str
    name: str


class Storage(NamedTuple):
    """What stands for the bytes that the pickle doesn't hold, by the key that it has for them."""

    key: Any


class Opaque:
    """Stands for anything that isn't a plain value."""


class PickleError(ValueError):
    """The pickle contradicts itself, or isn't one."""


def read_contents(file: BinaryIO, rebuild: Mapping[Global, Rebuild], named: set[Global]) -> Any:
    """This reads one pickle and leaves the file behind its end.

    Args:
        file: Holds no more than may be read.
        rebuild: What is made of the arguments of the calls that the file asks for; other calls give an ``Opaque``.
        named: Gets every class and function that the file names.

    Returns:
        Texts, numbers, bytes, tuples, lists, tables, ``Storage``, ``Opaque``, and what ``rebuild`` makes.

    Raises:
        PickleError: It is no pickle, or is longer than an honest one.
    """
    machine = _Machine(rebuild, named)
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if number > _MOST_STEPS:
                raise PickleError("its list of contents is longer than any model's")
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError) as error:
        raise PickleError("its list of contents is damaged") from error
    except ValueError as error:
        raise error if isinstance(error, PickleError) else PickleError("its list of contents is damaged") from error
    raise PickleError("its list of contents has no end")


_ARGUMENTS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE", "BINBYTES", "BINBYTES8",
    "SHORT_BINBYTES", "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NEW: Mapping[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NOTHING = {"PROTO", "FRAME", "READONLY_BUFFER"}
_HASHING = ("set", "frozenset", "dict", "Counter", "defaultdict")
_KEYS = (str, int, float, bytes, type(None))


class _Machine:
    """The stack and the memory of a pickle."""

    def __init__(self, rebuild: Mapping[Global, Rebuild], named: set[Global]):
        self._rebuild = rebuild
        self._named = named
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memory: dict[int, Any] = {}
        self._copied = 0

    def pop(self) -> Any:
        """This takes the topmost value."""
        return self._stack.pop()

    def step(self, name: str, argument: Any) -> None:
        """This does one instruction."""
        if name in _ARGUMENTS:
            self._stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memory[argument] = self._stack[-1]
        elif name == "MEMOIZE":
            self._memory[len(self._memory)] = self._stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self._stack.append(self._memory[argument])
        elif name in _SHORT_TUPLES:
            self._stack[-_SHORT_TUPLES[name] :] = [self._tuple(self._stack[-_SHORT_TUPLES[name] :])]
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _NEW:
            self._stack.append(_NEW[name]())
        elif name == "MARK":
            self._marks.append(self._stack)
            self._stack = []
        elif name not in _NOTHING:
            _OTHERS[name](self, argument)

    def marked(self) -> list[Any]:
        """This takes what lies above the last mark."""
        values, self._stack = self._stack, self._marks.pop()
        return values

    def push(self, value: Any) -> None:
        """This lays a value on top."""
        self._stack.append(value)

    def push_global(self, module: str, name: str) -> None:
        """This lays a class or function on top."""
        found = Global(module, name)
        self._named.add(found)
        self.push(found)

    def top(self) -> Any:
        """The topmost value."""
        return self._stack[-1]

    def fill(self, values: Sequence[Any]) -> None:
        """This puts names and values by turns into the topmost table; names that aren't plain are left out."""
        table = self._stack[-1]
        refuse_tuples(values[::2])
        if type(table) is dict:
            for name, value in zip(values[::2], values[1::2], strict=True):
                if isinstance(name, _KEYS):
                    table[name] = value

    def extend(self, values: Sequence[Any]) -> None:
        """This puts values into the topmost list."""
        if type(self._stack[-1]) is list:
            self._stack[-1].extend(values)

    def call(self, function: Any, arguments: Any) -> None:
        """This lays down what a call would have made."""
        if function == Global("collections", "OrderedDict"):
            self._stack.append({})
            for pairs in arguments if type(arguments) is tuple else ():
                # the same list may be named again and again: what is copied counts
                self._count(pairs)
                self.fill([value for name, value in pairs for value in (name, value)])
            return
        if type(function) is Global and function.name in _HASHING:
            for values in arguments if type(arguments) is tuple else ():
                self._count(values)
                refuse_tuples(values)
        known = self._rebuild.get(function) if type(function) is Global else None
        self._stack.append(Opaque() if known is None else known(arguments))

    def _count(self, values: Sequence[Any]) -> None:
        self._copied += len(values)
        if self._copied > _MOST_STEPS:
            raise PickleError("its list of contents is longer than any model's")

    def _tuple(self, values: list[Any]) -> tuple[Any, ...]:
        if not values:
            raise IndexError
        return tuple(values)


def refuse_tuples(values: Sequence[Any]) -> None:
    """Tuples in tuples can take for ever to hash, and torch hashes what is a name in a table or stands in a set."""
    if any(type(value) is tuple for value in values):
        raise PickleError("it has tuples for names, which no model has")


def _pop(machine: _Machine, argument: Any) -> None:
    machine.pop()


def _pop_mark(machine: _Machine, argument: Any) -> None:
    machine.marked()


def _object(machine: _Machine, argument: Any) -> None:
    function, *arguments = machine.marked()
    machine.call(function, tuple(arguments))


def _reduce(machine: _Machine, argument: Any) -> None:
    arguments = machine.pop()
    machine.call(machine.pop(), arguments)


def _with_keywords(machine: _Machine, argument: Any) -> None:
    machine.pop()
    _reduce(machine, argument)


def _named(machine: _Machine, argument: Any) -> None:
    module, name = str(argument).split(" ", 1)
    machine.push_global(module, name)


def _named_on_stack(machine: _Machine, argument: Any) -> None:
    name, module = machine.pop(), machine.pop()
    if type(name) is str:
        machine.push_global(str(module), name)
    else:
        machine.push(Opaque())


def _instance(machine: _Machine, argument: Any) -> None:
    machine.marked()
    _named(machine, argument)
    machine.pop()
    machine.push(Opaque())


def _frozen_set(machine: _Machine, argument: Any) -> None:
    refuse_tuples(machine.marked())
    machine.push(Opaque())


def _two(machine: _Machine) -> tuple[Any, Any]:
    second = machine.pop()
    return machine.pop(), second


def _pairs(machine: _Machine, argument: Any) -> None:
    values = machine.marked()
    machine.push({})
    machine.fill(values)


_OTHERS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "POP": _pop,
    "POP_MARK": _pop_mark,
    "DUP": lambda machine, argument: machine.push(machine.top()),
    "TUPLE": lambda machine, argument: machine.push(tuple(machine.marked())),
    "LIST": lambda machine, argument: machine.push(machine.marked()),
    "DICT": _pairs,
    "EMPTY_SET": lambda machine, argument: machine.push(Opaque()),
    "FROZENSET": _frozen_set,
    "ADDITEMS": lambda machine, argument: refuse_tuples(machine.marked()),
    "APPEND": lambda machine, argument: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, argument: machine.extend(machine.marked()),
    "SETITEM": lambda machine, argument: machine.fill(_two(machine)),
    "SETITEMS": lambda machine, argument: machine.fill(machine.marked()),
    "GLOBAL": _named,
    "STACK_GLOBAL": _named_on_stack,
    "INST": _instance,
    "OBJ": _object,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _with_keywords,
    "BUILD": _pop,
    "PERSID": lambda machine, argument: machine.push(Storage(argument)),
    "BINPERSID": lambda machine, argument: machine.push(Storage(machine.pop())),
}
