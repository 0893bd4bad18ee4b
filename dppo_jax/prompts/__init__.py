"""From data on disk to token arrays: what the policy is asked.

    examples     Example, one problem as text, and PromptFileError
    arithmetic   the project's own task, two-digit multiplication, and its careless teacher
    stories      openings for a tiny story model, each with a word that the story should use
    sets         the published mathematics sets: gsm8k, math, dapo_math_17k, aime24, ...
    gsm8k, fields    what their rows, and those of anyone's own files, hold
    rows, sources    jsonl, json and parquet files; a folder, a file or a public home
    store        prepare and load: every data set as TFDS array_record files
    tokenizers   SentencePiece and Hugging Face tokenizers behind one protocol
    templates    chat templates, instructions and worked examples around a problem
    mixture      several sets with weights, curricula
    overlap      problems that are in training and in evaluation
    pipeline     shuffled, sharded, resumable batches of tokenised prompts; evaluation batches

This package imports nothing by itself, so that `rewards` can read `examples` without jax.
"""
