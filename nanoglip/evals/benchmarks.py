"""The published evaluation sets: a reader for each format, and the metrics of models on them.

    DIR/classnames.txt                          one class a line
    DIR/zeroshot_classification_templates.txt   one prompt a line, {c} stands for the class
    DIR/dataset_type.txt                        "retrieval", or missing
    DIR/test/nshards.txt, 0.tar, 1.tar, ...     KEY.webp|png|jpg|jpeg beside KEY.cls (a class's
                                                number) or KEY.txt (captions)
    DIR/CLASS/*.jpg, or DIR/test/CLASS/*.jpg    a folder a class; DIR/classnames.txt is optional
    DIR/val2017/*.jpg, DIR/replace_obj.json     SugarCrepe: which of two captions fits

Pictures are prepared as open_clip does for evaluation. Sets are untrusted input. An incomplete set
is reported in a sentence and gives no number, which would not be comparable.
"""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from glip import InputError
from nanoglip.cli import counted, printable
from nanoglip.evals import metrics
from nanoglip.evals.encoder import TEXTS, Encoder
from nanoglip.evals.significance import by_unit, interval
from nanoglip.files import FOREIGN, open_regular, read_regular, text_of
from nanoglip.masker import Masker
from nanoglip.sources import pictures, shards
from nanoglip.sources.pictures import SUFFIXES, check_pixels, decode

# --- Published sets and their names ---------------------------------------------------------------

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
UNPUBLISHED = ("cub", "kinetics700", "ucf101", "hateful_memes")  # as shards
METRICS = {  # the metric that a set, or a kind of sets, is reported by where it is not acc1
    **dict.fromkeys(("caltech101", "fgvc_aircraft", "flowers", "pets"), "mean_per_class_recall"),
    "hateful_memes": "roc_auc", "kinetics700": "mean_of_acc1_acc5",
    "retrieval": "text_retrieval_recall@1", "choice": "text_acc",
}  # fmt: skip

SUGAR_CREPE = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att",
               "swap_obj")  # fmt: skip

ONE_PROMPT = "a photo of a {c}."


def set_name(folder: Path) -> str:
    """A folder's name as CLIP_benchmark calls the set: wds_vtab-pets -> pets."""
    return re.sub(r"^(wds_)?(vtab[-_])?", "", folder.name.lower())


def suite(root: Path) -> tuple[list[str], list[str], list[str]]:
    """The paper's sets in `root`: folders with classes, those with captions, how to get others."""
    classified, captioned, missing = [], [], []
    for name in dict.fromkeys(chain(*SETS.values())):
        folders = [root / f"{start}{name}" for start in ("", "wds_", "vtab-", "wds_vtab-")]
        found = [str(folder) for folder in folders if folder.is_dir() and any(folder.iterdir())]
        if found:
            (captioned if name in SETS["T4"] else classified).append(found[0])
            continue
        place = f"clip-benchmark/wds_{'vtab-' * (name in VTAB)}{name}"
        how = f"hf download --repo-type dataset {place} --local-dir {root / name}"
        if name in UNPUBLISHED:
            how = f"make {root / name}/CLASS/*.jpg and {root / name}/classnames.txt"
        missing.append(f"missing: {name}: {how}")
    return classified, captioned, missing


# --- Readers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """A set of M pictures, which are read one at a time, and the questions about them."""

    name: str
    kind: str  # classification, retrieval, or choice (the first caption is right)
    labels: np.ndarray  # (M,) class, or with captions the picture's number: several may share one
    read: Callable[[int], bytes]
    where: Callable[[int], str]  # for people
    classes: Sequence[str] = ()
    prompts: Sequence[str] = ()
    captions: Sequence[Sequence[str]] = ()  # of each picture

    def __post_init__(self) -> None:
        """Raise InputError for a class that has no name."""
        last = len(self.classes) - 1
        for i in np.flatnonzero((self.labels < 0) | (self.labels > last)) if self.classes else ():
            why = f"class {self.labels[i]} has no name, 0 to {last} have: repair classnames.txt"
            raise InputError(f"{self.where(i)}: {why}")

    @property
    def metric(self) -> str:
        """The metric that the set is reported by."""
        return METRICS.get(self.name) or METRICS.get(self.kind, "acc1")

    def by_picture(self, metric: str, right: np.ndarray) -> np.ndarray:
        """A metric's answers (n,); counts for each picture, (M, 2), where it has several."""
        if metric.startswith("image_retrieval"):  # one answer a caption
            return by_unit(right, np.repeat(self.labels, [len(texts) for texts in self.captions]))
        return by_unit(right, self.labels) if self.kind == "choice" else right


