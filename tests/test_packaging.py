"""The wheel: what it holds, and that it works from another folder without the extras."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

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
    """requirements.txt -> [test] -> [notebooks] -> [data]."""
    extras = PROJECT["optional-dependencies"]
    assert "-e .[test]" in (ROOT / "requirements.txt").read_text().splitlines()
    assert "nanoglip[notebooks]" in extras["test"] and "nanoglip[data]" in extras["notebooks"]
    assert extras.keys() == {"data", "notebooks", "test"}
