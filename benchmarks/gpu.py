"""All that a GPU has to show, in under eight minutes: `python -m benchmarks.gpu`, from a checkout, or `make gpu`.

Each step runs as programs of their own, within a limit: one that fails, hangs or crashes costs its own figures alone.
What is known is written after each step. Nothing but Python's standard library is imported here, so that what is
missing on a machine shows in the report.

Exit codes: 0 all steps passed; 1 some did not; 2 there is no place for the report; 130 interrupted.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu_page import page

ROOT = Path(__file__).parents[1]
GRACE_S = 5.0
"""Of a step's limit, what its programs have to end after an interruption, before they are killed."""
TAIL_LINES = 25
LONGEST_REASON = 300
NEEDED = {
    "torch": "torch",
    "triton": "triton",
    "filelock": "filelock",
    "msgspec": "msgspec",
    "platformdirs": "platformdirs",
    "psutil": "psutil",
    "pynvml": "nvidia-ml-py",
    "pytest": "pytest",
    "rich": "rich",
    "typer": "typer",
}
"""What the steps import, and the package that has it."""
PEERS = {
    "flash_attn": "flash-attn",
    "liger_kernel": "liger-kernel",
    "quack": "quack-kernels",
    "trl": "trl",
    "cut_cross_entropy": "cut-cross-entropy",
}
"""What they time beside this library, where it is installed."""
TIMED = ("log_softmax", "liger", "quack", "trl", "cut_cross_entropy")
"""Candidates of `benchmarks.peers`. Of torch.compile each shape is compiled anew, for which there is no time."""
PYTEST = ("pytest", "tests/gpu", "-q", "-rs", "-p", "no:cacheprovider")
WRITTEN = ("report.md", "report.json", "tests-small.xml", "tests-large.xml", "peers.json")
INTERRUPTED = 130


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    limits_s: dict[str, int]
    """Of the steps, together below eight minutes."""
    profile: str
    """Arguments of `compiled-logprobs profile`."""
    peers: str
    """Arguments of `benchmarks.peers`; the most telling shape first, since what the limit cuts off is lost."""
    checked: tuple[str, ...] = ()
    """Backends; none are all."""


FULL = Sizes(
    {"machine": 30, "ceilings": 20, "tests": 100, "check": 60, "profile": 150, "peers": 110},
    "--preset rl --vocab 151936 --dtype bfloat16 --budget 6",
    "--shape 8192x151936,1024x151936,16384x151936 --dtype bfloat16 --mode forward,backward,entropy,inplace --seconds 1",
)
SMALL = Sizes(
    dict.fromkeys(FULL.limits_s, 400),
    "--preset rl --vocab 257 --rows 4 --mode forward --layout flat --temperature none --backend eager --budget 1",
    "--shape 4x257 --dtype bfloat16 --mode backward --rounds 6 --seconds 0",
    ("eager", "flash_attn"),
)
"""A rehearsal on the CPU: every line of the steps, on little."""


@dataclass
class Program:
    """One program of a step, and what came of it."""

    arguments: list[str]
    """After the interpreter."""
    outcome: str = "not run"
    """passed, failed, could not run, timed out, crashed, interrupted, or not run."""
    reason: str = ""
    exit_code: int | None = None
    figures: Any = None
    tail: str = ""
    """The end of what it said, where it did not pass."""


