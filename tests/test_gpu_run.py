"""`make gpu` on a machine without one: all of its steps, on little, and what becomes of those that go wrong."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu_page import page

SMALL_MACHINE = Path(__file__).parent / "helpers" / "small_machine"

LASTS = """
import os, sys, time

if "compiled_logprobs" in sys.orig_argv:
    print("begun", flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        os._exit(7)
"""
"""On the import path of a program, this has it last until it is interrupted."""


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Runs steps of programs `python -c ...`; returns the exit code, the report and the page."""

    def run(programs, *, limit_s=60, device="cpu"):
        def made(*_):
            for name, codes in programs.items():
                each = {key: gpu.Program(["-c", code]) for key, code in codes.items()}
                yield gpu.Step(name, limit_s, each, gpu._printed)

        monkeypatch.setattr(gpu, "steps", made)
        code = gpu.main(["--device", device, "--out", str(tmp_path / "out")])
        return code, *(tmp_path.joinpath("out", name).read_text() for name in ("report.json", "report.md"))

    return run


@pytest.mark.slow
def test_every_step_runs_on_the_cpu(tmp_path, monkeypatch):
    """The tests for a GPU are among them: what failed there is told by the report."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SMALL_MACHINE), os.environ.get("PYTHONPATH", "")]))
    out, profiles = tmp_path / "out", tmp_path / "profiles"
    code = gpu.main(["--device", "cpu", "--out", str(out), "--profiles", str(profiles)])
    text = (out / "report.md").read_text()
    report = json.loads((out / "report.json").read_text())
    assert {step["name"]: step["outcome"] for step in report["steps"]} == dict.fromkeys(gpu.FULL.limits_s, "passed"), (
        text
    )
    assert code == 0
    programs = {name: one for step in report["steps"] for name, one in step["programs"].items()}
    assert programs["doctor"]["figures"]["environments"] and programs["ceilings"]["figures"]["bandwidth"]["copy"] > 0
    small, large = programs["small"]["figures"], programs["large"]["figures"]
    assert small["passed"] > 30 and large["passed"] > 5 and not small["failed"] | large["failed"]
    assert "eager, inplace, cold, x the logits" in large["recorded"]
    assert programs["eager"]["figures"]["reports"][0]["passed"]
    assert programs["flash_attn"]["outcome"] == "could not run" and "CUDA" in programs["flash_attn"]["reason"]
    assert programs["profile"]["figures"]["decisions"] and list(profiles.rglob("decisions/*.json"))
    rows = {row["candidate"]: row for row in programs["peers"]["figures"]["rows"]}
    assert rows["eager"]["percent_of_copy"] > 0 and rows["liger"]["outcome"] == "unavailable"
    titles = ["Machine", "Ceilings", "Tests", "Check", "Profile", "Beside the peers", "What NVML saw"]
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")][: len(titles)] == titles
    assert str(Path.home()) not in text and str(gpu.ROOT) not in text


@pytest.mark.slow
def test_a_step_that_goes_wrong_costs_only_itself(ran):
    hangs = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('alive', flush=True); time.sleep(60)"
    )
    stops = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('{\"done\": 3}')"
    began = time.monotonic()
    code, report, text = ran(
        {
            "hangs": {"a": hangs, "b": stops},
            "crashes": {"a": "import os; os.kill(os.getpid(), 11)"},
            "lacks": {"a": "import no_such_package"},
            "fails": {"a": "import sys; print('{}'); sys.exit('ValueError: it is | done')"},
            "counts": {"a": 'print(\'{"failed": ["one", "two"]}\'); raise SystemExit(2)'},
            "check": {"a": "print('{\"reports\": []}')", "b": "import sys; sys.exit(2)"},
        },
        limit_s=gpu.GRACE_S + 1,
    )
    assert code == 1 and time.monotonic() - began < 40
    found = {step["name"]: step for step in json.loads(report)["steps"]}
    assert {name: step["outcome"] for name, step in found.items()} == {
        "hangs": "timed out",
        "crashes": "crashed",
        "lacks": "could not run",
        "fails": "failed",
        "counts": "failed",
        "check": "passed",
    }
    assert found["hangs"]["programs"]["b"]["figures"] == {"done": 3}  # what it tells when it is interrupted
    assert found["crashes"]["programs"]["a"]["reason"] == "signal 11"
    assert "no_such_package is not installed: pip install no_such_package" in text
    assert found["counts"]["programs"]["a"]["reason"] == "2 failed, the first: one"
    assert "| fails | failed | 0 |" in text and "ValueError: it is \\| done" in text


@pytest.mark.slow
def test_interrupted_it_ends_its_programs_and_writes_what_it_has(ran, monkeypatch):
    wait = gpu.subprocess.Popen.wait

    def interrupted(process, timeout=None):
        if "-c" in process.args and timeout > gpu.GRACE_S:
            raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr(gpu.subprocess.Popen, "wait", interrupted)
    code, report, text = ran({"long": {"a": "import time; time.sleep(60)"}, "later": {"a": "print(1)"}})
    assert code == gpu.INTERRUPTED and json.loads(report)["interrupted"]
    assert "| long | interrupted |" in text and "later" not in text


@pytest.mark.slow
def test_a_signal_to_end_it_ends_its_programs_too(tmp_path):
    """Also where it was started with Ctrl-C ignored, as a shell starts what is to run in the background."""
    (tmp_path / "sitecustomize.py").write_text(LASTS)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--out", str(out)]
    process = subprocess.Popen(
        ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *command],
        cwd=gpu.ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    printed, end = out / "machine-doctor.out", time.monotonic() + 60
    while not (printed.is_file() and printed.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == gpu.INTERRUPTED
    report = json.loads((out / "report.json").read_text())
    assert report["interrupted"] and report["steps"][0]["programs"]["doctor"]["exit_code"] == 7


def test_a_second_interruption_ends_it_and_a_page_that_fails_costs_no_step(ran, monkeypatch):
    def interrupted(step, out, device):
        if step.name == "second":
            raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "_run", interrupted)
    monkeypatch.setattr(gpu, "page", lambda report: report["no such key"])
    code, report, text = ran({name: {"a": ""} for name in ("first", "second", "third")})
    assert code == gpu.INTERRUPTED and [step["name"] for step in json.loads(report)["steps"]] == ["first", "second"]
    assert text == "The page could not be made (KeyError: 'no such key'); report.json has all.\n"


def test_a_program_that_cannot_be_started_costs_its_step_alone(ran, monkeypatch):
    def refused(*_, **__):
        raise OSError("no memory")

    monkeypatch.setattr(gpu.subprocess, "Popen", refused)
    code, report, text = ran({"first": {"a": ""}, "second": {"a": ""}})
    assert code == 1 and [step["outcome"] for step in json.loads(report)["steps"]] == ["not run"] * 2
    assert "a program could not be started: no memory" in text


@pytest.mark.parametrize("option", ["--out", "--profiles"])
def test_a_folder_that_cannot_be_written_is_an_error_that_says_so(tmp_path, capsys, option):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as raised:
        gpu.main(["--device", "cpu", "--out", str(tmp_path / "out"), option, str(tmp_path / "file")])
    said = capsys.readouterr().err
    assert raised.value.code == 2 and "file, in which nothing can be written" in said and "Name another folder" in said


def test_without_a_gpu_only_the_machine_is_told_of(tmp_path, monkeypatch):
    doctor = {"environments": [{"device_type": "cpu", "gpu_name": None}], "backends": []}

    def run(step, out, device):
        assert step.name == "machine" or step.reason
        if step.name == "machine":
            step.programs["doctor"].outcome, step.programs["doctor"].figures = "passed", doctor

    monkeypatch.setattr(gpu, "_run", run)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [step["outcome"] for step in report["steps"]] == ["passed", *["not run"] * 5]
    assert "torch sees no GPU here" in (tmp_path / "report.md").read_text()


def test_the_limits_are_below_eight_minutes_and_each_step_has_one():
    assert sum(gpu.FULL.limits_s.values()) <= 470
    steps = list(gpu.steps("cuda", gpu.FULL, Path("out"), Path("profiles")))
    assert [step.name for step in steps] == list(gpu.FULL.limits_s)
    assert steps[3].programs["all"].arguments[-4:] == ["check", "--json", "--device", "cuda"]  # backends are not known


def test_a_candidate_of_ours_that_fails_beside_the_peers_is_the_reason(tmp_path):
    rows = [
        {"candidate": "triton", "kind": "ours", "mode": "backward", "rows": 8192, "outcome": "oom", "reason": "full"},
        {"candidate": "flash_attn", "kind": "ours", "mode": "entropy", "rows": 8192, "outcome": "unavailable"},
        {"candidate": "liger", "kind": "peer", "mode": "backward", "rows": 8192, "outcome": "wrong", "reason": "sign"},
    ]
    (tmp_path / "peers.json").write_text(json.dumps({"rows": rows}))
    figures = gpu._timed(tmp_path / "peers.json")
    reason = gpu._reason(gpu.Program([], "failed", figures=figures), "")
    assert reason == "1 failed, the first: triton, backward, 8192 rows: oom: full"


def test_a_second_profile_goes_over_the_first_and_beside_others(tmp_path):
    measured, profiles = tmp_path / "out" / "profiles", tmp_path / "profiles"
    for folder, text in ((profiles, "first"), (measured, "second")):
        (folder / "v1" / "a").mkdir(parents=True)
        (folder / "v1" / "a" / "one.json").write_text(text)
    (profiles / "v1" / "a" / "other.json").write_text("first")
    (tmp_path / "printed").write_text('{"decisions": []}')
    (step,) = (step for step in gpu.steps("cuda", gpu.FULL, tmp_path / "out", profiles) if step.name == "profile")
    assert step.programs["profile"].arguments[-1] == str(measured)
    assert step.read(tmp_path / "printed") == {"decisions": []}
    assert {file.name: file.read_text() for file in profiles.rglob("*.json")} == {
        "one.json": "second",
        "other.json": "first",
    }


def test_the_page_of_a_run_on_a_gpu():
    """What a CPU's report has nothing of."""
    seen = {"sm_clock_min_mhz": 1200, "sm_clock_median_mhz": 1980.0, "sm_clock_max_mhz": 1980}
    seen |= {"memory_used_max_bytes": 2**30, "throttle_reasons": ["power cap"]}
    ceilings = {"bandwidth": {"read": 4.1e12, "copy": 4.2e12}, "telemetry": seen, "telemetry_reason": None}
    small = {"passed": 40, "failed": {"test_graph[triton]": "not equal"}, "skipped": {"a": "one"}, "recorded": {}}
    large = {"passed": 3, "failed": {}, "skipped": {"b": "one"}, "recorded": {"eager, warm": 0.02}}
    programs = {
        step: {
            name: {"figures": figures, "outcome": "passed", "reason": "", "tail": ""} for name, figures in ran.items()
        }
        for step, ran in {"ceilings": {"ceilings": ceilings}, "tests": {"small": small, "large": large}}.items()
    }
    report = {
        "began": "2026-12-01T12:00:00+00:00",
        "seconds": 300.0,
        "commit": "abc1234",
        "device": "cuda",
        "steps": [
            {
                "name": name,
                "outcome": "passed",
                "seconds": 3.2,
                "limit_s": 20,
                "reason": "",
                "programs": each,
            }
            for name, each in programs.items()
        ],
        "versions": {"torch": "2.11.0", "triton": None},
        "python": sys.version.split()[0],
    }
    text = page(report)
    for line in (
        "| read | 4100 |",
        "43 passed, 1 failed, 2 skipped.",
        "| eager, warm | 0.02 |",
        "| test_graph[triton] | not equal |",
        "| 2 | one |",
        "| ceilings | 1200 | 1980 | 1980 | 1073741824 | power cap |  |",
        "| installed | torch 2.11.0 |",
    ):
        assert line in text, text
