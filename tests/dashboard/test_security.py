"""Whom the dashboard's server answers: a real one, asked over real sockets."""

import base64
import http.client
import os
import socket

import psutil
import pytest
from compiled_logprobs_dashboard.__main__ import SETTINGS

pytestmark = pytest.mark.slow
PATHS = [
    "/",
    "/run",
    "/_stcore/health",
    "/_stcore/host-config",
    "/_stcore/upload_file/0/0",
    "/_stcore/stream",
    "/_stcore/metrics",
    "/media/x",
    "/static/x",
    "/app/static/x",
    "/component/x/y",
    "/..%2f..%2fetc/passwd",
]
FOREIGN_HOSTS = [
    "evil.example",
    "evil.example:{port}",
    "127.0.0.1.evil.example:{port}",
    "localhost.evil.example",
    "127.0.0.1:{port}@evil.example",
    "evil.example@127.0.0.1:{port}",
    "0.0.0.0:{port}",
    "127.0.0.1:{port}x",
    "127.0.0.1:99999999",
    "127.0.0.1:{port}/",
    "[::1]:{port}",
    "",
]
FOREIGN_ORIGINS = [
    "http://evil.example",
    "https://127.0.0.1:{port}",
    "http://127.0.0.1",
    "http://127.0.0.1:1",
    "http://localhost:{port}",
    "http://127.0.0.1:{port}.evil.example",
    "http://127.0.0.1:{port}/",
    "null",
    "file://",
    "",
]


def ask(server, path: str, method: str = "GET", body: bytes | None = None, **headers: str):
    """Status, headers and body. The Host is this server's unless it is among `headers`."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in {"host": f"127.0.0.1:{server.port}", **headers}.items():
        connection.putheader(name.replace("_", "-"), value)
    if body is not None:
        connection.putheader("content-length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    connection.close()
    return found


def handshake(server, **headers: str) -> int:
    """The status with which a WebSocket is accepted (101) or refused."""
    key = base64.b64encode(os.urandom(16)).decode()
    lines = {
        "Host": f"127.0.0.1:{server.port}",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": key,
        "Sec-WebSocket-Version": "13",
        **headers,
    }
    request = "GET /_stcore/stream HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(request.encode() + b"\r\n")
        return int(connection.recv(100).split()[1])


def test_it_listens_on_this_machine_alone(server):
    found = psutil.Process(server.process.pid).net_connections("inet")
    assert {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN} == {"127.0.0.1"}


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_it_answers_this_machine(server, name):
    host = f"{name}:{server.port}"
    assert ask(server, "/", host=host)[0] == 200
    assert ask(server, "/", host=host, origin=f"http://{host}")[0] == 200
    assert handshake(server, Host=host, Origin=f"http://{host}") == 101
    assert handshake(server, Host=host) == 101


def test_it_answers_through_a_tunnel_with_another_port(server):
    host = "localhost:9999"
    assert ask(server, "/", host=host, origin=f"http://{host}")[0] == 200
    assert handshake(server, Host=host, Origin=f"http://{host}") == 101


@pytest.mark.parametrize(
    ("header", "value"), [*(("host", host) for host in FOREIGN_HOSTS), *(("origin", one) for one in FOREIGN_ORIGINS)]
)
def test_a_foreign_host_or_origin_gets_403(server, header, value):
    value = value.format(port=server.port)
    answers = {ask(server, path, m, **{header: value})[0] for path in PATHS for m in ("GET", "POST", "PUT", "OPTIONS")}
    assert answers == {403} and handshake(server, **{header.title(): value}) == 403


def test_two_hosts_are_none(server):
    request = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nHost: evil.example\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(request.encode())
        assert connection.recv(100).split()[1] in (b"400", b"403")


def test_a_refusal_says_what_is_valid_and_nothing_else(server):
    status, headers, body = ask(server, "/", host="evil.example")
    assert (status, body) == (403, b"This dashboard serves 127.0.0.1 and localhost, and pages of its own, only.\n")
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("path", ["/", "/_stcore/health", "/_stcore/host-config", "/media/none", "/static/none.js"])
def test_no_page_can_frame_it_or_read_it_and_it_loads_from_nowhere_else(server, path):
    _, headers, _ = ask(server, path)
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self'" and policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == f"'self' ws://127.0.0.1:{server.port}"
    allowed = {word for value in policy.values() for word in value.split()}
    assert not [
        word for word in allowed if "*" in word or ("//" in word and not word.endswith(f"127.0.0.1:{server.port}"))
    ]
    assert headers["x-frame-options"] == "DENY" and headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == headers["cross-origin-opener-policy"] == "same-origin"
    assert headers["referrer-policy"] == "no-referrer"


def test_an_upload_without_the_token_is_refused(server):
    """XSRF protection is on, whatever the user's own settings say."""
    session = "/_stcore/upload_file/00000000-0000-0000-0000-000000000000/1"
    status, _, _ = ask(server, session, "PUT", b"{}", origin=f"http://127.0.0.1:{server.port}")
    assert status in (400, 403)


@pytest.mark.parametrize(
    "path",
    ["/app/static/app.py", "/..%2fapp.py", "/static/..%2f..%2fapp.py", "/%2e%2e/server.py", "/media/..%2f..%2fapp.py"],
)
def test_no_path_leads_to_a_file(server, path):
    _, _, body = ask(server, path)
    assert b"streamlit as st" not in body and b"set_page_config" not in body


def test_nothing_of_the_users_settings_came_through(server):
    assert SETTINGS["browser.gatherUsageStats"] is False and SETTINGS["server.enableCORS"] is True
    assert SETTINGS["server.enableXsrfProtection"] is True and SETTINGS["server.maxUploadSize"] == 64
    _, headers, _ = ask(server, "/_stcore/health", origin=f"http://127.0.0.1:{server.port}")
    assert headers.get("access-control-allow-origin") != "*"
