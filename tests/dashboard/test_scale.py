"""Fifty thousand decisions: they are read once, with the progress shown; what is looked at then is answered from the index."""

import time
from pathlib import Path

import pytest
from compiled_logprobs_dashboard import data, index
from compiled_logprobs_dashboard import selection as session
from compiled_logprobs_dashboard.tables import throughput as roof
from streamlit.testing.v1 import AppTest

from tests.helpers import dashboard_stores as stores

APP = str(Path(session.__file__).with_name("app.py"))
COUNT = 50_000
ENVIRONMENTS = 4
GENEROUS = 2
"""The landing page takes a tenth of the time that the index takes to build; more than half of it would mean another index."""


class Work:
    """What is done for a look: times of no machine, so that they can be held against limits."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened: list[Path] = []
        self.builds = 0
        for module in (index, data):
            patch.setattr(module, "read_file", self._noting(module.read_file))
        real = index._tables

        def build(*arguments):
            self.builds += 1
            return real(*arguments)

        patch.setattr(index, "_tables", build)

    def _noting(self, real):
        def read(path: Path):
            self.opened.append(path)
            return real(path)

        return read

    def of(self, look) -> tuple[int, int]:
        """How many decisions are opened, and how often tables are built, for `look`."""
        self.opened.clear()
        self.builds = 0
        at = look()
        assert not getattr(at, "exception", None)
        return sum(path.parent.name == "decisions" for path in self.opened), self.builds


class Place:
    """In the place of `st.empty`: notes what the progress bar showed."""

    shown: list[tuple[float, str]]

    def progress(self, share: float, text: str) -> None:
        self.shown.append((share, text))

    def empty(self) -> None: ...


def test_fifty_thousand_decisions_are_read_once(tmp_path, monkeypatch):
    with stores.only(tmp_path / "profiles", tmp_path / "cache", monkeypatch) as where:
        stores.generate(where, COUNT, ENVIRONMENTS)
        work = Work(monkeypatch)
        session._shelf.clear()
        Place.shown = []
        with monkeypatch.context() as patch:
            patch.setattr(session.st, "empty", Place)
            began = time.monotonic()
            assert work.of(session.tables) == (COUNT, 1)
            building = time.monotonic() - began
            assert len(session.tables().decisions) == COUNT
        shares = [share for share, _ in Place.shown]
        assert len(shares) > 3 and shares == sorted(shares) and shares[0] < 0.5
        assert all(f"of {COUNT:,} decisions" in text for share, text in Place.shown if share)

        session._shelf.clear()  # as in a new process
        at = AppTest.from_file(APP, default_timeout=120)
        began = time.monotonic()
        assert work.of(at.run) == (1, 1), "the index, and the decision that is shown"
        landing = time.monotonic() - began
        print(f"index {building:.1f} s, landing page {landing:.1f} s")
        assert landing < building / GENEROUS
        assert at.subheader[0].value.replace("\\", "").startswith("Use cpp")

        for choose in (
            lambda: at.selectbox(key="mode").select("forward").run(),
            lambda: at.selectbox(key="dtype").select("float32").run(),
            lambda: at.selectbox(key="model").select("llama3").run(),
            lambda: at.number_input(key="rows").set_value(96).run(),
        ):
            assert work.of(choose) == (1, 0), "nothing has changed, so that nothing is read again"
        monkeypatch.setattr(session, "LOOK_AGAIN_S", 0.0)  # however long ago that was
        assert work.of(lambda: at.selectbox(key="dtype").select("bfloat16").run()) == (1, 0)
        opened, built = work.of(lambda: at.switch_page("app_pages/throughput.py").run())
        assert 0 < opened <= 2 * roof.MOST and built == 0

        new = stores.problem(64, 999)
        stores.publish(where, stores.good(new))
        opened, built = work.of(lambda: at.switch_page("app_pages/profiles.py").run())
        assert (opened, built) == (1, 1) and work.opened[0] == where.path(stores.here().fingerprint(), new)
        session._shelf.clear()
