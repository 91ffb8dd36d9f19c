"""GLIP, Gaussian masking for language-image pre-training: the paper, top to bottom.

    noise    = uniform (B, N), a number for each of a picture's N patches
    density  = exp(-(x^2 + y^2) / (2 sigma)) / (2 pi sigma), x and y: patch centres on [-1, 1]
    ids_keep = the K highest of noise + density: the centre of a picture survives more often
    picture  -> K patch projections + positions, class token -> transformer -> image_features (B, E)
    caption  -> T tokens -> causal transformer -> end token ----------------> text_features  (B, E)
    loss     = symmetric cross-entropy of the (B, B) similarities; nothing is reconstructed
    at the end of training, a few steps with all N patches: unmasked tuning

Liang & Larson, ECML-PKDD 2024, arXiv 2403.15837. (Not Grounded Language-Image Pre-training.)
`glip_loss` is all of it in three lines; nanoglip/masks.py has other masks. Shapes: B pairs,
N patches of a (rows, columns) grid, K kept, T tokens of a text, P of all texts, D tower width,
h heads, E joint width. mask_ratio is the share of patches that is removed.
"""

import gzip
import html
import math
import os
import zipfile
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
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
from torch.utils.checkpoint import checkpoint


class InputError(ValueError):
    """Bad input: one sentence with the remedy. The scripts print it and exit with code 2."""


# --- Sizes ----------------------------------------------------------------------------------------

Size = int | tuple[int, int]  # pixels or patches a side, or (rows, columns)
SIZES = {  # image_size, patch_size, width, layers, heads, embed_dim, text width, layers, heads
    "ViT-pico-8": (48, 8, 192, 4, 3, 128, 128, 2, 2),
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

    image_size: Size = 224  # pixels a side, or (height, width)
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
    siglip: bool = False  # logits have a bias, and the scale begins at 10
    quick_gelu: bool = False  # x sigmoid(1.702 x) in GELU's place, as in OpenAI's weights

    @staticmethod
    def named(name: str, image_size: Size | None = None, context_length: int = 77) -> "GLIPConfig":
        """The configuration of a row of SIZES, at its own or another image size (pixels)."""
        if name not in SIZES:
            raise InputError(f"unknown model '{name}': choose one of {', '.join(SIZES)}")
        size, *rest = SIZES[name]
        return GLIPConfig(image_size or size, *rest, context_length=context_length)

    @property
    def pixels(self) -> tuple[int, int]:
        """(height, width) of the pictures."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches; raises InputError where patches do not tile the picture."""
        if any(side < 1 or side % self.patch_size for side in self.pixels):
            told = f"image size {self.image_size} is not a multiple of the patch size"
            raise InputError(f"{told} {self.patch_size}: choose another --image-size")
        return self.pixels[0] // self.patch_size, self.pixels[1] // self.patch_size


# --- Tokenizer: CLIP's lower-cased byte-level byte-pair encoding ----------------------------------

START, END = 49406, 49407
SPECIAL = ("<start_of_text>", "<end_of_text>")
RULE = r"|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
WORD = regex.compile("|".join(SPECIAL) + RULE, regex.IGNORECASE)


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
    letters = {i: chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))}
    others = [byte for byte in range(256) if byte not in letters]
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
        rank, i = min((ranks.get(pair, math.inf), i) for i, pair in enumerate(pairwise(pieces)))
        if rank == math.inf:
            break
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return tuple(ids[piece] for piece in pieces)


def tokenize(texts: str | list[str], context_length: int = 77) -> Tensor:
    """Texts -> token ids (n, context_length) int64: start, words, end, zeros; too long is cut."""
    texts = [texts] if isinstance(texts, str) else texts
    rows = [[START, *encode(text)[: context_length - 2], END] for text in texts]
    longest = max(map(len, rows), default=0)
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.long)
    return F.pad(tokens.view(len(rows), longest), (0, context_length - longest))


@lru_cache(maxsize=100_000)
def encode(text: str) -> tuple[int, ...]:
    """The token ids of a text; nothing is added or cut."""
    return tuple(i for word in words(text) for i in encode_word(word))


