"""The dashboard in a real browser: what no test without one can see. One server and one browser serve all tests.

Any error in the browser's console, and any request to another place than the server, fails the test. Pictures of all
pages are put into build/screenshots, to be looked at.
"""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from compiled_logprobs.store.files import Store
from tests.helpers import dashboard_stores as stores
from tests.helpers.dashboard_server import dashboard

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not there; `apt-get install chromium` brings it"),
]

PICTURES = Path(__file__).parents[2] / "build" / "screenshots"
PAGES = {"": "Overview", "shape": "Shape", "correctness": "Correctness", "measure": "Measure"}
SCREEN = {"width": 1440, "height": 900}
LOOKS = {
    "light": {"color_scheme": "light", "viewport": SCREEN},
    "dark": {"color_scheme": "dark", "viewport": SCREEN},
    "narrow": {"color_scheme": "light", "viewport": {"width": 700, "height": 900}},
}
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--disable-sync", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update"),
]
LIMIT_MS = 60_000
THREADS = 1
"""Of a machine whose profile is not among those that ship, which has two."""
STILL = """() => {
    const app = document.querySelector('[data-testid="stApp"]');
    return app && app.getAttribute('data-test-script-state') === 'notRunning' && app.querySelector('h1')
        && !app.querySelector('[data-testid="stSkeleton"]') && !app.querySelector('[data-stale="true"]')
        && [...document.querySelectorAll('.js-plotly-plot')].every(one => one._fullLayout);
}"""
"""Whether the page has been computed, and all of it is shown."""
TOO_WIDE = """() => [document.scrollingElement, document.querySelector('[data-testid="stMain"]')]
    .some(element => element.scrollWidth > element.clientWidth + 1)"""
SQUARE = """([title, rows, vocab]) => {
    const chart = document.querySelector('.js-plotly-plot'), layout = chart._fullLayout;
    const place = layout.annotations.findIndex(one => one.text === title);
    const suffix = place ? String(place + 1) : '', xaxis = layout['xaxis' + suffix], yaxis = layout['yaxis' + suffix];
    const box = chart.getBoundingClientRect(), along = (axis, value) => axis._offset + axis.c2p(axis.d2c(value));
    return [box.left + along(xaxis, rows), box.top + along(yaxis, vocab)];
}"""
"""Where on the screen the square of these N and V is, in the map of that title."""


@pytest.fixture(scope="module")
def server(tmp_path_factory, nvml):
    """A dashboard of a machine with eight GPUs, whose store is emptied and filled by `filled`."""
    folder = tmp_path_factory.mktemp("user")
    settings = {"TMPDIR": str(folder), "OMP_NUM_THREADS": str(THREADS), "LD_LIBRARY_PATH": str(nvml.parent)}
    with dashboard(folder, cwd=folder, FAKE_NVML_GPUS="8", **settings) as running:
        yield running


@pytest.fixture
def filled(server, monkeypatch):
    """Fills the store as a function says."""
    here = dataclasses.replace(stores.here(), cpu_threads=THREADS)
    monkeypatch.setattr(stores, "here", lambda: here)
    where = Store(server.output.parent / "profiles")

    def fill(make) -> Store:
        shutil.rmtree(where.root, ignore_errors=True)
        where.root.mkdir()
        make(where)
        return where

    return fill


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture
def visit(server, browser):
    """Opens pages of the dashboard; at the end, nothing may have gone wrong in any of them."""
    contexts, complaints = [], []
    own = (f"{server.url}/", server.url.replace("http", "ws", 1) + "/", "data:", f"blob:{server.url}/")
    # Streamlit looks for its own place under a page's address first: these 404 tell it that it is not there.
    probe = re.compile(re.escape(server.url) + r"/\w+/_stcore/(health|host-config)")

    def hear(message):
        where = message.location.get("url", "")
        if message.type == "error" and not probe.fullmatch(where):
            complaints.append(f"console: {message.text} ({where})")

    def hold(request):
        if not request.url.startswith(own):
            complaints.append(f"request: {request.url}")

    def open_page(name: str = "", look: str = "light"):
        context = browser.new_context(**LOOKS[look])
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(LIMIT_MS)
        page.on("console", hear)
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        for kind in ("request", "websocket"):
            page.on(kind, hold)
        go(server, page, name)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def go(server, page, name: str) -> None:
    page.goto(f"{server.url}/{name}")
    settle(page)


