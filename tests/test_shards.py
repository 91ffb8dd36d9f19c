"""Tar shards: the index, the exact order, untrusted bytes, shards behind a URL, sampling."""

import http.server
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pytest
import torch
import webdataset
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

import data
import glip
import train
from glip import GLIPConfig, InputError
from nanoglip import files
from nanoglip.config import parse
from nanoglip.noise import DRAWS, uniform
from nanoglip.sources import captions, order, pictures, shards
from nanoglip.sources.order import Batches, MixedOrder, ShardOrder, loader, make_order
from nanoglip.text import decode_tokens
from tests.test_data import check_order_is_pure
from tests.test_train import command, inside

pytestmark = pytest.mark.slow  # it trains, kills or fetches

ROOT = Path(__file__).parent.parent
NANO = GLIPConfig.named("ViT-nano-8", 16)
WORDS = ("a", "red", "blue", "old", "cat", "dog", "house", "on", "in", "it's", "happy,", "3", "men")


def picture(number, form="JPEG", size=24):
    """A picture that tells its number: its mean colour."""
    draw = np.random.default_rng(number)
    pixels = draw.integers(0, 255, 3) // 2 + draw.integers(0, 99, (size, size + number % 5, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, form)
    return file.getvalue()


def caption(number):
    draw = random.Random(number)
    return f"number {number}: " + " ".join(draw.choices(WORDS, k=draw.randint(0, 12)))


