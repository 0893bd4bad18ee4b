"""Tile sizes of the Pallas head: a table of data a chip generation, and the rule that fits it.

Nothing here was timed. The sizes are those at which, compiled with libtpu for v5e and v6e at widths
1024 and 4096, a product takes fewer instruction bundles than the matrix unit needs cycles, so that
the vector unit's work is hidden.
"""

from typing import NamedTuple

import jax

MIB = 2**20
LANES = 128  # of a TPU's vector register


class Tile(NamedTuple):
    """A grid step of the Pallas forward: [rows, D] of hidden against [columns, D] of W."""

    rows: int  # a multiple of product_rows
    columns: int  # a multiple of 256: two halves of whole lanes
    product_rows: int  # of one product within the step; a multiple of 16, bfloat16's sublanes
    vmem_bytes: int  # what the kernel may take of a core's vector memory


# The largest tile a chip. v4 has 16 MiB of vector memory a core, v5p and 7x 64, v5e and v6e 128;
# XLA needs some of it around the kernel. None: the Pallas body does not run there. The CPU only
# interprets, for tests, so its tile is the smallest that has every part of the kernel in it.
TILES: dict[str, Tile | None] = {
    "v4": Tile(512, 512, 256, 16 * MIB),
    "v5e": Tile(1024, 1024, 256, 96 * MIB),
    "v5p": Tile(1024, 1024, 256, 56 * MIB),
    "v6e": Tile(1024, 1024, 256, 96 * MIB),
    "7x": Tile(1024, 1024, 256, 56 * MIB),
    "H100": None,
    "CPU": Tile(32, 256, 16, 16 * MIB),
}
# Chunks of tokens of the single pass. A chunk's logits and their cotangents are its workspace: a
# sixteenth of the tokens keeps it below a tenth of N x V x 4 bytes (4 + 2 bytes a logit). More
# chunks would cost time: each reads and writes all of dW once, 8VD bytes for 6VD flops a token.
SINGLE_PASS_CHUNKS = 16
# Nor are chunks smaller than this, for the same traffic: two CPU cores took 4.34 s with it and
# 4.69 s with half of it, at (2048, 512, 151936) in float32.
SINGLE_PASS_LEAST_TOKENS = 512
# Columns of W that the single pass multiplies at once; all where a chip is not named. Two CPU
# cores made 230 GFLOP/s of one product of all columns, which goes to memory and back for each sum,
# and 320 of blocks that stay in the cache.
SINGLE_PASS_COLUMNS = {"CPU": 2048}
# A block of W this large takes microseconds to read, long beside the fixed cost of a grid step;
# a larger one only makes the program longer.
_BLOCK_BYTES = 4 * MIB
# Of the vector memory, the share that the estimate may fill; v4 took 7 % more than estimated.
_FILL = 0.85
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "7x",
}


class Target(NamedTuple):
    """What a program is being traced for."""

    platform: str  # "cpu", "gpu", "tpu"
    kind: str  # JAX's device_kind
    one_device: bool  # the code being traced runs on one device: no partitioner touches it


def target() -> Target:
    """The device of the mesh in force (`jax.set_mesh`, `shard_map`), or the default one.

    A mesh of a TPU topology that is not attached counts, which is how a CPU process compiles for
    it. one_device: inside a shard_map over all axes, or where there is one device in all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.abstract_device is not None:
        manual = set(mesh.manual_axes) == set(mesh.axis_names)
        device = mesh.abstract_device
        return Target(device.platform, device.device_kind, manual or mesh.size == 1)
    default = jax.devices()[0]
    return Target(default.platform, default.device_kind, jax.device_count() == 1)


def _row(target: Target) -> str:
    """Of the tables; a TPU that is not in them is a v4, whose tiles are the smallest."""
    return {"cpu": "CPU", "tpu": _KINDS.get(target.kind, "v4")}.get(target.platform, "H100")


def largest_tile(target: Target) -> Tile | None:
    """The tile of a device's row."""
    return TILES[_row(target)]


def single_pass_columns(target: Target, vocabulary: int) -> int:
    """Columns of W that the single pass multiplies at once on a device."""
    return min(vocabulary, SINGLE_PASS_COLUMNS.get(_row(target), vocabulary))


def vmem_estimate(tile: Tile, width: int, itemsize: int, lanes: int) -> int:
    """Bytes of vector memory of a grid step of `tpu.forward`.

    hidden once, W twice (double buffers), ids and output twice, three statistics, the logits of two
    products and twice as much again for the registers that the compiler spills.
    """
    padded = -(-width // LANES) * LANES
    inputs = (tile.rows + 2 * tile.columns) * padded * itemsize
    rows = (4 * lanes + 3 * LANES) * tile.rows * 4
    return inputs + rows + 3 * tile.product_rows * tile.columns * 4


def fit(tile: Tile, tokens: int, width: int, itemsize: int, lanes: int) -> Tile | None:
    """The largest tile within `tile` for a shape: no more rows than tokens, and within its memory.

    None where the width is too large for any.
    W is read once for every `rows` rows, so columns are halved first and rows only when they must.
    """
    columns = tile.columns
    while columns > 2 * LANES and columns * width * itemsize > _BLOCK_BYTES:
        columns //= 2
    product_rows = min(tile.product_rows, _up(max(tokens, 1), 16))
    rows = min(tile.rows, _up(tokens, product_rows))
    fitted = Tile(rows, columns, product_rows, tile.vmem_bytes)
    while vmem_estimate(fitted, width, itemsize, lanes) > _FILL * tile.vmem_bytes:
        if fitted.columns > 2 * LANES:
            fitted = fitted._replace(columns=fitted.columns // 2)
        elif fitted.rows > product_rows:
            fitted = fitted._replace(rows=_up(fitted.rows // 2, product_rows))
        elif product_rows > 16:
            product_rows = _up(product_rows // 2, 16)
            fitted = fitted._replace(rows=product_rows, product_rows=product_rows)
        else:
            return None
    return fitted


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
