"""The page Profiles: what is listed, and what is taken along and brought in."""

import dataclasses

import pytest

from compiled_logprobs.store.files import Store
from compiled_logprobs.store.transfer import export_archive
from tests.helpers import dashboard_stores as stores
from tests.helpers.dashboard_pages import opened, table_of, text_of

pytestmark = pytest.mark.slow


def files(where: Store) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in where.root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "counts"), [("many", [2, 4, 36]), ("corrupt", [1]), ("hostile", [1]), ("undecided", [1])]
)
def test_it_lists_every_kind_of_store(scenario, name, counts):
    scenario(name)
    at = opened("profiles")
    table = table_of(at, "decisions", "stale")
    assert not at.exception and sorted(table["decisions"]) == counts and set(table["source"]) == {"yours"}
    assert table["undecided"].sum() == (name == "undecided")
    broken = table_of(at, "reason", "path")
    assert (broken is not None) == (name == "corrupt") and (broken is None or len(broken) == 5)


def test_an_archive_and_a_report_can_be_taken_along(scenario):
    where = scenario("one")
    at = opened("profiles")
    at.button(key="prepare").click().run()
    archive, _ = export_archive(where, [stores.here().fingerprint()])
    assert not at.exception and [one.label for one in at.get("download_button")] == [f"Download {len(archive):,} bytes"]
    at.button(key="make_report").click().run()
    assert not at.exception and at.get("download_button")[0].label.startswith("Download ")
    where.path(stores.here().fingerprint(), stores.problem()).write_text("{")  # in place, so that no folder changes
    with pytest.warns(RuntimeWarning, match="is passed over"):
        at.button(key="prepare").click().run()
    assert not at.exception and "holds no decision" in text_of(at)


def test_an_upload_is_shown_before_it_is_stored(scenario, tmp_path):
    where, elsewhere = scenario("no profile"), Store(tmp_path / "elsewhere")
    stores.publish(elsewhere, stores.good())
    odd = dataclasses.replace(stores.H100, gpu_name=stores.HOSTILE)
    stores.publish(elsewhere, stores.good(stores.problem(64, device="cuda"), reason=stores.HOSTILE), odd)
    at = opened("profiles")
    content, _ = export_archive(elsewhere)
    at.file_uploader(key="upload").upload("../../evil.tar.gz", content, "application/gzip").run()
    assert not at.exception and files(where) == {} and set(at.dataframe[-1].value["fate"]) == {"added"}
    assert "2 decisions, 2 of which would be stored" in text_of(at)
    at.button(key="store").click().run()
    assert not at.exception and "Done: 2 added" in text_of(at)
    stored, sent = ({name.replace(str(store.root), "") for name in files(store)} for store in (where, elsewhere))
    assert stored == sent, "no name of a file is used"
    assert where.read(stores.here().fingerprint(), stores.problem()).chosen == "cpp"


def test_a_bad_upload_changes_nothing(scenario):
    where = scenario("one")
    before = files(where)
    at = opened("profiles")
    for content in (b"<script>", export_archive(where)[0][:-100]):
        at.file_uploader(key="upload").upload("x.tar.gz", content, "application/gzip").run()
        assert not at.exception and files(where) == before
        assert "the archive cannot be used" in text_of(at) and "store" not in [one.key for one in at.button]
