"""Tables from results/; nothing in them is typed by hand.

    python -m tools.tables            rewrites them in README.md and docs/
    python -m tools.tables --paper    prints the paper's tables, its numbers beside ours

A table stands between <!-- NAME: made by tools/tables.py --> and <!-- end of NAME -->; PARTS has
the names. Published numbers, their sources and the plans of the paper's tables are in
results/paper.json.
"""

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from nanoglip import aliases, cli, estimate, masks
from nanoglip.config import parse
from nanoglip.results import FOLDER, load, load_runs
from tools import sweep

ROOT = Path(__file__).parents[1]
NOT_RUN, NOT_PUBLISHED = "not run", "not published"

STAGES = ("masked inference", "full picture", "after tuning")  # the paper's columns


def mean_range(values: Iterable[float], full: int = 1) -> str:
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


def ratio_range(ratio: float, limits: list[float]) -> str:
    """A median and its range."""
    return f"{ratio:.2f} ({limits[0]:.2f}-{limits[1]:.2f})"


def made_on(machine: dict) -> str:
    """Where a measurement was made."""
    return f"{machine['cores']} cores of {machine['cpu']}, commit {machine['commit']}"


def machine_line(runs: list[dict]) -> str:
    """Where, with what, and on which commits the runs were made."""
    made = defaultdict(set)
    for run in runs:
        m, bits = run["trained_on"], "bf16" if run["bf16"] else "fp32"
        where = f"{m['cores']} cores of {m['cpu']}, {m['memory_gib']:.0f} GiB"
        made[f"{where}, torch {m['versions']['torch']}, {bits}"].add(m["commit"])
    return "; ".join(
        f"{machine}, commit{'s' * (len(commits) > 1)} {', '.join(sorted(commits))}"
        for machine, commits in sorted(made.items())
    )


# --- Our runs -------------------------------------------------------------------------------------


def demo_table(runs: list[dict]) -> str:
    """The demo's three columns and its probes, over seeds."""
    runs = [run for run in runs if re.fullmatch(r"demo(_seed=\d+)?", run["name"])]
    if not runs:
        return "Not run."
    rows = [
        [metric, *(mean_range(run["held_out"][stage][metric] for run in runs) for stage in STAGES)]
        for metric in runs[0]["held_out"]["after tuning"] if not metric.startswith("image to text")
    ]  # fmt: skip
    for prompt in runs[0].get("prompted", {}):
        shares = [run["prompted"][prompt] for run in runs if "prompted" in run]
        rows.append([f"zero-shot top-1, {prompt}", "", "", mean_range(shares)])
    for name in runs[0].get("linear_probe", {}):
        probes = [run["linear_probe"][name] for run in runs if "linear_probe" in run]
        label = f"linear probe, {name} (largest class {100 * probes[0]['majority']:.0f} %)"
        rows.append([label, "", "", mean_range(probe["accuracy"] for probe in probes)])
    minutes = [sum(run["train_seconds"].values()) / 60 for run in runs]
    seeds = ", ".join(str(seed) for seed in sorted(run["config"]["seed"] for run in runs))
    return (
        table(["%, mean (range)", *STAGES], rows)
        + f"\n\nSeeds {seeds}; {min(minutes):.1f} to {max(minutes):.1f} minutes of training; "
        f"{machine_line(runs)}."
    )


def cells(
    runs: list[dict], cost: dict, column: str = "after tuning", metric: str = "zero-shot top-1"
) -> dict[tuple[str, str, float, str], str]:
    """(data, mask, ratio, equal in) -> mean and range, for every cell that is planned."""
    published, found = {run["name"]: run["held_out"] for run in runs}, defaultdict(list)
    for run in sweep.planned(cost):
        held_out = published.get(run.name, {})
        values = found[run.data, run.mask, run.ratio, run.equal]
        values += [held_out[column][metric]] if column in held_out else []
    return {key: mean_range(values, len(sweep.SEEDS)) for key, values in found.items()}


