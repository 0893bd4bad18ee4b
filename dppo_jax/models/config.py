"""The sizes and variants of a decoder: everything that tells the model families apart."""

from dataclasses import dataclass
from typing import Literal

import jax

from dppo_jax.models.rope import RopeScaling


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder. Sharding is chosen elsewhere, by the names in `Block`.

    The defaults are Llama's form; `hf_config` has the settings of each family.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_width: int  # of the experts, where there are any
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tied_embeddings: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    dtype: str = "float32"  # of activations and matrix products; parameters stay float32
    remat: bool = False  # recompute each layer in the backward pass
    remat_policy: str = "nothing_saveable"  # what is kept of it: a name in jax.checkpoint_policies
    # Of whole sequences: "auto" is splash on TPUs, cuDNN's on GPUs, XLA's operations elsewhere.
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    rope_scaling: RopeScaling | None = None
    window: int | None = None  # a local layer attends to the last `window` tokens, itself included
    local_layers: tuple[bool, ...] = ()  # which layers are local; all of them where empty
    local_rope_theta: float | None = None  # local layers' own, without scaling
    attention_scalar: float | None = None  # scores are q·k / √attention_scalar; default head_size
    attention_soft_cap: float | None = None  # scores become cap·tanh(score / cap)
    final_soft_cap: float | None = None  # so do logits
    activation: Literal["silu", "gelu_tanh"] = "silu"
    post_norms: bool = False  # norms after attention and MLP too, before they are added
    unit_offset_norms: bool = False  # norms scale by 1 + w
    scaled_embeddings: bool = False  # token embeddings are multiplied by √width
    experts: int = 0  # MLPs of each layer that a router chooses from; 0: one MLP, no router
    experts_per_token: int = 0
    normalised_gates: bool = False  # a token's gates sum to 1
    load_balancing: float = 0.0  # coefficient of `moe.Load.loss` in training

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}: "
                "each key-value head serves the same number of query heads"
            )
        if self.head_size % 2:
            raise ValueError(f"head_size={self.head_size} must be even: rope rotates pairs")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r}: use 'float32' or 'bfloat16'")
        if not hasattr(jax.checkpoint_policies, self.remat_policy):
            raise ValueError(
                f"remat_policy={self.remat_policy!r} is not in jax.checkpoint_policies; for example"
                " 'dots_with_no_batch_dims_saveable' keeps the matrix products"
            )
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is not within 1..{self.experts}, "
                "the number of experts"
            )
        if self.load_balancing < 0 or (self.load_balancing and not self.experts):
            raise ValueError(
                f"load_balancing={self.load_balancing} is for models with experts, at least 0"
            )
        if self.attention not in ("auto", "xla", "splash", "cudnn"):
            raise ValueError(
                f"attention={self.attention!r}: use 'auto', 'xla', 'splash' or 'cudnn'"
            )
        if self.activation not in ("silu", "gelu_tanh"):
            raise ValueError(f"activation={self.activation!r}: use 'silu' or 'gelu_tanh'")
        if self.local_layers and len(self.local_layers) != self.layers:
            raise ValueError(
                f"local_layers names {len(self.local_layers)} layers of layers={self.layers}"
            )
        if self.window is None and (any(self.local_layers) or self.local_rope_theta is not None):
            raise ValueError("local layers need a window: set window")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1")
        for name in ("attention_soft_cap", "final_soft_cap", "attention_scalar"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0; None leaves it out")

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Each layer's window; None sees everything before it."""
        local = self.local_layers or (self.window is not None,) * self.layers
        return tuple(self.window if is_local else None for is_local in local)

    @property
    def attention_scale(self) -> float:
        """What q·k is multiplied by."""
        return (self.attention_scalar or self.head_size) ** -0.5
