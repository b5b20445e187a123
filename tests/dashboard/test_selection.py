"""What is selected is in the address, also after links, changes and going back; what is not there is said."""

import pytest
import torch
from compiled_logprobs_dashboard import selection

from compiled_logprobs.problem import Problem, as_it_lies
from tests.helpers import dashboard_stores as stores
from tests.helpers.dashboard_pages import links_of, opened, text_of


@pytest.mark.parametrize(
    "special",
    [
        {},
        {"temperature": "number", "layout": "slice", "entropy": True},
        {"temperature": "per_token", "labels_per_row": 4, "masked_logits": True, "layout": "rows"},
        {"out_dtype": torch.bfloat16, "sum_p_squared": True, "aligned": False},
        {"hidden": 4096, "weight_grad": True, "softcap": True, "memory_limit": 2**29},
    ],
)
def test_options_say_what_a_problem_is(special):
    problem = as_it_lies(stores.problem()._replace(**special))
    fields = {}
    for option in selection.options_of(problem):
        fields |= selection.fields_of(option)
    assert as_it_lies(Problem("cpu", 512, stores.QWEN, torch.bfloat16, needs_grad=True, **fields)) == problem
    with pytest.raises(ValueError, match="is none of temperature"):
        selection.fields_of("no-such")


SHAPE = {"vocab": "50257", "rows": "100", "dtype": "float32", "mode": "forward", "options": ""}


@pytest.mark.slow
def test_a_link_selects_and_every_page_keeps_it_in_its_address(scenario):
    scenario("many")
    at = opened("shape", rows=100, vocab="gpt2", mode="forward", dtype="fp32")
    for page in ("shape", "overview", "correctness", "measure", "shape"):
        at.switch_page(f"app_pages/{page}.py").run()
        address = {name: at.query_params[name] for name in SHAPE}
        assert address == SHAPE and at.query_params["profile"] == stores.here().fingerprint(), page
        assert all("rows=100" in url and "vocab=50257" in url for url in links_of(at).values()), page
    assert at.number_input(key="rows").value == 100 and "nearest: N = 64" in text_of(at)
    at.number_input(key="rows").set_value(64).run()
    assert at.query_params["rows"] == "64" and "measured" in text_of(at)
    at.query_params["rows"] = "100"  # as the browser does when somebody goes back
    assert at.run().number_input(key="rows").value == 100 and not at.exception
    at.multiselect(key="options").set_value(["entropy"]).run()
    assert at.query_params["options"] == "entropy" and "no entropy at N = 64" in text_of(at)


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["x", 10**30, -1, "9" * 400], ids=lambda rows: str(rows)[:5])
def test_a_link_that_leads_nowhere_says_so_and_falls_back(scenario, rows):
    scenario("one")
    at = opened("shape", rows=rows, mode="<script>", dtype="int4", profile="../../etc", options="nonsense", free="nan")
    said = text_of(at)
    assert not at.exception and "Use cpp" in said and "There is no profile '../../etc' here" in said
    for name in ("rows", "mode", "dtype", "options"):
        assert f"The link's {name}: " in said
    assert at.query_params["profile"] == stores.here().fingerprint()
    assert "There is no page 'nowhere'; these there are: Overview, Shape" in text_of(opened(page="nowhere"))


@pytest.mark.slow
def test_another_machines_profile_is_one_click_away_and_never_the_default(scenario):
    scenario("other device")
    for page in ("overview", "shape", "correctness"):
        at = opened(page)
        assert "Nothing was measured on this machine" in str([one.proto.title for one in at.info]) and not at.exception
        assert "Use " not in text_of(at) and not at.get("plotly_chart")
        links = links_of(at)
        (other,) = (label for label in links if label.startswith("Look at another machine's profile"))
        assert "H100" in other and any(label.startswith("**Measure this machine**") for label in links)
    foreign = stores.H100.fingerprint()
    assert f"profile={foreign}" in links[other]
    at = opened("shape", profile=foreign, rows=2048)
    assert "Another machine's profile" in text_of(at) and "Use compiled" in text_of(at)
    assert "stale: measured with torch 2.12.0" in text_of(at)
