"""Measure: a run from its form to its end, the machine, and the profiles that are stored."""

import dataclasses
import json
import threading

import psutil
import pytest
from compiled_logprobs_dashboard import runs
from compiled_logprobs_dashboard.machine import Host, look_at_host, process
from compiled_logprobs_dashboard.tables.measure import devices, processes, throttling

from compiled_logprobs.store.files import Store
from compiled_logprobs.store.transfer import export_archive
from tests.helpers import dashboard_stores as stores
from tests.helpers import nvml_library
from tests.helpers.dashboard_pages import links_of, opened, table_of, text_of
from tests.helpers.dashboard_runs import FIRST, PROBLEM, START, TINY, event, wait_until

SCRIPT = """
import pathlib, sys, time
sys.stdout.buffer.write({})
sys.stdout.flush()
while not pathlib.Path({!r}).exists():
    time.sleep(0.01)
sys.stdout.buffer.write({})
sys.stderr.write("a word")
"""


@pytest.fixture
def page(scenario, quiet):
    scenario("no profile")
    return opened("measure")


def told(*decisions, problems: int = 1) -> bytes:
    end = event("end", done=1, total=problems, seconds=1.0, interrupted=False)
    return b"".join(event("decision", decision=json.loads(one.to_json())) for one in decisions) + end


@pytest.mark.slow
def test_a_run_from_the_button_to_its_end(page, scenario, program, tmp_path):
    assert "**4 problems to measure**" in text_of(page) and not page.button(key="run_start").disabled
    assert page.code[0].value == "compiled-logprobs profile --device=cpu --preset=quick"
    fields = {"vocabs": ["512"], "rows": ["4"], "dtypes": ["float32"], "modes": ["forward"], "backends": ["eager"]}
    for key, value in fields.items():
        page.multiselect(key=f"run_{key}").set_value(value)
    page.number_input(key="run_budget").set_value(2).run()
    assert "**1 problem to measure**" in text_of(page) and page.code[0].value == TINY.command_line()

    (posed,), go = TINY.problems(), tmp_path / "go"
    decision = stores.good(posed)
    start = event("start", device="cpu", environment="0" * 16, problems=[PROBLEM])
    program(SCRIPT.format(start + FIRST, str(go), told(decision)))
    page.button(key="run_start").click().run()
    assert not page.exception and "A run is going on" in text_of(page) and page.button(key="run_start").disabled
    assert "A run is going on" in text_of(opened("measure")), "in another tab, or after a reload"
    go.touch()
    wait_until(lambda: "The last run has finished" in text_of(page.run()))
    assert "1 of 1 problem decided; 1 were measured by this run." in text_of(page)
    assert table_of(page, "winner", "speed-up")["winner"].tolist() == ["cpp"]
    assert "rows=4" in links_of(page)["Look at the last of them"] and "a word" in [code.value for code in page.code]
    assert "run_longer" not in [button.key for button in page.button]

    stores.publish(scenario("no profile"), decision)
    assert "All of this is stored already" in text_of(page.run()) and page.button(key="run_start").disabled
    page.checkbox(key="run_again").check().run()
    assert "**1 problem to measure**" in text_of(page) and not page.button(key="run_start").disabled


@pytest.mark.slow
def test_what_is_undecided_gets_more_time_at_a_button(page, program, tmp_path):
    (posed,), go = TINY.problems(), tmp_path / "go"
    go.touch()
    program(SCRIPT.format(START + FIRST, str(go), told(stores.undecided(posed), problems=2)))
    run = runs.RUNS.start(dataclasses.replace(TINY, again=True))
    wait_until(lambda: not run.is_running and not [one for one in threading.enumerate() if one.name == "run"])
    page.run()
    assert "**1 problem undecided**" in text_of(page) and "0 of 2 problems decided" in text_of(page)
    assert table_of(page, "winner")["winner"].tolist() == ["? undecided after 12 rounds"]
    go.unlink()
    page.button(key="run_longer").click().run()
    assert runs.RUNS.latest.request == TINY and not page.exception, "which gives three times what it took"
    go.touch()
    wait_until(lambda: not runs.RUNS.latest.is_running)


