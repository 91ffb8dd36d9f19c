"""The published evaluation sets, read where they lie, and asked about; for metrics see metrics.py.

    DIR/classnames.txt                          one class a line
    DIR/zeroshot_classification_templates.txt   one prompt a line, {c} stands for the class
    DIR/dataset_type.txt                        retrieval, multilabel, or not there
    DIR/test/nshards.txt, 0.tar, 1.tar, ...     KEY.webp|png|jpg|jpeg beside KEY.cls (a class),
                                                KEY.npy (0 or 1 a class) or KEY.txt (captions)
    DIR/CLASS/*.jpg, or DIR/test/CLASS/*.jpg    a folder a class; DIR/classnames.txt, if there,
                                                calls them otherwise
    DIR/val2017/*.jpg, DIR/replace_obj.json     SugarCrepe: which of two captions fits

Pictures are prepared as open_clip does for evaluation: RGB, the shorter side resized (bicubic), the
centre cut. Nothing in a set is trusted. A set that is not whole is told in a sentence, and gives no
number: a share of other pictures than everybody's could be compared with nothing.
"""

import io
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from glip import InputError
from nanoglip.cli import printable
from nanoglip.evals.metrics import (
    aupr,
    classification,
    multilabel,
    named,
    per_class,
    retrieved,
    shares,
)
from nanoglip.evals.significance import by_unit, interval
from nanoglip.files import open_regular, read_regular, text_of
from nanoglip.masks import Masker
from nanoglip.sources import pictures, shards
from nanoglip.sources.pictures import SUFFIXES, check_pixels, decode

# --- What is published, and under which names -----------------------------------------------------

VTAB = ("caltech101", "cifar10", "cifar100", "clevr_count_all", "dtd", "eurosat", "flowers",
        "kitti_closest_vehicle_distance", "pcam", "pets", "resisc45")  # fmt: skip

SETS = {  # the paper's tables; it publishes numbers of the first alone: the grouping is ours
    "T1": ("imagenet1k",),
    "T2": (*VTAB, "food101", "cub", "sun397", "cars", "fgvc_aircraft", "kinetics700", "mnist",
           "fer2013", "stl10", "gtsrb", "country211", "ucf101", "hateful_memes", "renderedsst2",
           "imagenet1k"),
    "T3": ("imagenetv2", "imagenet-a", "imagenet-r", "imagenet_sketch", "imagenet-o", "objectnet"),
    "T4": ("mscoco_captions", "flickr30k"),
    "T6": ("imagenet1k", "mscoco_captions", "flickr30k"),
    "T7": ("imagenet1k",),
}  # fmt: skip

PROBED = ("cifar10", "cifar100", "imagenet1k")  # T5's linear probes

UNPUBLISHED = ("cub", "kinetics700", "ucf101", "hateful_memes")  # in this layout, that is

METRICS = {  # what a set, or a kind of sets, is reported by where it is not acc1
    **dict.fromkeys(("caltech101", "fgvc_aircraft", "flowers", "pets"), "mean_per_class_recall"),
    "hateful_memes": "roc_auc", "kinetics700": "mean_of_acc1_acc5",
    "multilabel": "mean_average_precision", "retrieval": "text_retrieval_recall@1",
    "choice": "text_acc",
}  # fmt: skip

SUGAR_CREPE = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att",
               "swap_obj")  # fmt: skip

ONE_PROMPT = "a photo of a {c}."


def set_name(folder: Path) -> str:
    """A folder's name as CLIP_benchmark calls the set: wds_vtab-pets -> pets."""
    return re.sub(r"^(wds_)?(vtab[-_])?", "", folder.name.lower())


def suite(root: Path) -> tuple[list[str], list[str], list[str]]:
    """What `root` holds of the paper's sets, with classes and with captions, and what it lacks.

    A set is a folder under its name. What is missing comes with how to get it.
    """
    found, missing = {}, []
    signs = ("*/nshards.txt", "classnames.txt", "n[0-9]*", "*/n[0-9]*", "0", "*/0")
    for name in dict.fromkeys(name for names in SETS.values() for name in names):
        folders = [root / f"{start}{name}" for start in ("", "wds_", "vtab-", "wds_vtab-")]
        there = [f for f in folders if any(next(f.glob(sign), None) for sign in signs)]
        if there:
            found[name] = str(there[0])
        elif name in UNPUBLISHED:
            how = f"lay it out as {root / name}/CLASS/*.jpg beside {root / name}/classnames.txt"
            missing.append(f"not there: {name}: {how}")
        else:
            place = f"clip-benchmark/wds_{'vtab-' * (name in VTAB)}{name}"
            how = f"hf download --repo-type dataset {place} --local-dir {root / name}"
            missing.append(f"not there: {name}: {how}")
    captioned = [place for name, place in found.items() if name in SETS["T4"]]
    return [place for place in found.values() if place not in captioned], captioned, missing


