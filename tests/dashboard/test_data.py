"""What the pages ask of the tables: profiles, shapes, what serves them, and the records behind."""

import dataclasses

import pandas as pd
import pytest
import torch
from compiled_logprobs_dashboard import data, index
from compiled_logprobs_dashboard.data import Shape
from compiled_logprobs_dashboard.looks import plain_in_chart
from hypothesis import given
from hypothesis import strategies as some

from compiled_logprobs.choose import rule
from compiled_logprobs.errors import ProfileError
from compiled_logprobs.policy import Policy
from compiled_logprobs.problem import MODES, Problem, bucket
from tests.helpers import dashboard_stores as stores
from tests.helpers.stored_decisions import CPU


@pytest.fixture
def tables(scenario, tmp_path):
    def load(name: str) -> index.Tables:
        scenario(name)
        return index.load(index.sources(), tmp_path / "index")

    return load


def ours() -> tuple[str, str]:
    return "yours", stores.here().fingerprint()


def test_this_machine_comes_first(tables):
    labels = data.profile_labels(tables("many"))
    assert next(iter(labels.values())) == ours() and len(labels) == 3
    assert all(environment[:8] in label and source in label for label, (source, environment) in labels.items())


def test_the_first_shape_is_of_a_training_step(tables):
    assert data.first_shape(tables("many"), *ours()) == Shape("backward", "bfloat16", 2048, stores.QWEN)
    assert data.first_shape(index.load([], stores.Path("nowhere")), *ours()) == Shape(
        "backward", "bfloat16", 512, stores.QWEN
    )


@pytest.mark.parametrize("rows", [1, 5, 63, 64, 65, 100, 400, 511, 512, 513, 1500, 2048, 5000, 10**6])
def test_what_serves_a_shape_is_what_the_library_says(tables, rows):
    found = tables("many")
    shape = Shape("backward", "bfloat16", rows, stores.QWEN)
    answer = data.answer(found, *ours(), shape)
    problem = Problem("cpu", rows, stores.QWEN, torch.bfloat16, needs_grad=True)
    *_, (step, choice) = rule.walk(rule.context_of(problem, CPU, Policy("lookup")))
    assert answer.problem == bucket(problem)
    kinds = {"stored": "exact", "small": "rule", "near": "nearest", "related": "nearest"}
    assert answer.kind == kinds[step]
    assert (None if answer.key is None else data.decision(found, answer.key)) == choice.decision


def test_nothing_serves_what_was_never_measured(tables):
    found = tables("one")
    for other in (Shape("entropy", "bfloat16", 512, stores.QWEN), Shape("backward", "float16", 512, stores.QWEN)):
        assert data.answer(found, *ours(), other).kind == "none"
    assert data.answer(found, *ours(), Shape("backward", "bfloat16", 512, stores.QWEN + 8)).kind == "none"


def test_modes_without_a_name_can_be_asked_for(scenario, tmp_path):
    where = scenario("one")
    special = stores.problem()._replace(labels_per_row=4, temperature="per_token", masked_logits=True)
    stores.publish(where, stores.good(special))
    found = index.load(index.sources(), tmp_path / "index")
    assert data.modes(found) == [*MODES, special.details()]
    answer = data.answer(found, *ours(), Shape(special.details(), "bfloat16", 500, stores.QWEN))
    assert answer.kind == "exact" and data.decision(found, answer.key).problem == special


def test_the_record_behind_a_row(tables):
    found = tables("many")
    for key in found.decisions["key"].sample(5, random_state=0):
        decision, row = data.decision(found, key), data.row(found, key)
        assert (decision.chosen, decision.problem.rows) == (row["chosen"], row["rows"])
        assert set(data.candidates(found, key)["backend"]) == set(decision.candidates)
        times = data.times(found, key)
        assert set(times) == {name for name, one in decision.candidates.items() if one.seconds is not None}
        assert all(len(series) == decision.rounds for series in times.values())


def test_a_record_that_is_gone_or_broken_says_so(scenario, tmp_path):
    where = scenario("one")
    found = index.load(index.sources(), tmp_path / "index")
    path = where.path(stores.here().fingerprint(), stores.problem())
    assert data.path_of(found, 0) == path
    path.write_text("{")
    with pytest.raises(ProfileError, match="not JSON"):
        data.decision(found, 0)
    path.unlink()
    with pytest.raises(ProfileError, match="no longer there"):
        data.decision(found, 0)
    assert data.evidence(found, 0) is None and data.times(found, 0) == {}


def test_times_that_are_not_stored_are_none(tables):
    found = tables("partial")
    without = found.decisions.loc[found.decisions["rows"] == 512, "key"].iloc[0]
    assert data.times(found, without) == {}


@given(rows=some.integers(1, data.MOST), vocab=some.integers(1, data.MOST))
def test_every_shape_has_an_answer_without_any_profile(rows, vocab):
    empty = index.load([], stores.Path("/nonexistent"))
    answer = data.answer(empty, "yours", "0" * 16, Shape("backward", "float32", rows, vocab))
    assert answer.key is None and answer.kind in ("rule", "none") and answer.problem.rows >= rows


def test_facts_of_a_profile(tables):
    found = tables("other device")
    facts = data.profile_facts(found, "yours", stores.H100.fingerprint())
    known = dataclasses.asdict(stores.H100)
    assert all(facts[name] == value for name, value in known.items())
    assert not facts["here"] and facts["decisions"] == 4
    assert data.profile_facts(found, "yours", "0" * 16) == {}


def test_what_a_figure_draws():
    import plotly.graph_objects as go

    figure = go.Figure([go.Scatter(name="<b>a\n", x=[1, 2], y=[3, 4]), go.Bar(y=[5])])
    pd.testing.assert_frame_equal(
        data.drawn(figure), pd.DataFrame({"name": ["<b>a ", "<b>a ", ""], "x": ["1", "2", "0"], "y": ["3", "4", "5"]})
    )
    name = plain_in_chart("<b>x</b> & $y$")
    shown = data.drawn(go.Figure(go.Bar(x=[1], y=[name], name=name)))
    assert shown["name"].tolist() == shown["y"].tolist() == ["<b>x</b> & \uff04y\uff04"], "escaped for the chart alone"
    assert data.drawn(go.Figure()).empty
