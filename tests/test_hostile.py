"""Hostile and unlucky data: each class of input ends in a sentence, or costs only what it hits."""

import os
import signal
import time

import pytest

import files
from glip import InputError


def test_a_lock_names_its_owner_and_ends_with_it(tmp_path):
    """Also when the owner is killed; a forked child of the owner holds nothing."""
    folder, (reads, writes) = tmp_path / "new/folder", os.pipe()
    owner = os.fork()
    if owner == 0:
        with files.locked(folder, "indexing"):
            if child := os.fork():
                os.write(writes, str(child).encode())
            time.sleep(20)
            os._exit(0)
    child = int(os.read(reads, 20))
    for name in (folder, tmp_path / "other"):
        try:
            with files.locked(name, "indexing"):
                assert name != folder
        except InputError as error:
            assert name == folder
            assert f"{folder}: process {owner} on " in str(error) and "is indexing it" in str(error)
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    with files.locked(folder, "indexing"):
        assert str(os.getpid()) in (folder / ".lock").read_text()
    assert not list(folder.iterdir())
    os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("name", ["file/below", "x" * 300], ids=["below a file", "too long"])
def test_what_cannot_be_written_is_a_sentence(name, tmp_path):
    (tmp_path / "file").write_text("no folder")
    for write in (files.write_bytes, lambda path, _: files.locked(path, "indexing").__enter__()):
        with pytest.raises(InputError, match="cannot be written") as error:
            write(tmp_path / name, b"")
        assert "No space left" not in str(error.value)
