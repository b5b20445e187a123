"""The dashboard's tables, and the index that spares reading all files again."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from compiled_logprobs_dashboard import facts, index
from compiled_logprobs_dashboard.index import Source
from compiled_logprobs_dashboard.rows import CANDIDATES, DECISIONS

from compiled_logprobs.store.files import Store
from tests.helpers import dashboard_stores as stores
from tests.helpers.stored_decisions import decided


@pytest.fixture
def look(tmp_path, monkeypatch):
    """Loads the tables, and says which files were opened for it."""
    opened: list[Path] = []
    real = index.read_file

    def noting(path: Path):
        opened.append(path)
        return real(path)

    monkeypatch.setattr(index, "read_file", noting)

    def load(progress=None, cache=tmp_path / "cache"):
        opened.clear()
        tables = index.load(index.sources(), cache, progress)
        return tables, [path.name for path in opened if path.parent.name == "decisions"]

    return load


def test_a_row_holds_what_the_record_holds(scenario, look):
    scenario("one")
    tables, _ = look()
    decision, row = stores.good(), tables.decisions.iloc[0]
    for name in (
        "chosen",
        "baseline",
        "code",
        "reason",
        "measured_at",
        "measured_rows",
        "rounds",
        "settled",
        "tuning_seconds",
    ):
        assert row[name] == getattr(decision, name)
    assert (row["rows"], row["vocab"], row["dtype"], row["mode"]) == (512, stores.QWEN, "bfloat16", "backward")
    assert row["problem"] == f"512 x {stores.QWEN} bfloat16 on cpu, backward"
    assert (row["bandwidth_read"], row["bandwidth_copy"], row["bandwidth_in_place"]) == (3.5e10, 3.1e10, 4.5e10)
    assert row["source"] == "yours" and row["environment"] == stores.here().fingerprint() and pd.isna(row["stale"])
    for name, candidate in decision.candidates.items():
        one = tables.candidates[tables.candidates["backend"] == name].iloc[0]
        assert one["key"] == row["key"] and one["chosen"] == (name == "cpp")
        assert one["outcome"] == candidate.outcome and one["reason"] == candidate.reason
        assert one["checks_passed"] == candidate.checks_passed and one["checks_total"] == len(candidate.checks)
        for column, value in (
            ("seconds", candidate.seconds),
            ("extra_multiple", candidate.extra_multiple),
            ("worst_error", candidate.worst_error),
            ("speedup", candidate.speedup and candidate.speedup.median),
            ("speedup_low", candidate.speedup and candidate.speedup.low),
        ):
            assert pd.isna(one[column]) if value is None else one[column] == value, column


def test_columns_are_there_without_any_row(scenario, look):
    scenario("no profile")
    tables, _ = look()
    assert tables.decisions.empty and tables.candidates.empty and tables.environments.empty and tables.broken.empty
    assert {*DECISIONS.names, "source", "device", "stale", "key"} == set(tables.decisions)
    assert {*CANDIDATES.names, *index._SHARED} - {"number"} == set(tables.candidates)


def test_missing_figures_stay_missing(scenario, look):
    scenario("partial")
    tables, _ = look()
    assert tables.candidates["extra_bytes"].isna().all() and tables.candidates["repeatable"].isna().all()
    assert tables.decisions["bandwidth_read"].isna().all()
    assert len(tables.environments) == 1 and tables.environments["device_type"].iloc[0] == "cpu", (
        "a decision tells facts, too"
    )


def test_no_file_is_opened_while_the_index_is_fresh(scenario, look):
    scenario("many")
    first, opened = look()
    assert len(opened) == len(first.decisions) == 42
    again, opened = look()
    assert opened == []
    for name in index._TABLES:
        pd.testing.assert_frame_equal(getattr(first, name), getattr(again, name))


def test_only_what_changed_is_read_again(scenario, look):
    where = scenario("many")
    before, _ = look()
    changed, removed = stores.problem(64), stores.problem(512)
    stores.publish(where, stores.good(changed, rounds=7))
    stores.publish(where, stores.good(stores.problem(4096)))
    where.path(stores.here().fingerprint(), removed).unlink()
    after, opened = look()
    assert sorted(opened) == sorted(where.path(stores.here().fingerprint(), stores.problem(n)).name for n in (64, 4096))
    assert len(after.decisions) == len(before.decisions)
    ours = after.decisions[after.decisions["environment"] == stores.here().fingerprint()]
    same = ours[(ours["mode"] == "backward") & (ours["dtype"] == "bfloat16") & (ours["vocab"] == stores.QWEN)]
    assert set(same["rows"]) == {64, 2048, 4096} and same.set_index("rows")["rounds"].to_dict()[64] == 7
    whole = index.load(index.sources(), where.root.parent / "another cache")
    order = ["environment", "file"]
    pd.testing.assert_frame_equal(
        after.decisions.sort_values(order, ignore_index=True).drop(columns="key"),
        whole.decisions.sort_values(order, ignore_index=True).drop(columns="key"),
    )
    for tables in (after, whole):  # each candidate belongs to the decision that it is of
        chosen = tables.candidates[tables.candidates["chosen"]].set_index("key")["backend"]
        assert (tables.decisions.set_index("key")["chosen"] == chosen).all()


def test_files_that_cannot_be_read_are_listed_with_the_reason(scenario, look):
    scenario("corrupt")
    tables, _ = look()
    assert len(tables.decisions) == 1
    reasons = dict(zip([Path(path).stem for path in tables.broken["path"]], tables.broken["reason"], strict=True))
    assert len(reasons) == 10 and set(tables.broken["source"]) == {"yours"}
    for name, words in {
        "cpu-n1-v1031-float32-unaligned": "empty",
        "cpu-n2-v1031-float32-unaligned": "not JSON",
        "cpu-n3-v1031-float32-unaligned": "not JSON",
        "cpu-n4-v1031-float32-unaligned": "another problem",
        "cpu-n6-v1031-float32-unaligned": "digest is another",
        "cpu-n12-v1031-float32-unaligned": "newer release",
        "cpu-n16-v1031-float32-unaligned": "no valid",
        "cpu-n24-v1031-float32-unaligned": "not a regular file",
    }.items():
        assert words in reasons[name], name
    again, opened = look()
    assert opened == [] and again.broken.equals(tables.broken), "that it is broken is known, too"


def test_a_broken_file_of_facts_is_listed(scenario, look):
    where = scenario("one")
    where.path(stores.here().fingerprint(), stores.problem()).parents[1].joinpath("environment.json").write_text("{")
    tables, _ = look()
    assert tables.broken["path"].tolist() == [f"v1/{stores.here().fingerprint()}/environment.json"]
    assert len(tables.decisions) == len(tables.environments) == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
        lambda data: data.replace(b"compiled-logprobs", b"something else up"),
        lambda data: data[: len(index.MAGIC)] + b"\xff\xff\xff\xff" + data[len(index.MAGIC) + 4 :],
        lambda data: b"\x80\x04\x95" + data,
    ],
    ids=["empty", "cut", "half", "a bit", "foreign", "another release", "a pickle"],
)
def test_an_index_that_cannot_be_used_is_made_anew(spoil, scenario, look, tmp_path):
    scenario("one")
    before, _ = look()
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(spoil(kept.read_bytes()))
    after, opened = look()
    assert len(opened) == 1 and after.decisions.equals(before.decisions)
    assert look()[1] == []


def test_an_index_that_other_code_made_is_made_anew(scenario, look, monkeypatch):
    """It may have passed over a file that today's code can read, or name another reason."""
    scenario("corrupt")
    with monkeypatch.context() as patch:
        patch.setattr(index, "_code", lambda: b"\0" * 32)
        before, opened = look()
        assert len(opened) == 11 and look()[1] == []
    after, opened = look()
    assert len(opened) == 11 and after.broken.equals(before.broken)
    assert look()[1] == []


