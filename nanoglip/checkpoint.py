"""nanoglip.checkpoint: to be told."""

import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import glip
from glip import InputError
from nanoglip import distributed
from nanoglip.cli import printable
from nanoglip.config import MACHINE, TrainConfig, flag_of
from nanoglip.files import FOREIGN, digest
from nanoglip.masks import Masker
from nanoglip.sources.pictures import Source

# Checkpoints, and going on from them
FREE = MACHINE | {"max_bad"}  # what may differ when a run is resumed



def stamp_of(pairs: Source) -> str:
    """What tells these training data from others."""
    return digest([], pairs.stamp(np.arange(0)))[:16]



STATE = {  # what going on needs of a checkpoint, beside its weights
    "stage": str, "step": int, "config": dict, "mask": dict, "heads": dict, "optimizers": list,
    "data_stamp": str, "bf16": bool, "seconds": dict, "steps": dict, "read": int, "bad": int,
    "pairs": dict,
}  # fmt: skip



def last_state(out: Path, config: TrainConfig, stages: list, bf16: bool) -> dict:
    """The newest whole checkpoint of an unfinished run in `out`, {} if there is none.

    Raises InputError where it is another run's, naming what differs.
    """
    names = [name for name in ("latest.pt", "previous.pt") if (out / name).is_file()]
    for name in names:
        try:
            state = glip.load_checkpoint(out / name) | {"file": out / name}
            for key, kind in STATE.items():
                if not isinstance(state.get(key), kind):
                    raise InputError(f"{out / name}: its {key} is missing, or no {kind.__name__}")
        except InputError as error:
            print(printable(f"{error}; going back to the checkpoint before"), file=sys.stderr)
            continue
        now, then = asdict(config), state["config"]
        for key in sorted(now.keys() - FREE):
            if key not in then or now[key] != then[key]:
                raise InputError(
                    f"--out {out} holds another run: its {flag_of(key)} was {then.get(key)}, not "
                    f"{now[key]}; give that, or choose another --out"
                )
        if state["bf16"] != bf16:
            raise InputError(
                f"--out {out}: this run multiplies in {'bf16' if state['bf16'] else 'fp32'}, which "
                "--precision auto does not do here: go on on the kind of device that it began on"
            )
        if state["data_stamp"] != stamp_of(stages[0].batches.pairs):
            raise InputError(
                f"--out {out}: the data have changed since this run began; bring them back, or "
                "choose another --out"
            )
        return state
    if names:
        raise InputError(f"--out {out}: no checkpoint in it is whole; remove the folder")
    return {}



def same_everywhere(out: Path, state: dict, world: int) -> None:
    """Raise InputError unless all processes go on from the same step; all call it."""
    found = [(state.get("stage"), state.get("step"))] * world
    if world > 1:
        dist.all_gather_object(found, found[0])
    if len(set(found)) > 1:
        raise InputError(
            f"--out {out}: machines hold different checkpoints of this run: give all of them one "
            "folder, or copy the first one's latest.pt"
        )



def restore(
    state: dict, stage: object, network: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> None:
    """Put a checkpoint's optimizers, teacher and heads back in place."""
    model = network.model if stage.aclip else network
    try:
        found = Masker.restored(state["mask"], model.visual)
        vars(stage.masker).update(vars(found))
        if stage.aclip:
            network.load_state_dict(state["heads"], strict=False)
        for optimizer, content in zip(optimizers, state["optimizers"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            optimizer.load_state_dict(distributed.divided(content, parameters))
    except FOREIGN as e:
        raise InputError(
            f"{state['file']}: its mask, heads or optimizers are not this run's "
            f"({type(e).__name__}): remove that file to go on from the checkpoint before"
        ) from None
