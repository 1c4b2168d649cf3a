"""Reads what XLA has compiled for a TPU: the bytes that each instruction moves, and collectives."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_SIZES = {"pred": 1, "bf16": 2}  # bytes; other types end with their bits
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?")
_TILES = re.compile(r"([\d,]*):T\(([\d,]+)\)")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_ON_CHIP = "S("  # a layout's memory space, where that is not the device's main memory

# These move nothing, or what other instructions are counted for.
_FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"),
    *("copy-done", "slice-done", "async-done", "all-reduce-done", "all-gather-done"),
    *("partition-id", "replica-id"),
}
_FREE_TARGETS = re.compile(r'custom_call_target="(ConcatBitcast|Assume\w+|AsyncCollective\w+)"')
_CALLERS = ("while", "call", "conditional")
_PARTS = ("slice", "dynamic-slice", "gather")  # look at a part of their first operand


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a program.

    Attributes:
        numbers: in it.
        size: bytes, with the padding of its tiles.
        on_chip: it is not in the device's main memory.
    """

    numbers: int
    size: int
    on_chip: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation, as the compiler writes it."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str

    @property
    def size(self) -> int:
        """Bytes of its result in main memory."""
        return sum(array.size for array in self.arrays if not array.on_chip)

    @property
    def cycles(self) -> int:
        """Clock cycles, as the compiler estimates them; 0 where it says nothing."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found[1]) if found else 0

    @property
    def source(self) -> str:
        """The operation of the program that it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Move:
    """What an instruction moves in one run of the program, all its repetitions together.

    Attributes:
        size: bytes read from main memory and written to it.
        cycles: as the compiler estimates them.
        instruction: which.
    """

    size: int
    cycles: int
    instruction: Instruction


class Program:
    """A compiled program, from its text.

    Args:
        text: as the compiler writes it.
        everywhere: take the chip's own memory for main memory, so that moves in it count too.
    """

    def __init__(self, text: str, everywhere: bool = False):
        text = text.replace(_ON_CHIP, "") if everywhere else text
        self.computations: dict[str, Computation] = {}
        entry = ""
        current: Computation = {}
        for line in text.splitlines():
            if line.endswith("{") and (line.startswith(("%", "ENTRY"))):
                name = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
                current = self.computations[name] = {}
                entry = name if line.startswith("ENTRY") else entry
            elif found := _LINE.match(line):
                name, shape, opcode, rest = found.groups()
                inside = rest[: _find_end(rest)]
                operands = tuple(re.findall(r"%([\w.\-]+)", inside))
                current[name] = Instruction(name, opcode, _read_arrays(shape), operands, line)
        self._entry = self.computations[entry]

    def moves(self) -> list[Move]:
        """What moves bytes or takes time, most bytes first."""
        found = list(self._walk(self._entry, 1))
        return sorted(found, key=lambda move: (move.size, move.cycles), reverse=True)

    def count_products(self) -> tuple[float, float]:
        """FLOP of all convolutions and matrix products: each counted once, and as often as it runs.

        XLA's own count has the body of a loop once. On a TPU all products are convolutions.
        """
        found = list(self._walk_products(self._entry, 1))
        return sum(flops for flops, _ in found), sum(flops * times for flops, times in found)

    def _walk_products(self, computation: Computation, times: int) -> Iterator[tuple[float, int]]:
        for instruction in computation.values():
            if instruction.opcode == "convolution":
                yield _count_flops(instruction, computation[instruction.operands[1]]), times
            elif instruction.opcode in _CALLERS or instruction.opcode == "fusion":
                for name in _called(instruction):
                    repeated = times * _find_trips(instruction)
                    yield from self._walk_products(self.computations[name], repeated)

    def count_collectives(self) -> dict[str, tuple[int, int]]:
        """Opcode -> how many there are, and numbers in their results."""
        counts: collections.Counter[str] = collections.Counter()
        numbers: collections.Counter[str] = collections.Counter()
        for computation in self.computations.values():
            for instruction in computation.values():
                opcode = instruction.opcode.removesuffix("-start")
                if opcode in ("all-reduce", "all-gather", "reduce-scatter"):
                    arrays = instruction.arrays
                    if opcode != instruction.opcode:  # the operands first, then the results
                        arrays = arrays[len(arrays) // 2 :]
                    counts[opcode] += 1
                    numbers[opcode] += sum(array.numbers for array in arrays)
        return {opcode: (counts[opcode], numbers[opcode]) for opcode in counts}

    def _walk(self, computation: Computation, times: int) -> Iterator[Move]:
        for instruction in computation.values():
            if instruction.opcode in _CALLERS:
                for name in _called(instruction):
                    repeated = times * _find_trips(instruction)
                    yield from self._walk(self.computations[name], repeated)
            elif instruction.opcode not in _FREE and not _FREE_TARGETS.search(instruction.text):
                size = self._count(instruction, computation)
                yield Move(times * size, times * instruction.cycles, instruction)

    def _count(self, instruction: Instruction, computation: Computation) -> int:
        operands = [computation[name] for name in instruction.operands if name in computation]
        if instruction.opcode == "copy-start":  # (target, source, context)
            return sum(array.size for array in instruction.arrays[:2] if not array.on_chip)
        if instruction.opcode == "slice-start":  # ((source), target, context)
            source, target = instruction.arrays[:2]
            return target.size * ((not source.on_chip) + (not target.on_chip))
        if instruction.opcode in _PARTS:
            return 2 * instruction.size
        if instruction.opcode != "fusion":
            return instruction.size + sum(operand.size for operand in operands)
        (name,) = _called(instruction)
        return self._count_fusion(instruction, operands, self.computations[name])

    def _count_fusion(
        self, instruction: Instruction, operands: list[Instruction], inside: Computation
    ) -> int:
        """Operands of which a fusion looks at parts only count with these parts."""
        total = instruction.size
        places = {
            int(found[1]): each.name
            for each in inside.values()
            if (found := re.search(r" parameter\((\d+)\)", each.text))
        }
        for place, operand in enumerate(operands):
            users = [each for each in inside.values() if places.get(place) in each.operands]
            if users and all(
                each.opcode in _PARTS and each.operands[0] == places[place] for each in users
            ):
                parts = sum(array.size for each in users for array in each.arrays)
                total += min(operand.size, parts)
            else:
                total += operand.size
        return total


def _find_trips(instruction: Instruction) -> int:
    """How often a loop goes round, as far as the compiler knows; 1 for what is no loop."""
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.text)
    return int(found[1]) if found else 1


