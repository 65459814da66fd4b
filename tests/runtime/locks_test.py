"""A lock has one holder at a time, also if its file is removed while others wait."""

import errno
import fcntl
import threading

import pytest

from gemma_scope_jax.runtime import locks


def test_a_second_holder_is_refused_or_waits_and_no_file_is_left(tmp_path, capsys):
    path, held = tmp_path / "folder" / ".lock", []
    with locks.locked(path, "it is taken"):
        with pytest.raises(ValueError, match="it is taken"):
            with locks.locked(path, "it is taken"):
                pytest.fail("held twice")

        def wait():
            with locks.locked(path, "waiting", waits=True):
                held.append(path.exists())

        thread = threading.Thread(target=wait)
        thread.start()
        while "waiting" not in capsys.readouterr().out:
            assert not held
    thread.join()  # The thread holds a new file, since the first holder removed its own.
    assert held == [True] and not path.exists()


def test_the_lock_file_of_a_killed_process_can_be_locked(tmp_path):
    (tmp_path / ".lock").touch()
    with locks.locked(tmp_path / ".lock", "taken"):
        pass
    assert not (tmp_path / ".lock").exists()


def test_a_file_system_without_locks_causes_a_warning_only(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locks.locked(tmp_path / ".lock", "taken"), locks.locked(tmp_path / ".lock", "taken"):
        assert f"Warning: {tmp_path} cannot be locked (No locks available)" in capsys.readouterr().out
