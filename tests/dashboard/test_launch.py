"""`compiled-logprobs dashboard`: how it starts, what stops it from starting, and that a signal ends it."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compiled_logprobs.cli import dashboard as module
from compiled_logprobs.cli.dashboard import require_packages, require_port
from compiled_logprobs.cli.main import app
from compiled_logprobs.errors import InputError, LogProbsError
from tests.helpers.dashboard_server import LIMIT_S, dashboard

streamlit = pytest.importorskip("streamlit", reason="the extra `dashboard` is not installed")
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def became(monkeypatch):
    """Which program it would have become."""
    calls = []
    monkeypatch.setattr(module.os, "execve", lambda *arguments: calls.append(arguments))
    return calls


def test_the_process_becomes_the_server(became):
    assert (
        CliRunner().invoke(app, ["dashboard", "--port", "0", "--no-browser"]).exit_code == 2
    )  # nothing became of it here
    ((program, command, environment),) = became
    assert program == command[0] == sys.executable
    assert command[1:] == ["-m", "compiled_logprobs_dashboard", "--port=0", "--no-browser"]
    assert environment["PYTHONSAFEPATH"] == "1" and str(REPOSITORY) in environment["PYTHONPATH"].split(":")
    assert CliRunner().invoke(app, ["dashboard", "--port", "70000"]).exit_code == 2 and len(became) == 1


@pytest.mark.parametrize("name", ["streamlit", "plotly", "pandas"])
def test_without_the_extra_it_says_what_to_install(monkeypatch, became, name):
    found = metadata.version

    def version(asked):
        if asked == name:
            raise metadata.PackageNotFoundError(asked)
        return found(asked)

    monkeypatch.setattr(module, "version", version)
    result = CliRunner().invoke(app, ["dashboard", "--port", "0"])
    assert result.exit_code == 2 and became == []
    assert result.stderr == (
        f"LogProbsError: the dashboard needs {name}, which is not installed. "
        'pip install "compiled-logprobs[dashboard]" brings it.\n'
    )


def test_with_an_old_release_it_says_which_is_needed(monkeypatch):
    monkeypatch.setattr(module, "version", lambda name: "1.9.4")
    with pytest.raises(LogProbsError, match="the dashboard needs pandas 2.2 or newer; 1.9.4 is installed"):
        require_packages()
    for fit in ("3.1.1", "10.0.0rc1"):
        monkeypatch.setattr(
            module, "version", lambda name, fit=fit: fit if name == "pandas" else metadata.version(name)
        )
        require_packages()


def test_the_lowest_releases_are_those_of_the_extra():
    text = (REPOSITORY / "pyproject.toml").read_text()
    for name, lowest in module.NEEDED.items():
        asked = f'"{name}>={".".join(map(str, lowest))}'.removesuffix(".0")
        assert asked in text


def test_a_busy_port_is_said():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"got port {port}, which .* in use. .*Name another port, e.g. --port"):
            require_port(port)
        result = CliRunner().invoke(app, ["dashboard", "--port", str(port)])
        assert result.exit_code == 2 and result.stderr.startswith(f"InputError: got port {port}")
    require_port(port)


def end(server, number: signal.Signals) -> None:
    """By a signal, although a browser stays connected, and another says nothing."""
    with socket.create_connection(("127.0.0.1", server.port)) as idle, connected(server) as stream:
        server.process.send_signal(number)
        server.process.wait(LIMIT_S)
        # 0 where whoever started the tests has SIGINT ignored, as a shell does for its background jobs.
        assert server.process.returncode in (0, -number, 128 + number)
        assert idle and stream
    assert "Traceback" not in server.output.read_text()


@pytest.mark.slow
def test_ctrl_c_ends_it(tmp_path):
    with dashboard(tmp_path) as server:
        end(server, signal.SIGINT)


def connected(server) -> socket.socket:
    """A WebSocket to the server, open."""
    stream = socket.create_connection(("127.0.0.1", server.port))
    stream.sendall(
        f"GET /_stcore/stream HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nUpgrade: websocket\r\nConnection: "
        "Upgrade\r\n"
        "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    assert b" 101 " in stream.recv(1000)
    return stream


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = "from hatchling.build import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    made = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return folder / made.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_the_wheel_holds_all_of_the_dashboard(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    files = [
        file for file in (REPOSITORY / "dashboard").glob("*/**/*") if file.is_file() and "__pycache__" not in file.parts
    ]
    wanted = {file.relative_to(REPOSITORY / "dashboard").as_posix() for file in files}
    package = "compiled_logprobs_dashboard"
    assert {f"{package}/.streamlit/config.toml", f"{package}/icon.png", f"{package}/app.py"} <= wanted <= held
    assert any(name.startswith("compiled_logprobs/profiles/v1/") for name in held)


def with_needs(name: str, known: dict[str, metadata.Distribution]) -> dict[str, metadata.Distribution]:
    """The distribution of that name and all that it needs, as far as they are installed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        if name not in known:
            known[name] = metadata.distribution(name)
            for needed in known[name].requires or []:
                with_needs(re.match("[A-Za-z0-9._-]+", needed)[0], known)
    return known


@pytest.fixture
def installed(wheel, tmp_path):
    """The command of the wheel in an empty environment, into which pip brings what the wheel asks for.

    Only torch, which can take gigabytes, is this environment's, with what it needs: linked, so that nothing beside it
    is found.
    """
    place, links = tmp_path / "environment", tmp_path / "torch"
    venv.create(place, with_pip=False)
    links.mkdir()
    for one in with_needs("torch", {}).values():
        for top in {file.parts[0] for file in one.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (links / top).exists():
                (links / top).symlink_to(one.locate_file(top))
    (site,) = (place / "lib").glob("python*/site-packages")
    (site / "torch.pth").write_text(str(links))
    pip = [sys.executable, "-m", "pip", "--python", str(place / "bin" / "python"), "install", "--quiet", "--no-compile"]
    constraints = ["-c", str(REPOSITORY / "constraints.txt")]
    made = subprocess.run([*pip, *constraints, f"{wheel}[dashboard]"], capture_output=True, text=True)
    if made.returncode and "Failed to establish a new connection" in made.stderr:
        pytest.skip("pip reaches no index")
    assert made.returncode == 0, made.stderr
    return place / "bin" / "compiled-logprobs"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="an environment is laid out differently there")
def test_from_the_wheel_it_starts_and_serves(installed, tmp_path):
    program = (
        "from compiled_logprobs_dashboard.frames import load, sources, __file__ as file; "
        "print(file, list(load(sources()).decisions['source'].unique()))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # not the checkout
    python = [str(installed.parent / "python"), "-c", program]
    told = subprocess.run(python, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment).stdout
    assert str(tmp_path / "environment") in told and "['bundled']" in told
    with dashboard(tmp_path, command=[str(installed)], cwd=tmp_path, PYTHONPATH="") as server:
        end(server, signal.SIGTERM)
