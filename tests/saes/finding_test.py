"""SAEs are fetched from Hugging Face's hub: the real client with a small local server that imitates the hub."""

import hashlib
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading

import numpy as np
import pytest

from gemma_scope_jax.runtime import hub as hub_lib
from gemma_scope_jax.saes import finding, formats
from gemma_scope_jax.saes.formats import common, gemma_scope, gemma_scope_2
from gemma_scope_jax.saes.jumprelu import SAE

SHA = "0123456789abcdef0123456789abcdef01234567"
PLACE = "resid_post/layer_12_width_16k_l0_medium"


class Hub(http.server.BaseHTTPRequestHandler):
    """A server that lists a revision's files and sends each file, also from a given byte."""

    root: pathlib.Path
    cut: int | None = None  # The number of bytes to send of the next large file.
    damaged = False
    asked: list  # The requested files, as (name, first byte).
    asked_of: list  # The requests about the repository.
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path.startswith("/api/models/test/repo/"):
            Hub.asked_of.append(self.path.removeprefix("/api/models/test/repo/"))
            files = [path for path in sorted(self.root.rglob("*")) if path.is_file()]
            names = [str(path.relative_to(self.root)) for path in files]
            if "/tree/" in self.path:
                found = [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": "0" * 40}
                    for name, path in zip(names, files, strict=True)
                ]
            else:
                found = {"id": "test/repo", "sha": SHA, "siblings": [{"rfilename": name} for name in names]}
            return self.reply(200, json.dumps(found).encode(), {"Content-Type": "application/json"})
        return self.send_file()

    do_HEAD = do_GET

    def send_file(self):
        file = self.root / self.path.split(f"/resolve/{SHA}/")[-1]
        if not self.path.startswith("/test/repo/resolve/") or not file.is_file():
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if Hub.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        first = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        if self.command == "GET":
            Hub.asked.append((file.name, first))
        cut = Hub.cut if self.command == "GET" and len(content) > 100_000 else None
        if cut is not None:
            Hub.cut = None
        return self.reply(206 if first else 200, content[first:], headers, cut)

    def reply(self, status, content, headers, cut=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True


@pytest.fixture
def server(tmp_path):
    """Serves a repository with two SAEs and other files; yields the client's environment."""
    Hub.root, Hub.asked, Hub.asked_of = tmp_path / "remote", [], []
    Hub.cut, Hub.damaged = None, False
    rng = np.random.default_rng(0)
    m = 2**16  # The weights take 34 MB; the client writes 10 MB at a time.
    shapes = {"W_enc": (64, m), "b_enc": (m,), "threshold": (m,), "W_dec": (m, 64), "b_dec": (64,)}
    stored = SAE(**{name: rng.random(shape, np.float32) for name, shape in shapes.items()})
    about = common.About("google/gemma-3-270m", "model.layers.12.output")
    gemma_scope_2.write(Hub.root / PLACE, stored, about)
    gemma_scope.write(Hub.root / "layer_1", stored, common.About())
    (Hub.root / PLACE / "examples.safetensors").write_bytes(b"x" * 1000)
    (Hub.root / "README.md").write_text("# Ours")
    running = http.server.ThreadingHTTPServer(("localhost", 0), Hub)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield {
        **os.environ,
        "HF_ENDPOINT": f"http://localhost:{running.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    running.shutdown()
    running.server_close()


def fetch(environment, location):
    """Prints the paths of a location in a new process, because the client reads its environment only once."""
    code = f"from gemma_scope_jax.saes import finding; print(*finding.paths({location!r}))"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )


def test_only_an_saes_own_files_are_fetched_and_only_once(server):
    done = fetch(server, f"hf://test/repo/{PLACE}")
    assert done.returncode == 0, done.stderr
    folder = pathlib.Path(done.stdout.strip())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "params.safetensors"]
    _, about = gemma_scope_2.read(folder)
    assert about.hook_name == "model.layers.12.output"
    assert sorted(name for name, _ in Hub.asked) == ["config.json", "params.safetensors"]
    assert fetch(server, f"hf://test/repo@main/{PLACE}").returncode == 0 and len(Hub.asked) == 2
    # For a weights file, the config beside it is fetched too, since it names the model and site.
    file = fetch(server | {"HF_HOME": f"{server['HF_HOME']}2"}, f"hf://test/repo/{PLACE}/params.safetensors")
    (beside,) = formats.read(pathlib.Path(file.stdout.strip()))
    assert beside.about.hook_name == "model.layers.12.output"
    alone = fetch(server, "hf://test/repo/layer_1/params.npz")
    assert alone.stdout.strip().endswith("layer_1/params.npz"), alone.stderr


