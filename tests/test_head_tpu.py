"""The Pallas TPU body in the TPU simulator: memory that nobody wrote is NaN, races are detected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from test_head import assert_close, cotangents, draw, ours, reference64, rows

from dppo_jax.kernels import tiles, tpu
from dppo_jax.kernels.head import head

V5P = AbstractDevice(device_kind="TPU v5", num_cores=2, platform="tpu")


def simulator(**options):
    return pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True, **options)


@pytest.fixture
def simulated(monkeypatch):
    monkeypatch.setattr(tpu, "INTERPRET", simulator())
    yield
    # The one part of the simulator that JAX does not export.
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    found = interpret_pallas_call.races is not None and interpret_pallas_call.races.races_found
    pltpu.reset_tpu_interpret_mode_state()
    assert not found


@pytest.fixture(scope="module", autouse=True)
def _checks_are_worth_something():
    """The simulator's tile has two products a step, and two halves of columns."""
    tile = tiles.TILES["CPU"]
    assert tile.rows == 2 * tile.product_rows == 32 and tile.columns == 2 * tiles.LANES


CASES = {  # tokens, width, vocabulary, ids, dtype, temperature, soft cap
    "one of everything": (1, 1, 1, 1, "float32", 1.0, None),
    "two row blocks, ragged, K=20": (40, 24, 700, 21, "bfloat16", 0.7, None),
    "wide, K=64, capped": (17, 130, 513, 65, "float32", 1.0, 5.0),
    "whole blocks, K=1": (32, 128, 512, 2, "float32", 2.5, 30.0),
    "two registers of ids, K=128": (5, 8, 130, 129, "bfloat16", 1.0, None),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_float64(case, simulated):
    tokens, width, vocabulary, stored, dtype, temperature, soft_cap = CASES[case]
    args = draw(len(case), tokens, width, vocabulary, stored, dtype)
    weights = cotangents(1, tokens, stored)
    options = dict(temperature=temperature, soft_cap=soft_cap)
    out, grads = ours(*args, weights, body="pallas_tpu", **options)
    want, want_grads = reference64(*args, weights, **options)
    for got, expected in zip(out, want, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
    for got, expected, arg in zip(grads, want_grads, args, strict=False):
        assert got.dtype == arg.dtype
        assert_close(got, expected, 5e-5 if dtype == "float32" else 2e-2)


compiled = jax.jit(lambda *args: head(*args, body="pallas_tpu"))


@settings(max_examples=6)
@given(data=st.data(), seed=st.integers(0, 2**31), scale=st.sampled_from([0.0, 3.0, 300.0]))
def test_any_ids_and_logits(data, seed, scale):
    """One program, drawn inputs: ids anywhere, also at block borders, twice, and outside."""
    tokens, vocabulary, chosen = 37, 600, 5
    anywhere = st.integers(-1, vocabulary)
    borders = st.sampled_from([0, 127, 128, 255, 256, 383, 511, 512, 599])
    row = st.lists(anywhere | borders, min_size=chosen, max_size=chosen)
    wanted = np.array(data.draw(st.lists(row, min_size=4, max_size=4)), "int32")
    ids = np.resize(wanted, (tokens, chosen))
    hidden, unembedding, _ = draw(seed, tokens, 8, vocabulary, 1, "float32", scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "INTERPRET", simulator())
        got = compiled(hidden, unembedding, jnp.asarray(ids))
    want, _ = reference64(hidden, unembedding, ids, [None, None, np.ones(tokens)])
    outside = (ids < 0) | (ids >= vocabulary)
    np.testing.assert_array_equal(np.isnan(got.logit_at), outside)
    for value, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-5 * max(scale, 1))


def test_extreme_rows(simulated):
    count = 300
    logits = np.stack([
        np.full(count, 1e4),
        np.full(count, -1e4),
        np.random.default_rng(0).choice([-1e4, 1e4], size=count),
        np.where(np.arange(count) == 299, 1e4, -1e4),  # one-hot, in the last block
        np.where(np.arange(count) == 0, 1e4, -1e4),
        np.zeros(count),
    ])  # fmt: skip
    ids = jnp.asarray(np.stack([np.arange(6), np.full(6, 299)], axis=1), "int32")
    weights = cotangents(0, 6, 2)
    args = (*rows(logits), ids)
    out, grads = ours(*args, weights, body="pallas_tpu")
    want, want_grads = reference64(*args, weights)
    for got, expected in zip((*out, *grads), (*want, *want_grads), strict=True):
        assert_close(got, expected, 1e-6)
    np.testing.assert_allclose(out.entropy, want[2], rtol=1e-6, atol=1e-6)


def test_minus_infinity_logits_have_probability_zero(simulated):
    column = np.where(np.arange(400) < 300, -np.inf, np.linspace(-1, 1, 400))  # a block and more
    unembedding = jnp.asarray(column[:, None], "float32")
    out = head(jnp.ones((1, 1)), unembedding, jnp.array([[399, 0]]), body="pallas_tpu")
    p = np.exp(column - np.log(np.exp(column).sum()))[300:]
    np.testing.assert_allclose(out.lse, np.log(np.exp(column).sum())[None], rtol=1e-6)
    np.testing.assert_allclose(out.entropy, -(p * np.log(p)).sum()[None], rtol=1e-6)
    np.testing.assert_array_equal(out.logit_at, [[1.0, -np.inf]])


def test_blocks_of_rows_past_the_count_are_not_computed(simulated):
    hidden, unembedding, ids = draw(0, 96, 8, 300, 2)
    count = 33  # the second block of 32 rows begins below it, the third does not
    transform = tpu.Transform(1.0, None)
    out = tpu.forward(hidden, unembedding, ids, transform, count)
    want, _ = reference64(hidden, unembedding, ids, [None, None, np.ones(96)])
    for got, expected in zip(out, want, strict=True):
        np.testing.assert_allclose(got[:64], expected[:64], rtol=2e-5, atol=2e-5)
    assert np.isnan(np.asarray(out[1][64:])).all()  # as the kernel leaves what it never meets


def test_unused_rows_may_hold_anything(simulated):
    hidden, unembedding, ids = draw(0, 40, 8, 300, 2)
    count = 19
    weights = [w.at[count:].set(0) for w in cotangents(2, 40, 2)]
    spoiled = hidden.at[count:].set(jnp.nan)
    out, grads = ours(spoiled, unembedding, ids, weights, body="pallas_tpu", count=count)
    want, want_grads = reference64(hidden, unembedding, ids, weights)
    for got, expected in zip(out, want, strict=True):
        np.testing.assert_allclose(got[:count], expected[:count], rtol=2e-5, atol=2e-5)
        np.testing.assert_array_equal(got[count:], 0)
    for got, expected in zip(grads, want_grads, strict=True):
        assert_close(got, expected, 5e-5)


def test_no_tokens(simulated):
    nothing = jnp.zeros((0, 3), "int32")
    out = head(jnp.ones((0, 8)), jnp.ones((10, 8)), nothing, body="pallas_tpu")
    assert out.lse.shape == (0,) and out.logit_at.shape == (0, 3)


def traced(*args, mesh=None, **options):
    def run():
        return str(jax.make_jaxpr(lambda *a: head(*a, **options))(*args))

    if mesh is None:
        return run()
    with jax.sharding.use_abstract_mesh(mesh):
        return run()


def test_the_body_follows_the_platform():
    args = draw(0, 4, 8, 50, 3)
    many_ids = (*args[:2], jnp.zeros((4, tpu.MOST_IDS + 1), "int32"))

    def mesh(devices, device):
        kind = {"axis_types": (AxisType.Auto,), "abstract_device": device}
        return AbstractMesh((devices,), ("x",), **kind)

    kernel = "head_forward"
    assert kernel not in traced(*args)
    assert kernel in traced(*args, mesh=mesh(1, V5P))
    assert kernel not in traced(*args, mesh=mesh(1, V5P), body="xla")
    # A Mosaic kernel cannot be partitioned by the compiler, only placed by shard_map.
    assert kernel not in traced(*args, mesh=mesh(2, V5P))
    assert kernel not in traced(*many_ids, mesh=mesh(1, V5P))
    with pytest.raises(ValueError, match=r"254 ids.*\(4, 255\).*body=\"xla\""):
        traced(*many_ids, mesh=mesh(1, V5P), body="pallas_tpu")
    with pytest.raises(ValueError, match=r"needs a TPU.*cpu.*hidden \(4, 8\).*body=\"xla\""):
        traced(*args, body="pallas_tpu")


def test_the_kernel_lowers_for_a_tpu():
    """Block shapes, primitives and types that Mosaic accepts, without libtpu."""
    shape = jax.ShapeDtypeStruct
    args = (
        shape((1000, 1000), jnp.bfloat16),
        shape((151936, 1000), jnp.float32),
        shape((1000, 21), jnp.int32),
    )
    one = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=V5P)
    with jax.sharding.use_abstract_mesh(one):
        lowered = jax.jit(head).trace(*args).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