@pytest.mark.slow
def test_what_is_not_valid_is_said_and_so_is_a_run_that_died(page, program):
    for key, wrong, said in (
        ("vocabs", "<b>x</b>", "got model '<b>x</b>'"),
        ("backends", "mine", "package.module:Class of your own is valid"),
    ):
        page.multiselect(key=f"run_{key}").set_value([wrong]).run()
        assert not page.exception and said in text_of(page)
        assert "run_start" not in [button.key for button in page.button]
        page.multiselect(key=f"run_{key}").set_value([]).run()
    program("raise SystemExit('it cannot be written')")
    run = runs.RUNS.start(TINY)
    wait_until(lambda: not run.is_running)
    assert "The last run ended before it was done" in text_of(page.run()) and "exit code 1" in text_of(page)
    assert "it cannot be written" in [code.value for code in page.code]
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "run"])
    runs.RUNS.start(TINY)  # the lock is free again


@pytest.mark.slow
def test_a_link_from_a_shape_fills_in_the_form_with_every_option(scenario, quiet):
    scenario("one")
    shape = {"rows": 96, "vocab": 50257, "dtype": "float16", "mode": "backward"}
    at = opened("measure", this="shape", options="temperature-a-token", **shape)
    words = "--vocab=50257 --rows=96 --dtype=float16 --mode=backward --temperature=per-token --again"
    assert not at.exception and at.code[0].value.endswith(words) and at.query_params["this"] == "shape"
    at.multiselect(key="run_backends").set_value(["eager"]).run()
    at.multiselect(key="run_others").set_value(["without logsumexp", "masked", "entropy", "without entropy"]).run()
    words = "--backend=eager --temperature=per-token --entropy --no-entropy --no-logsumexp --masked --again"
    assert at.code[0].value.endswith(words)


@pytest.mark.slow
def test_a_link_from_the_overview_asks_for_all_that_is_undecided(scenario, quiet):
    where = scenario("signs")
    stores.publish(where, stores.undecided(stores.problem(2048, dtype=stores.torch.float32)))
    stores.publish(where, stores.undecided(stores.problem(64)._replace(temperature="number")))
    (link,) = (url for label, url in links_of(opened()).items() if "3 undecided decisions" in label)
    assert "part=run" in link and "this=undecided" in link
    at = opened("measure", this="undecided")
    words = "--vocab=151936,262144 --rows=2048,64 --dtype=float32,bfloat16 --mode=backward"
    assert not at.exception and at.code[0].value.endswith(words)
    assert "2 of 3 undecided problems; the others have other options." in text_of(at)


# The machine

LABELS = ["0: NVIDIA Fake 80GB", "1: NVIDIA Fake 80GB", "1, slice 0: NVIDIA Fake 80GB MIG 1g.10gb"]
HOST = Host(50.0, 2, 1.0, 3, 10)


@pytest.fixture
def with_gpus(nvml, monkeypatch):
    """Two GPUs and a slice; sets what the stand-in is to do."""
    nvml_library.use(nvml, monkeypatch)
    return lambda **environment: [monkeypatch.setenv(f"FAKE_NVML_{name}", text) for name, text in environment.items()]


def test_the_host_is_what_the_system_says():
    host = look_at_host()
    assert host.memory_total_bytes == psutil.virtual_memory().total > host.memory_used_bytes > 0
    assert host.processors == psutil.cpu_count() and 0 <= host.busy_percent <= 100
    assert process(psutil.Process().pid)[1] != "n/a" and process(2**30) == ("n/a", "n/a")
    (row,) = devices([], HOST).to_dict("records")
    assert row["memory %"] == 30 and row["power"] == "n/a" and processes([])[0].empty
    assert throttling(None) == "n/a" and throttling(()) == "nothing" and throttling(("idle",)) == "idle"


def test_without_a_library_it_says_so_and_shows_this_machine(monkeypatch):
    nvml_library.use(None, monkeypatch)
    at = opened("measure", part="machine")
    assert "No NVIDIA GPU is reported on here: NVML, the library of NVIDIA's driver, does not start" in text_of(at)
    assert len(table_of(at, "device", "busy %")) == 1 and not at.exception


