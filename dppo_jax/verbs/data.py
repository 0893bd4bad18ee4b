"""Verbs about data sets: data prepare, data show."""

import argparse
import functools
import json
from typing import TYPE_CHECKING, Any

from dppo_jax.verbs import command
from dppo_jax.verbs.command import GIVEN, add_verb

if TYPE_CHECKING:
    from dppo_jax.prompts.tokenizers import Tokenizer

_LISTED = 10  # rows without an answer that can be used
_OWN_FIELDS = ("prompt", "answer", "solution", "subject", "level")


def add(verbs: Any) -> None:
    """Adds `dppo data ...` to the parser's verbs."""
    data = verbs.add_parser("data", help="Data sets on disk.").add_subparsers(
        required=True, metavar="WHAT"
    )
    prepare = add_verb(
        data,
        "prepare",
        _prepare,
        "Write a data set as TFDS array_record files: arithmetic, stories, gsm8k, math, math500, "
        "dapo_math_17k, aime24, aime25, amc, sanity_math_1k5, or your own under a new name.",
        "dppo data prepare gsm8k --from FOLDER\n"
        "         dppo data prepare mine --jsonl q.jsonl --prompt-field q --answer-field a",
    )
    prepare.add_argument("name")
    prepare.add_argument("--from", dest="source", help="file or folder (default: downloaded)")
    prepare.add_argument(
        "--jsonl",
        help="your own .jsonl, .json or .parquet file, or a folder with train and test files",
    )
    prepare.add_argument("--split", help="of your own file (default: test or train, by its name)")
    for field in _OWN_FIELDS:
        prepare.add_argument(f"--{field}-field", help="of your own rows; a.b leads into objects")
    prepare.add_argument(
        "--verifier", help="leave out, and tell, what this verifier of dppo grade cannot judge"
    )
    prepare.add_argument("--data-dir", default="runs/data", help="(default: runs/data)")
    prepare.add_argument("--json", action="store_true", help="print one JSON object")

    show = add_verb(
        data,
        "show",
        _show,
        "Problems of a prepared set as the policy sees them: text, tokens, answer; any "
        "--gin.NAME=VALUE overrides the recipe.",
        "dppo data show gsm8k -n 2 --recipe configs/recipes/gsm8k_cpu.gin\n"
        "         dppo data show aime24 --tokenizer MODEL_DIR --user boxed",
    )
    show.add_argument("name")
    show.add_argument("-n", type=int, default=3, help="problems to show (default: 3)")
    show.add_argument("--split", help="(default: train, or test where there is no train)")
    show.add_argument("--recipe", help="take tokenizer, template and data folder of this recipe")
    show.add_argument(
        "--tokenizer", metavar="DIR", help="a model's folder: its tokenizer.json and chat template"
    )
    show.add_argument(
        "--user", help="with --tokenizer: problem (default), boxed, dapo, or text with {problem}"
    )
    show.add_argument("--system", help="with --tokenizer: the system prompt")
    show.add_argument("--data-dir", help="(default: the recipe's, or runs/data)")
    show.add_argument("--json", action="store_true", help="print one JSON object")


def _show(options: argparse.Namespace) -> None:
    if options.recipe is None:
        _show_problems(options, _tokenizer_of(options), options.data_dir or "runs/data", None)
        return
    if options.tokenizer is not None:
        raise ValueError("the recipe has a tokenizer of its own: give --recipe or --tokenizer")
    command.start_jax()
    from dppo_jax.config import load_recipe, split_overrides
    from dppo_jax.train import train

    overrides, _ = split_overrides(options.overrides)
    recipe = load_recipe(options.recipe, train, overrides, GIVEN)
    given = recipe.arguments("tokenizer", "data_dir", "max_prompt_tokens")
    data_dir = options.data_dir or given["data_dir"]
    _show_problems(options, given["tokenizer"], data_dir, given["max_prompt_tokens"])


