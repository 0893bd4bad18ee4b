"""Trust-region reinforcement learning of language models, native to JAX and TPUs."""
