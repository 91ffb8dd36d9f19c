"""GLIP, Gaussian masking for language-image pre-training: the whole method in one file.

    picture -> N patches -> a mask keeps K of them, more often near the centre
            -> K patch projections + positions, class token -> transformer -> image_features (B, E)
    caption -> T tokens -> causal transformer -> end token  ----------------> text_features  (B, E)
    loss    =  symmetric cross-entropy of the (B, B) similarities; nothing is reconstructed

Liang & Larson, ECML-PKDD 2024, arXiv 2403.15837. (Not Grounded Language-Image Pre-training.)

Shapes: B pairs, N patches of a (rows, columns) grid, K kept patches, T tokens, D tower width,
h heads, E joint width. `mask_ratio` is the share of patches that is removed.
"""

import gzip
import html
import inspect
import io
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import ftfy
import regex
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP's normalisation, red green blue
STD = (0.26862954, 0.26130258, 0.27577711)


class InputError(ValueError):
    """Bad input, told in one sentence with the remedy; the scripts print it and exit with 2."""


# ------------------------------------------------------------------------------------------------
# Masking: a strategy turns uniform noise (B, N) into scores (B, N); the K highest are kept.
# What else a strategy needs (sigma, pixels, ...) it declares as further parameters. Where some kept
# patches are only fillers it returns (scores, hidden), hidden (B, N) bool.
# ------------------------------------------------------------------------------------------------


def none_scores(noise: Tensor, grid: tuple[int, int]) -> Tensor:
    """CLIP: no mask; every patch is kept, in reading order. noise (B, N) -> scores (B, N)."""
    return -torch.arange(noise.shape[1], device=noise.device).expand_as(noise)


def random_scores(noise: Tensor, grid: tuple[int, int]) -> Tensor:
    """FLIP (2212.00794): every patch is equally likely. noise (B, N) -> scores (B, N)."""
    return noise


def gaussian_scores(noise: Tensor, grid: tuple[int, int], sigma: float | tuple) -> Tensor:
    """GLIP: noise plus a normal density centred on the picture. noise (B, N) -> scores (B, N).

    The patch centres span [-1, 1] on each axis; sigma is the density's VARIANCE, as in the authors'
    code (their 0.2 is a standard deviation of 0.447), one value or (rows, columns). Because the
    density is added to the noise, sigma sets the width and the strength of the centre's advantage.
    This is not weighted sampling without replacement, which would add Gumbel noise to the density's
    logarithm and, at sigma 0.1 and 50 %, keep the rim six times less often.
    """
    across_rows, across_columns = sigma if isinstance(sigma, tuple | list) else (sigma, sigma)
    if not (across_rows > 0 and across_columns > 0):
        raise InputError(f"sigma {sigma} is a variance and must be above 0")
    y = centres(grid[0], noise.device)[:, None] ** 2 / across_rows             # (rows, 1)
    x = centres(grid[1], noise.device)[None, :] ** 2 / across_columns          # (1, columns)
    peak = 1 / (2 * math.pi * math.sqrt(across_rows * across_columns))
    return noise + (peak * torch.exp(-(y + x) / 2)).flatten()                  # (B, N)


def centres(n: int, device: torch.device) -> Tensor:
    """Patch centres along one axis: n numbers over [-1, 1], the outermost exactly at the ends."""
    return torch.linspace(-1, 1, n, device=device) if n > 1 else torch.zeros(1, device=device)


MASKS = {
    "none": none_scores,
    "random": random_scores,
    "gaussian": gaussian_scores,
}


def num_keep(n: int, mask_ratio: float) -> int:
    """Patches kept of n, at least one: 98, 49, 16 of 196 at 50, 75, 91.8 %."""
    if not 0 <= mask_ratio < 1:
        raise InputError(f"mask ratio {mask_ratio} is outside [0, 1): it is the share removed")
    return max(1, round(n * (1 - mask_ratio)))


