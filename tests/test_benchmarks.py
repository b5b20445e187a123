"""The benchmark beside the idioms: they are right, what is printed holds together, and failures are no numbers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import chart, hidden, idioms, noise, overhead, peers
from benchmarks import measure as measurement
from benchmarks.candidates import AUTO, COMPILE, Contender, candidates
from benchmarks.measure import measure
from benchmarks.results import COLUMNS, Cell, Result
from benchmarks.targets import targets
from compiled_logprobs import backends
from compiled_logprobs.backends import get_backend
from compiled_logprobs.errors import LogProbsError
from compiled_logprobs.machine import clock
from compiled_logprobs.machine.bandwidth import Bandwidth, minimum_bytes
from compiled_logprobs.operation.reference import reference
from compiled_logprobs.problem import Problem, as_it_lies

PLAIN = {
    "log_softmax": idioms.log_softmax_gather,
    "logsumexp_rows": idioms.logsumexp_by_row,
    "logsumexp_chunks": idioms.logsumexp_by_chunk,
    "cross_entropy": idioms.cross_entropy,
}
CPU = torch.device("cpu")
QUICK = ["--shape", "33x257", "--no-tune", "--rounds", "6", "--device", "cpu"]
TINY = ["--shape", "8x16", "--rounds", "2", "--device", "cpu", "--dtype", "float32", "--mode"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No time here means anything, and emptying the cache and collecting garbage before each call take most of it."""
    monkeypatch.setattr(clock, "flush_cache", lambda device: None)
    monkeypatch.setattr(clock.gc, "collect", lambda *generation: 0)
    monkeypatch.setattr(measurement, "measured_bandwidth", lambda device: Bandwidth(1e9, 1e9, 1e9, 2**20))


def problem_of(mode, dtype=torch.float32, rows=33, vocab=257):
    return as_it_lies(Problem("cpu", rows, vocab, dtype, **peers.KINDS[mode]))


def run(*arguments):
    return CliRunner().invoke(peers.app, [*arguments])


