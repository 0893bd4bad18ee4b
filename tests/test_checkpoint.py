"""What is saved comes back bit for bit, and what cannot be used says so in one line."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dppo_jax.checkpoint import CheckpointError, Checkpoints, load_params, newest_step
from dppo_jax.optimizer import adamw
from dppo_jax.records import TrainState
from dppo_jax.update import init_state

OPTIMIZER = adamw(learning_rate=0.1, warmup_steps=2, decay_steps=9)
POSITION = {"prompts": {"step": 3, "digest": "abc"}, "before": {"accuracy": 0.25}, "seconds": 1.5}


def made_state(seed=0, width=3):
    """Every leaf is told apart from every other, optimizer moments and counters included."""
    rng = np.random.default_rng(seed)
    params = {
        "embedding": jnp.zeros((5, width)),
        "blocks": {"q": jnp.zeros((2, width, 4)), "norm": jnp.zeros((2, width))},
    }
    state = init_state(params, OPTIMIZER, {"dual": jnp.zeros(())})
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 100, leaf.dtype), state
    )


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with the checkpoints of steps 1, 2 and 5, the last two kept."""
    run = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(run / "checkpoints")
    for step in (1, 2, 5):
        checkpoints.save(step, made_state(step), jax.random.key(7), POSITION | {"at": step})
    checkpoints.close()
    return run


def test_everything_comes_back(saved):
    checkpoints = Checkpoints(saved / "checkpoints")
    assert checkpoints.latest() == newest_step(saved) == 5
    for step in (2, 5):
        state, key, position = checkpoints.restore(step, made_state(), jax.random.key(0))
        assert isinstance(state, TrainState)
        assert_equal(state, made_state(step))
        assert jax.random.key_data(key).tolist() == jax.random.key_data(jax.random.key(7)).tolist()
        assert position == POSITION | {"at": step}
    checkpoints.close()


def test_the_newest_are_kept(saved):
    assert sorted(p.name for p in (saved / "checkpoints").iterdir()) == ["2", "5"]


def test_parameters_alone(saved):
    for directory in (saved, saved / "checkpoints"):
        assert_equal(load_params(directory, made_state().params), made_state(5).params)


def test_restored_as_sharded_as_asked(saved):
    mesh = Mesh(np.array(jax.devices()[:1]), ("fsdp",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        made_state().params,
    )
    params = load_params(saved, like)
    assert_equal(params, made_state(5).params)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(params))


def test_a_half_written_checkpoint_is_not_seen(saved, tmp_path):
    """A crash leaves a folder under a temporary name, which Orbax renames when all is written."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, made_state(3), jax.random.key(1), POSITION)
    checkpoints.close()
    half = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp-123"
    (half / "state").mkdir(parents=True)
    (half / "state" / "manifest.ocdbt").write_bytes(b"half")
    assert newest_step(tmp_path) == 3
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest() == 3
    assert_equal(checkpoints.restore(3, made_state(), jax.random.key(0))[0], made_state(3))
    checkpoints.close()
    assert_equal(load_params(tmp_path, made_state().params), made_state(3).params)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    return text


def test_a_checkpoint_of_another_model(saved):
    checkpoints = Checkpoints(saved / "checkpoints")
    with pytest.raises(CheckpointError, match="does not fit this configuration") as error:
        checkpoints.restore(5, made_state(width=4), jax.random.key(0))
    assert str(saved) in one_line(error)
    checkpoints.close()
    with pytest.raises(CheckpointError, match="does not fit this configuration") as error:
        load_params(saved, made_state(width=4).params)
    assert str(saved) in one_line(error)


def test_a_checkpoint_of_another_tree(saved):
    """Orbax alone would leave the one as it is and the other out, without a word."""
    more, less = made_state().params, made_state().params
    more["blocks"]["bias"] = jnp.zeros((2, 3))
    del less["blocks"]["norm"]
    for params, message in (
        (more, "bias.* is missing there, .2, 3. here"),
        (less, "norm.* is .2, 3. there, missing here"),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            load_params(saved, params)
        one_line(error)


def test_a_checkpoint_of_another_optimizer(saved):
    other = init_state(made_state().params, optax.sgd(0.1, momentum=0.9))
    checkpoints = Checkpoints(saved / "checkpoints")
    with pytest.raises(CheckpointError, match="opt_state.*missing") as error:
        checkpoints.restore(5, other, jax.random.key(0))
    one_line(error)
    checkpoints.close()


@pytest.mark.parametrize("name", ["nowhere", "empty", "numbers"])
def test_folders_without_a_checkpoint(tmp_path, name):
    folder = tmp_path / name
    if name != "nowhere":
        folder.mkdir()
        (folder / "notes.txt").write_text("3")
    if name == "numbers":
        (folder / "7").write_text("a file, not a folder")
    assert newest_step(folder) is None
    with pytest.raises(CheckpointError, match="holds no checkpoint: give a run directory") as error:
        load_params(folder, made_state().params)
    assert str(folder) in one_line(error)
    assert newest_step(tmp_path) is None and (name == "nowhere") == (not folder.exists())


WIDE = 300  # so that arrays lie in files of their own


def read_damaged(folder: Path) -> None:
    """Expects one line from both ways of reading."""
    checkpoints = Checkpoints(folder / "checkpoints")
    told = "checkpoints/1 cannot be read, get it back or remove it|checkpoints/1 is damaged"
    with pytest.raises(CheckpointError, match=told) as error:
        checkpoints.restore(1, made_state(width=WIDE), jax.random.key(0))
    one_line(error)
    checkpoints.close()
    with pytest.raises(CheckpointError, match=told) as error:
        load_params(folder, made_state(width=WIDE).params)
    one_line(error)


@pytest.mark.parametrize("damaged", ["_METADATA", "manifest.ocdbt", "ocdbt.process_0/d/*"])
def test_a_damaged_checkpoint(tmp_path, damaged):
    """In a process of its own: Orbax gives up tasks whose late exceptions fall into other tests."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, made_state(width=WIDE), jax.random.key(1), POSITION)
    checkpoints.close()
    for file in (tmp_path / "checkpoints" / "1" / "state").rglob(damaged):
        file.write_bytes(file.read_bytes()[:10])
    code = f"import pathlib, test_checkpoint as t; t.read_damaged(pathlib.Path({str(tmp_path)!r}))"
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