def sample_mask(
    mask: str,
    batch: int,
    grid: int | tuple[int, int],
    mask_ratio: float,
    *,
    sigma: float | tuple[float, float] = 0.2,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    **inputs: object,
) -> tuple[Tensor, Tensor | None]:
    """Choose the kept patches: ids_keep (B, K) int64, and visible (B, K) bool or None for all.

    A pure function of `noise` (B, N), uniform in [0, 1), drawn from `generator` if absent; `grid`
    is patches a side or (rows, columns); `inputs` holds whatever else the mask's row declares.
    Raises InputError for an unknown mask, a ratio outside [0, 1), or an input that is missing.
    """
    if mask not in MASKS:
        raise InputError(f"unknown mask '{mask}': choose one of {', '.join(MASKS)}")
    grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
    n = grid[0] * grid[1]
    if noise is None:
        device = generator.device if generator else None
        noise = torch.rand(batch, n, generator=generator, device=device)
    if tuple(noise.shape) != (batch, n):
        raise InputError(f"noise has shape {tuple(noise.shape)}, the mask needs {(batch, n)}")
    inputs["sigma"] = sigma
    declared = list(inspect.signature(MASKS[mask]).parameters.values())[2:]
    given = {p.name: inputs[p.name] for p in declared if inputs.get(p.name) is not None}
    missing = [p.name for p in declared if p.default is p.empty and p.name not in given]
    if missing:
        raise InputError(f"mask '{mask}' needs {' and '.join(missing)}, which was not given")
    scores = MASKS[mask](noise, grid, **given)
    scores, hidden = scores if isinstance(scores, tuple) else (scores, None)
    k = n if mask == "none" else num_keep(n, mask_ratio)
    ids_keep = scores.topk(k, dim=1).indices                                   # (B, K)
    return ids_keep, None if hidden is None else ~hidden.gather(1, ids_keep)


def sample_ids_keep(*args: object, **kwargs: object) -> Tensor:
    """The first element of sample_mask, same arguments: ids_keep (B, K)."""
    return sample_mask(*args, **kwargs)[0]


# ------------------------------------------------------------------------------------------------
# Configuration
# ------------------------------------------------------------------------------------------------

SIZES = {
    # name: image_size, patch_size, width, layers, heads, embed_dim, text width, layers, heads
    # The published sizes are open_clip's of the same name; Ti is DeiT's tiny tower, nano our demo.
    "ViT-nano-8": (64, 8, 192, 3, 3, 128, 128, 3, 2),
    "ViT-Ti-16": (224, 16, 192, 12, 3, 192, 192, 12, 3),
    "ViT-S-16": (224, 16, 384, 12, 6, 384, 384, 12, 6),
    "ViT-B-32": (224, 32, 768, 12, 12, 512, 512, 12, 8),
    "ViT-B-16": (224, 16, 768, 12, 12, 512, 512, 12, 8),
    "ViT-L-16": (224, 16, 1024, 24, 16, 768, 768, 12, 12),
    "ViT-L-14": (224, 14, 1024, 24, 16, 768, 768, 12, 12),
    "ViT-H-14": (224, 14, 1280, 32, 16, 1024, 1024, 24, 16),
}


@dataclass(frozen=True)
class GLIPConfig:
    """What the two towers are made of; the default is ViT-B/16 at 224 pixels."""

    image_size: int | tuple[int, int] = 224  # pixels a side, or (height, width)
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    embed_dim: int = 512
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    context_length: int = 77
    vocab_size: int = 49408

    @staticmethod
    def named(model: str, image_size: int | tuple[int, int] | None = None) -> "GLIPConfig":
        """The configuration of a row of SIZES, at its own or another image size (pixels)."""
        if model not in SIZES:
            raise InputError(f"unknown model '{model}': choose one of {', '.join(SIZES)}")
        return GLIPConfig(image_size or SIZES[model][0], *SIZES[model][1:])

    @property
    def pixels(self) -> tuple[int, int]:
        """(height, width) of the pictures."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches; raises InputError where patches do not tile the picture."""
        if any(side < 1 or side % self.patch_size for side in self.pixels):
            raise InputError(
                f"image size {self.image_size} is not a multiple of the patch size "
                f"{self.patch_size}: choose another --image-size"
            )
        return self.pixels[0] // self.patch_size, self.pixels[1] // self.patch_size


# ------------------------------------------------------------------------------------------------
# Tokenizer: CLIP's lower-cased byte-level byte-pair encoding
# ------------------------------------------------------------------------------------------------

