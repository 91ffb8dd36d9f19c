"""Export and import weights: open_clip, timm, transformers, torch.export.

    python -m tools.convert export runs/demo --to open_clip --out DIR     or timm, hf, torch
    python -m tools.convert import DIR --from hf --out RUN                or open_clip
    python -m tools.convert info FILE                                     print what a checkpoint is

Nothing is downloaded. An export is a folder that the other library loads by path: safetensors, its
config and a model card. An import becomes a run of 0 steps for evaluate.py, train.py --init and
export. Files from elsewhere are not trusted: nothing in them is executed.
"""

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import glip
from glip import GLIP, GLIPConfig, InputError
from nanoglip import checkpoint, cli, files
from nanoglip.config import TrainConfig
from nanoglip.machine import machine
from nanoglip.masker import Masker
from tools.card import architecture, card, facts
from tools.hf_tokenizer import tokenizer

Weights = dict[str, Tensor]

# --- Names: open_clip's are ours, transformers' differ --------------------------------------------

TO_HF = [  # (ours, theirs), applied in this order
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]
TRANSPOSED = ("visual.proj", "text_projection")


def hf_names(name: str) -> list[str]:
    """transformers' names of one of our parameters; in_proj is three, of q, k and v."""
    for ours, theirs in TO_HF:
        name = re.sub(ours, theirs, name)
    place, joined, kind = name.partition(".attn.in_proj_")
    return [f"{place}.self_attn.{x}_proj.{kind}" for x in "qkv"] if joined else [name]


def weights_to_hf(weights: Weights) -> Weights:
    """Our parameters under transformers' names, projections transposed."""
    found = {}
    for name, value in weights.items():
        names = hf_names(name)
        parts = value.chunk(3) if len(names) == 3 else [value.T if name in TRANSPOSED else value]
        found |= zip(names, parts, strict=True)
    return found


def weights_from_hf(weights: Weights, ours: Iterable[str]) -> Weights:
    """The inverse of weights_to_hf; parameters that we lack keep their names."""
    rest = {k: v for k, v in weights.items() if not k.endswith(".position_ids")}  # 0, 1, 2, ...
    found = {}
    for name in ours:
        names = hf_names(name)
        if rest.keys() >= set(names):
            parts = [rest.pop(other) for other in names]
            value = torch.cat(parts) if len(parts) == 3 else parts[0]
            found[name] = value.T if name in TRANSPOSED else value
    return found | rest


# --- Export: each function returns the files of a folder, name -> content -------------------------


def as_safetensors(weights: Weights) -> bytes:
    """Weights as a safetensors file that transformers, timm and open_clip read."""
    from safetensors.torch import save

    return save({k: v.contiguous() for k, v in weights.items()}, metadata={"format": "pt"})


def as_json(content: object) -> bytes:
    """An object as a readable JSON file."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def to_open_clip(model: GLIP) -> dict[str, bytes]:
    """For open_clip's `local-dir:` names."""
    c = model.config
    config = {
        "embed_dim": c.embed_dim, "quick_gelu": c.quick_gelu,
        "vision_cfg": {
            "image_size": c.image_size, "layers": c.layers, "width": c.width,
            "head_width": c.width // c.heads, "patch_size": c.patch_size,
        },
        "text_cfg": {
            "context_length": c.context_length, "vocab_size": c.vocab_size, "width": c.text_width,
            "heads": c.text_heads, "layers": c.text_layers,
        },
    } | ({"init_logit_bias": -10.0} if c.siglip else {})  # fmt: skip
    pixels = {"mean": glip.MEAN, "std": glip.STD, "interpolation": "bicubic"}
    weights = as_safetensors(model.state_dict())
    config = as_json({"model_cfg": config, "preprocess_cfg": pixels})
    return {"open_clip_model.safetensors": weights, "open_clip_config.json": config}


