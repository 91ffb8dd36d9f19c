"""Weights in and out: models for open_clip, timm, transformers and torch.export, theirs for us.

    python -m tools.convert export runs/demo --to open_clip --out DIR     or timm, hf, torch
    python -m tools.convert import ViT-B-32.pt --from openai --out RUN    or open_clip, hf
    python -m tools.convert info FILE                                     what a checkpoint is

All offline. An export is a folder that its consumer loads by path: safetensors, the config that it
expects, and a model card. An imported file becomes a run of no steps, for evaluate.py, train.py
--init and export. Files from elsewhere are not trusted: nothing in them is executed.
"""

import copy
import hashlib
import io
import json
import pickle
import re
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

import glip
from glip import GLIP, GLIPConfig, InputError
from nanoglip import cli, files
from nanoglip.config import TrainConfig
from nanoglip.files import check_finite, load_tensors, read_regular
from nanoglip.machine import machine
from nanoglip.masks import Masker
from tools import hf_tokenizer
from tools.card import architecture, card, facts

Weights = dict[str, Tensor]

# --- Names: open_clip's are ours; transformers has others -----------------------------------------

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

TURNED = ("visual.proj", "text_projection")  # theirs are transposed


def hf_names(name: str) -> list[str]:
    """Our name of a parameter -> transformers'; in_proj is three, of q, k and v."""
    for ours, theirs in TO_HF:
        name = re.sub(ours, theirs, name)
    place, joined, kind = name.partition(".attn.in_proj_")
    return [f"{place}.self_attn.{x}_proj.{kind}" for x in "qkv"] if joined else [name]


def weights_to_hf(weights: Weights) -> Weights:
    """Our parameters under transformers' names, projections transposed."""
    found = {}
    for name, value in weights.items():
        names = hf_names(name)
        parts = value.chunk(3) if len(names) == 3 else [value.T if name in TURNED else value]
        found |= zip(names, parts, strict=True)
    return found


def weights_from_hf(weights: Weights, ours: Iterable[str]) -> Weights:
    """The inverse of weights_to_hf; what we have no name for keeps its own."""
    rest = {k: v for k, v in weights.items() if not k.endswith(".position_ids")}  # counts from 0
    found = {}
    for name in ours:
        names = hf_names(name)
        if rest.keys() >= set(names):
            parts = [rest.pop(other) for other in names]
            value = torch.cat(parts) if len(parts) == 3 else parts[0]
            found[name] = value.T if name in TURNED else value
    return found | rest


# --- Export: each function gives the files of a folder, by name -----------------------------------


def as_safetensors(weights: Weights) -> bytes:
    """Weights as a safetensors file that transformers, timm and open_clip take."""
    from safetensors.torch import save

    return save({k: v.contiguous() for k, v in weights.items()}, metadata={"format": "pt"})


def as_json(content: object) -> bytes:
    """An object as a readable JSON file."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def to_open_clip(model: GLIP) -> dict[str, bytes]:
    """For open_clip's `local-dir:` names."""
    c = model.config
    cfg = {
        "embed_dim": c.embed_dim, "quick_gelu": c.quick_gelu,
        "vision_cfg": {
            "image_size": c.image_size, "layers": c.layers, "width": c.width,
            "head_width": c.width // c.heads, "patch_size": c.patch_size,
        },
        "text_cfg": {
            "context_length": c.context_length, "vocab_size": c.vocab_size, "width": c.text_width,
            "heads": c.text_heads, "layers": c.text_layers,
        },
    }  # fmt: skip
    if c.siglip:
        cfg["init_logit_bias"] = -10.0
    preprocess = {"mean": glip.MEAN, "std": glip.STD, "interpolation": "bicubic",
                  "resize_mode": "shortest"}  # fmt: skip
    return {
        "open_clip_model.safetensors": as_safetensors(model.state_dict()),
        "open_clip_config.json": as_json({"model_cfg": cfg, "preprocess_cfg": preprocess}),
    }


