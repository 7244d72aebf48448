"""Checkpoints come back bit for bit, or not at all."""

import logging
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune import checkpoints, sharding
from jaxprune.training import TrainState
from tests.support.mutations import damaged

# Times that `make test-faults` damages each of some 20 files of a checkpoint.
MANY = int(os.environ.get("JAXPRUNE_FUZZ_FILES") or 3000) // 100


def _state(seed=0):
    key = jax.random.key(seed)
    params = {"blocks": {0: jax.random.normal(key, (40, 30)), 1: jnp.ones(3, jnp.bfloat16) / 3}}
    masks = {"masks": jax.tree.map(lambda leaf: leaf > 0, params), "key": key}
    opt_state = (optax.trace(0.9).init(params), optax.MaskedNode(), masks)
    return TrainState(jnp.asarray(7, jnp.int32), params, {}, opt_state)


def _saved(folder, *steps):
    manager = checkpoints.open_manager(folder)
    for step in steps:
        checkpoints.save(manager, step, _state(step), {"data": {"next_index": step}})
    return manager


def test_round_trip_is_bit_equal(tmp_path):
    state, record = checkpoints.restore(_saved(tmp_path, 3), _state())
    chex.assert_trees_all_equal(state, _state(3))
    chex.assert_trees_all_equal_dtypes(state, _state(3))
    assert record == {"data": {"next_index": 3}}


def test_keeps_the_newest_and_never_rewrites(tmp_path):
    manager = _saved(tmp_path, 1, 2, 3)
    assert sorted(manager.all_steps()) == [2, 3]
    checkpoints.save(manager, 3, _state(9), {})
    state, _ = checkpoints.restore(manager, _state())
    chex.assert_trees_all_equal(state, _state(3))


def test_restores_onto_eight_devices(tmp_path):

    like = sharding.replicate(_state(), sharding.make_mesh())
    state, _ = checkpoints.restore(_saved(tmp_path, 3), like)
    assert len(state.params["blocks"][0].devices()) == 8
    chex.assert_trees_all_equal(jax.device_get(state.params), jax.device_get(_state(3).params))


def test_other_trees_are_refused_and_named(tmp_path):
    manager = _saved(tmp_path, 3)
    like = _state()
    like = like._replace(
        params={"blocks": {0: like.params["blocks"][0].astype(jnp.bfloat16), 2: jnp.ones(3)}}
    )
    with pytest.raises(ValueError) as error:
        checkpoints.restore(manager, like)
    message = str(error.value)
    assert "params/blocks/0: float32[40, 30] in the checkpoint, bfloat16[40, 30] now" in message
    assert "params/blocks/1: only in the checkpoint" in message
    assert "params/blocks/2: not in the checkpoint" in message
    assert "or a different folder" in message
    with pytest.raises(ValueError, match=r"float32\[40, 30\] in the checkpoint, float32\[40, 31\]"):
        checkpoints.restore(manager, _state()._replace(params={"blocks": {0: jnp.ones((40, 31))}}))


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        checkpoints.restore(checkpoints.open_manager(tmp_path), _state())


def _flipped(intact):
    """Files with one byte changed: at the beginning, in the middle, at the end."""
    for where in (0.0, 0.3, 0.6, 0.99) if intact else ():
        changed = bytearray(intact)
        changed[int(len(changed) * where)] ^= 0x55
        yield bytes(changed)


def _damage_each_file(folder, count=0):
    """What `restore` says of checkpoint 3 with one file damaged, None where all is well.

    Each file is damaged at four places, or `count` times at random.
    """
    said = []
    for path in sorted(file for file in (folder / "3").rglob("*") if file.is_file()):
        intact = path.read_bytes()
        changes = (damaged(intact, seed) for seed in range(count)) if count else _flipped(intact)
        for content in changes:
            path.write_bytes(content)
            with checkpoints.open_manager(folder) as manager:
                try:
                    state, record = checkpoints.restore(manager, _state(), 3)
                    chex.assert_trees_all_equal(state, _state(3))
                    assert record == {"data": {"next_index": 3}}
                    said.append(None)
                except ValueError as error:
                    said.append(str(error))
        path.write_bytes(intact)
    return said


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(0, marks=pytest.mark.slow),
        pytest.param(MANY, marks=pytest.mark.faults),
    ],
)
def test_any_damaged_byte_is_reported_or_harmless(count, tmp_path):
    _saved(tmp_path, 2, 3).close()
    # In a process of its own: Orbax leaves coroutines behind that complain at some later time.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        said = [text for text in pool.submit(_damage_each_file, tmp_path, count).result() if text]
    assert len(said) > 8
    for text in said:
        assert "3 is corrupt" in text or "belongs to a different model" in text
        assert "different folder" in text
    state, _ = checkpoints.restore(checkpoints.open_manager(tmp_path), _state(), 2)
    chex.assert_trees_all_equal(state, _state(2))


