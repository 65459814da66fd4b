"""The command line: words become a command's arguments, and mistakes are reported at once."""

import functools
import inspect
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time

import pytest

from gemma_scope_jax import config
from gemma_scope_jax.cli import main, old_forms
from gemma_scope_jax.runtime.errors import ConfigError, InputError, NotFoundError

ROOT = pathlib.Path(__file__).parents[2]

# ml_collections loads config files in a way that Python 3.12 deprecates; only the old forms need it.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def function_of(command):
    """The function that a command calls, with the default config."""
    return command.call(config.Config()) if command.has_fields else command.call


@pytest.fixture
def arguments_of(monkeypatch):
    """Runs a command line and returns the arguments its command was called with."""
    called = {}

    def recording(function):
        @functools.wraps(function)
        def record(*args, **kwargs):
            called.update(inspect.signature(function).bind(*args, **kwargs).arguments)

        return record

    for name, command in main.COMMANDS.items():
        call = command.call
        if command.has_fields:
            made = functools.partial(lambda make, default: recording(make(default)), call)
        else:
            made = recording(call)
        monkeypatch.setitem(main.COMMANDS, name, command._replace(call=made))

    def run(*words):
        called.clear()
        main.run(words)
        return dict(called)

    return run


def test_a_tilde_is_the_home_folder_in_every_argument(arguments_of, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for line in (
        "export ~/run --out=~/x", "publish ~/run --repo=a/b --out=~/x", "convert x --format=saelens --out=~/x",
        "compare ~/a ~/b --out=~/x", "dashboards x --out=~/x", "explore x y --html=~/x", "flow x y --png=~/x",
        "attribute x --prompts=~/x --png=~/y --html=~/z", "steer x --edit=y --html=~/x --png=~/y",
        "contrast x --first=~/a --second=~/b --out=~/c", "links x --sae=a --latent=1 --png=~/x",
        "generate --model=x --prompts=~/a --out=~/b", "probe x --labelled=~/x --out=~/y", "detect x --out=~/x",
        "train quickstart ~/x",
    ):  # fmt: skip
        args = arguments_of(*line.split())
        given = [v for value in args.values() for v in (value if isinstance(value, tuple) else [value])]
        paths = [value for value in given if isinstance(value, pathlib.Path)]
        assert len(paths) == line.count("~") and all(p.is_relative_to("/home/me") for p in paths), line


def test_fields_can_be_typed_in_several_forms(arguments_of):
    args = arguments_of(
        "train", "gemma2_2b:mlp_out_65k", "run", "--banks.main.layers", "5", "12", "--train.batch=64"
    )
    assert args["fields"].banks["main"].layers == (5, 12) and args["fields"].train.batch == 64
    assert args["fields"].model == "gemma2_2b" and args["fields"].banks["main"].width == 2**16
    args = arguments_of("train", "quickstart", "run", "--normalizer.no-center", "--log.evaluate-every", "7")
    assert not args["fields"].normalizer.center and args["fields"].log.evaluate_every == 7
    options = arguments_of("train", "quickstart", "run", "--banks.main.objective-options", "extra", "2")
    assert options["fields"].banks["main"].objective_options == {"extra": 2.0}


def test_repeated_and_negative_values(arguments_of):
    args = arguments_of("evaluate", "run", "--text", "a=b", "--text=c=d", "--fast", "--dtype", "float32")
    assert args["text"] == ("a=b", "c=d") and args["fast"] and args["others"].given()["dtype"] == "float32"
    args = arguments_of("steer", "run", "--edit=1+t", "--sweep", "--strengths=-4,-2,1e1")
    assert args["strengths"] == (-4.0, -2.0, 10.0) and args["edit"] == ("1+t",)
    assert arguments_of("steer", "run", "a b", "c", "--edit", "1+t")["prompts"] == ("a b", "c")
    words = ["steer", "run", "a b", "--edit=1+2t", "--edit=2=ablate", "--strengths=-1,2", "c"]
    args = arguments_of(*words)  # Prompts before and after options.
    assert args["prompts"] == ("a b", "c") and args["edit"] == ("1+2t", "2=ablate")
    assert args["strengths"] == (-1.0, 2.0)
    assert arguments_of("attribute", "run", "a", "--token=-2")["token"] == -2


def test_every_option_has_help_a_type_and_a_range_and_every_command_an_example():
    for name, command in main.COMMANDS.items():
        function = function_of(command)
        doc = inspect.getdoc(function)
        assert re.search(rf"^gemma-scope {name} ", doc, re.MULTILINE), name
        for parameter in inspect.signature(function).parameters.values():
            assert parameter.annotation not in (int, float, int | None, float | None), (name, parameter)
            assert re.search(rf"^  {parameter.name}: \S", doc, re.MULTILINE), (name, parameter.name)
    for kind in (
        config.Config,
        config.BankConfig,
        config.DataConfig,
        config.OptimizerConfig,
        config.LogConfig,
    ):
        doc = inspect.getdoc(kind)
        for field in kind.__dataclass_fields__:
            assert re.search(rf"^  {field}: \S", doc, re.MULTILINE), (kind, field)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["links", "run", "--sae=a", "--latent=-1"],
            "Error parsing --latent: it is -1; it must be at least 0 and",
        ),
        (["explore", "run", "a", "--top=0"], "Error parsing --top: it is 0; it must be at least 1 and"),
        (
            ["detect", "run", "--seed=4294967296"],
            "--seed: it is 4294967296; it must be at least 0 and at most 2,",
        ),
        (["contrast", "run", "--first=a", "--second=b", "--rate=nan"], "Error parsing --rate: it is nan"),
        (["steer", "run", "a", "--edit=1+t", "--temperature=inf"], "Error parsing --temperature: it is inf"),
        (
            ["steer", "run", "--edit=1+t", "--sweep", "--strengths=1,1e400"],
            "Error parsing --strengths: it is inf",
        ),
        (["steer", "run", "a", "--edit=1+t", "--samples=two"], "--samples: two is not a whole number"),
        (["attribute", "run", "a", "--token=" + "9" * 5000], "Error parsing --token: 999"),
        (["evaluate", "run", "--rwos=3"], "Perhaps you meant: --rows INT"),
        (["train", "quickstart", "run", "--banks.main.widht", "3"], "--banks.main.width INT"),
        (["evaluate", "run", "--split=other"], "invalid choice 'other' for argument '--split'"),
    ],
)
def test_mistakes_in_options_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main.run(arguments)
    said = " ".join(re.sub(r"[│|]", " ", capsys.readouterr().err).split())
    assert ended.value.code == 2 and re.search(message, said), said


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["trian", "x"], InputError, r"gemma-scope has no command 'trian'; did you mean train\?"),
        (["nothing"], InputError, "has no command 'nothing'; gemma-scope --help lists them"),
        (
            ["train", "quikstart", "x"],
            NotFoundError,
            r"no config file 'quikstart'; did you mean 'quickstart'\?",
        ),
        (
            ["train", "--seed", "1", "quickstart", "x"],
            InputError,
            "the first argument is '--seed', not a config; type",
        ),
        (["train", "gemma3:2b", "x"], ValueError, "unknown size '2b'; choose one of"),
        (["train", "gemma2_2b:resid_mid_16k", "x"], ValueError, "gemma2_2b has no suite 'resid_mid_16k'"),
    ],
)
def test_unknown_names_are_reported(arguments, error, message):
    with pytest.raises(error, match=message):
        main.run(arguments)


