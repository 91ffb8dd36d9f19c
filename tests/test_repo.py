"""The repository keeps what README and docs/ say: commands, links, tables, code, figures."""

import ast
import importlib
import inspect
import re
import shlex
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import tyro
from PIL import Image

import glip
from nanoglip import results
from nanoglip.config import TrainConfig, check, parse, run_name
from tests.test_train import command
from tools import figures, tables

ROOT = Path(__file__).parent.parent

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands_of(page):
    """The words of every command in a page's sh blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


class Parsed(BaseException):
    """Raised once a command line is parsed, so that nothing runs."""


@pytest.fixture
def parsed(monkeypatch):
    """A function that parses a script's command line, by the script's own main."""
    real = tyro.cli

    def stop(*args, **kwargs):
        raise Parsed(real(*args, **kwargs))

    def run(script, flags):
        with monkeypatch.context() as patch, pytest.raises(Parsed):
            patch.setattr(tyro, "cli", stop)
            patch.setattr(sys, "argv", [script, *flags])
            importlib.import_module(script.removesuffix(".py")).main()

    return run


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_the_docs_parses(page, parsed, tmp_path, monkeypatch):
    commands, folders = commands_of(page), []
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/config.json").write_text('{"mask": "random", "out": "runs/mine"}')
    monkeypatch.chdir(tmp_path)
    makefile = (ROOT / "Makefile").read_text()
    for words in commands:
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
        elif words[0] in ("python", "torchrun"):
            at = next(i for i, word in enumerate(words) if re.match(r"tools\.|\w+\.py$", word))
            world = 1
            for name, number in pairwise(words):
                world *= int(number) if name in ("--nnodes", "--nproc_per_node") else 1
            script, flags = words[at], words[at + 1 :]
            if script == "train.py" and flags != ["--help"]:
                config = parse(flags)
                check(config, world)
                asks = config.estimate or config.overfit
                folders += [] if asks else [config.out or f"runs/{run_name(config)}"]
            elif script not in ("train.py", "tools.figures"):  # --help; a script without flags
                parsed(script, flags)
        else:
            assert words[0] in ("source", "hf"), words
    assert len(set(folders)) == len(folders)  # one after the other, each makes its own run
    assert page.name != "README.md" or len(commands) > 10


def test_the_readme_fits_its_page_and_has_the_papers_three_lines():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    (code,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "glip_loss" in b]
    told, real = ast.parse(code).body[0], ast.parse(inspect.getsource(glip.glip_loss)).body[0]
    del real.body[0]  # the docstring
    assert ast.unparse(told) == ast.unparse(real)


def test_numbers_of_the_readme_are_those_of_the_generated_tables():
    """A row of a result in the README has the cells of a row in docs/results.md, in its order."""

    def rows(page):
        lines = [line for line in page.read_text().splitlines() if line.startswith("| ")]
        return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]

    known = rows(ROOT / "docs/results.md")
    found = [row for row in rows(ROOT / "README.md") if re.fullmatch(r"[\d.]+ \(.*\)", row[-1])]
    for row in found:
        others = [iter(other) for other in known]
        assert any(all(cell in other for cell in row) for other in others), row
    assert len(found) > 10


def test_the_readmes_figure_shows_every_seed_of_the_table():
    runs, cost = results.load_runs(), results.load("cost")
    found = {data: figures.curves(runs, cost, data) for data in figures.SETS}
    points = [point for masks in found.values() for line in masks.values() for point in line]
    assert len(points) == 10 + 4 + 4 and {len(seeds) for _, _, seeds in points} == {3}
    text = (ROOT / "README.md").read_text()
    for label, mask, place in (("none, equal steps", "none", -1), ("gaussian", "gaussian", 1)):
        _, minutes, seeds = found["scenes-center"][mask][place]
        assert f"| {label} | {sum(seeds) / 3:.1f} ({min(seeds):.1f}-{max(seeds):.1f}) |" in text
        assert 450 * 0.25 < 60 * minutes < 450 * 0.85


@pytest.mark.slow
def test_code_of_the_docs_runs(tmp_path, monkeypatch):
    """The example for the user's own code, on a model and a picture put where it looks."""
    text = (ROOT / "docs/training.md").read_text()
    (code,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "load_model" in b]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/demo").mkdir(parents=True)
    demo = glip.GLIPConfig.named(TrainConfig().model)
    glip.save_checkpoint("runs/demo/model.pt", glip.GLIP(demo))
    Image.new("RGB", (200, 120), "red").save("apple.png")
    names = {}
    exec(code, names)
    assert names["scores"].shape == (1, len(names["names"])) and names["scores"].abs().max() <= 1


