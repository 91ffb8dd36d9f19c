"""Tables from results/; nothing in them is typed by hand.

    python -m tools.tables                    rewrites the parts of docs/*.md between the marks
    python -m tools.tables --paper            prints the paper's tables, its numbers beside ours
    python -m tools.tables --paper --latex    the same for a LaTeX document

Published numbers, with their sources, are in results/paper.json.
"""

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

import glip
from nanoglip import cli, estimate, masks
from nanoglip.config import parse, run_name
from nanoglip.evals import benchmarks
from nanoglip.results import FOLDER, load, load_runs
from tools import sweep

ROOT = Path(__file__).parents[1]

NOT_RUN, NOT_PUBLISHED = "not run", "not published"

STAGES = ("masked inference", "full picture", "after tuning")  # the paper's columns


def runs_of(results: list[dict], flags: str) -> list[dict]:
    """Every published seed of `train.py --recipe compare FLAGS`, for the notebooks."""
    published = {r["name"]: r for r in results}
    return [published[name] for name in names_of(flags) if name in published]


@cache
def names_of(flags: str) -> list[str]:
    """The names of these runs, whether published or not."""
    config = parse(["--recipe", "compare", *flags.split()])
    return [run_name(replace(config, seed=seed)) for seed in sweep.SEEDS]


def seeds_of(
    results: list[dict], flags: str, column: str = "after tuning", metric: str = "zero-shot top-1"
) -> list[float]:
    """A metric of `runs_of` these flags, in percent."""
    tables = [r["held_out"] for r in runs_of(results, flags)]
    return [100 * table[column][metric] for table in tables if column in table]


def spread(values: Iterable[float], full: int = 1) -> str:
    """Mean and range of shares, in percent; how many there are, where fewer than `full`."""
    values = [100 * value for value in values]
    if not values:
        return NOT_RUN
    notes = [f"{min(values):.1f}-{max(values):.1f}"] if len(values) > 1 else []
    if len(values) < full:
        notes.append("1 seed" if len(values) == 1 else f"{len(values)} seeds")
    return f"{statistics.mean(values):.1f}" + (f" ({', '.join(notes)})" if notes else "")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine_line(runs: list[dict]) -> str:
    """Where, with what, and on which commits the runs were made."""
    made = defaultdict(set)
    for r in runs:
        m = r["trained_on"]
        where = f"{m['cores']} cores of {m['cpu']}, {m['memory_gib']:.0f} GiB"
        with_what = f"torch {m['versions']['torch']}, {'bf16' if r['bf16'] else 'fp32'}"
        made[f"{where}, {with_what}"].add(m["commit"])
    return "; ".join(
        f"{machine}, commit{'s' * (len(commits) > 1)} {', '.join(sorted(commits))}"
        for machine, commits in sorted(made.items())
    )


def demo_table(results: list[dict]) -> str:
    """The demo's three columns and its probes, over seeds."""
    runs = [r for r in results if re.fullmatch(r"demo(_seed=\d+)?", r["name"])]
    if not runs:
        return "Not run."
    metrics = [m for m in runs[0]["held_out"]["after tuning"] if not m.startswith("image to text")]
    rows = [
        [metric, *(spread(r["held_out"][column][metric] for r in runs) for column in STAGES)]
        for metric in metrics
    ]
    for prompt in runs[0].get("prompted", {}):
        cell = spread(r["prompted"][prompt] for r in runs if "prompted" in r)
        rows.append([f"zero-shot top-1, {prompt}", "", "", cell])
    for name in runs[0].get("linear_probe", {}):
        shares = [r["linear_probe"][name] for r in runs if "linear_probe" in r]
        cell = spread(s["accuracy"] for s in shares)
        rows.append([f"linear probe, {name} (largest class {100 * shares[0]['majority']:.0f} %)",
                     "", "", cell])  # fmt: skip
    minutes = [sum(r["train_seconds"].values()) / 60 for r in runs]
    seeds = sorted(r["config"]["seed"] for r in runs)
    return (
        table(["%, mean (range)", *STAGES], rows)
        + f"\n\nSeeds {', '.join(map(str, seeds))}; {min(minutes):.1f} to {max(minutes):.1f} "
        f"minutes of training; {machine_line(runs)}."
    )


