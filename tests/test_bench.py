"""What `dppo bench` prints, and the flops that it divides by."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from dppo_jax import bench, bench_sample
from dppo_jax.models.decoder import DecoderConfig

FLAGS = """--vocab 16 --width 8 --layers 1 --head-size 4 --mlp 12 --prompts 2 --samples 2
--prompt-length 3 --response-length 4 --top-k 2 --repeats 2 --microbatches 1""".split()
# One layer's matrices: q, k, v, o of 8 x 8, three of 8 x 12 in the MLP. A key attended to costs
# a product with the query and one with the weight: 2 x 8 multiply-adds over two heads of four.
LAYER, KEY, HEAD = 4 * 64 + 3 * 96, 2 * 8, 8 * 16
# 2 prompts of 3 tokens once (1 + 2 + 3 keys each), 4 sequences of 3 tokens (4 + 5 + 6 keys each),
# 2 + 4 * 3 predictions: the same work whether tokens are sampled or scored.
FORWARD = 2 * (LAYER * (6 + 12) + KEY * (2 * 6 + 4 * 15) + HEAD * 14)


def test_flops_by_hand():
    config = DecoderConfig(
        vocab_size=16, width=8, layers=1, heads=2, kv_heads=2, head_size=4, mlp_width=12
    )
    flops = bench.step_flops(config, prompts=2, samples=2, length=3, new=4)
    assert flops == {"sampling": FORWARD, "scoring": FORWARD, "update": 3 * FORWARD}


def test_flops_with_shared_keys():
    """Half the key-value heads save projections; every query head still attends to every key."""
    config = DecoderConfig(
        vocab_size=16, width=8, layers=3, heads=2, kv_heads=1, head_size=4, mlp_width=12
    )
    expected = 2 * (3 * ((LAYER - 64) * 5 + KEY * 7) + HEAD * 2)
    assert bench.forward_flops(config, tokens=5, contexts=7.0, predictions=2) == expected


def test_flops_of_experts():
    """Each token goes through two of four MLPs, and the router."""
    config = DecoderConfig(
        vocab_size=16, width=8, layers=3, heads=2, kv_heads=2, head_size=4, mlp_width=12,
        experts=4, experts_per_token=2,
    )  # fmt: skip
    expected = 2 * (3 * ((LAYER + 3 * 96 + 8 * 4) * 5 + KEY * 7) + HEAD * 2)
    assert bench.forward_flops(config, tokens=5, contexts=7.0, predictions=2) == expected


def test_bench_step_of_experts(dppo, monkeypatch):
    monkeypatch.setattr(bench, "PEAK_SIZE", 64)
    flags = ("--kv-heads", 1, "--experts", 3, "--experts-per-token", 2)
    done = dppo("bench", "step", "--json", *FLAGS, *flags)
    assert done.status == 0, done.err
    shape = json.loads(done.out)["shape"]
    assert (shape["kv_heads"], shape["experts"], shape["experts_per_token"]) == (1, 3, 2)
    attention = 2 * 64 + 2 * 8 * 4 + 2 * 4
    assert shape["parameters"] == HEAD + 8 + 2 * 8 + attention + 3 * 3 * 96 + 8 * 3


def test_bench_step(dppo, monkeypatch):
    monkeypatch.setattr(bench, "PEAK_SIZE", 64)  # the peak itself takes a second
    done = dppo("bench", "step", "--json", *FLAGS)
    assert done.status == 0 and not done.err
    assert done.out.count("\n") == 1
    result = json.loads(done.out)
    parts = result["parts"]
    assert {name: part["flops"] for name, part in parts.items()} == {
        "sampling": FORWARD,
        "scoring": FORWARD,
        "update": 3 * FORWARD,
    }
    peak = result["peak_flops_per_second"]
    for part in parts.values():
        assert 0 < part["seconds_min"] <= part["seconds"]
        assert part["fraction_of_peak"] == pytest.approx(part["flops"] / part["seconds"] / peak)
    assert result["seconds"] == pytest.approx(
        parts["sampling"]["seconds"] + parts["update"]["seconds"]
    )
    assert result["flops"] == 4 * FORWARD
    assert result["fraction_of_peak"] == pytest.approx(result["flops"] / result["seconds"] / peak)
    assert result["tokens_per_second"] == pytest.approx(4 * 4 / result["seconds"])
    # embedding 16 x 8 (tied), one layer, three norms of 8
    assert result["shape"]["parameters"] == 128 + LAYER + 24


def test_a_cpu_becomes_two_devices_where_nobody_said_otherwise():
    start = "from dppo_jax.verbs import command; command.start_jax(cpu_devices=2)"
    counted = f"{start}; import jax; print(jax.device_count())"
    asked = "--xla_force_host_platform_device_count=3"
    for flags, devices in (("", min(2, os.cpu_count() or 1)), (asked, 3)):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        run = [sys.executable, "-c", counted]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == str(devices), done.stderr


def test_bench_step_for_people(capsys):
    part = dict(seconds=0.5, seconds_min=0.5, flops=2e9, fraction_of_peak=0.25)
    names = ("sampling", "scoring", "update")
    bench.show_step(
        part
        | dict(parts={n: part for n in names}, tokens_per_second=1234.5, peak_flops_per_second=1e10)
    )
    shown = capsys.readouterr().out
    for text in (*names, "0.500 s", "2.0 GFLOP", "25% of peak", "1,234", "10 GFLOP/s"):
        assert text in shown


def test_the_head_is_measured_in_every_form_that_runs_here(dppo):
    """Small sizes: what is checked is the report, not the speed."""
    run = dppo(
        "bench", "head", "--json", "--tokens=64", "--width=8", "--vocab=300", "--top-k=3",
        "--repeats=1",
    )  # fmt: skip
    assert run.status == 0, run.err
    result = json.loads(run.out)
    assert set(result["forms"]) == {
        "naive", "chunked", "xla", "pallas_tpu", "single_pass", "tokamax"
    }  # fmt: skip
    assert "TPU" in result["forms"]["pallas_tpu"]["skipped"]
    for form in ("naive", "chunked", "xla", "single_pass"):
        for part in ("forward", "both"):
            found = result["forms"][form][part]
            assert found["seconds"] > 0 and found["temporary_bytes"] >= 0
            assert found["fraction_of_useful_peak"] <= found["fraction_of_peak"]
    product = 2 * 64 * 8 * 300
    assert result["forms"]["single_pass"]["both"]["flops"] == 3 * product
    assert result["forms"]["xla"]["both"]["flops"] == 4 * product


def test_the_forms_of_the_head_compute_the_same_thing():
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dppo_jax.bench_head import FORMS

    keys = jax.random.split(jax.random.key(0), 4)
    arrays = (
        jax.random.normal(keys[0], (24, 6)),
        jax.random.normal(keys[1], (40, 6)),
        jax.random.randint(keys[2], (24, 4), 0, 40),
        jax.random.normal(keys[3], (24,)),
    )
    results = {
        name: jax.jit(jax.value_and_grad(FORMS[name], (0, 1), has_aux=True))(*arrays)
        for name in ("naive", "chunked", "xla", "single_pass")
    }
    for got in results.values():
        for a, b in zip(*map(jax.tree.leaves, (got, results["naive"])), strict=True):
            np.testing.assert_allclose(jnp.asarray(a), b, atol=2e-5)


def test_a_form_that_does_not_exist(dppo):
    run = dppo("bench", "head", "--forms=xla,fast")
    assert run.status == 2 and "unknown form 'fast'; known: naive, chunked" in run.err


def test_bench_sample(dppo, monkeypatch):
    """Twelve responses of a long tail on four slots, with continuous batching and without."""
    monkeypatch.setattr(bench, "PEAK_SIZE", 64)
    monkeypatch.setattr(bench_sample, "STREAM_BYTES", 2**16)
    model = dict(width=8, layers=1, heads=2, kv_heads=1, head_size=4, mlp_width=12)
    tiny = bench_sample.Shape(model, 16, 12, 1, 4, 28, 4, tail_median=4, chunk=4)
    monkeypatch.setitem(bench_sample.PRESETS, "long-tail", tiny)
    flags = ("--repeats", 1, "--top-k", 2, "--page-size", 32)
    done = dppo("bench", "sample", "long-tail", "--json", *flags)
    assert done.status == 0, done.err
    result = json.loads(done.out)
    forms = result["forms"]
    assert set(forms) == {"recorded", "plain", "static"}
    lengths = bench_sample.tail_lengths(12, 4, 28)
    assert result["shape"]["tokens"] == lengths.sum() and result["shape"]["chunk"] == 4
    for form in forms.values():
        assert form["tokens_per_second"] == pytest.approx(lengths.sum() / form["seconds"])
        assert form["fraction_of_limit"] == pytest.approx(result["limit_seconds"] / form["seconds"])
    assert forms["static"]["slots_busy"] < forms["recorded"]["slots_busy"] <= 1
    none = dppo("bench", "sample", "long-tail", "--chunk", 0)
    assert none.status == 2 and none.err.strip() == "dppo: chunk=0 must be at least 1"
    assert dppo("bench", "sample", "nothing").err.strip().startswith("dppo: unknown preset")


def test_tail_lengths():
    lengths = bench_sample.tail_lengths(2000, 64, 512)
    assert 58 < np.median(lengths) < 70 and lengths.max() == 512 and lengths.min() >= 1
    assert 0.005 < (lengths == 512).mean() < 0.02


def test_the_floor_of_sampling_by_hand():
    """One layer, 2 x 2 samples of 3 tokens on 4 slots: three steps read all weights."""
    model = dict(width=8, layers=1, heads=2, kv_heads=2, head_size=4, mlp_width=12)
    config = DecoderConfig(vocab_size=16, **model)
    shape = bench_sample.Shape(model, 16, 2, 2, 5, 3, 4)
    weights = 4 * (LAYER + HEAD + 8 * 3)  # bytes; three norms
    # A token's keys and values are 2 x 8 numbers. 6 keys a sample of its own, and 3 times the
    # prompt's 5 for each of two prompts.
    read = 3 * weights + 2 * 8 * 4 * (4 * 6 + 2 * 3 * 5)
    floor = bench_sample._floor_seconds(config, shape, np.array([3, 3]), 1e30, 1.0, "model")
    assert floor == pytest.approx(read)
    flops = 2 * (LAYER * (4 * 3 + 10) + KEY * (4 * (6 + 15) + 2 * 15) + HEAD * 12)
    floor = bench_sample._floor_seconds(config, shape, np.array([3, 3]), 1.0, 1e30, "model")
    assert floor == pytest.approx(flops)