def anchors_of(page):
    """The anchors that GitHub gives a page's headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_the_docs_leads_somewhere(page):
    links = [x for x in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in x]
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link
    assert page.name != "README.md" or len(links) > 12


def test_tables_of_the_docs_are_current():
    texts = [page.read_text() for page in PAGES]
    assert [tables.filled(text) for text in texts] == texts
    made = re.findall(r"<!-- (\w+): made by tools/tables.py -->", "".join(texts))
    assert sorted(made) == sorted(tables.PARTS)
    assert "Not run." not in "".join(texts)


def test_results_are_published_from_a_known_commit_and_name_no_folder():
    for path in (ROOT / "results").glob("*.json*"):
        text = path.read_text()
        assert not re.search(r'["\s=]/(work|root|home|Users|tmp)/', text), path.name
        assert "-dirty" not in text and '"commit": ""' not in text, path.name


@pytest.mark.slow
def test_the_readmes_diff_adds_a_mask_with_a_setting(tmp_path):
    """Applied to a copy: the flag, its range, the loop, the figure and the sweep follow."""
    text = (ROOT / "README.md").read_text()
    diff = re.search(r"```diff\n(.*?)```", text, re.DOTALL)[1].splitlines()
    before = "".join(f"{line[1:]}\n" for line in diff if not line.startswith("+"))
    after = "".join(f"{line[1:]}\n" for line in diff)
    assert max(len(line[1:]) for line in diff) <= 100
    for name in ("glip.py", "data.py", "train.py", "evaluate.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("nanoglip", "tools", "results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    source = (tmp_path / "nanoglip/masks.py").read_text()
    assert source.count(before) == 1
    (tmp_path / "nanoglip/masks.py").write_text(source.replace(before, after))

    def run(*words):
        return command(*words, cwd=tmp_path, path=tmp_path)

    small = ["--image-size", "32", "--batch-size", "16", "--steps", "2", "--tune-epochs", "0"]
    for words in (["train.py", "--mask", "ring", "--radius", "0.5", *small], ["evaluate.py"]):
        done = run(*words)
        assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "masks.png").exists() and "mask ring 75.0%" in done.stdout
    assert "radius=0.5" in folder.name
    for flags in (["--mask", "ring", "--radius", "3"], ["--mask", "random", "--radius", "0.5"]):
        done = run("train.py", *flags)
        assert (done.returncode, done.stdout) == (2, "") and "--radius" in done.stderr
    code = (
        "from nanoglip import masks, results\n"
        "from tools import sweep, tables\n"
        "found = masks.sample_mask('ring', 2000, 8, 0.75, radius=0.5)[0]\n"
        "often = found.flatten().bincount(minlength=64)\n"
        "assert often[18] > 500 > often[0] and often[18] > often[27], often\n"  # random keeps 500
        "cost, runs = results.load('cost'), results.load_runs()\n"
        "known = sweep.planned(cost)\n"
        "assert {run.equal for run in known if run.mask == 'ring'} == {'steps'}\n"
        "assert '| ring, equal steps | not run' in tables.compare_table(runs, cost)\n"
        "assert '| ring | not measured' in tables.cost_table(cost)\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
