"""Hostile and unlucky data: each class of input ends in a sentence, or costs only what it hits."""

import codecs
import io
import os
import random
import signal
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import data
import glip
from glip import InputError
from nanoglip import cli, files
from nanoglip.evals import benchmarks
from nanoglip.sources import captions, pictures, shards
from nanoglip.sources.order import loader


def test_a_lock_names_its_owner_and_ends_with_it(tmp_path):
    """Also when the owner is killed; a forked child of the owner holds nothing."""
    folder, (reads, writes) = tmp_path / "own/index", os.pipe()
    tar_of(tmp_path / "own/0.tar", pairs_of([1]))
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
    with pytest.raises(InputError, match=f"process {owner} on .* is indexing it"):
        shards.build(str(tmp_path / "own"), 1)
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    with files.locked(folder, "indexing"):
        assert str(os.getpid()) in (folder / ".lock").read_text()
    assert not list(tmp_path.rglob(".lock"))
    os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("name", ["file/below", "x" * 300], ids=["below a file", "too long"])
def test_what_cannot_be_written_is_a_sentence(name, tmp_path):
    (tmp_path / "file").write_text("no folder")
    for write in (files.write_bytes, lambda path, _: files.locked(path, "indexing").__enter__()):
        with pytest.raises(InputError, match="cannot be written") as error:
            write(tmp_path / name, b"")
        assert "No space left" not in str(error.value)


def png(number=1, **options):
    file = io.BytesIO()
    Image.new("RGB", (24, 24), (number * 5 % 256, 90, 200)).save(file, "PNG", **options)
    return file.getvalue()


