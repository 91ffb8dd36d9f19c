"""What a checkpoint tells of itself, and the model card that goes with every export."""

import re
from dataclasses import replace
from pathlib import Path

import evaluate
from glip import SIZES, GLIPConfig
from nanoglip.cli import printable


def architecture(config: GLIPConfig) -> str:
    """The name in SIZES of what a model is made of; sizes of inputs and activation aside."""
    for name in SIZES:
        plain = GLIPConfig.named(name, config.image_size, config.context_length)
        if replace(config, siglip=False, quick_gelu=False) == plain:
            return name
    return f"ViT of {config.layers} layers of width {config.width}, patches of {config.patch_size}"


def size_text(config: GLIPConfig) -> str:
    """Height and width of a model's pictures."""
    return " x ".join(map(str, config.pixels))


def facts(content: dict, config: GLIPConfig) -> dict[str, str]:
    """What a checkpoint of train.py or of an import tells of itself; name -> text."""
    weights = content["model"]
    image = sum(v.numel() for k, v in weights.items() if k.startswith("visual."))
    text = sum(v.numel() for v in weights.values()) - image
    found = {
        "architecture": f"{architecture(config)}; pictures of {size_text(config)} pixels, patches "
        f"of {config.patch_size}; {config.context_length} tokens; {config.embed_dim} features; "
        + ("QuickGELU" if config.quick_gelu else "GELU") + "; a logit bias" * config.siglip,
        "parameters": f"{image + text:,} (image {image:,}, text {text:,})",
    }
    try:
        return found | record(content)
    except (AttributeError, KeyError, TypeError, ValueError):
        return found | {"training record": "not readable"}


def record(content: dict) -> dict[str, str]:
    """What made a checkpoint, as it says."""
    found = {}
    if "imported" in content:
        source = content["imported"]
        found["imported"] = f"{source['file']}, {source['from']}'s, sha256 {source['sha256']}"
    elif content.keys() >= {"config", "steps", "seconds", "machine", "command"}:
        run, machine = evaluate.portable(content["config"]), content["machine"]
        hours = sum(content["seconds"].values()) / 3600
        found |= {
            "data": run["data"], "mask": f"{run['mask']}, {run['mask_ratio']:.1%} removed",
            "seed": str(run["seed"]),
            "steps": ", ".join(f"{n:,} {stage}" for stage, n in content["steps"].items()),
            "trained": f"{hours:.2f} hours on {content['world']} x {machine['device']} "
            f"({machine['cpu']}), {'bf16' if content['bf16'] else 'fp32'}",
            "command": content["command"], "commit": machine["commit"] or "unknown",
        }  # fmt: skip
        if str(run["data"]).startswith(("emoji", "scenes-")):
            vendors = ", ".join(run["vendors"]) or "all but those held out"
            found["vendors of the art"] = f"{vendors}; held out: {run['held_out']}"
        if run.get("init"):
            found["started from"] = run["init"]
    return found


LIBRARY = {"open_clip": "open_clip", "timm": "timm", "hf": "transformers", "torch": "pytorch"}

LOADING = {
    "open_clip": """import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:DIR")
tokenizer = open_clip.get_tokenizer("local-dir:DIR")""",
    "timm": """import timm

model = timm.create_model("local-dir:DIR", pretrained=True).eval()  # features before normalisation
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))""",
    "hf": """from transformers import CLIPModel, CLIPProcessor

model, processor = CLIPModel.from_pretrained("DIR"), CLIPProcessor.from_pretrained("DIR")""",
    "torch": """import torch

encode_image = torch.export.load("DIR/image.pt2").module()  # uint8 pictures of the model's size
encode_text = torch.export.load("DIR/text.pt2").module()  # CLIP's token ids""",
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

nanoGLIP's code is under the MIT licence. The weights come with the conditions of what they were
trained on, and imported ones with their publisher's. Of the embedded emoji art, Google's is under
Apache-2.0 and Twitter's under CC BY 4.0; the other vendors' is not free, and weights trained on it
are for research and teaching.

## Limits

- It knows what its data showed, and is not for decisions about people.
- Texts are lower-cased and cut to {tokens} tokens; pictures are resized (bicubic) and cut at the
  centre to {size} pixels, height by width.
- Masks act in training: this model sees whole pictures.
- The tokenizer for transformers repairs neither mojibake nor HTML entities, open_clip's and ours
  do: such texts have other tokens there. Load it by CLIPProcessor or AutoTokenizer: CLIPTokenizer
  builds another one, which leaves typographic quotes as they are, too.
"""


def plain(text: object) -> str:
    """Text for Markdown that stays text: no heading, link, picture, HTML or further column."""
    return re.sub(r"([\\`<\[|])", r"\\\1", printable(text))


def card(to: str, path: Path, content: dict, config: GLIPConfig) -> str:
    """The model card of an export; its results are what evaluate.py wrote beside the model."""
    rows, written = ["Not evaluated on held-out pairs before the export."], {}
    if path.name == "model.pt":
        written = evaluate.known_results(path.parent)
    if tables := written.get("held_out"):  # not there after published sets alone
        names = " | ".join(map(plain, tables))
        rows = [f"| held-out pairs | {names} |", "| --- |" + " --- |" * len(tables)]
        for metric in next(iter(tables.values())):
            cells = (f"{100 * table[metric]:.1f} %" for table in tables.values())
            rows.append(f"| {plain(metric)} | {' | '.join(cells)} |")
    return CARD.format(
        library=LIBRARY[to], name=architecture(config), loading=LOADING[to].replace("DIR", "."),
        facts="\n".join(f"- {k}: {plain(value)}" for k, value in facts(content, config).items()),
        results="\n".join(rows), tokens=config.context_length, size=size_text(config),
    )  # fmt: skip