@lru_cache(maxsize=100_000)
def words(text: str) -> list[str]:
    """Clean a text, cut to 4,096 characters, and split it into the tokenizer's words."""
    text = html.unescape(html.unescape(ftfy.fix_text(text[:4096])))
    found = WORD.findall(" ".join(text.split()).lower())
    return [word[:1000] for word in found]  # merging the pieces of a long word is slow


def lengths(tokens: Tensor) -> Tensor:
    """Index of each text's end token + 1 (id 0 is a valid token, so none is counted). (n,)."""
    return tokens.argmax(dim=1) + 1  # the end token has the highest id


# --- The mask, and patches ------------------------------------------------------------------------

MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP's normalisation, red green blue
STD = (0.26862954, 0.26130258, 0.27577711)
MIN_SIGMA = 1e-6  # far below it the density is not finite in fp32


def gaussian_scores(
    noise: Tensor, grid: tuple[int, int], sigma: float | tuple[float, float] = 0.2,
    mask_center: tuple[float, float] = (0.0, 0.0),
) -> Tensor:  # fmt: skip
    """GLIP (2403.15837, method section): noise plus a normal density. (B, N) -> scores (B, N).

    The patch centres span [-1, 1] on each axis. sigma, one or two for (rows, columns), is the
    density's VARIANCE, as in the authors' code (their 0.2 is a standard deviation of 0.447), and
    mask_center is its mean. The density is added to the noise, so sigma sets both the width and
    the strength of the centre's advantage. This is not weighted sampling without replacement
    (masks.gumbel_scores), which at sigma 0.1 and 50 % keeps the rim six times less often.
    """
    log_weight, sigma = log_gaussian(grid, sigma, mask_center, noise.device)
    peak = 1 / (2 * math.pi * math.sqrt(math.prod(sigma)))
    return noise + peak * torch.exp(log_weight)                                # (B, N)


def log_gaussian(
    grid: tuple[int, int], sigma: float | tuple, center: tuple, device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, tuple[float, float]]:  # fmt: skip
    """Log of a Gaussian weight whose peak is 1, at the patch centres (N,); sigma as a pair."""
    pair = tuple(sigma) if isinstance(sigma, tuple | list) else (sigma, sigma)
    if len(pair) != 2 or len(center) != 2 or not all(MIN_SIGMA <= s < math.inf for s in pair):
        told = f"sigma {sigma} must be one or two variances above 0, at least {MIN_SIGMA}, and"
        raise InputError(f"{told} mask_center {center} a row and a column on [-1, 1]")
    ends = [(-1, 1) if n > 1 else (0, 0) for n in grid]  # the outermost patches lie exactly there
    axes = [torch.linspace(*e, n, device=device, dtype=dtype) for e, n in zip(ends, grid)]
    y, x = ((axis - c) ** 2 / (2 * s) for axis, c, s in zip(axes, center, pair, strict=True))
    return -(y[:, None] + x[None, :]).flatten(), pair


def num_keep(n: int, mask_ratio: float) -> int:
    """Patches kept of n, at least one: 98, 49, 16 of 196 at 50, 75, 91.8 %."""
    if not 0 <= mask_ratio < 1:
        raise InputError(f"mask ratio {mask_ratio} is outside [0, 1): it is the share removed")
    return max(1, round(n * (1 - mask_ratio)))


