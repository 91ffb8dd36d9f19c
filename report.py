"""Tables for the README from results/*.json; nothing in them is typed by hand.

    python report.py           rewrites the parts of README.md between the marks
"""

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

from glip import MASKS

ROOT = Path(__file__).parent


def load_results(folder: Path = ROOT / "results") -> list[dict]:
    """Every published run."""
    files = sorted(folder.glob("*.json"))
    return [r for r in (json.loads(file.read_text()) for file in files) if "held_out" in r]


def spread(values: Iterable[float]) -> str:
    """Mean and range of shares, in percent."""
    values = [100 * value for value in values]
    if not values:
        return "not run"
    mean = statistics.mean(values)
    return f"{mean:.1f} ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else f"{mean:.1f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine_line(runs: list[dict]) -> str:
    """Where, with what, and on which commit the runs were made."""
    made = {
        f"{m['cores']} cores of {m['cpu']}, {m['memory_gib']:.0f} GiB, torch "
        f"{m['versions']['torch']}, {'bf16' if r['bf16'] else 'fp32'}, commit {m['commit']}"
        for r in runs
        for m in [r["trained_on"]]
    }
    return "; ".join(sorted(made))


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


def compare_table(results: list[dict]) -> str:
    """Masks at equal steps and at equal time, over seeds."""
    runs = [r for r in results if r["config"]["recipe"] == "compare"]
    if not runs:
        return "Not run."
    full = max(r["config"]["steps"] for r in runs)
    groups = {}
    for r in runs:
        config = r["config"]
        key = (config["data"], -list(MASKS).index(config["mask"]), -config["steps"])
        groups.setdefault(key, []).append(r["held_out"])
    rows = []
    for (name, place, shorter), tables in sorted(groups.items(), key=lambda item: item[0]):
        mask, steps = list(MASKS)[-place], -shorter
        budget = "both" if mask != "none" else "steps" if steps == full else "time"
        cells = [
            spread(t[column][metric] for t in tables) if column in tables[0] else "-"
            for column, metric in (
                ("masked inference", "zero-shot top-1"), ("full picture", "zero-shot top-1"),
                ("after tuning", "zero-shot top-1"), ("after tuning", "zero-shot top-5"),
            )
        ]  # fmt: skip
        rows.append([name, mask, str(steps), budget, str(len(tables)), *cells])
    head = ["data", "mask", "steps", "equal in", "seeds", "masked inference, top-1",
            "full picture, top-1", "after tuning, top-1", "after tuning, top-5"]  # fmt: skip
    return table(head, rows) + f"\n\n{machine_line(runs)}."


def cost_table(folder: Path = ROOT / "results") -> str:
    """What a training step costs under each mask."""
    if not (folder / "cost.json").exists():
        return "Not run."
    cost = json.loads((folder / "cost.json").read_text())
    head = ["step under mask", *cost["seconds_per_step"]]
    rows = [
        ["seconds", *(f"{s:.3f}" for s in cost["seconds_per_step"].values())],
        ["times gaussian", *(f"{t:.2f}" for t in cost["times_gaussian"].values())],
    ]
    return table(head, rows) + (
        f"\n\nMedian of {cost['rounds']} alternating rounds, batch {cost['batch_size']}, "
        f"{cost['mask_ratio']:.0%} masked, threads: {cost['threads']}."
    )


def filled(text: str) -> str:
    """README text with every marked part made anew."""
    results = load_results()
    parts = {"demo": demo_table(results), "compare": compare_table(results), "cost": cost_table()}
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
