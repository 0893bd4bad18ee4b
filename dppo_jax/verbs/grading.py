"""The verb that puts a file of answers before a verifier: a line for each row."""

import argparse
import json
from pathlib import Path
from typing import Any

from dppo_jax.verbs.command import GIVEN, add_verb


def add(verbs: Any) -> None:
    """Adds it to the parser's verbs."""
    parser = add_verb(
        verbs,
        "grade",
        _grade,
        "Grade anyone's answers: score, extracted answer and reason of each row, and the totals.",
        "dppo grade answers.jsonl --gold-field gold --pred-field pred --json\n"
        "         dppo grade answers.jsonl --gold-field gold --pred-field pred \\\n"
        "           --gin.math_answer.precision=2 --setting-field forms=match_types",
    )
    parser.add_argument("file", help="rows with a gold answer and a response: .jsonl, .jsonl.gz, "
                        ".json or .parquet")  # fmt: skip
    parser.add_argument("--gold-field", required=True, help="a.b leads into objects")
    parser.add_argument("--pred-field", required=True)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--verifier", default="math_answer", metavar="NAME",
                        help="of the project, or module.function (default: math_answer); its "
                        "settings are --gin.NAME.PARAMETER=VALUE")  # fmt: skip
    chosen.add_argument("--recipe", help="take the verifier of this .gin file")
    parser.add_argument(
        "--setting-field", action="append", default=[], metavar="PARAMETER=FIELD",
        help="a row's own setting, from a field of it; may be given again",
    )  # fmt: skip
    parser.add_argument("--expect-field", help="what another grader said, to be compared with")
    parser.add_argument("--max-failed", type=float, default=0.1, metavar="SHARE",
                        help="of rows that cannot be judged (default: 0.1)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _grade(options: argparse.Namespace) -> None:
    from dppo_jax.rewards.grading import as_json, grade_file, settings_of, show, verifier_named

    settings: dict[str, Any] = {}
    name = options.recipe or options.verifier
    if options.recipe:
        from dppo_jax.config import load_recipe, split_overrides
        from dppo_jax.train import train

        overrides, _ = split_overrides(options.overrides)
        recipe = load_recipe(options.recipe, train, overrides, GIVEN)
        verifier = recipe.arguments("verifier")["verifier"]
    else:
        verifier = verifier_named(name)
        given = [override.removeprefix("--gin.") for override in options.overrides]
        settings = settings_of(verifier, name, given)
    fields = {}
    for setting in options.setting_field:
        parameter, equals, field = setting.partition("=")
        if not (parameter and equals and field):
            raise ValueError(f"--setting-field {setting}: write PARAMETER=FIELD")
        fields[parameter] = field
    graded = grade_file(
        Path(options.file),
        verifier,
        settings=settings,
        gold_field=options.gold_field,
        pred_field=options.pred_field,
        expect_field=options.expect_field,
        settings_from=fields,
        max_failed=options.max_failed,
    )
    if options.json:
        print(json.dumps({"verifier": name, "settings": settings, **as_json(graded)}))
    else:
        show(graded)