def _show_problems(
    options: argparse.Namespace,
    tokenizer: "Tokenizer | None",
    data_dir: str,
    max_prompt_tokens: int | None,
) -> None:
    """Prints the first problems of a set, and how long all of its prompts are."""
    from dppo_jax.prompts.store import load, splits_of
    from dppo_jax.prompts.templates import rendered

    if options.n < 0:
        raise ValueError(f"-n {options.n}: a number of problems to show")
    splits = splits_of(options.name, data_dir)
    split = options.split or ("test" if splits and "train" not in splits else "train")
    source = load(options.name, data_dir, split)
    problems: list[dict[str, Any]] = []
    for index in range(min(options.n, len(source))):
        example = source[index]
        problem = {"id": example.id, "text": example.prompt, "answer": example.answer}
        problem |= {k: v for k in ("subject", "level") if (v := getattr(example, k))}
        if tokenizer is not None:
            problem["text"] = rendered(tokenizer, example.prompt)
            problem["tokens"] = len(tokenizer.encode(example.prompt))
        problems.append(problem)
    summary: dict[str, Any] = {"name": options.name, "split": split, "problems": len(source)}
    if tokenizer is not None:
        counts = sorted(len(tokenizer.encode(example.prompt)) for example in source)
        middle, most = counts[len(counts) // 2], counts[int(0.99 * (len(counts) - 1))]
        summary["tokens"] = {
            "shortest": counts[0], "median": middle, "99 % are at most": most, "longest": counts[-1]
        }  # fmt: skip
        if max_prompt_tokens is not None:
            long = sum(count > max_prompt_tokens for count in counts)
            summary["tokens"][f"more than max_prompt_tokens={max_prompt_tokens}"] = long
    if options.json:
        print(json.dumps(summary | {"shown": problems}))
        return
    for problem in problems:
        labels = [f"answer {problem['answer']}"]
        labels += [f"{k} {problem[k]}" for k in ("subject", "level", "tokens") if k in problem]
        print(f"---- {problem['id']}: {', '.join(labels)}\n{problem['text']}")
    lengths = ", ".join(f"{name} {count}" for name, count in summary.get("tokens", {}).items())
    print(f"---- {options.name} {split}: {len(source)} problems"
          + (f"; prompt tokens: {lengths}" if lengths else ""))  # fmt: skip


def _tokenizer_of(options: argparse.Namespace) -> "Tokenizer | None":
    """The tokenizer of --tokenizer, with its chat template; None where it was not given."""
    from dppo_jax.prompts.templates import TemplatedTokenizer, chat
    from dppo_jax.prompts.tokenizers import HuggingFaceTokenizer

    if options.tokenizer is None:
        if options.user or options.system:
            raise ValueError("--user and --system go into a chat template: give --tokenizer DIR")
        return None
    template = chat(options.tokenizer, user=options.user or "problem", system=options.system)
    return TemplatedTokenizer(HuggingFaceTokenizer(options.tokenizer), template)


def _prepare(options: argparse.Namespace) -> None:
    from dppo_jax.prompts.fields import Fields
    from dppo_jax.prompts.store import prepare, prepare_own
    from dppo_jax.rewards.grading import verifier_named
    from dppo_jax.rewards.verdicts import unfit_examples

    unfit = None
    if options.verifier is not None:
        unfit = functools.partial(unfit_examples, verifier_named(options.verifier))
    own = {field: getattr(options, f"{field}_field") for field in _OWN_FIELDS}
    if options.jsonl is None:
        if any(own.values()) or options.split:
            raise ValueError("--split and --...-field describe your own rows: give --jsonl FILE")
        done = prepare(options.name, options.data_dir, options.source, unfit)
    else:
        if options.source or not (own["prompt"] and own["answer"]):
            raise ValueError("--jsonl FILE needs --prompt-field and --answer-field, and no --from")
        subject, level = (((own[name],) if own[name] else ()) for name in ("subject", "level"))
        fields = Fields((own["prompt"],), (own["answer"],), own["solution"] or "", subject, level)
        done = prepare_own(
            options.name, options.data_dir, options.jsonl, fields, options.split, unfit
        )
    if options.json:
        print(json.dumps(done._asdict() | {"path": str(done.path)}))
        return
    sizes = ", ".join(f"{split} {count}" for split, count in done.splits.items())
    print(f"{done.path}: {sizes}" + (" (already there)" if done.reused else ""))
    for split, reasons in done.dropped.items():
        left_out = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        print(f"left out of {split}: {left_out}")
    for row in list(done.unfit)[:_LISTED]:
        print(f"  {row}: {done.unfit[row]}")
    if len(done.unfit) > _LISTED:
        print(f"  and {len(done.unfit) - _LISTED} more; --json lists all")
