"""A policy to talk to: of a recipe, a run, an imported checkpoint or a Hugging Face folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from dppo_jax import lora_run
from dppo_jax.config import Recipe
from dppo_jax.hf_exchange import ORIGIN, is_hf, load_model, read_hf
from dppo_jax.initial_policy import InitialContext, Report
from dppo_jax.models.decoder import Model, Params
from dppo_jax.models.hf_config import config_of
from dppo_jax.prompts import templates
from dppo_jax.prompts.examples import Example
from dppo_jax.prompts.mixture import load_train
from dppo_jax.prompts.templates import TemplatedTokenizer
from dppo_jax.prompts.tokenizers import HuggingFaceTokenizer, Tokenizer
from dppo_jax.sampling.generate import SamplingConfig


class StoredPolicy(NamedTuple):
    """A model with its parameters, and how its recipe samples where there is one."""

    model: Model
    params: Params
    tokenizer: Tokenizer
    sampling: SamplingConfig | None


def of_recipe(recipe: Recipe, mesh: Mesh, report: Report) -> StoredPolicy:
    """The policy that a run of the recipe starts with; `report` is told of a warm start's steps."""
    found = recipe.arguments(
        "model", "tokenizer", "initial_policy", "dataset", "data_dir", "max_prompt_tokens",
        "sampling", "seed", "lora",
    )  # fmt: skip
    model = lora_run.network_of(found["model"], found["lora"])
    key, _ = jax.random.split(jax.random.key(found["seed"]))
    source: Sequence[Example] = load_train(found["dataset"], found["data_dir"])
    context = InitialContext(
        model, mesh, key, found["tokenizer"], source, found["max_prompt_tokens"],
        found["sampling"].max_new_tokens, report,
    )  # fmt: skip
    with jax.set_mesh(mesh):
        parts = lora_run.begin(model, found["initial_policy"](context), key, mesh)
        params = model.policy(parts.trained, parts.base)
    return StoredPolicy(model, params, found["tokenizer"], found["sampling"])


def of_run(recipe: Recipe, directory: Path, mesh: Mesh) -> StoredPolicy:
    """The newest checkpoint of a run, whose recipe this is."""
    found = recipe.arguments("model", "tokenizer", "sampling")
    model = Model(found["model"])
    params = load_model(directory, model, mesh)
    return StoredPolicy(model, params, found["tokenizer"], found["sampling"])


def of_folder(directory: Path, mesh: Mesh, *, chat: bool = False) -> StoredPolicy:
    """A Hugging Face folder, or what `dppo import-hf` made of one; asked in its chat template
    where `chat` says so."""

    def tokenizer_of(folder: Path) -> Tokenizer:
        tokenizer = HuggingFaceTokenizer(folder)
        if not chat:
            return tokenizer
        return TemplatedTokenizer(tokenizer, templates.chat(str(folder), user="{problem}"))

    if is_hf(directory):
        tokenizer = tokenizer_of(directory)
        imported = read_hf(directory, mesh)
        return StoredPolicy(imported.model, imported.params, tokenizer, None)
    origin = directory / ORIGIN
    if not is_hf(origin):
        raise ValueError(
            f"{directory} is no recipe (*.gin), run directory, Hugging Face folder, or what "
            "dppo import-hf wrote"
        )
    tokenizer = tokenizer_of(origin)
    model = Model(config_of(str(origin)))
    params = load_model(directory, model, mesh)
    return StoredPolicy(model, params, tokenizer, None)
