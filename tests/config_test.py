"""Configs say what is wrong with names and values, and remember which fields a run may change."""

import importlib
import pathlib

import jax
import pytest
import tiny

from gemma_scope_jax import bank, config, gemma, optim

CONFIGS = sorted(path.stem for path in (pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))


def plan(changes, mesh=(1, 1)):
    return config.make_plan(tiny.run_config(pathlib.Path("nowhere"), **changes), tiny.TinyGemma(), *mesh)


def test_gemma_scopes_recipe_is_the_default():
    c = config.Config()
    assert c.optimizer == optim.OptimizerConfig(7e-5, 0.999, 1e-8, 1000, 0.0, 10_000)
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
        config.make_plan(made, gemma.build_model(made.model), 1, 1)
    assert f"--config=configs/{name}.py" in module.__doc__


# From table 1 of the report: layers, width and tokens of a model and a suite.
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
def test_suites_are_those_of_the_report(name, suite):
    layers, width, tokens = TABLE_1[name, suite]
    c = importlib.import_module(f"configs.{name}").get_config(suite)
    assert (tuple(c.banks.main.layers), c.banks.main.width, c.train.tokens) == (tuple(layers), width, tokens)
    assert c.banks.main.sites == (suite.rsplit("_", 1)[0],) and c.data.context_length == 1024


def test_all_sites_of_2b_are_78_saes_of_one_run():
    c = importlib.import_module("configs.gemma2_2b").get_config("all_16k")
    plan = config.make_plan(config.from_dict(c.to_dict()), gemma.build_model("gemma2_2b"), 1, 1)
    assert len(plan.members) == len(plan.sites) == 78
    assert {b.name: len(b.members) for b in plan.banks} == {"stream": 52, "heads": 26}


def test_gemma_scopes_transcoders_read_before_the_gain_and_are_scaled_by_what_they_read():
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


def test_a_config_survives_being_stored():
    c = tiny.run_config(pathlib.Path("nowhere"), banks__main__layers=(1, 2))
    assert config.from_dict(config.to_dict(c)) == c


def test_counts_add_up():
    p = plan({"train__tokens": 1300})
    assert (p.activations, p.updates_per_step, p.harvests, p.ring_steps) == (128, 4, 10, 4)
    assert p.total_updates == 40


