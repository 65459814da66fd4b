"""Dashboard pages, as files and in a browser; files for Neuronpedia; and the command."""

import dataclasses
import json
import re
import urllib.parse

import browser
import numpy as np
import pytest
import tiny
from toys import Rows, random_sae

from gemma_scope_jax.analysis import decoder_directions
from gemma_scope_jax.analysis.dashboards import build, collect, neuronpedia, website
from gemma_scope_jax.data import prepare
from gemma_scope_jax.evaluation import opening
from gemma_scope_jax.models import masking, tokenizer
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.saes import attached, geometry

NAME = "layer_1 </script><b>x</b>"
HOSTILE = "a bread </script><b>x</b> & 'song'\n"


def decode(tokens):
    return "".join(chr(t - 3) if 3 <= t < 259 else f"[{t}]" for t in tokens)


TEXT_OF = tokenizer.token_texts(decode)


@pytest.fixture(scope="module")
def shown(tiny_gemma):
    one = random_sae()
    rarer = one.replace(threshold=one.threshold * np.geomspace(1, 100, 64, dtype=np.float32))
    place = Site("resid_post", 1)
    subject = attached.Subject(rarer, place, None)
    texts = [HOSTILE, "laws of rivers and of stars, songs ", "no bread today, no bread tomorrow "]
    row = [[masking.BOS, *tiny.encode(text)] for text in texts]
    rows = Rows(np.array([(one * 2)[:48] for one in row] * 2, np.int32))
    options = collect.Options(top=4, sample=10, before=12, after=12)
    gathered = collect.gather(tiny_gemma, {"a": subject}, rows, 6, 3, options=options)["a"]
    logits = decoder_directions.logits(tiny_gemma, rarer.W_dec)
    nearest = geometry.nearest(rarer.W_dec)
    passages = collect.Passages(collect.read_tokens(rows, 6))
    return website.Dashboards(NAME, "tiny", subject, HOSTILE, gathered, logits, *nearest, passages)


@pytest.fixture(scope="module")
def folder(shown, tmp_path_factory):
    made = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(website, "PER_FILE", 24)
        website.write(made, shown, TEXT_OF)
    return made


def read(path):
    return json.loads(re.fullmatch(r"window\.[\w\[\]]+=(.*);\n", path.read_text())[1])


def text_of(tokens, passage):
    return "".join(tokens[t] for t in passage[2])


def test_the_files_hold_the_gathered_statistics(shown, folder):
    about, g = read(folder / "data" / "index.js"), shown.gathered
    assert about["count"] == g.count_M.tolist() and about["name"] == NAME
    np.testing.assert_allclose(about["max"], g.max_M, rtol=5e-3)
    assert about["dense"] == np.flatnonzero(g.is_dense_M).tolist()
    for latent in range(64):
        file = read(folder / "data" / f"latents_{latent // 24}.js")
        tokens, data = file["tokens"], file["latents"][latent % 24]
        fired = np.flatnonzero(g.top.row_MxK[latent] >= 0)
        assert len(data["top"]) == len(fired)
        for k, passage in zip(fired, data["top"], strict=True):
            cut = shown.passages(g.options, g.top, latent, int(k))
            assert text_of(tokens, passage) == decode(cut.tokens)
            np.testing.assert_allclose(passage[3], cut.values, rtol=5e-3)
            np.testing.assert_allclose(passage[3][passage[1]], g.top.window_MxKxT[latent, k, 12], rtol=5e-3)
        first, *counts = data["histogram"]
        np.testing.assert_array_equal(g.histogram_MxH[latent, first : first + len(counts)], counts)
        assert sum(counts) == g.count_M[latent]
        assert [latent for latent, _ in data["nearest"]] == shown.nearest_MxN[latent].tolist()
        assert [tokens[t] for t, _ in data["up"]] == [
            TEXT_OF(t) for t in shown.logits.highest_token_MxT[latent]
        ]
        assert [tokens[t] for t, _ in data["down"]] == [
            TEXT_OF(t) for t in shown.logits.lowest_token_MxT[latent]
        ]
        peaks = [shown.passages.token(g.top.row_MxK[latent, k], g.top.position_MxK[latent, k]) for k in fired]
        assert {about["tokens"][t] for t in about["peaks"][latent]} == {TEXT_OF(t) for t in peaks}