# --- One reader -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """A set of M pictures, each read when its turn comes, and what is asked about them."""

    name: str
    kind: str  # classification, multilabel, retrieval, or choice (the first caption is right)
    labels: np.ndarray  # (M,) class, or (M, C) 0 and 1, or with captions a picture's own number
    read: Callable[[int], bytes | Image.Image]
    where: Callable[[int], str]  # for people
    classes: Sequence[str] = ()
    prompts: Sequence[str] = ()
    captions: Sequence[Sequence[str]] = ()  # of each picture

    @property
    def metric(self) -> str:
        """The metric that the set is reported by."""
        return METRICS.get(self.name) or METRICS.get(self.kind, "acc1")

    def single(self, metric: str, right: np.ndarray) -> np.ndarray:
        """A metric's answers (n,); counted by picture, (M, 2), where these have several."""
        if metric.startswith("image_retrieval"):  # asked about every caption
            return by_unit(right, np.repeat(self.labels, [len(texts) for texts in self.captions]))
        return by_unit(right, self.labels) if self.kind == "choice" else right


def open_benchmarks(place: str, split: str = "test") -> list[Benchmark]:
    """The set in a folder; SugarCrepe is several.

    Raises InputError for what is not there, not whole, or contradicts itself.
    """
    folder = Path(place)
    if not folder.is_dir():
        raise InputError(f"{place}: no such folder: `--suite paper` says how to get a set")
    crepes = [task for task in SUGAR_CREPE if (folder / f"{task}.json").is_file()]
    if crepes:
        return [open_sugar_crepe(folder, task) for task in crepes]
    if any((folder / split).glob("*.tar")) or (folder / split / "nshards.txt").exists():
        return [open_shards(folder, split)]
    return [open_tree(folder, split)]


def lines_of(path: Path, what: str) -> list[str]:
    """A text file's lines, without empty ones at its end.

    Raises InputError for a file that is missing or not text, and for an empty line between others.
    """
    try:
        text = read_regular(path, 2**26).decode("utf-8-sig").rstrip()
        lines = [line.strip() for line in text.splitlines()]
    except (OSError, UnicodeDecodeError):
        why = "not readable text" if path.exists() else "not there"
        raise InputError(f"{path}: {why}: write {what}") from None
    if not all(lines) or not lines:
        raise InputError(f"{path}: line {[*lines, ''].index('') + 1} is empty: write {what}")
    return lines


def class_names(folder: Path) -> list[str]:
    """The names in a set's classnames.txt."""
    return lines_of(folder / "classnames.txt", "one class a line")


def prompts_of(folder: Path) -> list[str]:
    """A set's own prompts; OpenAI's 80 for ImageNet where it has none, as in CLIP_benchmark."""
    path = folder / "zeroshot_classification_templates.txt"
    if not path.exists():
        from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

        return [prompt("{c}") for prompt in OPENAI_IMAGENET_TEMPLATES]
    prompts = lines_of(path, "one prompt a line, {c} for the class")
    for number, prompt in enumerate(prompts, start=1):
        if "{c}" not in prompt:
            raise InputError(f"{path}: line {number} has no {{c}}, which stands for the class")
    return prompts


