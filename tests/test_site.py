"""The documentation site: it builds strictly, every link leads somewhere, and nothing comes from a network.

Building needs the extra `docs`. In Chromium: search works in a page opened as a file, and axe finds nothing serious.
"""

import importlib.util
import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from reft_jax.commands.table import COMMANDS
from reft_jax.settings import SETTINGS

REPO = Path(__file__).resolve().parents[1]


def script(name: str):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, REPO / "docs" / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


# --- what the site is made of


def test_every_picture_is_what_its_script_draws():
    pictures, folder = script("pictures"), REPO / "docs" / "pictures"
    assert sorted(path.stem for path in folder.glob("*.svg")) == sorted(pictures.PICTURES)
    for name, draw in pictures.PICTURES.items():
        assert (folder / f"{name}.svg").read_text() == draw().svg(), f"run docs/pictures.py: {name} is another one"


def listed(nav) -> list[str]:
    """The pages of a navigation, in order."""
    return (
        [nav]
        if isinstance(nav, str)
        else [page for one in (nav.values() if isinstance(nav, dict) else nav) for page in listed(one)]
    )


def test_every_page_is_in_the_navigation_once(tmp_path):
    script("make_site").stage(tmp_path)
    nav = listed(tomllib.loads((REPO / "zensical.toml").read_text())["project"]["nav"])
    assert sorted(nav) == sorted(str(page.relative_to(tmp_path)) for page in tmp_path.rglob("*.md"))


def test_every_setting_command_and_module_is_in_the_reference(tmp_path):
    script("make_site").stage(tmp_path)
    reference = tmp_path / "reference"
    rows = re.findall(r"^\| `([\w.]+)` \| .* \|$", (reference / "settings.md").read_text(), re.M)
    assert sorted(rows) == sorted(SETTINGS)
    assert re.findall(r"^## (\S+)$", (reference / "commands.md").read_text(), re.M) == COMMANDS
    shown = {module for page in reference.glob("*.md") for module in re.findall(r"^::: (\S+)$", page.read_text(), re.M)}
    files = [path for path in (REPO / "reft_jax").rglob("*.py") if path.stat().st_size and path.name != "__main__.py"]
    dotted = {".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__") for path in files}
    assert dotted - shown <= {"reft_jax"} and shown <= dotted


# --- the built site


class Page(HTMLParser):
    """The ids of a page, where it links, and what it loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        self.loads += [found[name] for name in ("src", "href") if tag != "a" and found.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if not importlib.util.find_spec("zensical"):
        pytest.skip("zensical is not installed: pip install -e .[docs]")
    out = tmp_path_factory.mktemp("site")
    script("make_site").build(out)
    return out / "site"


def broken(site: Path) -> list[str]:
    """The links of all pages that lead to no file, or to no place in it."""
    pages, found = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}, []
    for path, page in pages.items():
        for link in page.links + page.loads:
            file, _, anchor = unquote(link).partition("#")
            target = (path.parent / file).resolve() if file else path
            if re.match(r"https?:|mailto:|data:", link):
                continue
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].ids):
                found.append(f"{path.relative_to(site)}: {link}")
    return found


def test_every_link_leads_to_a_page_and_an_anchor(site):
    assert len(list(site.rglob("*.html"))) > 40
    assert broken(site) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "a.html").write_text(
        "<h1 id=here>A</h1><a href=b.html>b</a><a href='a.html#here'>a</a><a href=#no>c</a>"
    )
    assert broken(tmp_path) == ["a.html: b.html", "a.html: #no"]


def test_nothing_is_loaded_from_a_network(site):
    outside = {load for path in site.rglob("*.html") for load in Page(path).loads if re.match(r"(https?:)?//", load)}
    assert outside == set()
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text())


def test_search_finds_settings_and_functions(site):
    index = json.dumps(json.loads((site / "search.json").read_text()))
    assert all(word in index for word in ("rl.kl_coef", "token_rewards", "How can a program end?"))


def test_search_works_in_a_page_that_is_opened_as_a_file(site, browser):
    shown, asked = browser.new_context().new_page(), []
    shown.on("request", lambda request: asked.append(request.url))
    shown.goto((site / "index.html").as_uri())
    shown.keyboard.press("/")
    shown.locator("input[aria-label=Search]").fill("kl_coef")
    shown.locator("[role=option]").first.wait_for(timeout=20_000)
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", ["index", "docs/tutorial", "docs/method", "reference/settings", "reference/engine"])
def test_axe_finds_nothing_serious(site, browser, page, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    shown = browser.new_context(color_scheme=scheme).new_page()
    shown.goto((site / f"{page}.html").as_uri())
    found = axe.Axe().run(shown).response["violations"]
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    assert not serious, [(one["id"], [node["html"] for node in one["nodes"]][:3]) for one in serious]
