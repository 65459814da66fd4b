"""Renders pages in a headless browser: Debian's package chromium."""

import pathlib
import re
import shutil
import subprocess

import pytest

needs_chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")


def _run(page: pathlib.Path, address: str, *options: str) -> subprocess.CompletedProcess:
    profile = page.parent / "profile"
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={profile}",
        *options,
    ]
    return subprocess.run(
        [*command, f"file://{page}{address}"], capture_output=True, text=True, check=True, timeout=180
    )


def dump(page: pathlib.Path, address: str = "", then: str = "") -> str:
    """The page's HTML after its scripts have run; fails if a script fails or logs anything.

    Args:
      page: the page's file.
      address: the rest of the address after the file's name, such as a fragment.
      then: a script that runs at the end, such as a click.
    """
    if then:
        acted = page.with_name("acted.html")
        acted.write_text(page.read_text() + f"<script>addEventListener('load', () => {{ {then} }});</script>")
        page = acted
    logged = ("--enable-logging=stderr", "--v=0", "--virtual-time-budget=5000", "--dump-dom")
    found = _run(page, address, *logged)
    assert "Uncaught" not in found.stderr and "CONSOLE" not in found.stderr, found.stderr
    return found.stdout


def measure(page: pathlib.Path, expression: str, width: int, address: str = "") -> float:
    """The value of a JavaScript expression on the page, in a frame that can be narrower than a window.

    Args:
      page: the page's file.
      expression: the expression, whose value is a number.
      width: the width of the frame in pixels.
      address: the rest of the address after the file's name, such as a fragment.
    """
    tell = f"setTimeout(() => parent.postMessage({expression}, '*'), 999)"
    told = f"<script>addEventListener('load', () => {tell})</script>"
    page.with_name("measured.html").write_text(page.read_text() + told)
    frame = page.with_name("frame.html")
    frame.write_text(
        "<title></title><script>onmessage = message => document.title = message.data</script>"
        f'<iframe src="measured.html{address}" style="border: 0; width: {width}px; height: 900px"></iframe>'
    )
    return float(re.search(r"<title>(.+?)</title>", dump(frame))[1])


def beyond(page: pathlib.Path, width: int = 400, address: str = "") -> float:
    """The number of pixels by which a page is wider than its frame: above 0 if it scrolls sideways."""
    root = "document.documentElement"
    return measure(page, f"{root}.scrollWidth - {root}.clientWidth", width, address)


def click(selector: str) -> str:
    """A script that clicks the topmost element at the centre of the first match of a CSS selector."""
    return f"""
      const wanted = document.querySelector({selector!r});
      wanted.scrollIntoView();
      const at = wanted.getBoundingClientRect();
      document.elementFromPoint(at.x + at.width / 2, at.y + at.height / 2).click();
    """


def screenshot(page: pathlib.Path, picture: pathlib.Path, address: str = "", size: str = "1400,1000") -> None:
    """Writes a PNG of the page in a window of the size "WIDTH,HEIGHT"."""
    _run(page, address, f"--window-size={size}", f"--screenshot={picture}", "--virtual-time-budget=5000")
