"""Configs are read from what is given, and from nothing else."""

import pytest

from gemma_scope_jax import cli

# ml_collections loads config files in a way that Python 3.12 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def test_a_config_is_read_with_the_fields_given(monkeypatch):
    monkeypatch.setattr("sys.argv", ["pytest", "--config.seed=9"])
    values = cli.read_config("configs/gemma2_2b.py:resid_post_16k", ["--config.banks.main.layers=(5, 7)"])
    assert values["banks"]["main"]["layers"] == (5, 7)
    assert (values["model"], values["seed"]) == ("gemma2_2b", 0)


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("quickstart", ["--config.banks.main.widht=3"], r"no field 'widht', .*; did you mean 'width'\?"),
        ("quickstart", ["--config.seed=many"], "many"),
        ("quickstart", ["seed=3"], "unexpected argument 'seed=3'; fields are set by"),
        ("nothing", [], r"configs/nothing\.py"),
        ("gemma3.py:2b", [], "unknown size '2b'; choose one of"),
        ("gemma2_2b.py:resid_mid_16k", [], "gemma2_2b has no suite 'resid_mid_16k'"),
    ],
)
def test_mistakes_are_said_in_one_line(file, fields, message):
    path = f"configs/{file}" if ":" in file else f"configs/{file}.py"
    with pytest.raises(ValueError, match=message) as caught:
        cli.read_config(path, fields)
    assert "\n" not in str(caught.value)
