"""Config errors name the field and its value, and a resumed run may change only some fields."""

import dataclasses
import importlib
import math
import pathlib
import typing

import jax
import pytest
import tiny

from gemma_scope_jax import config
from gemma_scope_jax.models import registry
from gemma_scope_jax.training import plans

CONFIGS = sorted(path.stem for path in (pathlib.Path(__file__).parent.parent / "configs").glob("[!_]*.py"))


def test_the_default_is_gemma_scopes_recipe():
    c = config.Config()
    assert c.optimizer == config.OptimizerConfig(7e-5, 0.999, 1e-8, 1000, 0.0, 10_000)
    assert (c.train.batch, c.banks["main"].bandwidth, c.banks["main"].initial_threshold) == (
        4096,
        0.001,
        0.001,
    )
    assert not c.normalizer.center and not c.normalizer.outlier_medians


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_and_suite_makes_a_plan(name):
    module = importlib.import_module(f"configs.{name}")
    suites = getattr(module, "SUITES", [])
    if name == "gemma3":
        kinds = [f"{site}_{width}" for site in module.SITES for width in ("16k", "65k", "262k")]
        suites = [f"{size}/{kind}" for size in module.STUDIED for kind in [*kinds, "resid_post_1m"]]
        suites += [f"{size}-it/resid_post_65k" for size in module.STUDIED]
    for arguments in [(), *((suite,) for suite in suites)]:
        made = config.from_dict(module.get_config(*arguments).to_dict())
        plans.make_plan(made, registry.build_model(made.model), 1, 1)
    assert f"gemma-scope train {name}" in module.__doc__


# Layers, width and tokens by model and suite, from table 1 of the report.
TABLE_1 = {
    ("gemma2_2b", "resid_post_16k"): (range(26), 2**14, 4e9),
    ("gemma2_2b", "attn_out_65k"): (range(26), 2**16, 8e9),
    ("gemma2_2b", "resid_post_524k"): ((12,), 2**19, 8e9),
    ("gemma2_2b", "resid_post_1m"): ((5, 12, 19), 2**20, 16e9),
    ("gemma2_9b", "mlp_out_131k"): (range(42), 2**17, 8e9),
    ("gemma2_9b", "resid_post_262k"): ((20,), 2**18, 8e9),
    ("gemma2_9b", "resid_post_1m"): ((9, 20, 31), 2**20, 16e9),
    ("gemma2_27b", "resid_post_131k"): ((10, 22, 34), 2**17, 8e9),
    ("gemma2_9b_it", "resid_post_16k"): ((9, 20, 31), 2**14, 4e9),
}


@pytest.mark.parametrize(("name", "suite"), TABLE_1)
def test_suites_match_the_report(name, suite):
    layers, width, tokens = TABLE_1[name, suite]
    c = importlib.import_module(f"configs.{name}").get_config(suite)
    assert (tuple(c.banks.main.layers), c.banks.main.width, c.train.tokens) == (tuple(layers), width, tokens)
    assert c.banks.main.sites == (suite.rsplit("_", 1)[0],) and c.data.context_length == 1024


def test_the_suite_of_all_sites_of_2b_has_78_saes():
    c = importlib.import_module("configs.gemma2_2b").get_config("all_16k")
    plan = plans.make_plan(config.from_dict(c.to_dict()), registry.build_model("gemma2_2b"), 1, 1)
    assert len(plan.members) == len(plan.sites) == 78
    assert {b.name: len(b.members) for b in plan.banks} == {"stream": 52, "heads": 26}


def test_gemma_scopes_transcoders_read_before_the_gain_and_scale_their_target_by_their_input():
    c = importlib.import_module("configs.gemma2_2b").get_config("transcoder_16k").banks.main
    assert (c.sites, c.target_site, c.scale_target_by, c.skip) == (
        ("mlp_in_gain_free",),
        "mlp_out",
        "read",
        False,
    )
    assert c.layers == tuple(range(26)) and c.width == 2**14


def test_an_unknown_suite_is_refused():
    with pytest.raises(
        ValueError, match="gemma2_2b has no suite 'resid_mid_16k'; choose one of resid_post_16k"
    ):
        importlib.import_module("configs.gemma2_2b").get_config("resid_mid_16k")


