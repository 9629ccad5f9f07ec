"""report.html in headless Chromium: no console error, no request but the file itself, nothing that axe calls serious.

The tests print how long the page takes to open. REFT_SCREENSHOTS=FOLDER keeps the pictures that the docs show.
"""

import io
import json
import os
import re
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image
from test_page import HOSTILE, workdir_with

from reft_jax.page.build import write_page
from reft_jax.run.executions import ExecutionLog, execution, reinforced
from reft_jax.types import Example, Verdict


@pytest.fixture
def opened(browser):
    """Opens a file in a new page; at the end, checks that it complained of nothing and asked for nothing else."""
    pages, said, asked = [], [], []

    def open_file(path: Path, at: str = "", **context):
        one = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | context).new_page()
        one.set_default_timeout(10_000)
        one.on("console", lambda message: said.append(message.text))
        one.on("pageerror", lambda error: said.append(str(error)))
        one.on("dialog", lambda dialog: (said.append("a dialog"), dialog.dismiss()))
        one.on("request", lambda request: asked.append(request.url))
        begun = time.monotonic()
        one.goto(path.as_uri() + at)
        one.wait_for_selector("body[data-ready]", timeout=60_000)
        print(f"{path.stat().st_size / 1e6:.2f} MB opened in {time.monotonic() - begun:.2f} s")
        pages.append((one, path.as_uri()))
        return one

    yield open_file
    assert said == []
    assert {url.partition("#")[0] for url in asked if not url.startswith("blob:")} <= {url for _, url in pages}
    for one, _ in pages:
        one.context.close()


def chosen(shown, item: str) -> None:
    """Waits until this question is shown."""
    shown.locator("#one h3", has_text=re.compile(f"^{item}$")).wait_for()


def picture(shown, name: str, part: str = "") -> None:
    """Keeps a picture if REFT_SCREENSHOTS names a folder; with `part`, of this part of the page."""
    if folder := os.environ.get("REFT_SCREENSHOTS"):
        if part:
            shown.evaluate(f"document.getElementById('{part}').scrollIntoView()")
        image = Image.open(io.BytesIO(shown.screenshot()))
        image.quantize(128).save(Path(folder) / f"{name}.png", optimize=True)


def test_the_page_answers_to_pointer_and_keyboard(tmp_path, opened):
    if not find_spec("uplot"):
        pytest.skip("uplot-python is not installed")
    shown = opened(write_page(workdir_with(tmp_path / "w", 60, samples=15)))
    count, one = shown.locator("#count"), shown.locator("#one")
    assert count.inner_text() == "60 of 60 questions" and "gsm8k_0" in one.inner_text()
    bar = shown.locator("#results .bar i").first
    assert bar.evaluate("one => [one.style.left, one.style.width]") == ["22.73%", "23.21%"]  # Wilson, 20 of 60
    assert shown.locator("#list li").count() == 25 and shown.locator("#back").is_disabled()

    shown.click("#next")  # 1
    assert "gsm8k_25" in shown.locator("#list li").first.inner_text()
    shown.click("#next")  # 2
    assert shown.locator("#list li").count() == 10 and shown.locator("#next").is_disabled()
    shown.click("#back")  # 3
    assert shown.locator("#pages").inner_text() == "Page 2 of 3"

    expected = {"right": 0, "wrong": 0, "none": 0, "changed": 0}
    for q in range(60):
        none = q % 5 == 4
        was, now = not none and q % 3 == 0, not none and (q + 1) % 3 == 0
        expected["none" if none else "right" if now else "wrong"] += 1
        expected["changed"] += was != now
    for name, number in expected.items():  # 4 to 7
        shown.select_option("#filter", name)
        if name == "changed":
            shown.select_option("#other", "0")
        assert count.inner_text() == f"{number} of 60 questions", name
    shown.select_option("#filter", "timeouts")  # 8
    assert 0 < int(count.inner_text().split()[0]) < 60
    shown.select_option("#filter", "right")
    shown.select_option("#model", "0")  # 9
    assert count.inner_text() == "16 of 60 questions"
    shown.select_option("#filter", "all")  # 10
    shown.fill("#search", "APPLES 59")  # 11
    assert count.inner_text() == "1 of 60 questions"
    shown.locator("#list a").first.click()  # 12
    chosen(shown, "gsm8k_59")
    assert shown.url.endswith("#q=test/gsm8k_59") and "style 0.5" in one.inner_text()
    assert one.locator("pre .k").first.inner_text() == "def"
    shown.fill("#search", "")  # 13
    shown.locator("#list a").first.focus()
    shown.keyboard.press("ArrowDown")  # 14
    shown.keyboard.press("Enter")  # 15
    chosen(shown, "gsm8k_1")
    assert shown.evaluate("document.activeElement.id") == "one"
    shown.go_back()  # 16
    chosen(shown, "gsm8k_59")
    cards = one.locator(".card").count()
    one.locator("button.rest").first.click()  # 17
    assert one.locator(".card").count() == cards + 5
    picture(shown, "page_questions", "questions")

    chart = shown.locator("#charts figure").first
    chart.locator(".u-over").hover()  # 18
    assert re.fullmatch(r"iteration 3: 0\.3 \(reward per sample\)", chart.locator("output").inner_text())
    picture(shown, "page", "results")
    chart.locator(".plot").focus()
    shown.keyboard.press("Home")  # 19
    shown.keyboard.press("ArrowRight")
    assert chart.locator("output").inner_text().startswith("iteration 2: 0.2")
    chart.locator("summary").click()  # 20
    assert chart.locator("tbody tr").count() == 5

    assert shown.locator("#sampled .card").count() == 20
    shown.click("#more")  # 21
    assert shown.locator("#sampled .card").count() == 30 and shown.locator("#more").is_disabled()
    shown.select_option("#by", "high")  # 22
    shown.locator("#sampled .card", has_text="advantage 1.9").first.wait_for()
    assert "advantage 1.9, reinforced" in re.sub(r"\s+", " ", shown.locator("#sampled .card").first.inner_text())
    before = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    shown.click("#theme")  # 23
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") != before
    picture(shown, "page_dark", "rollouts")