def cells(
    results: list[dict], cost: dict, column: str = "after tuning", metric: str = "zero-shot top-1"
) -> dict[tuple[str, str, float, str], str]:
    """(data, mask, ratio, equal in) -> spread over seeds, for every cell that is planned."""
    published, found = {r["name"]: r["held_out"] for r in results}, defaultdict(list)
    for run in sweep.planned(cost):
        held_out = published.get(run.name, {})
        values = found[run.data, run.mask, run.ratio, run.equal]
        values += [held_out[column][metric]] if column in held_out else []
    return {key: spread(values, len(sweep.SEEDS)) for key, values in found.items()}


def budgets(cost: dict, ratios: tuple[float, ...]) -> list[tuple[str, str, str]]:
    """(mask, equal in, label) of every row: masks of equal cost have one row for both."""
    full, rows = parse(["--recipe", "compare"]).steps, []
    for mask in (*masks.MASKS, sweep.SMALL):
        steps = [sweep.affordable(cost, mask, ratio, full) for ratio in ratios]
        shared = steps == [full] * len(ratios)
        rows.append((mask, "steps", mask if shared else f"{mask}, equal steps"))
        if not shared and None not in steps:  # None: its cost is not known
            rows.append((mask, "time", f"{mask}, equal time ({', '.join(map(str, steps))} steps)"))
    return rows


def ratio_table(results: list[dict], cost: dict) -> str:
    """Every mask at every ratio on the centred scenes, after tuning."""
    found, ratios = cells(results, cost), tuple(sorted(sweep.RATIOS))
    rows = [
        [label, *(found[sweep.HOME, mask, ratio, equal] for ratio in ratios)]
        for mask, equal, label in budgets(cost, ratios)
    ]
    return table([f"{sweep.HOME}, top-1 (%)", *(f"{ratio:.1%} masked" for ratio in ratios)], rows)


def set_table(results: list[dict], cost: dict) -> str:
    """Masks on every set, at the first ratio, after tuning."""
    found, ratio = cells(results, cost), sweep.RATIOS[0]
    names = (sweep.HOME, *sweep.AWAY)
    rows = [
        [label, *(found[name, mask, ratio, equal] for name in names)]
        for mask, equal, label in budgets(cost, (ratio,))
        if (sweep.AWAY[0], mask, ratio, equal) in found
    ]
    return table([f"{ratio:.0%} masked, top-1 (%)", *names], rows)


def stage_table(results: list[dict], cost: dict) -> str:
    """The paper's three columns, for every mask and ratio on the centred scenes."""
    found = [cells(results, cost, column) for column in STAGES]
    none = (sweep.HOME, "none", sweep.RATIOS[0], "steps")
    rows = [["none", "0.0%", "-", *(f[none] for f in found[1:])]]
    for ratio in sorted(sweep.RATIOS):
        for mask in (*masks.MASKS, sweep.SMALL):
            if mask != "none":
                first, *others = (f[sweep.HOME, mask, ratio, "steps"] for f in found)
                first = "-" if mask == sweep.SMALL else first
                rows.append([mask, f"{ratio:.1%}", first, *others])
    return table(["mask", "masked", *(f"{c}, top-1" for c in STAGES)], rows)


def share_lines(results: list[dict], cost: dict) -> str:
    """What masks whose size varies really compute and show, in masked inference."""
    published, lines = {r["name"]: r.get("mask_shares") for r in results}, []
    found = defaultdict(list)
    for run in sweep.planned(cost):
        shares = published.get(run.name)
        if shares and run.equal == "steps" and shares["computed"] != shares["visible"]:
            found[run.data, run.mask, run.ratio].append(shares)
    for (name, mask, ratio), runs in sorted(found.items()):
        computed, visible, one = (
            statistics.mean(r[key] for r in runs)
            for key in ("computed", "visible", "pictures of one patch")
        )
        lines.append(
            f"- `{mask}` at {ratio:.1%} on {name} computes {computed:.1%} of the patches, shows "
            f"{visible:.1%}, and of {one:.0%} of the held-out pictures a single one."
        )
    return "\n".join(lines)


def compare_table(results: list[dict], cost: dict) -> str:
    """All tables of the sweep, and where its runs were made."""
    names = {run.name for run in sweep.planned(cost)}
    runs = [r for r in results if r["name"] in names]
    if not runs:
        return "Not run."
    parts = [ratio_table(results, cost), set_table(results, cost), stage_table(results, cost)]
    parts.append(share_lines(results, cost))
    parts.append(f"{len(runs)} of {len(names)} runs; {machine_line(runs)}.")
    return "\n\n".join(part for part in parts if part)


