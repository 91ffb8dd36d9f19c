"""report.html and the PNGs of an evaluation: whole, readable, and they tell what they show."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from nanoglip import page
from nanoglip.config import TrainConfig
from nanoglip.evals import figures

MACHINE = {"device": "cpu", "cores": 2, "cpu": "some", "commit": "0"}


@pytest.mark.parametrize(
    "heights",
    [(0.000999, 0.0001), (1234.5, 250.0), (1.2e6, 9.9e5), (3e-7, 1e-9), (0.0,), (-2.5, 7.1),
     (0.061, 0.002), (14.29, 2.7)],
)  # fmt: skip
def test_ticks_are_round_and_stand_in_the_chart(heights):
    found = page.chart("x", {"x": [(i, y) for i, y in enumerate(heights)]}, None)
    ticks = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="end">([^<]*)</text>', found)
    labels = [label for _, _, label in ticks[:-1]]  # the last is the last step's
    assert 3 <= len(labels) <= 8 and len(set(labels)) == len(labels)
    assert not re.search(r"\de[+-]?\d", "".join(labels)) and max(map(len, labels)) <= 7
    assert all(float(x) >= 6.7 * len(label) for x, _, label in ticks)  # 12 px, some 6.7 a digit
    steps = np.diff([float(label.replace("\N{MINUS SIGN}", "-")) for label in labels])
    assert np.allclose(steps, steps[0], rtol=1e-3)
    across = [float(y) for pair in re.findall(r'points="([^"]*)"', found)[0].split()
              for y in pair.split(",")[1:]]  # fmt: skip
    assert all(0 <= y <= page.HEIGHT for y in across)


def test_an_evaluation_stands_on_the_page_and_replaces_the_one_before(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"stage": "pretrain", "step": 1, "loss": 2.0}\n')
    assert page.add_results(tmp_path, "held-out pairs", "no page", []) is None
    config = replace(TrainConfig(), out=str(tmp_path))
    page.write(tmp_path, config, "tune, step 1 of 1", "python train.py", MACHINE, {})
    for name in ("top5.png", "loss.png"):
        Image.new("RGB", (3, 3)).save(tmp_path / name)
    for told in ("earlier <b>", "second </pre><h2>Curves</h2>\\1 </section>"):
        path = page.add_results(tmp_path, "held-out pairs", told, ["loss.png", "top5.png"])
        page.add_results(tmp_path, "published sets", f"sets, {told}", [])
    text = path.read_text()
    assert path == tmp_path / "report.html" and "earlier" not in text
    assert text.count("Evaluation: held-out pairs") == text.count("Evaluation: published sets") == 1
    assert "second &lt;/pre&gt;&lt;h2&gt;Curves&lt;/h2&gt;\\1" in text
    assert text.count("<h2>Curves</h2>") == 1 and text.count("data:image/png;base64,") == 1
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
        figures.save(fig, tmp_path / "x.png")
        words = [text.get_text() for text in fig.findobj(Text)]
        pattern = r"^(\d+)\. " if draw is figures.draw_top5 else r"\(right: rank (\d+)\)"
        assert [m[1] for m in (re.search(pattern, w) for w in words) if m] == told
        assert sum("$" in w for w in words) >= 3
    assert Image.open(Path(tmp_path / "x.png")).format == "PNG"
