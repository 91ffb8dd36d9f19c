"""report.html and the PNGs of an evaluation: whole, readable, and they tell what they show."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from nanoglip import page
from nanoglip.evals import figures

MACHINE = {"device": "cpu", "cores": 2, "cpu": "some", "commit": "0"}


def records(heights):
    same = {"stage": "pretrain", "ln_batch": 3.0, "visible": None}
    return [{**same, "step": i, "loss": y, "lr": y} for i, y in enumerate(heights, 1)]


def drawn(folder, lines, chance=True):
    """{title: {name: [(step, value), ...]}} of the figure that is drawn of a log."""
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fig = figures.draw_curves(folder, chance)
    assert figures.to_png(fig).startswith(b"\x89PNG")
    return {axes.get_title(): {line.get_label(): [tuple(xy) for xy in line.get_xydata().tolist()]
                               for line in axes.lines[:-1]} for axes in fig.axes}, fig  # fmt: skip


def test_curves_show_the_log_and_nothing_else(tmp_path):
    """Tuning stands behind pre-training; what no record has gets no panel."""
    lines = [*records([2.5, 2.0]), {"stage": "pretrain", "step": 2, "zero-shot top-1": 0.25},
             {"stage": "tune", "step": 1, "loss": 1.5, "lr": 0.1, "visible": 0.5}]  # fmt: skip
    found, fig = drawn(tmp_path, lines)
    loss, scores, lr, patches = found.values()
    assert loss == {"loss": [(1, 2.5), (2, 2), (3, 1.5)], "ln_batch": [(1, 3), (2, 3)]}
    assert scores == {"zero-shot top-1": [(2, 0.25)]} and patches == {"visible": [(3, 0.5)]}
    assert [bool(axes.get_legend()) for axes in fig.axes] == [True, True, False, True]
    assert list(found)[2:] == ["learning rate", "share of patches"] and lr["lr"][2] == (3, 0.1)
    assert list(next(iter(drawn(tmp_path, lines, chance=False)[0].values()))) == ["loss"]
    assert drawn(tmp_path, [])[0] == {}


@pytest.mark.parametrize("heights", [(1.2e6, 9.9e5), (3e-7, 1e-9), (0.0,), (-2.5, 7.1)])
def test_curves_stand_inside_an_axis_that_holds_zero(heights, tmp_path):
    _, fig = drawn(tmp_path, records(heights))
    low, high = fig.axes[1].get_ylim()
    assert low < min(0, *heights) and high > max(0, *heights)


def test_an_evaluation_stands_on_the_page_and_replaces_the_one_before(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"stage": "pretrain", "step": 1, "loss": 2.0}\n')
    assert page.add_results(tmp_path, "held-out pairs", "no page", []) is None
    settings = {"lr": 1, "data": "<b>"}
    page.write(tmp_path, settings, {"lr": 2, "data": "<b>"}, True, "tune, step 1 of 1",
               "python train.py", MACHINE, {})  # fmt: skip
    text = (tmp_path / "report.html").read_text()
    assert "class=changed><td>lr</td><td>1<" in text and "<tr><td>data</td><td>&lt;b&gt;<" in text
    for name in ("top5.png", "loss.png"):
        Image.new("RGB", (3, 3)).save(tmp_path / name)
    for told in ("earlier <b>", "second </pre><h2>Curves</h2>\\1 </section>"):
        path = page.add_results(tmp_path, "held-out pairs", told, ["loss.png", "top5.png"])
        page.add_results(tmp_path, "published sets", f"sets, {told}", [])
    text = path.read_text()
    assert path == tmp_path / "report.html" and "earlier" not in text
    assert text.count("Evaluation: held-out pairs") == text.count("Evaluation: published sets") == 1
    assert "second &lt;/pre&gt;&lt;h2&gt;Curves&lt;/h2&gt;\\1" in text
    assert text.count("<h2>Curves</h2>") == 1 and text.count("data:image/png;base64,") == 2
    assert not re.search('(src|href)=(?!"data:)', text)  # no other file, no network


class Pairs:
    """Forty pictures of forty captions, with what matplotlib would take for formulas."""

    def __init__(self):
        self.captions = [f"costs ${i}_{{x \\frac$ {i}" for i in range(40)]
        self.concept = np.arange(40)

    def render(self, ids):
        return torch.zeros(len(ids), 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize("draw", [figures.draw_top5, figures.draw_retrieval])
def test_figures_tell_the_rank_of_a_right_answer_that_is_not_shown(draw, tmp_path):
    """Behind 12 others the right one is the 13th; dollars are drawn as dollars."""
    images, apart = torch.eye(40), (torch.arange(40)[:, None] - torch.arange(40)) % 40
    behind = torch.tensor([0.5] + [1.0] * 12 + [0.0] * 27)[apart]
    for texts, told in ((images, []), (behind, ["13"] * 3)):
        fig = draw(Pairs(), images, texts, np.array([3, 20, 39]))
        (tmp_path / "x.png").write_bytes(figures.to_png(fig))
        words = [text.get_text() for text in fig.findobj(Text)]
        pattern = r"^(\d+)\. " if draw is figures.draw_top5 else r"\(right: rank (\d+)\)"
        assert [m[1] for m in (re.search(pattern, w) for w in words) if m] == told
        assert sum("$" in w for w in words) >= 3
    assert Image.open(Path(tmp_path / "x.png")).format == "PNG"
