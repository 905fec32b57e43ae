"""The console in a real browser, on one of two nodes, while the simulators join lessons on the other node.

Chromium is Debian's package; without it these tests are skipped. With ``SCREENSHOTS=folder`` they leave pictures.
"""

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from axe_playwright_python.async_playwright import Axe
from clients import client, join
from cluster import KEY, free_port
from playwright.async_api import async_playwright, expect
from processes import unmeasured
from waiting import until

from lesson_server.http import console, figures, stream, trial, watch
from lesson_server.server import LessonServer
from lesson_server.settings.sources import load

CHROMIUM = shutil.which("chromium")
OPTIONS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
STATIC = ROOT / "lesson_server/http/static"
CLIENT = ROOT / "tests/js/node_modules/socket.io-client/dist/socket.io.esm.min.js"
SCREENSHOTS = os.environ.get("SCREENSHOTS")
TOKEN = "the admin token of the tests"
WIDTHS = (360, 1440)
SCHEMES = ("light", "dark")

expect.set_options(timeout=20_000)  # milliseconds: for what always comes

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium")


@pytest.fixture(autouse=True)
def quick_pages(monkeypatch):
    """What is shown is renewed ten times as often as in production, and a lost stream is resumed ten times as soon."""
    for module, name in (
        (console, "LOOK_INTERVAL"),
        (console, "READ_INTERVAL"),
        (figures, "PUBLISH_INTERVAL"),
        (watch, "READ_INTERVAL"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name) / 10)
    monkeypatch.setattr(stream, "RETRY", stream.RETRY // 10)


async def play_quickly(page):
    """The page shows the steps of a join one after the other, as ever, but each for 10 ms only."""
    script = (STATIC / "playback.js").read_text()
    script, count = re.subn(r"^const PACE = \d+;$", "const PACE = 10;", script, flags=re.MULTILINE)
    assert count == 1
    await page.route("**/playback.js*", lambda route: route.fulfill(body=script, content_type="text/javascript"))


class Browser:
    """A browser, and what went wrong in its pages."""

    def __init__(self, browser):
        self._browser = browser
        self.wrong = []

    async def open(self, url, **options):
        context = await self._browser.new_context(**options)
        page = await context.new_page()
        page.on("console", lambda message: self._note(message.type in ("error", "warning"), message.text))
        page.on("pageerror", lambda error: self._note(True, str(error)))
        page.on("request", lambda request: self._note(not request.url.startswith(url), f"request to {request.url}"))
        return page

    def _note(self, is_wrong, text):
        if is_wrong:
            self.wrong.append(text)


@contextlib.asynccontextmanager
async def browser():
    """A browser in whose pages nothing went wrong."""
    async with async_playwright() as playwright:
        launched = await playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        opened = Browser(launched)
        yield opened
        await launched.close()
        assert opened.wrong == []


@contextlib.contextmanager
def simulator(server, name, *arguments):
    """A simulator whose clients stay in their lesson until the end of the ``with``."""
    command = [sys.executable, SCRIPTS / f"simulate_{name}.py", "--url", server.url, "--key", KEY, "--hold", "60"]
    process = subprocess.Popen([*command, *arguments], env=unmeasured(), stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def log_in(page, url):
    await page.goto(f"{url}/console")
    await expect(page).to_have_url(f"{url}/console/login")
    await page.get_by_label("Admin token").fill(TOKEN)
    await page.get_by_role("button", name="Log in").click()
    await expect(page).to_have_url(f"{url}/console")


async def is_pleasant(page, name, *, axe=True):
    """No sideways scrolling at both widths and in both schemes, and nothing that axe-core finds in each of them."""
    for width in WIDTHS:
        for scheme in SCHEMES:
            await page.set_viewport_size({"width": width, "height": 900})
            await page.emulate_media(color_scheme=scheme)
            await page.wait_for_function(
                "([width, scheme]) => innerWidth === width && matchMedia(`(prefers-color-scheme: ${scheme})`).matches",
                arg=[width, scheme],
            )
            if SCREENSHOTS:
                await page.wait_for_timeout(100)  # for the layout of the screenshot only
                await page.screenshot(path=Path(SCREENSHOTS) / f"{name}-{width}-{scheme}.png", full_page=True)
            assert await page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0, (name, width)
            if not axe or (width, scheme) not in ((360, "dark"), (1440, "light")):
                continue  # axe-core has seen the width and the scheme
            found = await Axe().run(page)
            assert found.violations_count == 0, (name, width, scheme, found.generate_report())


def test_an_operator_sees_both_nodes_and_removes_somebody(io_loop, start_server, mint):
    here, there = (start_server(LESSON_ADMIN_TOKEN=TOKEN) for _ in range(2))

    async def story():
        async with browser() as chromium:
            page = await chromium.open(there.url)
            await log_in(page, there.url)
            await expect(page.get_by_text("Nobody has joined a lesson")).to_be_visible()
            with (
                simulator(here, "teacher", "--lesson", "1"),
                simulator(here, "participants", "--lesson", "1", "--count", "9", "--guests", "2", "--seats"),
            ):
                async with client(there, client="participant", lesson_id="1", access_token=mint("anna")) as anna:
                    assert (await join(anna))["status"] == "SUCCESS"
                    await anna.call("take_seat", {"seat": 12})
                    row = page.get_by_role("row").filter(has=page.get_by_role("link", name="1", exact=True))
                    await expect(page.locator("[data-figure=participants]")).to_have_text("8")
                    await expect(page.locator("[data-figure=teachers]")).to_have_text("1")
                    await expect(page.locator("[data-figure=guests]")).to_have_text("2")
                    await expect(page.locator("[data-figure=connections]")).to_have_text("11")
                    await expect(page.locator("#nodes tbody tr")).to_have_count(2)
                    await expect(row.locator(".taken")).to_have_text("8")
                    await expect(page.locator("#stream-mark")).to_have_text("Live")
                    await is_pleasant(page, "overview")
                    await row.get_by_role("link").click()
                    await expect(page.get_by_role("heading", name="Lesson 1")).to_be_visible()
                    await expect(page.locator("#people tbody tr")).to_have_count(9)
                    await is_pleasant(page, "lesson")
                    person = page.locator("#people tbody tr").filter(has_text="anna")
                    await person.get_by_role("button").click()
                    dialog = page.get_by_role("dialog")
                    await dialog.get_by_role("button", name="Cancel").click()
                    await expect(person).to_be_visible()  # asked once, nobody is removed
                    await person.get_by_role("button").click()
                    await dialog.get_by_role("button", name="Remove anna").click()
                    await expect(person).to_have_count(0)
                    await until(lambda: not anna.connected)
            await expect(page.get_by_text("Nobody is in this lesson")).to_be_visible()
            await page.get_by_role("button", name="Log out").click()
            await expect(page).to_have_url(f"{there.url}/console/login")
            await is_pleasant(page, "login")

    io_loop.run_sync(story, timeout=90)


LONG_NAME = "a" * 128  # as long as an id may be


def test_an_operator_sees_who_sits_where_within_two_seconds(io_loop, start_server, sql, mint):
    here, there = (start_server(LESSON_ADMIN_TOKEN=TOKEN, LESSON_SEATS_GRACE="8") for _ in range(2))
    live = {"timeout": 2_000}
    sql.execute("INSERT INTO lessons (id, seat_count) VALUES ('huge', 10000)")

    async def story():
        async with browser() as chromium:
            page = await chromium.open(there.url)
            await log_in(page, there.url)
            await page.goto(f"{there.url}/console/lessons/1")
            seat = {number: page.locator(f'[data-seat="{number}"]') for number in (5, 7)}
            taken = page.locator("[data-figure=taken]")
            async with (
                client(here, client="participant", lesson_id="1", access_token=mint("anna")) as anna,
                client(here, client="participant", lesson_id="1", access_token=mint(LONG_NAME)) as somebody,
            ):
                await asyncio.gather(join(anna), join(somebody))
                await expect(seat[5]).to_have_text(re.compile("free"))
                await anna.call("take_seat", {"seat": 5})
                await expect(seat[5]).to_have_text(re.compile("anna"), **live)
                await expect(taken).to_have_text("1")
                await anna.call("take_seat", {"seat": 7})
                await expect(seat[7]).to_have_text(re.compile("anna"), **live)
                await expect(seat[5]).to_have_text(re.compile("free"))
                await somebody.call("take_seat", {"seat": 5})
                await expect(seat[5]).to_have_text(re.compile(LONG_NAME), **live)
                await expect(page.get_by_role("row").filter(has_text=LONG_NAME).first).to_be_visible()
                await is_pleasant(page, "seats")
                await anna.disconnect()
                await expect(seat[7]).to_have_text(re.compile("away.*anna"), **live)
                await expect(page.get_by_text("2 taken, 1 of them kept for people who are away")).to_be_visible()
                await is_pleasant(page, "seats-away")
                await expect(seat[7]).to_have_text(re.compile("free"))  # after the grace
                await somebody.call("leave_seat")
                await expect(taken).to_have_text("0", **live)
            async with client(here, client="participant", lesson_id="huge", access_token=mint("anna")) as anna:
                await join(anna)
                await page.goto(f"{there.url}/console/lessons/huge")
                await anna.call("take_seat", {"seat": 9_999})
                cell = page.get_by_role("gridcell", name="Seat 9999: anna", include_hidden=True)
                await expect(cell).to_have_count(1, **live)
                await page.get_by_role("gridcell").first.press("Control+End")
                await page.keyboard.press("ArrowLeft")
                await expect(page.locator("#seat-readout")).to_have_text("Seat 9999: anna")
                await is_pleasant(page, "seats-huge", axe=False)  # ten seconds for what it has seen with fewer seats
                await page.goto(f"{there.url}/console")
                row = page.get_by_role("row").filter(has=page.get_by_role("link", name="huge", exact=True))
                await expect(row.locator(".taken")).to_have_text("1")

    io_loop.run_sync(story, timeout=120)


@pytest.mark.skipif(not CLIENT.is_file(), reason="needs npm, which installs the package socket.io-client")
def test_a_newcomer_sees_the_chart_of_a_join_walk(io_loop, environ, monkeypatch):
    monkeypatch.setattr(trial, "CLIENT", CLIENT)
    server = LessonServer(load(environ=environ), is_embedded=True)

    async def story():
        await server.start()
        async with browser() as chromium:
            page = await chromium.open(server.url)
            await play_quickly(page)
            await page.goto(server.url)
            await page.get_by_role("link", name="Try a join").first.click()
            await page.get_by_label("Name").fill("anna")
            await page.get_by_role("button", name="Join", exact=True).click()
            await expect(page.get_by_text('"SUCCESS"')).to_be_visible(timeout=20_000)
            for step in ("check_lesson_exists", "ensure_seat_map", "set_client_presence"):
                await expect(
                    page.get_by_role("cell", name=step).or_(page.locator("li", has_text=step)).first
                ).to_be_visible()
            await is_pleasant(page, "try")
            await page.get_by_role("button", name="Take a seat").click()
            await expect(page.get_by_text('"seat": 1')).to_be_visible()
            await expect(page.locator("li", has_text="set_seat")).to_be_visible()
            await expect(page.locator("li", has_text='seat_changed{"seat":1,"client_id":"anna"}')).to_be_visible()
            await expect(page.locator(".chart:visible")).to_have_attribute("data-event", "take_seat")
            await is_pleasant(page, "try-seat")
            await page.get_by_role("button", name="Disconnect").click()
            await expect(page.locator("li", has_text="remove_presence")).to_be_visible()
            await expect(page.locator("li.log-transition")).to_have_text("disconnect")
            await until(lambda: not server.gateway.connections)
            await page.get_by_label("Lesson", exact=True).fill("no-such-lesson")
            await page.get_by_role("button", name="Join", exact=True).click()
            await expect(page.get_by_text("lesson no-such-lesson not found").first).to_be_visible(timeout=20_000)
        await server.stop()

    io_loop.run_sync(story, timeout=90)


def test_a_lost_stream_is_marked_and_resumed(io_loop, environ):
    async def story():
        port = free_port()
        settings = load(environ={**environ, "LESSON_ADMIN_TOKEN": TOKEN, "LESSON_SERVER_PORT": str(port)})
        server = LessonServer(settings)
        await server.start()
        async with browser() as chromium:
            page = await chromium.open(server.url)
            await log_in(page, server.url)
            mark = page.locator("#stream-mark")
            await expect(mark).to_have_attribute("data-status", "live")
            await server.stop()
            await expect(mark).to_have_attribute("data-status", "lost")
            assert chromium.wrong  # the browser itself reports the refused connections
            server = LessonServer(settings)
            await server.start()
            await expect(mark).to_have_attribute("data-status", "live")
            chromium.wrong.clear()
        await server.stop()

    io_loop.run_sync(story, timeout=90)
