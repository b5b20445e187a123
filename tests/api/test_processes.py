"""Programs as users start them: scripts, notebooks, standard input, ranks, children; the first call of each may
measure."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compiled_logprobs import policy
from compiled_logprobs.store import ROOT_VARIABLE

pytestmark = pytest.mark.slow
LIMIT_S = 240
"""For a program, which ends after a tenth of it; what hangs is killed."""
PROGRAM = """
import json, os, sys
import torch
import compiled_logprobs as clp
from compiled_logprobs.tuning import headway

headway.cache_folder = lambda: None  # whether or not others have measured on this machine
del sys.modules["compiled_logprobs.backends"]._targets["compiled"]  # it takes ten seconds to compile and to check
logits, labels = torch.randn(1024, 1031), torch.randint(1031, (1024,))

def call():
    # The function is right, and this is what it says of itself.
    out = clp.log_probs_from_logits(logits, labels)
    true = logits.double().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    assert (out - true).abs().max() < 1e-5, "wrong"
    explanation = clp.explain(logits, labels)
    return {"backend": explanation.backend, "source": explanation.source, "why": explanation.why}
"""
CALL = "\nprint(json.dumps(call()))\n"
MEASURES = "compiled_logprobs: measuring which backend is fastest for 1024 x 1031 float32 on cpu"
DECIDED = "serves it: "


@pytest.fixture(autouse=True)
def measuring(monkeypatch, tmp_path):
    """What a user has who sets nothing, but with a store for this test, and time enough on a busy machine."""
    monkeypatch.delenv(policy.MODE_VARIABLE)
    monkeypatch.setenv(policy.BUDGET_VARIABLE, "90")
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "store"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)  # where no profiles are, and no package lies that only tests would find


def start(*command: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that its children can be ended with it
        # As in a terminal: what a shell starts in the background ignores it, and what that starts, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen) -> tuple[list, str]:
    """What the program printed, one JSON a line, and its standard error."""
    try:
        out, errors = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, errors = process.communicate()
        pytest.fail(f"it hangs; it said: {out}\n{errors}")
    assert process.returncode == 0, errors
    return [json.loads(line) for line in out.splitlines()], errors


def script(text: str) -> str:
    path = Path("script.py")
    path.write_text(PROGRAM + text)
    return str(path)


def stored() -> list[Path]:
    return [path for path in Path("store").rglob("decisions/*.json") if not path.name.endswith(".evidence.json")]


def test_of_scripts_that_start_at_once_one_measures_and_the_next_process_not_at_all():
    """They have no guard, which the worker program does not need, and threads that all come at once."""
    path = script(
        """
import threading
results = []
threads = [threading.Thread(target=lambda: results.append(call())) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps([*results, call()]))
"""
    )
    both, errors = zip(*map(finish, [start(path) for _ in range(2)]), strict=True)
    sources = [{result["source"] for result in results} for [results] in both]
    assert {"tuned here"} in sources and {"user store"} in sources and len(stored()) == 1
    assert sum(text.count(DECIDED) for text in errors) == 1
    before = {path: path.read_bytes() for path in stored()}

    [results], said = finish(start(path))
    assert {result["source"] for result in results} == {"user store"} and "compiled_logprobs" not in said
    assert len({result["backend"] for [each] in (*both, [results]) for result in each}) == 1
    assert before == {path: path.read_bytes() for path in stored()}


SERVICE = """
import multiprocessing
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # whose children may have none of their own kind
        result = pool.apply(call)
    open("result", "w").write(json.dumps(result))
"""


def test_a_spawned_child_of_a_program_without_standard_streams_measures_as_any_process():
    """As a service starts them."""
    closed = f"{sys.executable} {script(SERVICE)} <&- >&- 2>&-"
    subprocess.run(["sh", "-c", closed], timeout=LIMIT_S, check=True)
    assert json.loads(Path("result").read_text())["source"] == "tuned here" and len(stored()) == 1


def test_a_notebook():
    pytest.importorskip("ipykernel")
    manager = pytest.importorskip("jupyter_client.manager")
    kernel, client = manager.start_new_kernel(kernel_name="python3")
    seen: dict[str, str] = {"stdout": "", "stderr": ""}

    def hear(message):
        if message["msg_type"] == "stream":
            seen[message["content"]["name"]] += message["content"]["text"]

    try:
        for cell in (PROGRAM, CALL, CALL):
            reply = client.execute_interactive(cell, timeout=LIMIT_S, output_hook=hear, allow_stdin=False)
            assert reply["content"]["status"] == "ok", reply["content"]
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
    first, second = map(json.loads, seen["stdout"].splitlines())
    assert first == second and first["source"] == "tuned here"
    assert seen["stderr"].count(MEASURES) == 1 and seen["stderr"].count(DECIDED) == 1
    assert len(stored()) == 1


FORKED = """
import multiprocessing
trained = torch.randn(64, 1031, requires_grad=True)  # the parent has used torch, its autograd and its own library
clp.log_probs_from_logits(trained, labels[:64], backend="cpp").sum().backward()

def work(_):
    torch.set_num_threads(1)
    results = clp.explain(logits, labels).why, call()
    own = logits.clone().requires_grad_()
    clp.log_probs_from_logits(own, labels).sum().backward()
    assert own.grad.isfinite().all()
    return results

def in_a_child():
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.map(work, [0])[0]

print(json.dumps([in_a_child(), call(), in_a_child()]))
"""


def test_a_forked_child_never_measures_and_takes_what_its_parent_has_measured():
    [[(why, child), parent, (next_why, next_child)]], errors = finish(start(script(FORKED)))
    assert why.endswith("nothing is measured now, because this process is a forked child of another")
    assert child["source"] == "default rule" and parent["source"] == "tuned here"
    assert next_why == "measured by this process" and next_child == parent and errors.count(MEASURES) == 1


def test_a_program_that_is_ended_while_it_measures_leaves_nothing_behind():
    process = start("-c", PROGRAM + CALL)
    assert process.stderr is not None
    assert process.stderr.readline().startswith(MEASURES)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert not stored()
