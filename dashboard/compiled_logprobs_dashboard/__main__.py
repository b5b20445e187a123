"""The server that `compiled-logprobs dashboard` becomes: Streamlit's, on 127.0.0.1, behind our guard."""

import argparse
import logging
import os
import signal
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from starlette.middleware import Middleware
from streamlit import config
from streamlit.starlette import App

# Imported before a page is: two threads that import the library at once can block one another.
from compiled_logprobs_dashboard import runs, selection
from compiled_logprobs_dashboard.guard import HOSTS, UPLOAD_LIMIT_MB, Guard

ADDRESS = HOSTS[0]
SCRIPT = Path(__file__).with_name("app.py")
PATIENCE_S = 2.0
"""For pages that are being computed, when a signal has come."""
SETTINGS: dict[str, Any] = {
    "browser.gatherUsageStats": False,
    "browser.serverAddress": ADDRESS,
    "client.toolbarMode": "minimal",
    "global.developmentMode": False,
    "logger.hideWelcomeMessage": True,
    "server.address": ADDRESS,
    "server.allowedHosts": list(HOSTS),
    "server.baseUrlPath": "",
    "server.corsAllowedOrigins": [],
    "server.enableAgentApi": False,
    "server.enableCORS": True,
    "server.enableStaticServing": False,
    "server.enableXsrfProtection": True,
    "server.fileWatcherType": "none",
    "server.headless": True,  # we open the browser: Streamlit looks up an address outside of this machine first
    "server.maxUploadSize": UPLOAD_LIMIT_MB,
    "server.runOnSave": False,
}
"""As with flags of `streamlit run`, no file and no environment variable of the user's has a say in these."""


def main() -> None:
    """Serve, as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--no-browser", dest="browser", action="store_false")
    asked = parser.parse_args()
    app = App(SCRIPT, middleware=[Middleware(Guard)], lifespan=partial(_alive, browser=asked.browser))
    try:
        app.run(config={**SETTINGS, "server.port": asked.port})
    except KeyboardInterrupt:  # raised once more when all is put away
        sys.exit(128 + signal.SIGINT)


@asynccontextmanager
async def _alive(app: App, *, browser: bool) -> AsyncIterator[None]:
    """Around the server's life."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, partial(_end, signal.getsignal(number)))
    url = f"http://{ADDRESS}:{config.get_option('server.port')}"
    sys.stdout.write(f"The dashboard is at {url}\nPress Ctrl-C to end it.\n")
    sys.stdout.flush()
    # It warns of widgets that have a default and a value from a link, as ours do, and of what no page asked for.
    for name in ("elements.lib.policies", "runtime.scriptrunner_utils.script_run_context"):
        logging.getLogger(f"streamlit.{name}").setLevel(logging.ERROR)
    threading.Thread(target=selection.current_frames, daemon=True).start()
    if browser and _has_screen():
        threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
    yield


def _end(orderly: Any, number: int, frame: FrameType | None) -> None:
    """End in order, and without order if that takes long: a page may be in the midst of a computation."""
    runs.RUNS.interrupt()
    orderly(number, frame)
    last = threading.Timer(PATIENCE_S, os._exit, [128 + number])
    last.daemon = True
    last.start()


def _has_screen() -> bool:
    """Elsewhere a browser in the terminal would be started, if one is installed."""
    return sys.platform != "linux" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


if __name__ == "__main__":
    main()