START, END = 49406, 49407
SPECIAL = ("<start_of_text>", "<end_of_text>")
WORD = regex.compile(
    "|".join(SPECIAL) + r"|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)


@lru_cache
def vocabulary() -> tuple[dict[int, str], dict[str, int], dict[tuple[str, str], int]]:
    """(byte -> character, piece -> id, pair -> rank), read from the open_clip wheel's table."""
    spec = find_spec("open_clip")  # finds the folder without importing the package
    if spec is None:
        raise InputError("the tokenizer's table is missing: pip install open_clip_torch")
    table = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(table.read_bytes()).decode("utf-8").split("\n")
    pairs = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    # Bytes that print stand for themselves; the others get characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = dict(zip(printable, map(chr, printable), strict=True))
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    alphabet = list(letters.values())
    pieces = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in pairs]
    ids = {piece: i for i, piece in enumerate([*pieces, *SPECIAL])}
    return letters, ids, {pair: rank for rank, pair in enumerate(pairs)}


@lru_cache(maxsize=100_000)
def encode_word(word: str) -> tuple[int, ...]:
    """Merge the pair of lowest rank until none is left; one word -> its token ids."""
    letters, ids, ranks = vocabulary()
    if word in SPECIAL:
        return (ids[word],)
    pieces = [letters[byte] for byte in word.encode("utf-8")]
    pieces[-1] += "</w>"
    while len(pieces) > 1:
        pair = min(pairwise(pieces), key=lambda p: ranks.get(p, math.inf))
        if pair not in ranks:
            break
        merged, i = [], 0
        while i < len(pieces):
            whole = tuple(pieces[i : i + 2]) == pair
            merged.append("".join(pair) if whole else pieces[i])
            i += 2 if whole else 1
        pieces = merged
    return tuple(ids[piece] for piece in pieces)


def tokenize(texts: str | list[str], context_length: int = 77) -> Tensor:
    """Texts -> token ids (n, context_length) int64: start, words, end, zeros; too long is cut."""
    texts = [texts] if isinstance(texts, str) else texts
    tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, text in zip(tokens, texts, strict=True):
        ids = [START, *encode(text)[: context_length - 2], END]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


@lru_cache(maxsize=100_000)
def encode(text: str) -> tuple[int, ...]:
    """Clean a text and encode its words; nothing is added or cut."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    words = WORD.findall(" ".join(text.split()).lower())
    return tuple(i for word in words for i in encode_word(word))


def lengths(tokens: Tensor) -> Tensor:
    """Tokens of each text, start and end included; 0 is a word too, so none is counted. (n, T)."""
    return tokens.argmax(dim=1) + 1  # the end token has the highest id


# ------------------------------------------------------------------------------------------------
# Towers: open_clip's ViT CLIP, parameter names included, so that weights carry over one to one
# ------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention. x (B, T, D), allowed (..., T) bool or None -> (B, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)              # (B, T, 3D)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, h, T, D/h)
        if x.is_cuda:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        else:  # at CLIP's lengths the CPU's fused kernel takes longer than plain products
            logits = (q * q.shape[-1] ** -0.5) @ k.mT                          # (B, h, T, T)
            if allowed is not None:
                logits = logits.masked_fill(~allowed, -math.inf)
            y = logits.softmax(-1) @ v
        return self.out_proj(y.transpose(1, 2).flatten(2))                     # (B, T, D)


class MLP(nn.Module):
    """Two linear maps with a GELU between, four times as wide inside. (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Pre-norm transformer block. (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)
        residual = width**-0.5 * (2 * layers) ** -0.5  # OpenAI CLIP's initialisation
        nn.init.normal_(self.attn.out_proj.weight, std=residual)
        nn.init.zeros_(self.attn.out_proj.bias)
        nn.init.normal_(self.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.mlp.c_proj.weight, std=residual)

    def forward(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), allowed)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks, shared by both towers. (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, layers) for _ in range(layers))

    def forward(self, x: Tensor, allowed: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, allowed)
        return x


class ImageTower(nn.Module):
    """Vision transformer that computes kept patches only."""

    def __init__(self, config: GLIPConfig) -> None:
        super().__init__()
        width, (rows, columns) = config.width, config.grid
        self.config = config
        self.conv1 = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(
            torch.randn(1 + rows * columns, width) * width**-0.5
        )
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.layers, config.heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, config.embed_dim) * width**-0.5)

    def forward(self, images: Tensor, ids_keep: Tensor | None, visible: Tensor | None) -> Tensor:
        """images (B, 3, H, W), ids_keep and visible (B, K) -> (B, E)."""
        patches = gather_patches(images, self.config, ids_keep)                # (B, K, 3pp)
        x = F.linear(normalise(patches), self.conv1.weight.flatten(1))         # (B, K, D)
        positions = self.positional_embedding.to(x.dtype)
        x = x + (positions[1:] if ids_keep is None else positions[1:][ids_keep])
        first = (self.class_embedding.to(x.dtype) + positions[0]).expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([first, x], dim=1))                          # (B, 1 + K, D)
        x = self.transformer(x, None if visible is None else attend_to(visible))
        return self.ln_post(x[:, 0]) @ self.proj                               # (B, E)