def test_no_text_can_end_a_script(folder):
    for path in (folder / "data").iterdir():
        assert "<" not in path.read_text()
    html = (folder / "index.html").read_text()
    assert "<b>x" not in html and html.count("</script>") == 2
    assert re.findall(r'(?:src|href)="([^"]*)"', html) == ["data/index.js"]


def dump(path, address="", then=""):
    html = browser.dump(path, address, then)
    assert "<b>x" not in html
    return html


def listed(html):
    return [
        int(i)
        for i in re.findall(r'<tr[^>]* data-latent="(\d+)"|<tr data-latent="(\d+)"', html)
        for i in i
        if i
    ]


def plain(html):
    return re.sub(r"<[^>]*>", "", html).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


@browser.needs_chromium
def test_a_browser_shows_the_latent_of_the_address(shown, folder):
    g = shown.gathered
    latent = int(np.flatnonzero(g.count_M)[-1])
    html = dump(folder / "index.html", f"?sort=max&show=alive#{latent}")
    assert f"Latent {latent}" in html
    alive = np.flatnonzero(g.count_M)
    assert listed(html) == sorted(alive, key=lambda i: (-float(f"{g.max_M[i]:.3g}"), i))
    passages = re.findall(r'<div class="passage"[^>]*>(.*?)</div>', html, re.DOTALL)
    bands = collect.bands(g, latent)
    assert len(passages) == (g.top.row_MxK[latent] >= 0).sum() + len(bands)
    cut = shown.passages(g.options, g.top, latent, 0)
    assert plain(passages[0].split("</span>", 1)[1]) == decode(cut.tokens).replace("\n", "↵")
    peak = re.search(r'<span[^>]*class="peak"[^>]*>', passages[0])[0]
    assert f'title="{float(f"{g.max_M[latent]:.3g}"):g}"' in peak and "background" in peak
    assert passages[0].count("background") == (cut.values > 0).sum()
    assert html.count("<rect") == np.ptp(np.flatnonzero(g.histogram_MxH[latent])) + 1
    for other in shown.nearest_MxN[latent]:
        assert f'<a href="#{other}">{other}</a>' in html
    assert decode([int(shown.logits.highest_token_MxT[latent, 0])]) in plain(html)


@browser.needs_chromium
def test_a_browser_finds_text_tokens_and_numbers(shown, folder):
    g = shown.gathered

    def texts(latent):
        for k in np.flatnonzero(g.top.row_MxK[latent] >= 0):
            yield decode(shown.passages(g.options, g.top, latent, int(k)).tokens)
        for band in collect.bands(g, latent):
            yield decode(shown.passages(g.options, g.sample, latent, int(band[0])).tokens)

    html = dump(folder / "index.html", "?q=%3C%2Fscript%3E%3Cb%3EX")
    holding = {i for i in range(64) if any("</script><b>x" in text for text in texts(i))}
    assert 0 < len(holding) < 64 and set(listed(html)) == holding
    assert "64 of 64 latents searched" in html and "&lt;/script&gt;&lt;b&gt;x" in html
    about = read(folder / "data" / "index.js")
    peaks = [[about["tokens"][t].strip().lower() for t in tokens] for tokens in about["peaks"]]
    # Latents with the token as their most frequent peak come first.
    for letter in sorted({token for tokens in peaks for token in tokens if token}):
        fires = [i for i in range(64) if letter in peaks[i]]
        expected = sorted(fires, key=lambda i: (peaks[i].index(letter), i))
        if expected != fires:
            break
    html = dump(folder / "index.html", f"?q={urllib.parse.quote(letter)}")
    assert len(fires) < 64 and listed(html)[: len(fires)] == expected != fires
    assert html.count(">fires on ") == len(fires)
    assert f"Latent {expected[0]}" in html
    by_number = listed(dump(folder / "index.html", f"?q={urllib.parse.quote(letter)}&sort=number"))
    assert by_number == sorted(by_number) and set(by_number) >= set(fires)
    assert listed(dump(folder / "index.html", "?q=7"))[0] == 7