@pytest.mark.parametrize("name", [*PLAIN, pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_idiom_computes_log_probabilities_entropy_and_gradient(name, dtype):
    idiom = PLAIN[name] if name in PLAIN else idioms.compiled_log_softmax(problem_of("backward"))
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(9, 129, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(129, (9,), generator=generator)
    upstream = torch.rand(9, generator=generator) + 0.5
    true = reference(logits, labels.unsqueeze(-1), grad_log_probs=upstream.unsqueeze(-1))
    assert (true.log_probs < -0.1).any()

    log_probs, entropy = idiom(logits, labels, True)
    (gradient,) = torch.autograd.grad(log_probs, logits, upstream.to(log_probs.dtype))

    exact = {"rtol": 1e-5, "atol": 1e-5}
    in_16_bits = dtype == torch.bfloat16 and name == "logsumexp_rows"  # as verl and TRL leave it
    limits = {"rtol": 2e-2, "atol": 2e-1} if in_16_bits else exact
    torch.testing.assert_close(log_probs.double(), true.log_probs.squeeze(-1), **limits)
    torch.testing.assert_close(entropy.double(), true.entropy, **limits)
    limits = {"rtol": 5e-2, "atol": 5e-3} if dtype == torch.bfloat16 else exact
    torch.testing.assert_close(gradient.double(), true.gradient, **limits)
    assert gradient.dtype == dtype
    alone, none = idiom(logits.detach(), labels, False)
    assert none is None
    torch.testing.assert_close(alone, log_probs.detach())


@pytest.mark.slow
def test_every_mode_gives_all_figures_as_json_and_html(tmp_path):
    files = tmp_path / "new" / "peers.json", tmp_path / "new" / "peers.html"
    only = ["auto", *PLAIN, "liger"]
    ran = run(*QUICK, "--only", ",".join(only), "--json", str(files[0]), "--html", str(files[1]))
    assert ran.exit_code == 0, ran.output
    report = json.loads(files[0].read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert report["columns"] == COLUMNS and not report["interrupted"]
    cells = {(row["dtype"], row["mode"]) for row in report["rows"]}
    assert cells == {(dtype, mode) for dtype in ("float32", "bfloat16") for mode in peers.KINDS}
    assert len(report["rows"]) == len(cells) * (1 + len(only))
    for row in report["rows"]:
        if row["candidate"] == "liger":
            assert row["outcome"] == "unavailable" and "CUDA" in row["reason"] and "ms" not in row
            continue
        assert row["outcome"] == "measured" and len(row["seconds"]) == 6
        assert row["billions_of_logits_per_s"] == pytest.approx(33 * 257 / row["ms"] / 1e6)
        if row["candidate"] == "amax":
            assert row["percent_of_read"] == 100
            continue
        assert row["host_ms"] == row["ms"]  # on a CPU
        moved = minimum_bytes(problem_of(row["mode"], getattr(torch, row["dtype"])))
        assert row["percent_of_copy"] == pytest.approx(100 * moved / 1e9 / (row["ms"] / 1e3))
        assert row["error_rmse"] <= row["error_max"] < (0.2 if row["candidate"] == "logsumexp_rows" else 1e-4)
        assert row["times_as_fast_as"].keys() == {*PLAIN} - {row["candidate"]}
        is_peer = row["candidate"] in PLAIN
        assert row["kind"] == ("peer" if is_peer else "ours")
        assert (row["note"] == "ordinary backward") == (is_peer and row["mode"] == "inplace")
    assert "of a bare read" in files[1].read_text()
    for text in ("33 x 257", "auto (took ", "log_softmax (ordinary backward)", "% of read", "Targets"):
        assert text in ran.output
    assert "liger: unavailable: its kernels need a CUDA or ROCm device" in ran.output


def test_it_prints_nothing_but_json_where_that_is_asked_for():
    ran = run(*TINY, "forward", "--no-tune", "--json", "-", "--only", "eager", "--only", "log_softmax")
    rows = json.loads(ran.stdout)["rows"]
    assert [row["candidate"] for row in rows] == ["amax", "eager", "log_softmax"]
    ratio = rows[1]["times_as_fast_as"]["log_softmax"]  # two rounds give no interval
    assert ratio["low"] is None and ratio["median"] > 0 and ratio["high"] is None


def test_the_benchmark_from_hidden_states_has_all_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(hidden, "flush_cache", lambda device: None)  # which takes longer than the calls
    file = tmp_path / "new" / "hidden.json"
    asked = ["--rows", "70", "--hidden", "16", "--vocab", "2000", "--rounds", "2", "--no-tune", "--json", str(file)]
    ran = CliRunner().invoke(hidden.app, [*asked, "--dtype", "float32"])
    assert ran.exit_code == 0, ran.output
    figures = json.loads(file.read_text())["figures"]
    of: dict[str, dict[str, dict]] = {}
    for figure in figures:
        of.setdefault(figure["what"], {})[figure["name"]] = figure
    whats = ["forward + backward", "within 32 MiB", "forward alone", "half of the rows ignored", "memory"]
    assert list(of) == whats and {"auto", "auto, off", "log_softmax", "chunked_vocab"} <= of["within 32 MiB"].keys()
    assert {figure["limit"] for figure in of["forward + backward"].values()} == {None, hidden.BESIDE}
    assert of["forward alone"]["chunked_64"]["against"] == hidden.PRODUCT
    assert of["half of the rows ignored"]["auto, half ignored"]["limit"] == 0.6


def test_the_overhead_of_small_calls_has_all_figures(tmp_path):
    file = tmp_path / "new" / "overhead.json"
    asked = ["--shape", "8x16", "--rounds", "2", "--only", "eager", "--json", str(file)]
    ran = CliRunner().invoke(overhead.app, asked)
    assert ran.exit_code == 0, ran.output
    rows = json.loads(file.read_text())["rows"]
    names = ["log_softmax", "auto", "auto, off", "eager"]
    assert [(row["gradient"], row["name"]) for row in rows] == [(g, name) for g in (False, True) for name in names]
    assert all(row["us"] > 0 and row["times_as_long_as_plain"] > 0 for row in rows)
    assert {row["best"] for row in rows if row["name"].startswith("auto")} == {"eager"}
    assert all(row["us_before_the_kernel"] > 0 for row in rows if "best" in row)
    assert "forward" not in vars(get_backend("eager"))  # what marked the kernel is gone


NOISY = ["--shape", "8x64", "--budget", "1", "--burst", "0.05", "--rounds", "3", "--tunes"]


@pytest.mark.slow
def test_ranks_have_all_figures_and_what_they_send_is_counted(tmp_path):
    file = tmp_path / "ranks.json"
    command = [sys.executable, "-m", "benchmarks.ranks", "--rows", "8", "--vocab", "64", "--rounds", "2"]
    subprocess.run([*command, "--json", str(file)], check=True, cwd=Path(__file__).parents[1])
    figures = json.loads(file.read_text())["figures"]
    assert len(figures) == 8 and all(figure["times_as_long"] > 0 for figure in figures)
    for figure in figures:
        numbers = 8 + (3 if figure["entropy"] else 2) * 8 + 2
        assert (figure["collectives"], figure["bytes"]) == (2, 4 * numbers)


def test_choices_under_noise_are_held_against_the_best_and_none_is_not_within_the_limit(tmp_path, monkeypatch):
    """The tunes are a stand-in's; the noise and the comparison are real."""
    monkeypatch.setattr(noise, "backends", lambda: ["eager"])
    said = {"chosen": "eager", "code": "ONLY_ONE", "reason": "nothing else is here"}
    file = tmp_path / "noise.json"
    scripts = f"print({json.dumps(json.dumps(said))})", "import sys; sys.exit('no decision')"
    for script, counts in zip(scripts, ("2 of 2", "2 of 4"), strict=True):
        monkeypatch.setattr(noise, "TUNE", script)
        ran = CliRunner().invoke(noise.app, [*NOISY, "2", "--json", str(file)])
        assert ran.exit_code == 0 and f"within 1.1x of the best: {counts}" in ran.output, ran.output
    kind = {"shape": "8x64", "budget_s": 1.0, "burst_s": 0.05}
    failed = {"chosen": None, "code": "failed", "reason": "no decision"}
    tunes = [json.loads(line) for line in file.read_text().splitlines()]
    assert tunes == [{**kind, **said}] * 2 + [{**kind, **failed}] * 2


def test_the_noise_ends_with_whoever_made_it():
    noisy = subprocess.Popen([sys.executable, "-c", noise.BURSTS, "0.05"], stdin=subprocess.PIPE)
    noisy.stdin.close()
    assert noisy.wait(20) == 0


def test_every_registered_backend_takes_part_by_name():
    assert [name for name, candidate in candidates().items() if candidate.ours] == [AUTO, *backends()]


def test_auto_decides_before_it_is_timed_and_where_it_cannot_the_output_says_so(monkeypatch):
    asked = []

    def tune(problem, device, budget_s):
        asked.append((problem, device))
        raise LogProbsError("the disk is full")

    monkeypatch.setattr(peers, "tune", tune)
    ran = run(*TINY, "inplace", "--only", "auto")
    assert ran.exit_code == 0 and re.search(r"auto \(took \w+\): not tuned: the disk is full", ran.output)
    assert asked == [(problem_of("inplace", rows=8, vocab=16), CPU)]
    assert run(*TINY, "inplace", "--only", "eager").exit_code == 0
    assert run(*TINY, "inplace", "--only", "auto", "--no-tune").exit_code == 0
    assert len(asked) == 1


def test_a_failure_is_an_outcome_and_never_a_number():
    calls = []

    def raise_after(times, error):
        def log_probs(right):
            calls.append(error)
            if calls.count(error) > times:
                raise error
            return right

        return log_probs

    def idiom(log_probs=lambda x: x, entropy=lambda x: x):
        """The first, with something else made of what it returns."""

        def changed(logits, labels, with_entropy):
            right, h = idioms.log_softmax_gather(logits, labels, with_entropy)
            return log_probs(right), None if h is None else entropy(h)

        return changed

    mistakes = {
        "raises_later": ("failed", "RuntimeError: worn out", idiom(raise_after(4, RuntimeError("worn out")))),
        "out_of_memory": ("oom", "", idiom(raise_after(0, MemoryError()))),
        "positive": ("wrong", "log-probability", idiom(log_probs=torch.neg)),
        "not_a_number": ("wrong", "", idiom(log_probs=lambda x: x * torch.nan)),
        "no_gradient": ("wrong", "gradient", idiom(log_probs=lambda x: x.detach() + 0 * x)),
        "negative": ("wrong", "entropy", idiom(entropy=torch.neg)),
        "right": ("measured", "", idioms.log_softmax_gather),
    }
    contenders = [Contender(name, lambda problem, made=made: made) for name, (_, _, made) in mistakes.items()]
    contenders.append(Contender("absent", lambda problem: pytest.fail("it is built"), why_not=lambda problem: "no"))
    problem = problem_of("backward")._replace(entropy=True)
    cell = measure(problem, "backward", contenders, CPU, rounds=3, seconds=60)
    for name, (outcome, reason, _) in {**mistakes, "absent": ("unavailable", "no", None)}.items():
        assert cell.results[name].outcome == outcome and reason in (cell.results[name].reason or ""), name
    assert len(cell.results["right"].seconds) == len(cell.read_seconds) == 3
    assert all(row["outcome"] == "measured" or row.keys().isdisjoint(COLUMNS) for row in cell.to_rows())


def test_logits_that_do_not_fit_are_an_outcome_of_all_and_the_next_problem_goes_on(monkeypatch):
    def fit(*shape, **options):
        if 99 in shape:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(*shape, **options)

    monkeypatch.setattr(measurement.torch, "empty", fit)
    shapes = ["--shape", "8x16,8x99", "--no-tune", "--json", "-"]
    ran = run(*TINY[2:], "forward", *shapes, "--only", "eager")
    rows = json.loads(ran.stdout)["rows"]
    assert [(row["vocab"], row["candidate"], row["outcome"]) for row in rows] == [
        (16, "amax", "measured"),
        (16, "eager", "measured"),
        (99, "eager", "oom"),
    ]
    assert run(*TINY[2:], "forward", *shapes[:3], "--only", "eager").exit_code == ran.exit_code == 1


def test_a_failed_backend_of_ours_shows_in_the_exit_code(monkeypatch):
    def zeros(logits, labels, with_entropy):
        return torch.zeros(len(labels)), None

    zero = Contender("ours", lambda problem: zeros, ours=True)
    monkeypatch.setattr(peers, "candidates", lambda: {"ours": zero})
    ran = run(*TINY, "forward", "--no-tune")
    assert ran.exit_code == 1
    assert "ours: wrong: its log-probability is off by" in ran.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "512"], "got --shape '512'; ROWSxVOCAB is valid, e.g. 512x151936 or 512xqwen3"),
        (["--mode", "sideways"], "got mode 'sideways'; forward, backward, inplace, entropy are valid"),
        (["--only", "eager,nobody"], "got --only nobody; auto, "),
        (["--device", "abacus"], "got --device abacus, which torch cannot use here"),
        (["--json", f"{__file__}/x.json"], "which cannot be written"),
        (["--html", "x.html"], "needs plotly, which is not installed. Install the extra that has it (pip install -e"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_measured(arguments, message, monkeypatch):
    monkeypatch.setattr(peers, "measure", None)
    monkeypatch.setattr(chart, "find_spec", lambda name: None)
    ran = run(*arguments)
    assert ran.exit_code == 2
    assert message in ran.stderr


def test_targets_are_read_off_the_cells():
    def reached(seconds, extra_bytes):
        figures = {"extra_bytes": extra_bytes, "error_max": 1e-6, "error_rmse": 1e-7}
        results = {name: Result(name, name != COMPILE, seconds=[s] * 9, **figures) for name, s in seconds.items()}
        cell = Cell(problem_of("forward", rows=512, vocab=151936), "forward", results, [1.0] * 9, 1e9)
        return {target.what.removeprefix("float32: "): target for target in targets([cell])}

    seconds = {AUTO: 1.9, "compiled": 1.8, "eager": 9.0, COMPILE: 4.0}
    good = reached(seconds, 0)
    assert {target.met for target in good.values()} <= {True, None}
    speed = good["forward, 512 x 151936, times torch.compile's speed"]
    assert (speed.met, speed.where) == (True, "compiled") and speed.reached == pytest.approx(4.0 / 1.8)
    assert good["auto, times the time of the best backend"].reached == pytest.approx(1.9 / 1.8)
    slow = reached(seconds | {AUTO: 9.5, "compiled": 3.0}, 2**30)
    assert {what for what, target in slow.items() if target.met} == {"RMSE against float64, times eager's"}
