"""Shared by all tests: a tiny model, and strictness that the package itself does not impose."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dppo_jax.models.decoder import DecoderConfig, Model
from dppo_jax.records import Prompts

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the checkout; users do not have it."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs ../shared/data, which is not part of the project")
    return SHARED / "data"


@pytest.fixture(scope="session")
def tiny():
    """A decoder with grouped heads and odd sizes, and its parameters."""
    config = DecoderConfig(
        vocab_size=37,
        width=24,
        layers=2,
        heads=4,
        kv_heads=2,
        head_size=6,
        mlp_width=40,
        qk_norm=True,
    )
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    # Larger weights than at initialisation make the distributions uneven.
    return model, jax.tree.map(lambda p: p * 2.5, params)


@pytest.fixture(scope="session")
def prompts() -> Prompts:
    """Three prompts of 5, 3 and 1 tokens, left-padded with an id that means something elsewhere."""
    tokens = jax.random.randint(jax.random.key(1), (3, 5), 0, 37)
    lengths = jnp.array([5, 3, 1])
    mask = jnp.arange(5)[None, :] >= 5 - lengths[:, None]
    return Prompts(jnp.where(mask, tokens, 7), mask)