def tar_of(path, members, form=tarfile.GNU_FORMAT):
    """A tar of (name, content), as other programs write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def texts_of(location):
    source = shards.Shards(str(location), 16)
    return source.texts(range(len(source)))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")


# --- what changed behind the index ----------------------------------------------------------------


def pairs_of(order, words="a thing numbered"):
    return [(f"{k}.{suffix}", content) for k, n in enumerate(order)
            for suffix, content in (("png", png(n)), ("txt", f"{words} {n}".encode()))]  # fmt: skip


def test_captions_that_changed_are_noticed_and_read_again(tmp_path, capsys):
    """Equal size and headers, another time: in the middle of a shard, where no end tells of it."""
    tar_of(tmp_path / "own/0.tar", pairs_of(range(40)))
    shards.build(str(tmp_path / "own"), 1)
    old = shards.Shards(str(tmp_path / "own"), 16)
    tar_of(tmp_path / "own/0.tar", pairs_of(range(40), "a sting numbered"[:16]))
    known = (tmp_path / "own/0.tar").stat()
    os.utime(tmp_path / "own/0.tar", ns=(0, known.st_mtime_ns + 1))
    with pytest.raises(InputError, match=r"0\.tar is not what was indexed"):
        shards.Shards(str(tmp_path / "own"), 16)
    shards.build(str(tmp_path / "own"), 1)
    assert "up to date" not in capsys.readouterr().out
    assert all(text.startswith("a sting") for text in texts_of(tmp_path / "own"))
    assert shards.Shards(str(tmp_path / "own"), 16).digest != old.digest  # what caches are known by


def test_a_picture_never_gets_anothers_caption(tmp_path):
    """Pictures and captions swapped behind equal headers, with the old time, or while it runs."""
    tar_of(tmp_path / "own/0.tar", pairs_of(range(10, 20)))
    shards.build(str(tmp_path / "own"), 1)
    source, known = shards.Shards(str(tmp_path / "own"), 16), (tmp_path / "own/0.tar").stat()
    assert len({len(png(n)) for n in range(10, 20)}) == 1
    tar_of(tmp_path / "own/0.tar", pairs_of([11, 10, *range(12, 20)]))
    os.utime(tmp_path / "own/0.tar", ns=(0, known.st_mtime_ns))
    found = source.encoded(np.arange(10))
    assert [isinstance(x, OSError) for x in found] == [True, True] + [False] * 8


# --- tars -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("length", [98, 99, 100, 101])
def test_no_folder_of_a_tar_is_lost(length, form, tmp_path):
    folder = "d" * length
    tar_of(tmp_path / "0.tar", [(f"{folder}/{name}", c) for name, c in pairs_of(range(3))], form)
    record = shards.build(str(tmp_path), 1)
    assert record["counts"] == [3] and record["skipped"] == {}


def test_any_number_of_suffixes_is_one_reason(tmp_path):
    odd = [(f"0.x{n}", b"") for n in range(200)]
    tar_of(tmp_path / "0.tar", [*pairs_of([0]), *odd, ("color\x1b[31m.\x1b[2J", b"")])
    record = shards.build(str(tmp_path), 1)
    assert record["counts"] == [1]
    assert record["skipped"] == {"neither picture nor caption": 201}


def test_the_holes_of_a_sparse_shard_are_not_read(tmp_path, monkeypatch):
    """A terabyte of nothing between two pairs, and behind the last."""
    tar_of(tmp_path / "0.tar", pairs_of([1]))
    end = tmp_path / "end.tar"
    tar_of(end, pairs_of([2], "the other"))
    with open(tmp_path / "0.tar", "r+b") as file:
        file.seek(2**40)
        file.write(end.read_bytes())
    os.truncate(tmp_path / "0.tar", 2**41)
    end.unlink()
    read, original = [], tarfile.TarInfo.frombuf

    def counted(*words):
        read.append(1)
        assert len(read) < 10_000
        return original(*words)

    monkeypatch.setattr(tarfile.TarInfo, "frombuf", counted)
    skipped = Counter()
    with open(tmp_path / "0.tar", "rb") as file:
        found = list(shards.members(file, 2**41, skipped))
    assert len(found) == 4 and +skipped == {"hole": 1}


def test_what_lies_in_index_parts_is_no_obstacle(tmp_path):
    """Garbage under the very names that a killed build would have left."""
    tar_of(tmp_path / "0.tar", pairs_of(range(3)))
    tar_of(tmp_path / "1.tar", pairs_of(range(3)))
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "join", lambda home, prints, parts: made.extend(parts) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            shards.build(str(tmp_path), 1)
    made[0].write_bytes(b"garbage")
    content = bytearray(made[1].read_bytes())
    content[content.index(b"skipped.npy") + 100] ^= 255
    made[1].write_bytes(content)
    (made[0].parent / "note").write_text("of somebody else")
    assert shards.build(str(tmp_path), 1)["counts"] == [3, 3]


# --- captions and tables --------------------------------------------------------------------------

ENCODINGS = {
    "utf-8": "ein Apfel é".encode(), "mark": codecs.BOM_UTF8 + "ein Apfel é".encode(),
    "little": "ein Apfel é".encode("utf-16-le"), "big": "ein Apfel é".encode("utf-16-be"),
}  # fmt: skip
ENCODINGS |= {"little with a mark": codecs.BOM_UTF16_LE + ENCODINGS["little"],
              "big with a mark": codecs.BOM_UTF16_BE + ENCODINGS["big"]}  # fmt: skip


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_captions_are_decoded_by_their_mark_or_refused(encoding, tmp_path):
    content, known = ENCODINGS[encoding], encoding not in ("little", "big")
    tar_of(tmp_path / "shards/0.tar", [("a.png", png()), ("a.txt", content), *pairs_of(range(2))])
    record = shards.build(str(tmp_path / "shards"), 1)
    assert record["skipped"] == ({} if known else {"no caption": 1})
    assert ("ein apfel é" in texts_of(tmp_path / "shards")) == known
    own = tmp_path / "own"
    own.mkdir()
    (own / "a.png").write_bytes(png())
    (own / "a.txt").write_bytes(content)
    table = tmp_path / "own.csv"
    text = "path,caption\r\nown/a.png,ein Apfel é\r\n"
    table.write_bytes(text.encode({"mark": "utf-8-sig", "utf-8": "utf-8"}.get(
        encoding, "utf-16" if known else "utf-16-le")))  # fmt: skip
    for path in (own, table):
        if known:
            assert [text for _, text in pictures.own_pictures(path)] == ["ein Apfel é"]
        else:
            with pytest.raises(InputError, match=f"{path}.*not UTF-8"):
                pictures.own_pictures(path)


@pytest.mark.parametrize("kind", ["csv", "tsv"])
@pytest.mark.parametrize("first", ["path", "caption"])
@pytest.mark.parametrize("end", ["nothing", "a quote", "an inch"])
def test_a_quote_that_is_not_closed_swallows_no_rows(end, first, kind, tmp_path):
    mark, rows = {"csv": ",", "tsv": "\t"}[kind], []
    for n in range(30):
        text = f'"picture {n}' if n == 9 else f"picture {n}"
        text += {"a quote": '"', "an inch": '" wide', "nothing": ""}[end] if n == 25 else ""
        rows.append([f"{n}.png", text] if first == "path" else [text, f"{n}.png"])
    heading = ["path", "caption"] if first == "path" else ["caption", "path"]
    table = tmp_path / f"own.{kind}"
    table.write_text("\n".join(mark.join(row) for row in [heading, *rows]))
    with pytest.raises(InputError, match=rf"own\.{kind} row 11: a quote that is not closed"):
        pictures.own_pictures(table)


def test_quotes_that_are_closed_may_hold_commas_and_lines(tmp_path):
    (tmp_path / "own.csv").write_text('path,caption\na.png,"a dog,\n""Rex"", at home"\nb.png,"b"\n')
    texts = [text for _, text in pictures.own_pictures(tmp_path / "own.csv")]
    assert texts == ['a dog, "Rex", at home', "b"]


def test_tabs_in_a_csv_are_told(tmp_path):
    (tmp_path / "tabs.csv").write_text("path\tcaption\na.png\ta dog\n")
    with pytest.raises(InputError, match=r"tabs\.csv.*name a file with tabs between columns \.tsv"):
        pictures.own_pictures(tmp_path / "tabs.csv")


def test_an_endless_word_costs_what_a_long_one_does(monkeypatch):
    """Counted by the letters that reach the merging of pairs."""
    seen = []
    monkeypatch.setattr(glip, "encode_word", lambda word: seen.append(word) or (1,))
    draw = random.Random(0)
    for text in ("".join(draw.choices("abcdefg", k=2**20)), "!" * 2**20, "a " * 2**20):
        seen.clear()
        assert len(glip.encode.__wrapped__(text)) <= 4096
        assert max(map(len, seen)) <= 1000


# --- files that are none --------------------------------------------------------------------------


@pytest.fixture
def endless(tmp_path):
    """Names behind which reading never ends, or fills the memory."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "random.png").symlink_to("/dev/random")
    (tmp_path / "sparse.png").touch()
    os.truncate(tmp_path / "sparse.png", 40 * 2**30)
    (tmp_path / "folder.png").mkdir()
    return sorted(tmp_path.glob("*.png"))