def to_timm(model: GLIP) -> dict[str, bytes]:
    """The image tower for timm's `local-dir:` names; its head is the projection."""
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    c, name = model.config, "vit_base_patch16_clip_224"  # any size, by the arguments
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
    c = model.config
    if c.pixels[0] != c.pixels[1]:
        raise InputError(
            f"--to hf: pictures of {c.pixels[0]} x {c.pixels[1]} pixels, but transformers' CLIP is "
            "square: use --to open_clip or timm, or train with a square --tune-image-size"
        )
    if c.siglip:
        raise InputError(
            "--to hf: transformers' CLIP has no bias in its logits, which --loss siglip trained: "
            "use --to open_clip"
        )
    pixels = {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"shortest_edge": c.pixels[0]}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": c.pixels[0], "width": c.pixels[0]}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": glip.MEAN,
        "image_std": glip.STD,
    }  # fmt: skip
    tokenizer, settings = hf_tokenizer.tokenizer(c.context_length)
    return {
        "model.safetensors": as_safetensors(weights_to_hf(model.state_dict())),
        "config.json": as_json(hf_config(c)), "preprocessor_config.json": as_json(pixels),
        "tokenizer.json": as_json(tokenizer), "tokenizer_config.json": as_json(settings),
    }  # fmt: skip


def to_torch(model: GLIP) -> dict[str, bytes]:
    """Both towers by torch.export, to be run without this code; any number of rows."""
    image, text = copy.deepcopy(model), copy.deepcopy(model)
    image.forward, text.forward = image.encode_image, text.encode_text
    image.transformer = image.token_embedding = image.ln_final = text.visual = None
    pixels = torch.zeros(2, 3, *model.config.pixels, dtype=torch.uint8)
    tokens = glip.tokenize(["", ""], model.config.context_length)
    files, rows = {}, {0: torch.export.Dim("rows", max=65_536)}
    for name, tower, example in (("image.pt2", image, pixels), ("text.pt2", text, tokens)):
        with torch.no_grad():
            program = torch.export.export(tower, (example,), dynamic_shapes=(rows,), strict=False)
        file = io.BytesIO()
        torch.export.save(program, file)
        files[name] = file.getvalue()
    return files


EXPORTS = {"open_clip": to_open_clip, "timm": to_timm, "hf": to_hf, "torch": to_torch}

# --- Reading weights that are not trusted ---------------------------------------------------------

STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "DoubleStorage": torch.float64,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
}  # fmt: skip


class Inert:
    """Stands for any class of a TorchScript archive: it keeps its fields and does nothing."""

    def __setstate__(self, state: dict) -> None:
        self.fields = state


class ArchiveReader(pickle.Unpickler):
    """Reads the tensors of a TorchScript archive; of its code nothing is loaded or run.

    torch.jit.load would compile and run it, so that it is not for files from elsewhere.
    """

    def __init__(self, archive: zipfile.ZipFile, root: str, room: int) -> None:
        self.archive, self.root, self.room, self.storages = archive, root, room, {}
        super().__init__(io.BytesIO(self.stored("data.pkl")))

    def stored(self, name: str) -> bytes:
        """A member, not compressed, all of them no larger than the file; else it may be a bomb."""
        member = self.archive.getinfo(f"{self.root}/{name}")
        self.room -= member.file_size
        if member.compress_type != zipfile.ZIP_STORED or self.room < 0:
            raise zipfile.BadZipFile("more than there is")
        return self.archive.read(member)

    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] == "__torch__":
            return Inert
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        known = {("torch", kind): dtype for kind, dtype in STORAGES.items()}
        known["torch._utils", "_rebuild_tensor_v2"] = lambda storage, offset, size, stride, *_: (
            storage.as_strided(size, stride, offset)
        )
        known["collections", "OrderedDict"] = dict
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return known[module, name]

    def persistent_load(self, saved: tuple) -> Tensor:
        _, dtype, key, _, _ = saved
        if key not in self.storages:
            content = bytearray(self.stored(f"data/{key}"))
            self.storages[key] = torch.frombuffer(content, dtype=dtype)
        return self.storages[key]


def tensors_of(thing: object, place: str = "") -> Weights:
    """The tensors inside an Inert, by the path of attributes that leads first to each."""
    found, fields, thing.fields = {}, thing.fields, {}  # walked once, however many lead there
    for name, value in fields.items():
        if isinstance(value, Tensor):
            found[place + name] = value
        elif isinstance(value, Inert):
            found |= tensors_of(value, f"{place}{name}.")
    return found


