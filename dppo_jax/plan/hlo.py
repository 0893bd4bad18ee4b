"""What a compiled program does, read from its HLO text, every loop counted as often as it runs.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs; a decoder that is
scanned over its layers would look as if it had one.
"""

import math
import re
from dataclasses import dataclass, field

from dppo_jax.kernels.chips import Chip, Node
from dppo_jax.plan import library_calls
from dppo_jax.plan.hlo_text import Instruction, beyond, called, group_size, number, parse

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
# Operations that move nothing: names for what is there, and ends of what was counted at its start.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id "
    "add-dependency opt-barrier domain copy-done slice-done async-done async-update".split()
)
_UNKNOWN_CYCLES = 2.0**62  # what libtpu writes where it has no estimate


@dataclass
class Moved:
    """Collectives of one kind."""

    count: float = 0.0
    bytes: float = 0.0  # that a device sends


@dataclass
class Costs:
    """Of one device. `seconds` adds up each operation at the chip's peaks, transfers apart."""

    flops: float = 0.0  # of matrix products; a Pallas kernel's are its author's estimate
    bytes: float = 0.0  # to and from HBM
    seconds: float = 0.0
    cycles: float = 0.0  # libtpu's estimates, where it has one
    collectives: dict[str, Moved] = field(default_factory=dict)
    far: float = 0.0  # bytes that a device sends beyond its node
    unknown_loops: int = 0  # whose trips depend on data

    def add(self, other: "Costs", times: float = 1.0) -> None:
        for name in ("flops", "bytes", "seconds", "cycles", "far"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for kind, moved in other.collectives.items():
            mine = self.collectives.setdefault(kind, Moved())
            mine.count += times * moved.count
            mine.bytes += times * moved.bytes
        self.unknown_loops += other.unknown_loops

    @property
    def sent(self) -> float:
        """Bytes that a device sends, over all kinds."""
        return sum(moved.bytes for moved in self.collectives.values())

    def roofline(self, chip: Chip, node: Node | None = None) -> float:
        """Seconds with every operation at a peak, and transfers behind the work if they fit."""
        between = self.far / node.network_bytes if node else 0.0
        return max(self.seconds, self.sent / chip.link_bytes, between)


def costs_of(
    text: str,
    chip: Chip,
    *,
    unknown_trips: int = 1,
    outer_trips: int | None = None,
    node: Node | None = None,
) -> tuple[Costs, Costs]:
    """Costs of the program (each loop as often as it runs), and with each loop's body once.

    A loop whose trips are not in the program counts `unknown_trips`, one that has such a loop
    inside `outer_trips`, where that is told.
    """
    module = _Module(text, chip, node)
    return module.total(unknown_trips, outer_trips or unknown_trips), module.once()


class _Module:
    def __init__(self, text: str, chip: Chip, node: Node | None):
        self._chip, self._node = chip, node
        self._computations, self._entry = parse(text)
        self._loops_once = False
        self._unknown_trips = self._outer_trips = 1
        self._known: dict[str, Costs] = {}

    def total(self, unknown_trips: int, outer_trips: int) -> Costs:
        self._known, self._loops_once = {}, False
        self._unknown_trips, self._outer_trips = unknown_trips, outer_trips
        return self._of(self._entry)

    def once(self) -> Costs:
        self._known, self._loops_once = {}, True
        return self._of(self._entry)

    def _of(self, name: str) -> Costs:
        if name not in self._known:
            total = Costs()
            instructions = self._computations.get(name, {})
            for instruction in instructions.values():
                total.add(*self._one(instruction, instructions))
            self._known[name] = total
        return self._known[name]

    def _one(self, i: Instruction, around: dict[str, Instruction]) -> tuple[Costs, float]:
        """Costs of one instruction, and how often they count."""
        if i.opcode == "while":
            body = Costs()
            body.add(self._of(called(i, "body")[0]))
            trips = 1.0 if self._loops_once else self._trips(i, around)
            if trips is None:
                trips = float(self._outer_trips if body.unknown_loops else self._unknown_trips)
                body.unknown_loops += 1
            return body, trips
        if i.opcode == "conditional":
            names = called(i, "branch_computations|true_computation|false_computation")
            branches = [self._of(name) for name in names]
            return max(branches, key=lambda c: (c.seconds, c.flops), default=Costs()), 1.0
        if i.opcode in ("call", "call-start", "async-start"):
            inside = Costs()
            for name in called(i, "to_apply|calls|called_computations"):
                inside.add(self._of(name))
            return inside, 1.0
        return self._leaf(i, around), 1.0

    def _leaf(self, i: Instruction, around: dict[str, Instruction]) -> Costs:
        if i.opcode in _FREE or i.opcode.endswith("-done"):
            return Costs()
        cycles = number(i.attributes, "estimated_cycles")
        costs = Costs(cycles=cycles if cycles < _UNKNOWN_CYCLES else 0.0)
        operands = [around[name] for name in i.operands if name in around]
        kind = i.opcode.removesuffix("-start")
        fused = self._computations.get((called(i, "calls") or [""])[0], {})
        if kind in COLLECTIVES:
            self._send(costs, kind, i, operands)
            return costs
        if i.opcode == "fusion":
            self._inside(costs, fused)
        else:
            costs.flops = _product_flops(i, around)
        costs.bytes = self._traffic(i, operands, fused)
        chip = self._chip
        costs.seconds = max(costs.flops / chip.bf16_flops, costs.bytes / chip.memory_bytes)
        return costs

    def _inside(self, costs: Costs, fused: dict[str, Instruction]) -> None:
        """Products and collectives within a fusion."""
        # libtpu writes a collective that runs behind products again in each of their fusions.
        starts = any("AsyncCollectiveStart" in i.attributes for i in fused.values())
        for i in fused.values():
            kind = i.opcode.removesuffix("-start")
            if kind in COLLECTIVES and "chain_id" in i.attributes and not starts:
                continue
            if kind in COLLECTIVES:
                operands = [fused[name] for name in i.operands if name in fused]
                # libtpu writes a reduce-scatter as an all-reduce of which each takes its part.
                parts = kind == "all-reduce" and "all-reduce-scatter" in i.name + i.attributes
                self._send(costs, "reduce-scatter" if parts else kind, i, operands)
            elif i.opcode == "fusion":
                for name in called(i, "calls"):
                    self._inside(costs, self._computations.get(name, {}))
            else:
                costs.flops += _product_flops(i, fused)

    def _send(self, costs: Costs, kind: str, i: Instruction, operands: list[Instruction]) -> None:
        given = sum(shape.bytes for operand in operands for shape in operand.shapes)
        others = 1.0 - 1.0 / group_size(i.attributes)
        sent = {
            "all-gather": given * (group_size(i.attributes) - 1.0),
            "all-reduce": 2.0 * given * others,
            "reduce-scatter": given * others,
            "all-to-all": given * others,
            "ragged-all-to-all": given * others,
        }.get(kind, given)
        if group_size(i.attributes) > 1 or kind.startswith("collective"):
            costs.far += sent * beyond(i.attributes, self._node.devices) if self._node else 0.0
            moved = costs.collectives.setdefault(kind, Moved())
            moved.count += 1
            moved.bytes += sent

    def _traffic(
        self, i: Instruction, operands: list[Instruction], fused: dict[str, Instruction]
    ) -> float:
        """Bytes to and from HBM: read and written; of a slice or an update, that part only."""
        written = [shape for shape in library_calls.results(i) if shape.in_hbm]
        if i.opcode in ("copy-start", "slice-start"):
            # (to, from, context) of a copy, ((from), to, context) of a slice
            to = i.shapes[0 if i.opcode == "copy-start" else 1]
            return to.bytes * (to.in_hbm + _in_hbm(operands))
        if i.opcode == "dynamic-update-slice":
            return 2.0 * operands[1].shapes[0].bytes if written else 0.0
        if i.opcode in ("slice", "dynamic-slice", "gather"):
            return sum(s.bytes * (s.in_hbm + _in_hbm(operands[:1])) for s in i.shapes)
        out = sum(shape.bytes for shape in written)
        if not fused:
            return out + sum(s.bytes for o in operands for s in o.shapes if s.in_hbm)
        read = 0.0
        for parameter, operand in zip(_parameters(fused), operands, strict=False):
            if operand.shapes and operand.shapes[0].in_hbm:
                read += self._read_of(parameter, fused)
        return read + _written_by(fused, out)

    def _read_of(self, parameter: Instruction, fused: dict[str, Instruction]) -> float:
        """Bytes that a fusion reads of a parameter."""
        whole = sum(shape.bytes for shape in parameter.shapes)
        total = 0.0
        for user in fused.values():
            if parameter.name not in user.operands:
                continue
            if user.opcode in ("bitcast", "copy") and not user.root:
                total += self._read_of(user, fused)
            elif user.opcode in ("slice", "dynamic-slice", "gather") and (
                user.operands[0] == parameter.name
            ):
                total += sum(shape.bytes for shape in user.shapes)
            elif user.opcode == "fusion":  # libtpu writes a slice for a product so
                inner = self._computations.get((called(user, "calls") or [""])[0], {})
                for name, given in zip(_parameters(inner), user.operands, strict=False):
                    if given == parameter.name:
                        total += self._read_of(name, inner)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
                continue  # written in place
            else:
                return whole
        return min(total, whole)

    def _trips(self, i: Instruction, around: dict[str, Instruction]) -> float | None:
        """How often a loop runs: as XLA says, or from a condition `counter < constant`."""
        if known := re.search(r'known_trip_count"?:?=?\{"?n"?:"?(\d+)', i.attributes):
            return float(known[1])
        condition = self._computations.get((called(i, "condition") or [""])[0], {})
        compare = next((c for c in condition.values() if c.opcode == "compare"), None)
        fused: dict[str, Instruction] = {}
        if compare is None:  # fused
            for c in condition.values():
                for name in called(c, "calls"):
                    inner = self._computations.get(name, {})
                    if [x.opcode for x in inner.values() if x.root] == ["compare"]:
                        compare, fused = c, inner  # the limit may be in it, or be given to it
        root = next((c for c in condition.values() if c.root), None)
        if compare is None or compare is not root:
            return None  # more than a counter decides
        limits = [
            limit
            for value in (*map(condition.get, compare.operands), *fused.values())
            if (limit := self._constant(value, i, around)) is not None
        ]
        return limits[-1] if limits else None

    def _constant(
        self, value: Instruction | None, loop: Instruction, around: dict[str, Instruction]
    ) -> float | None:
        """A whole number that the program holds, in the condition or carried unchanged into it."""
        if value is None:
            return None
        if value.opcode == "constant":
            return float(value.literal) if re.fullmatch(r"-?\d+", value.literal) else None
        index = re.search(r"index=(\d+)", value.attributes)
        if value.opcode == "get-tuple-element" and index and loop.operands:
            given = around.get(loop.operands[0])
            if given is not None and given.opcode == "tuple":
                element = around.get(given.operands[int(index[1])])
                # What begins at 0 is the counter.
                if element is not None and element.opcode == "constant":
                    number = element.literal
                    if re.fullmatch(r"\d+", number) and int(number) > 0:
                        return float(number)
        return None


def _product_flops(i: Instruction, around: dict[str, Instruction]) -> float:
    """2 x multiply-adds of a product of matrices."""
    operands = [around[name] for name in i.operands if name in around]
    if i.opcode == "custom-call":
        return library_calls.flops(i, operands)
    if i.opcode not in ("dot", "convolution", "ragged-dot"):
        return 0.0
    if len(operands) < 2:
        return 0.0
    out, left, right = (math.prod(x.shapes[0].dims) for x in (i, operands[0], operands[1]))
    if i.opcode == "dot":
        dims = operands[0].shapes[0].dims
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
        over = [int(d) for d in contracted[1].split(",") if d] if contracted else []
        return 2.0 * out * math.prod(dims[d] for d in over)
    if i.opcode == "ragged-dot":
        return 2.0 * left * i.shapes[0].dims[-1]
    return 2.0 * _convolution_products(i, operands, out)


def _convolution_products(i: Instruction, operands: list[Instruction], out: int) -> float:
    """Multiply-adds of a convolution, which is what a TPU's compiler makes of every product.

    Batch dimensions become windows over a dilated operand: only one place of a window is not 0.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    if labels is None:
        return 0.0
    lhs, rhs = operands[0].shapes[0].dims, operands[1].shapes[0].dims
    total = float(out) * rhs[labels[2].index("i")]
    window = dict(re.findall(r"(\w+)=([\w\-]+)", _window(i.attributes)))
    spatial = [c for c in labels[1] if c.isdigit()]
    for axis in spatial:
        n = int(axis)
        size = rhs[labels[2].index(axis)]
        places = i.shapes[0].dims[labels[3].index(axis)]

        def each(name: str, default: int, n: int = n) -> int:
            parts = window.get(name, "").split("x")
            return int(parts[n]) if name in window else default

        low = int(window["pad"].split("x")[n].split("_")[0]) if "pad" in window else 0
        pairs = _window_pairs(
            places, size, each("stride", 1), low, each("lhs_dilate", 1), each("rhs_dilate", 1),
            lhs[labels[1].index(axis)],
        )  # fmt: skip
        total *= pairs / places
    return total


def _window(attributes: str) -> str:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    return found[1] if found else ""


def _window_pairs(
    places: int, size: int, stride: int, low: int, dilate: int, spread: int, given: int
) -> int:
    """Pairs (place, element of the window) that meet an element of the input, of `given`."""
    if dilate == 1 and stride == 1 and spread == 1 and low == 0:
        return places * min(size, given)
    last = (given - 1) * dilate
    return sum(
        1
        for place in range(places)
        for element in range(size)
        if 0 <= (at := place * stride + element * spread - low) <= last and at % dilate == 0
    )


def _parameters(fused: dict[str, Instruction]) -> list[Instruction]:
    """Of a fusion's computation, in the order of its operands."""
    found = [i for i in fused.values() if i.opcode == "parameter" and i.literal]
    return sorted(found, key=lambda i: int(i.literal))


def _in_hbm(operands: list[Instruction]) -> bool:
    return any(shape.in_hbm for operand in operands for shape in operand.shapes[:1])


def _written_by(fused: dict[str, Instruction], out: float) -> float:
    root = next((i for i in fused.values() if i.root), None)
    while root is not None and root.opcode == "bitcast" and root.operands[0] in fused:
        root = fused[root.operands[0]]
    if root is not None and root.opcode == "dynamic-update-slice" and root.operands[1] in fused:
        return min(out, fused[root.operands[1]].shapes[0].bytes)
    return out
