"""The dashboard in a real browser, on the profile that ships with the project: what no test without one can see.

Any error in the browser's console, and any request to another place than the server, fails the test. Pictures of all
pages are put into build/screenshots, to be looked at.
"""

import re
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not there; `apt-get install chromium` brings it"),
]

PICTURES = Path(__file__).parents[2] / "build" / "screenshots"
PAGES = ["decide", "compare", "throughput", "memory", "sign_check", "live_gpu", "run", "profiles"]
LOOKS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 1600}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 1600}},
    "narrow": {"color_scheme": "light", "viewport": {"width": 390, "height": 1600}},
}
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--disable-sync", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update"),
]
LIMIT_MS = 60_000
STILL = """() => {
    const app = document.querySelector('[data-testid="stApp"]');
    return app && app.getAttribute('data-test-script-state') === 'notRunning' && app.querySelector('h1')
        && !app.querySelector('[data-testid="stSkeleton"]') && !app.querySelector('[data-stale="true"]');
}"""
"""Whether the page has been computed, and all of it is shown."""
DRAWN = "() => [...document.querySelectorAll('.js-plotly-plot')].every(one => one._fullLayout)"
TOO_WIDE = """() => [document.scrollingElement, document.querySelector('[data-testid="stMain"]')]
    .some(element => element.scrollWidth > element.clientWidth + 1)"""
HEIGHT = """() => document.querySelector('[data-testid="stMain"]').scrollHeight"""
SQUARES = """[...document.querySelectorAll('.js-plotly-plot')].flatMap(chart => chart._fullData)
    .filter(trace => (trace.mode || '').includes('text')).flatMap(trace => trace.customdata || [])"""
CLICK_PLACE = """([rows, vocab]) => {
    for (const chart of document.querySelectorAll('.js-plotly-plot')) {
        for (const trace of chart._fullData) {
            const place = (trace.customdata || []).findIndex(([n, v]) => n === rows && v === vocab);
            if (place < 0 || !['markers', 'markers+text'].includes(trace.mode)) continue;
            chart.scrollIntoView({block: 'center'});
            const box = chart.getBoundingClientRect(), {xaxis, yaxis} = chart._fullLayout;
            const along = (axis, value) => axis._offset + axis.c2p(axis.d2c(value));
            return [box.left + along(xaxis, trace.x[place]), box.top + along(yaxis, trace.y[place])];
        }
    }
}"""
"""Where on the screen the square of these N and V is."""


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
        page.goto(f"{server.url}/{name}")
        settle(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def settle(page) -> None:
    page.wait_for_function(STILL)


def has(page, text: str):
    """Wait until the page shows `text`."""
    found = page.get_by_text(text, exact=False).first
    found.wait_for()
    return found


def picture(page, name: str) -> None:
    """Take a picture of all of the page, which scrolls in a frame, as if the screen were as high as it."""
    screen = page.viewport_size
    page.set_viewport_size({**screen, "height": max(screen["height"], page.evaluate(HEIGHT))})
    settle(page)
    page.wait_for_function(DRAWN)
    page.screenshot(path=PICTURES / f"{name}.png", full_page=True)
    page.set_viewport_size(screen)


def number(page, label: str):
    """The field for a number of that label."""
    return page.get_by_role("spinbutton", name=label)


def look_at(page, name: str, look: str) -> None:
    """Nothing is wrong with how the page looks; a picture of it is taken."""
    settle(page)
    picture(page, f"{name}-{look}")
    assert page.get_by_test_id("stException").count() == 0, name
    assert page.locator("h1").count() == 1, name
    assert not page.evaluate(TOO_WIDE), f"{name} is wider than the screen"
    background = page.evaluate("getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor")
    assert (sum(map(int, re.findall("[0-9]+", background)[:3])) > 3 * 128) == (look != "dark"), name


def test_the_landing_page_answers_at_once_and_the_menu_leads_to_all_pages(visit):
    page = visit()
    assert re.match("Use [a-z_]+: [0-9.]+x faster than ", has(page, "x faster than").inner_text())
    for label in ("A call", "Extra memory", "Bandwidth", "Checks passed"):
        has(page, label)
    links = page.get_by_test_id("stSidebarNavLink")
    assert len(links.all_inner_texts()) == len(PAGES)
    for place, name in enumerate(PAGES):
        links.nth(place).click()
        page.wait_for_url(re.compile(rf"/{'' if name == 'decide' else name}(\?.*)?$"))
        look_at(page, name, "light")


@pytest.mark.parametrize(("look", "names"), [("dark", ["decide", "sign_check"]), ("narrow", PAGES)])
def test_pages_in_other_looks(server, visit, look, names):
    page = visit(look=look)
    for name in names:
        page.goto(f"{server.url}/{'' if name == 'decide' else name}")
        look_at(page, name, look)


def test_a_click_on_the_winner_map_sets_the_shape_which_the_next_page_keeps(visit):
    page = visit()
    page.wait_for_function("() => document.querySelector('.js-plotly-plot')?._fullLayout")
    fields = number(page, "N, rows"), number(page, "V, vocabulary")
    before = [int(field.input_value()) for field in fields]
    squares = page.evaluate(SQUARES)
    target = next(square for square in squares if square[0] != before[0] and square[1] != before[1])
    page.mouse.click(*page.evaluate(CLICK_PLACE, target))
    for field, value in zip(fields, target, strict=True):
        sync_api.expect(field).to_have_value(str(value))
    settle(page)
    sync_api.expect(page).to_have_url(re.compile(f"rows={target[0]}.*vocab={target[1]}"))
    page.goto(page.url)
    has(page, f"--rows={target[0]}")
    page.get_by_test_id("stSidebarNavLink").filter(has_text="Throughput").click()
    settle(page)
    sync_api.expect(number(page, "V, vocabulary")).to_have_value(str(target[1]))


def choose(page, label: str, *values: str) -> None:
    """Type values into a box that takes several."""
    box = page.get_by_role("combobox", name=re.compile(label))
    for value in values:
        box.click()
        box.press_sequentially(value)
        box.press("Enter")
    box.press("Escape")
    settle(page)


def test_a_run_survives_a_reload_and_is_cancelled(visit):
    page = visit("run")
    choose(page, "Vocabulary", "512")  # problems so small that each takes about a second
    choose(page, "Rows", "4", "8", "16")
    choose(page, "Backends", "eager")
    budget = number(page, "Seconds for each problem")
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
    has(page, "Leaderboard")
    picture(page, "run-cancelled")
    sync_api.expect(page.get_by_role("button", name="Start")).to_be_enabled()
