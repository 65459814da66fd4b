"""Our numbers compared with SAELens, SAEBench and our definitions in plain torch: `make test-peers`."""

import json
import os
import pathlib

import numpy as np
import pytest

FOLDER = pathlib.Path(os.environ.get("PEERS_FOLDER", "nowhere")) / "evaluation"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="needs make test-peers")

# Our name for each number that SAELens and SAEBench define in the same way, and their name.
SAME = {
    "l0": "l0",
    "cosine": "cossim",
    "norm_ratio": "l2_ratio",
    "clean_loss": "ce_loss_without_sae",
    "spliced_loss": "ce_loss_with_sae",
}
MODELS = ("TransformerLens", "transformers")


def read(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def check(got, want, name):
    np.testing.assert_allclose(got, want, rtol=1e-4, err_msg=name)


def show(capsys, title, columns, lines):
    with capsys.disabled():
        print(f"\n{title:28}{'':28}" + "".join(f"{column:>26}" for column in columns))
        for name, theirs, *values in lines:
            print(f"{name:28}{theirs:28}" + "".join(f"{value:26.6f}" for value in values))


def test_our_definitions_in_plain_torch_have_the_same_numbers(capsys):
    ours, torch = read("ours"), read("saelens")["torch"]
    names = [name for name in torch if "|" not in name]
    show(capsys, "", ("here", "torch"), [(name, "", ours[name], torch[name]) for name in names])
    assert len(names) == 20
    for name in names:
        check(torch[name], ours[name], name)


def test_saelens_has_our_numbers_where_the_definitions_agree(capsys):
    ours, found = read("ours"), read("saelens")
    here = {theirs: ours[name] for name, theirs in SAME.items()}
    here |= {"explained_variance": 1 - ours["fvu"], "never_fired": ours["dead_fraction"]}
    here |= {"dense": ours["dense_fraction"]}
    lines = [("", name, value, *(found[m][name] for m in MODELS)) for name, value in here.items()]
    show(capsys, "SAELens", ("here", *MODELS), lines)
    for _, name, value, *theirs in lines:
        check(theirs, value, name)
    for model in MODELS:
        delta = found[model]["ce_loss_with_sae"] - found[model]["ce_loss_without_sae"]
        assert delta == pytest.approx(ours["delta_loss"], rel=1e-3)


def test_saelens_definitions_that_differ_reproduce_its_numbers(capsys):
    ours, found = read("ours"), read("saelens")
    theirs = {
        name.removesuffix("|SAELens"): value
        for name, value in found["torch"].items()
        if name.endswith("|SAELens")
    }
    zero = theirs["ce_loss_with_ablation"]
    theirs["ce_loss_score"] = 1 - ours["delta_loss"] / (zero - ours["clean_loss"])
    for name, value in theirs.items():
        check([found[model][name] for model in MODELS], value, name)
    shown = {
        "zero_ablation_loss": "ce_loss_with_ablation",
        "loss_recovered_zero": "ce_loss_score",
        "kl": "kl_div_with_sae",
        "explained_variance_tokens": "explained_variance_legacy",
    }
    assert set(theirs) == {"mse", *shown.values()}
    lines = [(name, other, ours[name], found["TransformerLens"][other]) for name, other in shown.items()]
    show(capsys, "other definitions", ("here", "SAELens"), lines)
    # The effect of BOS, which SAELens leaves out by default.
    with_bos = found["TransformerLens, BOS too"]
    lines = [
        ("", name, found["TransformerLens"][name], with_bos[name])
        for name in ("l0", "explained_variance", "mse", "cossim")
    ]
    show(capsys, "with BOS", ("without", "with"), lines)


def test_saebench_accepts_the_exported_sae():
    told = read("bench")["interface"]
    cfg = told["cfg"]
    assert (cfg["hook_layer"], cfg["hook_name"]) == (9, "blocks.9.hook_resid_post")
    assert (cfg["d_in"], cfg["dtype"], cfg["prepend_bos"]) == (640, "float32", True)
    assert told["are_parameters"] and told["cfg_is_json"]
    assert told["shapes"] == {
        "W_enc": [640, cfg["d_sae"]],
        "b_enc": [cfg["d_sae"]],
        "W_dec": [cfg["d_sae"], 640],
        "b_dec": [640],
    }
    assert told["unit_rows"] and told["furthest_row"] < 1e-5
    assert max(told["differences"].values()) < 1e-6
    # No evaluation of SAEBench reads these fields of a SAELens object.
    assert set(told["cfg_lacks"]) <= {
        "activation_fn_str",
        "activation_fn_kwargs",
        "finetuning_scaling_factor",
        "sae_lens_training_version",
        "training_tokens",
    }


def test_saebench_core_has_our_numbers(capsys):
    ours, bench, torch = read("ours"), read("bench"), read("saelens")["torch"]
    spared, default = bench["core, BOS spared"], bench["core"]
    names = {theirs: ours[name] for name, theirs in SAME.items()}
    names |= {"freq_over_10_percent": ours["dense_fraction"], "frac_alive": 1 - ours["dead_fraction"]}
    names |= {
        name.split("|")[0]: torch[name]
        for name in (
            "ce_loss_with_ablation|SAELens",
            "kl_div_with_sae|SAELens",
            "explained_variance|SAEBench",
        )
    }
    # SAEBench divides its mean over a row's activations by their number once more.
    names["mse"] = torch["mse|SAELens"] / (ours["activations"] / ours["rows"])
    lines = [("", name, value, spared[name], default[name]) for name, value in names.items()]
    show(capsys, "SAEBench", ("here", "BOS spared", "by default"), lines)
    for _, name, value, theirs, of_default in lines:
        check(theirs, value, name)
        if name not in ("ce_loss_with_sae", "kl_div_with_sae"):  # By default, BOS is spliced too.
            check(of_default, value, name)


def test_saebench_probes_the_exported_sae(capsys):
    found = read("bench")["probing"]
    show(capsys, "sparse probing", ("accuracy",), [("", name, value) for name, value in found.items()])
    # Three periods, each probed against as many speeches of the others.
    assert found["sae_test_accuracy"] > 0.7 and found["sae_top_5_test_accuracy"] > 0.6
