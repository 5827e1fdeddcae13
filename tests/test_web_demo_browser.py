"""The web demo in a real browser, served by the script as a user starts it, and as a Space does."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from chromium import CHROMIUM, Page, chromium
from PIL import Image
from small_runs import save_network

ROOT = Path(__file__).parents[1]
NEEDS_GRADIO = pytest.mark.skipif(find_spec("gradio") is None, reason="needs the extra demo")
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
INPUT = "#photograph input[type=file]"
# Runs inside the server before anything else: names that are looked up, other than this machine's.
NO_NETWORK = """
import os, socket
_find = socket.getaddrinfo
def getaddrinfo(host, *args, **kwargs):
    name = host.decode() if isinstance(host, bytes) else str(host)
    if name not in ("127.0.0.1", "0.0.0.0", "localhost", "None"):
        with open(os.environ["LOOKED_UP"], "a") as file:
            file.write(name + "\\n")
        raise socket.gaierror(socket.EAI_NONAME, "no network")
    return _find(host, *args, **kwargs)
socket.getaddrinfo = getaddrinfo
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two networks, photographs, a text that is called one, and a server's trap."""
    root = tmp_path_factory.mktemp("demo")
    save_network(root / "student", seed=0)
    save_network(root / "teacher", seed=1)
    draw = np.random.default_rng(3)
    Image.fromarray(draw.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(root / "photo.png")
    Image.new("CMYK", (60, 40), (0, 200, 200, 0)).save(root / "print.jpg")
    (root / "text.jpg").write_text("no picture")
    (root / "trap").mkdir()
    (root / "trap" / "sitecustomize.py").write_text(NO_NETWORK)
    return root


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@contextmanager
def served(folder: Path, words: list[str], **variables: str) -> Iterator[Path]:
    """A demo in a process of its own, until the block ends; gives the file of what it looked up."""
    uploads = folder / f"uploads{time.monotonic_ns()}"
    uploads.mkdir()
    log = uploads / "log"
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()} | {
        "PYTHONPATH": f"{folder / 'trap'}{os.pathsep}{ROOT}",
        "LOOKED_UP": str(uploads / "looked_up"),
        "TMPDIR": str(uploads),
        "HTTP_PROXY": "http://127.0.0.1:9",
        **variables,
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=uploads,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + 240
        while "Demo: http://" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield uploads / "looked_up"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
        assert not list(uploads.glob("kd_trainer-demo-*")), "what visitors sent was left behind"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def sources(page: Page) -> list[str]:
    """Addresses of the two pictures of the slider, once they are loaded."""
    script = (
        "(() => {const found = [...document.querySelectorAll('#slider img')];"
        "return found.length === 2 && found.every(i => i.complete && i.naturalWidth)"
        "&& found.map(i => i.src)})()"
    )
    return page.wait(script)


def pixels_of(address: str) -> np.ndarray:
    with urllib.request.urlopen(address, timeout=30) as answer:
        return np.asarray(Image.open(answer).convert("RGB"))


def is_measured(page: Page) -> None:
    page.wait("/median of 2 calls/.test(document.querySelector('#figures').innerText)")


@NEEDS_GRADIO
@NEEDS_CHROMIUM
@pytest.mark.browser
@pytest.mark.slow
def test_a_dropped_picture_is_segmented_by_both_in_the_browser(folder: Path, tmp_path: Path):
    """Parts that work alone may show nothing; and a page may fetch its fonts from elsewhere."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    words = [str(ROOT / "scripts" / "demo.py"), str(folder / "student"), "--port", str(port)]
    words += ["--teacher", str(folder / "teacher"), "--repeats", "2"]
    words += ["--examples", str(folder / "photo.png")]
    # Nothing but this machine can be found; what is asked for is written down all the same.
    switch = "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    with served(folder, words) as looked_up, chromium(tmp_path / "profile", switch) as page:
        page.open(address, width=1280, height=900)
        page.upload(INPUT, folder / "photo.png")
        is_measured(page)
        left, right = map(pixels_of, sources(page))
        assert left.shape == right.shape == (90, 120, 3)
        assert (left != right).any(), "teacher and student are not the same"
        text = page.text()
        for words_shown in ("milliseconds", "million parameters", "weight file, MiB", "Different"):
            assert words_shown in text
        shots = {"light": page.screenshot(tmp_path / "light.png")}

        page.upload(INPUT, folder / "text.jpg")
        page.wait("/readable image, got text.jpg/.test(document.body.innerText)")
        assert "Traceback" not in page.text()
        assert page.evaluate("document.querySelectorAll('#slider img').length") == 0
        page.upload(INPUT, folder / "print.jpg")
        page.wait("!/readable image/.test(document.body.innerText)")
        is_measured(page)
        assert pixels_of(sources(page)[0]).shape == (40, 60, 3)

        page.open(address, width=390, height=844, dark=True)
        page.upload(INPUT, folder / "photo.png")
        is_measured(page)
        sources(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        shots["dark"] = page.screenshot(tmp_path / "phone.png")

        elsewhere = [r for r in page.requests if not r.startswith((address, "data:", "blob:"))]
        assert elsewhere == ["about:blank"] * len(elsewhere)
        assert len(page.requests) > 10
        assert page.thrown == []
        assert not looked_up.exists(), looked_up.read_text()
    brightness = {}
    for mode, path in shots.items():
        shown = np.asarray(Image.open(path).convert("L"), float)
        assert shown.std() > 10, "blank"
        brightness[mode] = np.median(shown)
    assert brightness["light"] > 200 > 60 > brightness["dark"]


@NEEDS_GRADIO
@pytest.mark.slow
def test_the_script_is_the_app_of_a_space(folder: Path, tmp_path: Path):
    """A Space starts `python app.py` in a folder of its own and says the rest in variables."""
    app = shutil.copy(ROOT / "scripts" / "demo.py", tmp_path / "app.py")
    port = free_port()
    variables = {"STUDENT": str(folder / "student"), "TEACHER": str(folder / "teacher")}
    server = {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SERVER_PORT": str(port)}
    with (
        served(folder, [str(app)], **variables, **server),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer,
    ):
        page = answer.read().decode()
        assert "Teacher and student" in page
        assert str(folder) not in page, "a folder of the server's"
