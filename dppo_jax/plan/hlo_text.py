"""HLO text to instructions: what `compiled.as_text()` prints, on any backend."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "token": 0,
}  # fmt: skip
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")


class Array(NamedTuple):
    """An array of a program: in HBM, or on the chip (`S(1)` and above in its layout)."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> float:
        return float(math.prod(self.dims) * _BYTES.get(self.dtype, 1))  # float8 types have one


class Instruction(NamedTuple):
    name: str
    root: bool
    shapes: list[Array]  # of the result, a tuple's flattened
    opcode: str
    operands: list[str]
    attributes: str
    literal: str  # between the parentheses, as written


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Instructions by name of every computation, and the name of the entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.startswith("}") and not line.startswith("}}"):  # that ends an attribute
            current = None
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if found is None:
        return None
    rest = line[found.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, after = rest.partition("(")
    close = _closing("(" + after) - 1
    inside = after[:close]
    return Instruction(
        found[2], bool(found[1]), list(_arrays(shape)), opcode,
        re.findall(r"%([\w.\-]+)", inside), after[close + 1 :], inside,
    )  # fmt: skip


def _closing(text: str) -> int:
    """Where the parenthesis that `text` begins with is closed."""
    depth = 0
    for place in re.finditer(r"[()]", text):
        depth += 1 if place[0] == "(" else -1
        if depth == 0:
            return place.start()
    return len(text)


def _arrays(shape: str) -> Iterator[Array]:
    for dtype, dims, layout in _SHAPE.findall(shape):
        if dtype in _BYTES or dtype.startswith("f8"):
            sizes = tuple(int(d) for d in dims.split(",") if d)
            yield Array(dtype, sizes, not re.search(r"S\([1-9]", layout))


def called(i: Instruction, attribute: str) -> list[str]:
    """Names of the computations that an attribute gives."""
    found = []
    for braces, name in re.findall(
        rf"(?:^|[ ,])(?:{attribute})=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", i.attributes
    ):
        found += re.findall(r"[\w.\-]+", braces) if braces else [name]
    return found


def number(attributes: str, name: str) -> float:
    found = re.search(rf'"{name}":"?(\d+)', attributes)
    return float(found[1]) if found else 0.0


def groups(attributes: str) -> np.ndarray | None:
    """Devices of a collective's groups, one group a row; None where they are not told so."""
    if listed := re.search(r"replica_groups=\{(\{[\d,]*\}(?:,\{[\d,]*\})*)\}", attributes):
        rows = [row.split(",") for row in listed[1].strip("{}").split("},{")]
        return np.array(rows, int) if rows[0][0] and len(set(map(len, rows))) == 1 else None
    if iota := re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes
    ):
        return _in_order(iota[3]).reshape(int(iota[1]), int(iota[2]))
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\))?"
        r"\s*\{([^}]*)\}",
        attributes,
    )
    if mesh is None:
        return None
    sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    devices = _in_order(mesh[2] or f"[{math.prod(sizes.values())}]").reshape(*sizes.values())
    over = [list(sizes).index(axis) for axis in re.findall(r"'(\w+)'", mesh[3])]
    kept = [axis for axis in range(len(sizes)) if axis not in over]
    members = math.prod(devices.shape[axis] for axis in over)
    return devices.transpose(*kept, *over).reshape(-1, members)


def _in_order(iota: str) -> np.ndarray:
    """Ids as "[8,2]T(1,0)" has them: 0, 1, ... in that shape, its axes then in that order."""
    shape, _, order = iota.partition("T")
    sizes = [int(size) for size in re.findall(r"\d+", shape)]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(axis) for axis in re.findall(r"\d+", order)] or None).reshape(-1)


def group_size(attributes: str) -> int:
    """Devices of a group of a collective."""
    found = groups(attributes)
    return 1 if found is None else found.shape[1]


def beyond(attributes: str, node: int) -> float:
    """The share of what a device sends in a collective that leaves its node of so many devices.

    By as many rings as a group has devices in a node: each of them sends on for one.
    """
    if pairs := re.search(r"source_target_pairs=\{(.*?\})\}", attributes):
        ends = np.array(re.findall(r"\d+", pairs[1]), int).reshape(-1, 2) // node
        return float((ends[:, 0] != ends[:, 1]).any())
    found = groups(attributes)
    if found is None or (found // node == found[:, :1] // node).all():
        return 0.0
    return 1.0 / np.max(np.sum(found // node == found[:, :1] // node, axis=1))
