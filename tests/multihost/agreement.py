"""Run by test_multihost.py in two processes of two devices: prints what they agreed on."""

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from dppo_jax import clusters, hosts, multihost
from dppo_jax.elsewhere import Elsewhere, divide
from dppo_jax.models.decoder import DecoderConfig, Model
from dppo_jax.records import Prompts
from dppo_jax.sampling.engine import EngineConfig
from dppo_jax.sampling.generate import SamplingConfig
from dppo_jax.sampling.rollouts import Continuous, Lockstep, RolloutContext
from dppo_jax.sharding import MeshConfig, batch_sharding, shardings_of


def refused(call, *arguments) -> str:
    try:
        call(*arguments)
    except ValueError as error:
        return str(error)
    return ""


def round_trip(sizes: dict[str, int]) -> dict:
    """Rows that each process numbers by its share, through the devices and back."""
    mesh = MeshConfig(**sizes).build()
    share, sharding = multihost.row_share(mesh), batch_sharding(mesh)
    own = np.arange(share.index * 100, share.index * 100 + 8, dtype=np.int32)[:, None]
    whole = multihost.to_global_rows(own, sharding)
    everyone = multihost.split_rows(np.arange(16), sharding)
    spread = jax.device_put(whole, jax.NamedSharding(mesh, jax.P()))
    return {
        "share": [share.index, share.count, list(share.leaders), share.leads],
        "whole": np.asarray(spread.addressable_data(0)).ravel().tolist(),
        "back": bool((multihost.to_local_rows(whole, sharding) == own).all()),
        "back_from_copies": bool((multihost.to_local_rows(spread, sharding) == own).all()),
        "split": sorted({int(x) for s in everyone.addressable_shards for x in s.data}),
        "parts": multihost.gather_parts(own[:1], share).ravel().tolist(),
    }


def drawn_by_engine() -> dict:
    """Eight responses by continuous batching, four slots over all devices; whole, and this part."""
    mesh = MeshConfig(fsdp=-1).build()
    model = Model(
        DecoderConfig(
            vocab_size=16, width=8, layers=1, heads=2, kv_heads=2, head_size=4, mlp_width=8
        )
    )
    params = jax.jit(model.init, out_shardings=shardings_of(model.logical_axes, mesh))(
        jax.random.key(0)
    )
    settings = SamplingConfig(
        max_new_tokens=6, samples_per_prompt=2, top_k_capture=2, end_ids=(3, 5)
    )
    engine = EngineConfig(slots=4, max_context=16, chunk=3, page_size=16, prefix_cache=False)
    source = Continuous(RolloutContext(model, mesh, Speechless(), 3, settings), engine)
    share, rows = multihost.row_share(mesh), batch_sharding(mesh)
    own = slice(share.index * 4 // share.count, (share.index + 1) * 4 // share.count)
    tokens, mask = np.arange(12, dtype=np.int32).reshape(4, 3), np.ones((4, 3), bool)
    prompts = Prompts(*multihost.to_global_rows((tokens[own], mask[own]), rows))
    with jax.set_mesh(mesh):
        drawn = source.rollout(params, prompts, jax.random.key(1), settings)
    return {
        "tokens": multihost.everywhere(drawn.response_tokens).tolist(),
        "logp": multihost.everywhere(drawn.logp_rollout).tolist(),
        "own": multihost.to_local_rows(drawn.response_tokens, rows).tolist(),
    }


def drawn_apart() -> dict:
    """Eight responses drawn by the first device of each process for the others, and by these."""
    sampling, training = divide(jax.devices(), 1)
    mesh = MeshConfig(fsdp=-1).build(training)
    model = Model(
        DecoderConfig(
            vocab_size=16, width=8, layers=1, heads=2, kv_heads=2, head_size=4, mlp_width=8
        )
    )
    params = jax.jit(model.init, out_shardings=shardings_of(model.logical_axes, mesh))(
        jax.random.key(0)
    )
    settings = SamplingConfig(max_new_tokens=3, samples_per_prompt=2, top_k_capture=2, end_ids=(3,))
    context = RolloutContext(model, mesh, Speechless(), 3, settings)
    rows = batch_sharding(mesh)
    own = np.arange(6, dtype=np.int32).reshape(2, 3) + multihost.row_share(mesh).index
    prompts = Prompts(*multihost.to_global_rows((own, np.ones((2, 3), bool)), rows))
    apart = Elsewhere(Lockstep, context, sampling)
    with jax.set_mesh(mesh):
        drawn = [
            jax.block_until_ready(source.rollout(params, prompts, jax.random.key(1), settings))
            for source in (Lockstep(context), apart)
        ]
    found = [multihost.to_local_rows(each.logp_rollout, rows) for each in drawn]
    tokens = [multihost.to_local_rows(each.response_tokens, rows).tolist() for each in drawn]
    return {
        "same": tokens[0] == tokens[1] and bool(np.allclose(*found, atol=1e-5)),
        "bytes": apart.numbers()["weights/bytes_sent"]
        / sum(x.nbytes for x in jax.tree.leaves(params)),
        "refused": refused(Elsewhere, lambda _: object(), context, sampling),
    }


class Speechless:
    """As much of a tokenizer as the engine holds."""

    def decode(self, ids) -> str:
        return ""


def main(process: int, port: str, folder: Path) -> None:
    hosts.start(clusters.Cluster(f"127.0.0.1:{port}", 2, process, 120.0))
    found: dict = {"said": [hosts.exchange("word", w) for w in ("ab"[process], "cd"[process])]}
    with hosts.first_process_first("file"):
        if process == 0:
            time.sleep(0.5)
            (folder / "made").touch()
        found["made"] = (folder / "made").exists()
    found["any"] = [multihost.any_process(flag) for flag in (False, process == 1)]
    found["gathered"] = multihost.gather_rows(np.arange(process + 1) + 10 * process).tolist()
    found["exact"] = multihost.gather_rows(np.array([[1 / 3 + process]])).tolist()
    found["rows"] = {
        name: round_trip(sizes)
        for name, sizes in {
            "split": dict(fsdp=4), "held_by_both": dict(fsdp=2, tensor=2, data=1),
            "tensor": dict(fsdp=1, tensor=4),
        }.items()
    }  # fmt: skip
    found["engine"] = drawn_by_engine()
    found["sampler"] = drawn_apart()
    found["same"] = refused(hosts.check_same, hosts.code_facts())
    found["other"] = refused(hosts.check_same, {"jax": "1", "configuration": "xy"[process]})
    found["shared"] = refused(hosts.check_shared, folder / "new" / "run")
    (folder / "empty").mkdir(exist_ok=True)
    if process == 1:  # looks late whether it is
        time.sleep(0.5)
        found["late"] = len(list((folder / "empty").iterdir()))
    found["shared"] += refused(hosts.check_shared, folder / "empty")
    (folder / str(process)).mkdir()
    found["apart"] = refused(hosts.check_shared, folder / str(process) / "run", 1.0)
    print(json.dumps(found), flush=True)
    if process == 1:
        hosts.fail_together("the verifier's server did not start", 2)
    hosts.exchange("never", "")  # process 0 waits here for the other


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
