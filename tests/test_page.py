"""report.html: what it holds, and that hostile completions are text. tests/test_page_browser.py opens it."""

import base64
import json
import random
import re
import zlib
from pathlib import Path

import pytest
from acts import World
from fakes import Fakes

from reft_jax.commands import evaluate
from reft_jax.commands.look import run_look
from reft_jax.evaluation.records import answered, prediction
from reft_jax.page import log as page_log
from reft_jax.page.build import page, write_page
from reft_jax.page.collect import question, read_answered, summary
from reft_jax.page.log import chosen, read_log, read_rollouts
from reft_jax.page.text import item_text
from reft_jax.run.executions import ExecutionLog, execution, reinforced
from reft_jax.stages.sample import run_sample
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
    assert read_log(workdir, set()).iterations["reft rollout", 2] == 2 * (page_log.OTHERS + len("text"))
    found = read_rollouts(workdir, [("reft rollout", 2)])["reft rollout", 2]
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
    known = set(found.programs())
    assert known == {("gsm8k_1", short_hash(text)) for text in texts} and not set(found.programs("gsm8k_2"))
    assert read_log(workdir, set()).endings == {}  # an ending that nothing asks for is not held
    endings = read_log(workdir, known).endings
    one = question(found, "gsm8k_1", endings)
    assert one["models"] == [
        {"greedy": None, "samples": {"prefix": "return ", "texts": ["2 + 2", "4"], "rows": [rows[0], rows[1], rows[0]]}}
    ]
    assert summary(one) == ["gsm8k_1", "How many?", [[None, 2, 1, 3, 0, 12]]]

    scores["completions"][0] = short_hash("a sample of another time")
    (workdir / "samples" / "sft_test.rerank.jsonl").write_text(json.dumps(scores) + "\n")
    again = question(read_answered(workdir)[0], "gsm8k_1", endings)
    assert [row[7] for row in again["models"][0]["samples"]["rows"]] == [None, 0.25, None]
    del scores["completions"]  # as older versions wrote it: what they judge is not known
    (workdir / "samples" / "sft_test.rerank.jsonl").write_text(json.dumps(scores) + "\n")
    again = question(read_answered(workdir)[0], "gsm8k_1", endings)
    assert [row[7] for row in again["models"][0]["samples"]["rows"]] == [None, None, None]


def test_test_questions_come_first_and_what_was_moved_aside_is_left_out(tmp_path):
    workdir = workdir_with(tmp_path / "w", 2)
    for other in ("aside/sft_test.1.jsonl", "sft_train.jsonl", "algebra/one.jsonl", "algebra/aside/one.1.jsonl"):
        path = workdir / "samples" / other
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((workdir / "samples" / "sft_test.jsonl").read_bytes())
    found = {answered.name: list(answered.files) for answered in read_answered(workdir)}
    assert list(found.items()) == [("test", ["sft", "reft"]), ("train", ["sft"]), ("algebra", ["one"])]


def with_iterations(workdir: Path, numbers, purpose="reft rollout", rows=2) -> Path:
    """Appends iterations to the log; a completion of iteration 7 is `ITERATION_7 …`."""
    for number in numbers:
        example, texts = Example("gsm8k_1", "", "1"), [f"ITERATION_{number} row {row}" for row in range(rows)]
        lines = [execution(purpose, example, text, Verdict(1.0, True, 1.0, "ok"), 1.0) for text in texts]
        ExecutionLog(workdir).append(
            line | reinforced(number, row, texts[row], 0.5, 1e-4) for row, line in enumerate(lines)
        )
    return workdir


def shown_iterations(text: str) -> list[int]:
    """The iterations whose rollouts are in the page."""
    packed = re.findall(r'<script type="text/plain" id="c\d+">(.*?)</script>', text)
    return [int(found) for one in packed for found in re.findall(rb"ITERATION_(\d+) row 0", unpacked(one))]


def unpacked(one: str) -> bytes:
    return zlib.decompress(base64.b64decode(one))


