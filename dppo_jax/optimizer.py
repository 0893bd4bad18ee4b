"""The optimizer: optax's AdamW, a warm-up and cosine schedule, clipping by the global norm."""

import optax


def adamw(
    *,
    learning_rate: float,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    final_fraction: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW after clipping the gradient to `clip_norm`, which a large number leaves as it is.

    The rate rises linearly over `warmup_steps` gradient steps, then stays (decay_steps None) or
    falls as a cosine to final_fraction · learning_rate at gradient step `decay_steps`.
    """
    if learning_rate < 0 or warmup_steps < 0:
        raise ValueError(
            f"learning_rate={learning_rate}, warmup_steps={warmup_steps}: neither is negative"
        )
    if not clip_norm > 0:
        raise ValueError(f"clip_norm={clip_norm} must be positive; 1e9 clips nothing")
    if decay_steps is None:
        warmup = optax.linear_schedule(0.0, learning_rate, max(1, warmup_steps))
        schedule = warmup if warmup_steps else optax.constant_schedule(learning_rate)
    elif decay_steps <= warmup_steps:
        raise ValueError(f"decay_steps={decay_steps} must exceed warmup_steps={warmup_steps}")
    else:
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=0.0 if warmup_steps else learning_rate,
            peak_value=learning_rate,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            end_value=final_fraction * learning_rate,
        )
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),
    )
