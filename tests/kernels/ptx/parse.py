"""PTX as nvcc and Triton write it, taken apart: kernels, their parameters, their instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

SIZES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16, "f16x2": 4, "pred": 1}


def size_of(kind: str) -> int:
    """Bytes of a type such as ``u32``, ``.b8`` or ``bf16``."""
    digits = re.search(r"\d+$", kind)
    return SIZES[digits[0] if digits else kind.lstrip(".")]


@dataclass(frozen=True)
class Instruction:
    """``@guard opcode operands``; ``parts`` is the opcode between its dots."""

    text: str
    guard: str | None
    negated: bool
    parts: tuple[str, ...]
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Param:
    name: str
    offset: int
    size: int


@dataclass
class Kernel:
    name: str
    params: list[Param] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    """A register's name, or the prefix of a numbered family's, to its type."""
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    variables: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    """Name to state space, alignment and bytes; a size of 0 is dynamic shared memory."""

    @cached_property
    def overlaps(self) -> bool:
        """Whether it waits for the launch ahead of it, and so may begin before that one has ended."""
        return any(each.parts == ("griddepcontrol", "wait") for each in self.code)

    @property
    def param_bytes(self) -> int:
        return max((param.offset + param.size for param in self.params), default=0)


_VARIABLE = re.compile(
    r"\.(shared|global|const|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?\s*(?:=|$)"
)


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of one PTX module, by name."""
    text = re.sub(r"/\*.*?\*/", "", re.sub(r"//[^\n]*", "", text), flags=re.S)
    text = re.sub(r"^\s*\.(?:loc|file|section|version|address_size)\b.*$", "", text, flags=re.M)
    text = text.split(".section")[0]
    if not re.search(r"\.target\s+\w+", text):
        raise ValueError("expected PTX with a .target")
    kernels: dict[str, Kernel] = {}
    shared: dict[str, tuple[str, int, int]] = {}  # by all kernels of the module
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\(", text))
    for statement in re.split(r"[;{}]", text[: entries[0].start()] if entries else text):
        _declare(statement, shared)
    for at, until in zip(entries, [*(e.start() for e in entries[1:]), len(text)]):
        kernel = _kernel(at[1], text[at.end() : until])
        kernel.variables = shared | kernel.variables
        kernels[kernel.name] = kernel
    return kernels


def _declare(statement: str, variables: dict[str, tuple[str, int, int]]) -> bool:
    found = _VARIABLE.search(statement)
    if found is None:
        return False
    space, align, kind, name, count = found.groups()
    length = int(count) if count else (0 if count == "" else 1)
    variables[name] = (space, int(align or 1), length * size_of(kind))
    return True


def _kernel(name: str, text: str) -> Kernel:
    kernel = Kernel(name)
    head, _, rest = text.partition(")")
    offset = 0
    for part in filter(str.strip, head.split(",")):
        found = re.search(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+).*?([\w$]+)(?:\[(\d+)\])?\s*$", part.strip(), re.S)
        if found is None:
            raise ValueError(f"expected a parameter, got {part.strip()}")
        align, kind, own, count = found.groups()
        size = size_of(kind) * int(count or 1)
        step = int(align or size_of(kind))
        offset = -(-offset // step) * step
        kernel.params.append(Param(own, offset, size))
        offset += size
    _body(kernel, rest.partition("{")[2])
    return kernel


_TOKEN = re.compile(r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[\w$%]+):(?!:)|(?P<statement>[^;]+);)")


def _body(kernel: Kernel, text: str) -> None:
    """Statements end with ``;``. A brace where one would begin opens a scope, with register names of its own."""
    scopes: list[dict[str, str]] = []
    label, at = "", 0
    while (token := _TOKEN.match(text, at)) is not None:
        at = token.end()
        if token["open"]:
            scopes.append({})
        elif token["close"]:
            if not scopes:  # the kernel's own
                return
            scopes.pop()
        elif token["label"]:
            label = token["label"]
            kernel.labels[label] = len(kernel.code)
        else:
            statement = " ".join(token["statement"].split())
            if statement.startswith(".branchtargets"):
                kernel.tables[label] = [name.strip() for name in statement.removeprefix(".branchtargets").split(",")]
                del kernel.labels[label]
            elif statement.startswith(".reg"):
                _registers(kernel, scopes, statement)
            elif statement.startswith("."):
                if not _declare(statement, kernel.variables) and not statement.startswith(".pragma"):
                    raise ValueError(f"expected a declaration that is known here, got {statement}")
            else:
                kernel.code.append(_instruction(statement, scopes))


def _registers(kernel: Kernel, scopes: list[dict[str, str]], statement: str) -> None:
    """``.reg .b32 %r<7>`` or ``.reg .pred p``; within a scope, a name is made one of its own."""
    _, kind, listed = statement.split(maxsplit=2)
    for name in (part.strip() for part in listed.split(",")):
        family = re.match(r"(.+)<\d+>$", name)
        if scopes:
            scopes[-1][name] = f"{name}#{len(kernel.registers)}"
        kernel.registers[family[1] if family else scopes[-1][name] if scopes else name] = kind[1:]


def _instruction(statement: str, scopes: list[dict[str, str]]) -> Instruction:
    names = {own: unique for scope in scopes for own, unique in scope.items()}
    guarded = re.match(r"@(!?)([\w$%]+)\s+(.*)", statement)
    guard, negated, rest = (guarded[2], guarded[1] == "!", guarded[3]) if guarded else (None, False, statement)
    opcode, _, listed = rest.partition(" ")
    operands = [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", listed)] if listed.strip() else []
    if names:
        operands = [re.sub(r"%?[\w$]+", lambda word: names.get(word[0], word[0]), o) for o in operands]
        guard = names.get(guard, guard) if guard else None
    return Instruction(statement, guard, negated, tuple(opcode.replace("::", ":").split(".")), tuple(operands))
