"""`tune(group=...)`: whatever happens on any rank, all that are left come back, with the same decision or the baseline.

The faults are real, and happen in processes of their own; see `rank.py`.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from compiled_logprobs.store.files import Store

RANK = Path(__file__).with_name("rank.py")
LIMIT_S = 220
"""For all scenarios of one start, which take a tenth of it; what hangs is killed."""
SILENCE_S, GRACE_S = 3.0, 1.5
"""In the place of minutes, for ranks that something happens to."""


def environment(folder: Path, **variables: str) -> dict[str, str]:
    return {
        **os.environ,
        "COMPILED_LOGPROBS_MODE": "tune",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder),  # where the lock of the device is: other tests may run on this machine
        **variables,
    }


def results(folder: Path, scenarios: list[str], count: int) -> dict[str, list[dict | None]]:
    """By scenario, what each rank wrote; None where it did not get there."""
    found: dict[str, list[dict | None]] = {}
    for number, name in enumerate(scenarios):
        files = [folder / f"{number} {name} of rank {rank}" for rank in range(count)]
        found[name] = [json.loads(file.read_text()) if file.exists() else None for file in files]
    return found


def by_torchrun(folder: Path, scenarios: list[str], count: int) -> dict[str, list[dict | None]]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    process = subprocess.run(
        [*torchrun, str(RANK), str(folder), *scenarios],
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    return results(folder, scenarios, count)


def by_hand(folder: Path, scenarios: list[str], count: int, method: str) -> dict[str, list[dict | None]]:
    """Not by torchrun, which ends the others when one rank has ended."""
    where = environment(folder, WORLD_SIZE=str(count), METHOD=method, SILENCE_S=str(SILENCE_S), GRACE_S=str(GRACE_S))
    processes = []
    for rank in range(count):
        with (folder / f"errors of rank {rank}").open("w") as errors:
            command = [sys.executable, str(RANK), str(folder), *scenarios]
            processes.append(subprocess.Popen(command, env={**where, "RANK": str(rank)}, stderr=errors))
    try:
        for process in processes:
            process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        pytest.fail("a rank hangs")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return results(folder, scenarios, count)


HARMLESS = [
    "same",
    "tuned_again",
    "subgroup",
    "slowest",
    "other_problems",
    "more_problems",
    "wrong_arguments",
    "broken_arguments",
    "registered_on_one",
    "cannot_run_on_one",
    "cannot_import_on_one",
    "other_stores",
    "only_first_has_it",
    "other_environment",
    "other_release",
    "holds_another",
    "raises",
    "out_of_memory",
    "interrupted",
    "frozen",
    "invariant_rows",
]
"""After which all ranks are there."""
FATAL = ["comes_late", "hangs", "is_stopped", "exits", "without_it"]
"""After which there is a rank less."""


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """By scenario, what four ranks wrote."""
    folder = tmp_path_factory.mktemp("four")
    return folder, by_torchrun(folder, HARMLESS, 4)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """The same of three, of which not all are left at the end."""
    folder = tmp_path_factory.mktemp("three")
    return by_hand(folder, FATAL, 3, f"file://{folder / 'meeting'}")


def the_same(ranks: list[dict | None]) -> dict:
    """The decision that all of them hold, which also serves."""
    assert all(one is not None and "error" not in one for one in ranks), ranks
    first = ranks[0]["decisions"][0]
    for one in ranks:
        assert one["decisions"][0]["digest"] == first["digest"] and not one["warned"]
        assert (one["backend"], one["source"]) == (first["chosen"], "ranks")
    return first


def the_baseline(ranks: list[dict | None], *reasons: str) -> None:
    """All of them hold it, and say why."""
    for one in ranks:
        assert one is not None and "error" not in one, ranks
        assert [(each["chosen"], each["code"]) for each in one["decisions"]] == [("eager", "RANKS_DIFFER")]
        assert (one["backend"], one["source"]) == ("eager", "ranks")
        assert len(one["warned"]) == 1 and all(reason in one["warned"][0] for reason in reasons), one["warned"]


def test_all_ranks_hold_what_the_first_measured(four):
    folder, found = four
    ranks = found["same"]
    decision = the_same(ranks)
    assert decision["record"]["rounds"] > 0 and set(decision["record"]["candidates"]) == {"eager", "right"}
    assert all(len(one["decisions"]) == 2 for one in ranks)  # of two buckets
    assert len({one["decisions"][1]["digest"] for one in ranks}) == 1
    assert decision["record"] in [record for _, _, record in Store(folder / "store").decisions()]


def test_what_is_stored_is_not_measured_again(four):
    _, found = four
    assert the_same(found["tuned_again"])["digest"] == found["same"][0]["decisions"][0]["digest"]


def test_the_ranks_of_another_group_hold_theirs_and_the_rest_nothing(four):
    _, found = four
    *others, third, fourth = found["subgroup"]
    assert third["decisions"] == fourth["decisions"] and third["decisions"][0]["chosen"] == "right"
    for one in others:
        assert one["error"].startswith("InputError: got group=") and "that this process belongs to" in one["error"]


def test_the_slowest_rank_counts(four):
    _, found = four
    record = the_same(found["slowest"])["record"]
    assert record["reason"].endswith("on the slowest of 2 devices")
    told, eager = record["candidates"]["told"], record["candidates"]["eager"]
    assert told["outcome"] == "slower" and told["seconds"] > 0.1 > eager["seconds"]
    assert told["speedup"]["median"] < 1


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("other_problems", "InputError: got other problems on rank 1 of the group than on its first (1 there, 1 here)"),
        ("more_problems", "InputError: got other problems on rank 1 of the group than on its first (2 there, 1 here)"),
        ("wrong_arguments", "InputError: rank 1: InputError: got budget_s=-1;"),
    ],
)
def test_what_is_wrong_on_one_rank_all_are_told(four, what, told):
    _, found = four
    assert all(one["error"].startswith(told) for one in found[what]), found[what]


def test_a_rank_that_never_says_what_it_asks_for(four):
    """It cannot hold anything; the others know their problems."""
    _, found = four
    first, second, *others = found["broken_arguments"]
    assert second["error"] == "LogProbsError: rank 1: ZeroDivisionError: division by zero"
    for one in (first, *others):
        assert one["decisions"][0]["code"] == "RANKS_DIFFER" and "ZeroDivisionError" in one["warned"][0]


def test_only_backends_that_all_ranks_have_are_measured(four):
    _, found = four
    record = the_same(found["registered_on_one"])["record"]
    assert set(record["candidates"]) == {"eager", "right"} and record["left_out"] == ["its", "mine", "other"]


def test_only_backends_that_can_run_on_all_ranks_are_measured(four):
    _, found = four
    record = the_same(found["cannot_run_on_one"])["record"]
    assert set(record["candidates"]) == {"eager", "right"} and record["left_out"] == ["cpp"]


def test_a_winner_that_one_rank_cannot_import(four):
    _, found = four
    the_baseline(found["cannot_import_on_one"], "rank 1: backend 'right' cannot run here, or has other code")


def test_stores_that_differ(four):
    folder, found = four
    ranks = found["other_stores"]
    # Before, they would have chosen differently.
    assert [one["before"] for one in ranks] == [None, "eager", None, None]
    assert the_same(ranks)["chosen"] == "right"
    assert len(list(Store(folder / "store of rank 0").decisions())) == 2  # with the one of the next test
    assert not list(Store(folder / "store of rank 3").decisions())


def test_the_store_of_the_first_rank_counts(four):
    _, found = four
    assert the_same(found["only_first_has_it"])["chosen"] == "right"


def test_environments_that_differ(four):
    _, found = four
    the_baseline(found["other_environment"], "rank 1 is in another environment: cpu_threads is 2 there and 1 on")


def test_releases_that_differ(four):
    _, found = four
    told = "the ranks run different releases, as eager shows: rank 1: it has other code than elsewhere"
    the_baseline(found["other_release"], told)


def test_a_decision_that_arrives_as_another(four):
    _, found = four
    the_baseline(found["holds_another"], "rank 1: it holds another decision")


def test_the_rank_that_measures_raises(four):
    _, found = four
    the_baseline(found["raises"], "rank 0: OSError: the disk is gone")


def test_the_rank_that_measures_runs_out_of_memory(four):
    _, found = four
    the_baseline(found["out_of_memory"], "rank 0: MemoryError")


def test_the_rank_that_measures_is_interrupted(four):
    """There the interruption goes on; that rank holds the baseline, too."""
    _, found = four
    first, *others = found["interrupted"]
    assert first["error"].startswith("KeyboardInterrupt")
    the_baseline(others, "rank 0: KeyboardInterrupt")
    assert (first["backend"], first["source"]) == ("eager", "ranks") and "KeyboardInterrupt" in first["warned"][0]
    assert all(one["seconds"] < 25 for one in found["interrupted"])  # nobody has waited for it


def test_what_is_stored_while_ranks_run_is_not_there_for_them(four):
    folder, found = four
    for one in found["frozen"]:
        assert one["early"] == {"backend": "right", "source": "user store"}
        assert one["late"] == {"backend": "eager", "source": "default rule"}
        assert one["nearby"] == {"backend": "right", "source": "nearest"}
    assert len(list(Store(folder / "shared store").decisions())) == 3


def test_invariant_rows_come_from_one_backend_on_all_ranks(four):
    _, found = four
    assert the_same(found["invariant_rows"])["chosen"] == "right"
    assert all(one["new"] == {"backend": "right", "source": "ranks"} for one in found["invariant_rows"])


def test_two_ranks(tmp_path):
    found = by_torchrun(tmp_path, ["registered_on_one", "raises"], 2)
    assert set(the_same(found["registered_on_one"])["record"]["candidates"]) == {"eager", "right"}
    the_baseline(found["raises"], "rank 0: OSError: the disk is gone")


@pytest.fixture(scope="module")
def three_by_torchrun(tmp_path_factory):
    scenarios = ["other_stores", "registered_on_one", "name_given_again", "joins_late"]
    return by_torchrun(tmp_path_factory.mktemp("three by torchrun"), scenarios, 3)


def test_three_ranks(three_by_torchrun):
    ranks = three_by_torchrun["other_stores"]
    assert [one["before"] for one in ranks] == [None, "eager", None] and the_same(ranks)["chosen"] == "right"
    assert set(the_same(three_by_torchrun["registered_on_one"])["record"]["candidates"]) == {"eager", "right"}


def test_a_name_that_another_group_had(three_by_torchrun):
    first, second, third = three_by_torchrun["name_given_again"]
    assert first["names"][0] == first["names"][1] == second["names"][0] == third["names"][1]
    assert the_same([first, third])["chosen"] == "right"
    assert the_same([second])["chosen"] == "right"


def test_what_ranks_tuned_before_they_joined_is_gone(three_by_torchrun):
    ranks = three_by_torchrun["joins_late"]
    assert [one["before"] for one in ranks] == ["eager", "right", "right"]
    assert all((one["backend"], one["source"]) == ("eager", "default rule") for one in ranks)


def test_a_rank_that_comes_late(three):
    """The others have gone on by then; it holds what they hold."""
    the_baseline(three["comes_late"], f"rank 1 was silent for {SILENCE_S:g} s")


def test_the_rank_that_measures_hangs(three):
    the_baseline(three["hangs"], f"the first rank was silent for {SILENCE_S + GRACE_S:g} s")
    assert three["hangs"][0]["seconds"] > SILENCE_S + GRACE_S


def test_a_rank_is_stopped_in_the_last_step(three):
    the_baseline(three["is_stopped"], f"rank 1 was silent for {SILENCE_S:g} s")


def test_a_rank_ends_without_a_word(three):
    first, second, third = three["exits"]
    assert second is None
    the_baseline([first, third], f"rank 1 was silent for {SILENCE_S:g} s")
    first, second, third = three["without_it"]
    assert second is None
    the_baseline([first, third], f"rank 1 was silent for {SILENCE_S:g} s")


def test_the_first_rank_is_killed_while_it_measures(tmp_path):
    """Then nobody can say what the others hold, but that it is the baseline."""
    found = by_hand(tmp_path, ["is_killed", "without_it"], 2, f"file://{tmp_path / 'meeting'}")
    for first, second in found.values():
        assert first is None
        the_baseline([second], f"the first rank was silent for {SILENCE_S + GRACE_S:g} s")


def by_first_rank() -> str:
    """How ranks meet where the first keeps the store: by `tcp://` or, without torchrun, `env://`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"tcp://localhost:{free.getsockname()[1]}"


def test_the_rank_that_keeps_the_store_is_killed(tmp_path):
    """Nobody can know what the others hold."""
    first, second = by_hand(tmp_path, ["is_killed"], 2, by_first_rank())["is_killed"]
    assert first is None
    assert second["error"].startswith("Unreachable: the store of the process group does not answer")
    assert (second["backend"], second["source"]) == ("eager", "ranks")


def test_the_rank_that_keeps_the_store_is_stopped(tmp_path):
    """It does not keep the others; when it goes on, it finds them gone."""
    first, second = by_hand(tmp_path, ["host_is_stopped"], 2, by_first_rank())["host_is_stopped"]
    assert f"has ended or is stopped: no answer within {SILENCE_S + GRACE_S:g} s" in second["error"]
    assert (second["backend"], second["source"]) == ("eager", "ranks")
    the_baseline([first], f"rank 1 was silent for {SILENCE_S:g} s")
