"""The wheel, the extras, and what the Makefile installs."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.torture import TINY

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.slow
def test_the_wheel_has_glip_and_nanoglip_alone_and_runs_without_extras(tmp_path):
    (tmp_path / "source").mkdir()
    for name in ("glip.py", "pyproject.toml", "README.md", "LICENSE", "data.py", "train.py"):
        shutil.copy(ROOT / name, tmp_path / "source")
    for name in ("nanoglip", "tools", "tests"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name)
    build = [sys.executable, "-m", "pip", "wheel", "./source", "--no-deps", "--no-build-isolation",
             "--no-index", "--quiet", "--wheel-dir", "."]  # fmt: skip
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "glip.py", "nanoglip", f"nanoglip-{PROJECT['version']}.dist-info",
    }  # fmt: skip
    source = {str(path.relative_to(ROOT)) for path in (ROOT / "nanoglip").rglob("*.py")}
    assert source == {name for name in names if name.startswith("nanoglip/")}
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = (
        "import sys\n"
        "for name in ('PIL', 'emoji', 'fsspec', 'matplotlib', 'scipy', 'sklearn', 'timm'):\n"
        "    sys.modules[name] = None\n"
        "import glip\n"
        "from nanoglip import files, losses, masks, text\n"
        "assert glip.tokenize('a dog').shape == (1, 77)\n"
        "print(glip.__file__, files.CACHE)\n"
    )
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "elsewhere", capture_output=True, text=True,
        env={"PYTHONPATH": str(tmp_path / "installed"), "HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cache = tmp_path / "home/.cache/nanoglip"
    assert done.stdout.split() == [str(tmp_path / "installed/glip.py"), str(cache)]


def test_requirements_install_every_extra():
    """requirements.txt -> [test] -> [notebooks] -> [data] -> [demo]."""
    extras = PROJECT["optional-dependencies"]
    assert "-e .[test]" in (ROOT / "requirements.txt").read_text().splitlines()
    assert "nanoglip[notebooks]" in extras["test"] and "nanoglip[data]" in extras["notebooks"]
    assert "nanoglip[demo]" in extras["data"]
    assert extras.keys() == {"demo", "data", "notebooks", "test"}


def needed(requirements):
    """The distributions that requirements name and need; of open_clip only a file is read."""
    found, ahead = set(), [*requirements]
    while ahead:
        requirement = Requirement(ahead.pop())
        name = canonicalize_name(requirement.name)
        asked = not requirement.marker or requirement.marker.evaluate({"extra": ""})
        if not asked or name in found:
            continue
        found.add(name)
        if name != "open-clip-torch":
            ahead += metadata.requires(name) or []
    return found


@pytest.mark.slow
def test_the_demo_runs_on_its_extra_alone(tmp_path):
    """Training, linear probe and figures, where nothing else can be imported."""
    there = needed([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["demo"]])
    there.add(canonicalize_name(PROJECT["name"]))
    blocked = {module for module, names in metadata.packages_distributions().items()
               if not there & {*map(canonicalize_name, names)}}  # fmt: skip
    blocked -= sys.stdlib_module_names  # `dataclasses` is a package, too
    assert {"timm", "torchvision", "transformers", "jupyterlab", "skimage"} <= blocked
    code = f"""
import importlib.metadata as metadata, sys
class Blocked:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"no {{name}}", name=name)
sys.meta_path.insert(0, Blocked)
version = metadata.version
metadata.version = lambda name: version(name if name.lower() in {there!r} else "absent")
import evaluate, glip, train
from nanoglip.config import TrainConfig
from nanoglip.evals import probe
glip.SIZES[TrainConfig().model], probe.STRENGTHS, probe.MAX_STEPS = {TINY}, probe.STRENGTHS[:1], 5
for script, *sys.argv[1:] in (
    (train, "--image-size", "16", "--batch-size", "32", "--steps", "2", "--out", "run",
     "--tune-epochs", "0.002", "--tune-batch-size", "32", "--eval-every", "100"),
    (evaluate, "run", "--linear-probe"),
):
    script.main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "linear probe, MNIST-5k" in done.stdout and (tmp_path / "run/top5.png").exists()


PIP = """#!/bin/sh
case "$*" in
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python";;
  *"pip show"*) exit 1;;
  *"index versions"*"$LISTED") printf 'torch (2.9)\nAvailable versions: 2.9, 2.8+cpu, 2.7+cpu\n';;
  *"index versions"*) echo "torch (2.9)";;
  *) echo "$*" >> installed.txt;;
esac
case "$*" in "-c import torchvision") exit $BROKEN; esac
"""
OTHER = "--extra-index-url=https://cpu.example"


@pytest.mark.parametrize(("goal", "gpu", "listed", "wanted", "broken"), [
    ("demo", True, "torch", "", False), ("demo", False, "nowhere", "", False),
    ("demo", False, "torch", "torch==2.8+cpu", False),
    ("demo", False, f"{OTHER} torch", f"{OTHER} torch==2.8+cpu", False),
    ("installed", False, "torchvision", "torchvision==2.8+cpu", False),
    ("installed", False, " torch", "", True),
])  # fmt: skip
def test_make_installs_torch_for_cpus_where_an_index_has_it(
    tmp_path, goal, gpu, listed, wanted, broken
):
    """Stand-ins for nvidia-smi and pip with two indexes, and a torchvision of another build."""
    for name, text in (("python", PIP), ("nvidia-smi", f"#!/bin/sh\nexit {int(not gpu)}\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    told = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LISTED": listed, "BROKEN": f"{broken:d}"}
    make = ["make", f"own/{goal}", "VENV=own", "PYTHON=python", f"CPU_INDEX={OTHER[18:]}"]
    subprocess.run(make, cwd=tmp_path, check=True, capture_output=True, env=told)
    install = "-m pip install --quiet --no-compile"
    steps = [f"{install} -e .[demo] {wanted}".strip()]
    if goal == "installed":
        replaced = ["-m pip uninstall --quiet --yes torch torchvision"] * broken
        steps += ["-c import torchvision", *replaced, f"{install} -r requirements.txt"]
    assert (tmp_path / "installed.txt").read_text().splitlines() == steps