def cost_table(cost: dict) -> str:
    """What a training step costs under each mask, and the mask alone."""
    seconds = {(row["mask"], row["mask_ratio"]): row for row in cost["seconds"]}
    ratios = sorted({ratio for _, ratio in seconds if ratio})
    rows = []
    for mask in (*masks.MASKS, sweep.SMALL):
        line = [mask]
        for ratio in ratios:
            row = seconds.get((mask, 0.0 if mask == "none" else ratio))
            times = row and row["step"] / seconds["gaussian", ratio]["step"]
            line.append(f"{times:.2f}" if row else "not measured")
        for ratio in ratios:
            row = seconds.get((mask, ratio))
            share = row and row["mask alone"] / row["step"]
            line.append(f"{share:.2%}" if row and mask != sweep.SMALL else "-")
        rows.append(line)
    head = ["mask", *(f"step, times GLIP's, {ratio:.1%}" for ratio in ratios),
            *(f"mask alone, of its step, {ratio:.1%}" for ratio in ratios)]  # fmt: skip
    first = seconds["gaussian", sweep.RATIOS[0]]["step"]
    return table(head, rows) + (
        f"\n\nMedians of {cost['rounds']} alternating rounds on {cost['data']}, batch "
        f"{cost['batch_size']}, threads: {cost['threads']}; GLIP's step at "
        f"{sweep.RATIOS[0]:.0%} took {first:.3f} s; commit {cost['machine']['commit']}."
    )


def data_table() -> str:
    """How fast data are read, and what else make proof found."""
    measured = load("bench")
    bench, proof = measured["data"], measured["proof"]
    names = {"open_clip": "open_clip 3.3's pipeline", "decoder": "the decoder alone (simplejpeg)",
             "Pillow": "Pillow's decoder alone"}  # fmt: skip
    rate = bench["pictures_per_second"]
    rows = [["this reader", f"{rate['ours']:,.0f}", "1"]] + [
        [names[k], f"{rate[k]:,.0f}", f"{ratio:.2f} ({low:.2f}-{high:.2f})"]
        for k, ratio in bench["ours_to"].items() for low, high in [bench["range"][k]]
    ]  # fmt: skip
    index, memory, fuzz, killed = (proof[k] for k in ("index", "memory", "fuzz", "torture"))
    return table(["one thread", "pictures a second", "this reader's rate to it"], rows) + (
        f"\n\n256-pixel JPEG photographs of {bench['mean_bytes'] / 1024:.0f} KiB, random crops to "
        f"224 pixels, captions tokenised; medians (and ranges) of {bench['rounds']} alternating "
        f"rounds; {bench['machine']['cores']} cores of {bench['machine']['cpu']}, commit "
        f"{bench['machine']['commit']}. A synthetic index of {index['samples']:,} samples takes "
        f"{index['address_bytes'] / 1e6:.0f} MB for addresses and "
        f"{index['caption_bytes_per_sample']:.0f} bytes a caption, opens in "
        f"{index['open_seconds']:.1f} s with {index['open_memory_mib']:.0f} MiB of memory, and "
        f"gives a batch from the middle of a run in {index['first_batch_seconds']:.2f} s. Over "
        f"{memory['reads']:,} reads a process grew by {memory['growth']:.1%}. {fuzz['shards']:,} "
        f"damaged and hostile shards crashed nothing. {killed['runs']} training runs were killed "
        f"{killed['kills']} times, {killed['while_writing']} of them while a checkpoint was "
        "written; they ended with the bits of uninterrupted runs (`make proof`)."
    )


