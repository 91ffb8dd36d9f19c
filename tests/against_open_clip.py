"""Training steps beside open_clip's: make bench, or python tests/against_open_clip.py [--rounds 7]

One process holds both, with the same weights, pictures and captions, and takes a step of each in
turn: forward, backward, AdamW. The captions are as long as CC12M's (20.2 tokens in the mean, 16.3
around it, cut at 77), others in every round. open_clip has --force-patch-dropout and --precision
amp_bf16, pads its texts, and makes its AdamW in its own way, which no flag of 3.3 fuses; a second
AdamW, fused, takes every other step of it, so that what comes of this alone is seen. It shares our
process's memory settings. Both see the same patches once, and must find the same loss. One case is
compiled on both sides: our --compile, its --torchcompile; its draws are others then.

Beside the steps: the machine's own rate of products, before and after each case; each side's
highest memory, in a process of its own; and what our step costs against batch, mask ratio, size of
pictures and length of captions.

Writes into results/bench.json, and docs/figures/benchmark.png.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import glip
import train
from glip import GLIPConfig
from nanoglip import estimate
from nanoglip.config import masker_of, parse
from nanoglip.machine import Device, keep_memory, machine
from nanoglip.results import save_bench
from nanoglip.sources.order import Batch
from tools.bench import status

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))








CASES = [  # mask_ratio, precision, whether compiled
    (0.0, "bf16", False), (0.5, "bf16", False), (0.75, "bf16", False), (0.918, "bf16", False),
    (0.75, "fp32", False), (0.75, "bf16", True),
]  # fmt: skip
WARM = 3  # rounds before those that count: memory is new, and lengths of captions are compiled
BASE = {"batch": 32, "mask_ratio": 0.75, "image_size": 224, "text_tokens": 20}
CURVES = {  # of a ViT-B/16 in bf16; what is not named is as in BASE
    "batch": [4, 8, 16, 32, 64], "mask_ratio": [0.0, 0.5, 0.75, 0.9, 0.918],
    "image_size": [64, 112, 160, 224, 320, 448], "text_tokens": [5, 10, 20, 40, 77],
}  # fmt: skip
CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------------------
# The two sides
# ------------------------------------------------------------------------------------------------


def captions(count: int, mean: float = 20.2, deviation: float = 16.3, seed: int = 0) -> Tensor:
    """Random words, log-normal lengths, by default CC12M's (its paper's Table 1). (n, 77)."""
    draw = torch.Generator().manual_seed(seed)
    spread = math.log(1 + (deviation / mean) ** 2)
    lengths = torch.exp(torch.randn(count, generator=draw) * spread**0.5 - spread / 2) * mean
    lengths = lengths.round().clamp(3, 77).long()
    tokens = torch.randint(1, 40_000, (count, 77), generator=draw)
    tokens[torch.arange(77) >= lengths[:, None]] = 0
    tokens[torch.arange(count), lengths - 1] = glip.END
    return tokens


def our_step(
    batch: int, mask_ratio: float, image_size: int, bf16: bool, weights: dict,
    compiled: bool = False, device: torch.device = CPU,
) -> Callable[[Tensor, Tensor], float]:  # fmt: skip
    """A step as train.py's loop takes it, as a function of tokens (B, 77) and the mask's noise
    (B, N); its loss."""
    mask = ["none"] if not mask_ratio else ["random", "--mask-ratio", str(mask_ratio)]
    config = parse(["--model", "ViT-B-16", "--optimizer", "adamw", "--mask", *mask])
    model = glip.GLIP(GLIPConfig.named("ViT-B-16", image_size)).train()
    if weights:
        model.load_state_dict(weights)
    model.to(device)
    optimizers = train.make_optimizers(model, config)
    masker, on = masker_of(config), Device(device, bf16)
    images = pictures(batch, image_size).to(device)
    if compiled:
        train.compile_towers(model)

    def step(tokens: Tensor, noise: Tensor) -> float:
        tokens = tokens[:, : int(glip.lengths(tokens).max())]
        pairs = Batch(images, tokens, noise, torch.zeros(batch, 0), [])
        loss, *_ = train.compute_gradients(model, pairs, masker, config.loss, on)
        train.apply_gradients(model, optimizers, 1e-4, 0.0)
        model.clamp_logit_scale()
        return loss.item()

    return step


def their_step(
    batch: int, mask_ratio: float, bf16: bool, compiled: bool = False, device: torch.device = CPU
) -> tuple[Callable[[Tensor, bool], float], dict]:
    """A step as open_clip's train_one_epoch takes it, without its logging, as a function of tokens
    (B, 77) and of whether AdamW is fused; and the weights."""
    import open_clip
    from open_clip.loss import ClipLoss

    model = open_clip.create_model("ViT-B-16", force_patch_dropout=mask_ratio or None).train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.to(device)
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) == decayed],
               "weight_decay": 0.2 * decayed} for decayed in (False, True)]  # fmt: skip
    adamw = {
        fused: torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98), eps=1e-6, fused=fused or None)
        for fused in (False, True)
    }
    mean, std = (torch.tensor(c)[:, None, None] for c in (glip.MEAN, glip.STD))
    images, loss_of = ((pictures(batch, 224) / 255 - mean) / std).to(device), ClipLoss()
    called = torch.compile(model) if compiled else model

    def step(tokens: Tensor, fused: bool = False) -> float:
        adamw[fused].zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = loss_of(*called(images, tokens.to(device))[:3])
        loss.backward()
        adamw[fused].step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return loss.item()

    return step, weights


def pictures(batch: int, image_size: int) -> Tensor:
    """Random bytes, always the same. (B, 3, S, S)."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, image_size, image_size), generator=draw).byte()


