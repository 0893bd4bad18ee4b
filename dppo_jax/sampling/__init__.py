"""Prompts in, `Rollout` out: prefill once a prompt, decode token by token with a cache."""
