"""Run by test_sharded_head.py in a process of eight CPU devices: the head on several meshes."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from dppo_jax.kernels import tiles, xla
from dppo_jax.kernels.head import fused_loss, head
from dppo_jax.kernels.sharded import Layout
from dppo_jax.kernels.single_pass import TokenTerms
from dppo_jax.sharding import MeshConfig, head_layout

TOKENS, WIDTH, VOCABULARY, COLUMNS = 256, 16, 8 * 160, 4


def losses(terms, rows):
    stored = jnp.sum(jnp.sin(terms.logp[:, 1:]), axis=1)
    return rows * (-terms.logp[:, 0] + 0.1 * terms.entropy + 0.05 * stored)


def single_pass(layout, x, w, ids, rows):
    options = {"temperature": 0.8, "soft_cap": 6.0, "layout": layout}
    return fused_loss(losses, x, w, ids, rows, valid=rows > -0.5, **options)[0]


def two_pass(layout, x, w, ids, rows):
    out = head(x, w, ids, temperature=0.8, soft_cap=6.0, layout=layout)
    return losses(TokenTerms(out.logit_at - out.lse[:, None], out.entropy), rows).sum()


def computations(program: str) -> dict[str, str]:
    """The compiled program's computations by name."""
    found = re.findall(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", program, re.M | re.S)
    return dict(found)


def looped(program: str) -> str:
    """The text of every computation that a loop repeats."""
    parts = computations(program)
    waiting = re.findall(r"body=%?([\w.\-]+)", program)
    text, seen = "", set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            text += parts[name]
            waiting += re.findall(
                r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)",
                parts[name],
            )
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", parts[name]):
                waiting += re.findall(r"[\w.\-]+", branches)
    return text


def inputs():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(TOKENS, WIDTH)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(VOCABULARY, WIDTH)), jnp.float32)
    ids = rng.integers(0, VOCABULARY, size=(TOKENS, COLUMNS))
    ids[:4, 0] = [0, 159, 160, VOCABULARY - 1]  # first and last rows of shards
    return x, w, jnp.asarray(ids, jnp.int32), jnp.asarray(rng.normal(size=TOKENS), jnp.float32)


def main() -> list[dict]:
    xla.CHUNK_LOGITS, xla.LEAST_COLUMNS = 1, 128  # several chunks a shard
    tiles.SINGLE_PASS_LEAST_TOKENS, tiles.SINGLE_PASS_COLUMNS["CPU"] = 8, 128
    x, w, ids, rows = inputs()
    found = []
    for form in (single_pass, two_pass):
        differentiated = jax.value_and_grad(partial(form, ids=ids, rows=rows), (1, 2))
        value, grads = jax.jit(differentiated, static_argnums=0)(None, x, w)
        for sizes in (
            dict(data=2, fsdp=2, tensor=2),
            dict(fsdp=4, tensor=2),
            dict(fsdp=2, sequence=4),  # whose devices share the vocabulary
            dict(data=8, fsdp=1),
        ):
            mesh = MeshConfig(**sizes).build()
            with jax.set_mesh(mesh):
                layout = head_layout(len(x), len(w))
                assert isinstance(layout, Layout)
                stored = NamedSharding(mesh, layout.stored)
                here = (
                    jax.device_put(x, NamedSharding(mesh, layout.rows)),
                    jax.device_put(w, stored),
                )
                program = jax.jit(differentiated, static_argnums=0).lower(layout, *here).compile()
                ours, our_grads = program(*here)
                text = program.as_text()
            found.append(
                {
                    "form": form.__name__,
                    "mesh": sizes,
                    "value": abs(float(ours) - float(value)) / abs(float(value)),
                    "gradients": max(
                        float(jnp.abs(jnp.asarray(np.asarray(a)) - b).max())
                        for a, b in zip(our_grads, grads, strict=True)
                    ),
                    "stored": our_grads[1].sharding.is_equivalent_to(stored, 2),
                    "gathers": len(re.findall(r" all-gather(?:-start)?\(", text)),
                    "loops": text.count(" while("),
                    "looped_gathers": len(re.findall(r" all-gather(?:-start)?\(", looped(text))),
                    # Full logits of a device's tokens would mean that the vocabulary was gathered.
                    "gathered_logits": bool(re.search(rf"f32\[\d+,{VOCABULARY}\]", text)),
                }
            )
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