def test_a_long_run_shows_the_first_the_last_and_evenly_spaced_iterations(tmp_path, monkeypatch):
    (tmp_path / "samples").mkdir()
    workdir = with_iterations(tmp_path, range(1, 101))
    assert shown_iterations(page(workdir)) == list(range(1, 101)) and "This page has" not in page(workdir)
    monkeypatch.setattr(page_log, "LARGEST", 12 * 2 * 270)  # twelve iterations
    text = page(workdir)
    assert shown_iterations(text) == [*range(1, 101, 9)]
    told = "rollouts of 12 of 100 iterations: the first, the last, and one in 9 between them. `look --iterations=A-B`"
    assert told in text
    monkeypatch.setattr(page_log, "LARGEST", 1)
    assert shown_iterations(page(workdir)) == [1, 100]
    assert shown_iterations(page(workdir, "98")) == [98]
    run_look(workdir, iterations="20-22")
    text = (workdir / "report.html").read_text()
    assert shown_iterations(text) == [20, 21, 22] and "3 of 100 iterations: those of --iterations=20-22." in text


def test_every_kind_of_iteration_has_its_first_and_last(tmp_path, monkeypatch):
    for purpose in ("b rollout", "a rollout"):
        with_iterations(tmp_path, range(1, 8), purpose)
    monkeypatch.setattr(page_log, "LARGEST", 1)
    found, _ = chosen(read_log(tmp_path, set()))
    assert found == [("a rollout", 1), ("a rollout", 7), ("b rollout", 1), ("b rollout", 7)]
    assert len(chosen(read_log(tmp_path, set()), "7")[0]) == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [("5-9", "the log has 1 to 3"), ("3-1", "write a number or"), ("2-", "write a number"), ("x", "write a number")],
)
def test_iterations_that_cannot_be_shown_are_refused(tmp_path, given, says):
    (tmp_path / "samples").mkdir()
    with pytest.raises(InputError, match=f"--iterations={given}: .*{says}"):
        run_look(with_iterations(tmp_path, (1, 2, 3)), iterations=given)
    with pytest.raises(InputError, match="--iterations is about report.html"):
        run_look(tmp_path, text=True, item="gsm8k_1", iterations="1")


def test_a_page_that_cannot_be_made_costs_neither_the_table_nor_the_upload(tmp_path, monkeypatch, capsys):
    """`evaluate` prints and uploads first; then it says in one line why there is no report.html. It names what is."""
    fakes = Fakes()
    fakes.install(monkeypatch)
    world = World(tmp_path, 0, fakes, capsys)
    world.files["test"].write_text(json.dumps([world.question(i) for i in range(6)]))
    run_sample(world.run(), "reft", "test")
    evaluate.run_evaluate(world.run())
    report, odd = world.workdir / "report.html", world.workdir / "samples" / "odd.jsonl"
    assert "SFT" in report.read_text()
    assert capsys.readouterr().out.endswith(f"\nreport.md, report.json, report.html: {world.workdir}\n")
    report.unlink()
    done = []
    monkeypatch.setattr(evaluate.Results, "close", lambda self, shares, files: done.extend(path.name for path in files))
    odd.write_text("odd\n{}\n")
    capsys.readouterr()
    evaluate.run_evaluate(world.run())
    said = capsys.readouterr()
    assert "voting@3" in said.out and "report.md" in done
    assert said.out.endswith(f"\nreport.md, report.json: {world.workdir}\n")
    [line] = said.err.splitlines()
    assert line.startswith("warning: report.html is not written: ") and "odd.jsonl: line 1 is not JSON" in line
    odd.unlink()
    with (world.workdir / "executions.jsonl.gz").open("ab") as log:
        log.write(b"damaged")
    evaluate.run_evaluate(world.run())
    said = capsys.readouterr()
    assert "voting@3" in said.out and "executions.jsonl.gz: damaged after byte" in said.err and not report.exists()
