"""Measure how fast data are read, against open_clip's own pipeline: python bench.py

Both read the same shards of 256-pixel JPEG photographs (scikit-learn's and scikit-image's, cut
up), crop and resize alike (RandomResizedCrop, half to all of the area, bicubic, 224 pixels) and
tokenise, in one process on one thread, in alternating rounds. Beside them: the decoder alone, on
the same pictures. Timings of shared machines lie, ratios within a round less.
Writes results/bench-data.json.
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import webdataset
from PIL import Image

import data
import evaluate
import glip
import shards
from data import Batches, Shards
from glip import GLIPConfig, InputError

SIDE, BATCH = 224, 128


def make_shards(folder: Path, count: int = 4, size: int = 1000) -> list[bytes]:
    """Write shards of photographs with captions, as img2dataset does; returns their JPEGs."""
    photos = [p for split in ("train", "test") for p in data.photographs(split, 256)]
    draw, names, jpegs = np.random.default_rng(0), data.Emoji("emoji", 64, ("Goog",), "test"), []
    for shard in range(count):
        with webdataset.TarWriter(str(folder / f"{shard:05}.tar")) as writer:
            for i in range(shard * size, (shard + 1) * size):
                photo = photos[i % len(photos)].transpose(1, 2, 0)
                height, width = 256, min(photo.shape[1], int(256 * draw.uniform(1, 1.5)))
                y, x = (draw.integers(0, n - m + 1)
                        for n, m in zip(photo.shape, (height, width), strict=False))  # fmt: skip
                file = io.BytesIO()
                picture = Image.fromarray(photo[y : y + height, x : x + width])
                picture.save(file, "JPEG", quality=95)
                text = " and ".join(names.captions[j] for j in draw.integers(0, 1800, 3))
                writer.write({"__key__": f"{i:09}", "jpg": file.getvalue(), "txt": text,
                              "json": {"caption": text, "width": width}})  # fmt: skip
                jpegs.append(file.getvalue())
    return jpegs


def ours(folder: Path) -> Iterator[int]:
    """Our batches: yields how many pictures came."""
    config, train = GLIPConfig.named("ViT-B-16"), Shards(str(folder), SIDE)
    batches = Batches(train, data.make_order(train, BATCH, 0, "pretrain"), config, 0, 1)
    for step in range(10**9):
        yield len(batches[step][0])


def theirs(folder: Path) -> Iterator[int]:
    """open_clip's batches, by its own functions: yields how many pictures came."""
    import open_clip
    import open_clip_train.data

    # The webdataset that img2dataset pins marks the end of a shard by an entry that open_clip 3.3
    # does not know and stops at: it is taken out, and nothing else is changed.
    expand = open_clip_train.data.tar_file_expander
    open_clip_train.data.tar_file_expander = lambda *a, **k: (
        entry for entry in expand(*a, **k) if "fname" in entry
    )
    names = sorted(str(path) for path in folder.glob("*.tar"))
    args = argparse.Namespace(
        train_data=f"{names[0][:-9]}{{00000..{len(names) - 1:05}}}.tar", val_data=None,
        dataset_resampled=False, train_num_samples=10**6, val_num_samples=None, seed=0, workers=0,
        batch_size=BATCH, world_size=1, rank=0, train_data_upsampling_factors=None,
        distributed=False,
    )  # fmt: skip
    transform = open_clip.image_transform(SIDE, is_train=True, aug_cfg={"scale": (0.5, 1.0)})
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    found = open_clip_train.data.get_wds_dataset(args, transform, True, tokenizer=tokenizer)
    while True:
        for images, _ in found.dataloader:
            yield len(images)


def decoding(jpegs: list[bytes], decode: Callable[[bytes], object]) -> Iterator[int]:
    """A decoder alone."""
    while True:
        for start in range(0, len(jpegs), BATCH):
            block = jpegs[start : start + BATCH]
            for content in block:
                decode(content)
            yield len(block)


def rate(batches: Iterator[int], seconds: float) -> float:
    """Pictures a second."""
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        count += next(batches)
    return count / (time.perf_counter() - begun)


def measure(rounds: int, seconds: float) -> dict:
    """Alternate all that is compared; medians of rates, and of ratios within a round."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jpegs = make_shards(folder)
        shards.build(name, 1)
        running = {
            "ours": ours(folder), "open_clip": theirs(folder),
            "decoder": decoding(jpegs, simplejpeg.decode_jpeg),
            "Pillow": decoding(jpegs, lambda b: Image.open(io.BytesIO(b)).load()),
        }  # fmt: skip
        for batches in running.values():  # buffers filled, files in memory
            rate(batches, 1.0)
        found = [{k: rate(v, seconds) for k, v in running.items()} for _ in range(rounds)]
    ratios = {k: [row["ours"] / row[k] for row in found] for k in running if k != "ours"}
    return {
        "pictures_per_second": {k: statistics.median(row[k] for row in found) for k in running},
        "ours_to": {k: statistics.median(v) for k, v in ratios.items()},
        "range": {k: [min(v), max(v)] for k, v in ratios.items()},
        "rounds": rounds, "mean_bytes": statistics.mean(map(len, jpegs)),
        "command": f"python {' '.join(['bench.py', *sys.argv[1:]])}",
        "machine": evaluate.machine(torch.device("cpu")),
    }  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each part of a round")
    options = parser.parse_args()
    try:
        if options.rounds < 1 or options.seconds <= 0:
            raise InputError("--rounds and --seconds must be above 0")
        found = measure(options.rounds, options.seconds)
    except InputError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)
    text = json.dumps(found, indent=1) + "\n"
    glip.write_bytes(Path(__file__).parent / "results/bench-data.json", text.encode())
    print(text)


if __name__ == "__main__":
    main()
