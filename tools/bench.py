"""Measure: python -m tools.bench data | zero-shot | probe | estimate | memory | processes

data       how fast data are read, against open_clip's own pipeline. Both read the same shards of
           256-pixel JPEG photographs (scikit-learn's and scikit-image's, cut up), crop and resize
           alike (RandomResizedCrop, half to all of the area, bicubic, 224 pixels) and tokenise, in
           one process on one thread. Beside them: the decoder alone, on the same pictures.
zero-shot  from encoded pictures and class names to accuracy, against open_clip's own loop on the
           same weights, precision (fp32), device and files, ImageNet's 80 prompts, and its
           proportion of 1.6 prompts a picture. Both must find the same accuracy.
probe      one fit of the linear probe against scikit-learn's, on one thread; --size 100000 512 1000
           are pictures, width and classes.
estimate   training steps beside what estimate.py says of them.
memory     a step's highest memory against the batch, under --micro-batch.
processes  the demo's loop on one and two processes.

What is compared alternates: timings of shared machines lie, ratios within a round less. Each
writes results/bench.json.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
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

import glip
import train
from glip import GLIPConfig, InputError
from nanoglip import cli, estimate
from nanoglip.config import TrainConfig, masker_of, parse
from nanoglip.evals import benchmarks, probe
from nanoglip.evals.encoder import Encoder
from nanoglip.evals.metrics import classification
from nanoglip.machine import Device, machine, pick_device, use_bf16
from nanoglip.results import save_bench
from nanoglip.sources import shards
from nanoglip.sources.emoji import Emoji, photographs
from nanoglip.sources.order import Batch, Batches, make_order
from nanoglip.sources.shards import Shards

SIDE, BATCH = 224, 128

# --- Reading data ---------------------------------------------------------------------------------


def make_shards(folder: Path, count: int = 4, size: int = 1000) -> list[bytes]:
    """Write shards of photographs with captions, as img2dataset does; returns their JPEGs."""
    photos = [p for split in ("train", "test") for p in photographs(split, 256)]
    draw, names, jpegs = np.random.default_rng(0), Emoji("emoji", 64, ("Goog",), "test"), []
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
    batches = Batches(train, make_order(train, BATCH, 0, "pretrain"), config, 0, 1)
    for step in range(10**9):
        yield len(batches[step].images)


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
    }  # fmt: skip


# --- Zero-shot classification ---------------------------------------------------------------------


def make_tree(folder: Path, count: int) -> list[str]:
    """Photographs in a folder a class, for ImageFolder and for us; returns the class names."""
    with tempfile.TemporaryDirectory() as name:
        jpegs = make_shards(Path(name), 1, count)
    classes = list(benchmarks.imagenet_names().values())[: max(5, round(1.6 * count / 80))]
    for i, jpeg in enumerate(jpegs):
        place = folder / f"{i % len(classes):04}"
        place.mkdir(exist_ok=True)
        (place / f"{i:05}.jpg").write_bytes(jpeg)
    (folder / "classnames.txt").write_text("\n".join(classes))
    return classes


def our_zero_shot(folder: Path, encoder: Encoder) -> dict[str, float]:
    """Seconds for names and for pictures, and acc1."""
    (benchmark,) = benchmarks.open_benchmarks(str(folder))
    begun = time.perf_counter()
    names = benchmarks.class_features(encoder, benchmark.classes, benchmark.prompts)
    between = time.perf_counter()
    blocks = benchmarks.image_features({"all": (encoder, None)}, benchmark, 0, 1)
    scores = benchmarks.joined([blocks])["all"] @ names.T
    acc1 = classification(scores, torch.from_numpy(benchmark.labels))["acc1"]
    return {"names": between - begun, "pictures": time.perf_counter() - between, "acc1": acc1}


def their_zero_shot(
    folder: Path, model: torch.nn.Module, classes: list[str], device: torch.device
) -> dict[str, float]:
    """The same by open_clip's own functions, with a data worker for each core."""
    import open_clip
    import open_clip_train.zero_shot as theirs
    from torchvision.datasets import ImageFolder

    # open_clip 3.3 makes floats of arrays of one number, which numpy 2.4 refuses.
    theirs.float = lambda x: float(getattr(x, "item", lambda: x)())
    transform = open_clip.image_transform(model.visual.image_size, is_train=False)
    loader = torch.utils.data.DataLoader(
        ImageFolder(str(folder), transform), 64, num_workers=os.cpu_count() or 1
    )
    args = argparse.Namespace(device=str(device), precision="fp32", batch_size=64)
    begun = time.perf_counter()
    names = open_clip.build_zero_shot_classifier(
        model, open_clip.get_tokenizer("ViT-B-32"), classes, open_clip.OPENAI_IMAGENET_TEMPLATES,
        10, device,
    )  # fmt: skip
    between = time.perf_counter()
    acc1, _ = theirs.run(model, names, loader, args)
    return {"names": between - begun, "pictures": time.perf_counter() - between, "acc1": acc1}


