"""Fine-tune a run's image tower on a labelled folder, from its zero-shot classifier.

    python -m tools.finetune runs/demo --data flowers/           DIR/train/CLASS/*.jpg, DIR/test/...
    python -m tools.finetune runs/demo --data flowers/ --wise 0.3 0.5 and interpolate weights

    logits = features of the picture, normalised, @ head; before the first step the head is
             logit_scale x the text features of the classes' names: zero-shot classification

Below SMALL_SET training pictures the settings are ours (docs/evaluation.md says how they were
found); above, MAE's for ViT-B on ImageNet (arXiv 2111.06377, table 9; main_finetune.py of
facebookresearch/mae), without random erasing. The start is WiSE-FT's (2109.01903), the moving
average FT-CLIP's (2212.06138), the warm-up ours. MAE pools patches; here the class token is read.

Writes into --out: model.pt (the tower in the run's model, and the head), log.jsonl, results.json;
and the accuracy into the run's own results.json, for evaluate.py --publish.
"""

import math
import random
import time
from collections.abc import Callable, Iterator
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from timm.data import Mixup, create_transform
from timm.layers import drop_path
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import glip
from glip import GLIP, InputError
from nanoglip import cli, files, results
from nanoglip.cli import check_numbers
from nanoglip.evals import benchmarks
from nanoglip.evals.encoder import Encoder
from nanoglip.evals.metrics import per_class
from nanoglip.evals.probe import labelled, reader
from nanoglip.machine import Device, cores, machine, resolve
from nanoglip.runlog import command
from nanoglip.sources.pictures import Pictures, decode
from train import lr_at

# --- Settings -------------------------------------------------------------------------------------

SMALL_SET = 10_000  # training pictures
PRESETS = {
    "small": {
        "epochs": 50, "batch_size": 32, "lr": 8e-3, "min_crop": 0.5, "drop_path": 0.0,
        "rand_augment": 0, "mixup": 0.0, "cutmix": 0.0, "ema": 0.99,
    },
    "ImageNet": {
        "epochs": 100, "batch_size": 1024, "lr": 5e-4, "min_crop": 0.08, "drop_path": 0.1,
        "rand_augment": 9, "mixup": 0.8, "cutmix": 1.0, "ema": 0.9998,
    },
}  # fmt: skip


@dataclass(frozen=True)
class FineTuneConfig:
    """Fine-tune a run's image tower on a labelled folder."""

    run: Annotated[str, tyro.conf.Positional]  # folder of a finished run
    data: str  # DIR/train/CLASS/*.jpg and DIR/test, or DIR/CLASS/*.jpg, a fifth of it the test
    out: str = ""  # (default: RUN/finetune-DATA)
    epochs: int | None = None  # None, here and below: by the number of pictures, see PRESETS
    warmup_epochs: float = 5
    batch_size: int | None = None  # pictures; all of them where there are fewer
    lr: float | None = None  # for 256 pictures, and in proportion for other batches
    layer_decay: float = 0.65  # a block's learning rate, in that of the block above it
    weight_decay: float = 0.05
    min_crop: float | None = None  # smallest share of a picture that a training crop covers
    drop_path: float | None = None  # of the last block's branches; from 0 at the first
    rand_augment: int | None = None  # its magnitude, up to 9; 0: crops and mirroring alone
    mixup: float | None = None
    cutmix: float | None = None
    label_smoothing: float = 0.1
    ema: float | None = None  # (0: none)
    wise: tuple[float, ...] = ()  # shares of the fine-tuned weights, the rest being zero-shot's
    workers: int = min(4, cores())
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where multiplied natively
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these there is


def settled(config: FineTuneConfig, count: int) -> FineTuneConfig:
    """The settings for `count` training pictures: a preset, and what was given by hand."""
    name = "small" if count < SMALL_SET else "ImageNet"
    chosen = {key: value for key, value in PRESETS[name].items() if getattr(config, key) is None}
    flags = " ".join(f"--{key.replace('_', '-')} {value:g}" for key, value in chosen.items())
    print(f"{count:,} training pictures, so the settings for {name} sets: {flags}")
    return replace(config, **chosen)


def check(config: FineTuneConfig) -> None:
    """Raise InputError for a setting that cannot work."""
    check_numbers(config, ("epochs", "lr", "layer_decay"),
                  ("warmup_epochs", "weight_decay", "mixup", "cutmix", "workers", "seed"))
    names = ("layer_decay", "min_crop", "drop_path", "ema", "label_smoothing")
    shares = [(name, getattr(config, name)) for name in names]
    for name, share in shares + [("wise", share) for share in config.wise]:
        if not 0 <= share <= 1:
            raise InputError(f"--{name.replace('_', '-')} {share:g}: give a share from 0 to 1")
    if config.batch_size < 2:
        raise InputError(f"--batch-size {config.batch_size}: mixup needs pairs, so at least 2")
    if not 0 <= config.rand_augment <= 9:
        raise InputError(f"--rand-augment {config.rand_augment}: give a magnitude from 0 to 9")
    if config.warmup_epochs >= config.epochs:
        raise InputError(f"--warmup-epochs {config.warmup_epochs:g}: give less than --epochs")