def test_orders_of_questions_and_of_rollouts(tmp_path, opened):
    expect = pytest.importorskip("playwright.sync_api").expect
    workdir = workdir_with(tmp_path / "w", 12, samples=2)
    numbers = [(0.5, 0.1, 20), (-2.0, 0.3, 5), (1.5, float("nan"), 10), (float("nan"), 0.2, 30)]
    lines = []
    for row, (advantage, gap, length) in enumerate(numbers):
        example, text = Example(f"gsm8k_{row}", "", "1"), "x" * length
        line = execution("reft rollout", example, text, Verdict(1.0, True, 1.0, "ok"), 1.0)
        lines.append(line | reinforced(2, row, text, advantage, gap))
    ExecutionLog(workdir).append(lines)
    right, length = [], []
    for line in (workdir / "samples" / "sft_test.jsonl").read_text().splitlines():
        right.append(sum(one["correctness"] for one in json.loads(line)["predictions"]))
        length.append(max(len(one["completion"]) for one in json.loads(line)["predictions"]))
    for q, line in enumerate((workdir / "samples" / "sft_test.greedy.jsonl").read_text().splitlines()):
        length[q] = max(length[q], len(json.loads(line)["predictions"][0]["completion"]))

    shown = opened(write_page(workdir))
    shown.select_option("#model", "0")
    for order, expected in {
        "hardest": sorted(range(12), key=lambda q: right[q]),
        "longest": sorted(range(12), key=lambda q: -length[q]),
        "id": list(range(12)),
    }.items():
        shown.select_option("#order", order)
        assert shown.locator("#list strong").all_inner_texts() == [f"gsm8k_{q}" for q in expected], order
    for order, rows in {"low": "1023", "gap": "1302", "long": "3021", "high": "2013", "row": "0123"}.items():
        shown.select_option("#by", order)
        expect(shown.locator("#sampled strong")).to_have_text([f"gsm8k_{row}" for row in rows])


def test_the_address_names_the_shown_question_whatever_chose_it(tmp_path, opened):
    expect = pytest.importorskip("playwright.sync_api").expect
    workdir = workdir_with(tmp_path / "w", 30)
    samples = workdir / "samples"
    (samples / "sft_train.jsonl").write_bytes((samples / "sft_test.jsonl").read_bytes())
    (samples / "begun").mkdir()
    (samples / "begun" / "sft.jsonl").write_text('{"schema": 1, "kind": "samples", "made_by": {}, "recorded": {}}\n')
    path = write_page(workdir)

    shown = opened(path, "#q=train/gsm8k_28")  # a link to a question
    chosen(shown, "gsm8k_28")
    assert shown.locator("#set").input_value() == "train"

    shown = opened(path)
    chosen(shown, "gsm8k_0")
    link = shown.locator("#list a", has_text="Question 7:")
    link.click()
    chosen(shown, "gsm8k_7")
    for name in ("train", "test"):
        shown.locator("#set").focus()
        shown.select_option("#set", name)
        chosen(shown, "gsm8k_0")
        assert shown.url.endswith(f"#q={name}/gsm8k_0") and shown.evaluate("document.activeElement.id") == "set"
    link.click()  # the same link once more
    chosen(shown, "gsm8k_7")
    assert shown.url.endswith("#q=test/gsm8k_7")
    shown.select_option("#set", "begun")  # its file has only a header so far
    shown.wait_for_url(re.compile("#q=begun/$"))
    assert shown.locator("#count").inner_text() == "0 of 0 questions" and not shown.locator("#one").inner_text()
    shown.go_back()
    chosen(shown, "gsm8k_7")
    for _ in range(2):
        shown.go_back()
    shown.wait_for_url(re.compile("#q=train/gsm8k_0$"))
    expect(shown.locator("#set")).to_have_value("train")
    for _ in range(2):
        shown.go_back()
    expect(shown.locator("#set")).to_have_value("test")  # no name: the first set
    chosen(shown, "gsm8k_0")
    assert "#" not in shown.url