def imagenet_names() -> dict[str, str]:
    """ImageNet's 1,000 classes, in their order: WordNet's number -> OpenAI's name."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    return dict(zip(ImageNetInfo().label_names(), IMAGENET_CLASSNAMES, strict=True))


def check_labels(labels: np.ndarray, classes: Sequence[str], where: Callable[[int], str]) -> None:
    """Raise InputError for a class (M,) that has no name."""
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        raise InputError(
            f"{where(int(wrong[0]))}: class {labels[wrong[0]]} is out of range, {len(classes)} "
            "have a name, counted from 0: repair classnames.txt or copy the set anew"
        )


TARGETS = {"classification": ".cls", "multilabel": ".npy", "retrieval": ".txt"}


def open_shards(folder: Path, split: str) -> Benchmark:
    """CLIP_benchmark's layout: see the top."""
    home, kind = folder / split, "classification"
    if (folder / "dataset_type.txt").exists():
        kind = lines_of(folder / "dataset_type.txt", f"one of {', '.join(TARGETS)}")[0].lower()
    if kind not in TARGETS:
        raise InputError(f"{folder}/dataset_type.txt: not one of {', '.join(TARGETS)}")
    told = lines_of(home / "nshards.txt", "the number of shards")[0]
    there = {path.name for path in home.glob("*.tar")}
    if told != str(len(there)) or there != {f"{i}.tar" for i in range(len(there))}:
        raise InputError(
            f"{home}: nshards.txt says {told[:20]} shards, 0.tar and so on; {len(there)} .tar are "
            "there: copy the set anew"
        )
    samples = [s for i in range(len(there)) for s in samples_of(home / f"{i}.tar", TARGETS[kind])]
    targets = [sample[-1] for sample in samples]

    def where(i: int) -> str:
        path, key, *_ = samples[i]
        return f"{path} {printable(key)}"

    def read(i: int) -> bytes:
        path, _, offset, size, _ = samples[i]
        file = shards.opened(str(path))  # held, for a thread may have opened it for itself alone
        return os.pread(file.fileno(), size, offset)

    own = set_name(folder), kind
    if kind == "retrieval":
        captions = [text_of(text).splitlines() for text in targets]
        if not all(captions):
            raise InputError(f"{where(captions.index([]))}: a picture without a caption")
        return Benchmark(*own, np.arange(len(samples)), read, where, captions=captions)
    classes, prompts = class_names(folder), prompts_of(folder)
    for i, text in enumerate(targets):
        try:
            targets[i] = several(text, len(classes)) if kind == "multilabel" else int(text)
        except (ValueError, EOFError, OSError, MemoryError):  # numpy has many kinds
            wants = f"{len(classes)} times 0 or 1" if kind == "multilabel" else "a class number"
            raise InputError(
                f"{where(i)}: {TARGETS[kind]} does not hold {wants}: copy the set anew"
            ) from None
    labels = np.array(targets)
    if kind == "classification":
        check_labels(labels, classes, where)
    return Benchmark(*own, labels, read, where, classes, prompts)


def samples_of(path: Path, wanted: str) -> list[tuple[Path, str, int, int, bytes]]:
    """(shard, key, offset, bytes, target) of a shard's samples; raises InputError for damage."""
    skipped, found = Counter(), {}
    with open_regular(path) as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - 2 * shards.BLOCK))
        skipped["cut short"] += file.read() != bytes(2 * shards.BLOCK)  # with which a tar ends
        for name, offset, size, _ in shards.members(file, length, skipped):
            folder, _, base = name.rpartition("/")
            key, dot, suffix = base.partition(".")
            suffix = (dot + suffix).lower()
            kind = "picture" if suffix in pictures.PICTURES else suffix
            if kind not in ("picture", wanted):
                continue
            record = found.setdefault((folder, key), {})
            if kind in record:
                skipped[f"{printable(key)} twice"] += 1
            elif size > (pictures.PICTURE_CAP if kind == "picture" else pictures.CAPTION_CAP):
                skipped[f"{printable(key)} too large"] += 1
            elif kind == "picture":
                record[kind] = (offset, size)
            else:
                file.seek(offset)
                record[kind] = file.read(size)
    for (_, key), record in found.items():
        if len(record) < 2:
            lack = wanted if "picture" in record else "picture"
            skipped[f"{printable(key)} without a {lack}"] += 1
    if +skipped or not found:
        why = next(iter(+skipped), "no picture in it")
        raise InputError(f"{path}: not whole ({why}): copy the set anew")
    return [(path, key, *record["picture"], record[wanted]) for (_, key), record in found.items()]


def several(text: bytes, classes: int) -> np.ndarray:
    """Whether a picture is of each class, from a .npy, (C,); raises ValueError and others."""
    found = np.load(io.BytesIO(text), allow_pickle=False)
    if found.shape != (classes,) or not np.isin(found, (0, 1)).all():
        raise ValueError
    return found.astype(int)