def open_benchmarks(place: str, split: str = "test") -> list[Benchmark]:
    """The set in a folder, or SugarCrepe's several; raises InputError for an incomplete one."""
    folder = Path(place)
    if not folder.is_dir():
        raise InputError(f"{place}: no such folder: `--suite paper` says how to get a set")
    crepes = [task for task in SUGAR_CREPE if (folder / f"{task}.json").is_file()]
    if crepes:
        return [open_sugar_crepe(folder, task) for task in crepes]
    if any((folder / split).glob("*.tar")) or (folder / split / "nshards.txt").exists():
        return [open_shards(folder, split)]
    return [open_folders(folder, split)]


def lines_of(path: Path, what: str) -> list[str]:
    """A text file's lines; raises InputError if it is missing or no text, or a line is empty."""
    try:
        text = read_regular(path, 2**26).decode("utf-8-sig").rstrip()
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path}: missing or not readable text: write {what}") from None
    lines = [line.strip() for line in text.splitlines()] or [""]
    if "" in lines:
        raise InputError(f"{path}: line {lines.index('') + 1} is empty: write {what}")
    return lines


def class_names(folder: Path) -> list[str]:
    """The names in a set's classnames.txt."""
    return lines_of(folder / "classnames.txt", "one class a line")


def prompts_of(folder: Path) -> list[str]:
    """A set's own prompts, or OpenAI's 80 for ImageNet, as in CLIP_benchmark."""
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


TARGETS = {  # by kind: the suffix of its files, what they match, and what that is
    "classification": (".cls", r"\s*\d{1,9}\s*\Z", "class number"),
    "retrieval": (".txt", r"\s*\S", "caption"),
}


def open_shards(folder: Path, split: str) -> Benchmark:
    """The set in a folder of CLIP_benchmark's layout."""
    home, path = folder / split, folder / "dataset_type.txt"
    kinds = f"one of {', '.join(TARGETS)}"
    kind = lines_of(path, kinds)[0].lower() if path.exists() else "classification"
    if kind not in TARGETS:
        raise InputError(f"{path}: not {kinds}")
    suffix, valid, what = TARGETS[kind]
    number = lines_of(home / "nshards.txt", "the number of shards")[0]
    paths = [home / f"{i}.tar" for i in range(len(list(home.glob("*.tar"))))]
    if number != str(len(paths)) or not all(path.exists() for path in paths):
        there = f".tar files here: {len(paths)}, to be called 0.tar, 1.tar and so on"
        raise InputError(f"{home}: nshards.txt says {number[:20]}; {there}: copy the set anew")
    samples = [sample for path in paths for sample in read_shard(path, suffix)]

    def where(i: int) -> str:
        path, key, *_ = samples[i]
        return f"{path} {printable(key)}"

    def read(i: int) -> bytes:
        path, _, offset, size, _ = samples[i]
        file = shards.opened(str(path))  # keeps it open until it is read
        return os.pread(file.fileno(), size, offset)

    targets, own = [text_of(content) for *_, content in samples], (set_name(folder), kind)
    for i, target in enumerate(targets):
        if not re.match(valid, target):
            raise InputError(f"{where(i)}: no {what} in its {suffix}: copy the set anew")
    if kind == "retrieval":
        captions = [target.splitlines() for target in targets]
        return Benchmark(*own, np.arange(len(samples)), read, where, captions=captions)
    labels = np.array([int(target) for target in targets])
    return Benchmark(*own, labels, read, where, class_names(folder), prompts_of(folder))