def noise_of(batch: int, image_size: int) -> Tensor:
    """What open_clip's patch dropout draws. (B, N)."""
    return torch.randn(batch, (image_size // 16) ** 2)


# ------------------------------------------------------------------------------------------------
# Steps in turn
# ------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], object]) -> float:
    """What a call takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def flops(mask_ratio: float, text: float, image_size: int = 224) -> float:
    """Products of a step for a pair: forward, and twice as many backward."""
    model = GLIPConfig.named("ViT-B-16", image_size)
    patches = model.grid[0] * model.grid[1]
    kept = glip.num_keep(patches, mask_ratio) if mask_ratio else patches
    return 3 * sum(estimate.forward_flops(model, kept, text))


def compare(mask_ratio: float, precision: str, compiled: bool, rounds: int) -> dict:
    """Steps of both in turn, and products; medians, and of ratios within a round."""
    batch, bf16 = BASE["batch"], precision == "bf16"
    torch.manual_seed(0)
    theirs, weights = their_step(batch, mask_ratio, bf16, compiled)
    ours = our_step(batch, mask_ratio, 224, bf16, weights, compiled)
    losses, rows = [], []
    for step in (theirs, lambda tokens: ours(tokens, noise_of(batch, 224))):
        torch.manual_seed(1)  # the same patches, by the same draw; compiled, open_clip has others
        losses.append(step(captions(batch)))
    if not (compiled or math.isclose(*losses, rel_tol=2e-3 if bf16 else 1e-5)):
        sys.exit(f"{mask_ratio}: the losses are {losses}: their times cannot be compared")
    for round_number in range(WARM + rounds):
        tokens = captions(batch, seed=round_number)
        rate, _ = estimate.rates(CPU, bf16, 768)
        rows.append({
            "products": rate,
            "ours": seconds(partial(ours, tokens, noise_of(batch, 224))),
            "open_clip": seconds(partial(theirs, tokens)),
            "fused": seconds(partial(theirs, tokens, fused=True)),
            "computed": batch * flops(mask_ratio, glip.lengths(tokens).float().mean().item()),
        })  # fmt: skip
    rows = rows[WARM:]
    ratios = sorted(row["open_clip"] / row["ours"] for row in rows)
    middle = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return {
        "mask_ratio": mask_ratio, "precision": precision, "compiled": compiled, "rounds": rounds,
        "pairs_per_second": {side: batch / middle[side] for side in ("ours", "open_clip")},
        "times_faster": statistics.median(ratios), "range": [ratios[0], ratios[-1]],
        "times_faster_were_it_fused": statistics.median(r["fused"] / r["ours"] for r in rows),
        "losses": losses, "product_rate": middle["products"],
        "share_of_product_rate": statistics.median(
            row["computed"] / row["ours"] / row["products"] for row in rows),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Each in a process of its own: memory, curves, where the time goes
# ------------------------------------------------------------------------------------------------


def in_process(side: str, precision: str = "bf16", **changes: float) -> dict:
    """measure() in a new process."""
    words = {**BASE, "text_tokens": 0, **changes}
    flags = [str(x) for x in (side, precision, *words.values())]
    done = subprocess.run(
        [sys.executable, __file__, "--one", *flags], capture_output=True, text=True, check=True
    )
    return {**words, **json.loads(done.stdout.splitlines()[-1])}


def measure(
    side: str, precision: str, batch: int, mask_ratio: float, image_size: int, text: int
) -> dict:
    """Median seconds of a side's steps, and bytes that one takes above what is there before.

    `text`: tokens of every caption; 0: lengths like CC12M's.
    """
    bf16, tokens = precision == "bf16", captions(batch)
    if text:
        tokens = captions(batch, text, 0.0)
    if side == "open_clip":
        theirs, _weights = their_step(batch, mask_ratio, bf16)  # freed, they would be used again
        step = partial(theirs, tokens)
    else:
        ours = our_step(batch, mask_ratio, image_size, bf16, {})

        def step() -> float:
            return ours(tokens, noise_of(batch, image_size))

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
    took = [seconds(step) for _ in range(WARM + 5)]
    return {"seconds": statistics.median(took[WARM:]), "peak": status("VmHWM") - before}


KINDS = {  # what a profile's rows are
    "products": ("mm", "addmm", "bmm", "baddbmm"), "casts and copies": ("copy_", "cat", "fill_"),
    "GELU": ("gelu", "gelu_backward"), "softmax": ("_softmax", "_softmax_backward_data"),
    "norms": ("native_layer_norm", "native_layer_norm_backward"),
    "optimizer": ("_fused_adamw_", "linalg_vector_norm"),
}  # fmt: skip


def profiled() -> dict[str, float]:
    """Shares of our step at BASE, by kind of work."""
    batch, tokens = BASE["batch"], captions(BASE["batch"])
    step = our_step(batch, BASE["mask_ratio"], 224, True, {})
    for _ in range(WARM):
        step(tokens, noise_of(batch, 224))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        step(tokens, noise_of(batch, 224))
    own = {row.key.removeprefix("aten::"): row.self_cpu_time_total for row in found.key_averages()}
    total = sum(own.values())
    shares = {kind: sum(own.get(n, 0) for n in names) / total for kind, names in KINDS.items()}
    return shares | {"the rest": 1 - sum(shares.values())}


# ------------------------------------------------------------------------------------------------
# The figure
# ------------------------------------------------------------------------------------------------


def draw(found: dict, path: Path) -> None:
    """Seconds and memory of a step against each size, on logarithmic axes; products alone, too."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names = {"batch": "pairs in the batch", "mask_ratio": "patches kept, of 196",
             "image_size": "pixels a side", "text_tokens": "tokens of every caption"}  # fmt: skip
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.6), sharey="row", layout="constrained")
    rate = statistics.median(
        case["product_rate"] for case in found["cases"] if case["precision"] == "bf16"
    )
    for column, (name, rows) in zip(axes.T, found["curves"].items(), strict=True):
        x = [row[name] for row in rows]
        if name == "mask_ratio":
            x = [glip.num_keep(196, ratio) if ratio else 196 for ratio in x]
        for axis, key, unit in zip(column, ("seconds", "peak"), (1, 2**30), strict=True):
            axis.plot(x, [row[key] / unit for row in rows], "o-", color="#0072b2")
            axis.set(xscale="log", yscale="log")
            axis.set_xticks(x, [str(value) for value in x])
            ticks = [0.1, 0.25, 0.5, 1, 2, 4, 8] if key == "seconds" else [2, 3, 4]
            axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        least = [row["batch"] * flops(row["mask_ratio"], row["text_tokens"], row["image_size"])
                 for row in rows]  # fmt: skip
        column[0].plot(x, [work / rate for work in least], "--", color="#777777")
        column[1].set_xlabel(names[name])
    axes[0, 0].set_ylabel("seconds a step")
    axes[0, 0].legend(["measured", "products alone, at full rate"], frameon=False)
    axes[1, 0].set_ylabel("memory of a step (GiB)")
    figure.savefig(path, dpi=100)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="steps of each side, in turn")
    parser.add_argument("--one", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep_memory()
    if options.one:
        side, precision, batch, ratio, size, text = options.one
        print(json.dumps(
            measure(side, precision, int(batch), float(ratio), int(size), int(text))
        ))  # fmt: skip
        return
    cases = []
    for ratio, precision, compiled in CASES:
        cases.append(compare(ratio, precision, compiled, options.rounds))
        if not compiled:
            cases[-1]["peak"] = {
                side: in_process(side, precision, mask_ratio=ratio)["peak"]
                for side in ("ours", "open_clip")
            }
        print(cases[-1], flush=True)
    curves = {
        name: [in_process("ours", **BASE | {name: x}) for x in values]
        for name, values in CURVES.items()
    }
    found = {
        "cases": cases, "curves": curves, "profile": profiled(),
        "command": " ".join(["python tests/against_open_clip.py", *sys.argv[1:]]),
        "machine": machine(CPU),
    }  # fmt: skip
    save_bench("benchmark", found)
    draw(found, ROOT / "docs/figures/benchmark.png")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