def to_timm(model: GLIP) -> dict[str, bytes]:
    """The image tower for timm's `local-dir:` names; its head is the projection."""
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    c, name = model.config, "vit_base_patch16_clip_224"  # of any size: the arguments say which
    arguments = {
        "img_size": c.pixels, "patch_size": c.patch_size, "embed_dim": c.width, "depth": c.layers,
        "num_heads": c.heads, "act_layer": "quick_gelu" if c.quick_gelu else "gelu",
    }  # fmt: skip
    with torch.device("meta"):
        tower = timm.create_model(name, num_classes=c.embed_dim, **arguments)
    tower.load_state_dict(checkpoint_filter_fn(model.state_dict(), tower), assign=True)
    config = {
        "architecture": name, "num_classes": c.embed_dim, "num_features": c.width,
        "global_pool": "token", "model_args": arguments,
        "pretrained_cfg": {
            "input_size": (3, *c.pixels), "fixed_input_size": True, "interpolation": "bicubic",
            "crop_pct": 1.0, "crop_mode": "center", "mean": glip.MEAN, "std": glip.STD,
            "num_classes": c.embed_dim, "first_conv": "patch_embed.proj", "classifier": "head",
        },
    }  # fmt: skip
    return {"model.safetensors": as_safetensors(tower.state_dict()), "config.json": as_json(config)}


def hf_config(c: GLIPConfig) -> dict:
    """transformers' CLIPConfig of a model with square pictures."""
    both = {"hidden_act": "quick_gelu" if c.quick_gelu else "gelu", "layer_norm_eps": 1e-5}
    return {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": c.embed_dim,
        "text_config": both | {
            "hidden_size": c.text_width, "num_hidden_layers": c.text_layers,
            "num_attention_heads": c.text_heads, "intermediate_size": 4 * c.text_width,
            "max_position_embeddings": c.context_length, "vocab_size": c.vocab_size,
            "bos_token_id": glip.START, "eos_token_id": glip.END,
        },
        "vision_config": both | {
            "hidden_size": c.width, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
            "intermediate_size": 4 * c.width, "image_size": c.pixels[0],
            "patch_size": c.patch_size, "num_channels": 3,
        },
    }  # fmt: skip


def to_hf(model: GLIP) -> dict[str, bytes]:
    """For transformers' CLIPModel and CLIPProcessor."""
    height, width = model.config.pixels
    if height != width or model.config.siglip:
        lack = "a bias in its logits (--loss siglip)" if height == width else "oblong pictures"
        raise InputError(f"--to hf: transformers' CLIP does not support {lack}: use --to open_clip")
    size = {"size": {"shortest_edge": height}, "crop_size": {"height": height, "width": height}}
    words, settings = tokenizer(model.config.context_length)
    return {
        "model.safetensors": as_safetensors(weights_to_hf(model.state_dict())),
        "config.json": as_json(hf_config(model.config)),
        "preprocessor_config.json": as_json({"image_processor_type": "CLIPImageProcessor", **size}),
        "tokenizer.json": as_json(words), "tokenizer_config.json": as_json(settings),
    }  # fmt: skip


class ImageEncoder(nn.Module):
    """GLIP.encode_image of whole pictures."""

    def __init__(self, model: GLIP) -> None:
        super().__init__()
        self.visual = model.visual

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.visual(images, None, None) @ self.visual.proj, dim=-1)


class TextEncoder(nn.Module):
    """GLIP.encode_text on padded texts: no size depends on what the texts are."""

    def __init__(self, model: GLIP) -> None:
        super().__init__()
        self.token_embedding, self.positions = model.token_embedding, model.positional_embedding
        self.blocks, self.ln_final = model.transformer.resblocks, model.ln_final
        self.projection = model.text_projection

    def forward(self, tokens: Tensor) -> Tensor:
        rows, length = tokens.shape
        read = torch.arange(rows, device=tokens.device) * length + tokens.argmax(1)
        causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        packing = glip.Packing(read, allowed=causal)
        x = self.token_embedding(tokens) + self.positions                      # (B, T, D)
        for block in self.blocks:
            x = block(x, packing)
        x = self.ln_final(packing.pick(x)[:, 0])                               # (B, D)
        return F.normalize(x @ self.projection, dim=-1)