def training_table() -> str:
    """Memory against the batch, several processes, and what the estimate is worth."""
    memory, shared, told = (load("bench")[name] for name in ("memory", "processes", "estimate"))
    kept = table(
        ["model, `--micro-batch`", "batch", "highest memory of a step", "without features"],
        [[f"{r['model']}, {r['micro_batch']}", f"{r['batch']:,}", f"{r['peak'] / 1e6:,.0f} MB",
          f"{(r['peak'] - r['features']) / 1e6:,.0f} MB"] for r in memory["rows"]],
    )  # fmt: skip
    rates = table(
        [f"the demo's loop (AdamW), batch {shared['batch']}", "pairs a second", "to one process"],
        [[name, f"{rate:,.0f}", f"{shared['to_one'][name]:.2f}"]
         for name, rate in shared["pairs_per_second"].items()],
    )  # fmt: skip
    steps = table(
        ["`--estimate here`", "measured step", "estimated", "ratio"],
        [[f"`{r['flags']}`, batch {r['batch']}", f"{r['measured']:.3f} s",
          f"{r['estimated']:.3f} s", f"{r['ratio']:.2f} ({r['range'][0]:.2f}-{r['range'][1]:.2f})"]
         for r in told["rows"]],
    )  # fmt: skip
    machine = memory["machine"]
    return (
        f"{kept}\n\n{rates}\n\n{steps}\n\nRandom pairs; pictures and tokens are not counted. "
        f"Medians of {shared['rounds']} and {told['rounds']} rounds (`tools.bench memory`, "
        f"`processes`, `estimate`); {machine['cores']} cores of {machine['cpu']}, commit "
        f"{machine['commit']}. Two processes share the two cores."
    )


def speed_table() -> str:
    """Training steps beside open_clip's, where their time goes, and the paper's run estimated."""
    found = load("bench")["benchmark"]
    steps = table(
        ["ViT-B/16, batch 32", "pairs a second", "open_clip 3.3", "times faster",
         "were its AdamW fused", "of the rate of products", "memory of a step", "open_clip's"],
        [[(f"{r['mask_ratio']:.1%} masked, " if r["mask_ratio"] else "no mask, ") + r["precision"]
          + ", both compiled" * r.get("compiled", False),
          *(f"{rate:.1f}" for rate in r["pairs_per_second"].values()),
          f"{r['times_faster']:.2f} ({r['range'][0]:.2f}-{r['range'][1]:.2f})",
          f"{r['times_faster_were_it_fused']:.2f}", f"{r['share_of_product_rate']:.0%}",
          *([f"{peak / 1e9:.2f} GB" for peak in r["peak"].values()] if "peak" in r else ["", ""])]
         for r in found["cases"]],
    )  # fmt: skip
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in found["profile"].items())
    machine, rate = found["machine"], {r["precision"]: r["product_rate"] for r in found["cases"]}
    return (
        f"{steps}\n\n{paper_hours()}\n\n"
        f"Medians (and ranges) of {found['cases'][0]['rounds']} steps of each, in turn; "
        f"{machine['cores']} cores of {machine['cpu']}, whose products reach "
        f"{rate['bf16'] / 1e9:.0f} GFLOP/s in bf16 and {rate['fp32'] / 1e9:.0f} in fp32 in the same"
        f" run; commit {machine['commit']}. Of our step at 75 %: {shares}. Memory is what steps "
        "take above the weights. The second table is what `--estimate` prints, tuning included. No "
        "GPU has verified it. A core of the reader is one of ours (see Reading data)."
    )


def paper_hours() -> str:
    """The estimate of the paper's run on eight H100, for each mask ratio."""
    flags, ratios = ["--recipe", "cc12m", "--estimate", "h100x8"], (0, 0.5, 0.75, 0.918)
    masks = [["--mask-ratio", str(r)] if r else ["--mask", "none"] for r in ratios]
    runs = [estimate.of_run(parse([*flags, *mask]), [])[1] for mask in masks]
    rows = {
        "hours": [f"{sum(stage['hours'] for stage in run):.1f}" for run in runs],
        "pairs a second": [f"{run[0]['pairs_per_second']:,.0f}" for run in runs],
        "cores of the reader": [
            f"{run[0]['pairs_per_second'] / estimate.reader_rate():.0f}" for run in runs
        ],
    }
    head = [f"`{' '.join(flags)}`", *(f"{r:.1%} masked" if r else "no mask" for r in ratios)]
    return table(head, [[name, *row] for name, row in rows.items()])


# --- The paper's tables ---------------------------------------------------------------------------

IMAGENET, TIME = "imagenet1k", "training time"