@dataclass
class Step:
    """Programs that run at the same time."""

    name: str
    limit_s: int
    programs: dict[str, Program]
    read: Callable[[Path], Any]
    """Finds a program's figures in what it printed, or in the file beside it."""
    seconds: float = 0.0
    reason: str = ""
    """Why it was not run."""

    @property
    def outcome(self) -> str:
        """The worst of its programs'; a backend that cannot run here has done nothing wrong."""
        outcomes = [one.outcome for one in self.programs.values()]
        if self.name == "check" and "passed" in outcomes:
            outcomes = [one for one in outcomes if one != "could not run"]
        worst = ("interrupted", "crashed", "timed out", "failed", "could not run", "not run")
        return next((outcome for outcome in worst if outcome in outcomes), "passed")

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        programs = {name: asdict(program) for name, program in self.programs.items()}
        plain = {name: getattr(self, name) for name in ("name", "outcome", "reason", "seconds", "limit_s")}
        return {**plain, "programs": programs}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps, and write the report after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of report.md and report.json")
    parser.add_argument("--profiles", type=Path, default=ROOT / "profiles", help="folder that the profile is stored in")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses it with small sizes")
    options = parser.parse_args(arguments)
    out, profiles, began = options.out.resolve(), options.profiles.resolve(), time.monotonic()
    for option, folder in (("--out", out), ("--profiles", profiles)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            parser.error(f"got {option} {folder}, in which nothing can be written: {error}. Name another folder.")
    for name in WRITTEN:
        (out / name).unlink(missing_ok=True)  # that of an earlier run
    shutil.rmtree(out / "profiles", ignore_errors=True)
    report: dict[str, Any] = {
        "schema": 1,
        "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": options.device,
        "python": sys.version.split()[0],
        "versions": {name: _version(module, name) for module, name in {**NEEDED, **PEERS}.items()},
        "interrupted": False,
    }
    done: list[Step] = []
    for step in steps(options.device, FULL if options.device == "cuda" else SMALL, out, profiles):
        _say(f"{step.name}, {step.limit_s} s at most")
        try:
            _run(step, out, options.device)
        except KeyboardInterrupt:  # another one, while its programs were being ended
            report["interrupted"] = True
        done.append(step)
        report["interrupted"] |= any(one.outcome == "interrupted" for one in step.programs.values())
        report["seconds"] = time.monotonic() - began
        report["steps"] = [one.to_dict() for one in done]
        _write(out, report)
        reasons = [step.reason, *(one.reason for one in step.programs.values())]
        _say(f"{step.name}: {step.outcome}, {step.seconds:.0f} s. {next(filter(None, reasons), '')}".rstrip())
        if report["interrupted"]:
            return INTERRUPTED
    _say(f"wrote {out / 'report.md'} and report.json: send both")
    return 0 if all(step.outcome == "passed" for step in done) else 1


def steps(device: str, sizes: Sizes, out: Path, profiles: Path) -> Iterator[Step]:
    """The steps in their order, each made when the one before is done."""

    def step(name: str, read: Callable[[Path], Any], **programs: list[str]) -> Step:
        return Step(name, sizes.limits_s[name], {each: Program(list(given)) for each, given in programs.items()}, read)

    cli = ["-m", "compiled_logprobs"]
    machine = step("machine", _printed, doctor=[*cli, "doctor", "--json"])
    yield machine
    doctor = machine.programs["doctor"].figures or {}
    names = sizes.checked or tuple(dict.fromkeys(row["name"] for row in doctor.get("backends", ())))
    check = [*cli, "check", "--json", "--device", device]
    large, peers = "peak or 32_bits", out / "peers.json"
    tests = {
        name: ["-m", *PYTEST, "-k", which, f"--junitxml={out / f'tests-{name}.xml'}"]
        for name, which in {"small": f"not ({large})", "large": large}.items()
    }
    profile = ["profile", *sizes.profile.split(), "--json", "--progress", "none", "--device", device]
    profile += ["--out", str(out / "profiles")]
    timed = ["benchmarks.peers", *sizes.peers.split(), "--no-tune", "--device", device, "--json", str(peers)]
    timed += ["--only", ",".join(("auto", *names, *TIMED))]
    later = [
        step("ceilings", _printed, ceilings=["-m", "benchmarks.ceilings", device]),
        step("tests", _tests, **tests),  # a fault of the device ends all that a program does there
        step("check", _printed, **({name: [*check, name] for name in names} or {"all": check})),
        step("profile", partial(_profiled, out / "profiles", profiles), profile=[*cli, *profile]),
        step("peers", lambda printed: _timed(peers), peers=["-m", *timed]),
    ]
    types = [row["device_type"] for row in doctor.get("environments", ())]
    for one in later:
        if doctor and device not in types:
            one.reason = "torch sees no GPU here; --device cpu rehearses the steps"
        yield one


def _run(step: Step, out: Path, device: str) -> None:
    """Run the programs of a step, all at once; at the limit they are interrupted as by Ctrl-C, and then killed."""
    if step.reason:
        return
    began = time.monotonic()
    here = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    if device == "cpu":
        here["CUDA_VISIBLE_DEVICES"] = ""
    running: dict[str, subprocess.Popen[bytes]] = {}

    def wait(names: set[str], end: float) -> set[str]:
        """Returns those that have not ended by then."""
        for name in names:
            with contextlib.suppress(subprocess.TimeoutExpired):
                running[name].wait(max(0.0, end - time.monotonic()))
        return {name for name in names if running[name].poll() is None}

    is_interrupted, late = False, set[str]()
    try:
        for name, program in step.programs.items():
            with (out / f"{step.name}-{name}.out").open("wb") as printed, _said(step, name, out).open("wb") as said:
                running[name] = subprocess.Popen(
                    [sys.executable, *program.arguments],
                    cwd=ROOT,
                    env={**os.environ, **here},
                    stdin=subprocess.DEVNULL,
                    stdout=printed,
                    stderr=said,
                    start_new_session=True,  # so that a signal reaches what it starts, and no Ctrl-C does
                )
        late = wait(set(running), began + step.limit_s - GRACE_S)
    except KeyboardInterrupt:
        is_interrupted, late = True, wait(set(running), 0.0)
    except OSError as error:  # there is no memory, or no room, for another program
        step.reason = f"a program could not be started: {error}"
        late = wait(set(running), 0.0)
    for which, patience_s in ((signal.SIGINT, GRACE_S - 1), (signal.SIGKILL, 1)):
        for name in wait(late, 0.0):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running[name].pid, which)
        wait(late, time.monotonic() + patience_s)
    for name, program in step.programs.items():
        program.outcome = "interrupted" if is_interrupted else program.outcome
        if name not in running:
            continue
        program.exit_code = running[name].returncode
        with contextlib.suppress(OSError, ValueError, LookupError, ElementTree.ParseError):
            program.figures = step.read(out / f"{step.name}-{name}.out")
        text = _said(step, name, out).read_text(encoding="utf-8", errors="replace")
        if not is_interrupted:
            program.outcome = "timed out" if name in late else _outcome(program, text)
        if program.outcome != "passed":
            if not text.strip() and program.figures is None:
                text = (out / f"{step.name}-{name}.out").read_text(encoding="utf-8", errors="replace")
            program.tail = "\n".join(text.rstrip().splitlines()[-TAIL_LINES:])
            program.reason = _reason(program, text) if name not in late else f"ended at its limit of {step.limit_s} s"
    step.seconds = time.monotonic() - began


