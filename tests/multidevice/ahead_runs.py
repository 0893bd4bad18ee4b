"""Run by test_ahead.py: several runs of one recipe, and the bits of what each trained.

    python ahead_runs.py RECIPE FOLDER "NAME=FLAG FLAG" "NAME=resume OTHER FLAG" ...

writes FOLDER/found.json
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from dppo_jax import cli
from dppo_jax.verbs import command


def params(run: Path) -> str:
    """A digest of the newest parameters' bits, whatever devices they were on."""
    path = max((run / "checkpoints").iterdir(), key=lambda step: int(step.name)) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.metadata(path).item_metadata.tree
        whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        found = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=whole))
    digest = hashlib.sha256()
    for name, leaf in jax.tree.leaves_with_path(found["params"]):
        digest.update(jax.tree_util.keystr(name).encode() + leaf.tobytes())
    return digest.hexdigest()


def main(recipe: str, folder: Path, *runs: str) -> None:
    command.start_jax = lambda *_: None
    found = {}
    for run in runs:
        name, _, flags = run.partition("=")
        if flags.startswith("resume "):  # as if it had been left after its second step
            shutil.copytree(folder / flags.split()[1], folder / name)
            shutil.rmtree(folder / name / "checkpoints" / "4")
            (folder / name / "summary.json").unlink()
            flags = flags.split(maxsplit=2)[2]
        workdir = folder / name
        cli.main(["train", recipe, "--workdir", str(workdir), *flags.split()])
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        found[name] = {
            "metrics": [json.loads(line) for line in lines],
            "samples": (workdir / "samples.jsonl").read_text(),
            "after": json.loads((workdir / "summary.json").read_text())["after"],
            "params": params(workdir),
        }
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
