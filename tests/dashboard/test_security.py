"""Whom the dashboard's server answers: a real one, asked over real sockets."""

import base64
import http.client
import itertools
import os
import socket

import psutil
import pytest
from compiled_logprobs_dashboard.__main__ import SETTINGS

pytestmark = pytest.mark.slow
PATHS = ["/", "/run", "/_stcore/health", "/_stcore/upload_file/0/0", "/_stcore/stream", "/media/x", "/app/static/x"]
HOSTS = ["evil.example", "127.0.0.1.evil.example:{port}", "127.0.0.1:{port}@evil.example", "0.0.0.0:{port}", ""]
HOSTS += ["evil.example@127.0.0.1:{port}", "127.0.0.1:{port}x", "127.0.0.1:99999999", "[::1]:{port}"]
ORIGINS = ["http://evil.example", "https://127.0.0.1:{port}", "http://127.0.0.1", "http://localhost:{port}", "null", ""]
ORIGINS += ["http://127.0.0.1:{port}.evil.example", "file://"]
FOREIGN = [*(("host", host) for host in HOSTS), *(("origin", origin) for origin in ORIGINS)]


def ask(server, path: str, method: str = "GET", body: bytes | None = None, **headers: str):
    """Status, headers and body. The Host is this server's unless it is among `headers`."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in {"host": f"127.0.0.1:{server.port}", **headers}.items():
        connection.putheader(name, value)
    if body is not None:
        connection.putheader("content-length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    connection.close()
    return found


def handshake(server, **headers: str) -> int:
    """The status with which a WebSocket is accepted (101) or refused."""
    headers = {"Host": f"127.0.0.1:{server.port}", "Upgrade": "websocket", "Connection": "Upgrade", **headers}
    headers |= {"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode()}
    lines = ["GET /_stcore/stream HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall("\r\n".join(lines).encode())
        return int(connection.recv(100).split()[1])


def test_it_listens_on_this_machine_alone(server):
    found = psutil.Process(server.process.pid).net_connections("inet")
    assert {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN} == {"127.0.0.1"}


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "localhost:9999"])
def test_it_answers_this_machine_also_through_a_tunnel_with_another_port(server, host):
    host = host.format(port=server.port)
    assert ask(server, "/", host=host)[0] == ask(server, "/", host=host, origin=f"http://{host}")[0] == 200
    assert handshake(server, Host=host, Origin=f"http://{host}") == handshake(server, Host=host) == 101


@pytest.mark.parametrize(("header", "value"), FOREIGN)
def test_a_foreign_host_or_origin_gets_403_and_is_told_what_is_valid(server, header, value):
    foreign = {header: value.format(port=server.port)}
    said = b"This dashboard serves 127.0.0.1 and localhost, and pages of its own, only.\n"
    for path, method in itertools.product(PATHS, ("GET", "POST", "PUT", "OPTIONS")):
        status, headers, body = ask(server, path, method, **foreign)
        assert (status, body) == (403, said) and "access-control-allow-origin" not in headers
    assert handshake(server, **{name.title(): text for name, text in foreign.items()}) == 403


@pytest.mark.parametrize(
    "lines", ["Host: {0}\r\nHost: evil.example", "Host: {0}\r\n{1}\r\nOrigin: http://evil.example"]
)
def test_a_header_that_comes_twice_is_none(server, lines):
    host = f"127.0.0.1:{server.port}"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(f"GET / HTTP/1.1\r\n{lines.format(host, f'Origin: http://{host}')}\r\n\r\n".encode())
        assert connection.recv(100).split()[1] in (b"400", b"403")


@pytest.mark.parametrize(
    ("path", "leads_to"),
    [
        ("/decide?rows=64&profile=x", "/shape?rows=64"),
        ("/throughput", "/shape"),
        ("/memory?vocab=1&along=V", "/shape?vocab=1"),
        ("/sign_check?dtype=float32", "/correctness?dtype=float32"),
        ("/compare", "/?tab=compare"),
        ("/live_gpu", "/measure?part=machine"),
        ("/run", "/measure?part=run"),
        ("/profiles", "/measure?part=profiles"),
        ("/nowhere?rows=64", "/?page=nowhere&rows=64"),
        ("/shape?rows=64", None),
        ("/_stcore/health", None),
        ("/", None),
    ],
)
def test_earlier_addresses_lead_to_the_new_pages_and_unknown_ones_to_the_first(server, path, leads_to):
    status, headers, _ = ask(server, path)
    assert (status, headers.get("location")) == ((200, None) if leads_to is None else (307, leads_to))


@pytest.mark.parametrize("path", ["/", "/_stcore/health", "/media/none", "/static/none.js"])
def test_no_page_can_frame_it_or_read_it_and_it_loads_from_nowhere_else(server, path):
    _, headers, _ = ask(server, path)
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self'" and policy["frame-ancestors"] == "'none'"
    own = f"ws://127.0.0.1:{server.port}"
    allowed = {word for value in policy.values() for word in value.split()}
    assert not [word for word in allowed if "*" in word or ("//" in word and word != own)]
    assert headers["x-frame-options"] == "DENY" and headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == headers["cross-origin-opener-policy"] == "same-origin"
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", ["/app/static/app.py", "/..%2fapp.py", "/%2e%2e/app.py", "/media/..%2f..%2fapp.py"])
def test_no_path_leads_to_a_file(server, path):
    _, _, body = ask(server, path)
    assert b"streamlit as st" not in body and b"set_page_config" not in body


def test_nothing_of_the_users_settings_came_through(server):
    assert SETTINGS["browser.gatherUsageStats"] is False and SETTINGS["server.maxUploadSize"] == 64
    origin = f"http://127.0.0.1:{server.port}"
    _, headers, _ = ask(server, "/_stcore/health", origin=origin)
    assert headers.get("access-control-allow-origin") != "*"
    session = "/_stcore/upload_file/00000000-0000-0000-0000-000000000000/1"
    assert ask(server, session, "PUT", b"{}", origin=origin)[0] in (400, 403), "without the token against XSRF"