def _said(step: Step, name: str, out: Path) -> Path:
    return out / f"{step.name}-{name}.err"


def _outcome(program: Program, said: str) -> str:
    code = program.exit_code or 0
    if code <= 0:
        return "crashed" if code else "passed"
    return "could not run" if program.figures is None and (code == 2 or _missing(said)) else "failed"


def _reason(program: Program, said: str) -> str:
    """In one line, what is wrong."""
    if program.outcome == "could not run" and (missing := _missing(said)):
        absent = [name for module, name in NEEDED.items() if module == missing or _version(module, name) is None]
        return f"{missing} is not installed: pip install {' '.join(absent) or missing}"
    if program.outcome == "crashed":
        return f"signal {-(program.exit_code or 0)}"
    failed = program.figures.get("failed") if isinstance(program.figures, dict) else None
    if failed:
        first = next(iter(failed))
        return f"{len(failed)} failed, the first: {first}" + (f": {failed[first]}" if isinstance(failed, dict) else "")
    lines = [line.strip() for line in program.tail.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"\w*(Error|Unavailable)\b", line)]
    return next(iter(errors or lines[-1:]), "")[:LONGEST_REASON]


def _missing(said: str) -> str | None:
    """The module that a program ended for want of."""
    found = re.findall(r"No module named '?(\w+)", said[-2000:])
    return found[-1] if found else None


def _printed(file: Path) -> Any:
    """The JSON in a file; of lists of checks only those that did not pass."""

    def shorter(found: dict[str, Any]) -> dict[str, Any]:
        checks = found.get("checks")
        return found if checks is None else found | {"checks": [check for check in checks if not check["passed"]]}

    return json.loads(file.read_text(encoding="utf-8"), object_hook=shorter)


def _tests(printed: Path) -> dict[str, Any]:
    """Of pytest's XML: how many passed, and what was said of the others."""
    cases = list(ElementTree.parse(printed.with_suffix(".xml")).iter("testcase"))
    said: dict[str, dict[str, str]] = {"failed": {}, "skipped": {}}
    for case in cases:
        for kind, tags in {"failed": ("failure", "error"), "skipped": ("skipped",)}.items():
            for found in (each for tag in tags for each in case.iter(tag)):
                said[kind][case.get("name", "")] = found.get("message", "")[:500]
    recorded = {each.get("name", ""): each.get("value", "") for case in cases for each in case.iter("property")}
    return {"passed": len(cases) - len(said["failed"]) - len(said["skipped"]), **said, "recorded": recorded}


def _profiled(measured: Path, profiles: Path, printed: Path) -> Any:
    """What `profile` printed. What it measured goes over what an earlier run did, which it does not look at: it would
    give three times as long to what that left undecided."""
    if measured.is_dir():
        shutil.copytree(measured, profiles, dirs_exist_ok=True)
    return _printed(printed)


def _timed(file: Path) -> dict[str, Any]:
    """Of `benchmarks.peers`, with those of this library that failed."""
    found: dict[str, Any] = _printed(file)
    failed = {
        f"{row['candidate']}, {row['mode']}, {row['rows']} rows": f"{row['outcome']}: {row['reason']}"
        for row in found["rows"]
        if row["kind"] == "ours" and row["outcome"] not in ("measured", "unavailable")
    }
    return found | {"failed": failed}


def _write(out: Path, report: dict[str, Any]) -> None:
    """Both files, without this machine's paths."""
    text = json.dumps(report, indent=2)
    for path, name in ((ROOT, "."), (Path(sys.prefix), "python"), (Path(os.path.expanduser("~")), "~")):
        if path != Path(path.anchor):
            text = text.replace(json.dumps(str(path))[1:-1], name)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    try:
        shown = page(json.loads(text))
    except Exception as error:  # noqa: BLE001 - what the page does not expect costs the page, and no later step
        shown = f"The page could not be made ({type(error).__name__}: {error}); report.json has all.\n"
    (out / "report.md").write_text(shown, encoding="utf-8")


def _version(module: str, package: str) -> str | None:
    """None where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown" if importlib.util.find_spec(module) else None


def _commit() -> str | None:
    ask = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return None


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    for which in (signal.SIGINT, signal.SIGTERM):  # as Ctrl-C also where it is ignored, as in the background of a shell
        signal.signal(which, signal.default_int_handler)
    sys.exit(main())