def read_shard(path: Path, wanted: str) -> list[tuple[Path, str, int, int, bytes]]:
    """(shard, key, offset, size, target) of a shard's samples; raises InputError for damage."""
    wrong, found = Counter(), defaultdict(dict)
    with open_regular(path) as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - 2 * shards.BLOCK))
        wrong["cut short"] += file.read() != bytes(2 * shards.BLOCK)  # the end of every tar
        for name, offset, size, _ in shards.members(file, length, wrong):
            key, suffix = re.fullmatch(r"((?:.*/)?[^/.]*)(.*)", name, re.DOTALL).groups()
            kind = "picture" if suffix.lower() in pictures.PICTURES else suffix.lower()
            if kind not in ("picture", wanted):
                continue
            large = size > (pictures.PICTURE_CAP if kind == "picture" else pictures.CAPTION_CAP)
            wrong[f"{printable(key)} twice"] += kind in found[key]
            wrong[f"{printable(key)} too large"] += large
            file.seek(offset)
            found[key][kind] = (offset, size) if kind == "picture" or large else file.read(size)
    for key, record in found.items():
        for kind in {"picture", wanted} - record.keys():
            wrong[f"{printable(key)} without a {kind}"] += 1
    if +wrong or not found:
        why = next(iter(+wrong), "no picture in it")
        raise InputError(f"{path}: incomplete ({why}): copy the set anew")
    return [(path, key, *record["picture"], record[wanted]) for key, record in found.items()]


def class_folders(home: Path) -> dict[str, list[Path]]:
    """The pictures in each folder of `home`, by the folder's name, both in alphabetic order."""
    return {
        folder.name: [f for f in sorted(folder.rglob("*")) if f.suffix.lower() in SUFFIXES]
        for folder in sorted(home.iterdir()) if folder.is_dir()
    }  # fmt: skip


def open_folders(folder: Path, split: str) -> Benchmark:
    """The set in a folder with a folder for each class.

    The lines of classnames.txt name the folders in alphabetic order, or the classes that folders of
    whole numbers count from 0. Without that file, WordNet's numbers are ImageNet's classes, 1,000
    whole numbers as well, and other folders are named as they are.
    """
    home = next(h for h in (folder / split, folder / "val", folder) if h.is_dir())
    found = class_folders(home)
    files = list(chain(*found.values()))
    if not files:
        raise InputError(f"{folder}: no {split}/nshards.txt, and no picture as {split}/CLASS/*.jpg")
    numbered = all(re.fullmatch(r"\d{1,9}", name) for name in found)
    direct = all(any(f.parent == home / name for f in paths) for name, paths in found.items())
    if (folder / "classnames.txt").exists():
        classes = class_names(folder)
    elif numbered and len(found) == 1000:  # ImageNet-V2
        classes = list(imagenet_names().values())
    elif any(re.fullmatch(r"n\d{8}", name) for name in found):
        known = imagenet_names()
        classes = [known[name] for name in found if name in known]
    elif direct and not numbered and len(found) > 1:  # no folders of splits, such as train/CLASS
        classes = [name.replace("_", " ") for name in found]
    else:
        classes = []
    if not classes or (not numbered and len(classes) != len(found)):
        why = f"{counted(len(classes), 'name')} for {counted(len(found), 'folder')} of {home}"
        raise InputError(f"{folder}/classnames.txt: {why}: write one a line, in the folders' order")
    numbers = [int(name) for name in found] if numbered else range(len(found))
    labels = np.repeat(numbers, [len(paths) for paths in found.values()])
    return Benchmark(set_name(folder), "classification", labels, *of_files(files), classes,
                     prompts_of(folder))  # fmt: skip


def of_files(files: Sequence[Path]) -> tuple[Callable[[int], bytes], Callable[[int], str]]:
    """How a Benchmark of these files reads one, and names it."""
    return lambda i: read_regular(files[i], pictures.PICTURE_CAP), lambda i: str(files[i])