def to_torch(model: GLIP) -> dict[str, bytes]:
    """Both towers by torch.export, for any batch size; they run without this code."""
    examples = {
        "image.pt2": (ImageEncoder(model), torch.zeros(2, 3, *model.config.pixels).byte()),
        "text.pt2": (TextEncoder(model), glip.tokenize(["", ""], model.config.context_length)),
    }
    found, rows = {}, {0: torch.export.Dim("rows", max=65_536)}
    for name, (tower, example) in examples.items():
        with torch.no_grad():
            program = torch.export.export(tower, (example,), dynamic_shapes=(rows,), strict=False)
        torch.export.save(program, file := io.BytesIO())
        found[name] = file.getvalue()
    return found


EXPORTS = {"open_clip": to_open_clip, "timm": to_timm, "hf": to_hf, "torch": to_torch}

# --- Import: each function returns our configuration and weights, or refuses what we lack ---------


def read_weights(path: Path) -> Weights:
    """Weights by name from a safetensors or torch.save file; its content tells which it is.

    Raises InputError for any other file and for a damaged one; nothing in the file is executed.
    """
    from safetensors.torch import load_file

    remedy, size = "copy it anew, or save its state_dict with safetensors", path.stat().st_size
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch compares no checksums, unpacks bombs
                members = archive.infolist()
                if any(member.filename.endswith("/constants.pkl") for member in members):
                    remedy = ("a TorchScript archive holds code: OpenAI's weights are published as "
                              "safetensors, too, for --from hf and open_clip")  # fmt: skip
                large = sum(member.file_size for member in members) > size
                if large or archive.testzip() or any(member.compress_type for member in members):
                    raise zipfile.BadZipFile("compressed, or damaged")
        with open(path, "rb") as file:
            if file.read(9)[8:] == b"{":
                content = load_file(path)
            else:  # given a path, torch would judge by the name
                file.seek(0)
                content = torch.load(file, map_location="cpu", weights_only=True)
        while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        if not content or sum(v.nbytes for v in content.values()) > size:
            raise ValueError("no weights, or views that are larger than the file")
        return {re.sub(r"^(module|_orig_mod)\.", "", name): v for name, v in content.items()}
    except Exception as error:  # many kinds, for damaged, foreign and malicious files
        raise InputError(
            f"{path}: not a readable file of weights ({type(error).__name__}); nothing in it was "
            f"executed; {remedy}"
        ) from None


def empty(config: GLIPConfig, weights: Weights) -> GLIP:
    """A model without memory, for names and shapes; ValueError for one that would take long."""
    if config.layers + config.text_layers > len(weights):
        raise ValueError("more layers than weights")
    with torch.device("meta"):
        return GLIP(config)


def fitted(config: GLIPConfig, weights: Weights, file: Path) -> GLIP:
    """The model in fp32; raises InputError naming a weight that it lacks or cannot take."""
    model = empty(config, weights)
    for name in {"logit_scale", "logit_bias"} & weights.keys():
        weights[name] = weights[name].squeeze()
    try:
        model.load_state_dict({k: v.float().contiguous() for k, v in weights.items()}, assign=True)
    except RuntimeError as error:
        first = " ".join(str(error).split("\n\t")[1].split())[:200]
        raise InputError(f"{file}: no plain ViT CLIP, or not of its config: {first}") from None
    for name, value in weights.items():
        if not value.isfinite().all():
            raise InputError(f"{file}: {name} is not finite; take another file")
    return model


USED = {  # settings of open_clip that are read here, or do not matter
    "embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "image_size", "layers", "width", "size",
    "head_width", "heads", "patch_size", "patch_dropout", "context_length", "vocab_size",
    "init_logit_scale", "init_logit_bias",
}  # fmt: skip