def sample_ids_keep(
    mask: str, batch: int, grid: Size, mask_ratio: float, *, sigma: float | tuple = 0.2,
    noise: Tensor | None = None, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """ids_keep (B, K) int64 of "none" (CLIP), "random" (FLIP) or "gaussian" (GLIP).

    A pure function of `noise` (B, N), uniform in [0, 1), drawn from `generator` if absent.
    """
    if mask not in ("none", "random", "gaussian"):
        raise InputError(f"mask '{mask}' is not in glip.py: call nanoglip.masks.sample_mask")
    grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
    shape, keep = (batch, math.prod(grid)), num_keep(math.prod(grid), mask_ratio)
    if noise is None:
        noise = torch.rand(shape, generator=generator, device=generator and generator.device)
    if noise.shape != shape:
        raise InputError(f"noise has shape {tuple(noise.shape)}, the mask needs {shape}")
    if mask == "none":
        return torch.arange(shape[1], device=noise.device).expand(shape)
    scores = gaussian_scores(noise, grid, sigma) if mask == "gaussian" else noise
    return scores.topk(keep, dim=1).indices                                    # (B, K)


def patchify(images: Tensor, grid: tuple[int, int], ids_keep: Tensor | None = None) -> Tensor:
    """Cut all patches, or the kept ones, out of pictures. (B, 3, H, W), (B, K) -> (B, K, 3pp)."""
    patches = images.unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1))   # (B, 3, R, p, C, p)
    patches = patches.permute(0, 2, 4, 1, 3, 5)                                # (B, R, C, 3, p, p)
    if ids_keep is None:
        return patches.flatten(1, 2).flatten(2)
    samples = torch.arange(len(images), device=images.device)[:, None]
    return patches[samples, ids_keep // grid[1], ids_keep % grid[1]].flatten(2)


def normalise(patches: Tensor) -> Tensor:
    """Bytes, or floats in [0, 1], -> floats of CLIP's mean 0 and deviation 1. (B, K, 3pp)."""
    scale = 255.0 if patches.dtype == torch.uint8 else 1.0
    x = patches.unflatten(-1, (3, -1))                                         # (B, K, 3, pp)
    x = x.float() if x.dtype == torch.uint8 else x
    # new_full on the device: a GPU would wait for a copy from the host
    mean, std = (torch.stack([x.new_full((1,), v) for v in c]) for c in (MEAN, STD))  # (3, 1)
    return ((x - scale * mean) / (scale * std)).flatten(2)


# --- Towers: open_clip's ViT CLIP and its parameter names, so that weights carry over -------------

@dataclass(frozen=True)
class Packing:
    """How tokens lie in memory; a first reader can skip it. Images: (B, T, D). Texts: (P, D), no
    padding; for attention in a table, a text in each row, on CPUs several in a row."""
    read: Tensor | None = None  # (B,) the class or end tokens' indices in B * T, or in P
    places: Tensor | None = None  # (P,) the texts' tokens in the table
    table: tuple[int, int] = (0, 0)  # its rows and their length, (R, T)
    allowed: Tensor | None = None  # what may attend to what, (..., T, T) or (B, 1, 1, T)

    def pick(self, x: Tensor) -> Tensor:
        """The tokens that are read out. -> (B, 1, D)."""
        return x.flatten(0, -2)[self.read][:, None]

    def wrap(self, x: Tensor, last: bool) -> Tensor:
        """Texts' tokens, in the `last` block those that are read, in the table (R, T, D)."""
        if self.places is None:
            return x
        places = self.places[self.read] if last else self.places
        table = x.new_zeros(math.prod(self.table), x.shape[-1])
        return table.index_put((places,), x.flatten(0, -2)).unflatten(0, self.table)

    def unwrap(self, table: Tensor, last: bool) -> Tensor:
        """The inverse of wrap."""
        if self.places is None:
            return table
        places = self.places[self.read] if last else self.places
        found = table.flatten(0, 1).index_select(0, places)
        return found[:, None] if last else found


def fused(device: torch.device) -> bool:
    return device.type == "cuda"  # torch's causal kernel; on CPUs plain products are faster


def pack_texts(tokens: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Packing]:
    """Texts (B, T) -> their tokens without padding (P,), each one's position in its text (P,)."""
    tokens = F.pad(tokens, (0, -tokens.shape[1] % 16))  # rows of whole vectors are faster
    (rows, length), ends = tokens.shape, lengths(tokens)
    kept = torch.arange(tokens.numel(), device=tokens.device)
    starts, allowed = kept[::length], None                                     # (B,)
    kept = kept[kept % length < ends.repeat_interleave(length)]                # (P,)
    text, position = kept // length, kept % length
    if not fused(device):
        first, place = [], 0
        for needed in ends.tolist():  # a text that does not fit in a row begins the next
            place += -place % length if place % length + needed > length else 0
            first.append(place)
            place += needed
        starts, rows = ends.new_tensor(first), -(-place // length)
    places = starts[text] + position                                           # (P,)
    if not fused(device):  # a token attends to its own text, up to itself
        owner = text.new_full((rows * length,), -1).index_put((places,), text)
        owner = owner.unflatten(0, (rows, length))                             # (R, T)
        allowed = (owner[:, None, :, None] == owner[:, None, None]).tril().to(device)
    found = [tokens.flatten()[kept], position, ends.cumsum(0) - 1, places]
    if device.type == "cuda" and tokens.is_cpu:  # the copy from pinned memory is asynchronous
        found = [x.pin_memory() for x in found]
    tokens, position, read, places = (x.to(device, non_blocking=True) for x in found)
    return tokens, position, Packing(read, places, (rows, length), allowed)


class Attention(nn.Module):
    """Multi-head self-attention. (B, T, D) or (P, D) -> the same; in the `last` block (B, 1, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, packing: Packing, last: bool) -> Tensor:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if last:  # queries of the tokens that are read, keys and values of all
            (wq, weight), (bq, bias) = (p.tensor_split([x.shape[-1]]) for p in (weight, bias))
            q = packing.wrap(F.linear(packing.pick(x), wq, bq), last)          # (B, 1, D)
            k, v = packing.wrap(F.linear(x, weight, bias), False).chunk(2, dim=-1)
        else:  # (B, T, D); of texts (R, T, D), q of the last block as well
            q, k, v = packing.wrap(F.linear(x, weight, bias), False).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        if fused(x.device):
            causal = packing.places is not None
            y = F.scaled_dot_product_attention(q, k, v, packing.allowed, is_causal=causal)
        else:  # a product would copy what is not contiguous, k transposed, which is slower
            q, k, v = (t.contiguous() for t in (q * q.shape[-1] ** -0.5, k, v))
            logits = q @ k.mT                                                  # (B, h, T, T)
            if packing.allowed is not None:
                logits = logits.masked_fill_(~packing.allowed, -math.inf)
            y = logits.softmax(-1) @ v
        return self.out_proj(packing.unwrap(y.transpose(1, 2).flatten(2), last))


class QuickGELU(nn.Module):  # of OpenAI's weights
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """Pre-norm transformer block. (B, T, D) -> the same; `last`: the tokens read, (B, 1, D)."""

    def __init__(self, width: int, heads: int, layers: int, quick_gelu: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        c_fc, c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        gelu = QuickGELU() if quick_gelu else nn.GELU()
        self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, gelu=gelu, c_proj=c_proj))
        residual = width**-0.5 * (2 * layers) ** -0.5  # OpenAI CLIP's initialisation
        nn.init.normal_(self.attn.out_proj.weight, std=residual)
        nn.init.zeros_(self.attn.out_proj.bias)
        nn.init.normal_(self.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.mlp.c_proj.weight, std=residual)

    def forward(self, x: Tensor, packing: Packing = Packing(), last: bool = False) -> Tensor:
        x = (packing.pick(x) if last else x) + self.attn(self.ln_1(x), packing, last)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks, shared by both towers. (B, T, D) -> the tokens that are read, (B, D)."""

    def __init__(self, width: int, layers: int, heads: int, quick_gelu: bool) -> None:
        super().__init__()
        blocks = (Block(width, heads, layers, quick_gelu) for _ in range(layers))
        self.resblocks = nn.ModuleList(blocks)
        self.recompute = False  # activation checkpointing

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        for block in self.resblocks:
            inputs = x, packing, block is self.resblocks[-1]
            if self.recompute and self.training:
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        return x[:, 0]


class ImageTower(nn.Module):
    """Vision transformer that computes kept patches only."""

    def __init__(self, config: GLIPConfig) -> None:
        super().__init__()
        width, (rows, columns) = config.width, config.grid
        self.config = config
        self.conv1 = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        positions = torch.randn(1 + rows * columns, width) * width**-0.5
        self.positional_embedding = nn.Parameter(positions)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.layers, config.heads, config.quick_gelu)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, config.embed_dim) * width**-0.5)

    def forward(self, images: Tensor, ids_keep: Tensor | None, visible: Tensor | None) -> Tensor:
        """The class token before the projection. (B, 3, H, W), (B, K), (B, K) -> (B, D)."""
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.config.pixels):
            told = f"pictures have shape {tuple(images.shape)}, the model takes pixels of"
            raise InputError(f"{told} {self.config.pixels}: resize them or give image_size")
        x = self.embed(images, self.config.grid, ids_keep)                     # (B, 1 + K, D)
        if visible is not None:  # no query sees a hidden patch; the class token stays
            visible = F.pad(visible, (1, 0), value=True)[:, None, None, :]     # (B, 1, 1, 1 + K)
        first = torch.arange(x.shape[0], device=x.device) * x.shape[1]         # (B,)
        return self.ln_post(self.transformer(x, Packing(first, allowed=visible)))

    def embed(self, images: Tensor, grid: tuple[int, int], ids_keep: Tensor | None) -> Tensor:
        """What enters the transformer: class token, kept patches. (B, 1 + K, D)."""
        # The paper masks after the position embedding. Projection and position act on each patch
        # alone, so gathering pixels first gives the same tokens: masked patches cost nothing.
        patches = normalise(patchify(images, grid, ids_keep))                  # (B, K, 3pp)
        x = F.linear(patches, self.conv1.weight.flatten(1))                    # (B, K, D)
        positions = resample_positions(self.positional_embedding, self.config.grid, grid)
        positions = positions.to(x.dtype)  # no indexing: its gradient is summed in no fixed order
        x = x + (positions[1:] if ids_keep is None else F.embedding(ids_keep, positions[1:]))
        first = (self.class_embedding.to(x.dtype) + positions[0]).expand(x.shape[0], 1, -1)
        return self.ln_pre(torch.cat([first, x], dim=1))