SMALL_SETS = {  # the 26 of SLIP and A-CLIP
    "food101": "Food-101", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "cub": "CUB-200",
    "sun397": "SUN397", "cars": "Stanford Cars", "fgvc_aircraft": "FGVC Aircraft", "dtd": "DTD",
    "pets": "Oxford Pets", "caltech101": "Caltech-101", "kinetics700": "Kinetics-700",
    "flowers": "Flowers-102", "mnist": "MNIST", "fer2013": "FER2013", "stl10": "STL-10",
    "eurosat": "EuroSAT", "resisc45": "RESISC45", "gtsrb": "GTSRB",
    "kitti_closest_vehicle_distance": "KITTI distance", "country211": "Country211",
    "pcam": "PCam", "ucf101": "UCF101", "clevr_count_all": "CLEVR counts",
    "hateful_memes": "Hateful Memes", "renderedsst2": "Rendered SST2", IMAGENET: "ImageNet",
}  # fmt: skip

SHIFTED_SETS = {
    IMAGENET: "ImageNet", "imagenetv2": "ImageNet-V2", "imagenet-a": "ImageNet-A",
    "imagenet-r": "ImageNet-R", "imagenet_sketch": "ImageNet-Sketch", "imagenet-o": "ImageNet-O",
    "objectnet": "ObjectNet",
}  # fmt: skip

CAPTIONED_SETS = {"mscoco_captions": "COCO", "flickr30k": "Flickr30k"}

GUESS = "Which numbers the paper has in this table is our guess from its abstract."

LESSON = f"{sweep.HOME}: another thing, our comparison of masks on 64-pixel pictures."

MISSING = f'"{NOT_PUBLISHED}": in no source named here; the body of the paper was not at hand.'


class Table(NamedTuple):
    """A table as text: title, heads of its columns, rows, and what must be known about it."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str


def last_stage(columns: dict[str, float]) -> float | None:
    """Of a model's numbers by stage the last unmasked one."""
    return columns.get("after tuning", columns.get("full picture"))


def published(model: dict, name: str, metric: str, stage: str = "") -> str:
    """A published number: of a set, by a metric ("": its only one), at a stage or the last."""
    found = model["numbers"].get(name, {})
    columns = found.get(metric, {}) if metric else next(iter(found.values()), {})
    value = columns.get(stage) if stage else last_stage(columns)
    if value is None:
        return NOT_PUBLISHED
    return f"{value:g}" if name == TIME else f"{value:.1f}"


def ours(runs: list[dict], model: dict, name: str, metric: str = "", stage: str = "") -> str:
    """The same number of our runs with a published model's settings: mean and range over seeds.

    metric "": the set's own, or `linear_probe`, `fine_tune` for these.
    """
    found = []
    settings = {"text_mask": "none", "aclip": False, **model.get("ours", {})}
    for run in runs if "ours" in model else ():
        if any(run["config"].get(key) != value for key, value in settings.items()):
            continue
        if metric in ("linear_probe", "fine_tune"):
            found.append(run.get(metric, {}).get(name, {}).get("accuracy"))
        elif name in run.get("benchmarks", {}):
            entry = run["benchmarks"][name]
            columns = {c: cell.get(metric or entry["metric"])
                       for c, cell in entry["columns"].items()}  # fmt: skip
            found.append(columns.get(stage) if stage else last_stage(columns))
    return spread(value for value in found if value is not None)


def in_scenes(model: dict, scenes: dict, equal: str) -> str:
    """Our comparison's cell for a published model's mask and ratio, if it has one."""
    return scenes.get((sweep.HOME, *model.get("scenes", ("", 0)), equal), "-")


def by_ratio(models: list[dict], runs: list[dict], scenes: dict) -> tuple[list, list]:
    """Head and rows of ImageNet's zero-shot top-1 at each stage, the published beside ours."""
    head = ["method", "masked", "tokens", "data", *(f"{stage}, published" for stage in STAGES),
            *(f"{stage}, ours" for stage in STAGES),
            f"{sweep.HOME} after tuning, ours"]  # fmt: skip
    rows = []
    for model in models:
        # Without a mask there is no masked inference, and with all patches nothing to tune.
        masked = model["masked"]
        stages = STAGES[1:2] if masked == "0 %" else STAGES[masked.endswith("px") :]
        given = [published(model, IMAGENET, "acc1", stage) if stage in stages else "-"
                 for stage in STAGES]  # fmt: skip
        own = [ours(runs, model, IMAGENET, "acc1", stage) if stage in stages else "-"
               for stage in STAGES]  # fmt: skip
        data = model["data"] + " (first README)" * (model["source"] == "GLIP, first")
        rows.append([model["method"], masked, str(model["tokens"]), data, *given, *own,
                     in_scenes(model, scenes, "steps")])  # fmt: skip
    return head, rows