@pytest.mark.parametrize(
    ("old", "new"), [('"next_index": 3', '"next_index": 8'), ("[40, 30]", "[30, 40]")]
)
def test_a_changed_record_is_reported(old, new, tmp_path):
    _saved(tmp_path, 3).close()
    path = tmp_path / "3" / "record" / "metadata"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with checkpoints.open_manager(tmp_path) as manager:
        for read in (checkpoints.read_record, checkpoints.fingerprint):
            with pytest.raises(checkpoints.Damaged, match="its record is damaged: its content"):
                read(manager)


@pytest.mark.parametrize("name", ["record/metadata", "state/_METADATA"])
def test_damaged_metadata_of_orbax_are_named(name, tmp_path):
    _saved(tmp_path, 3).close()
    (tmp_path / "3" / name).write_bytes(b'{"a": \xff')
    with checkpoints.open_manager(tmp_path) as manager:
        with pytest.raises(checkpoints.Damaged, match=rf"3 is corrupt \({name}: "):
            checkpoints.restore(manager, _state())


def test_the_newest_whole_checkpoint_is_read(tmp_path):
    with _saved(tmp_path, 2, 3) as manager:
        said = []

        def read(step):
            return checkpoints.restore(manager, _state(), step)[0]

        assert checkpoints.read_newest(manager, read, say=said.append).step == 7 and not said
        (tmp_path / "3" / "record" / "metadata").unlink()
        (tmp_path / "3.damaged").mkdir()
        state = checkpoints.read_newest(manager, read, say=said.append)
        chex.assert_trees_all_equal(state, _state(2))
        assert len(said) == 1 and "3 is corrupt (" in said[0]
        assert said[0].endswith("it was renamed to 3.damaged-2, and the one before it is used.")
        assert list(manager.all_steps()) == [2]
        checkpoints.save(manager, 3, _state(3), {})  # the run goes on
        (tmp_path / "3" / "record" / "metadata").unlink()
        (tmp_path / "2" / "record" / "metadata").unlink()
        with pytest.raises(checkpoints.Damaged, match="/3 is corrupt"):
            checkpoints.read_newest(manager, read, say=said.append)
        assert (tmp_path / "3").exists() and len(said) == 1
    with checkpoints.open_manager(tmp_path / "new") as manager:
        assert checkpoints.read_newest(manager, read) is None


def test_another_model_is_no_damage(tmp_path):
    """It must not be set aside."""
    with _saved(tmp_path, 2, 3) as manager:
        with pytest.raises(ValueError, match="different model") as error:
            checkpoints.read_newest(
                manager, lambda step: checkpoints.restore(manager, {"w": jnp.ones(2)}, step)
            )
    assert not isinstance(error.value, checkpoints.Damaged)
    assert (tmp_path / "3").exists()


def test_what_killed_saves_left_is_deleted(tmp_path):
    (tmp_path / "4.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "3").mkdir()
    (tmp_path / "5.orbax-checkpoint-tmp").symlink_to(tmp_path / "3")
    checkpoints.delete_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"3", "5.orbax-checkpoint-tmp"}


def _complain():
    """What Orbax prints of errors that it raises as well."""
    absl, asyncio = logging.getLogger("absl"), logging.getLogger("asyncio")
    absl.error("[thread=a] _SignalingThread.run() raised an exception: %s", "OUT_OF_RANGE")
    asyncio.error("Task exception was never retrieved\nfuture: <coro=f() at /orbax/a.py:1>")
    try:
        raise RuntimeError("Event loop is closed")
    except RuntimeError as error:
        asyncio.exception("Exception in callback")
        sys.unraisablehook(SimpleNamespace(exc_value=error, object=None))