class GLIP(nn.Module):
    """The two towers and the temperature. `GLIP(config)`; see forward."""

    def __init__(self, config: GLIPConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GLIPConfig()
        width, layers, heads = config.text_width, config.text_layers, config.text_heads
        self.visual = ImageTower(config)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(config.context_length, width) * 0.01)
        self.transformer = Transformer(width, layers, heads, config.quick_gelu)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, config.embed_dim) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0 if config.siglip else 1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if config.siglip else None
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(
        self, images: Tensor, ids_keep: Tensor | None = None, visible: Tensor | None = None
    ) -> Tensor:
        """Images (B, 3, H, W), bytes or in [0, 1] -> (B, E); only `visible` patches are seen."""
        features = self.visual(images, ids_keep, visible) @ self.visual.proj
        return F.normalize(at_least_fp32(features), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T), T up to context_length, on any device -> text_features (B, E)."""
        if tokens.shape[1] > self.config.context_length:
            raise InputError(f"more tokens than the model takes, {self.config.context_length}")
        tokens, position, packing = pack_texts(tokens, self.logit_scale.device)
        x = self.token_embedding(tokens) + F.embedding(position, self.positional_embedding)
        x = self.ln_final(self.transformer(x, packing))
        return F.normalize(at_least_fp32(x @ self.text_projection), dim=-1)    # (B, E)

    def forward(
        self, images: Tensor, tokens: Tensor, ids_keep: Tensor | None = None, visible: Tensor = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures and token ids -> image_features (B, E), text_features (B, E), logit_scale."""
        image_features = self.encode_image(images, ids_keep, visible)
        return image_features, self.encode_text(tokens), self.logit_scale.exp()

    def clamp_logit_scale(self) -> None:
        """Keep the temperature's inverse within [1, 100], as CLIP does after every update."""
        self.logit_scale.data.clamp_(0, math.log(100))