def measure_zero_shot(rounds: int, count: int, name: str = "ViT-B-32") -> dict:
    """Alternate both on `count` pictures; medians of seconds, and of ratios within a round."""
    import open_clip

    device = pick_device("auto")
    torch.manual_seed(0)
    model = open_clip.create_model(name, device=device).eval()
    ours = glip.GLIP(GLIPConfig.named(name))
    ours.load_state_dict(model.state_dict())
    encoder = Encoder(ours.to(device), Device(device, bf16=False))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        classes = make_tree(folder, count)
        both = {"ours": lambda: our_zero_shot(folder, encoder),
                "open_clip": lambda: their_zero_shot(folder, model, classes, device)}  # fmt: skip
        found = [{side: run() for side, run in both.items()} for _ in range(rounds + 1)][1:]
    if any(row["ours"]["acc1"] != row["open_clip"]["acc1"] for row in found):
        raise InputError("the two found other accuracies: their times cannot be compared")
    for row in found:
        for seconds in row.values():
            seconds["all"] = seconds["names"] + seconds["pictures"]
    parts = ("names", "pictures", "all")
    ratios = {p: [row["open_clip"][p] / row["ours"][p] for row in found] for p in parts}
    return {
        "seconds": {side: {p: statistics.median(row[side][p] for row in found) for p in parts}
                    for side in both},
        "faster_than_open_clip": {p: statistics.median(v) for p, v in ratios.items()},
        "range": {p: [min(v), max(v)] for p, v in ratios.items()},
        "rounds": rounds, "pictures": count, "classes": len(classes), "model": name,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


# --- Training: what the estimate says, memory against the batch, several processes ----------------

STEPS = [  # what the estimate is compared on: flags, batch
    (["--model", "ViT-nano-8"], 256), (["--model", "ViT-nano-8", "--mask", "none"], 256),
    (["--model", "ViT-S-16", "--optimizer", "adamw"], 64),
    (["--model", "ViT-S-16", "--optimizer", "adamw", "--mask", "none"], 32),
    (["--model", "ViT-B-16", "--optimizer", "adamw"], 32),
    (["--model", "ViT-B-16", "--optimizer", "adamw", "--mask-ratio", "0.5"], 32),
]  # fmt: skip

TEXT = 24  # tokens of the captions


def a_step(flags: list[str], batch: int) -> tuple[object, TrainConfig, GLIPConfig, int]:
    """A training step on random pairs as a function, and what it is of: patches kept, too."""
    config = parse([*flags, "--batch-size", str(batch)])
    model_config = GLIPConfig.named(config.model)
    torch.manual_seed(0)
    model = glip.GLIP(model_config).train()
    optimizers, masker = train.make_optimizers(model, config), masker_of(config)
    patches = model_config.grid[0] * model_config.grid[1]
    images = torch.randint(0, 256, (batch, 3, *model_config.pixels), dtype=torch.uint8)
    tokens = torch.randint(1, 40_000, (batch, TEXT))
    tokens[:, -1] = glip.END
    stage = argparse.Namespace(aclip=False, masker=masker)
    device = torch.device("cpu")
    bf16 = use_bf16("auto", device)

    def step() -> None:
        drawn = Batch(images, tokens, torch.rand(batch, patches), torch.zeros(batch, 0), [])
        train.compute_gradients(model, model, drawn, stage, config, device, bf16)
        train.apply_gradients(model, optimizers, 1e-3, 0.0)

    kept = patches if config.mask == "none" else glip.num_keep(patches, config.mask_ratio)
    return step, config, model_config, kept


def measure_estimate(rounds: int, seconds: float) -> dict:
    """Measured steps beside estimated ones, rates of the machine measured next to each."""
    rows = []
    for flags, batch in STEPS:
        step, config, model, kept = a_step(flags, batch)
        step()
        found = []
        for _ in range(rounds):
            on = estimate.named("here", "auto", model.width)
            told = estimate.of_stage(config, model, kept, TEXT, batch, on, True)["step"]
            took, begun = [], time.perf_counter()
            while time.perf_counter() - begun < seconds or len(took) < 3:
                start = time.perf_counter()
                step()
                took.append(time.perf_counter() - start)
            found.append((statistics.median(took), told))
        ratios = sorted(told / took for took, told in found)
        rows.append({
            "flags": " ".join(flags), "batch": batch,
            "measured": statistics.median(took for took, _ in found),
            "estimated": statistics.median(told for _, told in found),
            "ratio": statistics.median(ratios), "range": [ratios[0], ratios[-1]],
        })  # fmt: skip
        print(rows[-1])
    return {"rows": rows, "rounds": rounds, "text_tokens": TEXT}


CURVE = [("ViT-nano-8", 256, [512, 2048, 8192, 32768]), ("ViT-S-16", 64, [256, 1024, 4096])]


def status(name: str) -> int:
    """A line of this process's memory in /proc, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(name + ":")[2].split()[0]) * 1024


def peak_of(model: str, micro: int, batch: int) -> int:
    """Bytes that the gradients of a batch take above what is there before, in this process."""
    flags = ["--model", model, "--micro-batch", str(micro), "--optimizer", "adamw"]
    small, *_ = a_step(flags, 2 * micro)
    small()  # gradients and optimizer are there, buffers warm
    del small
    step, *_ = a_step(flags, batch)

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
    step()
    return status("VmHWM") - before


def measure_memory() -> dict:
    """Peak memory of a step against the batch, each in a process of its own."""
    rows = []
    for model, micro, batches in CURVE:
        for batch in batches:
            code = f"import bench; print(bench.peak_of({model!r}, {micro}, {batch}))"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                  cwd=Path(__file__).parents[1], check=True)  # fmt: skip
            # features of both towers: found, joined, copied, and the gradients of the copies
            features = 2 * 4 * 4 * batch * GLIPConfig.named(model).embed_dim
            rows.append({"model": model, "micro_batch": micro, "batch": batch,
                         "peak": int(done.stdout), "features": features})  # fmt: skip
            print(rows[-1])
    return {"rows": rows}


SHARED = [(1, []), (2, []), (2, ["--shard"]), (2, ["--micro-batch", "32"])]


def measure_processes(rounds: int) -> dict:
    """Pairs a second of the demo's loop on several processes, by its own log."""
    flags = ["--optimizer", "adamw", "--steps", "40", "--tune-epochs", "0", "--log-every", "10",
             "--eval-every", "1000"]  # fmt: skip
    found, batch = [], parse(flags).batch_size
    for turn in range(rounds):
        row = {}
        for world, more in SHARED:
            threads = max(1, (os.cpu_count() or 1) // world)
            with tempfile.TemporaryDirectory() as name:
                subprocess.run(
                    [sys.executable, "-m", "torch.distributed.run", "--standalone",
                     "--nproc_per_node", str(world), "train.py", *flags, *more, "--out", name],
                    cwd=Path(__file__).parents[1], check=True, capture_output=True,
                    env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                )  # fmt: skip
                lines = (Path(name) / "log.jsonl").read_text().splitlines()
            log = [r for r in map(json.loads, lines) if "loss" in r]
            seconds = log[-1]["seconds"] - log[0]["seconds"]
            row[" ".join([f"{world} processes", *more])] = (
                batch * (log[-1]["step"] - log[0]["step"]) / seconds
            )
        found.append(row)
        print(turn, row)
    alone = next(iter(found[0]))
    return {
        "pairs_per_second": {k: statistics.median(r[k] for r in found) for k in found[0]},
        "to_one": {k: statistics.median(r[k] / r[alone] for r in found) for k in found[0]},
        "rounds": rounds, "batch": batch,
    }  # fmt: skip


# --- One fit of the linear probe ------------------------------------------------------------------


def made_up_features(count: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping clusters, standardised: variances fall as 1/i along hidden axes. (n, D), (n,)."""
    draw = np.random.default_rng(0)
    axes, _ = np.linalg.qr(draw.standard_normal((width, width)))
    scale = np.arange(1, width + 1) ** -0.5
    labels = draw.integers(0, classes, count)
    x = 0.25 * draw.standard_normal((classes, width))[labels] + draw.standard_normal((count, width))
    x = (x * scale) @ axes
    return ((x - x.mean(0)) / x.std(0)).astype(np.float32), labels


def measure_probe(count: int, width: int, classes: int, strength: float = 0.01) -> dict:
    """One fit of `count` pictures by scikit-learn as it is, and by probe.regress; on one thread.

    Seconds are of the processor, not of the clock. `product_share`: of scikit-learn's time, what
    its two matrix products a step take at the rate at which numpy multiplies such matrices.
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    held = max(2000, count // 10)
    x, y = made_up_features(count + held, width, classes)
    x, test, y, wanted = x[:count], x[count:], y[:count], y[count:]
    features, labels = torch.from_numpy(x), torch.from_numpy(y)
    torch.set_num_threads(1)
    rows, found = {}, {}

    def timed(name: str, fit: Callable[[], np.ndarray]) -> None:
        begun = time.process_time()
        predicted = fit()
        seconds = time.process_time() - begun
        rows[name] = {"seconds": seconds, "accuracy": float((predicted == wanted).mean())}

    def plain(dtype: type) -> np.ndarray:
        found[dtype] = LogisticRegression(C=strength, max_iter=1000).fit(x.astype(dtype), y)
        return found[dtype].predict(test)

    def ours() -> np.ndarray:
        weight, bias = probe.regress(features, labels, strength)
        return (torch.from_numpy(test) @ weight + bias).argmax(1).numpy()

    with threadpool_limits(1):
        timed("scikit-learn, fp32", lambda: plain(np.float32))
        timed("scikit-learn, fp64", lambda: plain(np.float64))
        timed("ours, fp32", ours)
        weight, rounds = np.ones((width, classes), np.float32), 5
        begun = time.process_time()
        for _ in range(rounds):
            x[:8192] @ weight
        rate = rounds * min(count, 8192) / (time.process_time() - begun)  # pictures a second
    steps = int(found[np.float32].n_iter_[0])
    slow = rows["scikit-learn, fp32"]["seconds"]
    return {
        "pictures": count, "width": width, "classes": classes, "C": strength, "fits": rows,
        "steps_of_scikit_learn": steps, "product_share": 2 * steps * count / rate / slow,
        "times_faster": {name: slow / row["seconds"] for name, row in rows.items()},
    }  # fmt: skip

WHAT = ("data", "zero-shot", "probe", "estimate", "memory", "processes")


@cli.guarded
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="?", choices=WHAT, default="data")
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds")
    parser.add_argument("--seconds", type=float, default=3.0, help="data: of each part of a round")
    parser.add_argument("--pictures", type=int, default=512, help="zero-shot: how many")
    size = (16_000, 512, 300)
    parser.add_argument("--size", type=int, nargs=3, default=size, help="probe: of what")
    options = parser.parse_args()
    cli.check_numbers(options, ("rounds", "seconds"))
    if options.pictures < 5:
        raise InputError("--pictures must be 5 or more")
    if min(options.size) < 2:
        raise InputError("--size: give pictures, width and classes of 2 at least")
    found = {
        "data": lambda: measure(options.rounds, options.seconds),
        "zero-shot": lambda: measure_zero_shot(options.rounds, options.pictures),
        "probe": lambda: measure_probe(*options.size),
        "estimate": lambda: measure_estimate(options.rounds, options.seconds),
        "memory": measure_memory,
        "processes": lambda: measure_processes(options.rounds),
    }[options.what]()
    found["command"] = f"python {' '.join(['bench.py', *sys.argv[1:]])}"
    found["machine"] = machine(pick_device("auto"))
    save_bench(options.what, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
