"""report.html: what it holds, that hostile completions are text, and what it does in headless Chromium.

In Chromium: no console error, no request besides the file itself, nothing that axe calls serious. The tests print how
long the page takes to open. REFT_SCREENSHOTS=FOLDER keeps the pictures that the docs show.
"""

import io
import json
import os
import random
import re
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from reft_jax.commands.look import run_look
from reft_jax.evaluation.records import answered, prediction
from reft_jax.page.build import page, write_page
from reft_jax.page.collect import question, read_answered, read_log, summary
from reft_jax.page.text import item_text
from reft_jax.run.executions import ExecutionLog, execution, reinforced
from reft_jax.store import short_hash
from reft_jax.types import Example, InputError, Verdict

RUN = "window.ran = 1"
HOSTILE = [
    f"</script><script>{RUN}</script>",
    f"<script>{RUN}</script>",
    f"</SCRIPT ><sCript>{RUN}</sCript>",
    f"<!--<script>{RUN}</script>",
    f"--><script>{RUN}</script>",
    f"]]><script>{RUN}</script>",
    f"</pre><script>{RUN}</script>",
    f"</style><script>{RUN}</script>",
    f"</title><script>{RUN}</script>",
    f"</textarea><script>{RUN}</script>",
    f"<img src=x onerror='{RUN}'>",
    f"<svg onload='{RUN}'>",
    f"<svg><script>{RUN}</script></svg>",
    f"<body onload='{RUN}'>",
    "<iframe srcdoc='<script>parent.ran=1</script>'></iframe>",
    "<iframe src='javascript:parent.ran=1'></iframe>",
    f"<a href='javascript:{RUN}'>here</a>",
    f"<details open ontoggle='{RUN}'>",
    f"<input autofocus onfocus='{RUN}'>",
    f"<video><source onerror='{RUN}'></video>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'>",
    "<link rel=stylesheet href=http://127.0.0.1:9/x.css>",
    "<img src=http://127.0.0.1:9/x.png>",
    "<base href=http://127.0.0.1:9/>",
    "<form action=http://127.0.0.1:9/><button autofocus>x</button></form>",
    "<object data=http://127.0.0.1:9/x></object>",
    "<style>*{display:none}</style>",
    "${" + RUN + "}`${" + RUN + "}`",
    "{{ 7 * 7 }}{% for x in () %}{{ cycler.__init__.__globals__ }}",
    f'"); {RUN}; ("',
    f"'; {RUN}; //",
    f"\\u003cscript\\u003e{RUN}\\u003c/script\\u003e",
    f"&lt;script&gt;{RUN}&lt;/script&gt;&#60;img&#62;",
    "x" * 1_000_000,
    "\n" * 20_000,
    "\x00\x01\x07\x08\x0b\x0c\x1b[31m\x1b]0;title\x07\x7f\x9b",
    "safe \u202e;)'tpircs' \u2066hidden\u2069\u200f\u061c",
    "\u2028\u2029 line ends of JavaScript \ufeff\u200b\u200d",
    "lone \ud800 and \udfff surrogates",
    "__proto__",
    "\U000e0041\U000e0042 tags, e\u0301" + "\u0301" * 500,
    '"""' + "'" * 30_001,
]


