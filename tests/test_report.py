"""The report in its three forms, and the picture of the curves."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from reft_jax import store
from reft_jax.evaluation import curves
from reft_jax.evaluation.curves import moving_average, plot_curves, series
from reft_jax.evaluation.report import (
    markdown,
    markdown_comparisons,
    markdown_curves,
    markdown_table,
    print_report,
    write_report,
    write_sweep,
)
from reft_jax.types import InputError


def count(correct, total=500):
    return {"correct": correct, "total": total}


def full_report():
    points = [{"k": 1, "voting": 0.5, "upper_bound": 0.5}, {"k": 100, "voting": 0.65, "upper_bound": 0.9}]
    sampled = {"voting": count(325), "rerank": count(341), "upper_bound": count(450), "curve": points}
    gap = {"a": "ReFT", "b": "SFT", "column": "top1", "difference": 0.382, "low": 0.34, "high": 0.424, "p": 0.0001}
    return {
        "title": "Toy word problems",
        "n": 100,
        "test_questions": 500,
        "chosen_on": "third split",
        "rows": [
            {"model": "SFT warm-up", "top1": count(298), "voting": None, "rerank": None, "upper_bound": None},
            {"model": "SFT", "top1": count(309), **sampled},
            {"model": "ReFT", "top1": count(500), **sampled},
        ],
        "notes": ["12 of 2,000 training rows were over the length limit."],
        "comparisons": [gap, gap | {"column": "voting", "difference": 0.0, "low": -0.03, "high": 0.02, "p": 1.0}],
        "settings": {"seed": 42, "rl.kl_coef": 0.01},
        "seconds": {"sft": 75.4, "reft": 3723.0},
    }


def top1_report():
    rows = [{"model": "SFT", "top1": count(309)}]
    return {**full_report(), "rows": rows, "comparisons": [], "notes": [], "settings": {}, "seconds": {}}


def test_markdown_table():
    assert markdown_table(full_report()) == (
        "| Model | top-1 | voting@100 | rerank@100 | upper bound |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| SFT warm-up | 59.6 % (298/500) [55.2, 63.8] | – | – | – |\n"
        "| SFT | 61.8 % (309/500) [57.5, 66.0] | 65.0 % (325/500) [60.7, 69.1] | 68.2 % (341/500) [64.0, 72.1] "
        "| 90.0 % (450/500) [87.1, 92.3] |\n"
        "| ReFT | 100.0 % (500/500) [99.2, 100.0] | 65.0 % (325/500) [60.7, 69.1] | 68.2 % (341/500) [64.0, 72.1] "
        "| 90.0 % (450/500) [87.1, 92.3] |\n"
    )


def test_columns_that_nothing_was_measured_for_are_left_out():
    table = markdown_table(top1_report())
    assert table.splitlines()[0] == "| Model | top-1 |"


def test_terminal_table_is_aligned_and_fits(capsys):
    print_report(full_report())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 110
    head = next(line for line in lines if line.startswith("model"))
    shares, intervals = lines[lines.index(head) + 4 : lines.index(head) + 6]
    assert shares.startswith("SFT ")
    for heading, share, interval in (("top-1", "61.8 % (309/500)", "[57.5, 66.0]"), ("upper bound", "90.0", "[87.1")):
        at = head.index(heading)
        assert shares[at:].startswith(share)
        assert intervals[at:].startswith(interval)


def test_terminal_table_of_all_of_gsm8k_fits_too(capsys):
    rows = [dict.fromkeys(("top1", "voting", "rerank", "upper_bound"), count(1319, 1319))]
    rows[0]["model"] = "online self-training"
    print_report({**full_report(), "rows": rows})
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 110


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.34, 0.424, "excludes 0"), (-0.01, 0.02, "no difference is shown")]
)
def test_comparison_is_told_in_points_with_its_interval(capsys, low, high, verdict):
    gap = full_report()["comparisons"][0] | {"difference": 0.005, "low": low, "high": high}
    print_report({**full_report(), "comparisons": [gap, gap | {"a": "SFT", "b": "SFT warm-up"}]})
    printed = " ".join(capsys.readouterr().out.split())
    told = f"ReFT minus SFT, top-1: +0.5 [{100 * low:+.1f}, {100 * high:+.1f}] points, p 0.0001; the interval"
    assert told in printed and verdict in printed
    assert "SFT minus SFT warm-up" not in printed  # the last model against each of the others


def test_every_pair_is_in_the_markdown():
    first, second = full_report()["comparisons"]
    report = {**full_report(), "comparisons": [first, second, first | {"b": "SFT warm-up"}]}
    assert markdown_comparisons(report) == (
        "| points | top-1 | voting@100 |\n"
        "| --- | --- | --- |\n"
        "| ReFT − SFT | +38.2 [+34.0, +42.4], p 0.0001 | +0.0 [-3.0, +2.0], p 1 |\n"
        "| ReFT − SFT warm-up | +38.2 [+34.0, +42.4], p 0.0001 | – |\n"
    )


def test_curves_are_a_table_a_column():
    curves = markdown_curves(full_report())
    assert curves.startswith(
        "| voting@k, by samples per question | 1 | 100 |\n"
        "| --- | --- | --- |\n"
        "| SFT | 50.0 [45.6, 54.4] | 65.0 [60.7, 69.1] |\n"
    )
    assert "rerank" not in curves  # no point has it
    assert "| ReFT | 50.0 [45.6, 54.4] | 90.0 [87.1, 92.3] |" in curves
    assert markdown_curves(top1_report()) == ""


def test_a_sweep_is_its_reports_one_after_another(tmp_path):
    reports = [full_report(), top1_report() | {"title": "SVAMP", "chosen_on": ""}]
    write_sweep(tmp_path, reports)
    assert json.loads((tmp_path / "sweep.json").read_text()) == reports
    assert (tmp_path / "sweep.md").read_text() == markdown(reports[0]) + "\n" + markdown(reports[1])
    assert "\n# SVAMP\n\n500 test questions. Brackets: 95 % intervals.\n" in (tmp_path / "sweep.md").read_text()


def test_files_hold_the_whole_report(tmp_path):
    write_report(tmp_path, full_report())
    assert json.loads((tmp_path / "report.json").read_text()) == full_report()
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Toy word problems\n")
    assert markdown_table(full_report()) in text
    for part in ("third split", "100 samples each", "over the length limit", "| reft | 1:02:03 |", "| seed | 42 |"):
        assert part in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


ABOUT = {
    "made": "2026-11-29 17:50 UTC",
    "with": "reft_jax 0.1.0, commit 0123456789ab, jax 0.10",
    "model": "/models/CodeLlama-7b-hf",
    "data": "train a.json (7 rows)",
    "curves": "curves.png",
}


def test_the_first_lines_say_what_made_it():
    text = markdown({**full_report(), "about": ABOUT})
    assert text.startswith(
        "# Toy word problems\n\n- made: 2026-11-29 17:50 UTC\n- with: reft_jax 0.1.0, commit 0123456789ab, jax 0.10\n"
        "- model: /models/CodeLlama-7b-hf\n- data: train a.json (7 rows)\n- curves: [curves.png](curves.png)\n\n500 "
    )


def test_shares_without_an_answer_and_rerankers_below_voting_are_remarked(capsys):
    report = full_report()
    worse = {"difference": -0.031, "low": -0.05, "high": -0.012, "p": 0.004}
    report["rows"][0] |= {"no_answer": {"greedy": {"none": 36, "total": 500}}}
    report["rows"][1] |= {"no_answer": {"greedy": {"none": 500, "total": 500}, "samples": {"none": 41, "total": 4000}}}
    report["rows"][1] |= {"rerank_minus_voting": worse}
    report["rows"][2] |= {"rerank_minus_voting": worse | {"difference": 0.0}}
    remarks = (
        "Without an answer: SFT warm-up 7.2 % of greedy answers; SFT 100.0 % of greedy answers and 1.0 % of samples.",
        "SFT: the reranker chooses worse than voting does: -3.1 [-5.0, -1.2] points, p 0.004.",
    )
    print_report(report)
    printed = " ".join(capsys.readouterr().out.split())
    for remark in remarks:
        assert f"- {remark}\n" in markdown(report)
        assert remark in printed
    assert "ReFT: the reranker chooses worse" not in printed  # not where they are equal


def test_the_settings_are_folded_away_in_markdown_only(tmp_path, capsys):
    write_report(tmp_path, full_report())
    print_report(full_report())
    assert "<details>" not in capsys.readouterr().out + (tmp_path / "report.json").read_text()
    text = (tmp_path / "report.md").read_text()
    # Without the blank lines GitHub would show the table as text.
    assert text.endswith(
        "## Settings\n\n<details>\n<summary>2 settings</summary>\n\n| setting |  |\n| --- | --- |\n| seed | 42 |\n"
        "| rl.kl_coef | 0.01 |\n\n</details>\n"
    )
    assert "details" not in markdown(top1_report())


def test_files_leave_out_what_there_is_nothing_to_say_about(tmp_path):
    write_report(tmp_path, top1_report())
    text = (tmp_path / "report.md").read_text()
    assert "##" not in text
    assert "samples each" not in text
    assert "\n\n\n" not in text


def test_a_report_that_cannot_be_written_leaves_the_old_one_whole(tmp_path, monkeypatch):
    write_report(tmp_path, full_report())

    def crash(source, target):
        raise OSError("disk gone")

    monkeypatch.setattr(store.os, "replace", crash)
    with pytest.raises(OSError, match="disk gone"):
        write_report(tmp_path, {**full_report(), "title": "new"})
    assert json.loads((tmp_path / "report.json").read_text()) == full_report()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


SFT = [
    {"step": s, "epoch": s / 10, "loss": 3 / s, **({"dev_top1": s / 100} if s % 10 == 0 else {})} for s in range(1, 51)
]
REFT = [{"step": 0, "dev_top1": 0.6}]
REFT += [{"step": s, "reward": s / 50, "no_answer": 0.5, "kl": -0.1 * s, "dev_top1": 0.3} for s in range(1, 6)]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, so that a test can look at their panels."""
    figures = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_a_panel_for_every_quantity_that_was_logged(tmp_path, drawn):
    plot_curves(tmp_path / "run-7", SFT, REFT, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    assert figure.get_suptitle() == "run-7"
    assert {axes.get_title(loc="left"): axes.get_xlabel() for axes in figure.axes} == {
        "SFT: training loss": "epoch",
        "SFT: dev accuracy": "epoch",
        "ReFT: mean reward": "iteration",
        "ReFT: samples without an answer": "iteration",
        "ReFT: divergence from the reference": "iteration",
        "ReFT: dev accuracy": "iteration",
    }
    dev = figure.axes[1]
    np.testing.assert_allclose(dev.lines[0].get_xydata(), [[1, 10], [2, 20], [3, 30], [4, 40], [5, 50]])  # percent
    assert dev.get_title(loc="right") == "best 50.0 % (epoch 5)"
    assert len(figure.axes[0].lines) == 2  # 50 points: faint, and their moving average


def test_axes_hide_no_scale(tmp_path, drawn):
    """They begin at 0, or below what is negative; both dev accuracies have one scale."""
    plot_curves(tmp_path, SFT, REFT, tmp_path / "curves.png")
    axes = {axes.get_title(loc="left"): axes for axes in drawn[0].axes}
    kl = axes.pop("ReFT: divergence from the reference")
    assert all(one.get_ylim()[0] == 0 for one in axes.values()) and kl.get_ylim()[0] < -0.5
    assert all(one.get_xlim()[0] == 0 for one in axes.values())
    sft, reft = axes["SFT: dev accuracy"], axes["ReFT: dev accuracy"]
    assert sft.get_ylim() == reft.get_ylim() and sft.get_ylim()[1] > 60
    for one in axes.values():
        assert max(line.get_ydata()[0] for line in one.lines) <= one.get_ylim()[1]


def test_refts_dev_accuracy_begins_at_iteration_0_beside_the_best_sft(tmp_path, drawn):
    plot_curves(tmp_path, SFT, REFT, tmp_path / "curves.png")
    [reft] = [axes for axes in drawn[0].axes if axes.get_title(loc="left") == "ReFT: dev accuracy"]
    assert reft.lines[0].get_xydata()[0].tolist() == [0, 60]
    assert reft.get_title(loc="right") == "best 60.0 % (iteration 0)"
    [label] = reft.get_legend().get_texts()
    assert label.get_text() == "best SFT 50.0 %"
    assert any(list(line.get_ydata()) == [50, 50] for line in reft.lines)


def test_one_stage_alone_is_drawn(tmp_path, drawn):
    plot_curves(tmp_path, [], REFT, tmp_path / "curves.png")
    assert len(drawn[0].axes) == 4
    assert drawn[0].axes[3].get_legend() is None  # no SFT, no line for its best


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no metrics to draw"):
        plot_curves(tmp_path, [{"step": 1, "loss": 1.0}], [{"step": 1}], tmp_path / "curves.png")


def test_lines_of_one_epoch_become_their_mean():
    metrics = [
        {"epoch": 2, "loss": 5.0},
        {"epoch": 1, "loss": 1.0},
        {"epoch": 1, "loss": 2.0},
        {"epoch": 3, "loss": None},
    ]
    x, y = series(metrics, "epoch", curves.SFT_PANELS[0])
    assert (x.tolist(), y.tolist()) == ([1.0, 2.0], [1.5, 5.0])


def test_moving_average_uses_the_points_there_are_at_the_ends():
    mean, half = moving_average(np.array([1.0, 2.0, 6.0, 1.0]), 3)
    assert mean.tolist() == [1.5, 3.0, 3.0, 3.5]
    # 1, 2: variance (n) 1/4, so 1.96 √(1/4 / 1); 1, 2, 6: 14/3, so 1.96 √(14/3 / 2); 6, 1: 25/4
    np.testing.assert_allclose(half, 1.959964 * np.sqrt([0.25, 7 / 3, 7 / 3, 6.25]), rtol=1e-6)
    assert moving_average(np.array([3.0]), 3)[1] == 0  # one point has no scatter


def test_a_noisy_quantity_has_an_interval(tmp_path, drawn):
    """The reward of ten iterations: faint points, their average, and a band around it. Of five: the points alone."""
    reward = [0.2, 0.4, 0.3, 0.5, 0.4, 0.6, 0.5, 0.7, 0.6, 0.8]
    lines = [{"step": step, "reward": value, "kl": value} for step, value in enumerate(reward, start=1)]
    plot_curves(tmp_path, [], lines, tmp_path / "curves.png")
    of_reward, of_kl = drawn[0].axes
    (band,) = of_reward.collections
    mean, half = moving_average(np.array(reward), 5)
    corners = band.get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx((mean - half).min()) and corners[:, 1].max() == pytest.approx(
        (mean + half).max()
    )
    assert [text.get_text() for text in of_reward.get_legend().get_texts()] == ["mean of 5 points, 95 % interval"]
    assert len(of_reward.lines) == 2 and len(of_kl.lines) == 1 and not of_kl.collections
    plot_curves(tmp_path, [], lines[:5], tmp_path / "curves.png")
    assert not drawn[1].axes[0].collections and len(drawn[1].axes[0].lines) == 1