# --- The classifier -------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A model's image features and a linear map of them; its text tower is frozen."""

    def __init__(self, model: GLIP, weight: Tensor) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.model.visual.requires_grad_(True)
        self.head = nn.Linear(*weight.T.shape, device=model.logit_scale.device)
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) -> logits (B, classes), in fp32."""
        features = self.model.encode_image(images)
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features)

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's layer decay: which layer a parameter is of; the others are the head's."""
        return {
            "stem": r"^model\.visual\.(?:class_embedding|positional_embedding|conv1|ln_pre)",
            "blocks": [
                (r"^model\.visual\.transformer\.resblocks\.(\d+)", None),
                (r"^model\.visual\.ln_post", (99999,)),  # timm's number for the last block
            ],
        }


def zero_shot_head(encoder: Encoder, folder: Path, classes: list[str]) -> Tensor:
    """logit_scale x text features of the classes, mean over prompts. -> (classes, E).

    A class is named by a line of DIR/classnames.txt, or by its folder, where WordNet's numbers are
    ImageNet's names; the prompts are the set's own or ImageNet's 80, as in evaluate.py --zero-shot.
    """
    known = benchmarks.imagenet_names()
    names = [known.get(name, name.replace("_", " ")) for name in classes]
    if (folder / "classnames.txt").exists():
        names = benchmarks.class_names(folder)
    if len(names) != len(classes):
        lines = cli.counted(len(names), "line")
        told = f"{folder}/classnames.txt has {lines} for {len(classes)} folders"
        raise InputError(f"{told}: give each class a line, in the order of the folders' names")
    features = benchmarks.class_features(encoder, names, benchmarks.prompts_of(folder))
    return encoder.model.logit_scale.exp().cpu() * features


def drop_paths(visual: nn.Module, rate: float) -> None:
    """Stochastic depth: drop branches of blocks in training, at a rate that grows with depth."""
    blocks = visual.transformer.resblocks
    for block, share in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist(), strict=True):
        for branch in (block.attn, block.mlp):
            branch.register_forward_hook(
                lambda module, _, out, share=share: drop_path(out, share, module.training)
            )


def interpolate(start: dict, end: dict, share: float) -> dict:
    """WiSE-FT: (1 - share) x the zero-shot weights + share x the fine-tuned ones."""
    return {name: torch.lerp(start[name], end[name], share) for name in start}


# --- Training -------------------------------------------------------------------------------------


def reseed(*numbers: int) -> None:
    """Seed Python, NumPy and torch by some numbers: timm's parts draw from all three."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Augmented(Dataset):
    """Training pictures, augmented as a function of the seed, the epoch and the picture."""

    def __init__(self, source: Pictures, config: FineTuneConfig) -> None:
        self.source, self.seed = source, config.seed
        # MAE's, but for mmax9: at 10, timm 1.0 asks Pillow for pictures of 0 bits, and is refused
        augment = f"rand-m{config.rand_augment}-mstd0.5-inc1-mmax9" if config.rand_augment else None
        self.transform = create_transform(
            source.image_size, is_training=True, scale=(config.min_crop, 1.0),
            auto_augment=augment, color_jitter=None,
            interpolation="bicubic", mean=glip.MEAN, std=glip.STD, normalize=False,
        )  # fmt: skip

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int]:
        """(epoch, id) -> picture (3, S, S) bytes, label."""
        reseed(self.seed, *place)
        (content,) = self.source.encoded(np.array([place[1]]))
        picture = Image.fromarray(decode(content, self.source.image_size))
        return self.transform(picture), int(self.source.concept[place[1]])


def batches(ids: np.ndarray, size: int, config: FineTuneConfig) -> Iterator[list]:
    """(epoch, id) of every batch of the run; an epoch's remainder is dropped."""
    for epoch in range(config.epochs):
        order = np.random.default_rng([config.seed, epoch]).permutation(ids)
        for start in range(0, len(order) - size + 1, size):
            yield [(epoch, int(i)) for i in order[start : start + size]]


def fine_tune(
    classifier: Classifier, source: Pictures, ids: np.ndarray, config: FineTuneConfig,
    on: Device, out: Path,
) -> nn.Module:  # fmt: skip
    """Train a classifier in place on pictures `ids`; returns its moving average."""
    size = min(config.batch_size, len(ids)) // 2 * 2  # mixup needs pairs
    epoch_steps = len(ids) // size
    steps, warmup = config.epochs * epoch_steps, round(config.warmup_epochs * epoch_steps)
    groups = param_groups_layer_decay(
        classifier, config.weight_decay, ("model.visual.positional_embedding",),
        layer_decay=config.layer_decay,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    ema, mix = ModelEmaV3(classifier, config.ema, use_warmup=True), None
    if config.mixup or config.cutmix:
        mix = Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing,
                    num_classes=len(source.captions))  # fmt: skip
    loader = DataLoader(
        Augmented(source, config), batch_sampler=batches(ids, size, config),
        num_workers=config.workers, pin_memory=on.device.type == "cuda",
    )  # fmt: skip
    drop_paths(classifier.model.visual, config.drop_path)
    classifier.train()
    for step, (images, labels) in enumerate(tqdm(loader, total=steps, disable=None)):
        lr = lr_at(step, steps, warmup, config.lr * size / 256)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        reseed(config.seed, config.epochs, step)  # pictures have smaller numbers in the middle
        images, targets = (x.to(on.device, non_blocking=True) for x in (images, labels))
        images = images.float() / 255
        if mix:
            images, targets = mix(images, targets)
        with on.autocast():
            logits = classifier(images)
        smoothing = 0.0 if mix else config.label_smoothing
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(classifier, step)
        if (step + 1) % epoch_steps == 0:
            epoch, last = (step + 1) // epoch_steps, loss.item()  # a GPU waits for it
            if not math.isfinite(last):
                raise InputError(f"the loss is {last} in epoch {epoch}: lower --lr {config.lr:g}")
            files.append_line(out / "log.jsonl", {"epoch": epoch, "loss": last, "lr": lr})
    return ema.module


