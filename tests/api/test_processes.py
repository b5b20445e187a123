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

logits, labels = torch.randn(1024, 1031), torch.randint(1031, (1024,))

def call():
    # The function is right, and this is what it says of itself.
    out = clp.log_probs_from_logits(logits, labels)
    true = logits.double().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    assert (out - true).abs().max() < 1e-5, "wrong"
    found = clp.explain(logits, labels)
    return {"backend": found.backend, "source": found.source, "why": found.why}
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


def start(*command: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that its children can be ended with it
        # As in a terminal: what a shell starts in the background ignores it, and what that starts, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def finish(process: subprocess.Popen, text: str | None = None) -> tuple[list, str]:
    """What the program printed, one JSON a line, and its standard error."""
    try:
        out, errors = process.communicate(text, timeout=LIMIT_S)
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


def test_a_script_without_a_guard_measures_once_and_the_next_process_not_at_all():
    """Its threads come at once; and the worker program never runs the script."""
    path = script(
        """
import threading
print(json.dumps("begun"))
results = []
threads = [threading.Thread(target=lambda: results.append(call())) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps([*results, call()]))
"""
    )
    (begun, results), errors = finish(start(path))
    assert begun == "begun" and [result["source"] for result in results] == ["tuned here"] * 5
    assert errors.count(MEASURES) == 1 and errors.count(DECIDED) == 1 and len(stored()) == 1
    before = {path: path.read_bytes() for path in stored()}

    (_, again), errors = finish(start(path))
    assert [result["source"] for result in again] == ["user store"] * 5
    assert again[0]["backend"] == results[0]["backend"]
    assert "compiled_logprobs" not in errors and before == {path: path.read_bytes() for path in stored()}


def test_a_program_without_standard_streams():
    """As a service starts them."""
    path = script("\nopen('result', 'w').write(json.dumps(call()))\n")
    closed = f"{sys.executable} {path} <&- >&- 2>&-"
    process = subprocess.Popen(["sh", "-c", closed], start_new_session=True)
    try:
        assert process.wait(LIMIT_S) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("it hangs")
    assert json.loads(Path("result").read_text())["source"] == "tuned here"


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


RANK = """
import torch.distributed as dist
before = call()  # a rank is one before it has joined the group
dist.init_process_group("gloo")
logits, labels = torch.randn(1030, 1031), torch.randint(1031, (1030,))  # of another bucket
after = call()
dist.barrier()
open(f"rank{dist.get_rank()}", "w").write(json.dumps([before, after]))
dist.destroy_process_group()
"""


def test_ranks_never_measure_by_themselves():
    path = script(RANK)
    _, errors = finish(start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", path))
    assert MEASURES not in errors and not stored()
    for rank in range(2):
        for result in json.loads(Path(f"rank{rank}").read_text()):
            assert result["backend"] == "cpp" and result["source"] == "default rule"


FORK = """
trained = torch.randn(64, 1031, requires_grad=True)  # the parent has used torch, its autograd and its own library
clp.log_probs_from_logits(trained, labels[:64], backend="cpp").sum().backward()
"""
FORKED_BY_HAND = """
sys.stdout.flush()
pid = os.fork()
if pid == 0:
    code = 1
    try:
        torch.set_num_threads(1)
        print(json.dumps([clp.explain(logits, labels).why, call()]), flush=True)
        own = logits.clone().requires_grad_()
        clp.log_probs_from_logits(own, labels).sum().backward()
        assert own.grad.isfinite().all()
        code = 0
    finally:
        os._exit(code)
assert os.waitpid(pid, 0)[1] == 0
"""
FORKED_BY_A_POOL = """
import multiprocessing
def work(_):
    return clp.explain(logits, labels).why, call()
with multiprocessing.get_context("fork").Pool(1) as pool:
    [result] = pool.map(work, [0])
print(json.dumps(result))
"""


def test_a_child_of_a_pool_never_measures():
    [(why, result)], errors = finish(start(script(FORK + FORKED_BY_A_POOL)))
    assert why.endswith("nothing is measured now, because this process is a forked child of another")
    assert result["source"] == "default rule" and MEASURES not in errors and not stored()


def test_a_parent_measures_after_its_child_did_not_and_the_next_child_takes_that():
    path = script(FORKED_BY_HAND + CALL + FORKED_BY_HAND)
    (child, parent, (why, next_child)), errors = finish(start(path))
    assert child[1]["source"] == "default rule" and parent["source"] == "tuned here"
    assert why == "measured by this process" and next_child == parent and errors.count(MEASURES) == 1


SPAWNED = """
import multiprocessing
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # whose children may have none of their own kind
        print(json.dumps(pool.apply(call)))
"""


def test_a_spawned_child_measures_as_any_process():
    [result], errors = finish(start(script(SPAWNED)))
    assert result["source"] == "tuned here" and errors.count(MEASURES) == 1
    assert len(stored()) == 1


def test_of_two_processes_that_start_at_once_one_measures():
    path = script(CALL)
    both = [start(path) for _ in range(2)]
    results, errors = zip(*map(finish, both), strict=True)
    assert sorted(result["source"] for [result] in results) == ["tuned here", "user store"]
    assert len({result["backend"] for [result] in results}) == 1
    assert sum(text.count(DECIDED) for text in errors) == 1 and len(stored()) == 1


def test_a_program_that_is_ended_while_it_measures_leaves_nothing_behind():
    process = start("-c", PROGRAM + CALL)
    assert process.stderr is not None
    assert process.stderr.readline().startswith(MEASURES)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert not stored()