def add(tar, name, content, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.size, member.type = len(content), kind
    tar.addfile(member, io.BytesIO(content))


def make_shards(folder, count=6, size=20, stats=False):
    """`count` shards of `size` pairs, as webdataset writes them, members in a shuffled order."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(count):
        numbers = list(range(shard * size, (shard + 1) * size))
        random.Random(shard).shuffle(numbers)
        name = str(folder / f"{shard:05}.tar")
        with webdataset.TarWriter(name, mtime=1e9) as writer:
            for n in numbers:
                form = ("JPEG", "PNG", "WEBP")[n % 3]
                suffix = ("jpg", "png", "webp")[n % 3]
                record = {"caption": "not this one", "url": "x"}
                sample = {"__key__": f"{n:09}", suffix: picture(n, form), "json": record}
                writer.write(sample | {"txt": caption(n)})
        if stats:
            (folder / f"{shard:05}_stats.json").write_text(json.dumps({"successes": size}))
    return folder


def number_of(text):
    return int(re.match(r"number ([\d ]+)", text)[1].replace(" ", ""))  # a digit is a token


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_shards(tmp_path_factory.mktemp("data") / "shards")
    shards.build(str(folder), 1)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")


# --- index --------------------------------------------------------------------------------------


def test_the_index_has_every_pair(folder):
    """Against webdataset's own reading of the same shards."""
    source = shards.Shards(str(folder), 16)
    assert len(source) == 120 and source.shard_starts.tolist() == list(range(0, 121, 20))
    files = [str(path) for path in sorted(folder.glob("*.tar"))]
    wanted = {}
    for sample in webdataset.WebDataset(files, shardshuffle=False):
        content = next(sample[k] for k in ("jpg", "png", "webp") if k in sample)
        wanted[number_of(sample["txt"].decode())] = (content, sample["txt"].decode())
    for i in range(120):  # by key, for members stand in order of arrival
        content, text = wanted[i]
        assert source.encoded(np.array([i])) == [content]
        assert tuple(source.caption(i)) == glip.encode(text)
        assert glip.encode(decode_tokens(source.caption(i))) == glip.encode(text)
        assert source.shard(i) == i // 20 and f"{i // 20:05}.tar" in source.where(i)


def test_captions_come_from_text_or_json_and_are_cut(tmp_path):
    long = "word " * 1000
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for key, suffix, content in (
            ("a", ".txt", b" in  text\n"), ("a", ".json", b'{"caption": "in json"}'),
            ("b", ".json", b'{"caption": "in json"}'), ("c", ".json", b"[1, 2"),
            ("d", ".txt", b"  "), ("e", ".txt", long.encode()), ("f", ".json", b'{"caption": 7}'),
            ("k" * 150, ".txt", b"a long name"), ("g", ".txt", b"no picture"), ("h", ".npy", b"x"),
        ):  # fmt: skip
            if key not in "gh":
                add(tar, f"deep/{key}.jpg", picture(1)) if suffix == ".txt" or key != "a" else None
            add(tar, f"deep/{key}{suffix}", content)
    record = shards.build(str(tmp_path), 1)
    source = shards.Shards(str(tmp_path), 16)
    texts = [decode_tokens(source.caption(i)) for i in range(len(source))]
    assert texts == ["in text", "in json", "word " * 253 + "word", "a long name"]
    assert record["skipped"] == {"no caption": 3, "no picture": 1, "neither picture nor caption": 1}


def test_an_index_is_kept_rebuilt_or_refused(tmp_path, capsys):
    folder = make_shards(tmp_path / "own", 2, 5)
    with pytest.raises(InputError, match=r"has no complete index .*: python data\.py index"):
        shards.Shards(str(folder), 16)
    shards.build(str(folder), 1)
    made = (folder / "index/index.json").stat().st_mtime_ns
    shards.build(str(folder), 1)
    assert "up to date" in capsys.readouterr().out
    assert (folder / "index/index.json").stat().st_mtime_ns == made
    shutil.copy(make_shards(tmp_path / "more", 3, 5) / "00002.tar", folder)  # one came
    assert len(shards.Shards(str(folder), 16)) == 10
    assert "left out 1 shard that the index lacks" in capsys.readouterr().out
    shards.build(str(folder), 1)
    assert len(shards.Shards(str(folder), 16)) == 15
    make_shards(folder, 1, 6)
    with pytest.raises(InputError, match=r"00000\.tar is not what was indexed"):
        shards.Shards(str(folder), 16)
    shards.build(str(folder), 1)
    assert len(shards.Shards(str(folder), 16)) == 16
    (folder / "00001.tar").rename(tmp_path / "away")
    told = r"own/00001\.tar is missing: bring it back, or give python data\.py index .*own$"
    with pytest.raises(InputError, match=told):
        shards.Shards(str(folder), 16)
    (tmp_path / "away").rename(folder / "00001.tar")
    record = json.loads((folder / "index/index.json").read_text())
    for wrong in ({"version": 0}, {"counts": ["5"] * 3}, {"shards": 7}, {"counts": [6, 5, 6]},
                  {"skipped": []}, {"shards": [[7, 7, 7]] * 3}):  # fmt: skip
        (folder / "index/index.json").write_text(json.dumps(record | wrong))
        with pytest.raises(InputError, match="has no complete index of this version"):
            shards.Shards(str(folder), 16)
    for name, content in (("index.json", b"[1, 2"), ("tokens.bin", b""), ("names.bin", b"7" * 9)):
        shards.build(str(folder), 1)  # the remedy that the sentence names
        assert len(shards.Shards(str(folder), 16)) == 16
        (folder / "index" / name).write_bytes(content)
        with pytest.raises(InputError, match="has no complete index of this version"):
            shards.Shards(str(folder), 16)
    shards.build(str(folder), 1)
    tokens = np.fromfile(folder / "index/tokens.bin", "<u2")
    (tokens | 2**15).tofile(folder / "index/tokens.bin")  # past the vocabulary
    with pytest.raises(InputError, match="has no complete index of this version"):
        shards.Shards(str(folder), 16)


def test_unfinished_shards_are_named(tmp_path, capsys):
    folder = make_shards(tmp_path / "own", 3, 4, stats=True)
    (folder / "00001_stats.json").write_text('{"succ')  # cut by a kill
    (folder / "00002_stats.json").unlink()
    shards.build(str(folder), 1)
    assert "unfinished (no _stats.json yet): 00001.tar, 00002.tar" in capsys.readouterr().out
    assert len(shards.Shards(str(folder), 16)) == 4
    with pytest.raises(InputError, match=r"no finished \.tar shard"):
        shards.build(str(tmp_path), 1)


def test_patterns_name_shards(folder, tmp_path):
    assert shards.expand("a{08..10}b{1..2}") == [
        f"a{i}b{j}" for i in ("08", "09", "10") for j in (1, 2)
    ]
    location = f"{folder}/{{00001..00003}}.tar"
    shards.build(location, 1)
    source = shards.Shards(location, 16)
    assert len(source) == 60 and number_of(decode_tokens(source.caption(0))) == 20
    with pytest.raises(InputError, match=r"00006\.tar: cannot be opened"):
        shards.build(f"{folder}/0000{{5..9}}.tar", 1)


def left_by_kill(process):
    """kill -9 one process alone: its workers that still run ten seconds later."""
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.kill()
    process.wait()
    left = [w for w in psutil.wait_procs(workers, timeout=10)[1] if w.status() != "zombie"]
    for worker in left:
        worker.kill()
    return left


def test_a_killed_build_goes_on(tmp_path):
    """kill -9 while it builds; the result is the same, and finished parts are not made again."""
    straight = make_shards(tmp_path / "straight", 30, 10)
    killed = shutil.copytree(straight, tmp_path / "killed")
    shards.build(str(straight), 1)
    command = [sys.executable, "data.py", "index", str(killed), "--processes", "2"]
    parts = killed / "index/parts"
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(parts.glob("*.npz"))) < 4:
        time.sleep(0.002)
    assert not left_by_kill(process)
    made = {path: path.stat().st_mtime_ns for path in parts.glob("*.npz")}
    assert 4 <= len(made) < 30 and not (killed / "index/index.json").exists()
    seen = []
    original = shards.build_part
    try:
        shards.build_part = lambda *job: (seen.append(job), original(*job))
        shards.build(str(killed), 1)
    finally:
        shards.build_part = original
    assert len(seen) == 30 - len(made)
    for name in shards.ARRAYS:
        files = [folder / f"index/{name}.bin" for folder in (straight, killed)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(p.name for p in (killed / "index").iterdir()) == [
        "addresses.bin", "checks.bin", "index.json", "lengths.bin", "names.bin", "tokens.bin"
    ]  # fmt: skip


# --- untrusted bytes ----------------------------------------------------------------------------


def hostile_tar(path):
    """Names that climb, links, devices, pickles, bombs, a size that lies, keys that come twice."""
    with tarfile.open(path, "w") as tar:
        for n in range(4):
            add(tar, f"good{n}.jpg", picture(n))
            add(tar, f"good{n}.txt", caption(n).encode())
        add(tar, "../../outside.jpg", picture(9))
        add(tar, "../../outside.txt", b"number 9 climbs")
        add(tar, "/etc/absolute.txt", b"no picture")
        add(tar, "evil.pkl", b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo("link.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        for kind in (tarfile.CHRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("device.txt")
            member.type = kind
            tar.addfile(member)
        add(tar, "good0.jpg", picture(5))
        add(tar, "empty.jpg", b"")
        add(tar, "empty.txt", b"number 7 has no bytes")
        add(tar, "color\x1b[31m.\x1b[2J", b"")


def test_hostile_members_are_passed_over_and_counted(tmp_path):
    folder = tmp_path / "deep/er/own"
    folder.mkdir(parents=True)
    hostile_tar(folder / "0.tar")
    before = set(tmp_path.rglob("*"))
    record = shards.build(str(folder), 1)
    new = set(tmp_path.rglob("*")) - before
    assert {p.parent.name for p in new} <= {"own", "index"} and not Path("/tmp/owned").exists()
    assert record["counts"] == [5]
    assert record["skipped"] == {
        "not a plain file": 4, "neither picture nor caption": 2, "no picture": 2,
        "twice the same key": 1, "picture empty or too large": 1,
    }  # fmt: skip
    train, _ = data.load(str(folder), 16, max_bad=1.0)
    ids, _, _, bad = train.read(np.arange(5), uniform(0, "x", 0, 5, DRAWS))
    assert bad == [] and ids.tolist() == list(range(5))


def test_damage_costs_what_it_hits_and_no_more(tmp_path):
    """A broken header costs its member; a cut tar what lies behind the cut."""
    whole = make_shards(tmp_path / "a", 1, 10) / "00000.tar"
    with tarfile.open(whole) as tar:
        members = tar.getmembers()
    content = bytearray(whole.read_bytes())
    target = next(member for member in members[9:] if member.name.endswith(".txt"))
    place = target.offset_data - 512
    content[place : place + 20] = bytes(b ^ 0xFF for b in content[place : place + 20])
    whole.write_bytes(content)
    record = shards.build(str(tmp_path / "a"), 1)
    assert record["counts"] == [10] and record["skipped"] == {"broken header": 1}
    texts = shards.Shards(str(tmp_path / "a"), 16).texts(range(10))
    assert texts.count("not this one") == 1  # the caption was lost, and taken from the .json
    cut = make_shards(tmp_path / "b", 1, 10) / "00000.tar"
    cut.write_bytes(cut.read_bytes()[: members[16].offset_data + 3])
    record = shards.build(str(tmp_path / "b"), 1)
    assert record["counts"] == [5] and record["skipped"]["torn"] >= 1


def test_a_hole_loses_no_more_than_itself(tmp_path):
    """Zeros in the middle look like the end of a tar, and so do tars that were put together."""
    tar = make_shards(tmp_path / "a", 1, 40) / "00000.tar"
    with tarfile.open(tar) as file:
        member = [m for m in file.getmembers() if m.name.endswith("g")][11]
    content = bytearray(tar.read_bytes())
    begin = member.offset_data - 512
    content[begin : begin + 1024] = bytes(1024)
    tar.write_bytes(content)
    record = shards.build(str(tmp_path / "a"), 1)
    assert record["counts"] == [39] and record["skipped"]["hole"] == 1
    assert record["skipped"]["no picture"] == 1
    two = make_shards(tmp_path / "b", 2, 10)
    (two / "00000.tar").write_bytes((two / "00000.tar").read_bytes()
                                    + (two / "00001.tar").read_bytes())  # fmt: skip
    (two / "00001.tar").unlink()
    assert shards.build(str(two), 1)["counts"] == [20]


def test_a_shard_of_the_same_size_that_changed_gives_no_wrong_pairs(tmp_path):
    folder = make_shards(tmp_path / "own", 1, 20)
    shards.build(str(folder), 1)
    tar, source = folder / "00000.tar", shards.Shards(str(folder), 16)
    content = tar.read_bytes()
    with tarfile.open(tar) as file:
        first, second = (m for m in file.getmembers()[:6] if m.name.endswith("g"))
    swapped = bytearray(content)
    swapped[first.offset_data - 512 : first.offset_data] = content[
        second.offset_data - 512 : second.offset_data
    ]
    tar.write_bytes(swapped)
    shards.opened.cache_clear()
    found = source.encoded(np.arange(20))
    assert sum(isinstance(x, OSError) and "not what was indexed" in str(x) for x in found) == 1
    tar.unlink()
    shards.opened.cache_clear()
    assert all(isinstance(x, OSError) for x in source.encoded(np.arange(20)))


def test_more_shards_never_hold_out_what_was_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_HELD_OUT", 7)
    folder, before, seen = tmp_path / "own", None, 0
    for count in (3, 5, 9):
        make_shards(folder, count, 40)
        shards.build(str(folder), 1)
        held = set(shards.Shards(str(folder), 16).held.tolist())  # keys grow with the shards
        if before is not None:
            assert {i for i in held if i < seen} <= before
        before, seen = held, count * 40
    assert len(held) == 7


def test_the_same_name_in_two_folders_is_refused(tmp_path):
    for i in (0, 1):
        make_shards(tmp_path / str(i), 1, 5)
    with pytest.raises(InputError, match=r"00000\.tar is there in several folders"):
        shards.build(f"{tmp_path}/{{0..1}}/00000.tar", 1)


def damaged(content, draw):
    """A shard's bytes, flipped, cut, repeated or replaced somewhere."""
    kind, place = draw.integers(5), int(draw.integers(len(content)))
    content = bytearray(content)
    if kind == 0:
        for _ in range(int(draw.integers(1, 30))):
            content[int(draw.integers(len(content)))] ^= int(draw.integers(1, 256))
    elif kind == 1:
        content = content[:place]
    elif kind == 2:
        content[place:place] = content[place // 2 : place]
    elif kind == 3:
        end = place + int(draw.integers(1, 2000))
        content[place:end] = draw.bytes(len(content[place:end]))
    else:
        del content[place : place + int(draw.integers(1, 3000))]
    return bytes(content)


def fuzz(folder, rounds):
    """Damage a shard in `rounds` ways: index, read all; returns (samples found, bad when read)."""
    make_shards(folder / "good", 1, 12)
    good, found, unread = (folder / "good/00000.tar").read_bytes(), 0, 0
    draw, own = np.random.default_rng(0), folder / "own"
    own.mkdir()
    hostile_tar(folder / "hostile.tar")
    seeds = (good, (folder / "hostile.tar").read_bytes())
    for i in range(rounds):
        for old in own.rglob("*.*"):
            old.unlink()
        (own / "0.tar").write_bytes(damaged(seeds[i % 2], draw))
        record = shards.build(str(own), 1)
        assert all(n > 0 for n in record["skipped"].values())
        count = sum(record["counts"])
        if not count:
            with pytest.raises(InputError, match="no shard holds a picture"):
                shards.Shards(str(own), 16)
            continue
        source = shards.Shards(str(own), 16)
        readable = 0
        for i in range(count):  # each alone: what fails is counted once, by its own number
            try:
                image = source.image(i)
                readable += image.shape == (3, 16, 16)
            except pictures.BadPicture as error:
                assert str(error)
        if readable:
            draws = uniform(0, "x", 0, count, DRAWS)
            _, images, _, bad = source.read(np.arange(count), draws)
            # Each bad one is told for every run of bad ones that its replacement meets.
            assert len({where for _, where, _ in bad}) == count - readable
            assert images.shape[0] == count
        found, unread = found + count, unread + count - readable
    return found, unread


def test_fuzzed_shards_never_crash(tmp_path):
    before = set(tmp_path.parent.glob("*"))
    found, unread = fuzz(tmp_path, 100)
    assert found > 600 and unread > 4  # both ways were taken
    assert set(tmp_path.parent.glob("*")) == before


# --- plan --------------------------------------------------------------------------------------


def numbers(batches, step):
    """The pictures of a process's share of a batch, by their captions."""
    tokens = batches[step].tokens
    return [number_of(decode_tokens(row[1 : n - 1]))
            for row, n in zip(tokens, glip.lengths(tokens))]  # fmt: skip


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (3, 2), (4, 1)])
def test_ranks_and_workers_share_exactly_the_epoch(folder, world, workers, monkeypatch):
    """The same global batches for all, the tail from any step, and nothing read before it."""
    monkeypatch.setattr(order, "WINDOW", 2)
    train, test = data.load(str(folder), 16)
    plan = make_order(train, 12, 3, "pretrain")
    free = 120 - len(train.held)
    assert plan.length == free and plan.steps_per_epoch == 9 and plan.unplaced == free - 108
    told = f"{free} pictures; an epoch is 9 steps of 12 = 108, {free - 108} left over"
    assert told in plan.describe() and len(train.held) > 2
    straight = [train.texts(plan.batch(step)) for step in range(18)]
    parts = [Batches(train, plan, NANO, rank, world) for rank in range(world)]
    for start in (0, 7):
        loaders = [iter(loader(part, start, 18, workers, False)) for part in parts]
        for step in range(start, 18):
            batch = [next(loader) for loader in loaders]
            texts = [decode_tokens(row[1 : n - 1]) for item in batch
                     for row, n in zip(item[1], glip.lengths(item[1]))]  # fmt: skip
            assert texts == straight[step]
    for epoch in range(2):
        seen = [number_of(t) for step in range(9) for t in straight[epoch * 9 + step]]
        held = {number_of(t) for t in test.captions}
        assert len(set(seen)) == 108 and not set(seen) & held and len(held) == len(train.held)
    assert straight[:9] != straight[9:]


def test_a_small_shared_memory_is_refused_before_workers_wait_for_it(folder, monkeypatch):
    source, usage = shards.Shards(str(folder), 16), shutil.disk_usage("/")
    batches = Batches(source, ShardOrder(source, 18, 0, "pretrain"), NANO, 0, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(Path, "is_dir", lambda path: True)
    waiting = 2 * 4 * 2 * 18 * 3 * 16**2
    for room, refused in ((waiting, False), (waiting - 1, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, r=room: usage._replace(total=r))
        order.check_shared_memory(batches, 0)
        with pytest.raises(InputError, match=r"/dev/shm.*--workers") if refused else nullcontext():
            order.check_shared_memory(batches, 4)


def test_starting_late_reads_nothing_before(folder, monkeypatch):
    train, _ = data.load(str(folder), 16)
    plan, read = make_order(train, 10, 0, "pretrain"), []
    original = train.encoded
    monkeypatch.setattr(train, "encoded", lambda ids: read.extend(ids) or original(ids))
    list(loader(Batches(train, plan, NANO, 0, 1), 8, 10, 0, False))
    assert read == [i for step in (8, 9) for i in plan.batch(step)]


def test_windows_keep_reads_near_each_other(folder, monkeypatch):
    monkeypatch.setattr(order, "WINDOW", 2)
    train, _ = data.load(str(folder), 16)
    plan = ShardOrder(train, 2, 0, "pretrain")
    shard = [train.shard(i) for i in plan.between(0, 0, plan.length)]
    ends = plan.plan(0)[2].tolist()
    pairs = [set(shard[begin:end]) for begin, end in zip([0, *ends], ends)]
    assert all(len(found) == 2 for found in pairs) and set.union(*pairs) == set(range(6))
    assert len(set(shard[:12])) == 2  # mixed inside
    # Every position is as likely for every picture: where pictures stand on the average.
    places = np.zeros(120)
    for epoch in range(400):
        places[plan.between(epoch, 0, plan.length)] += np.arange(plan.length)
    kept = np.delete(places / 400, train.held)
    assert abs(kept - (len(kept) - 1) / 2).max() < 6.5 * 33 / 400**0.5


def test_order_needs_no_memory_of_the_run(folder):
    train, _ = data.load(str(folder), 16)
    check_order_is_pure(partial(ShardOrder, train, 13), 20, (19, 0, 8, 9, 3))
    with pytest.raises(InputError, match="--tune-batch-size 121 must lie between 2 and the 1"):
        ShardOrder(train, 121, 1, "tune")


def test_sources_are_mixed_by_their_weights(folder, tmp_path):
    other = make_shards(tmp_path / "other", 2, 50)
    shards.build(str(other), 1)
    table = tmp_path / "my.csv"
    files = [tmp_path / f"{n:03}.jpg" for n in range(1000, 1040)]
    for path in files:
        path.write_bytes(picture(int(path.stem)))
    rows = [f"{path.name},number {path.stem} of mine" for path in files]
    table.write_text("\n".join(["path,caption", *rows]))
    names, weights = [str(folder), str(other), str(table)], (1.0, 0.5, 2.0)
    train, test = data.load(names, 16, weights=weights)
    plan = make_order(train, 20, 0, "pretrain")
    assert isinstance(plan, MixedOrder)
    mine = len(train.sources[2])
    first, second = (len(s) - len(s.held) for s in train.sources[:2])
    assert plan.quota == [first, round(second / 2), 2 * mine]
    assert len(test) == 120 - first + 100 - second + 40 - mine
    assert plan.length == sum(plan.quota) and plan.unplaced == plan.length % 20
    last = [0, 0, 0]
    for place in range(plan.length + 1):
        before = plan.shares(place)
        assert sum(before) == place
        assert all(abs(n - place * q / plan.length) < 2.5 for n, q in zip(before, plan.quota))
        assert all(a <= b for a, b in zip(last, before))
        last = before
    epochs = [plan.between(e, 0, plan.length) for e in range(2)]
    for source, start, quota in zip(train.sources, train.starts, plan.quota):
        own = [e[(e >= start) & (e < start + len(source))] for e in epochs]
        assert [len(x) for x in own] == [quota, quota]
        seen = np.unique(np.concatenate(own), return_counts=True)[1]
        assert len(seen) >= len(source) - len(source.held) - 1  # half, and then the other half
        assert seen.min() == seen.max() or quota == plan.quota[1]
    images, tokens = Batches(train, plan, NANO, 0, 1)[3][:2]
    ids = plan.batch(3)
    assert images.shape == (20, 3, 16, 16) and not np.array_equal(ids, np.sort(ids))
    assert torch.equal(tokens, glip.tokenize(train.texts(ids))[:, : tokens.shape[1]])
    halves = [Batches(train, plan, NANO, rank, 2)[3].images for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), images)
    for weights, words in (((1.0,), "needs 3 numbers"), ((1.0, 0.0, 1.0), "above 0")):
        with pytest.raises(InputError, match=words):
            data.load(names, 16, weights=weights)
    with pytest.raises(InputError, match="cannot be mixed"):
        data.load(["emoji", str(folder)], 16)


# --- sampling -----------------------------------------------------------------------------------


def test_balanced_sampling_follows_the_power(folder):
    clusters = np.repeat([7, 1, 3, 9], [1, 9, 30, 80])
    chances = captions.balanced_sampling(clusters, 0.25, 0.2)
    assert abs(chances.sum() - 30) < 1e-6 and chances.max() <= 1
    per_cluster = {c: chances[clusters == c].sum() for c in (1, 3, 9)}
    for a, b in ((1, 3), (3, 9)):
        ratio = ((clusters == b).sum() / (clusters == a).sum()) ** 0.2
        assert abs(per_cluster[b] / per_cluster[a] - ratio) < 1e-6
    train, _ = data.load(str(folder), 16)
    given = np.where(np.isin(np.arange(120), train.held), 0, chances)
    plan = make_order(train, 5, 0, "pretrain", given)
    count = np.zeros(120)
    for epoch in range(600):
        ids = plan.between(epoch, 0, plan.length)
        assert len(ids) == len(set(ids)) == round(given.sum())
        count[ids] += 1
    assert count[train.held].sum() == 0
    free = given > 0
    assert abs(count[free] / 600 - given[free]).max() < 0.1  # drawn about as often as it says
    assert len(set(map(tuple, (np.sort(plan.between(e, 0, plan.length)) for e in range(9))))) == 9


def test_word_sampling_keeps_rare_words(folder, tmp_path):
    train, _ = data.load(str(folder), 16)
    chances = captions.sampling_probabilities("words", train, {"sampling_share": 0.5}, "", 1e-3)
    assert set(np.unique(chances)) == {0.0, 1.0}
    assert chances.sum() == round((120 - len(train.held)) / 2)
    shares = captions.word_shares(train)
    score = [np.mean([min(1, (1e-3 / shares.get(w, 1)) ** 0.5) for w in glip.words(t)])
             for t in train.texts(np.arange(120))]  # fmt: skip
    free = np.delete(np.arange(120), train.held)
    kept = [score[i] for i in free if chances[i]]
    assert min(kept) >= max(score[i] for i in free if not chances[i]) - 1e-6
    plan = make_order(train, 5, 0, "pretrain", chances)
    assert set(plan.between(0, 0, plan.length)) == set(np.flatnonzero(chances))


def test_cluster_files_are_checked(folder, tmp_path):
    train, _ = data.load(str(folder), 16)
    np.save(tmp_path / "short.npy", np.arange(7))
    np.save(tmp_path / "floats.npy", np.zeros(120))
    np.savetxt(tmp_path / "good.txt", np.arange(120) % 4, fmt="%d")
    settings = {"sampling_share": 0.5, "sampling_power": 0.2}
    ask = partial(captions.sampling_probabilities, "clusters", train, settings)
    half = (120 - len(train.held)) / 2
    assert abs(ask(str(tmp_path / "good.txt"), 0).sum() - half) < 1e-6
    for name, words in (("short.npy", "the data have 120"), ("floats.npy", "whole number"),
                        ("none.npy", "cannot be read")):  # fmt: skip
        with pytest.raises(InputError, match=words):
            ask(str(tmp_path / name), 0)


def test_clusters_of_a_table_count_its_rows(tmp_path):
    """Of every row, those that are held out for retrieval among them."""
    rows = ["path,caption"]
    for n in range(60):
        (tmp_path / f"{n:03}.jpg").write_bytes(picture(n))
        rows.append(f"{n:03}.jpg,number {n} of mine")
    (tmp_path / "my.csv").write_text("\n".join(rows))
    np.save(tmp_path / "rows.npy", np.arange(60) >= 12)  # a boolean is no number
    np.save(tmp_path / "clusters.npy", (np.arange(60) >= 12).astype(int))
    train, test = data.load(str(tmp_path / "my.csv"), 16)
    settings = {"sampling_share": 0.4, "sampling_power": 0.0}
    ask = partial(captions.sampling_probabilities, "clusters", train, settings)
    chances = ask(str(tmp_path / "clusters.npy"), 0)
    small = np.array([number_of(text) < 12 for text in train.texts(np.arange(len(train)))])
    assert len(test) and abs(chances.sum() - 0.4 * len(train)) < 1e-6
    assert chances[small].min() == chances[small].max() > 1.5 * chances[~small].max() > 0
    with pytest.raises(InputError, match="the data have 60"):
        ask(str(tmp_path / "rows.npy"), 0)


# --- behind a URL -------------------------------------------------------------------------------


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A file server with ranges, which fails now and then."""

    faults, asked = [], []

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if path.is_dir() or not path.exists():
            return super().do_GET()
        content, status = path.read_bytes(), 200
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        self.asked.append(self.headers.get("Range"))
        if asked:
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            content, status = content[first : last + 1], 206
            fault = self.faults.pop() if self.faults else None
            if fault == "error":
                return self.send_error(503)
            if fault == "drop":
                return self.close_connection_now()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            total = path.stat().st_size
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if asked and fault == "short" else content)
        return None

    def close_connection_now(self):
        self.close_connection = True
        self.connection.close()

    def log_message(self, *words):
        pass


@pytest.fixture
def server(folder):
    handler = partial(Ranges, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Ranges.faults.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_shards_behind_a_url_are_the_same(folder, server, monkeypatch):
    monkeypatch.setattr(shards.time, "sleep", lambda seconds: None)
    location = f"{server}/{{00000..00005}}.tar"
    Ranges.faults += ["error", "drop", "short"]
    shards.build(location, 1)
    local, remote = shards.Shards(str(folder), 16), shards.Shards(location, 16)
    assert np.array_equal(local.addresses, remote.addresses)
    assert np.array_equal(local.all_tokens, remote.all_tokens)
    ids = np.array([3, 119, 50, 3, 77])
    assert remote.encoded(ids) == local.encoded(ids)
    Ranges.faults += ["error", "drop", "short", "error", "drop", "short"]
    assert remote.encoded(ids) == local.encoded(ids) and not Ranges.faults
    Ranges.faults += ["error"] * 100
    failed = remote.encoded(ids[:1])
    assert isinstance(failed[0], Exception)
    Ranges.faults.clear()
    train, _ = data.load(location, 16)
    batches = Batches(train, make_order(train, 8, 0, "pretrain"), NANO, 0, 1)
    wanted = Batches(data.load(str(folder), 16)[0], batches.order, NANO, 0, 1)
    for ours, theirs in zip(loader(batches, 2, 5, 2, False), (wanted[i] for i in (2, 3, 4))):
        assert all(torch.equal(a, b) for a, b in zip(ours[:4], theirs[:4]))


class Bucket(LocalFileSystem):
    """Stands in for s3fs: knows no options but its own, and has addresses of its own."""

    protocol = "bucket"

    def __init__(self):
        super().__init__()

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("bucket://")


def test_other_file_systems_take_no_options_of_https(folder):
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    location = f"bucket://{folder}/{{00000..00005}}.tar"
    shards.build(location, 1)
    local, remote = shards.Shards(str(folder), 16), shards.Shards(location, 16)
    assert np.array_equal(local.all_tokens, remote.all_tokens)
    assert remote.encoded(np.arange(120)) == local.encoded(np.arange(120))


def test_a_listing_behind_a_url(folder, server):
    shards.build(server, 1)
    assert len(shards.Shards(server, 16)) == 120
    with pytest.raises(InputError, match=r"nosuch.*cannot be listed|no finished \.tar"):
        shards.build(f"{server}/nosuch", 1)
    with pytest.raises(InputError, match="install what fsspec needs"):
        shards.build("quux://bucket/x", 1)


# --- memory and scale, short; the long ones are in test_proof.py --------------------------------


def test_reading_does_not_grow(folder):
    assert memory_growth(folder, 4_000) < 0.05


def memory_growth(folder, reads):
    """Growth of a worker's resident memory after the first quarter of its reads."""
    code = (
        "import sys, numpy as np, psutil, data, torch\n"
        "from glip import GLIPConfig\n"
        "from nanoglip.sources.order import Batches, loader, make_order\n"
        "torch.set_num_threads(1)\n"
        "train, _ = data.load(sys.argv[1], 16)\n"
        "order = make_order(train, 10, 0, 'pretrain')\n"
        "batches = Batches(train, order, GLIPConfig.named('ViT-nano-8', 16), 0, 1)\n"
        "sizes = []\n"
        "for _ in loader(batches, 0, int(sys.argv[2]) // 10, 1, False):\n"
        "    sizes += [worker.memory_info().rss for worker in psutil.Process().children()]\n"
        "assert len(sizes) >= int(sys.argv[2]) // 10\n"
        "print(max(sizes) / sizes[len(sizes) // 4] - 1)\n"
    )
    command = [sys.executable, "-c", code, str(folder), str(reads)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


# --- training on shards with bad pictures -------------------------------------------------------


def spoil(folder, numbers):
    """Break the pictures of some samples where they lie, and index them anew."""
    source = shards.Shards(str(folder), 16)
    for i in numbers:
        block, size = source.addresses[i].tolist()
        with open(source.paths[source.shard(i)], "r+b") as file:
            file.seek(block * 512)
            file.write(b"<html>" + bytes(size - 6))
    shards.build(str(folder), 1)


def test_a_batch_with_equal_captions_is_not_overfitted(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "caption", lambda number: "the same")
    folder = make_shards(tmp_path / "same", 1)
    shards.build(str(folder), 1)
    flags = ["--data", str(folder), "--overfit", "4", "--image-size", "16"]
    with pytest.raises(InputError, match=r"equal captions.*: give another --seed"):
        train.overfit(parse(flags))


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """Shards with unreadable pictures, behind those that are looked at before training."""
    folder = make_shards(tmp_path_factory.mktemp("data") / "spoiled", 4, 75)
    shards.build(str(folder), 1)
    held = set(shards.Shards(str(folder), 16).held.tolist())
    bad = [i for i in range(220, 260) if i not in held][:6]
    spoil(folder, bad)
    return folder, bad


@pytest.fixture
def trained(spoiled, tmp_path, monkeypatch, capsys):
    """Train on them, in one process or two."""

    def run(world, *flags):
        words = ["train.py", "--data", str(spoiled[0]), "--batch-size", "18", "--tune-epochs", "0",
                 "--image-size", "16", "--log-every", "1", "--eval-every", "1000", "--precision",
                 "fp32", "--workers", "1", "--out", str(tmp_path / "run"), *flags]  # fmt: skip
        if world == 1:
            return inside(monkeypatch, capsys, train.main, *words)
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(world), "--standalone"]
        return command(*launch, *words)

    return run


@pytest.mark.parametrize("world", [1, 2])
def test_training_lists_each_bad_picture_once(world, trained, spoiled, tmp_path):
    """In quarantine.jsonl, whoever read it and in whatever epoch; the log counts."""
    folder, bad = spoiled
    done = trained(world, "--epochs", "2", "--max-bad", "0.2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(rf"^{len(bad)} pictures could not be read: .*JPEG.* \({len(bad)}\); ",
                     done.stdout, re.MULTILINE), done.stdout  # fmt: skip
    lines = [json.loads(x) for x in (tmp_path / "run/quarantine.jsonl").read_text().splitlines()]
    source = shards.Shards(str(folder), 16)
    assert sorted(line["where"] for line in lines) == sorted(source.where(i) for i in bad)
    assert all(set(line) == {"data", "where", "why"} and "JPEG" in line["why"] for line in lines)
    log = [json.loads(x) for x in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [r["bad"] for r in log if "bad" in r][-1] >= 2 * len(bad) - 3  # once an epoch, or more


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.proof)])
def test_training_stops_at_too_many_bad_pictures(world, trained):
    done = trained(world, "--epochs", "30", "--max-bad", "0.005")
    assert done.returncode != 0
    lines = [x for x in done.stderr.splitlines() if x.startswith("train.py: ")]
    assert len(lines) == 1 and "more than --max-bad 0.005" in lines[0] and "quarantine" in lines[0]
