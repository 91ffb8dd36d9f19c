"""What all tests share: one thread, and one short run of the emoji that they copy."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: workers and children follow

import shutil

import pytest


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """(folder, config) of a finished run of three steps and one of tuning: read it, or copy it."""
    import train
    from nanoglip.config import parse

    out = tmp_path_factory.mktemp("finished") / "run"
    config = parse([
        "--image-size", "16", "--batch-size", "32", "--steps", "3", "--warmup", "1",
        "--optimizer", "adamw", "--tune-batch-size", "32", "--tune-epochs", "0.002",
        "--log-every", "1", "--eval-every", "100", "--precision", "fp32", "--out", str(out),
    ])  # fmt: skip
    return train.train(config), config


@pytest.fixture
def run_copy(finished_run, tmp_path):
    """A copy of the finished run's folder, which a test may change."""
    return shutil.copytree(finished_run[0], tmp_path / "run")


@pytest.fixture(scope="module")
def small_model():
    """The demo's model with tiny towers, in this process; others call torture.tiny."""
    import glip
    from nanoglip.config import TrainConfig
    from tests.torture import TINY

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(glip.SIZES, TrainConfig().model, TINY)
        yield