def open_sugar_crepe(folder: Path, task: str) -> Benchmark:
    """SugarCrepe (2306.14610): COCO's pictures, and for each a caption and a wrong one."""
    path = folder / f"{task}.json"
    try:
        rows = list(json.loads(read_regular(path, 2**28)).values())
        captions = [[row["caption"], row["negative_caption"]] for row in rows]
        names = [row["filename"] for row in rows]
        if not rows or not all(isinstance(x, str) for row in (names, *captions) for x in row):
            raise ValueError
    except (OSError, *FOREIGN, RecursionError):
        raise InputError(f"{path}: not SugarCrepe's list of captions: copy it anew") from None
    labels = np.unique(names, return_inverse=True)[1]
    files = [folder / "val2017" / Path(name).name for name in names]
    return Benchmark(f"sugar_crepe/{task}", "choice", labels, *of_files(files), captions=captions)


# --- Features -------------------------------------------------------------------------------------

BLOCK = 256  # pictures that a model gets at a time: the same for every number of processes

# A column of the tables: a model, and the mask that it is evaluated under, if any.
Columns = dict[str, tuple[Encoder, Masker | None]]


def preprocess(benchmark: Benchmark, i: int, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """A picture as in open_clip's evaluation, for each (height, width): (3, H, W) bytes."""
    rgb = partial(Image.Image.convert, mode="RGB")  # as open_clip: no alpha, no EXIF rotation
    try:
        image, found = Image.fromarray(decode(benchmark.read(i), 2**16, rgb)), []
        for height, width in sizes:
            size = [int(height * length / min(image.size)) for length in image.size]
            if height != width:
                ratio = min(image.height / height, image.width / width)
                size = [round(length / ratio) for length in image.size]
            check_pixels(*size)
            left, top = (round((a - b) / 2) for a, b in zip(size, (width, height), strict=True))
            resized = image.resize(size, Image.Resampling.BICUBIC)
            centre = resized.crop((left, top, left + width, top + height))
            found.append(torch.from_numpy(np.array(centre)).permute(2, 0, 1))
        return found
    except (OSError, SyntaxError, ValueError) as error:  # PIL's, and BadPicture
        why = f"not a readable picture ({error}): copy the set anew"
        raise InputError(f"{benchmark.where(i)}: {why}") from None


def share_of(count: int, size: int, rank: int, world: int) -> list[Tensor]:
    """This process's blocks of the numbers below `count`."""
    blocks = torch.arange(count).split(size) if count else ()
    return [blocks[i] for i in np.array_split(np.arange(len(blocks)), world)[rank]]


def decoded(
    benchmark: Benchmark, sizes: Sequence[tuple[int, int]], rank: int, world: int
) -> Iterator[tuple[int, dict[tuple[int, int], Tensor]]]:  # fmt: skip
    """(number of the first, pictures (B, 3, H, W) by size) of this process's blocks.

    Raises InputError for a picture that cannot be read.
    """
    blocks = share_of(len(benchmark.labels), BLOCK, rank, world)
    with ThreadPoolExecutor() as pool:

        def start(ids: Sequence[int]) -> list:
            return [pool.submit(preprocess, benchmark, int(i), sizes) for i in ids]

        waiting = start(blocks[0] if blocks else ())
        bar = tqdm(blocks, benchmark.name, leave=False, disable=True if rank else None)
        for ids, following in zip(bar, (*blocks[1:], ())):
            images, waiting = [job.result() for job in waiting], start(following)
            yield int(ids[0]), dict(zip(sizes, map(torch.stack, zip(*images)), strict=True))


def image_features(columns: Columns, benchmark: Benchmark, rank: int, world: int) -> list:
    """This process's blocks of image_features (B, E) by column; every picture is decoded once."""
    sizes = sorted({encoder.model.config.pixels for encoder, _ in columns.values()})
    return [
        {column: encoder.block(images[encoder.model.config.pixels], start, mask)
         for column, (encoder, mask) in columns.items()}
        for start, images in decoded(benchmark, sizes, rank, world)
    ]  # fmt: skip


def text_features(columns: Columns, benchmark: Benchmark, rank: int, world: int) -> list:
    """This process's blocks of text_features (B, E) by column: captions, or prompts with classes.
    """
    texts, found = list(chain(*benchmark.captions)), []
    if not texts:
        texts = prompted(benchmark.classes, (*benchmark.prompts, ONE_PROMPT))
    for ids in share_of(len(texts), TEXTS, rank, world):
        encoders = {encoder for encoder, _ in columns.values()}  # columns may share one
        each = {encoder: encoder.text_block([texts[i] for i in ids]) for encoder in encoders}
        found.append({column: each[encoder] for column, (encoder, _) in columns.items()})
    return found


def joined(parts: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Features (n, E) by column, from every process's blocks."""
    blocks = list(chain(*parts))
    return {column: torch.cat([block[column] for block in blocks]) for column in blocks[0]}


def encode_sets(
    columns: Columns, opened: Callable[[], list[Benchmark]], rank: int, world: int
) -> list[tuple[Benchmark, dict[str, Tensor], dict[str, Tensor]]]:  # fmt: skip
    """(set, image_features (M, E), text_features (n, E), both by column) of the `opened` sets.

    All processes share the work, and all raise the InputError of one.
    """
    own, problem = [], ""
    try:
        own = [(benchmark, *(features(columns, benchmark, rank, world)
                             for features in (image_features, text_features)))
               for benchmark in opened()]  # fmt: skip
    except InputError as error:
        problem = str(error)
    parts = [(problem, [blocks for _, *blocks in own])] * world
    if world > 1:
        dist.all_gather_object(parts, parts[rank])
    for problem in (problem for problem, _ in parts if problem):
        raise InputError(problem)
    return [
        (benchmark, *(joined([blocks[number][kind] for _, blocks in parts]) for kind in (0, 1)))
        for number, (benchmark, *_) in enumerate(own)
    ]


def prompted(classes: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """All classes in the first prompt, then in the next."""
    return [prompt.replace("{c}", name) for prompt in prompts for name in classes]


def class_features(encoder: Encoder, classes: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """Each class's text_features over all prompts: their mean, normalised again. (C, E)."""
    return class_means(encoder.texts(prompted(classes, prompts)), len(classes))


def class_means(texts: Tensor, classes: int) -> Tensor:
    """Each class's mean of text_features (P C, E) of prompted(), normalised again. (C, E)."""
    return F.normalize(texts.unflatten(0, (-1, classes)).mean(dim=0), dim=-1)


# --- Results --------------------------------------------------------------------------------------


def measure(
    benchmark: Benchmark, images: Tensor, texts: Tensor
) -> tuple[dict[str, float], dict[str, Tensor], Tensor | None]:
    """Metrics from image_features (M, E) and text_features (n, E) of encode_sets().

    Also answers (n,) by metric, and scores (M, C) of classes.
    """
    if benchmark.captions:
        if benchmark.kind == "choice":
            scores = (texts.unflatten(0, (len(images), -1)) @ images[:, :, None])[:, :, 0]
            hits = {"text_acc": scores.argmax(dim=1) == 0}
        else:
            counts = torch.tensor([len(captions) for captions in benchmark.captions])
            owner = torch.arange(len(images)).repeat_interleave(counts)
            hits = metrics.retrieved(images, texts, owner)
        return metrics.shares(hits), hits, None
    labels, count = torch.from_numpy(benchmark.labels), len(benchmark.classes)
    scores, single = (images @ class_means(part, count).T
                      for part in (texts[:-count], texts[-count:]))  # fmt: skip
    found, other = (metrics.classification(each, labels) for each in (scores, single))
    found |= {f"{metric}_one_prompt": value for metric, value in other.items()}
    return found, metrics.named(scores, labels), scores


def evaluate_set(
    benchmark: Benchmark, images: dict[str, Tensor], texts: dict[str, Tensor]
) -> tuple[dict, dict[str, dict[str, np.ndarray]], dict[str, Tensor | None]]:
    """A set's entry of results.json, its answers by column and metric, and scores by column."""
    entry = {
        "kind": benchmark.kind, "metric": benchmark.metric, "pictures": len(benchmark.labels),
        "classes": len(benchmark.classes), "prompts": len(benchmark.prompts),
        "captions": sum(map(len, benchmark.captions)), "columns": {}, "intervals": {},
    }  # fmt: skip
    answers, scores = {}, {}
    for column in images:
        found, hits, scores[column] = measure(benchmark, images[column], texts[column])
        answers[column] = {metric: benchmark.by_picture(metric, right.numpy())
                           for metric, right in hits.items()}  # fmt: skip
        between = {metric: interval(right) for metric, right in answers[column].items()}
        if benchmark.metric == "mean_per_class_recall":
            right, labels = answers[column]["acc1"], benchmark.labels
            between[benchmark.metric] = interval(right, labels, statistic=metrics.per_class)
        entry["columns"][column], entry["intervals"][column] = found, between
    return entry, answers, scores


def evaluate_sets(
    columns: Columns, places: Sequence[str], captioned: Sequence[str], rank: int = 0,
    world: int = 1,
) -> tuple[dict[str, dict], dict[str, dict], list[str]]:  # fmt: skip
    """Of `places` (with classes) and `captioned`: results by set, answers, errors of broken sets.

    Answers are Benchmark.by_picture's, by set, column and metric. Each process encodes its blocks
    of pictures; results and answers are on rank 0.
    """
    results, answers, problems, scored = {}, {}, [], {}
    for place in (*places, *captioned):

        def opened(place: str = place) -> list[Benchmark]:
            own = open_benchmarks(place)
            for benchmark in own:
                if bool(benchmark.captions) != (place in captioned):
                    flag = "--zero-shot" if place in captioned else "--retrieval"
                    raise InputError(f"{place}: a set for {benchmark.kind}: give it to {flag}")
                if benchmark.name in results:
                    raise InputError(f"{place}: another set is called {benchmark.name}: rename it")
            return own

        try:
            encoded = encode_sets(columns, opened, rank, world)
        except InputError as error:
            problems.append(str(error))
            continue
        for benchmark, *features in encoded if rank == 0 else ():
            name = benchmark.name
            results[name], answers[name], scores = evaluate_set(benchmark, *features)
            if name in SETS["T1"] + SETS["T3"] and benchmark.kind == "classification":
                scored[name] = benchmark, scores
    compare_with_imagenet(results, scored, columns)
    return results, answers, problems


def open_sets(places: Sequence[str], rank: int, world: int) -> list[Benchmark]:
    """The sets in folders, of each kind; all pictures are decoded once, shared by all processes.

    All raise the InputError of one: for an incomplete set, or two of one name.
    """

    def opened() -> list[Benchmark]:
        sets = list(chain(*map(open_benchmarks, places)))
        for name, count in Counter(benchmark.name for benchmark in sets).items():
            if count > 1:
                raise InputError(f"--eval-sets: {count} sets are called {name}: rename the others")
        return sets

    return [benchmark for benchmark, *_ in encode_sets({}, opened, rank, world)]


def score_sets(
    sets: list[Benchmark], encoder: Encoder, rank: int, world: int
) -> tuple[dict[str, float], list[str]]:
    """A model's metrics by SET/METRIC, on rank 0, and errors of sets that cannot be read now."""
    found, problems = {}, []
    for benchmark in sets:
        try:
            ((_, *features),) = encode_sets(
                {"": (encoder, None)}, lambda own=benchmark: [own], rank, world
            )
        except InputError as error:
            problems.append(str(error))
            continue
        if rank == 0:
            scores = measure(benchmark, *(each[""] for each in features))[0]
            found |= {f"{benchmark.name}/{metric}": scores[metric]
                      for metric in (benchmark.metric, "acc5") if metric in scores}  # fmt: skip
    return found, problems


def compare_with_imagenet(results: dict[str, dict], scored: dict, columns: Columns) -> None:
    """Add to the robustness sets the drop in acc1 against ImageNet, on their own classes.

    `scored`: (set, scores (M, C) by column) by name. Where all names of a set's classes are
    ImageNet's, ImageNet's pictures of these classes choose among them; a set with other names
    (ObjectNet) is compared with all of ImageNet. ImageNet-O's pictures are of none of its classes:
    `aupr` (1907.07174) is how well the model's low confidence finds them.
    """
    if "imagenet1k" not in scored:
        return
    imagenet, everything = scored.pop("imagenet1k")
    for name, (benchmark, scores) in scored.items():
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
                found["aupr"] = metrics.aupr(scale * same, scale * scores[column])
            else:
                right = same.argmax(dim=1) == wanted[rows].int().argmax(dim=1)
                found["drop"] = right.double().mean().item() - found["acc1"]