def workdir_with(folder: Path, questions: int, texts=None, samples=3, models=("sft", "reft"), title="A run") -> Path:
    """A work directory with answers of every model, metrics, a report and one iteration of rollouts."""
    rng = random.Random(0)
    (folder / "samples").mkdir(parents=True)
    (folder / "reft").mkdir()
    metrics = [{"step": i, "reward": i / 10, "sampler_gap": 1e-5} for i in range(1, 6)]
    (folder / "reft" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    log, written = [], []
    for model in models:
        for suffix, n in (("", samples), (".greedy", 1)):
            lines = []
            for q in range(questions):
                example = Example(f"gsm8k_{q}", f"Question {q}: how many apples are {q} apples?", str(q))
                found = []
                for i in range(n):
                    right = (q + i + (model == "reft")) % 3 == 0
                    value = None if (q + i) % 5 == 4 else float(q if right else q + 1)
                    work = "".join(f"    step_{k} = {rng.randrange(1000)} * {rng.randrange(90)}\n" for k in range(4))
                    text = (
                        texts[q]
                        if texts
                        else f'def solution():\n    """{example.question}"""\n{work}    return {value}'
                    )
                    status = "timeout" if value is None and not q % 2 else "ok"
                    verdict = Verdict(value, right and value is not None, float(right), status, {"style": 0.5})
                    found.append(prediction(text, verdict))
                    log.append(execution(f"{model} test", example, text, verdict, 1.5))
                    written.append(text)
                lines.append(json.dumps(answered(example, found)))
            (folder / "samples" / f"{model}_test{suffix}.jsonl").write_text("\n".join(lines) + "\n")
    rollouts = [line | reinforced(1, i, written[i], i / 10 - 1, 1e-4) for i, line in enumerate(log[:30])]
    if texts:
        rollouts = [log[i] | reinforced(1, i, text, 0.5, 1e-4) for i, text in enumerate(texts)]
    ExecutionLog(folder).append(log[:5000] + [line | {"purpose": "reft rollout"} for line in rollouts])
    counts = {"correct": questions // 3, "total": questions}
    curve = [{"k": k, "voting": 0.1 * k, "upper_bound": 0.2 * k} for k in (1, 2, 3)]
    rows = [{"model": m, "n": samples, "top1": counts, "voting": counts, "curve": curve} for m in models]
    report = {"title": title, "n": samples, "test_questions": questions, "chosen_on": "", "rows": rows}
    report |= {"comparisons": [], "notes": ["A note."], "settings": {"seed": 1}, "seconds": {}}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_a_page_without_anything_can_be_made(tmp_path):
    (tmp_path / "samples").mkdir()
    assert "There is no table yet" in page(tmp_path)


def test_a_folder_that_is_no_work_directory_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a work directory; name the folder that a run writes to"):
        run_look(tmp_path)


def test_no_completion_is_in_the_file_as_it_is(tmp_path):
    text = write_page(workdir_with(tmp_path / "w", len(HOSTILE), HOSTILE, title="A <run>")).read_text()
    assert len(HOSTILE) >= 36
    assert RUN not in text and "127.0.0.1" not in text and "\u202e" not in text and "\x1b" not in text
    assert text.count("</script>") == text.count("<script")
    assert "A &lt;run&gt;" in text


def test_the_terminal_twin_shows_every_answer_and_escapes(tmp_path):
    workdir = workdir_with(tmp_path / "w", len(HOSTILE), HOSTILE)
    odd = [q for q, text in enumerate(HOSTILE) if not text.replace("\n", "").isprintable()]
    shown = {q: item_text(workdir, f"gsm8k_{q}") for q in (0, 33, *odd)}
    assert len(odd) >= 5 and all(letter.isprintable() or letter == "\n" for text in shown.values() for letter in text)
    assert "sft, greedy" in shown[0] and "reft, samples" in shown[0] and HOSTILE[0] in shown[0]
    assert "996000 more characters" in shown[33] and len(shown[33]) < 30_000
    assert r"\u202e" in shown[36]


@pytest.mark.parametrize("given", [{"text": True}, {"item": "gsm8k_1"}])
def test_text_and_item_belong_together(tmp_path, given):
    with pytest.raises(InputError, match="--text and --item=ID belong together"):
        run_look(tmp_path, **given)


def test_an_unknown_item_is_refused_with_the_nearest(tmp_path):
    workdir = workdir_with(tmp_path / "w", 3)
    with pytest.raises(InputError, match="has answered 'gsm8k2'; did you mean gsm8k_2?"):
        item_text(workdir, "gsm8k2")


def test_a_repeated_iteration_counts_once(tmp_path):
    workdir = workdir_with(tmp_path / "w", 3)
    line = execution("reft rollout", Example("gsm8k_1", "", "1"), "text", Verdict(1.0, True, 1.0, "ok"), 1.0)
    twice = [line | reinforced(2, row, "text", float("nan"), 0.1) for row in (0, 1, 0, 1)]
    ExecutionLog(workdir).append(twice)
    found = read_log(workdir).rollouts["reft rollout", 2]
    assert [one["row"] for one in found] == [0, 1] and found[0]["advantage"] is None


def test_what_the_page_knows_of_an_answer(tmp_path):
    """Texts come once, without their common beginning. Reward and parts come from the log, scores from the reranker."""
    workdir, example = tmp_path / "w", Example("gsm8k_1", "How many?", "4")
    (workdir / "samples").mkdir(parents=True)
    right, none = Verdict(4.0, True, 1.0, "ok", {"style": 0.5}), Verdict(None, False, 0.0, "timeout")
    texts = ["return 2 + 2", "return 4", "return 2 + 2"]
    record = answered(example, [prediction(text, one) for text, one in zip(texts, (right, none, right), strict=True)])
    scores = {"item_id": "gsm8k_1", "question": "How many?", "answer_value": "4", "probabilities": [0.75, 0.25]}
    scores["completions"] = [short_hash(text) for text in texts[:2]]
    (workdir / "samples" / "sft_test.jsonl").write_text(json.dumps(record) + "\n")
    (workdir / "samples" / "sft_test.rerank.jsonl").write_text(json.dumps(scores) + "\n")
    ExecutionLog(workdir).append([execution("sft test", example, texts[0], right, 1.5)])
    [found] = read_answered(workdir)
    rows = [[0, "4", True, "ok", 1.0, {"style": 0.5}, 1.5, 0.75], [1, None, False, None, None, None, None, 0.25]]
    one = question(found, "gsm8k_1", read_log(workdir))
    assert one["models"] == [
        {"greedy": None, "samples": {"prefix": "return ", "texts": ["2 + 2", "4"], "rows": [rows[0], rows[1], rows[0]]}}
    ]
    assert summary(one) == ["gsm8k_1", "How many?", [[None, 2, 1, 3, 0, 12]]]

    scores["completions"].reverse()  # they judge samples of another time
    (workdir / "samples" / "sft_test.rerank.jsonl").write_text(json.dumps(scores) + "\n")
    again = question(read_answered(workdir)[0], "gsm8k_1", read_log(workdir))
    assert [row[7] for row in again["models"][0]["samples"]["rows"]] == [None, None, None]


# --- in a browser


@pytest.fixture
def opened(browser):
    """Opens a file in a new page; at the end, checks that it complained of nothing and asked for nothing else."""
    pages, said, asked = [], [], []

    def open_file(path: Path, **context):
        one = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | context).new_page()
        one.set_default_timeout(10_000)
        one.on("console", lambda message: said.append(message.text))
        one.on("pageerror", lambda error: said.append(str(error)))
        one.on("dialog", lambda dialog: (said.append("a dialog"), dialog.dismiss()))
        one.on("request", lambda request: asked.append(request.url))
        begun = time.monotonic()
        one.goto(path.as_uri())
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
    shown.select_option("#order", "hardest")  # 14
    first = shown.locator("#list li").first.inner_text()
    shown.select_option("#order", "longest")  # 15
    assert shown.locator("#list li").count() == 25 and first
    shown.select_option("#order", "id")
    shown.locator("#list a").first.focus()
    shown.keyboard.press("ArrowDown")  # 16
    shown.keyboard.press("Enter")  # 17
    chosen(shown, "gsm8k_1")
    assert shown.evaluate("document.activeElement.id") == "one"
    shown.go_back()  # 18
    chosen(shown, "gsm8k_59")
    cards = one.locator(".card").count()
    one.locator("button.rest").first.click()  # 19
    assert one.locator(".card").count() == cards + 5
    picture(shown, "page_questions", "questions")

    chart = shown.locator("#charts figure").first
    chart.locator(".u-over").hover()  # 20
    assert re.fullmatch(r"iteration 3: 0\.3 \(reward per sample\)", chart.locator("output").inner_text())
    picture(shown, "page", "results")
    chart.locator(".plot").focus()
    shown.keyboard.press("Home")  # 21
    shown.keyboard.press("ArrowRight")
    assert chart.locator("output").inner_text().startswith("iteration 2: 0.2")
    chart.locator("summary").click()  # 22
    assert chart.locator("tbody tr").count() == 5

    assert shown.locator("#sampled .card").count() == 20
    shown.click("#more")  # 23
    assert shown.locator("#sampled .card").count() == 30 and shown.locator("#more").is_disabled()
    shown.select_option("#by", "high")  # 24
    shown.locator("#sampled .card", has_text="advantage 1.9").first.wait_for()
    assert "advantage 1.9, reinforced" in re.sub(r"\s+", " ", shown.locator("#sampled .card").first.inner_text())
    before = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    shown.click("#theme")  # 25
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") != before
    picture(shown, "page_dark", "rollouts")


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
