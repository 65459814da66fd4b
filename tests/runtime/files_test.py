"""Only regular files of limited size are opened, outputs are written whole, and errors name the path."""

import fcntl
import os
import pathlib
import subprocess
import sys

import pytest

from gemma_scope_jax.runtime import files


def test_a_link_to_a_file_is_followed(tmp_path):
    (tmp_path / "blob").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("blob")
    with files.open_regular(tmp_path / "link", 5) as file:
        assert file.read() == b"12345"


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: it is not a regular file"):
        files.open_regular(tmp_path / "pipe")


def test_a_link_to_an_endless_device_is_refused(tmp_path):
    (tmp_path / "cfg.json").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"cfg\.json: it is not a regular file"):
        files.read_json(tmp_path / "cfg.json")


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate(2**40)  # A sparse file.
    with pytest.raises(ValueError, match=r"big\.json: it has 1,099,511,627,776 bytes"):
        files.read_json(tmp_path / "big.json")


def test_errors_for_a_missing_file_and_a_folder_name_the_path(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.json does not exist"):
        files.read_json(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match=r"cannot read .*: Is a directory"):
        files.read_json(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\ufeff\ufeff{}", "[" * 10**5, '{"a": 1}' * 2])
def test_a_file_without_a_json_object_is_refused_in_a_short_line(tmp_path, content):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json") as caught:
        files.read_json(tmp_path / "a.json")
    assert len(str(caught.value)) < 500


def test_a_full_disk_stays_an_oserror(tmp_path):
    with pytest.raises(OSError, match="No space"), files.reading(tmp_path):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", ["[ab]", "a?", "*", "[v1] x"])
def test_the_name_of_an_existing_path_is_not_a_pattern(tmp_path, name):
    (tmp_path / name / "in").mkdir(parents=True)
    for other in ("a.txt", "b.txt", ".hidden.txt"):
        (tmp_path / name / "in" / other).touch()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.txt").touch()
    folder = tmp_path / name / "in"
    assert files.matching(f"{folder}/*.txt") == (folder, [folder / "a.txt", folder / "b.txt"])
    assert files.matching(folder / "a.txt") == (folder / "a.txt", [folder / "a.txt"])
    assert files.matching(f"{tmp_path}/**/c.txt")[1] == [tmp_path / "a" / "c.txt"]


def test_a_leading_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").touch()
    assert files.matching("~/*.txt") == (tmp_path, [tmp_path / "a.txt"])
    assert files.expanded("~/x") == tmp_path / "x"
    assert files.expanded("x/~/y") == pathlib.Path("x/~/y")
    assert files.expanded("~nobody of that name/x") == pathlib.Path("~nobody of that name/x")


def test_a_file_is_replaced_whole_and_leftovers_are_removed(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    for left in (".a.json.123", ".a.json.4567890"):
        (tmp_path / left).write_text("half")
    for mine in (".a.json.keep", ".a.json.notes.1", ".b.json.12"):
        (tmp_path / mine).touch()
    with pytest.raises(RuntimeError), files.replacing_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old"
    with files.replacing_file(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".a.json.keep",
        ".a.json.notes.1",
        ".b.json.12",
        "a.json",
    ]


def test_two_writers_of_one_file_keep_each_others_partial_files(tmp_path, monkeypatch):
    """Another writer removes leftovers just before this one takes its lock, and just before it renames the file."""
    path, flock, replace = tmp_path / "a.json", fcntl.flock, pathlib.Path.replace
    cleaned = []

    def clean(*_):
        cleaned.append(1)
        monkeypatch.undo()  # Only once.
        files._partial(path)

    for name, (owner, original) in {"flock": (fcntl, flock), "replace": (pathlib.Path, replace)}.items():
        monkeypatch.setattr(owner, name, lambda *args, original=original: [clean(), original(*args)][1])
        with files.replacing_file(path) as partial:
            partial.write_text(name)
        assert path.read_text() == name
    assert len(cleaned) == 2


def test_partial_folders_of_a_running_process_are_kept(tmp_path):
    code = (
        "import sys, pathlib; from gemma_scope_jax.runtime import files\n"
        "with files.filling_folder(pathlib.Path(sys.argv[1])) as made: print(made, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "x"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        theirs = pathlib.Path(other.stdout.readline().strip())
        with files.filling_folder(tmp_path / "x") as ours:
            assert theirs.is_dir() and theirs != ours
        other.kill()
        other.wait()
        assert theirs.is_dir()
    with files.filling_folder(tmp_path / "x"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_folder_is_filled_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "deep" / "x"
    with pytest.raises(RuntimeError), files.filling_folder(folder) as made:
        (made / "a").write_text("1")
        raise RuntimeError
    assert not list(folder.parent.iterdir())
    with files.filling_folder(folder) as made:
        (made / "in").mkdir()
        (made / "in" / "a").write_text("1")
    with files.filling_folder(folder) as made:
        (made / "in").mkdir()
        (made / "in" / "b").write_text("2")
        (made / "other").mkdir()
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
    assert found == ["in", "in/a", "in/b", "other"]


@pytest.mark.parametrize(
    ("path", "is_folder", "message"),
    [
        ("file/x", False, "Not a directory"),
        ("file", True, "is a file; give a folder"),
        ("folder", False, "is a folder; give a file"),
        ("folder/" + "x" * 300, True, "File name too long"),
        ("new/" + "x" * 252 + ".png", False, "File name too long"),
        ("loop/x", False, "Too many levels"),
        ("/proc/x", True, "cannot write /proc/x"),
        ("nul\0", False, "null"),
        ("\udcff", True, "not in UTF-8"),
    ],
)
def test_outputs_are_checked_before_the_work(tmp_path, path, is_folder, message):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        files.check_output(tmp_path / path, is_folder)
    for fine, is_it in (("new/deep/x", True), ("new/x.png", False), ("file", False), ("folder", True)):
        files.check_output(tmp_path / fine, is_it)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("path", ["new.jsonl", "new/deep/x", "folder"])
def test_leftovers_of_a_killed_check_are_removed_by_the_next(tmp_path, path):
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    program = (
        "import os, pathlib, sys; from gemma_scope_jax.runtime import files\n"
        "files._remove = lambda path: os._exit(0)\n"
        "files.check_output(pathlib.Path(sys.argv[1]), sys.argv[1].endswith('folder'))\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / path)], check=True)
    assert sorted(tmp_path.rglob("*")) != before
    files.check_output(tmp_path / path, is_folder=path == "folder")
    assert sorted(tmp_path.rglob("*")) == before


def test_every_name_gets_its_own_safe_folder_name():
    names = ["layer_1", "a b", "a_b", "A b", "a/b", "..", ".", "...npz", "../../up", "/etc", "", "é", "ü", "x" * 300,
             "x" * 301, "a\nb", "a\0b", "~", ".hidden", "\ud800"]  # fmt: skip
    made = files.folder_names(names)
    assert list(made) == names and made["layer_1"] == "layer_1"
    assert len({folder.lower() for folder in made.values()}) == len(names)
    for folder in made.values():
        assert pathlib.PurePath(folder).parts == (folder,) and len(folder) < 128
        assert folder.isascii() and folder[0] not in ".~" and folder.isprintable() and " " not in folder


def test_errors_for_missing_permissions_name_the_path(tmp_path, as_any_user):
    (tmp_path / "secret.json").touch(mode=0)
    (tmp_path / "fixed").mkdir(mode=0o555)
    with pytest.raises(ValueError, match=r"cannot read .*secret\.json.*: Permission denied"):
        files.read_json(tmp_path / "secret.json")
    for name in ("fixed", "fixed/new/x"):
        with pytest.raises(ValueError, match=rf"cannot write .*{name}: Permission denied"):
            files.check_output(tmp_path / name, is_folder=True)
