"""A headless Chromium for tests, steered through its DevTools protocol over two pipes.

`--remote-debugging-pipe` reads commands from descriptor 3 and writes answers to 4, as JSON ended by
a zero byte: no web socket, no driver, no port.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
SWITCHES = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run")
SWITCHES += ("disable-sync", "disable-background-networking", "disable-component-update")
SWITCHES += ("disable-dev-shm-usage", "hide-scrollbars", "remote-debugging-pipe")
# Moves the pipes to where Chromium looks for them, whatever numbers they have.
LAUNCH = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for place, pipe in zip((3, 4), pipes):
    os.dup2(pipe, place)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """One tab. `requests` holds every address it asked for."""

    def __init__(self, commands: int, answers: int) -> None:
        self.commands, self.answers = commands, answers
        self.number, self.buffer, self.session = 0, b"", ""
        self.requests: list[str] = []
        self.thrown: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, *, timeout: float = 60, **params: Any) -> dict[str, Any]:
        """One command and its answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + timeout
        while True:
            answer = self._read(end, method)
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _read(self, end: float, method: str) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.answers], [], [], max(0, end - time.monotonic()))
            assert ready, f"no answer to {method}"
            more = os.read(self.answers, 1 << 20)
            assert more, f"Chromium ended during {method}"
            self.buffer += more
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.thrown.append(str(message["params"]["exceptionDetails"]))
        return message

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, (expression, answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait(self, expression: str, *, seconds: float = 120) -> Any:
        """The first value of an expression that is true."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"never true: {expression}\n{self.text()[:2000]}"
            time.sleep(0.2)
        return value

    def text(self) -> str:
        """What a visitor reads."""
        return str(self.evaluate("document.body.innerText"))

    def open(self, address: str, *, width: int, height: int, dark: bool = False) -> None:
        """Load a page in a window of this size in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=address)

    def upload(self, selector: str, *files: Path) -> None:
        """Put files into an `<input type=file>`, as its dialogue does."""
        self.wait(f"!!document.querySelector({selector!r})")
        found = self.call("Runtime.evaluate", expression=f"document.querySelector({selector!r})")
        self.call(
            "DOM.setFileInputFiles",
            files=[str(file) for file in files],
            objectId=found["result"]["objectId"],
        )

    def screenshot(self, path: Path) -> Path:
        """The whole page, as PNG."""
        made = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(made["data"]))
        return path


@contextmanager
def chromium(profile: Path, *switches: str) -> Iterator[Page]:
    """A browser that ends with the block.

    Args:
        profile: a fresh folder.
        *switches: further ones, without their dashes.
    """
    read_commands, write_commands = os.pipe()
    read_answers, write_answers = os.pipe()
    flags = [f"--{switch}" for switch in (*SWITCHES, f"user-data-dir={profile}", *switches)]
    words = [str(read_commands), str(write_answers), str(CHROMIUM), *flags]
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *words],
        pass_fds=(read_commands, write_answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(read_commands)
    os.close(write_answers)
    try:
        yield Page(write_commands, read_answers)
    finally:
        os.close(write_commands)  # without its pipe Chromium ends by itself
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(read_answers)


def patiently(check: Callable[[], Any], *, seconds: float, what: str) -> Any:
    """The first true value of `check`."""
    end = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)
    return value
