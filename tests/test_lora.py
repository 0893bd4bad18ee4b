"""Adapters: the same function as the merged weights, gradients by the chain rule, nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dppo_jax.models.decoder import DecoderConfig, Model
from dppo_jax.models.lora import LoraConfig, LoraModel, merged
from dppo_jax.objectives import dppo_binary_tv
from dppo_jax.records import Batch, Rollout
from dppo_jax.sampling.generate import SamplingConfig, generate
from dppo_jax.scoring import score
from dppo_jax.update import init_state, make_update

DENSE = DecoderConfig(
    vocab_size=23, width=16, layers=1, heads=2, kv_heads=1, head_size=6, mlp_width=20,
    qk_norm=True, tied_embeddings=False,
)  # fmt: skip
MIXTURE = dataclasses.replace(DENSE, experts=4, experts_per_token=2, mlp_width=12)
EVERYTHING = LoraConfig(rank=3, alpha=4.5, targets=("[qkvo]", "gate|up|down", "unembedding"))


def large(tree, scale, key=5):
    """Every leaf drawn anew, B among them, so that nothing is small."""
    rng = np.random.default_rng(key)
    drawn = lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(drawn, tree)


def start(model):
    """Base parameters, uneven enough."""
    return large(model.abstract_params, 0.4, key=0)


@pytest.fixture(scope="module", params=["dense", "experts"])
def adapted(request):
    """A model with large adapters on all its matrices: (model, base, adapters)."""
    model = LoraModel({"dense": DENSE, "experts": MIXTURE}[request.param], EVERYTHING)
    base = start(model)
    return model, base, large(model.abstract_adapters, 0.2)


def rows(seed=0, prompts=2, samples=2, columns=4):
    rng = np.random.default_rng(seed)
    shape = (prompts * samples, columns)
    mask = jnp.asarray(np.arange(columns) < np.array([4, 1, 3, 4])[:, None])
    nothing = jnp.zeros(shape, jnp.float32)
    return Rollout(
        prompt_tokens=jnp.asarray(rng.integers(23, size=(prompts, 3)), jnp.int32),
        prompt_mask=jnp.asarray([[False, True, True], [True, True, True]]),
        response_tokens=jnp.asarray(rng.integers(23, size=shape), jnp.int32),
        response_mask=mask,
        logp_rollout=nothing,
        topk_ids=jnp.zeros((*shape, 1), jnp.int32),
        topk_logp_rollout=nothing[..., None],
        entropy_rollout=nothing,
        finish_reason=jnp.ones(shape[:1], jnp.int32),
    )


def value(model, params, rollout):
    logp = score(model, params, rollout, temperature=0.9).logp
    return jnp.sum(jnp.where(rollout.response_mask, jnp.sin(logp), 0.0))


def test_gradients_are_those_of_the_merged_weights(adapted):
    """dL/dA = s·dL/dW·Bᵀ and dL/dB = s·Aᵀ·dL/dW at W + s·A·B; and the value is the same."""
    model, base, adapters = adapted
    rollout = rows()
    of_adapters = jax.jit(
        jax.value_and_grad(lambda a: value(model, model.policy(a, base), rollout))
    )
    plain = Model(model.config)
    of_weights = jax.jit(jax.value_and_grad(lambda p: value(plain, p, rollout)))
    ours, grads = of_adapters(adapters)
    theirs, weights = of_weights(
        jax.jit(merged, static_argnums=0)(model, model.policy(adapters, base))
    )
    without, _ = of_weights(base)
    adapters, grads, weights = jax.device_get((adapters, grads, weights))
    assert abs(ours - theirs) < 1e-5 < 1e-2 < abs(ours - without)
    scale, found = EVERYTHING.alpha / EVERYTHING.rank, 0
    for name in EVERYTHING.names:
        of = (lambda tree: tree) if name == "unembedding" else (lambda tree: tree["blocks"])
        d_w = of(weights)[name]
        if name == "unembedding":  # stored [V, D]
            d_w = d_w.T
        a, b = (of(adapters)[f"{name}_lora_{which}"] for which in "ab")
        wanted = d_w @ np.swapaxes(b, -1, -2), np.swapaxes(a, -1, -2) @ d_w
        for which, want in zip("ab", wanted, strict=True):
            got = of(grads)[f"{name}_lora_{which}"]
            np.testing.assert_allclose(got, scale * want, rtol=1e-3, atol=2e-5)
            found += np.abs(want).max() > 1e-3
    assert found == 2 * len(EVERYTHING.names) == len(jax.tree.leaves(adapters))


def test_fresh_adapters_change_nothing_and_none_is_the_base(adapted):
    model, base, _ = adapted
    fresh = jax.jit(model.init_adapters)(jax.random.key(3))
    logp = jax.jit(lambda p: score(model, p, rows(), temperature=1.0).logp)
    plain = jax.jit(lambda p: score(Model(model.config), p, rows(), temperature=1.0).logp)(base)
    np.testing.assert_allclose(logp(model.policy(fresh, base)), plain, atol=2e-6)
    np.testing.assert_array_equal(logp(base), plain)
    firsts = [leaf for at, leaf in jax.tree.leaves_with_path(fresh) if "_lora_a" in str(at[-1])]
    assert all(0.5 < float(jnp.abs(a).max()) * a.shape[-2] ** 0.5 <= 1 for a in firsts)


def test_the_sampler_applies_them_as_the_scorer_does(adapted, prompts):
    """Nothing is merged: what was recorded while sampling is what is scored."""
    model, base, adapters = adapted
    policy = model.policy(adapters, base)
    asked = dataclasses.replace(prompts, tokens=prompts.tokens % 23)
    settings = SamplingConfig(max_new_tokens=5, samples_per_prompt=2, top_k_capture=1)
    rollout = generate(model, policy, asked, jax.random.key(4), settings=settings)
    scored = jax.jit(lambda p: score(model, p, rollout, temperature=1.0).logp)
    np.testing.assert_allclose(scored(policy), rollout.logp_rollout, atol=2e-5)
    assert jnp.abs(scored(base) - rollout.logp_rollout).max() > 0.1


def test_a_step_changes_adapters_alone():
    """The optimizer knows of nothing else, dropout's masks differ by microbatch, the base stays."""
    lora = LoraConfig(rank=2, alpha=2.0, targets="q|down", dropout=0.3)
    model = LoraModel(DENSE, lora)
    base, adapters = start(model), large(model.abstract_adapters, 0.1)
    optimizer = optax.adam(1e-2)
    state = init_state(jax.tree.map(jnp.copy, adapters), optimizer)
    held = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert held == 2 * sum(leaf.size for leaf in jax.tree.leaves(adapters)) + 1
    update = make_update(model, dppo_binary_tv(), optimizer, temperature=1.0, microbatches=2)
    batch = Batch(rows(), jnp.asarray([[1.0], [-1.0], [0.5], [-0.5]]) * jnp.ones((4, 4)))
    kept = jax.tree.map(np.asarray, base)
    after, metrics = update(state, batch, None, base)
    close = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after.params, adapters)
    assert jax.tree.structure(after.params) == jax.tree.structure(adapters)
    assert min(jax.tree.leaves(close)) > 1e-3
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), base, kept))
    again, _ = update(init_state(jax.tree.map(jnp.copy, adapters), optimizer), batch, None, base)
    jax.tree.map(np.testing.assert_array_equal, again.params, after.params)