def mask_table(
    found: dict, cost: dict, title: str, columns: dict[str, tuple[str, float]],
    names: Iterable[str] = (),
) -> str:  # fmt: skip
    """Every mask, or those of `names`, in columns of (data, ratio).

    Masks of equal cost have one row for both budgets.
    """
    full, rows = sweep.COMPARED.steps, []
    ratios = sorted({ratio for _, ratio in columns.values()})
    for mask in names or sweep.rows():
        steps = [sweep.affordable(cost, mask, ratio, full) for ratio in ratios]
        shared = steps == [full] * len(ratios)
        budgets = {"steps": mask if shared else f"{mask}, equal steps"}
        if not shared and None not in steps:  # None: its cost is not known
            budgets["time"] = f"{mask}, equal time ({', '.join(map(str, steps))} steps)"
        for equal, label in budgets.items():
            keys = [(data, mask, ratio, equal) for data, ratio in columns.values()]
            if found.keys() >= set(keys):
                rows.append([label, *(found[key] for key in keys)])
    return table([title, *columns], rows)


def stage_table(runs: list[dict], cost: dict) -> str:
    """The paper's three columns, for every mask and ratio on the centred scenes."""
    found, rows = [cells(runs, cost, column) for column in STAGES], []
    for ratio in (0.0, *sorted(sweep.RATIOS)):
        for mask in (m for m in (*masks.MASKS, sweep.SMALL) if (m == "none") == (ratio == 0)):
            key = (sweep.HOME, mask, ratio or sweep.RATIOS[0], "steps")
            first, *others = (column[key] for column in found)
            masked = mask not in ("none", sweep.SMALL)
            rows.append([mask, f"{ratio:.1%}", first if masked else "-", *others])
    return table(["mask", "masked", *(f"{column}, top-1" for column in STAGES)], rows)


def share_lines(runs: list[dict], cost: dict) -> str:
    """What masks of varying size compute and show, in masked inference."""
    published, found = {run["name"]: run.get("mask_shares") for run in runs}, defaultdict(list)
    for run in sweep.planned(cost):
        shares = published.get(run.name)
        if shares and run.equal == "steps" and shares["computed"] != shares["visible"]:
            found[run.data, run.mask, run.ratio].append(shares)
    lines = []
    for (name, mask, ratio), shares in sorted(found.items()):
        computed, visible, one = (
            statistics.mean(share[key] for share in shares)
            for key in ("computed", "visible", "pictures of one patch")
        )
        lines.append(
            f"- `{mask}` at {ratio:.1%} on {name} computes {computed:.1%} of the patches, shows "
            f"{visible:.1%}, and of {one:.0%} of the held-out pictures a single one."
        )
    return "\n".join(lines)