def from_open_clip(file: Path, config: str) -> tuple[GLIPConfig, Weights]:
    """open_clip's weights, by the config beside them, or --config FILE or NAME of its models."""
    import open_clip
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg
    from open_clip.transform import PreprocessCfg

    where = Path(config or file.parent / "open_clip_config.json")
    if where.is_file():
        whole = json.loads(files.read_regular(where, 2**24))
    elif (whole := open_clip.get_model_config(config)) is None:
        raise InputError(
            f"{file}: there is no {where}: give by --config the open_clip model that it is, such "
            "as ViT-B-16 or ViT-B-16-quickgelu, or its JSON file"
        )
    model = whole.get("model_cfg", whole)
    vision, text = model["vision_cfg"], model["text_cfg"]
    if isinstance(vision.get("layers"), list):
        raise InputError(f"{where}: a ResNet; only ViT are supported")
    plain = asdict(CLIPVisionCfg()), asdict(CLIPTextCfg()), asdict(PreprocessCfg())
    for part, like_ours in zip((vision, text, whole.get("preprocess_cfg", {})), plain):
        refuse_others({k: part[k] for k in part.keys() - USED}, like_ours, where)
    refuse_others({k: model[k] for k in model.keys() - USED}, {"custom_text": False}, where)
    vision, text = plain[0] | vision, plain[1] | text
    size, weights = vision["image_size"], read_weights(file)
    return GLIPConfig(
        tuple(size) if isinstance(size, list) else size, vision["patch_size"], vision["width"],
        vision["layers"], vision["width"] // vision["head_width"], model["embed_dim"],
        text["width"], text["layers"], text["heads"], text["context_length"], text["vocab_size"],
        siglip="logit_bias" in weights, quick_gelu=bool(model.get("quick_gelu")),
    ), weights  # fmt: skip


def from_hf(file: Path, config: str) -> tuple[GLIPConfig, Weights]:
    """transformers' CLIPModel, by the config.json beside its file of weights."""
    where = Path(config) if config else file.parent / "config.json"
    whole = json.loads(files.read_regular(where, 2**24))
    if whole.get("model_type") != "clip":
        raise InputError(f"{where}: model_type is {whole.get('model_type')!r}, not 'clip'")
    default = hf_config(GLIPConfig(patch_size=32, quick_gelu=True))  # transformers' defaults
    parts = ("text_config", "vision_config")
    text, vision = (default[part] | (whole.get(part) or {}) for part in parts)
    ours = GLIPConfig(
        vision["image_size"], vision["patch_size"], vision["hidden_size"],
        vision["num_hidden_layers"], vision["num_attention_heads"],
        whole.get("projection_dim", default["projection_dim"]),
        text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"],
        text["max_position_embeddings"], text["vocab_size"],
        quick_gelu=text["hidden_act"] == "quick_gelu",
    )  # fmt: skip
    if text["eos_token_id"] == 2:  # how transformers wrote CLIP's end token until 2023
        text["eos_token_id"] = glip.END
    for part, found in zip(parts, (text, vision), strict=True):
        like_ours = hf_config(ours)[part]
        refuse_others({k: found[k] for k in like_ours}, like_ours, where)
    pixels = file.parent / "preprocessor_config.json"
    if pixels.is_file():
        found = json.loads(files.read_regular(pixels, 2**24))
        like_ours = {"image_mean": glip.MEAN, "image_std": glip.STD, "resample": 3}
        refuse_others({k: found[k] for k in like_ours if k in found}, like_ours, pixels)
    weights = read_weights(file)
    return ours, weights_from_hf(weights, empty(ours, weights).state_dict())


def refuse_others(found: dict, like_ours: dict, where: object) -> None:
    """Raise InputError for a setting that our towers do not have."""
    for name in found:
        value, ours = (tuple(x) if isinstance(x, list) else x
                       for x in (found[name], like_ours.get(name)))  # fmt: skip
        if value != ours:
            raise InputError(f"{where}: {name} is {value!r}, but only {ours!r} is supported here")


IMPORTS = {"open_clip": from_open_clip, "hf": from_hf}

# --- The commands ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Export:
    """Write a run's model as a folder that another library loads, with a model card."""

    run: Annotated[Path, tyro.conf.Positional]  # folder of a run, or one of its .pt files
    to: Literal[tuple(EXPORTS)]  # whose format; torch: both towers by torch.export
    out: Path  # folder to write, new or empty


@dataclass(frozen=True)
class Import:
    """Make a run of published weights: to evaluate, probe, tune under any mask, or export."""

    file: Annotated[Path, tyro.conf.Positional]  # weights, or their folder
    source: Annotated[Literal[tuple(IMPORTS)], tyro.conf.arg(name="from")]  # whose format
    out: Path  # folder of the run to write, new or empty
    config: str = ""  # its JSON file, or the name of an open_clip model (default: the file beside)


