"""The page Profiles, in Streamlit's own test harness."""

from pathlib import Path

import pytest
from compiled_logprobs_dashboard import selection as session
from compiled_logprobs_dashboard import uploads
from streamlit.testing.v1 import AppTest

from compiled_logprobs.store.files import Store
from tests.dashboard.test_decide import text_of
from tests.dashboard.test_uploads import archive, files
from tests.helpers import dashboard_stores as stores

APP = str(Path(session.__file__).with_name("app.py"))


def opened() -> AppTest:
    at = AppTest.from_file(APP, default_timeout=60).run()
    return at.switch_page("app_pages/profiles.py").run()


@pytest.mark.parametrize("name", stores.SCENARIOS)
def test_it_lists_every_kind_of_store(scenario, name):
    scenario(name)
    at = opened()
    assert not at.exception
    listed = [one.value for one in at.dataframe]
    table = next((one for one in listed if "decisions" in one), None)
    if name == "no profile":
        assert table is None and "No profile is stored yet" in text_of(at)
        return
    counts = {
        "one": [1],
        "many": [36, 2, 4],
        "corrupt": [1],
        "partial": [2],
        "other device": [4],
        "all failed": [2],
        "hostile": [1],
    }
    assert sorted(table["decisions"]) == sorted(counts[name]) and set(table["source"]) == {"yours"}
    broken = next((one for one in listed if "reason" in one and "path" in one), None)
    assert (broken is not None) == (name == "corrupt")
    if broken is not None:
        assert len(broken) == 10 and "10 files are passed over" in text_of(at)


def test_an_archive_and_a_report_can_be_taken_along(scenario):
    where = scenario("one")
    at = opened()
    at.button(key="prepare").click().run()
    content, left_out = uploads.archive_of(where, stores.here().fingerprint(), evidence=True)
    assert not at.exception and not left_out
    assert [one.label for one in at.get("download_button")] == [f"Download {len(content):,} bytes"]
    at.button(key="make_report").click().run()
    assert not at.exception and at.get("download_button")[0].label.startswith("Download ")


def test_what_cannot_be_exported_says_why(scenario):
    scenario("hostile")
    at = opened()
    at.button(key="prepare").click().run()
    assert not at.exception and at.error and "Left out" not in text_of(at)
    assert "no decision" in at.error[0].value.replace("\\", "")


def test_an_upload_is_shown_before_it_is_stored(scenario, tmp_path):
    where = scenario("no profile")
    content = archive(tmp_path, "one")
    at = opened()
    at.file_uploader(key="upload").upload("../../evil.jsonl", content, "application/jsonl").run()
    assert not at.exception and files(where) == {}
    assert at.dataframe[-1].value["fate"].tolist() == [
        "added"
    ] and "1 decisions, 1 of which would be stored" in text_of(at)
    at.button(key="store").click().run()
    assert not at.exception and "Done: 1 added" in text_of(at)
    assert where.read(stores.here().fingerprint(), stores.problem())["chosen"] == "cpp"
    assert all(str(where.root) in name and "evil" not in name for name in files(where)), "no name of a file is used"
    assert set(files(where)) == set(files(Store(where.root)))


@pytest.mark.parametrize(
    "content", [b"", b"[" * 100_000, b'{"archive": NaN}', b"<script>"], ids=["empty", "deep", "NaN", "markup"]
)
def test_a_bad_upload_changes_nothing(scenario, content):
    where = scenario("one")
    before = files(where)
    at = opened()
    at.file_uploader(key="upload").upload("x.jsonl", content, "application/jsonl").run()
    assert not at.exception and files(where) == before
    assert at.error and "the archive cannot be used" in at.error[0].value.replace("\\", "")
    assert "store" not in [one.key for one in at.button]
