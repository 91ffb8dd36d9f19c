"""Tables for the README from results/*.json; nothing in them is typed by hand.

    python report.py           rewrites the parts of README.md between the marks
"""

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import glip
import sweep
import train

ROOT = Path(__file__).parent


def load_results(folder: Path = ROOT / "results") -> list[dict]:
    """Every published run."""
    files = sorted(folder.glob("*.json"))
    return [r for r in (json.loads(file.read_text()) for file in files) if "held_out" in r]


def spread(values: Iterable[float], full: int = 1) -> str:
    """Mean and range of shares, in percent; how many there are, where fewer than `full`."""
    values = [100 * value for value in values]
    if not values:
        return "not run"
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
    columns = ("masked inference", "full picture", "after tuning")
    metrics = [m for m in runs[0]["held_out"]["after tuning"] if not m.startswith("image to text")]
    rows = [
        [metric, *(spread(r["held_out"][column][metric] for r in runs) for column in columns)]
        for metric in metrics
    ]
    for name in runs[0].get("linear_probe", {}):
        shares = [r["linear_probe"][name] for r in runs if "linear_probe" in r]
        cell = spread(s["accuracy"] for s in shares)
        rows.append([f"linear probe, {name} (largest class {100 * shares[0]['majority']:.0f} %)",
                     "", "", cell])  # fmt: skip
    minutes = [sum(r["train_seconds"].values()) / 60 for r in runs]
    seeds = sorted(r["config"]["seed"] for r in runs)
    return (
        table(["%, mean (range)", *columns], rows)
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
    full, rows = train.parse(["--recipe", "compare"]).steps, []
    for mask in (*glip.MASKS, sweep.SMALL):
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
    columns = ("masked inference", "full picture", "after tuning")
    found = [cells(results, cost, column) for column in columns]
    none = (sweep.HOME, "none", sweep.RATIOS[0], "steps")
    rows = [["none", "0.0%", "-", *(f[none] for f in found[1:])]]
    for ratio in sorted(sweep.RATIOS):
        for mask in (*glip.MASKS, sweep.SMALL):
            if mask != "none":
                first, *others = (f[sweep.HOME, mask, ratio, "steps"] for f in found)
                first = "-" if mask == sweep.SMALL else first
                rows.append([mask, f"{ratio:.1%}", first, *others])
    return table(["mask", "masked", *(f"{c}, top-1" for c in columns)], rows)


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
    for mask in (*glip.MASKS, sweep.SMALL):
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
    bench = json.loads((ROOT / "results/bench-data.json").read_text())
    proof = json.loads((ROOT / "results/proof.json").read_text())
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
        f"damaged and hostile shards made nothing crash. {killed['runs']} training runs were "
        f"killed {killed['kills']} times, {killed['while_writing']} of them while a checkpoint was "
        "written, and ended with the bits of runs that were left alone (`make proof`)."
    )


def filled(text: str) -> str:
    """README text with every marked part made anew."""
    results = load_results()
    cost = json.loads((ROOT / "results/cost.json").read_text())
    parts = {
        "demo": demo_table(results), "compare": compare_table(results, cost),
        "cost": cost_table(cost), "data": data_table(),
    }  # fmt: skip
    for name, content in parts.items():
        start, end = f"<!-- {name}: made by report.py -->", f"<!-- end of {name} -->"
        pattern = re.compile(re.escape(start) + r".*?" + re.escape(end), re.DOTALL)
        text = pattern.sub(lambda _, c=content, s=start, e=end: f"{s}\n{c}\n{e}", text)
    return text


def main() -> None:
    """Rewrite README.md's tables."""
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))


if __name__ == "__main__":
    main()