def torch_content(path: Path) -> object:
    """What torch.save or torch.jit.save wrote; no code in it is run."""
    if zipfile.is_zipfile(path):
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            for root, _, name in (x.rpartition("/") for x in archive.namelist()):
                if name == "constants.pkl":  # torch.jit.save's alone
                    return tensors_of(ArchiveReader(archive, root, size).load())
    return load_tensors(path)


def read_weights(path: Path) -> Weights:
    """Weights by name: safetensors, a TorchScript archive, or torch.save's; told by the content.

    Raises InputError for what is none of these, or torn; nothing in the file is executed.
    """
    from safetensors.torch import load_file

    try:
        with open(path, "rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"
        content = load_file(path) if is_safetensors else torch_content(path)
        while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        if not content or sum(v.nbytes for v in content.values()) > path.stat().st_size:
            raise ValueError("no weights, or views that claim more than there is")
        return {re.sub(r"^(module|_orig_mod)\.", "", name): v for name, v in content.items()}
    except Exception as error:  # many kinds, for torn, foreign and malicious files
        raise InputError(
            f"{path}: not a readable file of weights ({type(error).__name__}); nothing in it was "
            "executed; copy it anew, or save its state_dict with safetensors"
        ) from None


# --- Import: each function gives our configuration and weights, or refuses by name what we lack ---


def empty(config: GLIPConfig, weights: Weights) -> GLIP:
    """A model without memory, for names and shapes; ValueError for one that would take long."""
    if config.layers + config.text_layers > len(weights):
        raise ValueError("more layers than weights")
    with torch.device("meta"):
        return GLIP(config)


def fitted(config: GLIPConfig, weights: Weights, file: Path) -> GLIP:
    """The model in fp32; raises InputError naming the first weight that is missing or foreign."""
    model = empty(config, weights)
    for name in {"logit_scale", "logit_bias"} & weights.keys():
        weights[name] = weights[name].squeeze()
    wanted = {name: tuple(v.shape) for name, v in model.state_dict().items()}
    found = {name: tuple(v.shape) for name, v in weights.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise InputError(f"{file}: {name} is missing; copy the file anew")
        if name not in wanted:
            raise InputError(
                f"{file}: {name[:99]} is of an architecture that is not here: only ViT"
            )
        if found[name] != wanted[name]:
            raise InputError(
                f"{file}: {name} has shape {found[name]}, its config says {wanted[name]}: is that "
                "config its own?"
            )
    check_finite(weights, file)
    model.load_state_dict({k: v.float().contiguous() for k, v in weights.items()}, assign=True)
    return model


def from_openai(file: Path, config: str) -> tuple[GLIPConfig, Weights]:
    """OpenAI's published file, or its state_dict: sizes are in the shapes, heads have width 64."""
    if config:
        raise InputError("--from openai needs no --config: the sizes are in the weights' shapes")
    extra = ("input_resolution", "context_length", "vocab_size")
    weights = {k: v for k, v in read_weights(file).items()
               if k not in extra and not k.endswith("attn_mask")}  # fmt: skip
    if any(name.startswith("visual.layer1.") for name in weights):
        raise InputError(f"{file}: a ResNet; only ViT are taken")

    def shape(name: str, dimensions: int) -> torch.Size:
        if name not in weights or weights[name].ndim != dimensions:
            raise InputError(f"{file}: no {name} of {dimensions} dimensions; not OpenAI's CLIP")
        return weights[name].shape

    width, _, patch, _ = shape("visual.conv1.weight", 4)
    side = round((shape("visual.positional_embedding", 2)[0] - 1) ** 0.5)
    depth = [sum(k.startswith(x) and k.endswith(".attn.in_proj_weight") for k in weights)
             for x in ("visual.transformer.", "transformer.")]  # fmt: skip
    vocabulary, text_width = shape("token_embedding.weight", 2)
    return GLIPConfig(
        side * patch, patch, width, depth[0], width // 64, shape("text_projection", 2)[1],
        text_width, depth[1], text_width // 64, shape("positional_embedding", 2)[0], vocabulary,
        quick_gelu=True,
    ), weights  # fmt: skip


def from_open_clip(file: Path, config: str) -> tuple[GLIPConfig, Weights]:
    """open_clip's weights, by the config beside them, or --config FILE or NAME of its models."""
    import open_clip
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg
    from open_clip.transform import PreprocessCfg

    if config and not Path(config).is_file():
        cfg, where, preprocess = open_clip.get_model_config(config), f"--config {config}", {}
        if cfg is None:
            raise InputError(
                f"--config {config} is neither a file nor one of open_clip's models, such as "
                "ViT-B-16 or ViT-B-16-quickgelu"
            )
    else:
        where = Path(config or file.parent / "open_clip_config.json")
        if not where.is_file():
            raise InputError(
                f"{file}: no {where.name} beside it: name one, or the open_clip model that it was "
                "trained as, by --config"
            )
        whole = read_json(where)
        cfg, preprocess = whole.get("model_cfg", whole), whole.get("preprocess_cfg", {})
    used = {"image_size", "layers", "width", "head_width", "patch_size", "context_length",
            "vocab_size", "heads", "patch_dropout"}  # fmt: skip
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    if isinstance(vision.get("layers"), list):
        raise InputError(f"{where}: a ResNet; only ViT are taken")
    refuse_others(vision, asdict(CLIPVisionCfg()), used, where)
    refuse_others(text, asdict(CLIPTextCfg()), used, where)
    refuse_others(
        cfg, {"custom_text": False}, {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu",
        "init_logit_scale", "init_logit_bias"}, where,
    )  # fmt: skip
    refuse_others(preprocess, asdict(PreprocessCfg()), {"size"}, where)
    vision, text = asdict(CLIPVisionCfg()) | vision, asdict(CLIPTextCfg()) | text
    size, weights = vision["image_size"], read_weights(file)
    return GLIPConfig(
        tuple(size) if isinstance(size, list) else size, vision["patch_size"], vision["width"],
        vision["layers"], vision["width"] // vision["head_width"], cfg["embed_dim"], text["width"],
        text["layers"], text["heads"], text["context_length"], text["vocab_size"],
        siglip="logit_bias" in weights, quick_gelu=bool(cfg.get("quick_gelu")),
    ), weights  # fmt: skip


def from_hf(file: Path, config: str) -> tuple[GLIPConfig, Weights]:
    """transformers' CLIPModel, by the config.json beside its file of weights."""
    where = Path(config) if config else file.parent / "config.json"
    whole = read_json(where)
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
        refuse_others({k: found[k] for k in like_ours}, like_ours, set(), where)
    pixels = file.parent / "preprocessor_config.json"
    if pixels.is_file():
        like_ours = {"image_mean": glip.MEAN, "image_std": glip.STD, "resample": 3}
        found = read_json(pixels)
        refuse_others({k: found[k] for k in like_ours if k in found}, like_ours, set(), pixels)
    weights = read_weights(file)
    return ours, weights_from_hf(weights, empty(ours, weights).state_dict())


def read_json(path: Path) -> dict:
    """An object from a JSON file; else InputError."""
    try:
        content = json.loads(read_regular(path, 2**24))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable JSON file ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: no JSON object")
    return content


def refuse_others(found: dict, like_ours: dict, used: set[str], where: object) -> None:
    """Raise InputError for a setting, but those used, that is not as our towers are."""
    for name in found.keys() - used:
        value, ours = (tuple(x) if isinstance(x, list) else x
                       for x in (found[name], like_ours.get(name)))  # fmt: skip
        if value != ours:
            raise InputError(
                f"{where}: {name} is {value!r}, which is not supported: the towers here are the "
                f"plain ViT CLIP's, where it is {ours!r}"
            )


IMPORTS = {"open_clip": from_open_clip, "openai": from_openai, "hf": from_hf}

# --- The commands ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's model as a folder that another library loads, with a model card."""

    run: Annotated[Path, tyro.conf.Positional]  # folder of a run, or one of its .pt files
    to: Literal[tuple(EXPORTS)]  # whose form; torch: both towers by torch.export
    out: Path  # folder to write, new or empty


@dataclass(frozen=True)
class ImportConfig:
    """Make a run of published weights: to evaluate, probe, tune under any mask, or export."""

    file: Annotated[Path, tyro.conf.Positional]  # weights, or their folder
    source: Annotated[Literal[tuple(IMPORTS)], tyro.conf.arg(name="from")]  # who wrote them
    out: Path  # folder of the run to write, new or empty
    config: str = ""  # its JSON file, or the name of an open_clip model (default: what is beside)


@dataclass(frozen=True)
class InfoConfig:
    """Tell what a checkpoint is, its size, and its training record."""

    file: Annotated[Path, tyro.conf.Positional]  # a file of weights, or a run's, an export's folder


def check_new(out: Path) -> None:
    """Raise InputError for an --out that would write over something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} is there already, and not empty: choose another")


# as transformers and timm call them, transformers once did, and open_clip does
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")


def weights_in(path: Path, *names: str) -> Path:
    """The file itself, or of a folder the first of these names; raises InputError without one."""
    files, lack = [path], "there is no such file"
    if path.is_dir():
        files, lack = [path / name for name in names], f"no {' or '.join(names)} in it"
    if not any(file.is_file() for file in files):
        raise InputError(f"{path}: {lack}; name a file of weights (a .pt2 is a program)")
    return next(file for file in files if file.is_file())


def export(options: ExportConfig) -> None:
    """`convert.py export`."""
    check_new(options.out)
    path = weights_in(options.run, "model.pt")
    content = glip.load_checkpoint(path)
    model = glip.build(content)
    files = EXPORTS[options.to](model)
    files["README.md"] = card(options.to, path, content, model.config).encode()
    with files.room_for(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        files.write_bytes(options.out / name, content)
    print(f"wrote {options.out}: {', '.join(files)}")


def import_(options: ImportConfig) -> None:
    """`convert.py import`: a run of no steps, whose record is the defaults'."""
    check_new(options.out)
    file = weights_in(options.file, *WEIGHTS)
    try:
        config, weights = IMPORTS[options.source](file, options.config)
        model = fitted(config, weights, file)
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        raise InputError(f"{file}: its config describes no model of its weights") from None
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    with files.room_for(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    record = TrainConfig(
        mask="none", mask_ratio=0.0, steps=0, tune_epochs=0.0, model=architecture(config),
        context_length=config.context_length,
    )  # fmt: skip
    glip.save_checkpoint(
        options.out / "model.pt", model, stage="import", step=0, steps={}, seconds={}, world=1,
        bf16=False, mask=Masker().state(), config=asdict(record),
        machine=machine(torch.device("cpu")),
        command=f"python -m tools.convert import {file.name} --from {options.source}",
        imported={"file": file.name, "from": options.source, "sha256": digest},
    )  # fmt: skip
    content = glip.load_checkpoint(options.out / "model.pt")
    cli.say(f"wrote {options.out}/model.pt: {facts(content, config)['architecture']}")


KINDS = {  # a name that tells who wrote weights
    "visual.transformer.resblocks.0.ln_1.weight": "CLIP by OpenAI's and open_clip's names",
    "vision_model.encoder.layers.0.layer_norm1.weight": "CLIP by transformers' names",
    "blocks.0.attn.qkv.weight": "a ViT by timm's names",
}


def info(options: InfoConfig) -> None:
    """`convert.py info`."""
    path = weights_in(options.file, "model.pt", *WEIGHTS)
    try:
        content = glip.load_checkpoint(path)
        weights, kind = content["model"], "a checkpoint of nanoGLIP"
        told = facts(content, GLIPConfig(**content["model_config"]))
    except InputError:
        weights = read_weights(path)
        kind = next((kind for name, kind in KINDS.items() if name in weights), "unknown to us")
        told = {"parameters": f"{sum(v.numel() for v in weights.values()):,}"}
    types = ", ".join(sorted({str(v.dtype).removeprefix("torch.") for v in weights.values()}))
    size = f"{path.stat().st_size:,} bytes, {len(weights)} tensors, {types}"
    for line in (f"{path}: {kind}; {size}", *(f"  {name}: {told[name]}" for name in told)):
        print(cli.printable(line))


COMMANDS = {
    "export": (export, ExportConfig), "import": (import_, ImportConfig), "info": (info, InfoConfig),
}  # fmt: skip


@cli.guarded
def main() -> None:
    """export, import, info: bad input is one sentence and exit code 2."""
    name, arguments = next(iter(sys.argv[1:2]), ""), sys.argv[2:]
    if name not in COMMANDS:
        print(__doc__, file=sys.stdout if name == "--help" else sys.stderr)
        sys.exit(0 if name == "--help" else 2)
    run, config = COMMANDS[name]
    run(tyro.cli(config, args=arguments, prog=f"convert.py {name}"))


if __name__ == "__main__":
    main()
