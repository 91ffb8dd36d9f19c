"""Measurements: python -m tools.bench WHAT, by default data.

data       pictures a second from shards, beside open_clip's own pipeline. Both read 256-pixel JPEG
           photographs (scikit-learn's and scikit-image's, cut up), crop and resize alike (half to
           all of the area, bicubic, 224 pixels) and tokenise, in one process on one thread.
decoding   the same of larger ones, too, beside other ways to decode, by the processor's clock.
zero-shot  from encoded pictures and class names to accuracy, beside open_clip's own loop: the same
           weights, fp32, ImageNet's 80 prompts, 1.6 prompts a picture as there, and one accuracy.
estimate   training steps beside what `train.py --estimate` says of them.
gaze       a training step of ViT-B/16 under gaze, to one under GLIP's mask.
memory     the highest memory of a step against the batch, under --micro-batch.
speedrun   three seeds of the demo with --flags on the validation vendor, for docs/speedrun.md.
           Steps are timed in turn with its first row's. Interrupted, it goes on where it was.

Whatever is compared runs in turn: on shared machines, ratios within a round vary less than times.
Results go to results/bench.json.
"""

import argparse
import io
import json
import math
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import glip
import train
from glip import GLIPConfig, InputError
from nanoglip import cli, estimate
from nanoglip.config import TrainConfig, masker_of, parse, run_name
from nanoglip.evals import benchmarks
from nanoglip.evals.encoder import Encoder
from nanoglip.evals.metrics import classification
from nanoglip.machine import Device, cores, machine, pick_device, resolve
from nanoglip.noise import DRAWS, uniform
from nanoglip.results import load, save_bench
from nanoglip.sources import pictures, shards
from nanoglip.sources.emoji import Emoji, photographs
from nanoglip.sources.order import Batch, Batches, make_order
from tools.sweep import SEEDS, VALIDATION, script, times_of

ROOT = Path(__file__).parents[1]
SHORT = ["--steps", "12", "--tune-epochs", "0.15", "--log-every", "1"]  # of which steps are timed


def in_turn(rounds: int, running: dict[str, Callable[[], float]]) -> tuple[dict, dict, dict]:
    """Medians of the results, by name, and of the first's ratio to the others: medians, ranges.

    A first round, which warms up, is left out.
    """
    rows = [{name: run() for name, run in running.items()} for _ in range(rounds + 1)][1:]
    first, *others = running
    ratios = {name: [row[first] / row[name] for row in rows] for name in others}
    return (
        {name: statistics.median(row[name] for row in rows) for name in running},
        {name: statistics.median(values) for name, values in ratios.items()},
        {name: [min(values), max(values)] for name, values in ratios.items()},
    )


def clocked(run: Callable, *arguments: object) -> float:
    """Seconds that a call takes."""
    begun = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - begun


# --- Reading data ---------------------------------------------------------------------------------

SIDE, BATCH = 224, 128
SIZES = (256, 512, 640, 1024)  # pixels of a shorter side


def make_shards(folder: Path, count: int, size: int = 1000, side: int = 256) -> list[bytes]:
    """Write shards of photographs with captions, as img2dataset does; returns their JPEGs."""
    import webdataset

    photos = [p for split in ("train", "test") for p in photographs(split, 256)]
    if side > 256:  # those of about their own size, mirrored where they end: larger ones are smooth
        photos = [np.pad(p, [(0, 0), *[(0, side)] * 2], "symmetric") for p in photos[1::3]]
    draw, names, jpegs = np.random.default_rng(0), Emoji("emoji", 64, ("Goog",), "test"), []
    for shard in range(count):
        with webdataset.TarWriter(str(folder / f"{shard:05}.tar")) as writer:
            for i in range(shard * size, (shard + 1) * size):
                photo = photos[i % len(photos)].transpose(1, 2, 0)
                shape = side, min(photo.shape[1], int(side * draw.uniform(1, 1.5)))
                y, x = (draw.integers(0, n - m + 1) for n, m in zip(photo.shape, shape))
                picture, file = photo[y : y + shape[0], x : x + shape[1]], io.BytesIO()
                Image.fromarray(picture).save(file, "JPEG", quality=95 if side == 256 else 85)
                text = " and ".join(names.captions[j] for j in draw.integers(0, 1800, 3))
                writer.write({"__key__": f"{i:09}", "jpg": file.getvalue(), "txt": text,
                              "json": {"caption": text, "width": shape[1]}})  # fmt: skip
                jpegs.append(file.getvalue())
    return jpegs