def open_tree(folder: Path, split: str) -> Benchmark:
    """A folder a class. Folders of whole numbers are class numbers; WordNet's are ImageNet's.

    Otherwise the lines of classnames.txt stand in the folders' alphabetic order, as torchvision
    numbers them; without that file the folders' names are the classes'.
    """
    home = next(h for h in (folder / split, folder / "val", folder) if h.is_dir())
    folders = sorted(path for path in home.iterdir() if path.is_dir())
    found = [
        (path, number) for number, place in enumerate(folders)
        for path in sorted(place.rglob("*")) if path.suffix.lower() in SUFFIXES
    ]  # fmt: skip
    if not found:
        raise InputError(
            f"{folder}: neither {split}/nshards.txt with shards nor {split}/CLASS/*.jpg is in it"
        )
    files, labels = zip(*found, strict=True)
    names = [path.name for path in folders]
    numbered = all(re.fullmatch(r"\d{1,9}", name) for name in names)
    if (folder / "classnames.txt").exists():
        classes = class_names(folder)
    else:
        known = imagenet_names()
        every = numbered and len(names) == len(known)  # ImageNet-V2
        classes = [known[name] for name in (known if every else names) if name in known]
        wordnet = any(re.fullmatch(r"n\d{8}", name) for name in names)
        direct = {path.parent for path, _ in found} >= set(folders)  # not train/CLASS, val/CLASS
        if direct and len(names) > 1 and not numbered and not wordnet:
            classes = [name.replace("_", " ") for name in names]
    if not classes or (not numbered and len(classes) != len(names)):
        raise InputError(
            f"{folder}/classnames.txt: {len(classes) or 'no'} names for the {len(names)} folders "
            f"of {home}: write one a line, in the folders' order"
        )
    labels = np.array([int(names[i]) if numbered else i for i in labels])
    read, where = of_files(files)
    check_labels(labels, classes, where)
    return Benchmark(set_name(folder), "classification", labels, read, where, classes,
                     prompts_of(folder))  # fmt: skip


def of_files(files: Sequence[Path]) -> tuple[Callable[[int], bytes], Callable[[int], str]]:
    """How a Benchmark of these files reads one, and names it."""
    return lambda i: read_regular(files[i], pictures.PICTURE_CAP), lambda i: str(files[i])


def open_sugar_crepe(folder: Path, task: str) -> Benchmark:
    """SugarCrepe (2306.14610): COCO's pictures in val2017/, and for each a caption and a wrong one.
    """
    path = folder / f"{task}.json"
    try:
        rows = list(json.loads(read_regular(path, 2**28)).values())
        captions = [[row["caption"], row["negative_caption"]] for row in rows]
        names = [row["filename"] for row in rows]
        if not rows or not all(isinstance(x, str) for row in (names, *captions) for x in row):
            raise ValueError
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{path}: not SugarCrepe's list of captions: copy it anew") from None
    read, where = of_files([folder / "val2017" / Path(name).name for name in names])
    return Benchmark(f"sugar_crepe/{task}", "choice", np.unique(names, return_inverse=True)[1],
                     read, where, captions=captions)  # fmt: skip


# --- Features -------------------------------------------------------------------------------------

BLOCK = 256  # pictures that a model gets at a time: the same for every number of processes


def plain(image: Image.Image) -> Image.Image:
    """RGB as open_clip and CLIP_benchmark have it: transparency and the camera's turn ignored."""
    return image.convert("RGB")


def prepared(benchmark: Benchmark, i: int, sides: Sequence[int]) -> list[Tensor]:
    """A picture as open_clip's evaluation sees it, for each side S: (3, S, S) bytes."""
    try:
        content = benchmark.read(i)
        if isinstance(content, bytes):
            content = Image.fromarray(decode(content, 2**16, plain))
        image, found = plain(content), []
        for side in sides:
            size = [int(side * length / min(image.size)) for length in image.size]
            check_pixels(*size)
            left, top = (round((length - side) / 2) for length in size)
            cut = image.resize(size, Image.Resampling.BICUBIC)
            cut = cut.crop((left, top, left + side, top + side))
            found.append(torch.from_numpy(np.array(cut)).permute(2, 0, 1))
        return found
    except (OSError, SyntaxError, ValueError) as error:  # PIL's, and BadPicture
        raise InputError(
            f"{benchmark.where(i)}: not a readable picture ({error}): copy the set anew"
        ) from None


# A column of the tables: an Encoder (evaluate.py) and the mask that it is asked under, if any.
Columns = dict[str, tuple[object, Masker | None]]