def test_dropout_is_in_the_update_alone():
    """Its key changes what is scored; its mean over keys does not go away from the rest's."""
    lora = LoraConfig(rank=2, alpha=2.0, targets="o", dropout=0.5)
    model = LoraModel(DENSE, lora)
    base, adapters = start(model), large(model.abstract_adapters, 0.1)
    logp = jax.jit(lambda p: score(model, p, rows(), temperature=1.0).logp)
    still = logp(model.policy(adapters, base))
    dropped = [
        logp(model.policy(adapters, base, key)) for key in jax.random.split(jax.random.key(1), 64)
    ]
    assert min(float(jnp.abs(each - still).max()) for each in dropped) > 1e-4
    spread = np.std(dropped, axis=0) / 8
    assert np.all(np.abs(np.mean(dropped, axis=0) - still) < 4 * spread + 1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(targets="q_proj"), "'q_proj' matches nothing; the names are q, k, v, o, gate, up"),
        (dict(targets=("q", "gates")), "'gates' matches nothing"),
        (dict(targets="q("), "'q\\(' is no regular expression"),
        (dict(rank=0), "rank=0: an adapter's rank is at least 1"),
        (dict(rank=7), "rank=7 is more than k can have, which is 16 x 6: set a rank of at most 6"),
        (dict(alpha=0.0), "alpha=0.0 must be a positive number"),
        (dict(dropout=1.0), r"dropout=1.0 is not within \[0, 1\)"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LoraModel(DENSE, LoraConfig(**{"rank": 2, **changes}))


def test_experts_have_no_dropout():
    with pytest.raises(
        ValueError, match="adapters of experts have none; set 0, or leave down, gate"
    ):
        LoraModel(MIXTURE, LoraConfig(rank=2, dropout=0.1))


def test_a_tied_unembedding_cannot_be_merged():
    """The adapter is of the unembedding alone; merged it would change the embedding as well."""
    model = LoraModel(
        dataclasses.replace(DENSE, tied_embeddings=True), LoraConfig(rank=2, targets="unembedding")
    )
    base, adapters = start(model), large(model.abstract_adapters, 0.1)
    with pytest.raises(ValueError, match="leave unembedding out of targets"):
        merged(model, model.policy(adapters, base))


def test_rank_stabilised_scale():
    assert LoraConfig(rank=16, alpha=8.0).scale == 0.5
    assert LoraConfig(rank=16, alpha=8.0, rslora=True).scale == 2.0
