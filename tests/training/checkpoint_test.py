"""Checkpoints are restored bit for bit, or detected as damaged."""

import errno
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gemma_scope_jax.cli import common
from gemma_scope_jax.runtime import files
from gemma_scope_jax.saes import loading
from gemma_scope_jax.training import checkpoint, runs


@pytest.fixture(scope="module")
def run(inputs):
    return runs.build(tiny.run_config(inputs))


@pytest.fixture
def state(run):
    """A state with random values, on the run's mesh."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        if leaf.dtype.kind == "i":
            value = rng.integers(1, 9, size=leaf.shape)
        elif leaf.dtype == jnp.uint32:
            value = rng.integers(1, 2**31, size=leaf.shape)
        else:
            value = rng.normal(size=leaf.shape)
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, runs.abstract_state(run))


def with_params(state, **changes):
    bank = state.banks["main"]
    return state.replace(banks={"main": bank.replace(params=bank.params.replace(**changes))})


def at_step(state, step):
    return state.replace(step=jax.device_put(np.int32(step), state.step.sharding))


def save_all(folder, states, keep=5):
    with checkpoint.open_manager(folder / "checkpoints", keep) as manager:
        for state in states:
            checkpoint.save(manager, state, {"seed": 0})


def restore(folder, run):
    with checkpoint.open_manager(folder / "checkpoints", 5) as manager:
        return runs.restore(run, manager, set_aside=True)


def array_files(folder, step):
    """The files in which Orbax stores the arrays of a step."""
    return [p for p in (folder / "checkpoints" / str(step) / "state").rglob("d/*") if p.stat().st_size > 2000]


def test_a_state_is_restored_bit_for_bit_with_its_sharding(run, state, tmp_path):
    save_all(tmp_path, [at_step(state, 5)])
    again = restore(tmp_path, run)
    jax.tree.map(np.testing.assert_array_equal, again, at_step(state, 5))
    assert again.banks["main"].params.W_enc.sharding == state.banks["main"].params.W_enc.sharding


def test_the_newest_checkpoints_are_kept(run, state, tmp_path):
    save_all(tmp_path, [at_step(state, s) for s in (1, 2, 3)], keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_a_run_without_checkpoints_restores_none(run, tmp_path):
    assert restore(tmp_path, run) is None


def damage(path, how):
    content = bytearray(path.read_bytes())
    match how:
        case "truncated":
            del content[len(content) // 2 :]
        case "flipped bit":
            content[len(content) // 2] ^= 1
        case "zeroed block":
            content[len(content) // 2 : len(content) // 2 + 512] = bytes(512)
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "flipped bit", "zeroed block"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_restored(run, state, tmp_path, how, capsys):
    save_all(tmp_path, [at_step(state, 1), at_step(state, 2)])
    for path in array_files(tmp_path, 2):
        damage(path, how)
    again = restore(tmp_path, run)
    jax.tree.map(np.testing.assert_array_equal, again, at_step(state, 1))
    assert "Checkpoint 2 is damaged and was moved to" in capsys.readouterr().out
    assert (tmp_path / "damaged" / "2").exists()
    # The step can be saved again.
    save_all(tmp_path, [at_step(state, 2)])
    assert int(restore(tmp_path, run).step) == 2


def test_changed_contents_that_orbax_accepts_are_detected(run, state, tmp_path, capsys, monkeypatch):
    """The stored state differs from the digested one, as if a block had changed on its way to the disk."""
    save_all(tmp_path, [at_step(state, 1)])
    intended = at_step(state, 2)
    params = intended.banks["main"].params
    stored = with_params(intended, W_dec=params.W_dec.at[0, 3, 4].add(1e-4))
    digests = checkpoint.digests
    monkeypatch.setattr(checkpoint, "digests", lambda _: digests(intended))
    save_all(tmp_path, [stored])
    monkeypatch.setattr(checkpoint, "digests", digests)
    assert int(restore(tmp_path, run).step) == 1
    assert "its contents differ from what was saved, in banks.main.params.W_dec" in capsys.readouterr().out


def test_a_checkpoint_of_other_shapes_is_refused_but_not_called_damaged(state, inputs, tmp_path):
    save_all(tmp_path, [at_step(state, 1)])
    wider = runs.build(tiny.run_config(inputs, banks__main__width=128))
    with pytest.raises(
        ValueError,
        match=r"holds banks.main.params.W_enc of shape \[1, 32, 64\], but this run needs \[1, 32, 128\]",
    ):
        restore(tmp_path, wider)
    assert (tmp_path / "checkpoints" / "1").exists() and not (tmp_path / "damaged").exists()


def test_if_all_checkpoints_are_damaged_none_is_moved_and_the_run_does_not_start_over(run, state, tmp_path):
    save_all(tmp_path, [at_step(state, 1), at_step(state, 2)])
    for step in (1, 2):
        for path in array_files(tmp_path, step):
            damage(path, "truncated")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no checkpoint in .* can be read"):
            restore(tmp_path, run)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_a_step_damaged_again_is_set_aside_under_another_name(run, state, tmp_path):
    save_all(tmp_path, [at_step(state, 1)])
    for _ in range(2):
        save_all(tmp_path, [at_step(state, 2)])
        for path in array_files(tmp_path, 2):
            damage(path, "truncated")
        assert int(restore(tmp_path, run).step) == 1
    assert sorted(p.name for p in (tmp_path / "damaged").iterdir()) == ["2", "2.1"]


def test_checkpoints_are_not_set_aside_after_an_error_of_the_file_system(run, state, tmp_path, monkeypatch):
    save_all(tmp_path, [at_step(state, 1), at_step(state, 2)])

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint, "_check_shapes", refuse)
    with pytest.raises(PermissionError):
        restore(tmp_path, run)
    assert not (tmp_path / "damaged").exists()


def test_a_reader_changes_nothing(run, state, tmp_path):
    save_all(tmp_path, [at_step(state, 1), at_step(state, 2)])
    for path in array_files(tmp_path, 2):
        damage(path, "truncated")
    with checkpoint.open_reader(tmp_path / "checkpoints") as manager:
        again = runs.restore(run, manager, set_aside=False)
    assert int(again.step) == 1
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
    assert not (tmp_path / "damaged").exists()


def test_digests_depend_on_every_value_but_not_on_the_sharding(state):
    before = checkpoint.digests(state)
    alone = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), jax.devices()[0]), state)
    assert checkpoint.digests(alone) == before
    params = state.banks["main"].params
    for name, change in {
        "W_enc": params.W_enc.at[0, 3, 5].multiply(1 + 1e-7),
        "b_dec": params.b_dec.at[0, 0].set(0),
        "W_dec": params.W_dec[:, ::-1],
    }.items():
        now = checkpoint.digests(with_params(state, **{name: change}))
        assert {n for n, d in now.items() if d != before[n]} == {f"banks.main.params.{name}"}


def test_a_state_that_is_not_finite_is_never_saved(run, state, tmp_path):
    bad = with_params(state, b_enc=state.banks["main"].params.b_enc.at[0, 1].set(jnp.nan))
    with checkpoint.open_manager(tmp_path / "checkpoints", 2) as manager:
        with pytest.raises(FloatingPointError, match=r"non-finite values in banks\.main\.params\.b_enc"):
            checkpoint.save(manager, bad, {})
        assert manager.all_steps() == []


def test_a_full_disk_is_reported_in_one_line():
    assert "the disk is full" in common.explain(OSError(errno.ENOSPC, "No space left on device"))
    assert "the disk is full" in common.explain(
        ValueError("RESOURCE_EXHAUSTED: write: No space left on device\n more")
    )
    assert common.explain(TypeError("a defect")) is None


def test_only_errors_of_this_project_are_reported_without_a_traceback():
    with pytest.raises(ValueError) as ours:
        loading.run_config(pathlib.Path("nowhere"))
    assert "nowhere is not a run directory" in common.explain(ours.value)
    with pytest.raises(ValueError) as librarys:
        json.loads("{")
    assert common.explain(librarys.value) is None


@pytest.mark.parametrize("name", ["[v1] a", "*?"])
def test_a_folder_with_a_pattern_as_its_name_can_hold_checkpoints(name, run, state, tmp_path):
    save_all(tmp_path / name, [at_step(state, 5)])
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path / name, run), at_step(state, 5))


def test_a_saved_checkpoint_that_orbax_cannot_open_is_an_error(state, tmp_path, monkeypatch):
    """Orbax finds the parts to merge by a pattern, which matches nothing in a folder named `[v1]`."""
    monkeypatch.setattr(files, "for_orbax", str)
    with checkpoint.open_manager(tmp_path / "[v1]", 5) as manager:
        checkpoint.save(manager, at_step(state, 5), {})
        with pytest.raises(ValueError, match=r"checkpoint 5 in .* was saved but cannot be opened") as caught:
            checkpoint.check_saved(manager)
        assert len(str(caught.value)) < 480
        with pytest.raises(ValueError, match="cannot be opened"):
            checkpoint.save(manager, at_step(state, 6), {})


def test_a_checkpoint_without_read_permission_is_not_damaged(run, state, tmp_path, as_any_user):
    save_all(tmp_path, [at_step(state, 4), at_step(state, 5)])
    paths = array_files(tmp_path, 5)
    for path in paths:
        path.write_bytes(
            b""
        )  # Emptied, because TensorStore's threads keep root's privileges and could read it.
        path.chmod(0)
    with pytest.raises(PermissionError, match="Permission denied") as caught:
        restore(tmp_path, run)
    assert any(str(path) in common.explain(caught.value) for path in paths)
    assert (tmp_path / "checkpoints" / "5").exists()
    for path in paths:
        path.chmod(0o644)
    assert int(restore(tmp_path, run).step) == 4