@dataclass(frozen=True)
class Info:
    """Print what a checkpoint is, its size, and its training record."""

    file: Annotated[Path, tyro.conf.Positional]  # a file of weights, a run's or an export's folder


# transformers' and timm's name, transformers' in the past, open_clip's
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")


def weights_in(path: Path, *names: str) -> Path:
    """The file itself, or the first of these names in the folder; raises InputError if none is."""
    for file in [path / name for name in names] if path.is_dir() else [path]:
        if file.is_file():
            return file
    lack = f"no {' or '.join(names)} in it" if path.is_dir() else "there is no such file"
    raise InputError(f"{path}: {lack}; name a file of weights (a .pt2 is a program)")


def export(options: Export) -> None:
    """`convert.py export`."""
    files.check_new(options.out)
    path = weights_in(options.run, "model.pt")
    content = glip.load_checkpoint(path)
    model = glip.build(content).eval()
    contents = EXPORTS[options.to](model)
    contents["README.md"] = card(options.to, path, content, model.config).encode()
    for name, content in contents.items():
        files.write_bytes(options.out / name, content)
    print(f"wrote {options.out}: {', '.join(contents)}")


def import_(options: Import) -> None:
    """`convert.py import`: a run of 0 steps with the default settings."""
    files.check_new(options.out)
    file = weights_in(options.file, *WEIGHTS)
    try:
        config, weights = IMPORTS[options.source](file, options.config)
        model = fitted(config, weights, file)
    except InputError:
        raise
    except (OSError, *files.FOREIGN) as error:
        why = f"{type(error).__name__}: {error}"[:200]
        raise InputError(f"{file}: its config describes no model of its weights ({why})") from None
    source = {"file": file.name, "from": options.source,
              "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}  # fmt: skip
    record = TrainConfig(
        mask="none", mask_ratio=0.0, steps=0, tune_epochs=0.0, model=architecture(config),
        context_length=config.context_length,
    )  # fmt: skip
    checkpoint.save(
        options.out / "model.pt", model, stage="import", step=0, steps={}, seconds={}, world=1,
        bf16=False, mask=Masker().state(), config=asdict(record),
        machine=machine(torch.device("cpu")),
        command=f"python -m tools.convert import {file.name} --from {options.source}",
        imported=source,
    )  # fmt: skip
    content = glip.load_checkpoint(options.out / "model.pt")
    cli.say(f"wrote {options.out}/model.pt: {facts(content, config)['architecture']}")


KINDS = {  # a name that only these have
    "visual.transformer.resblocks.0.ln_1.weight": "CLIP by OpenAI's and open_clip's names",
    "vision_model.encoder.layers.0.layer_norm1.weight": "CLIP by transformers' names",
    "blocks.0.attn.qkv.weight": "a ViT by timm's names",
}


def info(options: Info) -> None:
    """`convert.py info`."""
    path = weights_in(options.file, "model.pt", *WEIGHTS)
    try:
        content = glip.load_checkpoint(path)
        weights, kind = content["model"], "a checkpoint of nanoGLIP"
        known = facts(content, GLIPConfig(**content["model_config"]))
    except InputError:
        weights = read_weights(path)
        kind = next((kind for name, kind in KINDS.items() if name in weights), "of unknown names")
        known = {"parameters": f"{sum(v.numel() for v in weights.values()):,}"}
    types = ", ".join(sorted({str(v.dtype).removeprefix("torch.") for v in weights.values()}))
    lines = [f"{path}: {kind}; {path.stat().st_size:,} bytes, {len(weights)} tensors, {types}"]
    for line in lines + [f"  {name}: {value}" for name, value in known.items()]:
        print(cli.printable(line))


COMMANDS = {Export: export, Import: import_, Info: info}


@cli.guarded
def main() -> None:
    """The command line: bad input is one sentence and exit code 2."""
    options = tyro.cli(Export | Import | Info, prog="convert.py", description=__doc__)
    COMMANDS[type(options)](options)


if __name__ == "__main__":
    main()