@pytest.mark.parametrize("count", [2, 8])
def test_a_row_a_gpu_and_the_processes_on_them(with_gpus, count):
    with_gpus(REASONS="0x44", GPUS=str(count))
    at = opened("measure", part="machine")
    table = table_of(at, "device", "busy %").set_index("device")
    assert not at.exception and list(table.index)[:3] == LABELS and len(table) == count + 2, "a slice, and the CPU"
    first = table.iloc[0]
    assert first["power"].startswith("350 of ") and first["°C"] == 60 and first["busy %"] == 0
    assert first["held down by"] == "▼ power cap, thermal slowdown by the hardware"
    found = table_of(at, "GPU", "process", "command")
    assert found["process"].tolist()[:2] == [4711, 4712] and found["memory"].tolist()[1] == "n/a"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"GPUS": "1", "REASONS": "0x1"}, "idle"),
        ({"GPUS": "2", "HIDDEN": "4"}, "Processes are not told to this user"),
        ({"RETURN": "15"}, "no answer: GPU is lost"),
        ({"LOST": "0", "LOST_AT": "handle"}, "no answer: GPU is lost: it has fallen off the bus"),
    ],
    ids=str,
)
def test_what_is_idle_hidden_or_lost_is_said_and_never_0(with_gpus, settings, said):
    with_gpus(**settings)
    at = opened("measure", part="machine")
    table = table_of(at, "device", "busy %")
    assert not at.exception and said in text_of(at) + " ".join(table["held down by"])
    is_lost = "RETURN" in settings or "LOST" in settings
    assert (table["power"].iloc[0] == "n/a") == table[["busy %", "memory %"]].iloc[0].isna().all() == is_lost


def test_while_a_run_measures_it_does_not_look_by_itself(with_gpus, monkeypatch):
    monkeypatch.setattr(runs.Runs, "is_measuring", True)
    assert "not again while a run measures" in text_of(opened("measure", part="machine"))


# Profiles


def files(where: Store) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in where.root.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "counts"), [("many", [2, 4, 36]), ("corrupt", [1]), ("hostile", [1]), ("undecided", [1]), ("signs", [37])]
)
def test_it_lists_every_kind_of_store(scenario, name, counts):
    scenario(name)
    at = opened("measure", part="profiles")
    table = table_of(at, "decisions", "stale", "measured", "CPU model")
    assert not at.exception and sorted(table["decisions"]) == counts and set(table["source"]) == {"yours"}
    assert table["undecided"].sum() == (name in ("undecided", "signs")) and table["wrong"].sum() == 2 * (
        name == "signs"
    )
    broken = table_of(at, "reason", "path")
    assert (broken is not None) == (name == "corrupt") and (broken is None or len(broken) == 5)


@pytest.mark.slow
def test_an_archive_and_a_report_can_be_taken_along(scenario):
    where = scenario("one")
    at = opened("measure", part="profiles")
    at.button(key="prepare").click().run()
    assert not at.exception and [one.label.split()[0] for one in at.get("download_button")] == ["Download"]
    at.button(key="make_report").click().run()
    assert not at.exception and at.get("download_button")[0].label.endswith("MiB")
    where.path(stores.here().fingerprint(), stores.problem()).write_text("{")  # in place, so that no folder changes
    with pytest.warns(RuntimeWarning, match="is passed over"):
        at.button(key="prepare").click().run()
    assert not at.exception and "holds no decision" in text_of(at)


@pytest.mark.slow
def test_an_upload_is_shown_before_it_is_stored(scenario, tmp_path):
    where, elsewhere = scenario("no profile"), Store(tmp_path / "elsewhere")
    stores.publish(elsewhere, stores.good())
    odd = dataclasses.replace(stores.H100, gpu_name=stores.HOSTILE)
    stores.publish(elsewhere, stores.good(stores.problem(64, device="cuda"), reason=stores.HOSTILE), odd)
    at = opened("measure", part="profiles")
    content, _ = export_archive(elsewhere)
    at.file_uploader(key="upload").upload("../../evil.tar.gz", content, "application/gzip").run()
    assert not at.exception and files(where) == {} and set(table_of(at, "fate")["fate"]) == {"added"}
    assert "2 decisions, 2 of which would be stored" in text_of(at)
    at.button(key="store").click().run()
    assert not at.exception and "Done: 2 added" in text_of(at)
    stored, sent = ({name.replace(str(store.root), "") for name in files(store)} for store in (where, elsewhere))
    assert stored == sent, "no name of a file is used"
    before = files(where)
    for wrong in (b"<script>", content[:-100]):
        at.file_uploader(key="upload").upload("x.tar.gz", wrong, "application/gzip").run()
        assert not at.exception and files(where) == before and "the archive cannot be used" in text_of(at)


@pytest.mark.slow
def test_pruning_shows_first_what_would_go(scenario):
    where = scenario("corrupt")
    at = opened("measure", part="profiles")
    before = files(where)
    assert "prune" not in [one.key for one in at.button]
    at.toggle(key="prune_show").set_value(True).run()
    assert files(where) == before and "broken: " in at.code[-1].value
    at.button(key="prune").click().run()
    assert not at.exception and files(where).items() < before.items() and "0 files" in text_of(at)
