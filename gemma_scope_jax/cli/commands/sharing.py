"""The commands that share SAEs: `export`, `convert`, `publish`.

Each imports its libraries when it runs, so that --help is fast.
"""

from gemma_scope_jax.cli import common
from gemma_scope_jax.cli.options import Dtype, Flag, MaybeText, Place, Positional, Run, SAEs


def export(
    run: Positional[Run],
    out: Place,
    format: str = "saelens",
    bank: MaybeText = None,
    dtype: Dtype = "float32",
) -> None:
    """Write the SAEs of a run in a format that other tools read.

    gemma-scope export runs/quickstart --format gemma_scope --out exported

    Args:
      run: run directory.
      out: folder to write to.
      format: saelens, gemma_scope, gemma_scope_2, dictionary_learning or circuit_tracer.
        Several are separated by commas; all means every format.
      bank: name of the only bank to export; by default all banks.
      dtype: dtype of the stored matrices.
    """
    common.check_outputs(out=out)
    from gemma_scope_jax.saes import formats
    from gemma_scope_jax.training import export as export_lib

    chosen = formats.written() if format == "all" else tuple(format.split(","))
    for one in chosen:
        formats.format_to_write(one)
    for place in export_lib.export_run(run, chosen, out, bank, dtype):
        common.say(f"Exported {place}")


def convert(
    sae: Positional[SAEs],
    format: str,
    out: Place,
    model: str = "",
    site: str = "",
    target_site: str = "",
    weights: str = "",
    dtype: Dtype = "float32",
) -> None:
    """Convert an SAE, or a set of transcoders, from a file of any format to another format.

    gemma-scope convert hf://google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82 --format saelens --out sae

    Args:
      sae: path or hf://OWNER/NAME/FOLDER of the SAE, in any format.
      format: format to write: saelens, gemma_scope, gemma_scope_2, dictionary_learning or circuit_tracer.
      out: folder to write to.
      model: model of the SAE, such as gemma2_2b; needed if the file names none or a wrong one.
      site: site that the SAE reads, such as layer_20_resid_post; needed if the file names none or a wrong one.
      target_site: site that a transcoder predicts, such as layer_20_mlp_out.
        It is needed if the file names none or a wrong one.
      weights: Gemma's weights: a folder, a file or hf://OWNER/NAME.
        They are needed where one format has an RMSNorm gain in a transcoder's input and the other does not.
      dtype: dtype of the stored matrices.
    """
    common.check_outputs(out=out)
    from gemma_scope_jax.saes import saving

    sites = {"model": model, "site": site, "target_site": target_site}
    for place in saving.convert(sae, format, out, dtype, weights, **sites):
        common.say(f"Wrote {place}")


def publish(
    run: Positional[Run],
    out: Place,
    repo: str,
    license: str = "",
    format: str = "saelens",
    dtype: Dtype = "float32",
    push: Flag = False,
) -> None:
    """Write a Hugging Face repository of a run's SAEs, and upload it with --push.

    gemma-scope publish runs/quickstart --repo you/gemma-saes --license cc-by-4.0 --out published

    Args:
      run: directory of a run that has been evaluated.
      out: folder to write to.
      repo: name of the repository on the Hugging Face hub, OWNER/NAME.
      license: license that you choose for your SAEs, by its name on the hub, such as cc-by-4.0.
      format: format of the SAEs, saelens or gemma_scope.
      dtype: dtype of the stored matrices.
      push: upload the repository to the hub.
    """
    common.check_outputs(out=out)
    from gemma_scope_jax.training import publish as publish_lib

    paths = publish_lib.publish(run, out, repo, license, format, dtype, push)
    if push:
        place = (paths[0] if paths[0].is_dir() else paths[0].parent).relative_to(out)
        common.suggest(["explore", f"hf://{repo}/{place.as_posix()}", "a prompt"])
    else:
        common.suggest([repo, out], program="hf upload")
