"""Who may talk to the dashboard's server: pages that it served itself, to a browser on this machine.

It listens on 127.0.0.1 alone, but any page that the user visits can make the browser send requests there. Such a page
has another Origin; or, where its own name was made to lead to 127.0.0.1, another Host.
"""

import re
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS = ("127.0.0.1", "localhost")
"""As which a browser may know this machine; the port may be another, as it is behind an SSH tunnel."""
UPLOAD_LIMIT_MB = 64
"""Of an archive; that of the preset `full` has some 10 MB."""
CONTENT_POLICY = {
    "default-src": "'self'",
    "script-src": "'self' 'unsafe-inline' 'unsafe-eval'",  # as Streamlit's own page needs
    "style-src": "'self' 'unsafe-inline'",
    "img-src": "'self' data: blob:",
    "font-src": "'self' data:",
    "media-src": "'self' blob:",
    "worker-src": "'self' blob:",
    "object-src": "'none'",
    "base-uri": "'self'",
    "form-action": "'self'",
    "frame-ancestors": "'none'",
}
"""What a page may load, and who may frame it: so that markup that got through could still tell nobody."""
PAGES = ("shape", "correctness", "measure")
MOVED = {
    **dict.fromkeys(("decide", "throughput", "memory"), "/shape"),
    "sign_check": "/correctness",
    "compare": "/?tab=compare",
    "overview": "/",
    "run": "/measure?part=run",
    "live_gpu": "/measure?part=machine",
    "profiles": "/measure?part=profiles",
}
"""Where what was at an earlier address is now."""
KEPT = ("rows", "vocab", "dtype", "mode")
"""Parameters that mean the same there."""
REFUSAL = b"This dashboard serves 127.0.0.1 and localhost, and pages of its own, only.\n"


class Guard:
    """Around the server's application: refuses with 403, and adds headers to what it lets through."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        host = _allowed_host(scope)
        if host is None:
            await _refuse(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_headers(host)]}
            await send(message)

        place = _moved(scope)
        await (self._app if place is None else RedirectResponse(place))(scope, receive, send_guarded)


def _allowed_host(scope: Scope) -> str | None:
    """The Host header, if it and the Origin, where there is one, are this server's; else None."""
    hosts = [value for name, value in scope["headers"] if name == b"host"]
    origins = [value for name, value in scope["headers"] if name == b"origin"]
    if len(hosts) != 1 or len(origins) > 1:
        return None
    try:
        host = str(hosts[0], "ascii").lower()
        parts = urlsplit(f"//{host}")
        name, _ = parts.hostname, parts.port  # the latter raises where it is no number
    except ValueError:
        return None
    if name not in HOSTS or host not in (name, f"{name}:{parts.port}"):
        return None
    if origins and origins[0].decode("latin-1").lower() != f"http://{host}":
        return None
    return host


def _moved(scope: Scope) -> str | None:
    """Where a page is that is asked for by an earlier address, or by one that no page has; None for all else."""
    name = scope["path"].strip("/")
    is_asked = scope["type"] == "http" and scope["method"] == "GET"
    if not is_asked or name in PAGES or not re.fullmatch("[A-Za-z][A-Za-z_-]*", name):
        return None
    page, _, more = MOVED.get(name, f"/?page={name}").partition("?")
    kept = [pair for pair in parse_qsl(scope["query_string"].decode("latin-1")) if pair[0] in KEPT]
    query = urlencode([*parse_qsl(more), *kept])
    return f"{page}?{query}" if query else page


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})  # before it was accepted: the server answers 403
        return
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(REFUSAL)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": REFUSAL})


def _headers(host: str) -> list[tuple[bytes, bytes]]:
    policy = {**CONTENT_POLICY, "connect-src": f"'self' ws://{host}"}
    return [
        (b"content-security-policy", "; ".join(f"{name} {value}" for name, value in policy.items()).encode()),
        (b"cross-origin-opener-policy", b"same-origin"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"referrer-policy", b"no-referrer"),
        (b"x-content-type-options", b"nosniff"),
        (b"x-frame-options", b"DENY"),
    ]
