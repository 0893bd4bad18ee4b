"""Everything that a run needs to go on, by Orbax: parameters, optimizer, keys, data position.

Restart order: a run's own latest checkpoint; else the recipe's initial policy.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dppo_jax.models.decoder import Params
from dppo_jax.multihost import of_all_processes
from dppo_jax.records import TrainState

# of TrainState; () is not written
CARRIED = ("objective_state", "rollout_memory", "token_counts", "critic")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, with what to do."""


def _tree(state: TrainState, key: jax.Array) -> dict[str, Any]:
    """The state as nested dicts of arrays, so that other programs can read it."""

    def named(tree: Any) -> dict[str, Any]:
        return {jax.tree_util.keystr(at): leaf for at, leaf in jax.tree.leaves_with_path(tree)}

    tree = {
        "params": state.params,
        "opt_state": named(state.opt_state),
        "step": state.step,
        "key": jax.random.key_data(key),
    }
    carried = {name: named(getattr(state, name)) for name in CARRIED}
    return of_all_processes(tree | {name: leaves for name, leaves in carried.items() if leaves})


class Checkpoints:
    """The checkpoints of one run directory, numbered by the training steps completed."""

    def __init__(self, directory: Path, *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(
            epath.Path(directory.absolute()),
            options=options,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "position": ocp.JsonCheckpointHandler(),
            },
        )

    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, key: jax.Array, position: dict[str, Any]) -> None:
        """Starts writing; a checkpoint appears under its number only when it is whole."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_tree(state, key)),
                position=ocp.args.JsonSave(position),
            ),
        )

    def restore(
        self, step: int, like: TrainState, key: jax.Array
    ) -> tuple[TrainState, jax.Array, dict[str, Any]]:
        """The state saved at `step`, shaped and sharded as `like`, its key and its position."""
        target = _tree(like, key)
        where = str(self._manager.directory / str(step))
        with _explained(where):
            _check_shapes(self._manager.item_metadata(step).state, target, where)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(
                        jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
                    ),
                    position=ocp.args.JsonRestore(),
                ),
            )
        saved = restored.state

        def rebuilt(name: str, tree: Any) -> Any:
            leaves = [saved[name][key] for key in target.get(name, ())]
            return jax.tree.unflatten(jax.tree.structure(tree), leaves)

        state = TrainState(
            saved["params"],
            rebuilt("opt_state", like.opt_state),
            saved["step"],
            **{name: rebuilt(name, getattr(like, name)) for name in CARRIED},
        )
        return state, jax.random.wrap_key_data(saved["key"]), restored.position

    def close(self) -> None:
        """Waits for the last write."""
        self._manager.wait_until_finished()
        self._manager.close()


def newest_step(directory: Path) -> int | None:
    """The step of a run's newest whole checkpoint; None where there is none.

    `directory` is a run directory or its `checkpoints` folder.
    """
    folder = epath.Path(_folder(directory))
    if not folder.is_dir():
        return None
    numbered = (entry for entry in folder.iterdir() if entry.name.isdigit())
    whole = (entry for entry in numbered if ocp.utils.is_checkpoint_finalized(entry))
    return max((int(entry.name) for entry in whole), default=None)


def _folder(directory: Path) -> Path:
    inside = directory.absolute() / "checkpoints"
    return inside if inside.is_dir() else directory.absolute()


def save_params(directory: Path, params: Params) -> None:
    """Writes parameters alone as checkpoint 0 of a folder that holds none, for `load_params`."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(epath.Path(directory.absolute()) / "0" / "state", {"params": params})


def load_params(directory: Path, like: Params) -> Params:
    """The parameters alone of a run's newest checkpoint, in the shapes and shardings of `like`.

    `directory` is a run directory or its `checkpoints` folder.
    """
    step = newest_step(directory)
    if step is None:
        raise CheckpointError(f"{directory} holds no checkpoint: give a run directory")
    path = epath.Path(_folder(directory)) / str(step) / "state"
    target = {"params": jax.tree.map(ocp.utils.to_shape_dtype_struct, like)}
    with ocp.PyTreeCheckpointer() as checkpointer, _explained(str(path.parent)):
        _check_shapes(checkpointer.metadata(path).item_metadata, target, str(path.parent))
        restored = checkpointer.restore(
            path,
            args=ocp.args.PyTreeRestore(
                target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=True,
            ),
        )
    return restored["params"]


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """Orbax's errors, many lines long, as one."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        # A plain Exception is Orbax's around TensorStore's error, with pages of its settings.
        wrapped = type(error) is Exception
        if not wrapped and not isinstance(error, ValueError | KeyError | FileNotFoundError):
            raise
        said = _first_line(error.__cause__ if wrapped and error.__cause__ else error)
        raise CheckpointError(
            f"{where} cannot be read, get it back or remove it to go on from the one before: {said}"
        ) from error


def _check_shapes(stored: Any, target: dict[str, Any], where: str) -> None:
    """Refuses a checkpoint that Orbax would restore in part without a word, or fail at late.

    `stored` is Orbax's metadata of the checkpoint, `target` what is asked of it, by its top names.
    """
    if stored is None:
        raise CheckpointError(f"{where} is damaged: remove it, and the one before it is used")
    in_file, asked = (
        {
            jax.tree_util.keystr(at): tuple(leaf.shape)
            for at, leaf in jax.tree.leaves_with_path(tree)
        }
        for tree in ({name: stored.tree[name] for name in target}, target)
    )
    for name in sorted(in_file.keys() | asked.keys()):
        theirs, ours = in_file.get(name, "missing"), asked.get(name, "missing")
        if theirs != ours:
            raise CheckpointError(
                f"{where} does not fit this configuration: {name} is {theirs} there, {ours} here"
            )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