@settings(max_examples=100)
@given(
    chip=st.sampled_from([name for name, tile in tiles.TILES.items() if tile]),
    tokens=st.integers(1, 40_000),
    width=st.integers(1, 4096),
    itemsize=st.sampled_from([2, 4]),
    lanes=st.sampled_from([128, 256]),
)
def test_a_tile_fits_its_chip(chip, tokens, width, itemsize, lanes):
    largest = tiles.TILES[chip]
    tile = tiles.fit(largest, tokens, width, itemsize, lanes)
    assert tiles.vmem_estimate(tile, width, itemsize, lanes) <= largest.vmem_bytes
    assert tile.rows % tile.product_rows == 0 and tile.product_rows % 16 == 0
    assert tile.columns % (2 * tiles.LANES) == 0
    assert tile.rows <= largest.rows and tile.columns <= largest.columns
    assert tile.rows < tokens + 2 * tile.product_rows  # no block of nothing


def test_a_width_that_no_tile_holds_goes_to_another_body():
    args = jnp.zeros((2, 10**5)), jnp.zeros((3, 10**5)), jnp.zeros((2, 1), "int32")
    one = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=V5P)
    assert "head_forward" not in traced(*args, mesh=one)
    with pytest.raises(ValueError, match=r"rows this wide.*\(2, 100000\).*body=\"xla\""):
        traced(*args, mesh=one, body="pallas_tpu")


def test_an_unknown_tpu_gets_the_smallest_tile_and_a_gpu_none():
    assert tiles.largest_tile(tiles.Target("tpu", "TPU v99", True)) == tiles.TILES["v4"]
    assert tiles.largest_tile(tiles.Target("tpu", "TPU7x", True)) == tiles.TILES["7x"]
    assert tiles.largest_tile(tiles.Target("gpu", "NVIDIA H100 80GB HBM3", True)) is None
