"""A critic: a head on the hidden states of a second decoder of its own, or on the policy's.

Both kinds have `optimizer`, `config`, `outputs`, `init_sharded` and `values`; settings `build`
them.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from dppo_jax import packing
from dppo_jax.models.decoder import DecoderConfig, Model, Params
from dppo_jax.records import Rollout
from dppo_jax.scoring import token_states
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

    def build(self, policy: DecoderConfig) -> "Critic":
        return Critic(self, policy)


@dataclass(frozen=True)
class ValueHead:
    """What a recipe says of a critic that reads the policy's own last hidden states.

    It costs one small product a token where a `ValueModel` costs a decoder's passes. A linear head,
    or x·W1 through silu where it is `hidden` units wide. Its gradient stops at the hidden states,
    so that values learn of what the policy represents and leave it alone; with `shared_gradient`
    it goes on into the policy, as in PPO with shared parameters (arXiv 1707.06347, section 5),
    where the objective's value coefficient weighs the two. `outputs` as in `ValueModel`.
    """

    optimizer: optax.GradientTransformation
    outputs: int | None = None
    hidden: int | None = None
    shared_gradient: bool = False

    def __post_init__(self):
        if self.outputs is not None and self.outputs < 1:
            raise ValueError(f"outputs={self.outputs}: a critic predicts at least one quantile")
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"hidden={self.hidden}: a layer has at least one unit; None has none")

    def build(self, policy: DecoderConfig) -> "HeadCritic":
        return HeadCritic(self, policy)


class Critic:
    """The value model of a run: pure functions of its parameters."""

    def __init__(self, settings: ValueModel, policy: DecoderConfig):
        self.optimizer = settings.optimizer
        self.outputs = settings.outputs
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
        shape = (self.config.width, self.outputs or 1)
        return {
            "decoder": decoder,
            "head": {"weight": jnp.zeros(shape), "bias": jnp.zeros(shape[1:])},
        }

    def init_sharded(self, key: Array, policy: Params, mesh: Mesh) -> Params:
        """`init` where the mesh keeps each parameter."""
        shardings = shardings_of(self.logical_axes, mesh)
        return jax.jit(self.init, out_shardings=shardings)(key, policy)

    def values(
        self, params: Params, rollout: Rollout, states: Float[Array, "N D"] | None = None
    ) -> Float[Array, "B T *Q"]:
        """The value of the state in which each response token was chosen, float32.

        [B, T], or [B, T, Q] with `outputs`; of packed rows, what stands at padding means nothing.
        Padding is attended by nobody. `states`, the policy's, are for `HeadCritic`.
        """
        # A mixture's routers choose for themselves: what is recorded is the policy's routing.
        alone = dataclasses.replace(rollout, prompt_experts=None, experts=None)
        hidden, *_ = token_states(self._model.bind(params["decoder"]), alone)
        values = packing.back(_affine(hidden.astype(jnp.float32), params["head"]), rollout)
        return values[..., 0] if self.outputs is None else values


class HeadCritic:
    """A critic on the policy's hidden states: pure functions of its parameters."""

    def __init__(self, settings: ValueHead, policy: DecoderConfig):
        self.optimizer, self.config = settings.optimizer, policy
        self.outputs = settings.outputs
        self._settings = settings

    @property
    def logical_axes(self) -> Params:
        head = {"weight": ("embed", None), "bias": (None,)}
        if self._settings.hidden is None:
            return {"head": head}
        return {"inner": head, "head": head | {"weight": (None, None)}}

    def init(self, key: Array, policy: Params) -> Params:
        """Fresh parameters; the last product is zero, and so is every value at first."""
        width, outputs = self.config.width, self.outputs or 1
        params: Params = {}
        if self._settings.hidden is not None:
            shape = (width, self._settings.hidden)
            weight = width**-0.5 * jax.random.normal(key, shape)
            params["inner"] = {"weight": weight, "bias": jnp.zeros(shape[1:])}
            width = self._settings.hidden
        params["head"] = {"weight": jnp.zeros((width, outputs)), "bias": jnp.zeros((outputs,))}
        return params

    def init_sharded(self, key: Array, policy: Params, mesh: Mesh) -> Params:
        """`init` where the mesh keeps each parameter; the policy's are not copied."""
        shardings = shardings_of(self.logical_axes, mesh)
        return jax.jit(lambda key: self.init(key, {}), out_shardings=shardings)(key)

    def values(
        self, params: Params, rollout: Rollout, states: Float[Array, "N D"] | None = None
    ) -> Float[Array, "B T *Q"]:
        """The value of each of the policy's `scoring.token_states`, float32; shapes as
        `Critic.values`."""
        if states is None:
            raise ValueError("a ValueHead reads the policy's hidden states: none were given")
        x = states if self._settings.shared_gradient else jax.lax.stop_gradient(states)
        x = x.astype(jnp.float32)
        if "inner" in params:
            x = jax.nn.silu(_affine(x, params["inner"]))
        values = packing.back(_affine(x, params["head"]), rollout)
        return values[..., 0] if self.outputs is None else values


def _affine(x: Array, layer: Params) -> Array:
    return x @ constrain(layer["weight"], None, None) + layer["bias"]
