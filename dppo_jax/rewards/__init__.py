"""Verifiers: what a response is worth, decided on the host from text alone.

    verdicts    Verdict, the form of a verifier, and grade, which runs one over a batch
    verifiers   arithmetic_answer, numeric_answer, story_word
    numbers     numbers in free text, compared as decimals

Nothing here imports jax, so that workers that grade responses start fast and hold no accelerator.
"""