def by_set(
    models: list[dict], runs: list[dict], sets: list[tuple[str, str, str]]
) -> tuple[list, list]:
    """Head and rows of (label, set, metric): others' numbers, the paper's and ours.

    Of A-CLIP's authors the models of 25 epochs for which they give all of these numbers.
    Of the paper and of ours no mask, and half of the patches masked; unmasked tuning included.
    """
    others = [m for m in models if m["source"] == "CLIP-PGS"]
    others += [m for m in models if m["source"] == "A-CLIP" and "epochs" not in m["method"]
               and all(published(m, name, metric) != NOT_PUBLISHED for _, name, metric in sets)]
    own = [m for m in models if m["source"] == "GLIP" and m["data"] == "CC12M"
           and m["masked"] in ("0 %", "50 %")]  # fmt: skip
    names = [f"{m['method']} {m['masked']}" * (m["masked"] != "0 %") or m["method"] for m in own]
    by = {"CLIP-PGS": "third party", "A-CLIP": "A-CLIP's authors"}
    head = ["", *(f"{m['method']}, {by[m['source']]}" for m in others),
            *(f"{name}, GLIP's authors" for name in names),
            *(f"{name}, ours" for name in names)]  # fmt: skip
    rows = [
        [label, *(published(m, name, metric) for m in (*others, *own)),
         *(ours(runs, m, name, metric) for m in own)]
        for label, name, metric in sets
    ]  # fmt: skip
    return head, rows


def against_aclip(models: list[dict], runs: list[dict], scenes: dict) -> tuple[list, list]:
    """Head and rows of A-CLIP's and GLIP's models; `scenes`: our comparison in steps and time."""
    chosen = [m for m in models if m["source"] == "A-CLIP"]
    chosen += [m for m in models if m["data"] == "CC12M" and m["source"] in ("GLIP", "CLIP-PGS")
               and m["masked"] in ("0 %", "50 %") and m["method"] != "Cluster Masking"]  # fmt: skip
    metrics = [
        (f"{TIME}, times CLIP's", TIME, "times CLIP's"), ("ImageNet", IMAGENET, "acc1"),
        ("mean of 26 sets", "average of 26", "acc1"),
        *((f"{label}, {way} R@1", name, f"{way}_retrieval_recall@1")
          for name, label in CAPTIONED_SETS.items() for way in ("text", "image")),
    ]  # fmt: skip
    head = ["method", "masked", "source", *(label for label, _, _ in metrics), "ImageNet, ours",
            f"{sweep.HOME}, ours, equal steps", "equal time"]  # fmt: skip
    rows = [
        [m["method"], m["masked"], f"{m['source']} ({m['data']})",
         *(published(m, name, metric) for _, name, metric in metrics),
         ours(runs, m, IMAGENET, "acc1"),
         *(in_scenes(m, scenes, equal) for equal in ("steps", "time"))]
        for m in chosen
    ]  # fmt: skip
    return head, rows