def gather_patches(images: Tensor, config: GLIPConfig, ids_keep: Tensor | None) -> Tensor:
    """Cut kept patches out of pictures. (B, 3, H, W), (B, K) -> (B, K, 3pp), the dtype unchanged.

    The paper masks after the position embedding; projection and position act on each patch alone,
    so that to gather pixels first gives the same tokens, and a masked patch costs nothing.
    """
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, *config.pixels):
        raise InputError(
            f"pictures have shape {tuple(images.shape)}, the model takes (B, 3, "
            f"{config.pixels[0]}, {config.pixels[1]}): resize them or load_model(image_size=...)"
        )
    (rows, columns), p = config.grid, config.patch_size
    patches = images.unflatten(3, (columns, p)).unflatten(2, (rows, p))        # (B, 3, R, p, C, p)
    patches = patches.permute(0, 2, 4, 1, 3, 5)                                # (B, R, C, 3, p, p)
    if ids_keep is None:
        return patches.reshape(len(images), rows * columns, -1)                # (B, N, 3pp)
    samples = torch.arange(len(images), device=images.device)[:, None]
    return patches[samples, ids_keep // columns, ids_keep % columns].flatten(2)  # (B, K, 3pp)


def normalise(patches: Tensor) -> Tensor:
    """Bytes, or floats in [0, 1], -> floats of CLIP's mean 0 and deviation 1. (B, K, 3pp)."""
    scale = 255.0 if patches.dtype == torch.uint8 else 1.0
    x = patches.unflatten(-1, (3, -1))                                         # (B, K, 3, pp)
    x = x.float() if x.dtype == torch.uint8 else x
    mean, std = (torch.tensor(c, device=x.device, dtype=x.dtype)[:, None] for c in (MEAN, STD))
    return ((x - scale * mean) / (scale * std)).flatten(2)


def attend_to(visible: Tensor) -> Tensor:
    """Hide fillers from every query; the class token stays. visible (B, K) -> (B, 1, 1, 1 + K)."""
    return F.pad(visible, (1, 0), value=True)[:, None, None, :]


def at_least_fp32(x: Tensor) -> Tensor:
    """Undo a lower precision of autocast: norms, similarities and the loss want fp32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class GLIP(nn.Module):
    """The two towers and the temperature. `GLIP(config)`; see forward."""

    def __init__(self, config: GLIPConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GLIPConfig()
        width = config.text_width
        self.visual = ImageTower(config)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(config.context_length, width) * 0.01)
        self.transformer = Transformer(width, config.text_layers, config.text_heads)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, config.embed_dim) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(
        self, images: Tensor, ids_keep: Tensor | None = None, visible: Tensor | None = None
    ) -> Tensor:
        """Pictures (B, 3, H, W), uint8 or floats in [0, 1] -> image_features (B, E).

        With ids_keep (B, K) only those patches are seen; where visible (B, K) is False, the patch
        is a filler that nothing attends to. Raises InputError for pictures of another size.
        """
        return F.normalize(at_least_fp32(self.visual(images, ids_keep, visible)), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T), T up to context_length -> text_features (B, E).

        Attention is causal and the end token is read, so zeros behind it may be cut off beforehand.
        """
        length = tokens.shape[1]
        if length > self.config.context_length:
            raise InputError(f"{length} tokens, the model takes {self.config.context_length}")
        x = self.token_embedding(tokens) + self.positional_embedding[:length]  # (B, T, D)
        before = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        x = self.ln_final(self.transformer(x, before))
        x = x[torch.arange(len(x), device=x.device), lengths(tokens) - 1]      # (B, D)
        return F.normalize(at_least_fp32(x @ self.text_projection), dim=-1)    # (B, E)

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        ids_keep: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures and token ids -> image_features (B, E), text_features (B, E), logit_scale."""
        image_features = self.encode_image(images, ids_keep, visible)
        return image_features, self.encode_text(tokens), self.logit_scale.exp()

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the temperature's inverse within [1, 100], as CLIP does after every update."""
        self.logit_scale.clamp_(0, math.log(100))


# ------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------


class Gather(torch.autograd.Function):
    """Join every process's features, gradients included. (B, E) -> (processes x B, E)."""

    @staticmethod
    def forward(ctx: object, features: Tensor) -> Tensor:
        parts = [torch.empty_like(features) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, features.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        # Every process's loss depends on these features: without the sum the gradient is wrong
        # although the loss is right.
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE in fp32 over the joint batch. (B, E), (B, E), () -> scalar.

    Under torch.distributed each process scores its own rows against everybody's columns. The mean
    of the losses over processes, and of the gradients (which DDP takes), are the single process's.
    """
    joined = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    image_features, text_features = at_least_fp32(image_features), at_least_fp32(text_features)
    with torch.autocast(image_features.device.type, enabled=False):
        all_images = Gather.apply(image_features) if joined else image_features
        all_texts = Gather.apply(text_features) if joined else text_features
        to_text = logit_scale * image_features @ all_texts.T                   # (B, G)
        to_image = logit_scale * text_features @ all_images.T                  # (B, G)
        own = torch.arange(len(to_text), device=to_text.device)
        own = own + (dist.get_rank() * len(to_text) if joined else 0)
        return (F.cross_entropy(to_text, own) + F.cross_entropy(to_image, own)) / 2


# ------------------------------------------------------------------------------------------------
# Save and load: plain dicts and tensors
# ------------------------------------------------------------------------------------------------


def write_safely(path: Path | str, write: Callable[[io.BufferedWriter], object]) -> None:
    """Let `write(file)` fill a temporary file, flush it to disk, and only then give it its name."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_bytes(path: Path | str, content: bytes) -> None:
    """write_safely for content that is at hand."""
    write_safely(path, lambda file: file.write(content))


def save_checkpoint(path: Path | str, model: GLIP, **state: object) -> None:
    """Write {"model_config", "model", **state}; state holds plain values and tensors."""
    content = {"model_config": asdict(model.config), "model": model.state_dict(), **state}
    write_safely(path, lambda file: torch.save(content, file))


def load_checkpoint(path: Path | str) -> dict:
    """Read a file of save_checkpoint, executing nothing in it; else raise InputError."""
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for torn, foreign and malicious files
        raise InputError(
            f"{path}: not a readable nanoGLIP checkpoint ({type(error).__name__}); nothing in it "
            "was executed; train again or copy the file anew"
        ) from None
    if not isinstance(content, dict) or not {"model_config", "model"} <= content.keys():
        raise InputError(f"{path}: a checkpoint of another program; name one that train.py wrote")
    return content


def load_model(
    path: Path | str, image_size: int | tuple[int, int] | None = None
) -> tuple[GLIP, GLIPConfig]:
    """Rebuild a model from its file alone, positions resampled to image_size (pixels) if given.

    Raises InputError for a file that is missing, torn, foreign or not what its config says.
    """
    content = load_checkpoint(path)
    try:
        model = GLIP(GLIPConfig(**content["model_config"]))
        model.load_state_dict(content["model"])
    except InputError:
        raise
    except Exception as error:
        known = ", ".join(field.name for field in fields(GLIPConfig))
        raise InputError(
            f"{path}: its weights do not fit its model_config ({type(error).__name__}; known "
            f"settings: {known}); name a checkpoint that train.py wrote"
        ) from None
    if image_size is not None:
        model = resized(model, image_size)
    return model.eval(), model.config


def resized(model: GLIP, image_size: int | tuple[int, int]) -> GLIP:
    """The same model for pictures of another size (pixels), positions resampled as in open_clip."""
    config, weights = replace(model.config, image_size=image_size), model.state_dict()
    name = "visual.positional_embedding"
    weights[name] = resample_positions(weights[name], model.config.grid, config.grid)
    other = GLIP(config)
    other.load_state_dict(weights)
    return other


def resample_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resample positions to another grid, bicubic, class token kept. (1+N, D) -> (1+M, D)."""
    if old == new:
        return table
    grid = table[1:].unflatten(0, old).permute(2, 0, 1)[None]                  # (1, D, R, C)
    grid = F.interpolate(grid, new, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:1], grid[0].flatten(1).T])
