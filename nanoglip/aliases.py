"""open_clip's flags: those that mean the same are read, the others explained.

NAMES and SAME are the table of docs/open_clip.md. Meanings are those of open_clip 3.3's params.py;
--fsdp is newer.
"""

from fnmatch import fnmatchcase

from glip import InputError

# A flag of open_clip's, or a flag with a value, and the same in our flags ({}: its value), "" where
# we always do so, or a sentence that says what to do instead. The first row that fits holds.
NAMES = {
    # data
    "--train-data *::*": "give the sources one after the other: --data A B",
    "--train-data *{*}*": "give the folder with the shards: --data FOLDER",
    "--train-data": "--data {}",
    "--train-data-upsampling-factors": "give passes of an epoch: --data-weights 1 2",
    "--train-num-samples": "the samples are counted when they are indexed: leave it out",
    "--val-data": "one pair in twenty of --data is held out; for other pairs, evaluate.py RUN "
                  "--retrieval FOLDER",
    "--val-num-samples": "all held-out pairs are evaluated: leave it out",
    "--dataset-type": "the kind of --data is recognised: leave it out",
    "--dataset-resampled": "an epoch has every pair once: leave it out",
    "--csv-*": "commas separate a .csv, tabs a .tsv; its first row names the columns, filepath and "
               "caption (or title): leave it out",
    "--image-mean": "pictures are normalised by CLIP's numbers: leave it out",
    "--image-std": "pictures are normalised by CLIP's numbers: leave it out",
    "--image-interpolation": "pictures are resized bicubically: leave it out",
    "--image-resize-mode": "training crops, evaluation takes the centre: leave it out",
    "--aug-cfg": "crops are the augmentation: --crop-scale 0.9 1",
    # models and weights
    "--force-image-size": "--image-size {}",
    "--force-context-length": "--context-length {}",
    "--force-patch-dropout": "--mask random --mask-ratio {}",
    "--force-quick-gelu": "it is in the weights of --init: leave it out",
    "--force-custom-text": "there is one kind of text tower: leave it out",
    "--pretrained": "import the weights, python -m tools.convert import FILE --out runs/NAME, and "
                    "start from them, --init runs/NAME",
    "--pretrained-image": "weights are of both towers: --init runs/NAME",
    "--lock-*": "all weights are trained; on a fixed image tower, evaluate.py RUN --linear-probe",
    "--torchscript": "torch.compile is --compile",
    "--trace": "torch.compile is --compile",
    "--use-bn-sync": "there is no batch norm here: leave it out",
    "--use-bnb-linear": "there is no int8 training here: leave it out",
    "--coca-*": "there is no CoCa here: leave it out",
    "--distill-*": "there is no distillation here: leave it out",
    # optimizer and loss
    "--wd": "--weight-decay {}",
    "--opt adamw": "--optimizer adamw",
    "--opt": "give --optimizer adamw or muon",
    "--beta1": "it is 0.9, as open_clip's: leave it out",
    "--eps": "it is 1e-6, as open_clip's for ViTs: leave it out",
    "--momentum": "Muon's is 0.95: leave it out",
    "--lr-scheduler cosine": "",
    "--lr-scheduler": "the learning rate falls by half a cosine to 0: leave it out",
    "--skip-scheduler": "the learning rate falls by half a cosine to 0: leave it out",
    "--lr-cooldown-*": "the learning rate falls by half a cosine to 0: leave it out",
    "--epochs-cooldown": "the learning rate falls by half a cosine to 0: leave it out",
    "--grad-clip-norm": "--clip-grad-norm {}",
    "--siglip": "--loss siglip",
    "--loss-dist-impl": "SigLIP's loss always uses broadcasts: leave it out",
    "--local-loss": "",
    "--gather-with-grad": "",
    # memory, speed, processes
    "--accum-freq": "the whole batch is --batch-size; --micro-batch 64 computes its gradients with "
                    "the activations of 64 pairs at a time",
    "--precision amp_bf16": "--precision bf16",
    "--precision amp_bfloat16": "--precision bf16",
    "--precision amp": "half precision is bf16, without a scaled loss: --precision bf16",
    "--precision fp16": "weights stay in fp32; products in half precision: --precision bf16",
    "--precision pure_*": "weights stay in fp32; products in half precision: --precision bf16",
    "--grad-checkpointing": "--recompute",
    "--torchcompile": "--compile",
    "--fsdp": "--shard",
    "--ddp-static-graph": "chosen where it can be: leave it out",
    "--dist-*": "torchrun sets it: leave it out",
    "--horovod": "start the processes with torchrun: leave it out",
    "--no-set-device-rank": "a process takes the GPU of its LOCAL_RANK: leave it out",
    # runs
    "--name": "--out runs/{}",
    "--logs": "give the whole folder: --out FOLDER/NAME",
    "--log-local": "rank 0 writes: leave it out",
    "--log-every-n-steps": "--log-every {}",
    "--resume latest": "--resume auto",
    "--resume *.pt": "an unfinished run in --out goes on; --init FILE.pt starts from weights alone",
    "--save-frequency": "give steps, not epochs: --keep-every 1000",
    "--save-most-recent": "",
    "--delete-previous-checkpoint": "the last two are kept until the end: leave it out",
    "--val-frequency": "give steps, not epochs: --eval-every 1000",
    "--zeroshot-frequency": "give steps, not epochs: --eval-every 1000",
    "--imagenet-val": "--eval-sets {}",
    "--imagenet-*": "give all folders of sets at once: --eval-sets A B",
    "--report-to wandb": "--wandb",
    "--report-to tensorboard": "--tensorboard",
    "--report-to trackio": "--trackio",
    "--report-to": "give each as a flag: --tensorboard --wandb",
    "--wandb-project-name": "set WANDB_PROJECT in the environment",
    "--wandb-notes": "set WANDB_NOTES in the environment",
    "--copy-codebase": "a checkpoint names the commit: leave it out",
    "--remote-sync*": "runs stay on this machine: leave it out",
    "--cache-dir": "training downloads nothing: leave it out",
}  # fmt: skip