class Whole(shards.Shards):
    """Every picture is decoded whole."""

    def pixels(self, content: bytes, crop: Callable) -> np.ndarray:
        return pictures.decode(content, 2**16, crop=crop)


def our_batches(folder: Path, kind: type) -> Iterator[int]:
    """Sizes of our batches, by our reader or another."""
    source = kind(str(folder), SIDE)
    order = make_order(source, BATCH, 0, "pretrain")
    batches, step = Batches(source, order, GLIPConfig.named("ViT-B-16"), 0, 1), 0
    while True:
        yield len(batches[step].images)
        step += 1


def their_batches(folder: Path) -> Iterator[int]:
    """Sizes of open_clip's batches, by its own functions."""
    import open_clip
    import open_clip_train.data

    # The webdataset that img2dataset pins marks the end of a shard by an entry at which open_clip
    # 3.3 stops: it is taken out.
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


def rate(
    sizes: Iterator[int], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Pictures a second."""
    begun, count = clock(), 0
    while clock() - begun < seconds:
        count += next(sizes)
    return count / (clock() - begun)


def differences(jpegs: list[bytes]) -> dict[str, float]:
    """Levels by which resized crops differ, on average, from bicubic ones of whole pictures."""
    found = []
    for jpeg, draw in zip(jpegs, uniform(0, "bench", 0, len(jpegs), DRAWS), strict=True):
        crop, size = partial(pictures.random_crop, draw=draw), (SIDE, SIDE)
        ours, whole = pictures.decode(jpeg, SIDE, crop=crop), pictures.decode(jpeg, 2**16)
        left, top, _, height = crop(*whole.shape[1::-1])
        if (k := round(height / len(ours))) == 1:
            continue
        whole = whole[top // k * k :, left // k * k :][: k * ours.shape[0], : k * ours.shape[1]]
        ours, wanted = (pictures.resize(x, *size).permute(1, 2, 0).numpy() for x in (ours, whole))
        pillow = [np.asarray(Image.fromarray(whole).resize(size, way))
                  for way in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)]  # fmt: skip
        found.append([np.abs(x - wanted.astype(int)).mean() for x in (ours, *pillow)])
    names = ("ours", "Pillow", "bilinear") if found else ()
    return {name: statistics.mean(row[k] for row in found) for k, name in enumerate(names)}


def reading(
    options: argparse.Namespace, shard_count: int, side: int, kinds: dict[str, type],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict, list[bytes]]:  # fmt: skip
    """Rates of our readers and open_clip's for pictures of one size, and the JPEGs."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        jpegs = make_shards(folder := Path(name), shard_count, side=side)
        shards.build(name, 1)
        readers = {key: our_batches(folder, kind) for key, kind in kinds.items()}
        readers["open_clip"] = their_batches(folder)
        timed = {key: partial(rate, s, options.seconds, clock) for key, s in readers.items()}
        medians, ratios, ranges = in_turn(options.rounds, timed)
    return {"pictures_per_second": medians, "ours_to": ratios, "range": ranges,
            "mean_bytes": statistics.mean(map(len, jpegs))}, jpegs  # fmt: skip


def measure_data(options: argparse.Namespace) -> dict:
    """Rates of both readers."""
    return reading(options, 4, 256, {"ours": shards.Shards})[0] | {"rounds": options.rounds}


def measure_decoding(options: argparse.Namespace) -> dict:
    """Rates of readers for each size of pictures, and what scaling changes."""
    rows, kinds = [], {"ours": shards.Shards, "whole": Whole}
    for side in SIZES:
        row, jpegs = reading(options, 1, side, kinds, time.process_time)
        rows.append({"pixels": side, **row, "levels": differences(jpegs[:200])})
    return {"rows": rows, "rounds": options.rounds}


# --- Zero-shot classification ---------------------------------------------------------------------


def make_tree(folder: Path, count: int) -> list[str]:
    """Write photographs in a folder a class, for ImageFolder and for us; returns the names."""
    with tempfile.TemporaryDirectory() as name:
        jpegs = make_shards(Path(name), 1, count)
    classes = list(benchmarks.imagenet_names().values())[: max(5, round(1.6 * count / 80))]
    for i, jpeg in enumerate(jpegs):
        place = folder / f"{i % len(classes):04}"
        place.mkdir(exist_ok=True)
        (place / f"{i:05}.jpg").write_bytes(jpeg)
    (folder / "classnames.txt").write_text("\n".join(classes))
    return classes


def our_zero_shot(found: set[float], folder: Path, encoder: Encoder) -> None:
    """Add our accuracy to those found."""
    (benchmark,) = benchmarks.open_benchmarks(str(folder))
    names = benchmarks.class_features(encoder, benchmark.classes, benchmark.prompts)
    blocks = benchmarks.image_features({"all": (encoder, None)}, benchmark, 0, 1)
    scores = benchmarks.joined([blocks])["all"] @ names.T
    found.add(classification(scores, torch.from_numpy(benchmark.labels))["acc1"])


def their_zero_shot(
    found: set[float], folder: Path, model: torch.nn.Module, classes: list[str],
    device: torch.device,
) -> None:  # fmt: skip
    """Add open_clip's accuracy, by its own functions, with a data worker for each core."""
    import open_clip
    from open_clip_train import zero_shot
    from torchvision.datasets import ImageFolder

    data = ImageFolder(str(folder), open_clip.image_transform(SIDE, is_train=False))
    loader = torch.utils.data.DataLoader(data, 64, num_workers=cores())
    args = argparse.Namespace(device=str(device), precision="fp32", batch_size=64)
    tokenizer, templates = open_clip.get_tokenizer("ViT-B-32"), open_clip.OPENAI_IMAGENET_TEMPLATES
    names = open_clip.build_zero_shot_classifier(model, tokenizer, classes, templates, 10, device)
    found.add(zero_shot.run(model, names, loader, args)[0])


def measure_zero_shot(options: argparse.Namespace) -> dict:
    """Seconds of both, which must find the same accuracy."""
    import open_clip

    device, name = pick_device("auto"), "ViT-B-32"
    torch.manual_seed(0)
    theirs, ours = open_clip.create_model(name, device=device), glip.GLIP(GLIPConfig.named(name))
    ours.load_state_dict(theirs.eval().state_dict())
    encoder, found = Encoder(ours.to(device), Device(device, bf16=False)), set()
    with tempfile.TemporaryDirectory() as place:
        classes = make_tree(folder := Path(place), options.pictures)
        seconds, ratios, ranges = in_turn(options.rounds, {
            "open_clip": lambda: clocked(their_zero_shot, found, folder, theirs, classes, device),
            "ours": lambda: clocked(our_zero_shot, found, folder, encoder),
        })  # fmt: skip
    if len(found) > 1:
        raise InputError(f"accuracies differ, {found}: times cannot be compared")
    return {"seconds": seconds, "faster_than_open_clip": ratios["ours"], "range": ranges["ours"],
            "rounds": options.rounds, "pictures": options.pictures, "classes": len(classes),
            "model": name, "threads": torch.get_num_threads()}  # fmt: skip


# --- Training steps -------------------------------------------------------------------------------

TEXT = 24  # tokens of the captions


def make_step(flags: str, batch: int) -> tuple[Callable[[], object], TrainConfig]:
    """A training step on random pairs, and its settings."""
    config = parse([*flags.split(), "--batch-size", str(batch)])
    torch.manual_seed(0)
    model = glip.GLIP(GLIPConfig.named(config.model)).train()
    optimizers = train.make_optimizers(model, config)
    images = torch.randint(0, 256, (batch, 3, *model.config.pixels), dtype=torch.uint8)
    tokens = torch.randint(1, 40_000, (batch, TEXT))
    tokens[:, -1] = glip.END
    noise = torch.rand(batch, math.prod(model.config.grid))
    pairs = Batch(images, tokens, noise, torch.zeros(batch, 0), [])
    masker, on = masker_of(config), resolve("cpu", "auto")

    def step() -> None:
        with masker.learning(model.visual):
            train.compute_gradients(model, pairs, masker, config.loss, on, config.micro_batch)
        train.apply_gradients(model, optimizers, 1e-3, 0.0)

    return step, config


STEPS = {  # flags -> batch
    "--model ViT-nano-8": 256, "--model ViT-nano-8 --mask none": 256,
    "--model ViT-S-16 --optimizer adamw": 64, "--model ViT-S-16 --optimizer adamw --mask none": 32,
    "--model ViT-B-16 --optimizer adamw": 32,
    "--model ViT-B-16 --optimizer adamw --mask-ratio 0.5": 32,
}  # fmt: skip


def steady(step: Callable[[], object], seconds: float) -> float:
    """Median seconds of a step, over at least some seconds and three steps."""
    took = []
    while sum(took) < seconds or len(took) < 3:
        took.append(clocked(step))
    return statistics.median(took)


def estimated(config: TrainConfig, batch: int) -> float:
    """The estimate of a step, of this machine's rates as they are now."""
    model = GLIPConfig.named(config.model)
    kept = masker_of(config).num_computed(math.prod(model.grid))
    on = estimate.named("here", "auto", model.width)
    return estimate.of_stage(config, model, kept, TEXT, batch, on, True)["step"]


def measure_estimate(options: argparse.Namespace) -> dict:
    """Measured steps beside estimated ones."""
    rows = []
    for flags, batch in STEPS.items():
        step, config = make_step(flags, batch)
        seconds, ratios, ranges = in_turn(options.rounds, {
            "estimated": partial(estimated, config, batch),
            "measured": partial(steady, step, options.seconds),
        })  # fmt: skip
        rows.append({"flags": flags, "batch": batch, **seconds, "ratio": ratios["measured"],
                     "range": ranges["measured"]})  # fmt: skip
        print(rows[-1])
    return {"rows": rows, "rounds": options.rounds, "text_tokens": TEXT}


def measure_gaze(options: argparse.Namespace) -> dict:
    """A step of ViT-B/16 under gaze, in turn with GLIP's."""
    steps = {mask: make_step(f"--model ViT-B-16 --optimizer adamw --mask {mask}", 32)[0]
             for mask in ("gaze", "gaussian")}  # fmt: skip
    seconds, ratios, ranges = in_turn(options.rounds, {
        mask: partial(steady, step, options.seconds) for mask, step in steps.items()
    })  # fmt: skip
    return {"seconds": seconds, "to_glip": ratios["gaussian"], "range": ranges["gaussian"],
            "rounds": options.rounds, "text_tokens": TEXT}  # fmt: skip


def status(name: str) -> int:
    """A line of this process's memory in /proc, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(name + ":")[2].split()[0]) * 1024


def peak_of(model: str, micro: int, batch: int) -> int:
    """Bytes that a step takes above what is there before; a smaller step warms the process up."""
    flags = f"--model {model} --micro-batch {micro} --optimizer adamw"
    make_step(flags, 2 * micro)[0]()
    step, _ = make_step(flags, batch)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
    step()
    return status("VmHWM") - before


CURVES = [("ViT-nano-8", 256, [512, 2048, 8192, 32768]), ("ViT-S-16", 64, [256, 1024, 4096])]


def measure_memory(options: argparse.Namespace) -> dict:
    """Peak memory of a step against the batch, each in a process of its own."""
    rows = []
    for model, micro, batches in CURVES:
        for batch in batches:
            code = f"from tools import bench; print(bench.peak_of({model!r}, {micro}, {batch}))"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                  cwd=ROOT, check=True)  # fmt: skip
            # features of both towers: found, joined, copied, and the gradients of the copies
            features = 2 * 4 * 4 * batch * GLIPConfig.named(model).embed_dim
            rows.append({"model": model, "micro_batch": micro, "batch": batch,
                         "peak": int(done.stdout), "features": features})  # fmt: skip
            print(rows[-1])
    return {"rows": rows}


def log_of(folder: Path, code: Path, words: list[str]) -> list[dict]:
    """The log of the demo with these flags, by this code, on the validation vendor; resumes it."""
    words = ["train.py", *f"{VALIDATION} --eval-every 100000".split(), *words, "--out", str(folder)]
    if not (folder / "model.pt").exists() and (problem := script(words, cores(), code)):
        raise InputError(f"{' '.join(words)}: {problem}")
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def unpack(commit: str, folder: Path) -> Path:
    """The code of a commit, written below a folder."""
    done = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True)
    if done.returncode:
        raise InputError(f"commit {commit} of the ladder's first row is not in this clone: "
                         "git fetch --unshallow")  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder / commit, filter="data")
    return folder / commit


def training_minutes(record: dict, code: Path) -> float:
    """Minutes of both stages of a row of the ladder, from the median of a few steps of each."""
    with tempfile.TemporaryDirectory() as place:
        log_of(Path(place), code, [*record["flags"].split(), *SHORT])
        return sum(steps * statistics.median(times_of(Path(place), stage))
                   for stage, steps in record["steps"].items()) / 60  # fmt: skip


def measure_speedrun(options: argparse.Namespace) -> dict:
    """The ladder, with what these flags reach at this commit as its last row: docs/speedrun.md."""
    flags, on = options.flags.split(), resolve("auto", "auto")
    where, rows = machine(on.device), load("bench")["speedrun"]["records"]
    if not options.change or not where["commit"] or where["commit"].endswith("-dirty"):
        raise InputError("commit the change, and name it in a few words: --change WORDS")
    parse([*flags, *SHORT])  # refuses what cannot be timed before anything trains
    row = {"change": options.change, "flags": options.flags, "top-1": [], "bf16": on.bf16,
           "commit": where["commit"], "machine": where}  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        code = unpack(rows[0]["commit"], Path(place))
        for seed in map(str, SEEDS):
            words = [*flags, "--seed", seed]
            folder = ROOT / "runs/speedrun" / where["commit"] / run_name(parse(words))
            lines = log_of(folder, ROOT, words)
            row["top-1"].append([x["zero-shot top-1"] for x in lines if "zero-shot top-1" in x][-1])
            row["steps"] = {line["stage"]: line["step"] for line in lines if "loss" in line}
            print(f"seed {seed}: {100 * row['top-1'][-1]:.1f} %", flush=True)
        row["minutes"], ratios, ranges = in_turn(options.rounds, {
            "first": partial(training_minutes, rows[0], code),
            "this": partial(training_minutes, row, ROOT),
        })  # fmt: skip
    return {"records": [*rows, row | {"times_faster": ratios["this"], "range": ranges["this"]}]}


MEASURES = {"data": measure_data, "decoding": measure_decoding, "zero-shot": measure_zero_shot,
            "estimate": measure_estimate, "gaze": measure_gaze, "memory": measure_memory,
            "speedrun": measure_speedrun}  # fmt: skip


@cli.guarded
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="?", choices=MEASURES, default="data")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each part of a round")
    parser.add_argument("--pictures", type=int, default=512, help="zero-shot: how many, from 5 on")
    parser.add_argument("--change", default="", help="speedrun: what is new, in a few words")
    parser.add_argument("--flags", default="", help="speedrun: of train.py, beside the demo's")
    options = parser.parse_args()
    cli.check_numbers(options, ("rounds", "seconds"))
    if options.pictures < 5:
        raise InputError("--pictures must be at least 5")
    found = MEASURES[options.what](options)
    found["command"] = " ".join(["python -m tools.bench", *sys.argv[1:]])
    found["machine"] = machine(pick_device("auto"))
    save_bench(options.what, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