def settle(page) -> None:
    page.wait_for_function(STILL)


def has(page, text):
    """Wait until the page shows `text`."""
    found = page.get_by_text(text, exact=False).first
    found.wait_for()
    return found


def is_on_first_screen(page, found) -> bool:
    box = found.bounding_box()
    return box is not None and box["y"] >= 0 and box["y"] + box["height"] <= SCREEN["height"]


def open_square(page, *place: str) -> None:
    """Click a square of a map until the page of its shape comes: what is above it may still grow, and move it."""
    for last in (False, False, False, False, True):
        page.mouse.click(*page.evaluate(SQUARE, place))
        try:
            page.wait_for_url(re.compile("/shape"), timeout=LIMIT_MS if last else LIMIT_MS / 10)
            return
        except sync_api.TimeoutError:
            if last:
                raise


def look_at(page, name: str, look: str = "light") -> None:
    """Nothing is wrong with how the page looks; a picture of its first screen is taken."""
    settle(page)
    page.screenshot(path=PICTURES / f"{name}-{look}.png")
    assert page.get_by_test_id("stException").count() == 0, name
    assert page.locator("h1").count() == 1, name
    assert not page.evaluate(TOO_WIDE), f"{name} is wider than the screen"
    background = page.evaluate("getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor")
    assert (sum(map(int, re.findall("[0-9]+", background)[:3])) > 3 * 128) == (look != "dark"), name


STORES = {
    "empty": (lambda where: None, "Nothing was measured on this machine"),
    "one": (stores.SCENARIOS["one"], None),
    "5000": (lambda where: stores.generate(where, 5_000, wrong=1), "WRONG SIGN in 1 of 5,000 decisions"),
}
ANSWERS = {"": "Winner by N and V", "shape": "and it is right", "correctness": "signs first", "measure": "to measure"}


@pytest.mark.parametrize("name", STORES)
def test_the_first_screen_of_every_page_answers(filled, visit, server, name):
    make, said = STORES[name]
    filled(make)
    page = visit()
    for path, title in PAGES.items():
        go(server, page, path)
        sync_api.expect(page.locator("h1")).to_have_text(title)
        is_about_all = name == "empty" and path != "measure"
        if said and (name == "5000" or is_about_all):
            assert is_on_first_screen(page, has(page, said)), path
        if not is_about_all:
            assert is_on_first_screen(page, has(page, ANSWERS[path])), path
        look_at(page, f"{path or 'overview'}-{name}")


@pytest.mark.parametrize("look", ["dark", "narrow"])
def test_pages_in_other_looks(filled, visit, server, look):
    filled(stores.signs)
    page = visit(look=look)
    for path in (*PAGES, "measure?part=machine", "measure?part=profiles", "?tab=compare"):
        go(server, page, path)
        box = has(page, "WRONG SIGN in 2 of 37 decisions").bounding_box()
        assert box["y"] + box["height"] <= SCREEN["height"], path
        look_at(page, re.sub(r"\W", "-", path) or "overview", look)


def test_eight_gpus_fit_one_screen(filled, visit):
    filled(lambda where: None)
    page = visit("measure?part=machine")
    table = page.get_by_test_id("stDataFrame").first
    assert is_on_first_screen(page, table)
    has(page, "every 2 s")
    look_at(page, "eight-gpus")
    rows = page.locator("[data-testid=stDataFrame] canvas table").first.locator("tbody tr")
    sync_api.expect(rows).to_have_count(10)  # eight, a slice of one of them, and the CPU


