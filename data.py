"""What is trained on: captioned pictures from one of these sources, or several of yours.

    emoji            emoji art of seven vendors and its Unicode names; one vendor is held out
    scenes-center    the same art, small, on photographs, in the centre
    scenes-corner    in a corner, where a centred mask should not help
    scenes-anywhere  anywhere
    scenes-tiled     all over the picture, which then has no centre
    PATH or URL      yours: shards, a folder of pictures with equally named .txt files, or a CSV/TSV

    python data.py fetch cc3m|cc12m --list FILE.tsv --out DIR    download the images of a list
    python data.py snapshot cc3m|cc12m --out DIR                 download the published shards
    python data.py index DIR                                     index shards

nanoglip/sources/order.py says why neither workers nor processes change the order.
"""

import fnmatch
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from glip import InputError
from nanoglip import cli, files
from nanoglip.machine import cores
from nanoglip.sources import pictures, shards
from nanoglip.sources.emoji import EMBEDDED, HELD_OUT, VENDORS, Emoji
from nanoglip.sources.pictures import CROP_SCALE, MAX_BAD, HeldOut, Mixed, Pictures, Source
from nanoglip.sources.shards import Shards

# --- Opening --------------------------------------------------------------------------------------

def load(
    data: str | Sequence[str],
    image_size: int,
    vendors: tuple[str, ...] = (),
    held_out: str = HELD_OUT,
    weights: Sequence[float] = (),
    max_bad: float = MAX_BAD,
    crop_scale: tuple[float, float] = CROP_SCALE,
) -> tuple[Source, HeldOut]:
    """(training pairs, held-out pairs). Raises InputError for data that cannot be used.

    The held-out pairs of emoji are another vendor's pictures (and other backgrounds); Twitter's are
    never trained on. Of each other source they are one picture in twenty, at most MAX_HELD_OUT,
    the same in every run. With several sources an epoch passes `weights` times through each.
    `crop_scale`: the share of a picture's area that a training crop covers; `max_bad`: the share of
    pictures that may be unreadable.
    """
    names = [data] if isinstance(data, str) else list(data)
    embedded = [name for name in names if name in EMBEDDED]
    if embedded and len(names) > 1:
        raise InputError(f"--data {embedded[0]} is embedded and cannot be mixed with others")
    if weights and len(weights) != len(names):
        needed = cli.counted(len(names), "number")
        raise InputError(f"--data-weights needs {needed}, one for each of --data")
    if not all(0 < weight < math.inf for weight in weights):
        raise InputError("--data-weights must be above 0 and finite")
    if embedded:
        vendors = vendors or tuple(v for v in VENDORS if v not in (held_out, HELD_OUT))
        unknown = sorted({*vendors, held_out} - {*VENDORS})
        if unknown:
            raise InputError(f"unknown vendor {unknown[0]}: choose from {', '.join(VENDORS)}")
        if held_out in vendors:
            raise InputError(f"vendor {held_out} is held out, so --vendors cannot train on it")
        test = Emoji(names[0], image_size, (held_out,), "test")
        return Emoji(names[0], image_size, vendors, "train"), HeldOut([test], [test.held])
    train, test = zip(*(open_source(name, image_size) for name in names), strict=True)
    for source in train:
        source.crop_scale = tuple(crop_scale)
    good = {source: source.check_readable(max_bad) for source in dict.fromkeys((*train, *test))}
    held = HeldOut(test, [good[source] for source in test])
    if len(train) == 1:
        return train[0], held
    return Mixed(train, weights or [1.0] * len(train)), held


def open_source(data: str, image_size: int) -> tuple[Source, Source]:
    """One of --data: the source to train on, and the one whose `held` pictures are held out."""
    path = Path(data)
    if "://" in data or data.endswith(".tar") or (path.is_dir() and any(path.glob("*.tar"))):
        source = Shards(data, image_size)
        return source, source
    if not path.is_dir() and not (path.exists() and path.suffix.lower() in (".csv", ".tsv")):
        problem = "neither a folder, nor .tar shards, nor a .csv or .tsv file"
        problem = problem if path.exists() else "no such folder or file"
        raise InputError(f"--data {data}: {problem}, nor one of {', '.join(EMBEDDED)}")
    rows = pictures.own_pictures(path)
    train, test = pictures.split_rows(rows)
    if not train:
        raise InputError(f"--data {data}: too few pictures to hold some out; add more")
    source, held = Pictures(train, image_size, data), Pictures(test, image_size, data)
    chosen, held.held = set(held.paths), np.arange(len(held))
    source.left_out = np.array([i for i, (file, _) in enumerate(rows) if file in chosen], int)
    return source, held


