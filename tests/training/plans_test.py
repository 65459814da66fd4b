"""A plan follows from its config, and invalid configs are refused with names and values."""

import pathlib

import pytest
import tiny

from gemma_scope_jax.saes import naming
from gemma_scope_jax.training import plans


def plan(changes, mesh=(1, 1)):
    return plans.make_plan(tiny.run_config(pathlib.Path("nowhere"), **changes), tiny.TinyGemma(), *mesh)


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
        (
            {"banks__main__sites": ("resid_post", "attn_out")},
            (1, 1),
            "the sites of banks.main have different widths",
        ),
        ({"banks__main__layers": ()}, (1, 1), "banks.main has no SAE"),
        (
            {"banks__main__seeds": (1, 1)},
            (1, 1),
            "two SAEs have the name .*, in banks.main and banks.main; change a field",
        ),
        (
            {"banks__main__width": 60},
            (1, 8),
            "banks.main.width 60 is not divisible by the mesh's latent axis .8.",
        ),
        ({"banks__main__precision": "best"}, (1, 1), "banks.main.precision is 'best'"),
        ({"banks__main__bandwidth": 0.0}, (1, 1), "banks.main.bandwidth is 0.0"),
        (
            {"train__sequences_per_step": 6},
            (2, 2),
            "sequences_per_step 6 is not a multiple of the 4 devices; choose for example 8",
        ),
        (
            {"train__batch": 48},
            (1, 1),
            "= 128 is not a multiple of train.batch 48; choose for example train.sequences_per_step = 9",
        ),
        (
            {"train__batch": 4},
            (1, 1),
            "train.batch 4 is not a multiple of ring.groups 8; choose for example train.batch = 8",
        ),
        ({"ring__capacity": 64}, (1, 1), "ring.capacity 64 is smaller than the 128 activations of one step"),
        ({"ring__capacity": 200}, (1, 1), "ring.capacity 200 is not a multiple of the 128"),
        (
            {"ring__groups": 4},
            (8, 1),
            "ring.groups 4 is not a multiple of the 8 devices; choose for example 8",
        ),
        ({"train__tokens": 500}, (1, 1), "train.tokens 500 is less than ring.capacity"),
        ({"data__context_length": 1}, (1, 1), "data.context_length is 1"),
        ({"log__checkpoint_every": 0}, (1, 1), "log.checkpoint_every is 0; it must be at least 1"),
        ({"log__keep_checkpoints": 0}, (1, 1), "log.keep_checkpoints is 0"),
        ({"banks__main__objective": "liner"}, (1, 1), "did you mean 'linear'"),
        (
            {"banks__main__objective_options": {"slope": 1.0}},
            (1, 1),
            "banks.main.objective_options has the unknown option 'slope'; the objective linear has no options",
        ),
        (
            {"banks__main__objective": "cubic"},
            (1, 1),
            "banks.main.objective: unknown objective 'cubic'; known: linear",
        ),
        (
            {"banks__main__objective": "quadratic"},
            (1, 1),
            "objective is quadratic, which needs a target; set banks.main.target_l0s",
        ),
        (
            {"banks__main__target_l0s": (9.0,)},
            (1, 1),
            "has no target; choose the objective quadratic or controlled",
        ),
        (
            {"banks__main__target_l0s": (64.0,), "banks__main__objective": "controlled"},
            (1, 1),
            "target_l0s has 64.0; choose values above 0 and below the width",
        ),
        ({"banks__main__skip": True}, (1, 1), "banks.main.skip is only for transcoders; set target_site"),
        (
            {"banks__main__target_site": "resid_post"},
            (1, 1),
            "from layer_1_resid_post to itself is an autoencoder",
        ),
        ({"banks__main__window_updates": 0}, (1, 1), "banks.main.window_updates is 0"),
        ({"optimizer__decay_fraction": 2.0}, (1, 1), "optimizer.decay_fraction is 2.0"),
        (
            {"banks__main__sparsity_coefficients": (1e-3, float("nan"))},
            (1, 1),
            r"banks.main.sparsity_coefficients is nan; it must be 0, or at least 1e-30 and at most 1e\+30",
        ),
        ({"banks__main__seeds": (0, 2**31)}, (1, 1), "banks.main.seeds is 2147483648; .* 2,147,483,647"),
        (
            {"normalizer__outlier_medians": -1.0},
            (1, 1),
            "normalizer.outlier_medians is -1.0; it must be 0, or",
        ),
        ({"train__tokens": 2**62}, (1, 1), "train.tokens is 4611686018427387904; it must be at least 1 and"),
        (
            {"train__sequences_per_step": 2**28},
            (1, 1),
            "data.context_length is 4294967296; it must be at least",
        ),
        (
            {"banks__main__window_updates": 2**27},
            (1, 1),
            "window_updates is 134217728; .* at most 67,108,863",
        ),
    ],
)
def test_invalid_configs_are_refused_with_names_and_values(changes, mesh, message):
    with pytest.raises(ValueError, match=message):
        plan(changes, mesh)


def test_different_members_have_different_names():
    close = plan(
        {
            "banks__main__sparsity_coefficients": (1.0000001e-4, 1.0000002e-4),
            "banks__main__target_l0s": (10.0, 10.000001),
            "banks__main__objective": "controlled",
        }
    )
    assert len({member.name for member in close.members}) == 4
    assert close.members[0].name == "layer_1_resid_post_width_64_lambda_0.00010000001_controlled_10"


def test_two_banks_cannot_train_the_same_sae():
    banks = {name: dict(layers=(1,), width=64) for name in ("a", "b")}
    with pytest.raises(
        ValueError, match=r"two SAEs have the name .*, in banks\.a and banks\.b; change a field"
    ):
        plan({"banks": banks})
    assert len(plan({"banks": banks | {"b": dict(layers=(1,), width=128)}}).members) == 2


def test_widths_have_gemma_scopes_names():
    names = {
        2**14: "16k",
        2**15: "32k",
        2**16: "65k",
        2**17: "131k",
        2**18: "262k",
        2**19: "524k",
        2**20: "1m",
    }
    assert {width: naming.width_name(width) for width in names} == names
    assert [naming.width_name(w) for w in (64, 1024, 4096, 5000)] == ["64", "1k", "4k", "5000"]
