"""The site of the documentation: `make docs` builds it, strictly, and it needs no other server."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from cluster import ROOT
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort
from once import made_once
from playwright.async_api import async_playwright, expect
from processes import unmeasured

from lesson_server.settings.sources import load

CONFIG = ROOT / "mkdocs.yml"
CHROMIUM = shutil.which("chromium")
WIDTHS = (390, 1280)
LOCAL = re.compile(r"(file|data|blob|about):")
# What a browser loads by itself.
LOADED = {
    "embed": "src", "iframe": "src", "img": "src", "link": "href", "object": "data", "script": "src", "source": "src"
}  # fmt: skip
ELSEWHERE = re.compile(r"([a-z]+:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return made_once(tmp_path_factory, "site", build_site)


def build_site(folder):
    command = (sys.executable, "-m", "mkdocs", "build", "--site-dir", folder)
    environ = unmeasured() | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Loads(HTMLParser):
    """What a page loads, in its order."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        if tag in LOADED and dict(attrs).get(LOADED[tag]):
            self.found.append(dict(attrs)[LOADED[tag]])


def test_no_page_loads_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loads = Loads(page).found
        assert [load for load in loads if ELSEWHERE.match(load)] == []
        local = {load.split("?")[0].split("#")[0] for load in loads if not load.startswith("data:")}
        assert {load for load in local if page.name != "404.html" and not (page.parent / load).exists()} == set()
    for sheet in site.rglob("*.css"):
        assert re.findall(r"@import|url\([\"']?(?!data:)[a-z]*:?//", sheet.read_text("utf-8")) == []


def test_every_snippet_that_a_page_takes_from_a_file_is_there(site):
    """A marker that is misspelt stays in the text, with the colours of code between its signs."""
    texts = {page: re.sub(r"<[^>]*>", "", page.read_text("utf-8")) for page in site.rglob("*.html")}
    assert [page for page, text in texts.items() if re.search(r"--\s*8\s*&lt;", text)] == []
    assert "note_reason" in (site / "clients/python.html").read_text("utf-8")


def test_a_page_with_a_diagram_loads_mermaid_before_the_theme_looks_for_it(site):
    """The theme takes Mermaid from another server if the page has none."""
    with_diagrams = {page for page in site.rglob("*.html") if '<pre class="mermaid">' in page.read_text("utf-8")}
    assert {page.stem for page in with_diagrams} >= {"join_lesson", "leave_seat", "seat_changed", "take_seat"}
    for page in with_diagrams:
        scripts = [Path(load).name for load in Loads(page).found]
        assert scripts.index("mermaid.js") < next(n for n, name in enumerate(scripts) if name.startswith("bundle."))


def test_the_page_of_settings_has_every_setting(site):
    page = (site / "operating/settings.html").read_text("utf-8")
    assert [row.name for row in load(environ={}).rows() if f"<code>{row.name}</code>" not in page] == []


def test_a_file_of_the_repository_that_a_page_links_to_is_on_the_site(site):
    assert "proxy_pass" in (site / "source/conf/nginx.conf.html").read_text("utf-8")
    assert 'href="../source/conf/nginx.conf.html"' in (site / "operating/deploy.html").read_text("utf-8")
    assert (site / "source/CONTRIBUTING.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium")
def test_the_site_works_as_files_without_a_network(io_loop, site):
    """The search finds, the diagrams are drawn, the calculator calculates, and no page is wider than the window."""

    async def story():
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            page = await browser.new_page()
            wrong = []
            page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("request", lambda request: None if LOCAL.match(request.url) else wrong.append(request.url))

            async def open_page(path):
                await page.goto((site / path).as_uri())
                for width in WIDTHS:
                    await page.set_viewport_size({"width": width, "height": 900})
                    assert await page.evaluate("document.documentElement.scrollWidth") <= width

            await open_page("index.html")
            await page.locator(".md-search__input").press_sequentially("upgrade thrown twice")
            found = page.locator(".md-search-result__item a").first
            await expect(found).to_have_attribute("href", re.compile(r"/operating/upgrade\.html\b"))

            await open_page("events/seat_changed.html")
            await expect(page.locator("div.mermaid")).to_have_count(1)  # the theme makes it of the <pre>

            await open_page("sizing.html")
            await page.locator("input[name=participants]").fill("1000000")
            needs = await page.locator("#sizing-needs td:last-child").all_inner_texts()
            table = await page.locator(
                "table:not(:has(#sizing-needs, #sizing-first)) td:nth-child(4)"
            ).all_inner_texts()
            assert needs == table[: len(needs)]
            assert len(needs) > 10
            await browser.close()
            assert wrong == []

    io_loop.run_sync(story, timeout=60)


@pytest.mark.parametrize(
    ("text", "nav"),
    [
        pytest.param("[b](b.md)", ["index.md", "c.md"], id="a link to no page"),
        pytest.param("[b](#c)", ["index.md", "c.md"], id="a link to no anchor"),
        pytest.param("[b](/b)", ["index.md", "c.md"], id="a path on the server"),
        pytest.param("# A", ["index.md"], id="a page outside the navigation"),
    ],
)
def test_a_defect_of_a_page_fails_the_build(build_pages, text, nav):
    with pytest.raises(Abort):
        build_pages(text, nav)


def test_sound_pages_are_built(build_pages):
    build_pages("# A\n\n[a](#a) [c](c.md)", ["index.md", "c.md"])


@pytest.fixture
def build_pages(tmp_path, monkeypatch):
    """Builds two pages with the validation of mkdocs.yml, without its theme and plugins, which take long."""
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")

    def build_pages(text, nav):
        docs = tmp_path / "docs"
        docs.mkdir()
        (docs / "index.md").write_text(text)
        (docs / "c.md").write_text("# C")
        config = load_config(
            str(CONFIG),
            docs_dir=str(docs),
            site_dir=str(tmp_path / "site"),
            nav=nav,
            theme={"name": "mkdocs"},
            extra={},
            extra_css=[],
            hooks=[],
            plugins=[],
        )
        build(config)

    return build_pages