SAME = {  # flags that both have, and what differs
    "--batch-size": "ours counts the pairs of all processes, open_clip's those of one",
    "--lr": "the same under `--optimizer adamw`; Muon's is twice that",
    "--precision": "`fp32` is the same; our `bf16` is open_clip's `amp_bf16`",
    "--resume": "ours is `auto` or `never`",
    "--model": "plain ViTs; the names are the same",
    "--workers": "the same", "--epochs": "the same, in whole or in part",
    "--warmup": "the same, in steps", "--beta2": "the same", "--seed": "the same",
    "--device": "`auto`, `cuda`, `mps` or `cpu`",
    "--debug": "ours shows the traceback of an error",
}  # fmt: skip


def translated(words: list[str]) -> tuple[list[str], list[str]]:
    """A command line in our flags, and a sentence for each flag that was open_clip's.

    Raises InputError for a flag that has no equal here, with what to do instead.
    """
    found, told, words = [], [], list(words)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if not equals and words and not words[0].startswith("--"):
            value = words[0]
        whole = f"{flag} {value}"
        row = next((row for row in NAMES if fnmatchcase(whole if " " in row else flag, row)), None)
        if row is None:
            found.append(word)
            continue
        ours, takes = NAMES[row], " " in row or "{}" in NAMES[row]  # whether the value goes with it
        typed = whole if takes else flag
        if ours and not ours.startswith("--"):
            raise InputError(f"{typed} is open_clip's: {ours}")
        if takes and not value:
            raise InputError(f"{flag} needs a value")
        if takes and not equals:
            words.pop(0)
        ours = [part.replace("{}", value) for part in ours.split()]
        found += ours
        told.append(f"open_clip's {typed} is {' '.join(ours) or 'always so'} here")
    if told and any(word.partition("=")[0] == "--batch-size" for word in found):
        told.append("--batch-size counts the pairs of all processes, open_clip's those of one")
    return found, told