def test_the_rollouts_of_a_question_in_all_iterations(tmp_path, opened):
    expect = pytest.importorskip("playwright.sync_api").expect
    workdir = workdir_with(tmp_path / "w", 40, samples=2)
    line = execution("reft rollout", Example("gsm8k_1", "", "1"), "text", Verdict(1.0, True, 1.0, "ok"), 1.0)
    ExecutionLog(workdir).append([line | reinforced(2, 0, "text", 0.5, 1e-4)])
    shown = opened(write_page(workdir), "#q=test/gsm8k_39")
    chosen(shown, "gsm8k_39")
    assert shown.locator("#one button.sampled").count() == 0  # no iteration has asked it
    items, said = shown.locator("#sampled strong"), shown.locator("#told")
    expect(items).to_have_text(["gsm8k_1"])  # the last iteration

    shown.locator("#list a", has_text="Question 1:").click()
    chosen(shown, "gsm8k_1")
    shown.click("#one button.sampled")
    expect(items).to_have_text(["gsm8k_1"] * 3)  # two of iteration 1, and not those of gsm8k_10 to gsm8k_14
    assert said.inner_text().startswith("3 rollouts, mean reward 0.333, 1 with a positive advantage")
    assert shown.locator("#sampled .card", has_text="reft rollout 2").count() == 1
    assert shown.url.endswith("#q=test/gsm8k_1") and shown.evaluate("document.activeElement.id") == "item"
    shown.select_option("#iteration", "0")
    expect(items).to_have_text(["gsm8k_1"] * 2)
    shown.fill("#item", "K_14")
    expect(items).to_have_text(["gsm8k_14"] * 2)
    shown.fill("#item", "k_99")
    expect(said).to_have_text("No rollout here is of such a question.")
    assert shown.locator("#more").is_disabled() and items.count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(tmp_path, opened, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    shown = opened(write_page(workdir_with(tmp_path / "w", 30)), color_scheme=scheme, bypass_csp=True)
    found = axe.Axe().run(shown).response["violations"]
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    assert not serious, [(one["id"], [node["html"] for node in one["nodes"]][:3]) for one in serious]


def test_a_phone_has_no_sideways_scrolling(tmp_path, opened):
    path = write_page(workdir_with(tmp_path / "w", 30))
    shown = opened(path, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    assert shown.evaluate("document.documentElement.scrollWidth") <= 360
    picture(shown, "page_phone")


def test_hostile_completions_are_text_and_run_nothing(tmp_path, opened):
    shown = opened(write_page(workdir_with(tmp_path / "w", len(HOSTILE), HOSTILE)))
    shown.select_option("#by", "long")
    while shown.locator("#more").is_enabled():
        shown.click("#more")
    assert shown.locator("#sampled .card").count() == len(HOSTILE)
    for q, text in enumerate(HOSTILE):
        shown.evaluate(f"location.hash = '#q=test/gsm8k_{q}'")
        chosen(shown, f"gsm8k_{q}")
        if len(text) < 100 and text.isascii() and text.isprintable():
            assert shown.locator("#one pre").first.inner_text() == text
    shown.evaluate("location.hash = '#q=test/gsm8k_36'")
    chosen(shown, "gsm8k_36")
    assert shown.locator("#one pre .odd").first.inner_text() == "U+202E"
    shown.evaluate("location.hash = '#q=test/gsm8k_33'")
    shown.locator("#one button.all").first.click()
    assert shown.locator("#one pre").first.evaluate("box => box.textContent.length") == 1_000_000
    assert shown.evaluate("window.ran") is None
    assert shown.locator("#sampled pre *:not(span), #one pre *:not(span)").count() == 0


@pytest.mark.long
def test_a_sweep_of_the_papers_size_opens_and_is_small(tmp_path, opened):
    path = write_page(workdir_with(tmp_path / "w", 1319, samples=100))
    assert path.stat().st_size < 40e6
    shown = opened(path)
    assert shown.locator("#count").inner_text() == "1319 of 1319 questions"