def test_mistyped_names_and_help_take_less_than_a_second():
    program = (
        "import sys, time; from gemma_scope_jax.cli import main\n"
        "try: main.run(sys.argv[1:])\n"
        "except (SystemExit, ValueError): pass\n"
        "print(time.process_time(), 'jax' in sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    for words in (
        ["trian"],
        ["train", "quickstart", "x", "--banks.main.widht=3"],
        ["evaluate", "--help"],
        ["--help"],
    ):
        command = [sys.executable, "-c", program, *words]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
        took, has_jax = done.stdout.split()[-2:]
        assert float(took) < 1 and has_jax == "False", (words, took)


def test_the_help_lists_every_command_in_its_group():
    shown = main.help_text()
    for group, commands in main.GROUPS.items():
        assert f"{group}:" in shown
        for name in commands:
            assert re.search(rf"^  {name} +[A-Z].*\.$", shown, re.MULTILINE), name


def test_old_forms_are_accepted_with_a_warning_that_shows_the_new_form(arguments_of, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["pytest", "--config.seed=9"])
    old = [
        "--config=configs/gemma2_2b.py:resid_post_16k",
        "--workdir=run",
        "--config.banks.main.layers=(5, 7)",
    ]
    args = arguments_of("train", *old)
    assert args["workdir"] == pathlib.Path("run") and args["fields"].banks["main"].layers == (5, 7)
    assert (args["fields"].model, args["fields"].seed) == ("gemma2_2b", 0)
    said = capsys.readouterr().err
    assert "type gemma-scope train configs/gemma2_2b.py:resid_post_16k run --banks.main.layers 5 7" in said
    assert arguments_of("plan", "--config=quickstart", "--topology", "v5e:2x4")["topology"] == "v5e:2x4"
    assert arguments_of("prepare", "--config=quickstart", "--workers=3")["workers"] == 3
    capsys.readouterr()
    assert arguments_of("evaluate", "run", "--rows_per_batch=4")["rows_per_batch"] == 4
    assert "--rows-per-batch instead of --rows_per_batch" in capsys.readouterr().err
    assert arguments_of("evaluate", "run", "--rows-per-batch=4", "--text=a_b")["rows_per_batch"] == 4
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("old", "name", "value"),
    [
        ("data.chat_template=True", "data.chat_template", True),
        ("data.chat_template", "data.chat_template", True),
        ("normalizer.center=false", "normalizer.center", False),
        ("data.text=a b.txt", "data.text", "a b.txt"),
        ("banks.main.target_l0s=()", "banks.main.target_l0s", []),
        ("banks.main.layers=(3,)", "banks.main.layers", [3]),
    ],
)
def test_the_new_form_in_the_warning_can_be_typed(arguments_of, capsys, old, name, value):
    was = arguments_of("train", "--config=quickstart", "--workdir=run", f"--config.{old}")
    new = capsys.readouterr().err.partition("type gemma-scope ")[2]
    now = arguments_of(*shlex.split(new))
    assert now["fields"] == was["fields"] and now["workdir"] == was["workdir"]
    assert config.flatten(now["fields"])[name] == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config=quickstart", "--workdir=x", "--config.banks.main.widht=3"],
            r"no field 'widht', .*'width'\?",
        ),
        (["--config=quickstart", "--workdir=x", "--config.seed=many"], "many"),
        (["--config=quickstart", "--workdir=x", "seed=3"], "unexpected argument 'seed=3'; fields are set by"),
        (["--config=quickstart"], "--workdir is missing"),
        (["--workdir=x", "--config.seed=3"], "--config is missing"),
    ],
)
def test_mistakes_in_old_forms_are_reported_in_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        old_forms.of_config("train", arguments)
    assert "\n" not in str(caught.value)


def test_the_scripts_and_the_module_run_the_commands(tmp_path):
    started = time.monotonic()
    for words, code, said in (
        (["train.py", "quikstart", "x"], 1, "did you mean 'quickstart'?"),
        (["evaluate.py", "--help"], 0, "gemma-scope evaluate"),
        (["-m", "gemma_scope_jax", "trian"], 1, "type gemma-scope trian"),
        (["-m", "gemma_scope_jax", "--version"], 0, "0."),
    ):
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == code and said in done.stdout + done.stderr, words
    assert time.monotonic() - started < 60