def test_a_damaged_download_is_refused_and_fetched_again(server):
    Hub.damaged = True
    done = fetch(server, f"hf://test/repo/{PLACE}")
    assert done.returncode != 0
    assert "the download of config.json, params.safetensors is damaged" in done.stderr
    Hub.damaged = False
    assert fetch(server, f"hf://test/repo/{PLACE}").returncode == 0


def test_an_interrupted_download_resumes(server):
    Hub.cut = 25_000_000
    done = fetch(server, f"hf://test/repo/{PLACE}")
    if done.returncode:  # Either the client retries itself, or the user does.
        done = fetch(server, f"hf://test/repo/{PLACE}")
    assert done.returncode == 0, done.stderr
    first, second = (first for name, first in Hub.asked if name == "params.safetensors")
    assert first == 0 and 10_000_000 < second <= 25_000_000
    gemma_scope_2.read(pathlib.Path(done.stdout.strip()))


def test_locations_that_do_not_exist_are_refused_by_name(server):
    nowhere = fetch(server, "hf://test/repo/nowhere").stderr
    assert f"has no SAE in 'nowhere'; it has SAEs in layer_1, {PLACE}" in nowhere
    assert "cannot fetch hf://test/other/x" in fetch(server, "hf://test/other/x").stderr
    for location in ("hf://test", "hf://test/repo/../../etc", "hf://test/repo/a@main"):
        with pytest.raises(ValueError, match="is not hf://OWNER/NAME/FOLDER"):
            finding.local(location)
    with pytest.raises(ValueError, match="/nowhere does not exist"):
        finding.local("/nowhere")


def test_a_revision_can_contain_slashes(server):
    done = fetch(server, f"hf://test/repo@refs/pr/3/{PLACE}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(PLACE)
    assert Hub.asked_of[0].endswith("revision/refs%2Fpr%2F3")
    for location, place in (
        ("hf://a/b@refs/pr/3", ("a/b", "refs/pr/3", "")),
        ("hf://a/b@refs/pr/3/c/d", ("a/b", "refs/pr/3", "c/d")),
        ("hf://a/b@my%2Fbranch/c", ("a/b", "my/branch", "c")),
        (f"hf://a/b@{SHA}/c/", ("a/b", SHA, "c")),
        ("hf://a/b/c", ("a/b", None, "c")),
    ):
        assert hub_lib.place_of(location) == place
    for location in ("hf://a/b@refs%2F..%2F../c", "hf://a/b@/c"):
        with pytest.raises(ValueError, match="is not hf://OWNER/NAME/FOLDER"):
            hub_lib.place_of(location)


def test_without_a_network_cached_saes_open_and_others_are_reported_as_not_cached(server):
    def offline(*locations):
        """The path or error message of each location, from one process."""
        tried = f"""
from gemma_scope_jax import hub
for location in {locations!r}:
    try:
        print(*hub.paths(location))
    except ValueError as error:
        print(error)
"""
        environment = server | {"HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", tried]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout

    there, elsewhere = (
        f"hf://test/repo/{PLACE}",
        ["hf://test/repo/layer_1", "hf://test/repo/no", "hf://test/repo/*"],
    )
    for said in offline(there, *elsewhere).splitlines():
        assert "is not in the cache" in said
    assert fetch(server, there).returncode == 0
    first, *others = offline(there, *elsewhere).splitlines()
    assert first.endswith(PLACE)
    for location, said in zip(elsewhere, others, strict=True):
        assert said.startswith(f"{location} is not in the cache") and "no SAE" not in said


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("https://huggingface.co/google/gemma-scope", "hf://google/gemma-scope"),
        ("https://huggingface.co/google/gemma-scope/", "hf://google/gemma-scope"),
        (
            "https://huggingface.co/google/gemma-scope/tree/main/layer_20/a",
            "hf://google/gemma-scope@main/layer_20/a",
        ),
        ("https://hf.co/a/b/blob/refs%2Fpr%2F3/c/params.npz?x=1", "hf://a/b@refs%2Fpr%2F3/c/params.npz"),
        ("google/gemma-scope/layer_20", "hf://google/gemma-scope/layer_20"),
    ],
)
def test_web_addresses_of_the_hub_are_refused_with_the_hf_location(given, meant):
    with pytest.raises(ValueError, match=f"{re.escape(meant)}$"):
        finding.local(given)
    hub_lib.place_of(meant)