def compare_table(runs: list[dict], cost: dict) -> str:
    """All tables of the sweep, and where its runs were made."""
    names = {run.name for run in sweep.planned(cost)}
    runs = [run for run in runs if run["name"] in names]
    if not runs:
        return "Not run."
    found, first = cells(runs, cost), sweep.RATIOS[0]
    ratios = {f"{ratio:.1%} masked": (sweep.HOME, ratio) for ratio in sorted(sweep.RATIOS)}
    sets = {name: (name, first) for name in (sweep.HOME, *sweep.AWAY)}
    parts = [
        mask_table(found, cost, f"{sweep.HOME}, top-1 (%)", ratios),
        mask_table(found, cost, f"{first:.0%} masked, top-1 (%)", sets),
        stage_table(runs, cost), share_lines(runs, cost),
        f"{len(runs)} of {len(names)} runs; {machine_line(runs)}.",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def short_table(runs: list[dict], cost: dict) -> str:
    """README's choice of the comparison."""
    first = sweep.RATIOS[0]
    sets = {name: (name, first) for name in (sweep.HOME, "emoji", "scenes-corner")}
    chosen = ("none", "random", "gaussian", "gaze", "attentive")
    return mask_table(cells(runs, cost), cost, f"{first:.0%} masked, top-1 (%)", sets, chosen)


def cost_table(cost: dict) -> str:
    """What a training step costs under each mask, and the mask alone."""
    seconds = {(row["mask"], row["mask_ratio"]): row for row in cost["seconds"]}
    ratios, rows = sorted({ratio for _, ratio in seconds if ratio}), []
    for mask in sweep.rows():
        line = [seconds.get((mask, 0.0 if mask == "none" else ratio)) for ratio in ratios]
        times = [f"{row['step'] / seconds['gaussian', ratio]['step']:.2f}" if row
                 else "not measured" for row, ratio in zip(line, ratios, strict=True)]  # fmt: skip
        alone = [f"{row['mask alone'] / row['step']:.2%}" if row and mask in sweep.MASKED else "-"
                 for row in line]  # fmt: skip
        rows.append([mask, *times, *alone])
    head = ["mask", *(f"step, times GLIP's, {ratio:.1%}" for ratio in ratios),
            *(f"mask alone, of its step, {ratio:.1%}" for ratio in ratios)]  # fmt: skip
    first = seconds["gaussian", sweep.RATIOS[0]]["step"]
    return table(head, rows) + (
        f"\n\nMedians of {cost['rounds']} alternating rounds on {cost['data']}, batch "
        f"{cost['batch_size']}, threads: {cost['threads']}; GLIP's step at "
        f"{sweep.RATIOS[0]:.0%} took {first:.3f} s; commit {cost['machine']['commit']}."
    )


def tuned(runs: list[dict], flags: str, column: str = STAGES[-1]) -> str:
    """The mean and range of every seed of the comparison's recipe with these flags."""
    found = sweep.seeds_of(runs, flags, column)
    return mean_range((percent / 100 for percent in found), len(sweep.SEEDS))


def recovery_table(runs: list[dict]) -> str:
    """The paper's columns at 91.8 % masked, for steps of pre-training and of tuning."""
    rows, common = [], f"--data {sweep.HOME} --mask-ratio {sweep.RATIOS[1]}"
    for steps, epochs in ((sweep.COMPARED.steps, 0.5), *sweep.RECOVERY.items()):
        flags = f"{common} --steps {steps} --tune-epochs {epochs}"
        told = [tuned(runs, flags, column) for column in STAGES]
        rows.append([f"{steps:,}", str(round(40 * epochs)), *told])
    return table(["steps at 91.8 % masked", "steps of tuning", *STAGES], rows)


def questions_table(runs: list[dict], sets: tuple[str, ...], rows: dict[str, str]) -> str:
    """Zero-shot top-1 after tuning of rows of flags, on some sets."""
    told = [[name, *(tuned(runs, f"--data {data} {flags}") for data in sets)]
            for name, flags in rows.items()]  # fmt: skip
    return table(["after tuning, top-1 (%)", *sets], told)


CHANGING = {
    "75 % masked in all steps": "", "32 pixels, then 64, no mask": f"--mask none {sweep.GROWN}",
    **{f"`--mask-ratio {ends}`": f"--mask-ratio {ends}" for ends in sweep.ANNEALED},
}  # fmt: skip
TILED = {mask: f"--mask {mask}" for mask in ("none", "random", "gaussian", "gaze")}


# --- Measurements ---------------------------------------------------------------------------------

READERS = {"open_clip": "open_clip 3.3's pipeline", "decoder": "the decoder alone (simplejpeg)",
           "Pillow": "Pillow's decoder alone"}  # fmt: skip


def data_table(bench: dict) -> str:
    """How fast data are read, and what `make proof` measured."""
    found, proof = bench["data"], bench["proof"]
    rate = found["pictures_per_second"]
    rows = [["this reader", f"{rate['ours']:,.0f}", "1"]]
    for name, ratio in found["ours_to"].items():
        times = ratio_range(ratio, found["range"][name])
        rows.append([READERS[name], f"{rate[name]:,.0f}", times])
    index, memory, fuzz, killed = (proof[k] for k in ("index", "memory", "fuzz", "torture"))
    return table(["one thread", "pictures a second", "this reader's rate to it"], rows) + (
        f"\n\n256-pixel JPEG photographs of {found['mean_bytes'] / 1024:.0f} KiB, random crops to "
        f"224 pixels, captions tokenised; medians (and ranges) of {found['rounds']} alternating "
        f"rounds; {made_on(found['machine'])}. A synthetic index of {index['samples']:,} samples "
        f"takes {index['address_bytes'] / 1e6:.0f} MB for addresses and "
        f"{index['caption_bytes_per_sample']:.0f} bytes a caption, opens in "
        f"{index['open_seconds']:.1f} s with {index['open_memory_mib']:.0f} MiB of memory, and "
        f"gives a batch from the middle of a run in {index['first_batch_seconds']:.2f} s. Over "
        f"{memory['reads']:,} reads a process grew by {memory['growth']:.1%}. None of "
        f"{fuzz['shards']:,} damaged and hostile shards caused a crash. {killed['runs']} training "
        f"runs were killed {killed['kills']} times, {killed['while_writing']} of them while a "
        "checkpoint was written; their weights are bit-identical to those of uninterrupted runs "
        "(`make proof`)."
    )


def decoding_table(bench: dict) -> str:
    """Pictures of several sizes: our reader beside others, and what scaling changes."""
    found, rows = bench["decoding"], []
    rounding = found["rows"][-1]["levels"]["Pillow"]
    for row in found["rows"]:
        levels = row["levels"]
        rows.append([
            f"{row['pixels']} pixels, {row['mean_bytes'] / 1024:.0f} KiB",
            f"{row['pictures_per_second']['ours']:,.0f}",
            *(ratio_range(row["ours_to"][name], row["range"][name])
              for name in ("whole", "open_clip")),
            f"{levels['ours']:.2f} ({levels['bilinear']:.2f})" if levels else "0",
        ])  # fmt: skip
    head = ["shorter side", "pictures a second", "to decoding whole",
            "to open_clip 3.3's pipeline", "mean difference in levels (bilinear's)"]  # fmt: skip
    return table(head, rows) + (
        f"\n\nOne thread, crops to 224 pixels, by the processor's clock while other work ran; "
        f"medians (and ranges) of {found['rounds']} alternating rounds (`tools.bench decoding`); "
        f"{made_on(found['machine'])}. The difference is that of the scaled crops after resizing "
        "from those of whole decoding, beside that of bilinear from bicubic resizing; bicubic "
        f"resizing by torchvision and by Pillow is {rounding:.3f} apart."
    )


def training_table(bench: dict) -> str:
    """Memory against the batch, several processes, and estimated beside measured steps."""
    memory, shared, estimated = bench["memory"], bench["processes"], bench["estimate"]
    tables = [
        table(["model, `--micro-batch`", "batch", "highest memory of a step", "without features"],
              [[f"{r['model']}, {r['micro_batch']}", f"{r['batch']:,}",
                *(f"{size / 1e6:,.0f} MB" for size in (r["peak"], r["peak"] - r["features"]))]
               for r in memory["rows"]]),
        table([f"ViT-nano-8 (AdamW), batch {shared['batch']}", "pairs a second",
               "to one process"],
              [[name, f"{rate:,.0f}", f"{shared['to_one'][name]:.2f}"]
               for name, rate in shared["pairs_per_second"].items()]),
        table(["`--estimate here`", "measured step", "estimated", "ratio"],
              [[f"`{r['flags']}`, batch {r['batch']}", f"{r['measured']:.3f} s",
                f"{r['estimated']:.3f} s", ratio_range(r["ratio"], r["range"])]
               for r in estimated["rows"]]),
    ]  # fmt: skip
    return "\n\n".join(tables) + (
        f"\n\nRandom pairs; pictures and tokens are not counted. Medians of {shared['rounds']} and "
        f"{estimated['rounds']} rounds (`tools.bench memory` and `estimate`, train.py's logs); "
        f"{made_on(memory['machine'])}. Two processes share the two cores."
    )


def speed_table(bench: dict) -> str:
    """Training steps beside open_clip's, where their time goes, and the paper's run estimated."""
    found = bench["benchmark"]
    rows = [
        [(f"{r['mask_ratio']:.1%} masked, " if r["mask_ratio"] else "no mask, ") + r["precision"]
         + ", both compiled" * r.get("compiled", False),
         *(f"{rate:.1f}" for rate in r["pairs_per_second"].values()),
         ratio_range(r["times_faster"], r["range"]), f"{r['times_faster_were_it_fused']:.2f}",
         f"{r['share_of_product_rate']:.0%}",
         *([f"{peak / 1e9:.2f} GB" for peak in r["peak"].values()] if "peak" in r else ["", ""])]
        for r in found["cases"]
    ]  # fmt: skip
    head = ["ViT-B/16, batch 32", "pairs a second", "open_clip 3.3", "times faster",
            "times faster, its AdamW fused", "share of the rate of products", "memory of a step",
            "open_clip's"]  # fmt: skip
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in found["profile"].items())
    machine, rate = found["machine"], {r["precision"]: r["product_rate"] for r in found["cases"]}
    return (
        f"{table(head, rows)}\n\n{paper_hours()}\n\n"
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
    flags_of = [["--mask-ratio", str(ratio)] if ratio else ["--mask", "none"] for ratio in ratios]
    runs = [estimate.of_run(parse([*flags, *more]), [])[1] for more in flags_of]
    rates = [run[0]["pairs_per_second"] for run in runs]
    head = [f"`{' '.join(flags)}`", *(f"{r:.1%} masked" if r else "no mask" for r in ratios)]
    return table(head, [
        ["hours", *(f"{sum(stage['hours'] for stage in run):.1f}" for run in runs)],
        ["pairs a second", *(f"{rate:,.0f}" for rate in rates)],
        ["cores of the reader", *(f"{rate / estimate.reader_rate():.0f}" for rate in rates)],
    ])  # fmt: skip


# --- The paper's tables ---------------------------------------------------------------------------

IMAGENET, TIME = "imagenet1k", "training time"


class Table(NamedTuple):
    """A table as text: title, heads of its columns, rows, and what must be known about it."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str


def at_stage(columns: dict[str, float], stage: str) -> float | None:
    """A model's number at a stage; "": the last unmasked stage."""
    return columns.get(stage or ("after tuning" if "after tuning" in columns else "full picture"))


def published(model: dict, name: str, metric: str, stage: str = "") -> str:
    """A published number: of a set, by a metric ("": its only one), at a stage or the last."""
    found = model["numbers"].get(name, {})
    columns = found.get(metric, {}) if metric else next(iter(found.values()), {})
    value = at_stage(columns, stage)
    if value is None:
        return NOT_PUBLISHED
    return f"{value:g}" if name == TIME else f"{value:.1f}"


def ours(runs: list[dict], model: dict, name: str, metric: str = "", stage: str = "") -> str:
    """The same number of our runs with a published model's settings: mean and range over seeds.

    metric "": the set's own, or `linear_probe`, `fine_tune` for these.
    """
    found, settings = [], {"text_mask": "none", "aclip": False, **model.get("ours", {})}
    for run in runs if "ours" in model else ():
        if settings.items() <= run["config"].items():
            entry = run.get("benchmarks", {}).get(name, {"columns": {}})
            columns = {s: row.get(metric or entry["metric"]) for s, row in entry["columns"].items()}
            if metric in ("linear_probe", "fine_tune"):
                columns = {"after tuning": run.get(metric, {}).get(name, {}).get("accuracy")}
            found.append(at_stage(columns, stage))
    return mean_range(value for value in found if value is not None)


def in_scenes(model: dict, scenes: dict, equal: str = "steps") -> str:
    """Our comparison's cell for a published model's mask and ratio, if it has one."""
    return scenes.get((sweep.HOME, *model.get("scenes", ("", 0)), equal), "-")


def by_ratio(models: list[dict], runs: list[dict], scenes: dict, _: list) -> tuple[list, list]:
    """Head and rows of ImageNet's zero-shot top-1 at each stage, the published beside ours."""
    head = ["method", "masked", "tokens", "data", *(f"{stage}, published" for stage in STAGES),
            *(f"{stage}, ours" for stage in STAGES),
            f"{sweep.HOME} after tuning, ours"]  # fmt: skip
    rows = []
    for model in models:
        # Without a mask there is no masked inference, and with all patches nothing to tune.
        masked, numbers = model["masked"], (model, IMAGENET, "acc1")
        stages = STAGES[1:2] if masked == "0 %" else STAGES[masked.endswith("px") :]
        given = [published(*numbers, s) if s in stages else "-" for s in STAGES]
        own = [ours(runs, *numbers, s) if s in stages else "-" for s in STAGES]
        data = model["data"] + " (first README)" * (model["source"] == "GLIP, first")
        rows.append([model["method"], masked, str(model["tokens"]), data, *given, *own,
                     in_scenes(model, scenes)])  # fmt: skip
    return head, rows


def by_set(models: list[dict], runs: list[dict], _: dict, sets: list) -> tuple[list, list]:
    """Head and rows of (label, set, metric): others' numbers, the paper's and ours."""
    own = [m for m in models if m["source"] == "GLIP"]
    by = {"CLIP-PGS": "third party", "A-CLIP": "A-CLIP's authors", "GLIP": "GLIP's authors"}

    def name(m: dict) -> str:
        return m["method"] + f" {m['masked']}" * (m in own and m["masked"] != "0 %")

    def judge(m: dict) -> str:
        return "its authors" if m["method"].startswith("CLIP-PGS") else by[m["source"]]

    head = ["", *(f"{name(m)}, {judge(m)}" for m in models),
            *(f"{name(m)}, ours" for m in own)]  # fmt: skip
    return head, [
        [label, *(published(m, *number) for m in models), *(ours(runs, m, *number) for m in own)]
        for label, *number in sets
    ]


def by_rival(models: list[dict], runs: list[dict], scenes: dict, sets: list) -> tuple[list, list]:
    """Head and rows of A-CLIP's and GLIP's models; `scenes`: our comparison in steps and time."""
    head = ["method", "masked", "source", *(label for label, *_ in sets), "ImageNet, ours",
            f"{sweep.HOME}, ours, equal steps", "equal time"]  # fmt: skip
    return head, [
        [m["method"], m["masked"], f"{m['source']} ({m['data']})",
         *(published(m, *number) for _, *number in sets), ours(runs, m, IMAGENET, "acc1"),
         in_scenes(m, scenes), in_scenes(m, scenes, "time")]
        for m in models
    ]  # fmt: skip


def paper_tables(folder: Path = FOLDER) -> dict[str, Table]:
    """The paper's seven tables: what is published, what is not, and what was run here."""
    paper, runs, tables = load("paper", folder), load_runs(folder, "config"), {}
    scenes = cells(load_runs(folder), load("cost", folder))
    notes = {**{key: f"{key}: {text}." for key, text in paper["sources"].items()}, **paper["notes"]}
    for name, plan in paper["tables"].items():
        models = [model for model in paper["models"] if name in model["tables"]]
        models.sort(key=lambda model, order=plan["sources"]: order.index(model["source"]))
        make = {"ratio": by_ratio, "set": by_set, "rival": by_rival}[plan["kind"]]
        head, rows = make(models, runs, scenes, plan.get("rows", []))
        note = " ".join(notes[key] for key in plan["notes"])
        tables[name] = Table(plan["title"], head, rows, note)
    return tables


def glip_table() -> str:
    """The rows of T1 on CC12M, which are in the authors' README of today, and ours."""
    found = paper_tables()["T1"]
    place = found.head.index("data")
    rows = [found.head, *(row for row in found.rows if row[place] == "CC12M")]
    head, *rows = (row[:place] + row[place + 1 :] for row in rows)
    return table(head, rows)


def markdown(name: str, content: Table) -> str:
    """A table of the paper in Markdown."""
    parts = (f"### {name}. {content.title} (%)", table(content.head, content.rows), content.note)
    return "\n\n".join(parts)


# --- The pages, and the command -------------------------------------------------------------------

def flags_table() -> str:
    """open_clip's flags and ours."""
    rows = ["| open_clip | here |", "| --- | --- |"]
    for theirs, ours in (aliases.NAMES | aliases.SAME).items():
        plain = ours and (theirs in aliases.SAME or not ours.startswith("--"))
        theirs = theirs.replace("*{*}*", "{0..9}.tar").replace("*::*", "A::B")
        theirs = theirs.replace("*.pt", "FILE.pt").replace("*", "...")
        cell = ours.replace("{}", "VALUE")
        rows.append(f"| `{theirs}` | {cell if plain else f'`{cell}`' if cell else 'always so'} |")
    return "\n".join(rows)


def speedrun_table(bench: dict) -> str:
    """The ladder of the demo's records on the validation vendor, three seeds each."""
    records, rows = bench["speedrun"]["records"], []
    for record in records:
        flags = f"; `{record['flags']}`" if record["flags"] else ""
        minutes = " to ".join(f"{value:.1f}" for value in record["minutes"].values())
        times = ratio_range(record["times_faster"], record["range"]) if "range" in record else "1"
        rows.append([
            record["change"] + flags, f"{record['steps']['pretrain']} + {record['steps']['tune']}",
            mean_range(record["top-1"]), times, minutes,
            "bf16" if record["bf16"] else "fp32", record["commit"],
        ])  # fmt: skip
    head = ["change", "steps", "top-1 (%)", "times faster", "minutes", "in", "commit"]
    return table(head, rows) + f"\n\n{made_on(records[-1]['machine'])}."


PARTS: dict[str, Callable[[], str]] = {
    "demo": lambda: demo_table(load_runs()),
    "compare": lambda: compare_table(load_runs(), load("cost")),
    "short": lambda: short_table(load_runs(), load("cost")),
    "cost": lambda: cost_table(load("cost")),
    "recovery": lambda: recovery_table(load_runs()),
    "changing": lambda: questions_table(load_runs(), (sweep.HOME, "emoji"), CHANGING),
    "tiled": lambda: questions_table(load_runs(), (sweep.HOME, "scenes-tiled"), TILED),
    "data": lambda: data_table(load("bench")),
    "decoding": lambda: decoding_table(load("bench")),
    "training": lambda: training_table(load("bench")),
    "speed": lambda: speed_table(load("bench")),
    "speedrun": lambda: speedrun_table(load("bench")),
    "paper": glip_table,
    "open_clip": flags_table,
}


def filled(text: str) -> str:
    """A page with every marked part made anew."""
    pattern = r"(<!-- (\w+): made by tools/tables.py -->\n).*?(<!-- end of \2 -->)"
    fill = lambda found: f"{found[1]}{PARTS[found[2]]()}\n{found[3]}"  # noqa: E731
    return re.sub(pattern, fill, text, flags=re.DOTALL)


@dataclass(frozen=True)
class TablesConfig:
    """Rewrite the tables of README.md and docs/, or print the paper's."""

    paper: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # print the paper's tables


@cli.guarded
def main() -> None:
    """The command line."""
    if tyro.cli(TablesConfig, description=__doc__).paper:
        print("\n\n".join(markdown(*item) for item in paper_tables().items()))
        return
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        page.write_text(filled(page.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
