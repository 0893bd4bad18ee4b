"""Every file that ships under configs/ and every promise of the README that can be executed."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from dppo_jax import objectives
from dppo_jax.config import load_recipe
from dppo_jax.preflight import check_layout
from dppo_jax.records import Batch, Objective, Rollout, TokenStats
from dppo_jax.train import train

REPOSITORY = Path(__file__).parent.parent
CONFIGS = REPOSITORY / "configs"
RECIPES = sorted((CONFIGS / "recipes").glob("*.gin"))
ALGORITHMS = sorted((CONFIGS / "algorithms").glob("*.gin"))
README = (REPOSITORY / "README.md").read_text()


def names(paths):
    return [path.stem for path in paths]


@pytest.mark.parametrize("path", RECIPES, ids=names(RECIPES))
def test_recipes_load_and_say_what_they_are(path):
    recipe = load_recipe(path, train, given=("workdir", "console"))
    asked = recipe.config_text()
    assert "train.train.steps" in asked and "train.train.objective" in asked
    header = path.read_text().split("from __gin__")[0]
    assert f"dppo train configs/recipes/{path.name}" in header


def test_an_installed_package_has_the_recipes(tmp_path):
    """As a wheel holds it: links followed, and what is no code by pyproject.toml's patterns."""
    patterns = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    for file in (REPOSITORY / "dppo_jax").glob("**/*.py"):
        copy = tmp_path / "site" / file.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    for pattern in patterns["package-data"]["*"]:
        for file in CONFIGS.rglob(pattern):
            copy = tmp_path / "site" / "dppo_jax" / "configs" / file.relative_to(CONFIGS)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    assert (REPOSITORY / "dppo_jax" / "configs").resolve() == CONFIGS
    done = subprocess.run(
        [sys.executable, "-m", "dppo_jax", "train", "configs/recipes/arithmetic_cpu.gin",
         "--over", "configs/algorithms/grpo.gin", "--gin.SETPS=1"],
        cwd=tmp_path / "site", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "did you mean STEPS" in done.stderr, done.stderr


@pytest.mark.parametrize("path", RECIPES, ids=names(RECIPES))
def test_a_gpu_and_a_node_of_them_take_every_recipe(path):
    """What a run refuses before it computes anything."""
    asked = (
        "model", "sampling", "steps", "prompts_per_step", "minibatches", "microbatches",
        "max_prompt_tokens", "rollout_batches",
    )  # fmt: skip
    for mesh, devices in (("gpu1", 1), ("h100_8", 8)):
        over = [str(CONFIGS / "mesh" / f"{mesh}.gin")]
        found = load_recipe(path, train, (), ("workdir", "console"), over).arguments("mesh", *asked)
        sizes = found.pop("mesh").sizes(devices)
        check_layout(mesh=AbstractMesh(tuple(sizes.values()), tuple(sizes)), **found)


@pytest.mark.parametrize("path", ALGORITHMS, ids=names(ALGORITHMS))
def test_algorithms_fit_on_top_of_a_recipe(path, tmp_path):
    overlay = tmp_path / "ablation.gin"
    overlay.write_text(
        "from __gin__ import dynamic_registration\n"
        f'include "{CONFIGS / "recipes" / "arithmetic_cpu.gin"}"\ninclude "{path}"\n'
    )
    recipe = load_recipe(overlay, train, given=("workdir", "console"))
    objective = recipe.arguments("objective")["objective"]
    assert isinstance(objective, Objective)
    assert objective.needs == getattr(objectives, path.stem)().needs


def test_the_readme_names_files_that_exist():
    for name in re.findall(r"`((?:configs|launch|tests|dppo_jax)/[\w./]+)`", README):
        assert (REPOSITORY / name).exists(), name


def test_the_readme_objective_runs(tmp_path, monkeypatch):
    """The worked example of "Add an objective", as a module that a recipe imports: its gradient
    against its own closed form, -A·r·M + 2·pull·log r."""
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(example.splitlines()) <= 30
    (tmp_path / "mine.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    overlay = tmp_path / "ablation.gin"
    overlay.write_text(
        "from __gin__ import dynamic_registration\nfrom dppo_jax import train\nimport mine\n"
        f'include "{CONFIGS / "recipes" / "arithmetic_cpu.gin"}"\n'
        "train.train.objective = @mine.masked_with_pull()\nmine.masked_with_pull.pull = 0.01\n"
    )
    recipe = load_recipe(overlay, train, given=("workdir", "console"))
    objective = recipe.arguments("objective")["objective"]
    mu, pi = np.array([[0.3, 0.3, 0.8]]), np.array([[0.55, 0.4, 0.5]])
    advantages = np.array([[0.7, 0.7, 0.7]])
    shape, nothing = mu.shape, jnp.zeros((1, 3, 0))
    rollout = Rollout(
        prompt_tokens=jnp.zeros((1, 1), jnp.int32),
        prompt_mask=jnp.ones((1, 1), bool),
        response_tokens=jnp.zeros(shape, jnp.int32),
        response_mask=jnp.ones(shape, bool),
        logp_rollout=jnp.asarray(np.log(mu), jnp.float32),
        topk_ids=nothing.astype(jnp.int32),
        topk_logp_rollout=nothing,
        entropy_rollout=jnp.zeros(shape),
        finish_reason=jnp.ones((1,), jnp.int32),
    )
    batch = Batch(rollout, jnp.asarray(advantages, jnp.float32))

    def loss(logp):
        return objective.loss(TokenStats(logp, nothing, logp), batch).loss_sum

    gradient = jax.grad(loss)(jnp.asarray(np.log(pi), jnp.float32))
    kept = np.array([[0, 1, 1]])  # the first rose by 0.25, the last comes back
    expected = -advantages * kept * pi / mu + 0.02 * np.log(pi / mu)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4)
