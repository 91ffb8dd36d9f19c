"""The model card of an export, and the training record that it shows."""

import re
from dataclasses import replace
from pathlib import Path

from glip import SIZES, GLIPConfig
from nanoglip import results
from nanoglip.cli import printable
from nanoglip.files import FOREIGN


def architecture(config: GLIPConfig) -> str:
    """The name in SIZES of a model's towers, whatever its inputs and activation; else a text."""
    for name in SIZES:
        plain = GLIPConfig.named(name, config.image_size, config.context_length)
        if replace(config, siglip=False, quick_gelu=False) == plain:
            return name
    return f"ViT of {config.layers} layers of width {config.width}, patches of {config.patch_size}"


def facts(content: dict, config: GLIPConfig) -> dict[str, str]:
    """Name -> text: the model in a checkpoint and how it was made."""
    counts = {name: v.numel() for name, v in content["model"].items()}
    image = sum(n for name, n in counts.items() if name.startswith("visual."))
    total, pixels = sum(counts.values()), " x ".join(map(str, config.pixels))
    found = {
        "architecture": f"{architecture(config)}; pictures of {pixels} pixels, patches of "
        f"{config.patch_size}; {config.context_length} tokens; {config.embed_dim} features; "
        + ("QuickGELU" if config.quick_gelu else "GELU") + "; a logit bias" * config.siglip,
        "parameters": f"{total:,} (image {image:,}, text {total - image:,})",
    }
    try:
        return found | training(content)
    except FOREIGN:
        return found | {"training record": "not readable"}


def training(content: dict) -> dict[str, str]:
    """Name -> text: what a checkpoint records of its training, or of its import."""
    if source := content.get("imported"):
        return {"imported": f"{source['file']}, {source['from']}'s, sha256 {source['sha256']}"}
    if "command" not in content:
        return {}
    run, machine = results.portable(content["config"]), content["machine"]
    names = ("data", "vendors", "held_out", "mask", "mask_ratio", "seed", "init")
    hours = sum(content["seconds"].values()) / 3600
    return {name.replace("_", " "): run[name] for name in names} | {
        "steps": ", ".join(f"{n:,} {stage}" for stage, n in content["steps"].items()),
        "trained": f"{hours:.2f} hours on {content['world']} x {machine['device']} "
        f"({machine['cpu']}), {'bf16' if content['bf16'] else 'fp32'}",
        "command": content["command"], "commit": machine["commit"] or "unknown",
    }  # fmt: skip


LIBRARY = {"open_clip": "open_clip", "timm": "timm", "hf": "transformers", "torch": "pytorch"}
LOADING = {
    "open_clip": """import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:.")
tokenizer = open_clip.get_tokenizer("local-dir:.")""",
    "timm": """import timm

model = timm.create_model("local-dir:.", pretrained=True).eval()  # features before normalisation
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))""",
    "hf": """from transformers import CLIPModel, CLIPProcessor

model, processor = CLIPModel.from_pretrained("."), CLIPProcessor.from_pretrained(".")""",
    "torch": """import torch

encode_image = torch.export.load("image.pt2").module()  # uint8 pictures of the model's size
encode_text = torch.export.load("text.pt2").module()  # CLIP's token ids""",
}

CARD = """---
library_name: {library}
license: other
license_name: see-licence-below
tags: [clip, nanoglip]
---

# {name}, by nanoGLIP

A CLIP model of nanoGLIP, an independent reproduction of GLIP (Gaussian masking for language-image
pre-training, arXiv 2403.15837), which is not Grounded Language-Image Pre-training.

```python
{loading}
```

## Model and training

{facts}

## Results

{results}

## Licence

nanoGLIP's code is under the MIT licence. The weights come with the conditions of their training
data, imported weights with their publisher's. Of the embedded emoji art, Google's is under
Apache-2.0 and Twitter's under CC BY 4.0; the other vendors' is not free, and weights trained on it
are for research and teaching.

## Limits

- The model knows its training data only. Do not use it for decisions about people.
- Texts are lower-cased and cut to the number of tokens above; pictures are resized (bicubic) and
  cropped at the centre.
- Masks are used in training only: this model sees whole pictures.
- The tokenizer for transformers does not repair mojibake and HTML entities, as open_clip's and
  nanoGLIP's do: such texts have other tokens. Load it by CLIPProcessor or AutoTokenizer:
  CLIPTokenizer builds another one, which also leaves typographic quotes as they are.
"""


def plain(text: object) -> str:
    """Text that Markdown shows as it is: no heading, link, picture, HTML or column."""
    return re.sub(r"([\\`<\[|])", r"\\\1", printable(text))


def card(to: str, path: Path, content: dict, config: GLIPConfig) -> str:
    """The model card of an export; its results are what evaluate.py wrote beside the model."""
    written = results.load("results", path.parent) if path.name == "model.pt" else {}
    rows = ["Not evaluated on held-out pairs before the export."]
    if tables := written.get("held_out"):  # absent after an evaluation on published sets only
        names = " | ".join(map(plain, tables))
        rows = [f"| held-out pairs | {names} |", "| --- |" + " --- |" * len(tables)]
        for metric in next(iter(tables.values())):
            cells = " | ".join(f"{100 * table[metric]:.1f} %" for table in tables.values())
            rows.append(f"| {plain(metric)} | {cells} |")
    lines = (f"- {name}: {plain(value)}" for name, value in facts(content, config).items())
    return CARD.format(library=LIBRARY[to], name=architecture(config), loading=LOADING[to],
                       facts="\n".join(lines), results="\n".join(rows))  # fmt: skip
