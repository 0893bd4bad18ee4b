"""The command `dppo`: its parser, exit statuses, and errors of one line.

Exit status 0: done; 1: a run failed; 2: bad usage or bad input. The verbs are in `verbs`.
"""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from dppo_jax.clusters import Preempted
from dppo_jax.supervise import SUPERVISED, supervise
from dppo_jax.verbs import (
    benchmarks,
    command,
    data,
    grading,
    hugging_face,
    methods,
    planning,
    reporting,
    runs,
    sampling,
)
from dppo_jax.verbs.command import Failure

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one verb and exits."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    overrides = [a for a in given if a.startswith("--gin.")]
    options = _parser().parse_args([a for a in given if not a.startswith("--gin.")])
    options.overrides = overrides
    # Libraries below warn about what a user cannot change; our own words go through Console.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # Orbax logs the traceback of what it raises, too.
    logging.getLogger("absl").setLevel(logging.ERROR if options.debug else logging.CRITICAL)
    status = 0
    try:
        if command.cluster_of(options) and SUPERVISED not in os.environ:
            status = supervise(given, debug=options.debug)
        else:
            options.verb(options)
            _finish()
    except SystemExit as end:  # at a plain exit here the other processes would wait for ever
        cause = "as where nobody reads standard output any more"
        _fail(f"stopped by exit({end.code}), {cause}", EXIT_FAILED)
    except Failure as failure:
        _fail(str(failure), EXIT_FAILED)
    except Preempted as stopped:
        print(f"dppo: {stopped}", file=sys.stderr)
        _finish()
    except KeyboardInterrupt:
        _fail(
            "interrupted; dppo train with --workdir RUN_DIRECTORY goes on from its newest "
            "checkpoint",
            EXIT_FAILED,
        )
    except Exception as error:
        if options.debug and SUPERVISED not in os.environ:
            raise
        if options.debug:
            traceback.print_exc()
        # Bad input is a ValueError or a missing file wherever it is found; the rest is a failure.
        bad_input = isinstance(error, ValueError | FileNotFoundError | NotADirectoryError)
        message = " ".join(str(error).split()) or type(error).__name__
        if not bad_input:
            message = f"{type(error).__name__}: {message} (--debug shows where)"
        _fail(message, EXIT_BAD_INPUT if bad_input else EXIT_FAILED)
    if status:
        sys.exit(status)


def _fail(message: str, status: int) -> None:
    if "jax" in sys.modules:
        from dppo_jax import hosts

        hosts.fail_together(message, status)
    print(f"dppo: {message}", file=sys.stderr)
    sys.exit(status)


def _finish() -> None:
    """Ends with the other processes of the run, where there are some."""
    if "jax" in sys.modules:
        from dppo_jax import hosts

        hosts.finish_together()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dppo", description="Trust-region reinforcement learning of language models in JAX."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for family in (
        runs, reporting, sampling, planning, grading, methods, benchmarks, data, hugging_face,
    ):  # fmt: skip
        family.add(verbs)
    return parser
