"""`python -m dppo_jax` is `dppo`."""

from dppo_jax.cli import main

if __name__ == "__main__":
    main()
