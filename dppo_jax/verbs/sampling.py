"""The verb about one prompt: sample."""

import argparse
import json
from pathlib import Path
from typing import Any

from dppo_jax.verbs import command
from dppo_jax.verbs.command import GIN, GIVEN, add_verb


def add(verbs: Any) -> None:
    """Adds it to the parser's verbs."""
    sample = add_verb(
        verbs,
        "sample",
        _sample,
        f"Ask a policy one prompt and watch the answers come; {GIN}.",
        'dppo sample runs/RUN --prompt "12*34=" -n 4 --logprobs',
    )
    sample.add_argument(
        "policy",
        help="a recipe (its initial policy), a run directory, a Hugging Face folder, or what "
        "import-hf wrote",
    )
    sample.add_argument("--prompt", required=True, help="the text, given to the tokenizer as it is")
    sample.add_argument(
        "--chat",
        action="store_true",
        help="ask in the chat template of the Hugging Face folder; a recipe uses its own always",
    )
    sample.add_argument("-n", type=int, default=1, metavar="N", help="answers (default: 1)")
    sample.add_argument("--temperature", type=float, help="default: the recipe's, else 1")
    sample.add_argument("--top-p", type=float, default=1.0, help="default: 1, all tokens")
    sample.add_argument("--max-new-tokens", type=int, help="default: the recipe's, else 256")
    sample.add_argument("--seed", type=int, default=0, help="same seed, same answers")
    sample.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be given "
        "several times"
    )  # fmt: skip
    sample.add_argument(
        "--logprobs", action="store_true", help="colour each token by its probability"
    )
    sample.add_argument("--json", action="store_true", help="print one JSON object")


def _sample(options: argparse.Namespace) -> None:
    command.start_jax()
    from dppo_jax.console import Console
    from dppo_jax.conversation import Piece, converse
    from dppo_jax.sampling.requests import SamplingParams
    from dppo_jax.sharding import MeshConfig

    asked = dict(
        n=options.n, top_p=options.top_p, seed=options.seed, stop_strings=tuple(options.stop)
    )
    SamplingParams(max_new_tokens=1, **asked)  # before anything is read
    mesh = MeshConfig().build()
    console = Console(quiet=options.json)
    try:
        policy = _open(options, mesh, console)
    finally:
        console.finish_line()  # which has hidden the cursor
    usual = policy.sampling
    temperature, budget = options.temperature, options.max_new_tokens
    if temperature is None:
        temperature = usual.temperature if usual else 1.0
    if budget is None:
        budget = usual.max_new_tokens if usual else 256
    sampling = SamplingParams(
        max_new_tokens=budget,
        temperature=temperature,
        stop_ids=(policy.tokenizer.end_id,),
        **asked,
    )
    latest = -1

    def show(number: int, pieces: list[Piece]) -> None:
        nonlocal latest
        if number != latest:
            console.answer(number, options.n)
            latest = number
        console.pieces(pieces, coloured=options.logprobs)

    done = converse(policy, options.prompt, sampling, mesh, show)
    if options.json:
        print(json.dumps(done.as_dict(options.prompt, options.logprobs)))
        return
    if options.logprobs:
        console.legend()
    speed = f"{done.tokens / done.seconds:,.0f} tokens/s"
    compiling = f"and {done.compile_seconds:.1f} s compiling"
    console.say(f"\n{done.tokens} tokens in {done.seconds:.2f} s, {speed}, {compiling}")


def _open(options: argparse.Namespace, mesh: Any, console: Any) -> Any:
    from dppo_jax.config import load_recipe, split_overrides
    from dppo_jax.initial_policy import shown_on
    from dppo_jax.stored_policy import of_folder, of_recipe, of_run
    from dppo_jax.train import train

    place = Path(options.policy).expanduser()
    overrides, _ = split_overrides(options.overrides)
    recipe = place / "operative_config.gin"
    if options.chat and (place.suffix == ".gin" or recipe.is_file()):
        raise ValueError(f"{place}: a recipe asks in its own template: leave --chat out")
    if place.suffix == ".gin":
        return of_recipe(load_recipe(place, train, overrides, GIVEN), mesh, shown_on(console))
    if not place.is_dir():
        raise FileNotFoundError(f"{place}: no such recipe, run or folder")
    if recipe.is_file():
        return of_run(load_recipe(recipe, train, overrides, GIVEN), place, mesh)
    if overrides:
        raise ValueError(f"{place} has no recipe that --gin.{overrides[0]} could change")
    return of_folder(place, mesh, chat=options.chat)
