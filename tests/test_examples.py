"""The worked run in small: it learns words, historical signs show themselves, and what is committed is its output."""

import json
import re
from pathlib import Path

import pytest
import torch

from examples import from_hidden
from examples.reinforce import __main__ as program
from examples.reinforce import text
from examples.reinforce.train import Settings, pretrain, reinforce
from examples.reinforce.ways import WAYS

RESULTS = Path(program.__file__).parent / "results.json"
SMALL = Settings(pretraining_steps=4, pretraining_batch=4, steps=2, groups=2, completions=4, completion_bytes=8)


@pytest.fixture(scope="module")
def start():
    data = text.to_bytes(text.read_documentation())
    model, losses = pretrain(data, SMALL)
    assert losses[-1] < losses[0]
    return model, data


def test_the_reward_is_what_its_docstring_says():
    words = text.find_words("the cat and the cat, the dog; and the dog. The dog and a cat")
    assert words == {"the", "and", "cat", "dog"}
    assert text.reward("the cat xyz ", words) == 8 / 12
    assert text.reward("the the the ", words) == 4 / 12
    assert text.reward("the do", words) == 4 / 6  # the last word may be cut off in the middle
    assert text.reward("\xff\xfe", words) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name.split(",")[0].split(":")[0])
def test_each_way_trains_and_only_the_historical_one_shows_what_cannot_be(start, way):
    model, data = start
    before = [parameter.clone() for parameter in model.parameters()]
    curve = reinforce(model, way, data, text.find_words(text.read_documentation()), SMALL)
    assert all(map(torch.equal, model.parameters(), before))  # each way trains a copy
    assert len(curve.reward) == len(curve.log_prob) == SMALL.steps
    if way is WAYS[2]:
        assert min(curve.log_prob) > 0 and max(curve.first_ratio) > 1e3
    else:
        assert max(curve.log_prob) < 0 and max(curve.apart) < 1e-5
        assert curve.first_ratio == [1.0] * SMALL.steps


@pytest.mark.slow
def test_the_program_writes_results_and_a_page_that_needs_nothing_from_elsewhere(tmp_path, monkeypatch, capsys):
    small = {name: getattr(SMALL, name) for name in ("pretraining_batch", "groups", "completions", "completion_bytes")}
    monkeypatch.setattr(program, "Settings", lambda: Settings(**small))
    files = {"--json": tmp_path / "r.json", "--html": tmp_path / "r.html"}
    options = [str(part) for pair in files.items() for part in pair]
    program.main(["--steps", "1", "--pretraining-steps", "2", *options])
    results = json.loads(files["--json"].read_text(), parse_constant=pytest.fail)
    assert [curve["way"] for curve in results["curves"]] == [way.name for way in WAYS]
    assert results["machine"]["cpu_threads"] and results["settings"]["steps"] == 1
    page = files["--html"].read_text()
    assert "mixed signs" in page and "<script src=" not in page
    assert "written: " in capsys.readouterr().out


def test_the_committed_results_are_of_the_defaults_and_show_what_the_pages_say():
    results = json.loads(RESULTS.read_text(), parse_constant=pytest.fail)
    assert results["settings"] == vars(Settings())
    ours, plain, mixed = results["curves"]
    assert [curve["way"] for curve in results["curves"]] == [way.name for way in WAYS]
    assert results["seconds"]["all"] < 300
    assert ours["reward"][:15] == pytest.approx(plain["reward"][:15], abs=1e-6)
    assert min(ours["reward"][-5:] + plain["reward"][-5:]) > 4 * ours["reward"][0]
    assert max(ours["apart"]) < 2e-6 and set(ours["first_ratio"] + plain["first_ratio"]) == {1.0}
    assert max(mixed["reward"][2:]) == 0 and min(mixed["log_prob"]) > 0 and min(mixed["first_ratio"]) > 1e5


def test_the_table_of_the_page_is_that_of_the_committed_results():
    results = json.loads(RESULTS.read_text())
    page = (RESULTS.parents[2] / "docs/example.md").read_text()
    names = [f"compiled_logprobs (`{results['backend']}`)", "plain torch, float32", "mixed signs"]

    def short(number: float) -> str:
        return re.sub(r"e\+?(-?)0*", r"e\1", f"{number:.2g}")

    table = [
        f"| {name} | {curve['reward'][0]:.2f} → {curve['reward'][-1]:.2f} | {curve['log_prob'][-1]:+.2f} "
        f"| {short(max(curve['first_ratio']))} | {short(max(curve['apart']))}{' nats' if max(curve['apart']) else ''} |"
        for name, curve in zip(names, results["curves"], strict=True)
    ]
    assert re.findall(r"^\| (?:compiled|plain|mixed).*$", page, re.M) == table


@pytest.mark.slow
def test_a_step_from_hidden_states_has_the_gradients_of_one_from_logits(capsys):
    from_hidden.main()
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("from_hidden: ") and second.startswith("from_logits: ")
    assert float(re.search(r"apart by (\S+) of", last)[1]) < 1e-5