def test_the_state_changes_with_every_change_also_in_place(scenario):
    where = scenario("one")
    path = where.path(stores.here().fingerprint(), stores.problem())
    seen = {index.state(index.sources())}
    assert index.load(index.sources(), where.root / "cache").state in seen and index.state(index.sources()) in seen
    for change in (
        lambda: path.write_bytes(path.read_bytes() + b" "),
        lambda: path.parents[1].joinpath("environment.json").write_text("{"),
        lambda: stores.publish(where, stores.good(stores.problem(64))),
        path.unlink,
    ):
        change()
        assert index.state(index.sources()) not in seen
        seen.add(index.state(index.sources()))


def test_an_index_with_a_right_digest_and_wrong_content_is_made_anew(scenario, look, tmp_path, monkeypatch):
    scenario("one")
    look()
    (kept,) = (tmp_path / "cache").iterdir()
    read = index._kept(kept)
    far = read.candidates.set_column(0, "number", [[5] * len(read.candidates)])
    index._keep(kept, dataclasses.replace(read, candidates=far))
    assert len(look()[1]) == 1


def test_a_cache_that_cannot_be_written_costs_only_time(scenario, look, tmp_path):
    scenario("one")
    (tmp_path / "file").write_text("in the way")
    tables, opened = look(cache=tmp_path / "file" / "cache")
    assert len(tables.decisions) == len(opened) == 1