def paper_tables(folder: Path = FOLDER) -> dict[str, Table]:
    """The paper's seven tables: what is published, what is not, and what was run here."""
    paper, cost = load("paper", folder), load("cost", folder)
    models, runs = paper["models"], load_runs(folder, "config")
    scenes = cells(load_runs(folder), cost)
    source = {key: f"{key}: {text}." for key, text in paper["sources"].items()}
    small_models = [m for m in models if m["data"] == "CC3M"]
    ratio_models = [m for m in models if m["source"] in ("GLIP", "GLIP, first")]
    captioned = [
        (f"{label}, {way} R@{k}", name, f"{way}_retrieval_recall@{k}")
        for name, label in CAPTIONED_SETS.items() for way in ("text", "image") for k in (1, 5, 10)
    ]  # fmt: skip
    probed = [(f"{SMALL_SETS[name]}, linear probe", name, "linear_probe")
              for name in benchmarks.PROBED]  # fmt: skip
    both = f"{source['CLIP-PGS']} {source['GLIP']} {GUESS} {MISSING}"

    def of_sets(title: str, sets: list[tuple[str, str, str]], note: str = "") -> Table:
        return Table(title, *by_set(models, runs, sets), note + both)

    return {
        "T1": Table(
            "ImageNet, zero-shot top-1 by mask ratio", *by_ratio(ratio_models, runs, scenes),
            f"{source['GLIP']} {source['GLIP, first']} {LESSON} {MISSING}"),
        "T2": of_sets("Zero-shot on 26 sets, third party's top-1, else in each set's own metric",
                      [(label, name, "") for name, label in SMALL_SETS.items()],
                      f"{source['A-CLIP']} "),
        "T3": of_sets("Robustness, zero-shot top-1",
                      [(label, name, "acc1") for name, label in SHIFTED_SETS.items()]),
        "T4": of_sets("Retrieval", captioned),
        "T5": of_sets("Linear probe and fine-tuning, top-1",
                      [*probed, ("ImageNet, fine-tuned", IMAGENET, "fine_tune")]),
        "T6": Table("Against A-CLIP", *against_aclip(models, runs, scenes),
                    f"{source['A-CLIP']} {both} {LESSON}"),
        "T7": Table(
            "CC3M, ImageNet's zero-shot top-1", *by_ratio(small_models, runs, scenes),
            f"{source['the paper']} {GUESS} {MISSING}"),
    }  # fmt: skip


def ratio_part() -> str:
    """Of T1 what the authors' README says of CC12M today, and ours."""
    found = paper_tables()["T1"]
    place = found.head.index("data")
    rows = [row for row in found.rows if row[place] == "CC12M"]
    head, *rows = (line[:place] + line[place + 1 :] for line in (found.head, *rows))
    return table(head, rows)


def markdown(name: str, content: Table) -> str:
    """A table of the paper in Markdown."""
    parts = (f"### {name}. {content.title} (%)", table(content.head, content.rows), content.note)
    return "\n\n".join(parts)


SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}

SPECIAL |= {c: "\\" + c for c in "&%$#_{}"}


def latex(name: str, content: Table) -> str:
    """A table of the paper in LaTeX, by booktabs and as wide as a line by graphicx."""

    def row(line: list[str]) -> str:
        return " & ".join(cell.translate(str.maketrans(SPECIAL)) for cell in line) + r" \\"

    caption = f"{name}. {content.title} (%). {content.note}".translate(str.maketrans(SPECIAL))
    return "\n".join([
        r"\begin{table}", rf"\caption{{{caption}}}", rf"\label{{tab:{name}}}",
        r"\resizebox{\linewidth}{!}{%", rf"\begin{{tabular}}{{{'l' * len(content.head)}}}",
        r"\toprule", row(content.head), r"\midrule", *map(row, content.rows), r"\bottomrule",
        r"\end{tabular}}", r"\end{table}",
    ])  # fmt: skip


# --- The pages, and the command -------------------------------------------------------------------


def filled(text: str) -> str:
    """A page's text with every marked part made anew."""
    results, cost = load_runs(), load("cost")
    parts = {
        "demo": demo_table(results), "compare": compare_table(results, cost),
        "cost": cost_table(cost), "data": data_table(), "training": training_table(),
        "speed": speed_table(),
        "paper": ratio_part(),
    }  # fmt: skip
    for name, content in parts.items():
        start, end = f"<!-- {name}: made by tools/tables.py -->", f"<!-- end of {name} -->"
        pattern = re.compile(re.escape(start) + r".*?" + re.escape(end), re.DOTALL)
        text = pattern.sub(lambda _, c=content, s=start, e=end: f"{s}\n{c}\n{e}", text)
    return text


@dataclass(frozen=True)
class ReportConfig:
    """Rewrite the tables of docs/, or print the paper's."""

    paper: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # print the paper's tables
    latex: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # ... for a LaTeX document


@cli.guarded
def main() -> None:
    """The command line."""
    options = tyro.cli(ReportConfig, description=__doc__)
    if options.latex and not options.paper:
        raise glip.InputError("--latex goes with --paper: give both")
    if options.paper:
        draw = latex if options.latex else markdown
        if options.latex:
            print(r"% in the preamble: \usepackage{booktabs, graphicx}" + "\n")
        print("\n\n".join(draw(*item) for item in paper_tables().items()))
    else:
        for page in sorted((ROOT / "docs").glob("*.md")):
            page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