def test_only_regular_files_are_read(endless, tmp_path):
    """As pictures, tables, shards, clusters, sets of benchmarks, and what is classified."""
    assert len(endless) == 5
    source = pictures.Pictures([(path, "a") for path in endless], 16, "own")
    assert all(isinstance(x, OSError) for x in source.encoded(np.arange(5)))
    own = tmp_path / "own"
    (own / "test/c").mkdir(parents=True)
    for path in endless:
        with pytest.raises(InputError, match="not a readable picture"):
            pictures.read_picture(path, 16)
        opens = {
            ".tsv": lambda link: data.load(link, 16),
            ".tar": lambda link: shards.build(link, 1),
            ".npy": lambda link: captions.read_clusters(link, 3),
            ".txt": lambda link: benchmarks.lines_of(Path(link), "names"),
        }
        for suffix, read in opens.items():
            (link := own / f"a{suffix}").symlink_to(path)
            if (path.stem, suffix) != ("sparse", ".tar"):  # which is an empty shard
                with pytest.raises((InputError, OSError), match=str(link)):
                    read(str(link))
            link.unlink()
        (own / "test/c/a.png").symlink_to(path)
        read, _ = benchmarks.of_files([own / "test/c/a.png"])
        with pytest.raises(OSError):
            read(0)
        (own / "test/c/a.png").unlink()


@pytest.mark.parametrize("kind", ["npz", "pickle", "claims", "void", "words", "strings"])
def test_clusters_of_a_wrong_kind(kind, tmp_path):
    path = tmp_path / ("clusters.txt" if kind == "words" else "clusters.npy")
    if kind == "npz":
        with open(path, "wb") as file:
            np.savez(file, a=np.arange(3))
    elif kind == "claims":
        np.save(path, np.arange(3))
        path.write_bytes(path.read_bytes().replace(b"(3,)", b"(3" + b"0" * 14 + b",)"))
    else:
        content = {"pickle": np.array([{}, 1], object), "strings": np.array(["a", "b", "c"])}
        np.save(path, content.get(kind, np.arange(3)), allow_pickle=True)
        if kind in ("void", "words"):
            path.write_bytes({"void": b"", "words": b"one two\n"}[kind])
    with pytest.raises(InputError, match=rf"--clusters .*{path.name}"):
        captions.read_clusters(str(path), 3)


def test_names_that_no_file_can_have(tmp_path, capsys):
    """Too long, with NUL, or not UTF-8: bad pictures, which are counted, and no traceback."""
    latin = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    latin.write_bytes(png())
    rows = [(latin, "a"), (tmp_path / "a\0b.png", "b"), (tmp_path / ("x" * 300 + ".png"), "c")]
    found = pictures.Pictures(rows, 16, "own").encoded(np.arange(3))
    assert [isinstance(x, bytes) for x in found] == [True, False, False]
    assert len(pictures.split_rows(rows)[0]) + len(pictures.split_rows(rows)[1]) == 3
    for n in range(40):
        (tmp_path / os.fsdecode(b"%d\xe9.png" % n)).write_bytes(png(n))
        (tmp_path / os.fsdecode(b"%d\xe9.txt" % n)).write_text(f"number {n}")
    (tmp_path / os.fsdecode(b"3\xe9.png")).write_bytes(b"no picture")
    train, _ = data.load(str(tmp_path), 16, max_bad=0.5)
    assert f"cannot be read: {tmp_path}/3?.png" in capsys.readouterr().out
    assert len(train.key()) == 16
    assert len(files.digest([], train.stamp(np.arange(3)))) == 64


