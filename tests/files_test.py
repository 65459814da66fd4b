"""Files of others: what is opened, and what is said of those that are not."""

import os

import pytest

from gemma_scope_jax import files


def test_a_link_to_a_file_is_followed(tmp_path):
    (tmp_path / "blob").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("blob")
    with files.open_regular(tmp_path / "link", 5) as file:
        assert file.read() == b"12345"


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: it is no regular file"):
        files.open_regular(tmp_path / "pipe")


def test_an_endless_device_behind_a_link_is_refused(tmp_path):
    (tmp_path / "cfg.json").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"cfg\.json: it is no regular file"):
        files.read_json(tmp_path / "cfg.json")


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate(2**40)  # Takes no room.
    with pytest.raises(ValueError, match=r"big\.json: it has 1,099,511,627,776 bytes"):
        files.read_json(tmp_path / "big.json")


def test_a_missing_file_and_a_folder_are_said_with_their_name(tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*nothing\.json"):
        files.read_json(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match=r"cannot read .*: Is a directory"):
        files.read_json(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\ufeff\ufeff{}", "[" * 10**5, '{"a": 1}' * 2])
def test_what_is_no_json_object_is_said_in_a_short_line(tmp_path, content):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json") as caught:
        files.read_json(tmp_path / "a.json")
    assert len(str(caught.value)) < 500


def test_a_full_disk_stays_what_it_is(tmp_path):
    with pytest.raises(OSError, match="No space"), files.reading(tmp_path):
        raise OSError(28, "No space left on device")
