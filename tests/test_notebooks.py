"""Notebooks run from top to bottom, exercises can be solved, and nothing is copied from scripts."""

import ast
import base64
import io
import json
import re
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
BOOKS = sorted(FOLDER.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
ONE_PAGE = FOLDER / "00_glip_on_one_page.ipynb"  # the only one with a loop of its own
ALWAYS = (ONE_PAGE.stem, "02_model", "07_tables", "08_your_data")  # all; towers; results; own data


def code_of(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def tagged(cells, tag):
    return [cell for cell in cells if tag in cell.metadata.get("tags", [])]


def printed(cell):
    return "".join(out.text for out in cell.outputs if out.output_type == "stream")


@pytest.fixture(scope="module")
def kernel():
    """One kernel for all notebooks, which then import torch once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOGLIP_QUICK", "1")
        manager, client = start_new_kernel(kernel_name="python3", cwd=str(FOLDER))
    client.stop_channels()
    yield manager
    manager.shutdown_kernel(now=True)


FRESH = f"""
%reset -f
import matplotlib.pyplot, torch
matplotlib.pyplot.close("all")
torch.manual_seed(0)
%cd -q {FOLDER}
%reset -f
"""  # what one notebook leaves to the next: what it imported


@pytest.mark.parametrize("path", [
    pytest.param(path, marks=getattr(pytest.mark, "slow" if path.stem in ALWAYS else "proof"),
                 id=path.stem) for path in BOOKS
])  # fmt: skip
def test_notebook_runs_and_its_exercises_can_be_solved(path, kernel):
    """All cells with small sizes, exercises unsolved; then each solution with its check again."""
    book = nbformat.read(path, as_version=4)
    text = (FOLDER / "solutions" / f"{path.stem}.py").read_text()
    solutions = re.split(r"^# %% exercise \d$", text, flags=re.MULTILINE)[1:]
    assert len(tagged(book.cells, "exercise")) == len(solutions) >= 3
    asked = tagged(book.cells, "check")
    solved = [nbformat.v4.new_code_cell(cell.source) for cell in asked]
    for solution, check in zip(solutions, solved, strict=True):
        book.cells += [nbformat.v4.new_code_cell(solution), check]
    book.cells.insert(0, nbformat.v4.new_code_cell(FRESH))
    NotebookClient(book, km=kernel, timeout=600).execute()
    for number, (before, after) in enumerate(zip(asked, solved, strict=True), 1):
        assert printed(before) == f"exercise {number}: not solved yet\n"
        assert printed(after) == f"exercise {number}: solved\n"


@every_notebook
def test_committed_outputs_are_those_of_a_whole_run_and_name_no_machine(path):
    """Pictures, all of them small; no error; no folder or clock of the run; nothing solved."""
    text = path.read_text()
    assert len(text) < 1_000_000
    assert not re.search(r"/(work|root|home|Users|tmp|private)/|\\\\Users", text)
    book = nbformat.read(path, as_version=4)
    assert book.metadata.kernelspec.name == "python3" and "widgets" not in book.metadata
    assert not any("execution" in cell.metadata for cell in book.cells)
    outputs = [out for cell in code_of(path) for out in cell.outputs]
    assert {out.output_type for out in outputs} <= {"stream", "display_data", "execute_result"}
    pictures = [out.data["image/png"] for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) >= 4
    for picture in map(base64.b64decode, pictures):
        assert len(picture) < 200_000
        assert Image.open(io.BytesIO(picture)).width <= 1300
    assert all("not solved yet" in printed(cell) for cell in tagged(code_of(path), "check"))


@every_notebook
def test_notebook_is_thin(path):
    """Short functions, no training loop, no copy of the scripts; sizes alone depend on `quick`."""
    sources = (*ROOT.glob("*.py"), *ROOT.glob("nanoglip/**/*.py"))
    scripts = {line.strip() for script in sources for line in script.read_text().splitlines()}
    for cell in code_of(path):
        tree = ast.parse(cell.source)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 15, node.name
            if isinstance(node, ast.For | ast.While):
                calls = {n.func.attr for n in ast.walk(node) if isinstance(n, ast.Call)
                         and isinstance(n.func, ast.Attribute)}  # fmt: skip
                loop = calls & {"backward", "step", "zero_grad"}
                assert not loop or path == ONE_PAGE, cell.source
            if isinstance(node, ast.If):
                assert "quick" not in {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
        lines = [line.strip() for line in cell.source.splitlines() if len(line.strip()) > 12]
        lines = [line for line in lines if not line.startswith(("import ", "from ", "#"))]
        for start in range(len(lines) - 3):  # backward, and a loop of steps, are three
            assert not scripts.issuperset(lines[start : start + 4]), lines[start : start + 4]


def test_one_page_is_short_and_stands_alone():
    """Of ours it reads pictures, and at the end glip.py, to compare the mask and the loss."""
    cells = code_of(ONE_PAGE)
    assert len(ONE_PAGE.read_text()) < 300_000
    assert sum(bool(line.strip()) for cell in cells for line in cell.source.splitlines()) <= 250
    imports, used = [], {"data": set(), "glip": set()}
    for node in (node for cell in cells for node in ast.walk(ast.parse(cell.source))):
        if isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports.append(node.module)
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in used:
            used[node.value.id].add(node.attr)
    ours = {path.stem for path in ROOT.glob("*.py")} | {"nanoglip", "tools", "tests"}
    assert [name for name in imports if name.partition(".")[0] in ours] == ["data", "glip"]
    assert used["data"] == {"load"} and {"gaussian_scores", "clip_loss"} <= used["glip"]
    text = "".join(cell.source for cell in cells)
    assert text.index("def clip_loss(") < text.index("def train(") < text.index("import glip")


def test_one_page_kept_its_promise_when_it_was_run():
    """At least 30 % of the held-out emoji, in at most ten minutes of one core, say its outputs."""
    text = "".join(printed(cell) for cell in code_of(ONE_PAGE))
    shares = [float(share) for share in re.findall(r"right (\d+\.\d)%", text)]
    (minutes,) = re.findall(r"^(\d+\.\d) minutes of one core$", text, flags=re.MULTILINE)
    assert shares[-1] >= 30 and len(shares) > 8 and float(minutes) <= 10


def test_readme_lists_every_notebook_with_a_thumbnail():
    text = (ROOT / "README.md").read_text()
    for path in BOOKS:
        picture = FOLDER / "thumbnails" / f"{path.stem}.png"
        assert f"](notebooks/{path.name})" in text
        assert f"](notebooks/thumbnails/{picture.name})" in text
        assert picture.stat().st_size < 40_000 and Image.open(picture).width <= 300


def test_every_sentence_of_the_lessons_links_to_what_exists():
    links = {link for path in BOOKS for cell in json.loads(path.read_text())["cells"]
             if cell["cell_type"] == "markdown"
             for link in re.findall(r"\]\(([^):]+)\)", "".join(cell["source"]))}  # fmt: skip
    assert [link for link in links if not (FOLDER / link.partition("#")[0]).exists()] == []