@pytest.mark.parametrize(
    ("changes", "mesh", "message"),
    [
        ({"banks__main__layers": (9,)}, (1, 1), "layer 9 is out of range: TinyGemma has layers 0 to 3"),
        (
            {"banks__main__sites": ("resid_pre",)},
            (1, 1),
            "unknown site 'resid_pre'; choose one of embed, attn_out",
        ),
        ({"banks__main__sites": ("resid_post", "attn_out")}, (1, 1), "sites of a bank must have one width"),
        ({"banks__main__layers": ()}, (1, 1), "banks.main has no member"),
        (
            {"banks__main__seeds": (1, 1)},
            (1, 1),
            "is named twice, in banks.main and banks.main; what stands in the name",
        ),
        (
            {"banks__main__width": 60},
            (1, 8),
            "banks.main.width 60 is not divisible by the mesh's latent axis .8.",
        ),
        ({"banks__main__precision": "best"}, (1, 1), "banks.main.precision is 'best'"),
        ({"banks__main__bandwidth": 0.0}, (1, 1), "banks.main.bandwidth is 0.0"),
        ({"train__sequences_per_step": 6}, (2, 2), "sequences_per_step 6 is not a multiple of the 4 devices"),
        ({"train__batch": 48}, (1, 1), "= 128 is not a multiple of train.batch 48"),
        ({"train__batch": 4}, (1, 1), "train.batch 4 is not a multiple of ring.groups 8"),
        ({"ring__capacity": 64}, (1, 1), "ring.capacity 64 is smaller than the 128 activations of one step"),
        ({"ring__capacity": 200}, (1, 1), "ring.capacity 200 is not a multiple of the 128"),
        ({"ring__groups": 4}, (8, 1), "ring.groups 4 is not a multiple of the 8 devices"),
        ({"train__tokens": 500}, (1, 1), "train.tokens 500 do not fill the ring once"),
        ({"data__context_length": 1}, (1, 1), "data.context_length is 1"),
        ({"log__checkpoint_every": 0}, (1, 1), "log.checkpoint_every is 0; it must be at least 1"),
        ({"log__keep_checkpoints": 0}, (1, 1), "log.keep_checkpoints is 0"),
        (
            {"banks__main__objective": "cubic"},
            (1, 1),
            "banks.main.objective is 'cubic'; choose one of linear",
        ),
        (
            {"banks__main__objective": "quadratic"},
            (1, 1),
            "objective is quadratic; it needs banks.main.target_l0s",
        ),
        ({"banks__main__target_l0s": (9.0,)}, (1, 1), "choose objective quadratic or controlled with them"),
        (
            {"banks__main__target_l0s": (64.0,), "banks__main__objective": "controlled"},
            (1, 1),
            "target_l0s has 64.0; choose above 0 and below the width",
        ),
        ({"banks__main__skip": True}, (1, 1), "banks.main.skip is for transcoders; set target_site"),
        (
            {"banks__main__target_site": "resid_post"},
            (1, 1),
            "from layer_1_resid_post to itself is an autoencoder",
        ),
        ({"banks__main__window_updates": 0}, (1, 1), "banks.main.window_updates is 0"),
        ({"optimizer__decay_fraction": 2.0}, (1, 1), "optimizer.decay_fraction is 2.0"),
        ({"banks__main__sparsity_coefficients": (-1.0,)}, (1, 1), "none may be negative"),
    ],
)
def test_what_does_not_fit_is_refused_with_names_and_values(changes, mesh, message):
    with pytest.raises(ValueError, match=message):
        plan(changes, mesh)


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


def test_members_that_differ_have_names_that_differ():
    close = plan(
        {
            "banks__main__sparsity_coefficients": (1.0000001e-4, 1.0000002e-4),
            "banks__main__target_l0s": (10.0, 10.000001),
            "banks__main__objective": "controlled",
        }
    )
    assert len({member.name for member in close.members}) == 4
    assert close.members[0].name == "layer_1_resid_post_width_64_lambda_0.00010000001_controlled_10"


def test_two_banks_may_not_train_the_same_sae():
    banks = {name: dict(layers=(1,), width=64) for name in ("a", "b")}
    with pytest.raises(
        ValueError, match=r"is named twice, in banks\.a and banks\.b; what stands in the name"
    ):
        plan({"banks": banks})
    assert len(plan({"banks": banks | {"b": dict(layers=(1,), width=128)}}).members) == 2


def test_widths_are_called_as_gemma_scope_calls_them():
    names = {
        2**14: "16k",
        2**15: "32k",
        2**16: "65k",
        2**17: "131k",
        2**18: "262k",
        2**19: "524k",
        2**20: "1m",
    }
    assert {width: bank.width_name(width) for width in names} == names
    assert [bank.width_name(w) for w in (64, 1024, 4096, 5000)] == ["64", "1k", "4k", "5000"]


def test_a_dtype_must_be_known():
    with pytest.raises(ValueError, match="gemma_dtype is 'int8'"):
        config.dtype(tiny.run_config(pathlib.Path("nowhere"), gemma_dtype="int8"))
    assert config.dtype(config.Config()) == jax.numpy.bfloat16


def test_a_run_is_continued_only_with_what_it_was_started_with():
    old = tiny.run_config(pathlib.Path("nowhere"))
    free = tiny.run_config(
        pathlib.Path("nowhere"), train__tokens=9999, log__checkpoint_every=7, mesh__data=2, evaluation__rows=3
    )
    config.check_resumable(old, free)
    other = tiny.run_config(pathlib.Path("nowhere"), banks__main__width=128)
    with pytest.raises(ValueError, match=r"started with config\.banks\.main\.width = 64, now it is 128"):
        config.check_resumable(old, other)
