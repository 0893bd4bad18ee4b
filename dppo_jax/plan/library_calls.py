"""Calls of NVIDIA's libraries in a GPU's program: what they multiply, and what is room to work."""

import math
import re

from dppo_jax.plan.hlo_text import Array, Instruction, number

_PRODUCTS, _ATTENTION = "__cublas$", "__cudnn$fmha"


def target(i: Instruction) -> str:
    """The function that a custom call names."""
    found = re.search(r'custom_call_target="([^"]*)"', i.attributes)
    return found[1] if found else ""


def flops(i: Instruction, operands: list[Instruction]) -> float:
    """Of a product of cuBLAS or an attention of cuDNN; of another kernel, what its author says."""
    name = target(i)
    if name.startswith(_PRODUCTS):
        dims = operands[0].shapes[0].dims
        over = _numbers(i, "lhs_contracting_dimensions")
        return 2.0 * math.prod(i.shapes[0].dims) * math.prod(dims[d] for d in over)
    if name.startswith(_ATTENTION):
        scores = math.prod(_numbers(i, "dimensions"))  # [batch, heads, queries, keys]
        products = 5 if name.endswith("Backward") else 2
        return 2.0 * products * scores * operands[0].shapes[0].dims[-1]
    return number(i.attributes, "flops")


def results(i: Instruction) -> list[Array]:
    """What an instruction makes, less the room that a library works in."""
    if not target(i).startswith((_PRODUCTS, "__cudnn$")):
        return i.shapes
    return [shape for shape in i.shapes if shape.dtype not in ("s8", "u8")]


def _numbers(i: Instruction, name: str) -> list[int]:
    """The first list of that name, its numbers as texts."""
    found = re.search(rf'"{name}":\s*\[([^\]]*)\]', i.attributes)
    return [int(n) for n in re.findall(r"\d+", found[1])] if found else []
