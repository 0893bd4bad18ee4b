"""Verifiers: what a response is worth, decided on the host from text alone.

    verdicts     Verdict, the form of a verifier, and grade, which runs one over a batch
    verifiers    arithmetic_answer, numeric_answer, story_word
    mathematics  math_answer: LaTeX, numbers, symbolic equality
    matches      exact_match, multiple_choice, format_match
    lengths      overlong, length
    code         code_tests: programs against tests, in a sandbox
    combined     weighted: several rewards as one
    extraction   where the answer stands; plain_latex: spellings of one answer; numbers: decimals
    grading      what `dppo grade` does
    pool         worker processes for verifiers that are declared isolated; supervisor, worker

Nothing here imports jax, so that workers that grade responses start fast and hold no accelerator.
"""