def test_which_backend_for_qwen3_4096_tokens_bf16_training_and_is_it_right(filled, visit, server):
    """One click answers; links keep what was selected, and so do a reload and going back."""
    filled(stores.signs)
    page = visit()
    open_square(page, "backward, bfloat16", "4096", str(stores.QWEN))
    answer = has(page, re.compile("^Use cpp: 8.00x .* and it is right: passed 2 of 2 checks"))
    settle(page)
    assert is_on_first_screen(page, answer) and is_on_first_screen(
        page, has(page, "N 4,096, V 151,936, bfloat16, backward")
    )
    shape = "vocab=151936&rows=4096&dtype=bfloat16&mode=backward"
    sync_api.expect(page).to_have_url(re.compile(rf"/shape\?profile=[0-9a-f]{{16}}&{shape}&options=&"))
    page.reload()
    has(page, "Use cpp: 8.00x")
    page.get_by_test_id("stPageLink").get_by_text("Correctness", exact=True).click()
    has(page, "signs first")
    settle(page)
    page.go_back()  # one step: the link had the whole address
    page.wait_for_url(re.compile(rf"/shape\?.*{shape}"))
    has(page, "Use cpp: 8.00x")
    settle(page)
    page.get_by_role("link", name="See what is wrong").click()
    has(page, "returns the loss")
    settle(page)
    sync_api.expect(page).to_have_url(re.compile(rf"/correctness\?.*{shape}.*backend=compiled&check=log_prob_sign"))
    page.get_by_test_id("stPageLink").get_by_text("Shape", exact=True).click()
    page.wait_for_url(re.compile(rf"/shape\?.*{shape}"))
    settle(page)
    rows = page.get_by_role("spinbutton", name="N, tokens")
    rows.fill("512")
    rows.press("Enter")
    has(page, "N 512, V 151,936")
    sync_api.expect(page).to_have_url(re.compile("rows=512"))
    has(page, "WRONG there, so not drawn")
    page.go_back()
    sync_api.expect(page).to_have_url(re.compile("rows=4096"))
    sync_api.expect(rows).to_have_value("4096")
    page.go_back()
    page.wait_for_url(re.compile(rf"/correctness\?.*{shape}"))
    has(page, "returns the loss")
    go(server, page, "decide?rows=64")
    sync_api.expect(page).to_have_url(re.compile(r"/shape\?.*rows=64"))
    go(server, page, "nowhere")
    has(page, "There is no page 'nowhere'; these there are: Overview, Shape, Correctness, Measure.")


def choose(page, label: str, *values: str) -> None:
    """Type values into a box that takes several."""
    box = page.get_by_role("combobox", name=re.compile(label))
    for value in values:
        box.click()
        box.press_sequentially(value)
        box.press("Enter")
    box.press("Escape")
    settle(page)


def test_a_model_can_be_typed(filled, visit):
    filled(stores.SCENARIOS["one"])
    page = visit("shape")
    box = page.get_by_role("combobox", name=re.compile("Model, or V"))
    for typed, vocab in (("google/gemma-3-1b-it", 262144), ("50,000", 50000), ("no/model", 50000)):
        box.click()
        box.fill(typed)
        box.press("Enter")
        settle(page)
        sync_api.expect(page).to_have_url(re.compile(f"vocab={vocab}&"))
    has(page, "got model")


def test_a_run_survives_a_reload_and_is_cancelled(filled, visit):
    filled(lambda where: None)
    page = visit("measure")
    choose(page, "Vocabulary", "512")  # problems so small that each takes about a second
    choose(page, "N, tokens", "4", "8", "16")
    choose(page, "Backends", "eager")
    budget = page.get_by_role("spinbutton", name="Seconds for each problem")
    budget.fill("2")
    budget.press("Enter")
    has(page, "--rows=4,8,16 --backend=eager --budget=2")
    page.get_by_role("button", name="Start").click()
    has(page, "A run is going on")
    page.reload()
    has(page, "A run is going on")
    sync_api.expect(page.get_by_role("button", name="Start")).to_be_disabled()
    page.get_by_text(re.compile("[1-9] of 12 problems")).first.wait_for(timeout=2 * LIMIT_MS)
    page.get_by_role("button", name="Cancel").click()
    has(page, "The last run was cancelled")
    assert 1 <= int(has(page, "of 12 problems decided").inner_text().split()[0]) < 12
    look_at(page, "run-cancelled")
    sync_api.expect(page.get_by_role("button", name="Start")).to_be_enabled()