@browser.needs_chromium
def test_a_search_lists_latents_that_fire_most_on_the_text_first(shown, folder):
    g, share = shown.gathered, {}
    for latent in range(64):
        tops = [(g.top, int(k)) for k in np.flatnonzero(g.top.row_MxK[latent] >= 0)]
        for firings, k in [*tops, *((g.sample, int(band[0])) for band in collect.bands(g, latent))]:
            cut = shown.passages(g.options, firings, latent, k)
            text = decode(cut.tokens)  # One character per token.
            for at in (match.start() for match in re.finditer("(?=bread)", text)):
                value = cut.values[at : at + 5].max() / g.max_M[latent]
                share[latent] = max(share.get(latent, 0), value)
    found = listed(dump(folder / "index.html", "?q=Bread"))
    assert set(found) == set(share) and found != sorted(found)
    shares = np.array([share[latent] for latent in found])
    assert (np.diff(shares) <= 0.02).all()  # The files keep three digits.


@browser.needs_chromium
def test_the_pages_do_not_scroll_sideways(shown, folder, tmp_path):
    for address in ("", "?q=bread", "?show=dense"):
        assert browser.beyond(folder / "index.html", address=address) == 0
    named = dict.fromkeys([f"{i}_{'long_name_' * 9}" for i in range(2)], shown)
    website.write_links(tmp_path / "a.html", dict.fromkeys(named, "a"), named)
    assert browser.beyond(tmp_path / "a.html") == 0


@browser.needs_chromium
def test_a_browser_lists_dead_and_dense_latents(shown, folder):
    html = dump(folder / "index.html", "?show=dead")
    dead = np.flatnonzero(shown.gathered.is_dead_M).tolist()
    assert dead and listed(html) == dead and "(never fired)" in html
    html = dump(folder / "index.html", "?show=dense&sort=frequency")
    count = shown.gathered.count_M
    assert listed(html) == sorted(np.flatnonzero(shown.gathered.is_dense_M), key=lambda i: (-count[i], i))


@browser.needs_chromium
def test_a_browser_responds_to_clicks_typing_and_pointing(shown, folder):
    alive = np.flatnonzero(shown.gathered.count_M)
    first, second = alive[:2]
    html = dump(folder / "index.html", f"#{first}", browser.click(f'a[href="#{second}"]'))
    assert f"Latent {second}" in html and f"Latent {first}" not in html
    assert f'<tr data-latent="{second}" class="chosen">' in html
    typed = "document.querySelector('[name=q]').value = '7'; document.querySelector('form').requestSubmit();"
    submitted = dump(folder / "index.html", "", f"if (!location.search) {{ {typed} }}")
    assert listed(submitted)[0] == 7
    pointed = """
      setTimeout(() => {
        const peak = document.querySelector(".passage .peak");
        peak.scrollIntoView();
        const at = peak.getBoundingClientRect();
        document.title = document.elementFromPoint(at.x + at.width / 2, at.y + at.height / 2).title;
      }, 500);
    """
    html = dump(folder / "index.html", f"#{first}", pointed)
    assert f"<title>{float(f'{shown.gathered.max_M[first]:.3g}'):g}</title>" in html