def _count_flops(convolution: Instruction, kernel: Instruction) -> float:
    """2 x results x numbers of the kernel that make one of them."""
    found = re.search(r"dim_labels=\w+_(\w+)->", convolution.text)
    shape = _ARRAY.search(kernel.text)
    if found is None or shape is None:
        return 0.0
    sizes = [int(size) for size in shape[2].split(",") if size]
    inputs = math.prod(size for size, label in zip(sizes, found[1], strict=True) if label != "o")
    return 2.0 * convolution.arrays[0].numbers * inputs


def _called(instruction: Instruction) -> list[str]:
    found = re.findall(r"(?:calls|body|to_apply)=%([\w.\-]+)", instruction.text)
    branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.text)
    return found + (re.findall(r"%([\w.\-]+)", branches[1]) if branches else [])


def _find_end(text: str) -> int:
    """Where the parenthesis ends that was opened before `text`."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    return len(text)


def _read_arrays(shape: str) -> tuple[Array, ...]:
    return tuple(_read_array(*found) for found in _ARRAY.findall(shape))


def _read_array(kind: str, dims: str, layout: str) -> Array:
    sizes = [int(size) for size in dims.split(",") if size]
    numbers = math.prod(sizes)
    padded = sizes
    if found := _TILES.match(layout):
        padded = [sizes[int(axis)] for axis in found[1].split(",") if axis]  # the innermost first
        tiles = [int(size) for size in reversed(found[2].split(","))]
        for place, tile in enumerate(tiles[: len(padded)]):
            padded[place] = -(-padded[place] // tile) * tile
    return Array(numbers, math.prod(padded) * _bytes_of(kind), _ON_CHIP in layout)


def _bytes_of(kind: str) -> int:
    if kind in _SIZES:
        return _SIZES[kind]
    bits = re.search(r"\d+", kind)
    return max(int(bits[0]) // 8, 1) if bits else 0