# --- The commands ---------------------------------------------------------------------------------

SNAPSHOTS = {  # name: (repository on the hub, training pairs in it)
    "cc3m": ("pixparse/cc3m-wds", 2_905_954),
    "cc12m": ("pixparse/cc12m-wds", 10_968_539),
}


@dataclass(frozen=True)
class SnapshotConfig:
    """Download the training shards of a published snapshot, resumable, and index them."""

    name: Annotated[Literal[tuple(SNAPSHOTS)], tyro.conf.Positional]  # cc12m is the paper's own set
    out: Path  # folder for the shards: cc3m takes about 250 GB, cc12m about 1 TB
    processes: int = 0  # processes that index (0: one per core)
    connections: int = 8  # files that are downloaded at a time


@dataclass(frozen=True)
class IndexConfig:
    """Index where every picture and caption lies in tar shards, resumable."""

    location: Annotated[str, tyro.conf.Positional]  # folder, .tar, DIR/x-{0000..0099}.tar, or a URL
    processes: int = 0  # processes that index (0: one per core)


def snapshot(config: SnapshotConfig) -> dict:
    """The record of the index, after downloading the shards and indexing them."""
    cli.check_numbers(config, ("connections",), ("processes",))
    from huggingface_hub import dataset_info, snapshot_download

    repository, expected = SNAPSHOTS[config.name]
    config.out.mkdir(parents=True, exist_ok=True)
    try:
        published = [file.rfilename for file in dataset_info(repository).siblings]
        snapshot_download(
            repository, repo_type="dataset", local_dir=config.out, allow_patterns="*train*.tar",
            max_workers=config.connections,
        )  # fmt: skip
        # If the hub refuses, it returns a folder that is not empty as if it were complete.
        for name in fnmatch.filter(published, "*train*.tar"):
            files.open_regular(config.out / name).close()
    except Exception as error:  # of the hub, of its connections, of the disk
        raise InputError(
            f"{repository}: {shards.error_line(error)}; the same command resumes the download"
        ) from None
    record = index(IndexConfig(str(config.out), config.processes))
    got = sum(record["counts"])
    print(f"{config.name}: {got:,} of {expected:,} published pairs ({got / expected:.2%})")
    print(pictures.LICENCE)
    if got != expected:
        print("the number differs: state it beside every result")
    return record


def index(config: IndexConfig) -> dict:
    """The record of the index of some shards, which is printed in short."""
    cli.check_numbers(config, at_least_0=("processes",))
    location = config.location
    local = not shards.is_remote(location) and not location.endswith(".tar")
    if local and not Path(location).is_dir():
        raise InputError(f"{location}: no such folder; name one with .tar shards")
    record = shards.build(location, config.processes or cores())
    skipped = ", ".join(f"{n:,} {why}" for why, n in sorted(record["skipped"].items()))
    cli.say(
        f"{location}: {cli.counted(sum(record['counts']), 'pair')} in "
        f"{cli.counted(len(record['counts']), 'shard')}; "
        f"skipped: {skipped or 'nothing'}; the index is in {shards.index_folder(location)}"
    )
    return record


@cli.guarded
def main() -> None:
    """fetch, snapshot, index: bad input is one sentence and exit code 2."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    commands = {"snapshot": (snapshot, SnapshotConfig), "index": (index, IndexConfig)}
    if command == "fetch":  # img2dataset is slow to import, and missing on Python 3.13
        from nanoglip.sources import fetch

        commands["fetch"] = fetch.fetch, fetch.FetchConfig
    if command not in commands:
        print(__doc__, file=sys.stderr if command != "--help" else sys.stdout)
        sys.exit(0 if command == "--help" else 2)
    work, config = commands[command]
    work(tyro.cli(config, args=sys.argv[2:], prog=f"data.py {command}"))


if __name__ == "__main__":
    main()
