"""A config is found by its name from any folder, but an existing file comes first."""

import pathlib
import re

import pytest

from gemma_scope_jax import config
from gemma_scope_jax.runtime.errors import ConfigError, NotFoundError
from gemma_scope_jax.training import config_files

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def test_the_names_are_those_of_the_config_files():
    assert config_files.names() == sorted(p.stem for p in CONFIGS.glob("[!_]*.py"))
    assert {"quickstart", "gemma2_2b"} <= set(config_files.names())


@pytest.mark.parametrize(
    "name", ["quickstart", "quickstart.py", "configs/quickstart", "configs/quickstart.py"]
)
def test_a_config_of_the_package_is_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_files.find(name)[0].resolve() == CONFIGS / "quickstart.py"


def test_a_suite_stays_at_the_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_files.find("gemma2_2b:all_16k") == (CONFIGS / "gemma2_2b.py", "all_16k")
    mine = tmp_path / "mine.py"
    mine.touch()
    assert config_files.find(f"{mine}:a/b:c") == (mine, "a/b:c")


def test_an_existing_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    mine = tmp_path / "configs" / "quickstart.py"
    mine.parent.mkdir()
    mine.touch()
    for name in ("configs/quickstart.py", str(mine), "~/configs/quickstart.py"):
        assert config_files.find(name)[0].resolve() == mine
    assert config_files.find("quickstart")[0].resolve() == CONFIGS / "quickstart.py"


def test_a_folder_with_a_configs_name_is_ignored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert config_files.find("quickstart")[0].resolve() == CONFIGS / "quickstart.py"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quikstart", "there is no config file 'quikstart'; did you mean 'quickstart'? give a path"),
        ("configs/gemma2_2.py:all_16k", "no config file 'configs/gemma2_2.py'; did you mean 'gemma2_2b'?"),
        ("zzzz", "no config file 'zzzz'; give a path"),
        ("runs/quickstart.py", "no config file 'runs/quickstart.py'; did you mean 'quickstart'?"),
        ("quickstart.json", "no config file 'quickstart.json'"),
        ("__init__", "no config file '__init__'"),
        ("", "no config file ''"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_names(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError, match=re.escape(message)) as caught:
        config_files.find(name)
    assert all(known in str(caught.value) for known in config_files.names())


def test_the_configs_of_an_installed_package_are_inside_it(tmp_path, monkeypatch):
    """A configs folder beside an installed package belongs to something else."""
    for place in ("configs", "package/configs"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "quickstart.py").touch()
    monkeypatch.setattr(config_files, "_PACKAGE", tmp_path / "package")
    assert config_files.find("quickstart")[0] == tmp_path / "package" / "configs" / "quickstart.py"


def test_a_config_is_loaded_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = config_files.load("gemma2_2b:resid_post_65k")
    assert (values["model"], values["banks"]["main"]["width"]) == ("gemma2_2b", 2**16)
    changed = config_files.with_fields(values, {"banks.main.layers": (5,), "width": 8})
    assert (changed["banks"]["main"]["layers"], changed["banks"]["main"]["width"]) == ((5,), 8)
    assert values["banks"]["main"]["width"] == 2**16
    (tmp_path / "none.py").write_text("x = 1")
    with pytest.raises(ConfigError, match=r"none.py has no function get_config"):
        config_files.load("none.py")


def test_a_mapping_field_can_be_set_whole_or_in_part():
    bank = config.to_dict(config.BankConfig(objective_options={"extra": 2.0}))
    values = {"banks": {"main": bank}}
    whole = config_files.with_fields(values, {"objective_options": {"other": 3.0}})
    assert whole["banks"]["main"]["objective_options"] == {"other": 3.0}
    part = config_files.with_fields(values, {"banks.main.objective_options.extra": 4.0})
    assert part["banks"]["main"]["objective_options"] == {"extra": 4.0}


def test_every_suite_of_the_quickstart_loads_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for suite in ("sweep", "layers", "sites", "targets", "transcoders"):
        assert config.from_dict(config_files.load(f"quickstart_banks:{suite}")).model == "gemma3_270m"


def test_every_config_is_valid():
    for name in config_files.names():
        config.from_dict(config_files.load(name))


def test_a_mistyped_path_is_refused_with_the_nearest_file(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "my_own.py").write_text("")
    for wrong in ("confgs/my_own.py", "configs/my_onw.py", "configs/my_own"):
        with pytest.raises(NotFoundError, match=r"no config file '.*did you mean '.*/configs/my_own\.py'\?"):
            config_files.find(str(tmp_path / wrong))
    with pytest.raises(NotFoundError, match=r"did you mean 'quickstart'\? give a path or one of"):
        config_files.find("confgs/quickstart.py")
