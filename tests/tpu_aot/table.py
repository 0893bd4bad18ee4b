"""The head compiled for every TPU generation and shape, as a table; minutes on two cores.

    python tests/tpu_aot/table.py [CHIP ...]

Exit status 1 where temporary memory exceeds a tenth of N x V float32 logits.
"""

import sys

from dppo_jax.kernels.plan import SHAPES, compile_table

LARGEST_SHARE = 0.1


def line(row):
    """A row of `compile_table` for people."""
    shape = f"{row['tokens']} x {row['width']} x {row['vocabulary']}"
    compiler = row["compiler_seconds"]
    seconds = "       -" if compiler is None else f"{1e3 * compiler:8.1f}"
    return (
        f"{row['chip']:4} {row['form']:17} {shape:22} {row['temporary_bytes'] / 1e6:8.1f} MB"
        f" {100 * row['temporary_share']:6.2f} % {row['flops'] / 1e12:7.1f} TFLOP"
        f" {seconds} ms, roofline {1e3 * row['roofline_seconds']:6.1f} ms"
        f" compiled in {row['compile_seconds']:.0f} s"
    )


if __name__ == "__main__":
    worst = 0.0
    for chip in sys.argv[1:] or ("v4", "v5e", "v5p", "v6e", "7x"):
        for shape in SHAPES:
            for row in compile_table((chip,), (shape,)):
                print(line(row), flush=True)
                worst = max(worst, row["temporary_share"])
    sys.exit(worst > LARGEST_SHARE)