def middles(source: Pictures, ids: np.ndarray) -> Callable[[np.ndarray], Tensor]:
    """As probe.reader, but MAE's crop: resized to 256/224 of the side, then the centre.

    Models of more than 224 pixels see the whole square, as in MAE.
    """
    side, large = source.image_size, copy(source)
    large.image_size = side * 256 // 224 if side <= 224 else side
    start, read = (large.image_size - side) // 2, reader(large, ids)
    return lambda places: read(places)[..., start : start + side, start : start + side]


def accuracy(classifier: Classifier, source: Pictures, ids: np.ndarray, on: Device) -> dict:
    """Top-1 and mean per class of pictures `ids`."""
    features = Encoder(classifier.model, on).images(middles(source, ids), len(ids))
    with torch.no_grad():
        found = deepcopy(classifier.head).cpu()(features).argmax(1).numpy()
    right = found == source.concept[ids]
    return {"accuracy": right.mean(), "mean per class": per_class(right, source.concept[ids])}


# --- The command ----------------------------------------------------------------------------------


def run_fine_tuning(config: FineTuneConfig) -> dict:
    """Everything that `python -m tools.finetune` does; returns the content of results.json."""
    run, on = Path(config.run), resolve(config.device, config.precision)
    model, settings = glip.load_model(run / "model.pt" if run.is_dir() else run)
    source, (train, valid, test) = labelled(config.data, settings.pixels[0], "--data")
    ids = np.sort(np.concatenate([train, valid]))
    config = settled(config, len(ids))
    check(config)
    results.load("results", run)  # raises before the work
    out = Path(config.out or run / f"finetune-{Path(config.data).resolve().name}")
    files.check_new(out)
    head = zero_shot_head(Encoder(model.to(on.device), on), Path(config.data), source.captions)
    classifier = Classifier(model, head)
    tables = {"zero-shot": accuracy(classifier, source, test, on)}
    render = reader(source, ids)
    for places in np.array_split(np.arange(len(ids)), -(-len(ids) // 256)):
        render(places)  # an unreadable picture stops the command now, not in an hour
    start = deepcopy(classifier.state_dict())
    out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    ema = fine_tune(classifier, source, ids, config, on, out)
    seconds = time.perf_counter() - begun
    tables[final := "fine-tuned"] = accuracy(classifier, source, test, on)
    if config.ema:
        classifier.load_state_dict(ema.state_dict())
        tables[final := "fine-tuned, EMA"] = accuracy(classifier, source, test, on)
    head = {name: value.detach() for name, value in classifier.head.named_parameters()}
    glip.save_checkpoint(out / "model.pt", model, head=head, classes=source.captions)
    end = deepcopy(classifier.state_dict())
    for share in config.wise:
        classifier.load_state_dict(interpolate(start, end, share))
        tables[f"WiSE-FT {share:g}"] = accuracy(classifier, source, test, on)
    counts = {"classes": len(source.captions), "training pictures": len(ids),
              "test pictures": len(test)}  # fmt: skip
    told = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    cli.say(f"{run.name} on {source.name}: {told}; top-1, mean per class, in {on.precision}")
    for name, row in tables.items():
        print(f"{name:24}" + "".join(f"{100 * share:>10.1f} %" for share in row.values()))
    result = {
        "name": run.name, "command": command(), "counts": counts, "bf16": on.bf16,
        "config": {**asdict(config), "run": run.name, "data": source.name, "out": out.name},
        "train_seconds": seconds, "machine": machine(on.device), "fine_tuned": tables,
    }  # fmt: skip
    results.save("results", result, out)
    known = results.load("results", run)  # the run's own, for evaluate.py --publish
    found = {source.name: {**tables[final], "from": out.name}}
    results.save("results", {**known, "fine_tune": {**known.get("fine_tune", {}), **found}}, run)
    print(f"wrote {out}/model.pt, results.json, log.jsonl; {run}/results.json has the accuracy")
    return result


@cli.guarded
def main() -> None:
    """The command line: bad input is one sentence and exit code 2."""
    run_fine_tuning(tyro.cli(FineTuneConfig, description=__doc__))


if __name__ == "__main__":
    main()
