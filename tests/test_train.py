"""The loop by its command: settings, determinism, processes, learning, bad input."""

import copy
import inspect
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, fields, replace
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import timm
import torch
from open_clip_train import params
from PIL import Image
from timm.optim.muon import _COEFFICIENTS, zeropower_via_newtonschulz

import glip
import train
from nanoglip import aliases, files, machine, masks, runlog
from nanoglip.config import RECIPES, TrainConfig, check, parse, run_name
from nanoglip.machine import use_bf16
from nanoglip.masker import Masker, embedding_weight_at, momentum_at
from nanoglip.noise import uniform
from nanoglip.text import TEXT_MASKS
from tests.processes import Run
from tools import card
from train import lr_at

ROOT = Path(__file__).parent.parent
ONE_STAGE = ["--image-size", "32", "--batch-size", "32", "--precision", "fp32", "--eval-every",
             "1000", "--log-every", "5", "--tune-epochs", "0"]  # fmt: skip
SMALL = [*ONE_STAGE[:-2], "--tune-batch-size", "32"]


def command(*words: str, cwd: Path = ROOT, path: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a script as a user does; `path` is where its imports lie."""
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=cwd, env=environment
    )


def inside(monkeypatch, capsys, main, *words: str) -> subprocess.CompletedProcess:
    """A script's main in this process, which has imported torch: as `command` tells of it."""
    code = 0
    monkeypatch.setattr(sys, "argv", list(words))
    try:
        main()
    except SystemExit as left:
        code = left.code
    return subprocess.CompletedProcess(words, code, *capsys.readouterr())


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


# --- settings -----------------------------------------------------------------------------------


def test_a_flag_given_by_hand_wins_over_the_recipe_wherever_it_stands():
    for words in (["--lr", "0.5", "--recipe", "cc12m"], ["--recipe=cc12m", "--lr=0.5"]):
        config = parse([*words, "--data", "x"])
        assert config.lr == 0.5 and config.model == "ViT-B-16" and config.recipe == "cc12m"
    assert parse(["--recipe", "cc12m"]).epochs == 30
    assert parse(["--recipe", "cc12m", "--steps", "7"]).epochs == 0
    assert parse(["--recipe", "cc12m", "--epochs", "2"]).epochs == 2
    assert parse([]) == TrainConfig()


def theirs():
    """Every flag of open_clip's trainer, by its own parser."""
    words = inspect.getsource(params.parse_args)
    return set(re.findall(r"""^ *['"](--[\w-]+)['"],""", words, re.MULTILINE)) | set(
        re.findall(r"""add_argument\(['"](--[\w-]+)['"]""", words)
    )


@pytest.mark.skipif(version("open_clip_torch")[:4] != "3.3.", reason="the table is open_clip 3.3's")
def test_open_clips_flags_are_all_read_or_explained():
    """Each of theirs has a row, each row is a flag of theirs, and none hides a flag of ours."""
    ours = {f"--{field.name.replace('_', '-')}" for field in fields(TrainConfig)}
    ours |= {"--config", "--help", "--debug"}
    rows = {row.partition(" ")[0] for row in aliases.NAMES} | aliases.SAME.keys()
    assert len(theirs()) > 80
    for flag in theirs():
        assert any(fnmatchcase(flag, row) for row in rows), flag
    for row in rows - {"--fsdp"}:
        assert any(fnmatchcase(flag, row) for flag in theirs()), row
    for row in aliases.NAMES:
        assert " " in row or not any(fnmatchcase(flag, row) for flag in ours), row
    assert aliases.SAME.keys() <= ours


def test_open_clips_flags_set_what_they_say(capsys):
    """What has an equal among ours: each alone, and many at once, in both ways of writing."""
    changed = {
        "--train-data": ("x", {"data": ("x",)}), "--wd": ("0.3", {"weight_decay": 0.3}),
        "--force-image-size": ("32", {"image_size": 32}), "--siglip": (None, {"loss": "siglip"}),
        "--force-context-length": ("16", {"context_length": 16}),
        "--imagenet-val": ("sets/imagenet1k", {"eval_sets": ("sets/imagenet1k",)}),
        "--force-patch-dropout": ("0.6", {"mask": "random", "mask_ratio": 0.6}),
        "--opt adamw": (None, {"optimizer": "adamw"}), "--lr-scheduler cosine": (None, {}),
        "--grad-clip-norm": ("1", {"clip_grad_norm": 1.0}), "--local-loss": (None, {}),
        "--gather-with-grad": (None, {}), "--save-most-recent": (None, {}),
        "--precision amp_bf16": (None, {"precision": "bf16"}), "--fsdp": (None, {"shard": True}),
        "--precision amp_bfloat16": (None, {"precision": "bf16"}),
        "--grad-checkpointing": (None, {"recompute": True}),
        "--torchcompile": (None, {"compile": True}), "--name": ("a", {"out": "runs/a"}),
        "--log-every-n-steps": ("7", {"log_every": 7}), "--resume latest": (None, {}),
        **{f"--report-to {name}": (None, {name: True}) for name in runlog.LOGS},
    }  # fmt: skip
    equal = {row for row, ours in aliases.NAMES.items() if not ours or ours.startswith("--")}
    assert changed.keys() == equal
    for row, (value, wanted) in changed.items():
        parts = [*row.split(), *filter(None, [value])]
        for words in (parts, ["=".join(parts)]):
            assert parse(words) == replace(TrainConfig(), **wanted), words
            assert f"open_clip's {' '.join(words).replace('=', ' ')} is " in capsys.readouterr().out
    words = ["--wd", "0.2", "--seed=3", "--local-loss", "--batch-size", "64", "--sigma", "0.3", "1"]
    wanted = {"weight_decay": 0.2, "seed": 3, "batch_size": 64, "sigma": (0.3, 1.0)}
    assert parse(words) == replace(TrainConfig(), **wanted)
    assert "--batch-size counts the pairs of all processes" in capsys.readouterr().out
    assert parse(["--precision", "bf16", "--resume", "never", "--seed=3"]).resume == "never"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("row", aliases.NAMES)
def test_open_clips_other_flags_name_our_way(row):
    """Nothing is trained under a flag that would be understood otherwise."""
    sentence = aliases.NAMES[row]
    if sentence and not sentence.startswith("--"):
        words = row.replace("*", "x").split()
        for more in ([], ["0.5"]) if len(words) == 1 else ([],):
            with pytest.raises(glip.InputError) as told:
                parse([*words, *more])
            assert str(told.value) == f"{' '.join(words)} is open_clip's: {sentence}"
        ours = set(re.findall(r"(?<![\w-])--[a-z-]+", sentence)) - {"--retrieval", "--zero-shot"}
        known = {f"--{field.name.replace('_', '-')}" for field in fields(TrainConfig)}
        assert ours <= known | {"--linear-probe"} and re.search("leave it out|--|environment",
                                                                sentence)  # fmt: skip
    elif "{}" in sentence:
        with pytest.raises(glip.InputError, match=f"^{row} needs a value"):
            parse([row, "--seed", "1"])


@pytest.mark.parametrize(
    "flags",
    [
        [], ["--recipe", "cc12m", "--data", "a", "b", "--data-weights", "1", "0.5", "--seed", "3"],
        ["--recipe", "flip", "--data", "x", "--steps", "9"], ["--mask", "none", "--wandb"],
        ["--recipe", "a-clip", "--data", "x"], ["--recipe", "cluster-masking", "--data", "x"],
        ["--recipe", "compare", "--mask", "random", "--vendors", "Goog", "FB", "--compile"],
        ["--sigma", "0.3", "0.6", "--mask-center", "-0.5", "0", "--lr", "1"],
        ["--recipe", "finetune-pairs", "--init", "runs/x", "--data", "x", "--epochs", "0.5"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_runs_own_settings_read_back_are_its_settings(flags, tmp_path):
    """As train.py writes them; also by the folder's name, and a partial file over a recipe."""
    config = parse(flags)
    (tmp_path / "config.json").write_text(json.dumps(asdict(config), indent=2))
    for name in (tmp_path / "config.json", tmp_path):
        again = parse(["--config", str(name)])
        assert again == config and run_name(again) == run_name(config)
        assert [type(x) for x in asdict(again).values()] == [
            type(x) for x in asdict(config).values()
        ]
    other = parse(["--seed", "7", f"--config={tmp_path}", "--steps", "5"])
    assert other == replace(config, seed=7, steps=5, epochs=0.0)


def test_flags_win_over_a_file_and_a_file_over_its_recipe(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"recipe": "cc12m", "data": ["x"], "steps": 9, "lr": 1}')
    paper = TrainConfig("cc12m", **RECIPES["cc12m"])
    wanted = replace(paper, data=("x",), steps=9, epochs=0.0, lr=1.0)
    assert parse(["--config", str(file)]) == wanted
    words = ["--config", str(file), "--epochs", "2", "--lr", "3"]
    assert parse(words) == replace(wanted, epochs=2.0, lr=3.0)
    words = ["--recipe", "compare", "--config", str(file)]
    compare = TrainConfig("compare", **RECIPES["compare"])
    with pytest.raises(glip.InputError, match="--captions is for emoji"):
        parse([*words, "--captions", "names"])
    assert parse(words) == replace(compare, data=("x",), steps=9, lr=1.0)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"lrr": 1}', "mine.json: there is no setting lrr: write lr"),
        ('{"QQ": 1}', "mine.json: there is no setting QQ: leave it out"),
        ('{"lr": "1"}', 'lr is "1": give a number'), ('{"lr": true}', "lr is true: give a number"),
        ('{"steps": 1.5}', "steps is 1.5: give a whole number"),
        ('{"steps": null}', "steps is null: give a whole number"),
        ('{"compile": 1}', "compile is 1: give true or false"),
        ('{"mask": "ring"}', 'mask is "ring": give one of none, random, gaussian'),
        ('{"data": "emoji"}', 'data is "emoji": give [text, ...]'),
        ('{"crop_scale": [1]}', "crop_scale is [1]: give [a number, a number]"),
        ('{"sigma": "x"}', 'sigma is "x": give a number or [a number, a number]'),
        ('{"min_mask_ratio": []}', "min_mask_ratio is []: give a number or null"),
        ('{"lr": NaN}', "--lr must be above 0 and finite"),
        (f'{{"lr": 1{400 * "0"}}}', ": give a number"),
        ('{"mask": "random", "sigma": 0.3}', "--sigma belongs to --mask gaussian, gumbel"),
        ("[]", "mine.json: no JSON object"), ("{", "no JSON object"), ("\xff", "no JSON object"),
        ("[" * 9**5, "no JSON object"), (None, "mine.json: No such file or directory"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_settings_is_one_sentence(text, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("mine.json").write_bytes(text.encode("latin-1"))
    done = inside(monkeypatch, capsys, train.main, "train.py", "--config", "mine.json")
    told = done.stderr.splitlines()
    assert done.returncode == 2 and len(told) == 1 and sentence in told[0]
    assert not Path("runs").exists()


def test_the_papers_recipe_is_the_papers():
    config = TrainConfig(**RECIPES["cc12m"])
    assert (config.model, config.mask, config.sigma) == ("ViT-B-16", "gaussian", 0.2)
    assert (config.epochs, config.batch_size, config.lr) == (30, 1280, 1e-3)
    assert (config.tune_epochs, config.tune_batch_size, config.tune_lr) == (1, 640, 1e-5)


def test_help_has_every_flag_once_under_its_subject(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    told = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    _, *parts = re.split(r"^\W*(\w+) options\b", told, flags=re.MULTILINE)
    found = [(flag, subject) for subject, text in zip(parts[::2], parts[1::2], strict=True)
             for flag in re.findall(r"^[ │]{1,3}--(\w[\w-]*)", text, re.MULTILINE)]  # fmt: skip
    names = [field.name.replace("_", "-") for field in fields(TrainConfig)]
    assert sorted(flag for flag, _ in found) == sorted(names)
    assert {"data", "mask", "words", "model", "schedule", "machine", "output"} < set(parts[::2])
    wanted = {"sigma": "mask", "text-mask": "words", "lr": "schedule", "micro-batch": "machine"}
    assert wanted.items() < dict(found).items()
    flat = re.sub(r"[│\s]+", " ", told)  # each has words between its type and its default
    assert re.findall(r"--([a-z-]+) (?:\{[^}]*\} |[A-Z\[\]|{}. ]+ )?\(default", flat) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_can_start(recipe):
    """Its settings fit together with nothing given but the data; its mask has what it needs."""
    config = parse(["--recipe", recipe, "--data", "x"])
    check(replace(config, init="runs/x" * (recipe == "finetune-pairs")), 8)
    assert run_name(config) == f"{recipe}_data=x"


def test_no_mask_means_ratio_zero():
    assert parse(["--mask", "none"]).mask_ratio == 0
    with pytest.raises(glip.InputError, match="leave --mask-ratio out"):
        parse(["--mask", "none", "--mask-ratio", "0.5"])


def test_run_names_tell_what_differs_and_have_no_clock():
    assert run_name(TrainConfig()) == "demo"
    config = TrainConfig(mask="random", seed=2, vendors=("Goog", "FB"), workers=3, out="x")
    assert run_name(config) == "demo_vendors=Goog-FB_mask=random_seed=2"
    compare = parse(["--recipe", "compare", "--mask", "none"])
    assert run_name(compare) == "compare_mask=none"
    assert compare.captions == "names"  # as the 171 published runs of the comparison were trained
    places = ("list.csv", "a/list.csv", "b/list.csv", "../me/my pictures/list.csv", "/list.csv")
    names = [run_name(TrainConfig(data=(place,))) for place in places]
    assert len(set(names)) == len(places) and names[0] == "demo_data=list.csv"
    assert all(re.fullmatch(r"demo_data=list\.csv-[0-9a-f]{8}", name) for name in names[1:])
    assert run_name(TrainConfig(data=("./a//list.csv",))) == names[1]
    assert run_name(TrainConfig(data=("my-set",))) != run_name(TrainConfig(data=("my set",)))
    wide = TrainConfig(sigma=(0.2, 0.8), mask_center=(0.5, -0.5))
    assert run_name(wide) == "demo_sigma=0.2-0.8_mask-center=0.5--0.5"
    assert run_name(replace(wide, mask_center=(-0.5, -0.5))) != run_name(wide)
    long = [run_name(TrainConfig(data=("x" * 300,), seed=seed)) for seed in (1, 2)]
    assert long[0] != long[1] and max(map(len, long)) <= 200


def test_sigma_is_one_value_or_two():
    assert parse(["--sigma", "0.3"]).sigma == 0.3
    assert parse(["--sigma", "0.3", "0.6", "--seed", "1"]).sigma == (0.3, 0.6)


def test_schedules_of_masks_are_pure_functions_of_the_step():
    """A-CLIP's momentum rises to 1; the embeddings' weight rises in eight steps of equal height."""
    momenta = [momentum_at(step, 100, 0.9) for step in range(101)]
    assert momenta[0] == pytest.approx(0.9) and momenta[50] == pytest.approx(0.95)
    assert momenta[100] == 1 and momenta == sorted(momenta)
    weights = [embedding_weight_at(step, 80, 0.5) for step in range(80)]
    assert [w for w in weights if w is not None] == pytest.approx([i / 14 for i in range(8)])
    assert all((w is not None) == (step % 10 == 0) for step, w in enumerate(weights))
    for steps in (1, 5, 9, 450):
        found = [embedding_weight_at(step, steps, 1.0) for step in range(steps)]
        assert [w for w in found if w is not None][-1] == (1.0 if steps > 5 else found[-1])


def test_the_recorded_command_names_no_folder_of_the_machine(monkeypatch):
    words = ["/x/train.py", "--data", "/y/z/pics", "--out=/y/z/run", "--data=own/pics"]
    monkeypatch.setattr(sys, "argv", words)
    assert runlog.command() == "python train.py --data pics --out=run --data=own/pics"
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert runlog.command().startswith("torchrun --nproc_per_node 8 train.py")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert runlog.command().startswith("torchrun --nnodes 2 --nproc_per_node 4 train.py")


def test_the_schedule_warms_up_and_falls_to_zero():
    rates = [lr_at(step, 100, 10, 2.0) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert lr_at(0, 1, 0, 1.0) == 1.0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_and_decay_is_for_matrices(name):
    model = glip.GLIP(glip.GLIPConfig(16, 8, 8, 2, 1, 4, 8, 1, 1, 9, 20))
    optimizers = train.make_optimizers(model, TrainConfig(optimizer=name))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert len(optimizers) == (2 if name == "muon" else 1)
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    for group in groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"])
    if name == "muon":  # 3 blocks of 4 matrices
        assert len(groups[-1]["params"]) == 12


def muon_and(make_other, weight_decay=0.1):
    """Our Muon and another's after each of three steps: their weights, and those before."""
    torch.manual_seed(0)
    model = glip.GLIP(glip.GLIPConfig(16, 8, 24, 1, 1, 4, 24, 1, 1, 9, 20))
    twin = copy.deepcopy(model)
    _, ours = train.make_optimizers(model, TrainConfig(weight_decay=weight_decay))
    matrices = [p for n, p in twin.named_parameters() if "resblocks" in n and p.ndim == 2]
    theirs = make_other(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in zip(ours.param_groups[0]["params"], matrices, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        before = [q.detach().clone() for q in matrices]
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = 1e-3
            optimizer.step()
        yield from zip(ours.param_groups[0]["params"], matrices, before, strict=True)


def test_muon_is_timms_and_torchs(monkeypatch):
    monkeypatch.setattr(machine, "cpu_flags", lambda: {"avx512_bf16"})  # as theirs are: in bf16
    same = partial(timm.optim.Muon, momentum=0.95, nesterov=True, ns_coefficients="original")
    for ours, theirs, _ in muon_and(same):
        assert torch.equal(ours, theirs)
    if hasattr(torch.optim, "Muon"):  # which bounds the norm otherwise
        for ours, theirs, before in muon_and(torch.optim.Muon):
            assert (ours - theirs).norm() < 0.05 * (theirs - before).norm()
            theirs.data.copy_(ours.data)


def test_muon_emulates_no_bf16(monkeypatch):
    """The products are in fp32 where the processor has no bf16: emulation takes a minute a step."""
    seen = []
    monkeypatch.setattr(train, "orthogonal", lambda x, dtype: seen.append(dtype) or x)
    for flags, dtype in ({"avx2"}, torch.float32), ({"amx_bf16"}, torch.bfloat16):
        monkeypatch.setattr(machine, "cpu_flags", lambda flags=flags: flags)
        seen.clear()
        list(muon_and(timm.optim.Muon))
        assert set(seen) == {dtype}


@pytest.mark.parametrize("shape", [(48, 48), (48, 96), (96, 48)])
def test_updates_are_orthogonal(shape):
    """Against the singular value decomposition, and timm's own iteration in fp32."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = train.orthogonal(matrix[None], torch.float32)[0]
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ found @ v.T  # diagonal where both have the same singular vectors
    assert (inner - inner.diag().diag()).abs().max() < 1e-4
    large = s > 0.02 * s.norm()  # five iterations do not lift the smallest
    assert ((inner.diag()[large] > 0.6) & (inner.diag()[large] < 1.3)).all()
    rows = _COEFFICIENTS["original"]
    assert torch.equal(found, zeropower_via_newtonschulz(matrix, 5, rows, dtype=torch.float32))


def test_auto_precision_follows_the_hardware(monkeypatch):
    cpu = torch.device("cpu")
    for flags, native in (({"avx512_bf16"}, True), ({"amx_bf16"}, True), ({"avx2"}, False)):
        monkeypatch.setattr(machine, "cpu_flags", lambda flags=flags: flags)
        assert use_bf16("auto", cpu) == native
        assert use_bf16("bf16", cpu) and not use_bf16("fp32", cpu)


# --- runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run through the real command, tuning and checkpoints included."""
    out = tmp_path_factory.mktemp("runs") / "a"
    done = command("train.py", *SMALL, "--steps", "10", "--tune-epochs", "0.02", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out, done


@pytest.mark.slow
def test_a_run_leaves_what_the_readme_says(run):
    out, done = run
    assert {p.name for p in out.iterdir()} == {
        "config.json", "log.jsonl", "pretrained.pt", "model.pt", "report.html"
    }  # fmt: skip
    assert "keeps 4 of 16 patches (75.0% removed)" in done.stdout
    logged = [r for r in records(out) if "loss" in r]
    assert [(r["stage"], r["step"]) for r in logged if r["stage"] == "pretrain"] == [
        ("pretrain", step) for step in (5, 10)
    ]
    assert logged[0]["ln_batch"] == pytest.approx(math.log(32))
    content = glip.load_checkpoint(out / "model.pt")
    assert content["steps"]["pretrain"] == 10 and content["stage"] == "tune"
    assert "/" not in content["command"].replace("./", "")
    model, config = glip.load_model(out / "pretrained.pt")
    assert config.image_size == 32 and not torch.equal(
        model.visual.proj, glip.load_model(out / "model.pt")[0].visual.proj
    )


@pytest.mark.slow
def test_same_seed_gives_the_same_bits(run, tmp_path):
    out, _ = run
    again = tmp_path / "b"
    words = [*SMALL, "--steps", "10", "--tune-epochs", "0.02", "--workers", "2"]
    train.train(parse([*words, "--out", str(again)]))
    for name in ("pretrained.pt", "model.pt"):
        a, b = (glip.load_checkpoint(folder / name)["model"] for folder in (out, again))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    other = tmp_path / "c"
    train.train(parse([*ONE_STAGE, "--steps", "5", "--seed", "1", "--out", str(other)]))
    assert records(other)[0]["loss"] != records(out)[0]["loss"]


@pytest.mark.slow
def test_bf16_on_all_cores_gives_the_same_bits(tmp_path):
    """As the demo runs on a processor with native bf16."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    for name in "ab":
        config = replace(
            TrainConfig(), batch_size=64, steps=10, image_size=32, tune_epochs=0, eval_every=1000,
            precision="bf16", out=str(tmp_path / name),
        )  # fmt: skip
        train.train(config)
    torch.set_num_threads(before)
    a, b = (glip.load_checkpoint(tmp_path / name / "model.pt")["model"] for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_the_loop_masks_as_told_then_tunes_without_a_mask(tmp_path, monkeypatch):
    """What reaches the image tower, the learning rates, and a fresh optimizer for the tuning."""
    seen, rates, made = [], [], []
    forward, step, make = glip.ImageTower.forward, torch.optim.AdamW.step, train.make_optimizers

    def watched(self, images, ids_keep, visible):
        if self.training:
            seen.append(ids_keep)
        return forward(self, images, ids_keep, visible)

    def stepped(self, *words):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *words)

    monkeypatch.setattr(glip.ImageTower, "forward", watched)
    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    monkeypatch.setattr(train, "make_optimizers", lambda *w: made.append(make(*w)) or made[-1])
    config = replace(
        TrainConfig(), batch_size=16, tune_batch_size=512, steps=3, tune_epochs=0.1, image_size=32,
        warmup=2, tune_warmup=0, seed=4, sigma=0.1, precision="fp32", eval_every=1000,
        optimizer="adamw", lr=5.0, tune_lr=1e-9, out=str(tmp_path / "run"),
    )  # fmt: skip
    train.train(config)
    for number, ids in enumerate(seen[:3]):
        noise = torch.from_numpy(uniform(4, "mask/pretrain", 16 * number, 16, 16))
        wanted = glip.sample_ids_keep("gaussian", 16, 4, 0.75, sigma=0.1, noise=noise)
        assert torch.equal(ids, wanted)
    assert len(seen) == 5 and seen[3] is None and seen[4] is None
    assert rates[:3] == pytest.approx([lr_at(s, 3, 2, 5.0) for s in range(3)])
    assert rates[3:] == pytest.approx([lr_at(s, 2, 0, 1e-9) for s in range(2)])
    assert len(made) == 2 and made[0][0] is not made[1][0]
    scale = glip.load_model(tmp_path / "run/model.pt")[0].logit_scale.item()
    assert 0 <= scale <= math.log(100) + 1e-6  # a learning rate of 5 throws it out otherwise


@pytest.mark.slow
def test_a_shorter_context_holds_in_both_stages_and_in_evaluation(tmp_path, monkeypatch):
    """As CLIPA's B/16: no text has more tokens than the tower has positions, and each its end."""
    read, encode_text = [], glip.GLIP.encode_text

    def watched(self, tokens):
        read.append((self.training, *tokens.shape, bool((tokens == glip.END).any(dim=1).all())))
        return encode_text(self, tokens)

    monkeypatch.setattr(glip.GLIP, "encode_text", watched)
    config = replace(
        TrainConfig(), context_length=5, batch_size=16, tune_batch_size=512, steps=2, image_size=16,
        tune_epochs=0.1, eval_every=1000, precision="fp32", out=str(tmp_path / "run"),
    )  # fmt: skip
    train.train(config)
    model, found = glip.load_model(tmp_path / "run/model.pt")
    assert found.context_length == len(model.positional_embedding) == 5
    assert card.architecture(found) == config.model
    assert {row[:2] for row in read if row[0]} == {(True, 16), (True, 512)}
    assert len([row for row in read if not row[0]]) >= 2  # an evaluation at the end of each stage
    assert all(length <= 5 and ended for _, _, length, ended in read)
    assert parse(["--recipe", "clipa"]).context_length == 16


@pytest.mark.slow
def test_torchrun_gives_the_single_process_run(run, tmp_path):
    out, _ = run
    words = [*SMALL, "--steps", "10", "--tune-epochs", "0.02", "--out", str(tmp_path / "two")]
    done = command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                   "train.py", *words)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    alone, two = ([r for r in records(f) if "loss" in r] for f in (out, tmp_path / "two"))
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in alone], abs=1e-4)
    content = glip.load_checkpoint(tmp_path / "two" / "model.pt")
    assert content["world"] == 2 and not any(key.startswith("module.") for key in content["model"])


VARIANTS = [
    *({"mask": mask} for mask in masks.MASKS),
    {"mask": "cluster", "embedding_weight": 1.0},
    {"mask": "pgs", "embedding_weight": 1.0, "mask_ratio": 0.25, "mask_range": 0.5},
    {"mask": "attentive", "teacher_scale": 0.5},
    {"mask": "attentive", "aclip": True},
    {"mask_ratio": (0.9, 0.4)},
    *({"text_mask": text_mask, "text_tokens": 4} for text_mask in TEXT_MASKS),
]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_every_mask_trains_and_what_it_found_is_kept(variant, tmp_path):
    config = replace(
        TrainConfig(), batch_size=16, steps=9 if "embedding_weight" in variant else 3,
        image_size=32, tune_epochs=0, precision="fp32", eval_every=1000, log_every=1,
        out=str(tmp_path / "run"), **variant,
    )  # fmt: skip
    check(config, 1)
    train.train(config)
    content = glip.load_checkpoint(tmp_path / "run/model.pt")
    model, _ = glip.load_model(tmp_path / "run/model.pt")
    masker = Masker.restored(content["mask"], model.visual)
    assert masker.mask == config.mask
    assert content["model"].keys() == glip.GLIP(model.config).state_dict().keys()
    logged = [r for r in records(tmp_path / "run") if "loss" in r]
    assert len(logged) == config.steps and all(0 < r["loss"] < 20 for r in logged)
    if config.mask == "cluster":
        assert masker.threshold == logged[-1]["threshold"]
        assert len({r["threshold"] for r in logged}) == (8 if config.embedding_weight else 1)
        assert all(r["computed"] == 7 / 16 and 0.05 < r["visible"] < 0.44 for r in logged)
    elif config.mask_range:  # the weight of the last eighth, and between 4 and 12 of 16 patches
        assert masker.embedding_weight == 1.0
        assert all(r["computed"] == 0.75 and 0.25 <= r["visible"] < 0.75 for r in logged)
    else:
        assert "visible" not in logged[0]
    if isinstance(config.mask_ratio, tuple):
        assert [r["mask_ratio"] for r in logged] == pytest.approx([0.9, 0.65, 0.4])
        assert masker.num_computed(16) == 10
    if config.mask == "attentive":
        ours, theirs = model.visual.state_dict(), masker.teacher.state_dict()
        moved = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        assert len(moved) > 10 and ("conv1.weight" in moved) != config.aclip
    if config.mask == "gaze":
        assert masker.gaze.optimizer.state_dict()["state"][0]["step"] == config.steps


@pytest.mark.slow
@pytest.mark.parametrize("mask", [
    ["cluster", "--embedding-weight", "0.5", "--text-mask", "frequency", "--text-tokens", "4"],
    ["attentive", "--aclip", "--teacher-scale", "0.5"],
    ["gaze"],
], ids=["cluster", "aclip", "gaze"])  # fmt: skip
def test_two_processes_agree_on_state_and_words(mask, tmp_path):
    words = [*ONE_STAGE, "--steps", "6", "--log-every", "1", "--mask", *mask]
    train.train(parse([*words, "--out", str(tmp_path / "one")]))
    two = Run("train", *words, "--out", tmp_path / "two", log=tmp_path / "log.txt", world=2)
    code, printed = two.finish()
    assert code == 0, printed[-2000:]
    one, two = ([r for r in records(tmp_path / f) if "loss" in r] for f in ("one", "two"))
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], abs=1e-4)
    if mask[0] == "cluster":
        found = [r["threshold"] for r in two]
        assert found == pytest.approx([r["threshold"] for r in one], abs=1e-4)
        assert len({*found}) == 6
    states = [glip.load_checkpoint(tmp_path / f / "model.pt")["mask"] for f in ("one", "two")]
    if mask[0] == "attentive":
        for name, a in states[0]["teacher"].items():
            torch.testing.assert_close(a, states[1]["teacher"][name], atol=1e-3, rtol=0)
    if mask[0] == "gaze":
        for name, a in states[0]["gaze"]["weights"].items():
            torch.testing.assert_close(a, states[1]["gaze"]["weights"][name], atol=1e-3, rtol=0)


@pytest.mark.slow
def test_it_learns(tmp_path, monkeypatch):
    """Plain colours and their names: under a mask the loss falls from guessing to near zero."""
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")
    colours = ("red", "green", "blue", "yellow", "black", "white", "gray", "purple", "orange")
    for i, colour in enumerate(colours * 3):
        picture = Image.new("RGB", (20 + i, 24), colour)
        picture.save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"the colour {colour}")
    config = replace(
        TrainConfig(), data=(str(tmp_path),), batch_size=8, steps=60, image_size=16, warmup=10,
        tune_epochs=0, eval_every=1000, precision="fp32", workers=0, out=str(tmp_path / "run"),
        log_every=1,
    )  # fmt: skip
    train.train(config)
    losses = [r["loss"] for r in records(tmp_path / "run") if "loss" in r]
    assert losses[0] > 0.7 * math.log(8) and losses[-1] < 0.1 * math.log(8)


@pytest.mark.slow
def test_tuning_at_another_image_size(tmp_path):
    config = replace(
        TrainConfig(), batch_size=16, tune_batch_size=8, steps=2, image_size=16, mask="random",
        tune_image_size=24, tune_epochs=0.002, precision="fp32", out=str(tmp_path / "run"),
    )  # fmt: skip
    train.train(config)
    assert glip.load_model(tmp_path / "run/pretrained.pt")[1].image_size == 16
    assert glip.load_model(tmp_path / "run/model.pt")[1].image_size == 24


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--mask-ratio", "1.0"], "mask ratio 1.0 is outside [0, 1)"),
        (["--mask-ratio", "-0.1"], "outside [0, 1)"),
        (["--batch-size", "1"], "--batch-size 1: a contrast needs at least 2 pairs"),
        (["--batch-size", "5000"], "py: --batch-size 5000 must lie between 2 and the 1809"),
        (["--tune-batch-size", "5000"], "py: --tune-batch-size 5000 must lie between 2 and"),
        (["--out", __file__], "is a file: name a folder"),
        (["--lr", "nan"], "--lr must be above 0"),
        (["--sigma", "0"], "--sigma 0.0 is outside [1e-06, inf]"),
        (["--sigma", "1e-300"], "--sigma 1e-300 is outside [1e-06, inf]"),
        (["--seed", "1" + 30 * "0"], "--seed must be at least 0 and below 2^63"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--steps", "1" + 20 * "0"], "--steps must be above 0 and below 2^63"),
        (["--steps", "1" + 18 * "0"], "pretrain: 1e+18 steps are more than any run has"),
        (["--epochs", "1e30"], "pretrain: 2e+31 steps are more than any run has"),
        (["--epochs", "inf"], "--epochs must be at least 0 and finite"),
        (["--out", "x" * 300], "File name too long; check the name"),
        (["--out", f"{__file__}/run"], "cannot be written (NotADirectoryError"),
        (["--weight-decay", "-1"], "--weight-decay must be at least 0"),
        (["--eval-every", "-1"], "--eval-every must be at least 0"),
        (["--recipe", "cc3m", "--epochs", "0"], "give --steps to count in steps"),
        (["--data", "nowhere/"], "--data nowhere/: no such folder or file"),
        (["--image-size", "30"], "image size 30 is not a multiple of the patch size 8"),
        (["--steps", "0"], "--steps must be above 0"),
        (["--steps", "3", "--epochs", "2"], "give one of them"),
        (["--lr", "0"], "--lr must be above 0"),
        (["--recipe", "cc3m"], "give --data PATH"),
        (["--vendors", "Twtr"], "vendor Twtr is held out"),
        (["--device", "mps"], "this machine or its torch has none"),
        (["--mask", "none", "--mask-ratio", "0.5"], "leave --mask-ratio out"),
        (["--mask", "random", "--mask-center", "0", "0"], "belongs to --mask gaussian, gumbel, "),
        (["--mask", "random", "--sigma", "0.3"], ", gumbel, gaze: leave it out, or choose one"),
        (["--aclip"], "--aclip belongs to --mask attentive: leave it out, or choose that"),
        (["--data", "mine/", "--vendors", "Goog"], "--vendors is for emoji, not for --data mine/"),
        (["--data", "mine/", "--captions", "names"], "--captions is for emoji, not for"),
        (["--sigma", "0.3", "-1"], "--sigma (0.3, -1.0) is outside [1e-06, inf]"),
        (["--mask-center", "0", "2"], "--mask-center (0.0, 2.0) is outside [-1, 1]"),
        (["--mask", "cluster", "--min-mask-ratio", "0.9"], "--min-mask-ratio 0.9 is outside"),
        (["--mask", "cluster", "--embedding-weight", "2"], "--embedding-weight 2.0 is outside"),
        (["--mask-ratio", "0.5", "1.0"], "mask ratio 1.0 is outside [0, 1)"),
        (["--mask", "cluster", "--mask-ratio", "0.5", "0.4"], "finds its threshold for one ratio"),
        (["--mask", "attentive", "--teacher-scale", "0.3"], "--teacher-scale 0.3 of 48 pixels"),
        (["--mask", "attentive", "--teacher-momentum", "7"], "--teacher-momentum 7.0 is outside"),
        (["--text-mask", "random"], "--text-mask with --text-tokens"),
        (["--text-tokens", "8"], "--text-mask with --text-tokens"),
        (["--text-mask", "random", "--text-tokens", "2"], "--text-tokens 2 is outside [3, 77]"),
        (["--data", "x", "--crop-scale", "0.9", "0.4"], "--crop-scale 0.9 0.4: give the smallest"),
        (["--data", "x", "--crop-scale", "0", "1"], "--crop-scale 0.0 1.0: give the smallest"),
        (["--crop-scale", "0.9", "1"], "--crop-scale is for pictures of your own"),
        (["--context-length", "78"], "--context-length 78 is outside [3, 77]"),
        (["--context-length", "8", "--text-mask", "random", "--text-tokens", "9"], "[3, 8]"),
        (["--text-threshold", "1"], "belongs to --text-mask frequency or --sampling words: "),
        (["--sampling-power", "1", "--data", "x"], "belongs to --sampling clusters: leave"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    told = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert sentence in told[-1] and told[-1].startswith("train.py: ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--mask", "blok"], "none,random,gaussian"),
        (["--model", "ViT-B-17"], "ViT-B-16"),
        (["--recipe", "demos"], "cc12m"),
        (["--lrr", "1"], "--lr"),
        (["--steps", "many"], "--steps"),
    ],
)
def test_unknown_choices_are_listed(words, told, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(words)
    message = capsys.readouterr()
    assert stopped.value.code == 2
    assert told in re.sub(r"[\s│']", "", message.err + message.out)


@pytest.mark.slow
def test_another_run_is_never_overwritten(run, monkeypatch, capsys):
    out, _ = run
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    words = ("train.py", *SMALL, "--steps", "1", "--out", str(out))
    done = inside(monkeypatch, capsys, train.main, *words)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("choose another --out, or remove the folder")
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}


@pytest.mark.slow
def test_bad_input_under_torchrun_is_told_without_a_traceback(tmp_path):
    """What the first process alone looks at; see test_cli.py for the others."""
    run = Run("train", "--data", "nowhere/", log=tmp_path / "log.txt", world=2)
    code, printed = run.finish()
    assert code != 0 and printed.count("train.py: --") == 1
    assert "RuntimeError" not in printed and "InputError" not in printed


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = replace(
        TrainConfig(), batch_size=16, steps=40, image_size=16, lr=1e20, warmup=0, tune_epochs=0,
        precision="fp32", out=str(tmp_path / "run"), log_every=2, eval_every=1000,
    )  # fmt: skip
    with pytest.raises(glip.InputError, match="lower --lr"):
        train.train(config)