def image_features(columns: Columns, benchmark: Benchmark, rank: int, world: int) -> list:
    """This process's blocks of image_features (B, E) by column; every picture is decoded once."""
    sides = sorted({encoder.model.config.pixels[0] for encoder, _ in columns.values()})
    blocks, found = torch.arange(len(benchmark.labels)).split(BLOCK)[rank::world], []
    with ThreadPoolExecutor() as pool:

        def start(ids: Sequence[int]) -> list:
            return [pool.submit(prepared, benchmark, int(i), sides) for i in ids]

        waiting = start(blocks[0] if blocks else ())
        bar = tqdm(blocks, benchmark.name, leave=False, disable=rank > 0)
        for ids, following in zip(bar, (*blocks[1:], ())):
            pictures, waiting = [job.result() for job in waiting], start(following)
            stacks = dict(zip(sides, map(torch.stack, zip(*pictures)), strict=True))
            found.append({
                column: encoder.block(stacks[encoder.model.config.pixels[0]], int(ids[0]), mask)
                for column, (encoder, mask) in columns.items()
            })  # fmt: skip
    return found


def joined(parts: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Every process's blocks in their order -> image_features (M, E) by column."""
    blocks = [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]
    return {column: torch.cat([block[column] for block in blocks]) for column in blocks[0]}


def class_features(encoder: object, classes: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """Each class's text_features over all prompts: their mean, normalised again. (C, E)."""
    texts = [prompt.replace("{c}", name) for prompt in prompts for name in classes]
    features = encoder.texts(texts).unflatten(0, (len(prompts), -1))           # (P, C, E)
    return F.normalize(features.mean(dim=0), dim=-1)


def measure(
    benchmark: Benchmark, encoder: object, images: Tensor
) -> tuple[dict[str, float], dict[str, Tensor], Tensor | None]:
    """A set's metrics from image_features (M, E), single answers, a classification's scores (M, C).

    The answers (n,) are whether each was right, by metric, where a metric is a share of answers.
    """
    if benchmark.captions:
        texts = encoder.texts([text for captions in benchmark.captions for text in captions])
        if benchmark.kind == "choice":
            scores = (texts.unflatten(0, (len(images), -1)) @ images[:, :, None])[:, :, 0]
            hits = {"text_acc": scores.argmax(dim=1) == 0}
        else:
            counts = torch.tensor([len(captions) for captions in benchmark.captions])
            hits = retrieved(images, texts, torch.arange(len(images)).repeat_interleave(counts))
        return shares(hits), hits, None
    labels = torch.from_numpy(benchmark.labels)
    metrics = multilabel if benchmark.kind == "multilabel" else classification
    scores, single = (images @ class_features(encoder, benchmark.classes, prompts).T
                      for prompts in (benchmark.prompts, [ONE_PROMPT]))  # fmt: skip
    other = {f"{metric}_one_prompt": value for metric, value in metrics(single, labels).items()}
    hits = named(scores, labels) if benchmark.kind == "classification" else {}
    return metrics(scores, labels) | other, hits, scores


def intervals(benchmark: Benchmark, hits: dict[str, np.ndarray]) -> dict[str, tuple]:
    """The 95 % interval, by bootstrap over pictures, of each metric that comes from `single`'s."""
    found = {metric: interval(right) for metric, right in hits.items()}
    if benchmark.metric == "mean_per_class_recall" and "acc1" in hits:
        found[benchmark.metric] = interval(hits["acc1"], benchmark.labels, statistic=per_class)
    return found


# --- Many sets ------------------------------------------------------------------------------------


def evaluate_sets(
    columns: Columns, places: Sequence[str], captioned: Sequence[str], rank: int = 0,
    world: int = 1,
) -> tuple[dict[str, dict], dict[str, dict], list[str]]:  # fmt: skip
    """Of `places` (with classes) and `captioned`: results by set, answers, what is wrong with some.

    Answers are Benchmark.single's, by set, column and metric; a set that is broken gets a sentence.
    Of several processes each encodes its blocks, and the first has what is found.
    """
    results, answers, problems, kept, seen = {}, {}, [], {}, set()
    for place in (*places, *captioned):
        problem, own = "", []
        try:
            for benchmark in open_benchmarks(place):
                if bool(benchmark.captions) != (place in captioned):
                    flag = "--zero-shot" if place in captioned else "--retrieval"
                    raise InputError(f"{place}: a set for {benchmark.kind}: give it to {flag}")
                if benchmark.name in seen:
                    raise InputError(f"{place}: another set is called {benchmark.name}: rename it")
                seen.add(benchmark.name)
                own.append((benchmark, image_features(columns, benchmark, rank, world)))
        except InputError as error:
            problem = str(error)
        parts = [(problem, [blocks for _, blocks in own])] * world
        if world > 1:
            dist.all_gather_object(parts, parts[rank])
        problem = next((problem for problem, _ in parts if problem), "")
        if problem:
            problems.append(problem)
        for number, (benchmark, _) in enumerate(() if problem or rank else own):
            features = joined([blocks[number] for _, blocks in parts])
            metrics, hits, scores = {}, {}, {}
            for column, (encoder, _) in columns.items():
                found = measure(benchmark, encoder, features[column])
                metrics[column], right, scores[column] = found
                hits[column] = {metric: benchmark.single(metric, each.numpy())
                                for metric, each in right.items()}  # fmt: skip
            answers[benchmark.name] = hits
            results[benchmark.name] = {
                "kind": benchmark.kind, "metric": benchmark.metric,
                "pictures": len(benchmark.labels), "classes": len(benchmark.classes),
                "prompts": len(benchmark.prompts), "captions": sum(map(len, benchmark.captions)),
                "columns": metrics,
                "intervals": {column: intervals(benchmark, hits[column]) for column in columns},
            }  # fmt: skip
            if benchmark.kind == "classification" and benchmark.name in SETS["T1"] + SETS["T3"]:
                kept[benchmark.name] = benchmark, scores
    compare_with_imagenet(results, kept, columns)
    return results, answers, problems


def compare_with_imagenet(results: dict[str, dict], kept: dict, columns: Columns) -> None:
    """Add to the robustness sets the drop in acc1 against ImageNet, on their own classes.

    `kept`: (set, scores (M, C) by column) by name. A subset of ImageNet's classes is known by their
    names: ImageNet's pictures of the same classes then choose among the same names. A set of other
    names (ObjectNet) is compared with all of ImageNet. The pictures of ImageNet-O are of no class
    of ImageNet: `aupr` (1907.07174) tells how well they are found by the model's low confidence.
    """
    imagenet, everything = kept.pop("imagenet1k", (None, {}))
    for name, (benchmark, scores) in kept.items() if imagenet else ():
        entry, places = results[name], defaultdict(list)
        for i, known in enumerate(imagenet.classes):
            places[known].append(i)
        chosen = [places[c].pop(0) for c in benchmark.classes if places[c]]
        if len(chosen) < len(benchmark.classes):
            chosen = list(range(len(imagenet.classes)))
        wanted = torch.from_numpy(imagenet.labels)[:, None] == torch.tensor(chosen)    # (M, C)
        rows = wanted.any(dim=1)
        if not rows.any():
            continue
        entry["against"] = f"imagenet1k, {len(chosen)} classes, {int(rows.sum())} pictures"
        for column, (encoder, _) in columns.items():
            same, found = everything[column][rows][:, chosen], entry["columns"][column]
            if name == "imagenet-o":
                scale = encoder.model.logit_scale.exp().item()
                found["aupr"] = aupr(scale * same, scale * scores[column])
            else:
                right = named(same, wanted[rows].int().argmax(dim=1))
                found["drop"] = shares(right)["acc1"] - found["acc1"]


def sets_table(results: dict[str, dict], precision: str) -> str:
    """One run's results: each set's own metric, with one prompt, and what it is compared by."""
    columns = list(next(iter(results.values()))["columns"])
    title = f"set, metric (%, 95 % interval), in {precision}"
    lines = [f"{title:58}" + "".join(f"{c:>22}" for c in columns)]
    for name, entry in sorted(results.items()):
        each, metric = entry["columns"], entry["metric"]
        shown = [metric, f"{metric}_one_prompt", "drop", "aupr"]
        if entry["kind"] == "retrieval":
            shown = list(each[columns[0]])
        title = " ".join([name, *(table for table, names in SETS.items() if name in names)])
        for label in (label for label in shown if label in each[columns[0]]):
            cells = ""
            for column in columns:
                low, high = entry["intervals"][column].get(label, (0, 0))
                between = f" ({100 * low:.1f}-{100 * high:.1f})" if high else ""
                cells += f"{f'{100 * each[column][label]:.1f}{between}':>22}"
            lines.append(f"{f'{title}, {label}':58}" + cells)
    return "\n".join(lines)