def test_a_cache_that_cannot_be_written_to_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(files, "CACHE", tmp_path / "file/cache")
    assert files.cached(files.CACHE / "a.json", lambda: {"a": 1}) == {"a": 1}
    for n in range(40):
        (tmp_path / f"{n}.png").write_bytes(png(n))
        (tmp_path / f"{n}.txt").write_text(f"number {n}")
    train, _ = data.load(str(tmp_path), 16)
    assert captions.caption_scores(train, 1e-3).shape == (len(train),)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY garbage", b"PK\x03\x04"])
def test_torn_scores_are_computed_again(content, tmp_path):
    for n in range(40):
        (tmp_path / f"{n}.png").write_bytes(png(n))
        (tmp_path / f"{n}.txt").write_text(f"number {n}")
    train, _ = data.load(str(tmp_path), 16)
    scores = captions.caption_scores(train, 1e-3)
    (path,) = files.CACHE.glob("scores-*.npy")
    path.write_bytes(content)
    assert np.array_equal(captions.caption_scores(train, 1e-3), scores)


class Killed(torch.utils.data.Dataset):
    def __getitem__(self, step):
        return os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("words", ["", "DataLoader worker (pid(s) 7) exited unexpectedly"])
def test_a_data_worker_that_the_system_kills_is_a_sentence(words):
    """Its words differ with where it was noticed."""
    with pytest.raises(RuntimeError) as error:
        if words:
            raise RuntimeError(words)
        list(loader(Killed(), 0, 3, 1, False))
    code, (sentence,) = cli.message_of(error.value)
    assert code == 2 and "DataLoader worker" in sentence and "--workers" in sentence


# --- pictures that are sound ----------------------------------------------------------------------


def test_sound_pictures_with_much_beside_them_are_read():
    """A megabyte of text in a PNG, compressed and not; start marks inside a JPEG's metadata."""
    for zip_it in (False, True):
        info = PngImagePlugin.PngInfo()
        for n in range(3):
            info.add_text(f"Comment {n}", "text " * 2**19, zip=zip_it)
        large = png(7, pnginfo=info)
        assert np.array_equal(pictures.decode(large, 8), pictures.decode(png(7), 8))
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(file, "JPEG", progressive=True)
    plain, segment = file.getvalue(), b"\xff\xe9" + (2 + 40_000).to_bytes(2, "big")
    marked = plain[:2] + segment + b"\xff\xda" * 20_000 + plain[2:] + b"\xff\xda\0\0" * 200
    assert np.array_equal(pictures.decode(marked, 8), pictures.decode(plain, 8))
    start = plain.index(b"\xff\xda")
    bomb = plain[:-2] + plain[start:-2] * 101 + plain[-2:]
    with pytest.raises(pictures.BadPicture, match="over 100 scans"):
        pictures.decode(bomb, 8)


# --- what is held out -----------------------------------------------------------------------------


@pytest.mark.parametrize("most", [5000, 3])
def test_the_same_pictures_are_held_out_of_a_folder_a_table_and_shards(most, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_HELD_OUT", most)
    names = [f"{'ab'[n % 2]}/{n:03}.png" for n in range(120)]
    rows, members = ["caption,path"], []
    for n, name in enumerate(names):
        path = tmp_path / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(n))
        path.with_suffix(".txt").write_text(f"number {n}")
        rows.append(f"number {n},own/{name}")
        members += [(name, png(n)), (name.replace("png", "txt"), f"number {n}".encode())]
    (tmp_path / "own.csv").write_text("\n".join(rows))
    tar_of(tmp_path / "shards/0.tar", members[:150])
    tar_of(tmp_path / "shards/1.tar", members[150:])
    shards.build(str(tmp_path / "shards"), 1)
    held = []
    for place in ("own", "own.csv", "shards"):
        test = data.load(str(tmp_path / place), 16)[1]
        texts = [test.captions[i] for i in test.concept]  # from shards with spaces in numbers
        held.append({text.replace("number", "").replace(" ", "") for text in texts})
    assert held[0] == held[1] == held[2] and 2 < len(held[0]) <= min(most, 13)