# --- The loss, over the pairs of all ranks --------------------------------------------------------

def at_least_fp32(x: Tensor) -> Tensor:
    """Undo a lower precision of autocast: norms, similarities and the loss need fp32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Gather(torch.autograd.Function):
    """Concatenate every rank's features. (B, E) -> (G, E)."""

    @staticmethod
    def forward(ctx: object, features: Tensor) -> Tensor:
        parts = [torch.empty_like(features) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, features.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        # Every rank's loss depends on these features: without the sum the gradient is wrong.
        dist.all_reduce(grad := grad.contiguous())
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(*features: Tensor) -> tuple[Tensor, ...]:
    """All ranks' features of each kind, and this rank's rows in them. (B, E) -> (G, E), (B,)."""
    own = torch.arange(len(features[0]), device=features[0].device)
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return *features, own
    everybody = Gather.apply(torch.cat(features, dim=1))
    parts = everybody.split([x.shape[1] for x in features], dim=1)
    return *parts, own + dist.get_rank() * len(own)


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's loss in fp32; the mean over ranks is that of one process with all pairs. -> ()."""
    images, texts = at_least_fp32(image_features), at_least_fp32(text_features)
    with torch.autocast(images.device.type, enabled=False):
        all_images, all_texts, own = gather(images, texts)
        to_text = F.cross_entropy(logit_scale * images @ all_texts.T, own)     # of (B, G) logits
        return (to_text + F.cross_entropy(logit_scale * texts @ all_images.T, own)) / 2


def glip_loss(model, images, tokens, noise, mask_ratio=0.75, sigma=0.2):  # noqa: ANN001, ANN201
    """The paper: keep the best K patches, and contrast. (B, 3, H, W), (B, T), (B, N) -> ()."""
    scores = gaussian_scores(noise, model.config.grid, sigma)
    ids_keep = scores.topk(num_keep(noise.shape[1], mask_ratio)).indices
    return clip_loss(*model(images, tokens, ids_keep))


# --- Save and load: plain dicts and tensors -------------------------------------------------------

VERSION = 2  # of a checkpoint file; 1 had no version


def save_checkpoint(path: Path | str, model: GLIP, **record: object) -> None:
    """Write {"version", "model_config", "model", **record}; record: plain values and tensors."""
    content = {"version": VERSION, "model_config": asdict(model.config), **record}
    temporary = Path(f"{path}.{os.getpid()}.tmp")  # so an incomplete file never has the name
    try:
        with open(temporary, "wb") as file:
            torch.save(content | {"model": model.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path | str) -> dict:
    """The content of a file of save_checkpoint; nothing in it is executed. Raises InputError."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch checks no sums, and unpacks zip bombs
            if archive.testzip() or any(member.compress_type for member in archive.infolist()):
                raise zipfile.BadZipFile
        with open(path, "rb") as file:  # given a path, torch goes by its suffix
            content = torch.load(file, map_location="cpu", weights_only=True)
        config, weights = GLIPConfig(**content["model_config"]), content["model"]
        uneven = config.width % config.heads or config.text_width % config.text_heads
        large = sum(value.nbytes for value in weights.values()) > Path(path).stat().st_size
        if uneven or large or config.layers + config.text_layers > len(weights):
            raise ValueError
        with torch.device("meta"):  # takes no memory, whatever the config says
            GLIP(config).load_state_dict(weights, assign=True)
    except Exception as error:  # torch raises many kinds for torn, foreign and malicious files
        told = f"{path}: not a whole checkpoint of nanoGLIP ({type(error).__name__}); nothing in it"
        raise InputError(f"{told} was executed; name one that train.py wrote") from None
    for name, value in weights.items():
        if not value.isfinite().all():
            raise InputError(f"{path}: {name} is not finite; name a checkpoint from before that")
    return content


def load_model(path: Path | str, image_size: Size | None = None) -> tuple[GLIP, GLIPConfig]:
    """The model in a file, at another image_size (pixels) if given; InputError for a bad file."""
    model = build(load_checkpoint(path), image_size).eval()
    return model, model.config


def build(content: dict, image_size: Size | None = None) -> GLIP:
    """The model in a checkpoint's content, positions resampled to image_size as in open_clip."""
    config, weights = GLIPConfig(**content["model_config"]), dict(content["model"])
    if image_size:
        name, old = "visual.positional_embedding", config.grid
        config = replace(config, image_size=image_size)
        weights[name] = resample_positions(weights[name], old, config.grid)
    model = GLIP(config)
    model.load_state_dict(weights)
    return model


def resample_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resample positions to another grid, bicubic, class token kept. (1+N, D) -> (1+M, D)."""
    if old == new:
        return table
    grid = table[1:].unflatten(0, old).permute(2, 0, 1)[None]                  # (1, D, R, C)
    grid = F.interpolate(grid, new, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:1], grid[0].flatten(1).T])