def test_what_orbax_prints_of_errors_is_dropped_while_it_works(tmp_path, caplog, monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:  # without what a command has left in this process
        monkeypatch.setattr(logger, "filters", [])
    filters = [list(logger.filters) for logger in loggers]
    hook = sys.unraisablehook
    with _saved(tmp_path, 2) as manager:

        def fails(*_, **__):
            _complain()
            loggers[0].error("something else")
            loggers[1].error("Task exception was never retrieved\nfuture: <coro=f() at /me/a.py:1>")
            raise ValueError("OUT_OF_RANGE")

        for name in ("save", "restore"):
            monkeypatch.setattr(manager, name, fails)
        calls = [
            lambda: checkpoints.save(manager, 3, _state(3), {}),
            lambda: checkpoints.read_record(manager),
        ]
        for count, call in enumerate(calls, start=1):
            with pytest.raises((OSError, checkpoints.Damaged)):
                call()
            assert len(caplog.records) == 2 * count and not seen
            # What others print afterwards is not touched.
            assert sys.unraisablehook is hook
            assert [list(logger.filters) for logger in loggers] == filters
    _complain()
    assert len(caplog.records) == 4 + 3 and len(seen) == 1


def test_a_hook_that_is_set_meanwhile_stays(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    with _saved(tmp_path, 2) as manager:
        restore, ours = manager.restore, []

        def hooks(*args, **options):
            under = sys.unraisablehook
            ours.append(lambda found: under(found))
            sys.unraisablehook = ours[0]
            return restore(*args, **options)

        monkeypatch.setattr(manager, "restore", hooks)
        checkpoints.read_record(manager)
    assert sys.unraisablehook is ours[0]
    sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError("Event loop is closed"), object=None))
    assert len(seen) == 1


def test_a_checkpoint_that_cannot_be_written_is_an_error_of_the_system(tmp_path, monkeypatch):
    with _saved(tmp_path, 2) as manager:

        def fails(*_, **__):
            raise ValueError("RESOURCE_EXHAUSTED: a; b [source locations='tensorstore/a.cc:1']")

        monkeypatch.setattr(manager, "save", fails)
        with pytest.raises(OSError) as error:
            checkpoints.save(manager, 3, _state(3), {})
    assert str(error.value) == (
        f"checkpoint {tmp_path / '3'} cannot be written (ValueError: RESOURCE_EXHAUSTED: a, b); "
        "earlier checkpoints are kept: make room, and run the same command again."
    )


def test_checksums_catch_what_orbax_does_not(tmp_path, monkeypatch):
    manager = _saved(tmp_path, 3)
    restore = manager.restore

    def flip(step, args):
        items = restore(step, args=args)
        if "state" in items:
            params = items["state"].params
            params["blocks"][0] = params["blocks"][0].at[5, 5].add(1e-3)
        return items

    monkeypatch.setattr(manager, "restore", flip)
    with pytest.raises(ValueError, match="checksums differ at params/blocks/0"):
        checkpoints.restore(manager, _state())


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`folder` .*file cannot be written"):
        checkpoints.open_manager(tmp_path / "file")
    with pytest.raises(ValueError, match=r"`folder` .* cannot be written"):
        checkpoints.check_writable(tmp_path / "file" / "below")


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    checkpoints.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        checkpoints.write_json(path, {"a": np.ones(2)})
    assert checkpoints.read_json(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    path.write_text('{"a":')
    with pytest.raises(ValueError, match="damaged"):
        checkpoints.read_json(path)


def test_other_configurations_are_refused_and_listed():
    saved = {"seed": 0, "sparsity": 0.72, "log_every": 5}
    checkpoints.check_config(saved, {"seed": 0, "sparsity": 0.72}, "runs/a")
    with pytest.raises(ValueError) as error:
        checkpoints.check_config(saved, {"seed": 1, "sparsity": 0.9, "flip": True}, "runs/a")
    message = str(error.value)
    for part in ("runs/a", "seed: 0 there, 1 now", "sparsity: 0.72 there, 0.9 now", "flip"):
        assert part in message
    assert "Continue with the same options, use a different folder" in message


def test_second_signal_acts_as_usual():
    caught = []
    before = signal.signal(signal.SIGTERM, lambda *_: caught.append("outer"))
    try:
        with checkpoints.stop_signals() as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
            assert (stopped, caught) == ([signal.SIGTERM], [])
            os.kill(os.getpid(), signal.SIGTERM)
            assert (stopped, caught) == ([signal.SIGTERM], ["outer"])
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == ["outer", "outer"]
    finally:
        signal.signal(signal.SIGTERM, before)
