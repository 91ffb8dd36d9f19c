"""Checkpoints of train.py: what they hold, and how they are written and read.

    model.pt, pretrained.pt, step-000200.pt   the model and RECORD
    latest.pt, previous.pt, extend.pt         and RESUME

glip.py has the file format: a version, the model's config and its weights.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import glip
from glip import GLIP, InputError
from nanoglip import distributed
from nanoglip.cli import printable
from nanoglip.files import FOREIGN, flush_folder, room_for
from nanoglip.masker import Masker
from nanoglip.sources.pictures import Source

RECORD = {  # the fields of every checkpoint, and their types
    "stage": str, "step": int, "config": dict, "mask": dict, "seconds": dict, "steps": dict,
    "machine": dict, "command": str, "world": int, "bf16": bool,
}  # fmt: skip
RESUME = {  # further fields, which resuming needs
    "heads": dict, "optimizers": list, "data_stamp": str, "read": int, "bad": int, "pairs": dict,
}  # fmt: skip


def save(path: Path, model: GLIP, **record: object) -> None:
    """Write a checkpoint; raises InputError where there is no room, and what was there stays."""
    wrong = [key for key, kind in RECORD.items() if not isinstance(record.get(key), kind)]
    if wrong:
        raise TypeError(f"a checkpoint's record lacks {wrong[0]}")
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        glip.save_checkpoint(path, model, **record)
    flush_folder(path.parent)


def load(path: Path, resume: bool = False) -> dict:
    """The content of a checkpoint with its training record; InputError for another file."""
    content = glip.load_checkpoint(path)
    if content.get("version") != glip.VERSION:
        raise InputError(
            f"{path}: its training record is of another version of nanoGLIP: evaluate and resume "
            "it there, or start a new run from its weights with --init"
        )
    for key, kind in (RECORD | RESUME if resume else RECORD).items():
        if not isinstance(content.get(key), kind):
            raise InputError(
                f"{path}: its {key} is missing, or no {kind.__name__}; name a run of train.py"
            )
    return content


def save_latest(folder: Path, model: GLIP, **record: object) -> None:
    """Write latest.pt, from which the run is resumed; the one before stays as previous.pt."""
    save(folder / "next.pt", model, **record)
    if (folder / "latest.pt").exists():
        os.replace(folder / "latest.pt", folder / "previous.pt")
    os.replace(folder / "next.pt", folder / "latest.pt")
    flush_folder(folder)


def latest(out: Path, config: dict, free: set[str], pairs: Source, bf16: bool) -> dict:
    """The newest undamaged checkpoint of an unfinished run in `out`, {} if there is none.

    Raises InputError where it is another run's, naming what differs; `free` settings may differ.
    """
    names = [name for name in ("latest.pt", "previous.pt") if (out / name).is_file()]
    for name in names:
        try:
            state = load(out / name, resume=True) | {"file": out / name}
        except InputError as error:
            print(printable(f"{error}; going back to the checkpoint before"), file=sys.stderr)
            continue
        check_alike(state, "--out", out, config, free, pairs, bf16)
        return state
    if names:
        raise InputError(f"--out {out}: every checkpoint in it is damaged; remove the folder")
    return {}


def to_extend(
    run: Path, config: dict, free: set[str], pairs: Source, bf16: bool, steps: int
) -> dict:  # fmt: skip
    """The state of a finished run at the end of its pre-training, to train it to more `steps`.

    Raises InputError if it lacks that, has as many steps, or differs in settings not in `free`.
    """
    path = run / "extend.pt"
    if not path.is_file():
        raise InputError(
            f"--extend {run}: no extend.pt in it, which a run with --keep-every leaves; start from "
            f"its weights with --init {run}"
        )
    state = load(path, resume=True) | {"file": path}
    check_alike(state, "--extend", run, config, free, pairs, bf16)
    if state["step"] >= steps:
        raise InputError(f"--extend {run} has {state['step']} steps: give more --steps or --epochs")
    return state


def check_alike(
    state: dict, flag: str, run: Path, config: dict, free: set[str], pairs: Source, bf16: bool
) -> None:
    """Raise InputError unless a checkpoint of the run that a flag names is of this run's kind."""
    then = state["config"]
    for key in sorted(config.keys() - free):
        if key not in then or config[key] != then[key]:
            raise InputError(
                f"{flag} {run} holds another run: its --{key.replace('_', '-')} was "
                f"{then.get(key)}, not {config[key]}; give that, or choose another {flag}"
            )
    if state["bf16"] != bf16:
        raise InputError(
            f"{flag} {run}: this run multiplies in {'bf16' if state['bf16'] else 'fp32'}, which "
            "--precision auto does not do here: resume it on the kind of device it began on"
        )
    if state["data_stamp"] != pairs.key():
        raise InputError(
            f"{flag} {run}: the data have changed since this run began; bring them back, or "
            f"choose another {flag}"
        )


def check_same(out: Path, state: dict, world: int) -> None:
    """Raise InputError unless all ranks resume from the same step; all ranks call it."""
    found = [(state.get("stage"), state.get("step"))] * world
    if world > 1:
        dist.all_gather_object(found, found[0])
    if len(set(found)) > 1:
        raise InputError(
            f"--out {out}: machines hold different checkpoints of this run: give all of them one "
            "folder, or copy the first one's latest.pt"
        )


def restore(
    state: dict, masker: Masker, aclip: bool, network: nn.Module,
    optimizers: list[torch.optim.Optimizer],
) -> None:  # fmt: skip
    """Put a checkpoint's optimizers, teacher and A-CLIP's heads back in place."""
    model = network.model if aclip else network
    try:
        vars(masker).update(vars(Masker.restored(state["mask"], model.visual)))
        if aclip:
            network.load_state_dict(state["heads"], strict=False)
        for optimizer, content in zip(optimizers, state["optimizers"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            optimizer.load_state_dict(distributed.shard_like(content, parameters))
    except FOREIGN as error:
        raise InputError(
            f"{state['file']}: its mask, heads or optimizers are not this run's "
            f"({type(error).__name__}): remove that file to resume from the checkpoint before"
        ) from None
