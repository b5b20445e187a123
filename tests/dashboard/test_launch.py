"""`compiled-logprobs dashboard`: how it starts, what stops it from starting, and that a signal ends it."""

import re
import signal
import socket
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compiled_logprobs.cli import dashboard as module
from compiled_logprobs.cli.main import app
from tests.helpers.dashboard_server import LIMIT_S, dashboard, environment_in

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def became(monkeypatch):
    """Which program it would have become."""
    calls = []
    monkeypatch.setattr(module.os, "execve", lambda *arguments: calls.append(arguments))
    return calls


def test_the_process_becomes_the_server(became):
    assert CliRunner().invoke(app, ["dashboard", "--port", "0", "--no-browser"]).exit_code == 2  # it is still here
    ((program, command, environment),) = became
    assert program == command[0] == sys.executable
    assert command[1:] == ["-m", "compiled_logprobs_dashboard", "--port=0", "--no-browser"]
    assert environment["PYTHONSAFEPATH"] == "1" and str(REPOSITORY) in environment["PYTHONPATH"].split(":")
    assert CliRunner().invoke(app, ["dashboard", "--port", "70000"]).exit_code == 2 and len(became) == 1


@pytest.mark.parametrize(
    ("name", "release", "said"),
    [
        ("streamlit", None, "the dashboard needs streamlit, which is not installed. {} brings it."),
        ("pandas", None, "the dashboard needs pandas, which is not installed. {} brings it."),
        ("pandas", "1.9.4", "the dashboard needs pandas 2.2 or newer; 1.9.4 is installed. {} renews it."),
    ],
)
def test_without_the_extra_it_says_what_to_install(monkeypatch, became, name, release, said):
    def version(asked):
        if asked == name and release is None:
            raise metadata.PackageNotFoundError(asked)
        return release if asked == name else metadata.version(asked)

    monkeypatch.setattr(module, "version", version)
    result = CliRunner().invoke(app, ["dashboard", "--port", "0"])
    command = 'pip install "compiled-logprobs[dashboard]"'
    assert result.exit_code == 2 and became == [] and result.stderr == f"LogProbsError: {said.format(command)}\n"


def test_the_lowest_releases_are_those_of_the_extra():
    text = (REPOSITORY / "pyproject.toml").read_text()
    for name, lowest in module.NEEDED.items():
        assert f'"{name}>={".".join(map(str, lowest))}'.removesuffix(".0") in text


def test_a_busy_port_is_said(became):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = CliRunner().invoke(app, ["dashboard", "--port", str(port)])
    assert result.exit_code == 2 and became == []
    assert result.stderr.startswith(f"InputError: got port {port}, which cannot be had: Address already in use.")
    assert "Name another port, e.g. --port" in result.stderr


@pytest.mark.slow
def test_ctrl_c_ends_it_although_a_browser_stays_connected(tmp_path):
    with dashboard(tmp_path) as server, socket.create_connection(("127.0.0.1", server.port)) as stream:
        lines = ["GET /_stcore/stream HTTP/1.1", f"Host: 127.0.0.1:{server.port}", "Upgrade: websocket"]
        lines += ["Connection: Upgrade", "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==", "Sec-WebSocket-Version: 13"]
        stream.sendall("\r\n".join([*lines, "", ""]).encode())
        assert b" 101 " in stream.recv(1000)
        server.process.send_signal(signal.SIGINT)
        # 0 where whoever started the tests has SIGINT ignored, as a shell does for its background jobs.
        assert server.process.wait(LIMIT_S) in (0, -signal.SIGINT, 128 + signal.SIGINT)
    assert "Traceback" not in server.output.read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    build = "from hatchling.build import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-c", build, str(folder)]
    made = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return folder / made.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_the_wheel_holds_all_of_the_dashboard(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    files = (file for file in (REPOSITORY / "dashboard").glob("*/**/*") if "__pycache__" not in file.parts)
    wanted = {file.relative_to(REPOSITORY / "dashboard").as_posix() for file in files if file.is_file()}
    package = "compiled_logprobs_dashboard"
    assert {f"{package}/.streamlit/config.toml", f"{package}/icon.png", f"{package}/app.py"} <= wanted <= held
    assert any(name.startswith("compiled_logprobs/profiles/v1/") for name in held)


@pytest.fixture
def installed(wheel, tmp_path):
    """The command of the wheel in an empty environment, into which pip brings what the wheel asks for.

    Only torch, which can take gigabytes, is this environment's, with what it needs: linked, so that nothing beside it
    is found.
    """
    place, links = tmp_path / "environment", tmp_path / "torch"
    venv.create(place, with_pip=False)
    links.mkdir()
    names = ["torch"]
    for name in names:  # which grows by what each needs
        # Looked for in there alone: setuptools, once imported, adds a folder of its own copies to the path.
        for package in metadata.distributions(name=name, path=[sysconfig.get_path("purelib")]):
            needed = (re.match("[A-Za-z0-9._-]+", need)[0] for need in package.requires or [])
            names += [need for need in needed if need not in names]
            for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
                if not (links / top).exists():
                    (links / top).symlink_to(package.locate_file(top))
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
    python = [str(installed.parent / "python"), "-c", program]
    with dashboard(tmp_path, command=[str(installed)], cwd=tmp_path, PYTHONPATH="") as server:  # not the checkout
        environment = environment_in(tmp_path, PYTHONPATH="")
        said = subprocess.run(python, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment).stdout
        server.process.terminate()
        assert server.process.wait(LIMIT_S) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    assert str(tmp_path / "environment") in said and "['bundled']" in said