def test_neuronpedia_files_hold_the_gathered_statistics(shown, tmp_path):
    neuronpedia.write(tmp_path, shown, 48, TEXT_OF)
    g = shown.gathered
    (path,) = tmp_path.glob("batch-*.json")
    batch = json.loads(path.read_text())
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("tiny", 1, NAME)
    alive = np.flatnonzero(g.count_M)
    assert [feature["feature_index"] for feature in batch["features"]] == alive.tolist()
    skipped = json.loads((tmp_path / "skipped_indexes.json").read_text())
    assert skipped["skipped_indexes"] == np.flatnonzero(g.is_dead_M).tolist()
    assert json.loads((tmp_path / "run_settings.json").read_text())["hook_name"] == "blocks.1.hook_resid_post"
    for feature in batch["features"]:
        latent = feature["feature_index"]
        np.testing.assert_allclose(feature["vector"], shown.subject.sae.W_dec[latent], atol=6e-4)
        assert sum(feature["freq_hist_data_bar_heights"]) == g.count_M[latent]
        assert len(feature["freq_hist_data_bar_heights"]) == len(feature["freq_hist_data_bar_values"])
        np.testing.assert_allclose(feature["frac_nonzero"], g.count_M[latent] / g.activations)
        largest = np.abs(shown.subject.sae.W_dec[latent]).argmax()
        assert feature["neuron_alignment_indices"][0] == largest
        top = [a for a in feature["activations"] if a["bin_contains"] == -1]
        bands = [a for a in feature["activations"] if a["bin_contains"] != -1]
        assert len(top) == (g.top.row_MxK[latent] >= 0).sum()
        np.testing.assert_allclose(sum(a["bin_contains"] for a in bands), 1, atol=3e-3)
        for a in feature["activations"]:
            peak = a["values"][a["qualifying_token_index"]]
            assert a["bin_min"] <= peak <= a["bin_max"] and len(a["tokens"]) == len(a["values"])
    # The fields that SAEDashboard writes for a feature.
    assert set(feature) == {
        "feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
        "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
        "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson",
        "neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero",
        "freq_hist_data_bar_values", "freq_hist_data_bar_heights", "logits_hist_data_bar_heights",
        "logits_hist_data_bar_values", "n_prompts_total", "n_tokens_in_prompt", "dataset",
        "decoder_weights_dist", "activations", "vector",
    }  # fmt: skip


@pytest.fixture
def opened(tiny_gemma, inputs, monkeypatch):
    """Opening any path returns two SAEs; one reconstructs a site that is not added to the stream."""
    config = tiny.run_config(inputs)
    places = Site("resid_post", 1), Site("mlp_in", 2)
    subjects = {
        name: attached.Subject(random_sae(seed), place, None)
        for seed, (name, place) in enumerate(zip(("a/b", "c"), places, strict=True))
    }
    found = opening.Opened(config, subjects, lambda: prepare.rows_of_once(config), {})
    monkeypatch.setattr(opening, "open_path", lambda path, **_: found)
    words = dataclasses.replace(tiny.load_tokenizer(), decode=decode)
    monkeypatch.setattr(tokenizer, "load", lambda *_: words)
    return found


def test_the_command_writes_pages_for_each_sae(opened, tmp_path, capsys):
    out = tmp_path / "out"
    all_shown = build.build("a run", rows=4, out=out, is_for_neuronpedia=True)
    assert list(all_shown) == ["a/b", "c"]
    assert all_shown["a/b"].logits is not None and all_shown["c"].logits is None
    html = (out / "index.html").read_text()
    assert re.findall(r'href="([^"]*)"', html) == ["a_b/index.html", "c/index.html"]
    for name in ("a_b", "c"):
        assert (out / name / "index.html").exists() and (out / name / "data" / "latents_0.js").exists()
        assert (out / name / "neuronpedia" / "batch-0.json").exists()
    assert not (out / "partial").exists()
    assert "a/b: 64 latents on" in capsys.readouterr().out
    build.build("a run", rows=4, out=out, saes=["c"])  # Writing again to its own folder is allowed.
    assert "data/index.js" in (out / "index.html").read_text()


def test_mistakes_are_reported_before_anything_is_loaded(opened, tmp_path):
    with pytest.raises(ValueError, match="there is no SAE x; choose from a/b, c"):
        build.build("a run", saes=["x"], out=tmp_path / "out")
    with pytest.raises(ValueError, match="--rows is 0"):
        build.build("a run", rows=0, out=tmp_path / "out")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="already exists"):
        build.build("a run", out=tmp_path)
