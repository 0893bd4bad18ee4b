"""A critic: a second decoder with parameters of its own, and a linear head on its hidden states."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from dppo_jax.models.decoder import DecoderConfig, Model, Params, response_states
from dppo_jax.records import Rollout
from dppo_jax.sharding import constrain, shardings_of


@dataclass(frozen=True)
class ValueModel:
    """What a recipe says of its critic.

    `outputs` None is one value a token, a number that many quantiles (heads x quantiles for DVPO).
    Without a `decoder` the critic has the policy's sizes and starts from the initial policy;
    with one it starts at random.
    """

    optimizer: optax.GradientTransformation
    outputs: int | None = None
    decoder: DecoderConfig | None = None

    def __post_init__(self):
        if self.outputs is not None and self.outputs < 1:
            raise ValueError(f"outputs={self.outputs}: a critic predicts at least one quantile")


class Critic:
    """The value model of a run: pure functions of its parameters."""

    def __init__(self, settings: ValueModel, policy: DecoderConfig):
        self.optimizer = settings.optimizer
        self._outputs = settings.outputs
        self._copies_policy = settings.decoder is None
        self._model = Model(settings.decoder or policy)

    @property
    def config(self) -> DecoderConfig:
        return self._model.config

    @property
    def logical_axes(self) -> Params:
        head = {"weight": ("embed", None), "bias": (None,)}
        return {"decoder": self._model.logical_axes, "head": head}

    def init(self, key: Array, policy: Params) -> Params:
        """Fresh parameters; the head is zero, and so is every value at first."""
        decoder = jax.tree.map(jnp.copy, policy) if self._copies_policy else self._model.init(key)
        shape = (self.config.width, self._outputs or 1)
        return {
            "decoder": decoder,
            "head": {"weight": jnp.zeros(shape), "bias": jnp.zeros(shape[1:])},
        }

    def init_sharded(self, key: Array, policy: Params, mesh: Mesh) -> Params:
        """`init` where the mesh keeps each parameter."""
        shardings = shardings_of(self.logical_axes, mesh)
        return jax.jit(self.init, out_shardings=shardings)(key, policy)

    def values(self, params: Params, rollout: Rollout) -> Float[Array, "B T *Q"]:
        """The value of the state in which each response token was chosen, float32.

        [B, T], or [B, T, Q] with `outputs`. Padding is attended by nobody.
        """
        hidden, *_ = response_states(
            self._model.bind(params["decoder"]),
            rollout.prompt_tokens,
            rollout.prompt_mask,
            rollout.response_tokens,
            rollout.response_mask,
        )
        head: dict[str, Any] = params["head"]
        weight = constrain(head["weight"], None, None)
        values = hidden.astype(jnp.float32) @ weight + head["bias"]
        return values[..., 0] if self._outputs is None else values