def test_each_root_has_an_index_of_its_own(scenario, tmp_path):
    scenario("one")
    other = Store(tmp_path / "other")
    stores.SCENARIOS["all failed"](other)
    both = [*index.sources(), Source("project", other.root)]
    tables = index.load(both, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert tables.decisions["source"].tolist() == ["yours", "project", "project"]
    assert tables.decisions["key"].tolist() == [0, 1, 2] and set(tables.candidates["key"]) == {0, 1, 2}


def test_the_signature_changes_with_every_change(scenario):
    where = scenario("one")
    seen = {index.signature(index.sources())}
    for change in (
        lambda: stores.publish(where, stores.good(stores.problem(64))),
        lambda: stores.publish(where, stores.good(stores.problem(64), rounds=3)),
        lambda: where.path(stores.here().fingerprint(), stores.problem(64)).unlink(),
        lambda: stores.other_device(where),
    ):
        change()
        assert index.signature(index.sources()) not in seen
        seen.add(index.signature(index.sources()))


def test_progress_goes_from_none_to_all(scenario, tmp_path, look):
    stores.generate(scenario("no profile"), 250)
    told: list[tuple[int, int]] = []
    tables, _ = look(lambda done, of: told.append((done, of)))
    assert len(tables.decisions) == 250 and tables.decisions["key"].is_unique
    assert told == [(0, 250), (100, 250), (200, 250), (250, 250)]


AGAIN_AND_AGAIN = """
import sys
from pathlib import Path
from compiled_logprobs_dashboard import index
root, cache = map(Path, sys.argv[1:])
for _ in range(5):
    print(len(index.load([index.Source("yours", root)], cache).decisions))
    for kept in cache.glob("*.index"):
        kept.unlink(missing_ok=True)
"""


def test_processes_that_index_at_once_do_no_harm(scenario, tmp_path):
    where = scenario("many")
    command = [sys.executable, "-c", AGAIN_AND_AGAIN, str(where.root), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].split() for process in running] == [["42"] * 5] * 2
    assert not list((tmp_path / "cache").glob(".*"))


def test_sources_are_those_that_are_there(scenario, monkeypatch, tmp_path):
    where = scenario("one")
    assert index.sources() == [Source("yours", where.root)]
    monkeypatch.setenv("COMPILED_LOGPROBS_PROFILES", str(tmp_path / "nowhere"))
    assert [source.name for source in index.sources()] == ["bundled"]


def test_stale_says_what_is_another(scenario, tmp_path):
    where = scenario("other device")
    stores.publish(where, stores.good())
    old = dataclasses.replace(stores.here(), torch="1.0.0")
    stores.publish(where, stores.good(), old)
    changed = stores.good_candidates()
    changed["cpp"] = dataclasses.replace(changed["cpp"], fingerprint="0" * 16)
    stores.publish(where, stores.good(stores.problem(64), candidates=changed))
    foreign = {**stores.good_candidates(), "third": stores.good_candidates()["cpp"]}
    stores.publish(where, decided(stores.problem(128), "third", candidates=foreign))
    tables = index.load(index.sources(), tmp_path / "cache")
    by = tables.decisions.set_index(["environment", "rows"])["stale"]
    ours = stores.here().fingerprint()
    assert by[ours, 512] is None
    assert by[old.fingerprint(), 512] == f"measured with torch 1.0.0; this machine has {stores.here().torch}"
    assert by[ours, 64] == "backend cpp has changed since this was measured"
    assert by[ours, 128] == "backend third, which it chose, is not registered here"
    assert by[stores.H100.fingerprint(), 2048].str.startswith("measured with torch 2.12.0;").all()


@pytest.mark.parametrize(
    "wrong", [None, [], {"cpu_threads": "many", "gpu_name": ["x"], "torch": 5, "memory_bytes": True}]
)
def test_facts_that_are_none_count_as_missing(wrong):
    plain = facts.plain_facts(wrong)
    assert set(plain) == {field.name for field in dataclasses.fields(stores.H100)} and not any(plain.values())
    assert facts.device_name(plain) == "unknown device"


def test_half_a_surrogate_pair_in_a_fact_becomes_text(scenario, look):
    where = scenario("no profile")
    odd = dataclasses.replace(stores.here(), gpu_name="half \ud800 a pair")  # which is in no fingerprint
    where.publish(odd, stores.good())
    tables, _ = look()
    assert tables.environments["gpu_name"].tolist() == ["half ? a pair"]
    assert pa.Table.from_pandas(tables.environments).num_rows == 1


def test_a_file_whose_name_is_no_text_is_passed_over(scenario, look):
    where = scenario("one")
    (folder,) = where.root.glob("v1/*/decisions")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.json")).write_text("{}")
    assert len(look()[0].decisions) == 1 and look()[1] == []  # and the index could be written


def test_devices_are_told_apart():
    assert facts.device_name(dataclasses.asdict(stores.H100)) == "NVIDIA H100 80GB HBM3, 132 SMs"
    cpu = dataclasses.asdict(dataclasses.replace(stores.here(), cpu_model="Some CPU", cpu_threads=4))
    assert facts.device_name(cpu) == "Some CPU, 4 threads"


def test_an_index_holds_no_code(scenario, look, tmp_path):
    scenario("hostile")
    tables, _ = look()
    (kept,) = (tmp_path / "cache").iterdir()
    data = kept.read_bytes()
    assert data.startswith(index.MAGIC) and b"pickle" not in data
    assert json.dumps(tables.candidates["backend"].tolist()).count("onclick") == 1
    assert os.path.basename(kept).endswith(".index") and str(tmp_path) not in kept.name
