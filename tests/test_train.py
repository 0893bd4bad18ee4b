"""A run as a user has it: its files, its numbers, going on after a stop, repeating it."""

import argparse
import json
import re
import shutil
import subprocess
import sys

import pytest

from dppo_jax import cli
from dppo_jax.checkpoint import Checkpoints, newest_step
from dppo_jax.run_directory import claim

STEPS = 4
PER_STEP = {
    "step", "reward/mean", "loss/total", "mask/fraction", "mismatch/logp_abs_mean",
    "mismatch/ratio_mean", "time/step", "time/sampling", "time/update", "time/compilations",
    "update/gradient_norm", "divergence/mean", "entropy/mean", "response/length",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(dppo, toy_recipe, tmp_path_factory):
    """A finished run's directory."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    done = dppo("train", toy_recipe, "--workdir", workdir)
    assert done.status == 0, done.err
    assert "toy: done" in done.out and not done.err
    assert str(workdir) in re.sub(r"[│\s]+", "", done.out)  # in a cell of the table, folded
    return workdir


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(workdir):
    """The metrics that do not depend on the clock."""
    return [
        {name: value for name, value in line.items() if not name.startswith("time/")}
        for line in lines(workdir / "metrics.jsonl")
    ]


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


def test_files_of_a_run(run):
    assert {path.name for path in run.iterdir()} == {
        "config.gin",
        "operative_config.gin",
        "metrics.jsonl",
        "masked_tokens.json",
        "masked_tokens.txt",
        "samples.jsonl",
        "answers.jsonl",
        "summary.json",
        "report.html",
        "checkpoints",
    }
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "4"]


def test_summary(run):
    summary = summary_of(run)
    assert summary["steps"] == STEPS and summary["wall_seconds"] > 0
    for when in ("before", "after"):
        evaluation = summary[when]["arithmetic"]
        assert summary[f"accuracy_{when}"] == evaluation["accuracy"]
        assert evaluation["accuracy_low"] <= evaluation["accuracy"] <= evaluation["accuracy_high"]
        assert evaluation["prompts"] == 12 and evaluation["k"] == 4
    assert summary["accuracy_before"] != summary["accuracy_after"]


def test_metrics_of_every_step(run):
    written = lines(run / "metrics.jsonl")
    assert [line["step"] for line in written] == list(range(STEPS))
    for line in written:
        assert line.keys() >= PER_STEP
        # a mean over masked tokens is null where none was masked
        assert None not in [v for name, v in line.items() if not name.startswith("mask/")]
        assert 0 < line["reward/mean"] < 1 and line["update/gradient_norm"] > 0
        penalty = 4 * line["advantage/max"] * line["bound/tv_sum"]
        assert line["bound/improvement"] == pytest.approx(line["bound/surrogate"] - penalty)
        assert line["mismatch/logp_abs_max"] < 1e-4
        assert line["mismatch/ratio_mean"] == pytest.approx(1, abs=1e-4)
        parts = ("weight_sync", "sampling", "rewards", "scoring", "update")
        whole = sum(line[f"time/{part}"] for part in parts)
        assert line["time/step"] == pytest.approx(whole)


def test_masked_tokens_are_counted_over_the_whole_run(dppo, toy_recipe, tmp_path):
    """Every response token occurs once a rollout; a region of no width masks on the second step."""
    flags = ("--gin.objectives.dppo_binary_tv.delta=0.0", "--gin.STEPS=2")
    done = dppo("train", toy_recipe, "--workdir", tmp_path / "run", *flags)
    assert done.status == 0, done.err
    rows = json.loads((tmp_path / "run" / "masked_tokens.json").read_text())
    assert rows and all(0 < row["masked"] <= row["occurrences"] for row in rows)
    assert [row["masked"] for row in rows] == sorted((r["masked"] for r in rows), reverse=True)
    written = lines(tmp_path / "run" / "metrics.jsonl")
    assert sum(r["occurrences"] for r in rows) <= sum(line["response/tokens"] for line in written)
    assert f"{rows[0]['text']!r}" in done.out
    assert summary_of(tmp_path / "run")["most_masked"] == [row["text"] for row in rows[:5]]


def test_nothing_compiles_after_the_first_step(run):
    compilations = [line["time/compilations"] for line in lines(run / "metrics.jsonl")]
    assert compilations[0] > 0 and compilations[1:] == [0] * (STEPS - 1)


def test_samples(run):
    written = lines(run / "samples.jsonl")
    assert [line["step"] for line in written] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(line["prompt"].endswith("=") and 0 <= line["score"] <= 1 for line in written)


def test_a_finished_run_has_nothing_to_do(dppo, run, toy_recipe):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    again = dppo("train", toy_recipe, "--workdir", run)
    assert again.status == 0 and "complete" in again.out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_stopped_run_goes_on_as_if_it_had_not(dppo, run, toy_recipe, tmp_path):
    """Stopped in step 3 of 4: a checkpoint after step 2, a log of more, its last line cut off."""
    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped)
    shutil.rmtree(stopped / "checkpoints" / "4")
    (stopped / "summary.json").unlink()
    log = (stopped / "metrics.jsonl").read_text()
    (stopped / "metrics.jsonl").write_text(log[:-40])
    done = dppo("train", toy_recipe, "--workdir", stopped)
    assert done.status == 0 and "resuming" in done.out and "after step 2 of 4" in done.out
    assert numbers(stopped) == numbers(run)
    assert lines(stopped / "samples.jsonl") == lines(run / "samples.jsonl")
    ours, theirs = summary_of(stopped), summary_of(run)
    assert ours["before"] == theirs["before"] and ours["after"] == theirs["after"]
    assert ours["wall_seconds"] > 0
    assert [line["time/compilations"] for line in lines(stopped / "metrics.jsonl")][3] == 0


@pytest.mark.parametrize("in_warm_start", [True, False])
def test_sigterm_before_the_first_step(dppo, run, toy_recipe, tmp_path, in_warm_start):
    """In a warm start: at once, with nothing kept. Later: behind the checkpoint of step 0."""
    recipe, stopped = tmp_path / "stopped.gin", tmp_path / "run"
    recipe.write_text(
        "from __gin__ import dynamic_registration\nfrom dppo_jax import train\n"
        f'import toy_policies\ninclude "{toy_recipe}"\n'
        "train.train.initial_policy = @toy_policies.asked_to_stop()\n"
        f"toy_policies.asked_to_stop.in_warm_start = {in_warm_start}\n"
    )
    done = dppo("train", recipe, "--workdir", stopped)
    assert done.status == 0 and done.err.count("\n") == 1
    if in_warm_start:
        assert "asked to stop in step 20 of 1200 of the warm start: nothing is kept" in done.err
        assert not stopped.exists()
        return
    assert "has a checkpoint of step 0 of 4" in done.err
    assert (stopped / "checkpoints" / "0").is_dir() and not lines(stopped / "metrics.jsonl")
    assert dppo("train", recipe, "--workdir", stopped).status == 0
    assert numbers(stopped) == numbers(run)


@pytest.mark.parametrize(
    ("error", "message"), [(KeyboardInterrupt(), "interrupted"), (OSError(28, "full"), "full")]
)
def test_what_is_being_saved_when_a_run_ends_is_saved(
    dppo, toy_recipe, tmp_path, monkeypatch, error, message
):
    save = Checkpoints.save

    def failing(self, step, *rest):
        save(self, step, *rest)  # which goes on in threads
        if step:
            raise error

    monkeypatch.setattr(Checkpoints, "save", failing)
    done = dppo("train", toy_recipe, "--workdir", tmp_path / "run")
    assert done.status == 1 and message in done.err and done.err.count("\n") == 1
    assert newest_step(tmp_path / "run") == 2


@pytest.mark.parametrize("begun", [True, False])
def test_one_process_a_run_directory(dppo, run, toy_recipe, tmp_path, begun):
    workdir = tmp_path / "run"
    if begun:
        shutil.copytree(run, workdir)
        (workdir / "summary.json").unlink()
    with claim(workdir):
        before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
        refused = dppo("train", toy_recipe, "--workdir", workdir)
        assert refused.status == 2 and f"{workdir}: another process trains there" in refused.err
        assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before
    assert dppo("train", toy_recipe, "--workdir", workdir).status == 0


def test_the_operative_configuration_repeats_the_run(dppo, run, tmp_path):
    done = dppo("train", run / "operative_config.gin", "--workdir", tmp_path / "again")
    assert done.status == 0, done.err
    assert numbers(tmp_path / "again") == numbers(run)
    for name in ("before", "after"):
        assert summary_of(tmp_path / "again")[name] == summary_of(run)[name]


def test_eval_finds_the_accuracy_of_the_run(dppo, run, toy_recipe):
    done = dppo("eval", toy_recipe, "--checkpoint", run, "--json")
    assert done.status == 0 and not done.err
    assert json.loads(done.out)["sets"] == summary_of(run)["after"]
    assert done.out.count("\n") == 1


def test_eval_for_people(dppo, run, toy_recipe):
    done = dppo("eval", toy_recipe, "--checkpoint", run)
    assert f"{summary_of(run)['accuracy_after']:.3f}" in done.out and "95 % interval" in done.out


@pytest.mark.parametrize(
    "overrides",
    [
        ["--gin.train.train.objective=@objectives.minirl()"],
        ["--gin.objectives.dppo_topk_tv.anchor=@objectives.old_anchor",
         "--gin.train.train.objective=@objectives.dppo_topk_tv()", "--gin.MICROBATCHES=2"],
    ],
    ids=["minirl", "recomputed_topk"],
)  # fmt: skip
def test_a_recomputed_anchor(dppo, toy_recipe, tmp_path, overrides):
    """The trainer scores the batch before the update, and the region is drawn around that."""
    done = dppo("train", toy_recipe, "--workdir", tmp_path / "run", "--gin.STEPS=1", *overrides)
    assert done.status == 0, done.err
    (line,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert line["update/gradient_norm"] > 0 and 0 <= line["divergence/mean"] < 0.1


def test_an_exact_divergence_is_from_the_recomputed_anchor_too(dppo, toy_recipe, tmp_path):
    """Before the one gradient step π is old itself, however far off the sampler's policy is."""
    overlay = tmp_path / "noisy.gin"
    overlay.write_text(
        "from __gin__ import dynamic_registration\nfrom dppo_jax import objectives\n"
        f'from dppo_jax import rollout_policy\nfrom dppo_jax import train\ninclude "{toy_recipe}"\n'
        "STEPS = 2\nMINIBATCHES = 1\ntrain.train.objective = @objectives.dppo_exact_tv()\n"
        "objectives.dppo_exact_tv.anchor = @objectives.old_anchor\n"
        "train.train.rollout_policy = @rollout_policy.noisy_weights()\n"
        "rollout_policy.noisy_weights.scale = 1.0\n"
    )
    assert dppo("train", overlay, "--workdir", tmp_path / "run").status == 0
    for line in lines(tmp_path / "run" / "metrics.jsonl"):
        assert line["update/gradient_norm"] > 0
        assert line["divergence/max"] < 1e-6 < 1e-3 < line["mismatch/prob_abs_mean"]


EXACT = ["tv_mean", "kl_mean"]
RATIOS = [f"{bound}_{kind}_over_exact" for bound in ("binary", "topk") for kind in ("tv", "kl")]


def test_exact_divergences_as_objective_and_as_metric(dppo, toy_recipe, tmp_path):
    """Every second step measures; binary <= top-K <= exact; nothing compiles late."""
    done = dppo(
        "train", toy_recipe, "--workdir", tmp_path / "run", "--gin.STEPS=3", "--gin.MICROBATCHES=2",
        "--gin.train.train.objective=@objectives.dppo_exact_tv()",
        "--gin.train.train.exact_divergence_every=2",
    )  # fmt: skip
    assert done.status == 0, done.err
    written = lines(tmp_path / "run" / "metrics.jsonl")
    for line in written:
        assert line["update/gradient_norm"] > 0 and 0 <= line["divergence/mean"] < 0.2
        measured = {name for name in line if "exact" in name}
        expected = {f"divergence/exact_{name}" for name in EXACT}
        expected |= {f"divergence/{name}" for name in RATIOS}
        assert measured == (expected if line["step"] == 1 else set())
    assert [line["time/compilations"] for line in written[1:]] == [0, 0]
    line = written[1]
    # the objective measures before each of the two gradient steps, the metric after both
    assert line["divergence/exact_tv_mean"] > line["divergence/mean"] > 0
    for kind in ("tv", "kl"):
        binary, topk = (
            line[f"divergence/{bound}_{kind}_over_exact"] for bound in ("binary", "topk")
        )
        assert line[f"divergence/exact_{kind}_mean"] > 0
        assert 0 < binary < topk < 1.0001


def test_a_run_of_two_seeds_differs(dppo, run, toy_recipe, tmp_path):
    flags = ("--gin.SEED=1", "--gin.STEPS=1")
    done = dppo("train", toy_recipe, "--workdir", tmp_path / "run", *flags)
    assert done.status == 0, done.err
    assert numbers(tmp_path / "run")[0]["reward/mean"] != numbers(run)[0]["reward/mean"]


# ---- the command line itself ---------------------------------------------------------------------


def verbs(parser=None, names=()):
    """Every verb of the command, as a user types it."""
    parser = parser or cli._parser()
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not below:
        yield names
    for action in below:
        for name, sub in action.choices.items():
            yield from verbs(sub, (*names, name))


@pytest.mark.parametrize("names", list(verbs()), ids=" ".join)
def test_every_verb_explains_itself(dppo, names):
    shown = dppo(*names, "--help")
    assert shown.status == 0 and not shown.err
    assert f"example: dppo {' '.join(names)}" in shown.out


def test_help_names_the_verbs():
    shown = subprocess.run(
        [sys.executable, "-m", "dppo_jax", "--help"], capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 0 and not shown.stderr
    assert all(names[0] in shown.stdout for names in verbs())
