"""`dppo data prepare`: data sets from their files, their public homes, or anyone's own rows."""

import argparse
import json
from collections.abc import Callable
from typing import Any

_OWN_FIELDS = ("prompt", "answer", "solution", "subject", "level")


def add_verbs(data: Any, verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verbs below `dppo data`."""
    prepare = verb(
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
    prepare.add_argument("--data-dir", default="runs/data", help="(default: runs/data)")
    prepare.add_argument("--json", action="store_true", help="print one JSON object")


def _prepare(options: argparse.Namespace) -> None:
    from dppo_jax.prompts.fields import Fields
    from dppo_jax.prompts.store import prepare, prepare_own

    own = {field: getattr(options, f"{field}_field") for field in _OWN_FIELDS}
    if options.jsonl is None:
        if any(own.values()) or options.split:
            raise ValueError("--split and --...-field describe your own rows: give --jsonl FILE")
        done = prepare(options.name, options.data_dir, options.source)
    else:
        if options.source or not (own["prompt"] and own["answer"]):
            raise ValueError("--jsonl FILE needs --prompt-field and --answer-field, and no --from")
        subject, level = (((own[name],) if own[name] else ()) for name in ("subject", "level"))
        fields = Fields((own["prompt"],), (own["answer"],), own["solution"] or "", subject, level)
        done = prepare_own(options.name, options.data_dir, options.jsonl, fields, options.split)
    if options.json:
        print(json.dumps(done._asdict() | {"path": str(done.path)}))
        return
    sizes = ", ".join(f"{split} {count}" for split, count in done.splits.items())
    print(f"{done.path}: {sizes}" + (" (already there)" if done.reused else ""))
    for split, reasons in done.dropped.items():
        left_out = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        print(f"left out of {split}: {left_out}")
