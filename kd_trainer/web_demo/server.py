"""Where the demo listens, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from typing import Any

from kd_trainer.errors import require
from kd_trainer.web_demo.page import MOST_BYTES, STYLE


def check_address(host: str, port: int | None) -> None:
    """Refuse an address that is not this machine's, and a port that is taken.

    gradio searches a free port where none is named; of an address that it cannot listen on it tries
    each port for seconds.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        socket.create_server(address, family=family).close()
    except OSError as error:
        port_too = "" if port is None else f" and {port}"
        raise ValueError(
            "Expected an address of this machine (--host) and a free --port, got "
            f"{host}{port_too}: {error.strerror}. Name others, or leave both out."
        ) from error


def serve(page: Any, *, host: str | None, port: int | None, open_browser: bool) -> None:
    """Show the page until the process is interrupted."""
    # The reader's own fonts: gradio's half-bold one lacks most letters.
    themes = require("gradio", extra="demo").themes
    page.launch(
        theme=themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        server_name=host,
        server_port=port,
        inbrowser=open_browser,
        css=STYLE,
        max_file_size=MOST_BYTES,
        share=False,
        quiet=True,
        pwa=False,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        prevent_thread_lock=True,
    )
    others = " and every other address of this machine" if page.server_name == "0.0.0.0" else ""
    print(f"Demo: {page.local_url}{others}. Ctrl+C ends it.", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # how services and containers end it
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("ended")
    finally:
        page.close(verbose=False)


def prepare_environment(folder: str) -> None:
    """What gradio reads when it is imported: nobody is told, and uploads go to `folder`."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = folder
    # It asks itself whether it answers; a proxy cannot know.
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1,localhost"]))