def test_only_instruction_tuned_configs_use_the_chat_template():
    for name in ("gemma2_2b", "gemma2_9b", "gemma2_27b"):
        assert not importlib.import_module(f"configs.{name}").get_config().data.chat_template
    tuned = importlib.import_module("configs.gemma2_9b_it").get_config()
    assert tuned.data.chat_template and tuned.model == "gemma2_9b-it"


def test_a_config_round_trips_through_a_dict():
    c = tiny.run_config(pathlib.Path("nowhere"), banks__main__layers=(1, 2))
    assert config.from_dict(config.to_dict(c)) == c


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"banks": {"main": {"widht": 4}}},
            "unknown config field banks.main.widht; known are banks.main.layers, ",
        ),
        ({"seeds": 4}, "unknown config field seeds"),
        (
            {"banks": {"main": {"layers": (1.7,)}}},
            "config field banks.main.layers is 1.7, expected a value of type int",
        ),
        ({"train": {"tokens": "many"}}, "config field train.tokens is 'many', expected a value of type int"),
    ],
)
def test_unknown_fields_and_wrong_types_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        config.from_dict(values)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="gemma_dtype is 'int8'"):
        registry.dtype(tiny.run_config(pathlib.Path("nowhere"), gemma_dtype="int8"))
    assert registry.dtype(config.Config(gemma_dtype="bfloat16")) == jax.numpy.bfloat16


def test_a_run_resumes_only_with_the_config_that_started_it():
    old = tiny.run_config(pathlib.Path("nowhere"))
    free = tiny.run_config(
        pathlib.Path("nowhere"), train__tokens=9999, log__checkpoint_every=7, mesh__data=2, evaluation__rows=3
    )
    config.check_resumable(old, free)
    other = tiny.run_config(pathlib.Path("nowhere"), banks__main__width=128)
    with pytest.raises(ValueError, match=r"started with config\.banks\.main\.width = 64, now it is 128"):
        config.check_resumable(old, other)


def _numbers(cls, prefix=""):
    """The dotted names of all numeric fields, with `*` for the name of a bank."""
    for name, kind in typing.get_type_hints(cls).items():
        inner = typing.get_args(kind)
        if dataclasses.is_dataclass(kind):
            yield from _numbers(kind, f"{prefix}{name}.")
        elif typing.get_origin(kind) is not tuple and inner:
            yield from _numbers(inner[1], f"{prefix}{name}.*.")
        elif {kind, *inner} & {int, float}:
            yield prefix + name


def test_every_number_of_a_config_has_a_range():
    # The model bounds the layers.
    assert set(_numbers(config.Config)) == config.RANGES.keys() | {"banks.*.layers"}


def _with(name, value):
    """A config with one field changed."""
    values = config.to_dict(tiny.run_config(pathlib.Path("nowhere")))
    *sections, field = name.replace("*", "main").split(".")
    section = values
    for one in sections:
        section = section[one]
    section[field] = (value,) if isinstance(section[field], tuple) else value
    return config.from_dict(values)


@pytest.mark.parametrize("name", config.RANGES)
def test_a_number_out_of_range_is_refused_with_the_range(name):
    allowed = config.RANGES[name]
    config.check_ranges(_with(name, allowed.low))
    config.check_ranges(_with(name, allowed.high))
    is_whole = isinstance(allowed.high, int)
    beyond = [allowed.low - 1, allowed.high + 1, 2**62 + 1] if is_whole else [math.nan, math.inf, -1.0, 1e39]
    for value in beyond:
        with pytest.raises(ValueError) as caught:
            config.check_ranges(_with(name, value))
        said = str(caught.value)
        assert said.startswith(f"{name.replace('*', 'main')} is {value}; it must be ") and len(said) < 200
        assert f"at most {allowed.high:,}" in said or not is_whole


def test_out_of_range_numbers_pass_only_if_the_run_was_started_with_them():
    old = _with("seed", 2**32)
    config.check_ranges(old, started=old)
    with pytest.raises(ValueError, match=r"log\.checkpoint_every is 0"):
        changed = dataclasses.replace(old, log=dataclasses.replace(old.log, checkpoint_every=0))
        config.check_ranges(changed, started=old)


def test_an_integer_too_large_for_a_float_becomes_infinite():
    assert config.from_dict({"optimizer": {"eps": 10**400}}).optimizer.eps == math.inf
