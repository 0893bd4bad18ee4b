"""Real text and a real language model through every part: prepared, tokenised, sampled, trained."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import parquet

RECIPES = Path(__file__).parent.parent / "configs" / "recipes"


@pytest.fixture(scope="module")
def small(shared_data, tmp_path_factory):
    """Flags that point a recipe at the real model and make its run short."""
    folder = shared_data / "lm" / "stories260K"
    return (
        f"--gin.MODEL_FILE={folder / 'stories260K.bin'}",
        f"--gin.TOKENIZER_FILE={folder / 'tok512.model'}",
        f"--gin.DATA_DIR={tmp_path_factory.mktemp('data')}",
        "--gin.MAX_NEW_TOKENS=24",
        "--gin.STEPS=2",
        "--gin.SAMPLES_PER_PROMPT=2",
        "--gin.PROMPTS_PER_STEP=4",
        "--gin.train.train.eval_prompts=4",
    )


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_gsm8k_questions_reach_the_update(dppo, small, shared_data, tmp_path):
    data = small[2].split("=")[1]
    prepared = dppo("data", "prepare", "gsm8k", "--from", shared_data / "gsm8k", "--json",
                    "--data-dir", data)  # fmt: skip
    assert json.loads(prepared.out)["splits"] == {"train": 7473, "test": 1319}
    flags = (*small, "--gin.STEPS=5")
    done = dppo("train", RECIPES / "gsm8k_cpu.gin", "--workdir", tmp_path / "run", *flags)
    assert done.status == 0, done.err
    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics) == 5 and all(m["response/tokens"] > 0 for m in metrics)
    # The sampler and the scorer are the same policy before the first gradient step.
    assert all(m["mismatch/logp_abs_max"] < 1e-4 for m in metrics)
    samples = rows(tmp_path / "run" / "samples.jsonl")
    questions = {json.loads(line)["question"] for line in open_jsonl(shared_data / "gsm8k")}
    assert {sample["prompt"] for sample in samples} <= questions
    assert all(sample["reason"] for sample in samples)


def test_dapo_math_is_trained_on_and_evaluated_on_aime(dppo, small, shared_data, tmp_path):
    data = tmp_path / "data"
    sets = shared_data / "rl_prompts" / "dapo_math_17k.parquet"
    parquet.write_table(parquet.read_table(sets).slice(0, 200), tmp_path / "dapo_math_17k.parquet")
    for name, source in (("dapo_math_17k", tmp_path), ("aime24", shared_data / "eval"),
                         ("aime25", shared_data / "eval")):  # fmt: skip
        done = dppo("data", "prepare", name, "--from", source, "--data-dir", data)
        assert done.status == 0, done.err
    flags = (*small[:2], *small[3:-1], f"--gin.DATA_DIR={data}", "--gin.EVAL_SAMPLES=2",
             "--gin.EVAL_PROMPTS=6", "--gin.EVAL_PROMPTS_PER_BATCH=4",
             "--gin.STEPS=1")  # fmt: skip
    run = tmp_path / "run"
    done = dppo("train", RECIPES / "dapo_math_cpu.gin", "--workdir", run, *flags)
    assert done.status == 0, done.err
    assert "aime24 avg@2 before" in done.out and "aime25 avg@2 after" in done.out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"].keys() == {"aime24", "aime25"}
    kept = rows(run / "answers.jsonl")
    assert {row["set"] for row in kept} == {"aime24", "aime25"}
    assert all(answer["reason"] and not answer["failure"] for row in kept
               for answer in row["answers"])  # fmt: skip
    again = dppo("eval", RECIPES / "dapo_math_cpu.gin", "--regrade", run / "answers.jsonl",
                 "--json", *flags)  # fmt: skip
    last = json.loads(again.out)["evaluations"][-1]
    asked = summary["after"]["aime25"]
    assert (asked["prompts"], asked.pop("left_out")) == (4, 2)  # the longest do not fit
    assert last["changed"] == 0 and asked.items() <= last.items()


def open_jsonl(folder):
    import gzip

    with gzip.open(folder / "train.jsonl.gz", "rt") as file:
        return file.read().splitlines()


def test_stories_are_sampled_by_the_real_model(dppo, small, tmp_path):
    done = dppo("train", RECIPES / "stories_cpu.gin", "--workdir", tmp_path / "run", *small)
    assert done.status == 0, done.err
    samples = rows(tmp_path / "run" / "samples.jsonl")
    text = " ".join(sample["response"] for sample in samples).lower().split()
    common = {"the", "and", "to", "was", "a", "she", "he", "with", "it", "her", "his"}
    assert sum(word in common for word in text) > len(text) / 6, "this is not a story"


def test_start_up_settings():
    """The command keeps compiled programs where it is told to, and the allocator takes its word."""
    code = (
        "import jax, jax.numpy as jnp; from dppo_jax.verbs.command import start_jax; start_jax();"
        "print(jax.config.jax_compilation_cache_dir, float(jnp.ones(8).sum()))"
    )
    given = os.environ | {"JAX_COMPILATION_CACHE_DIR": "/nowhere/in/particular"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=given)
    assert out.stdout.split() == ["/nowhere/in/particular", "8.0"], out.stderr
