"""GLIP, Gaussian masking for language-image pre-training: the method, top to bottom.

    noise    = uniform (B, N), a number for each of a picture's N patches
    density  = exp(-(x^2 + y^2) / (2 sigma)) / (2 pi sigma), x and y: patch centres on [-1, 1]
    ids_keep = the K highest of noise + density: the centre of a picture survives more often
    picture  -> K patch projections + positions, class token -> transformer -> image_features (B, E)
    caption  -> T tokens -> causal transformer -> end token ----------------> text_features  (B, E)
    loss     = symmetric cross-entropy of the (B, B) similarities; nothing is reconstructed
    at the end of training, a few steps with all N patches: unmasked tuning

Liang & Larson, ECML-PKDD 2024, arXiv 2403.15837. (Not Grounded Language-Image Pre-training.)
The first three lines are masks.gaussian_scores and sample_mask, beside the rivals' strategies.

Shapes: B pairs, N patches of a (rows, columns) grid, K kept patches, T tokens of a text, P of all
texts, D tower width, h heads, E joint width. `mask_ratio` is the share of patches that is removed.
"""

import gzip
import html
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from files import (  # noqa: F401 - one name for users, glip
    append_line,
    cached,
    check_finite,
    load_tensors,
    room_for,
    write_bytes,
    write_safely,
)
from losses import (  # noqa: F401 - one name for users, glip
    LOSSES,
    at_least_fp32,
    cached_gradients,
    clip_loss,
    contrastive_loss,
    joined,
)
from masks import (  # noqa: F401 - half of these are for others: one name for users, glip
    DRAWS,
    MASKS,
    MEAN,
    STD,
    TEXT_MASKS,
    InputError,
    Masker,
    declared,
    gaussian_scores,
    mask_text,
    noise,
    normalise,
    num_keep,
    patchify,
    sample_ids_keep,
    sample_mask,
    sent,
)

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
    siglip: bool = False  # logits have a bias, and the scale begins at 10
    quick_gelu: bool = False  # x sigmoid(1.702 x) in GELU's place, as in OpenAI's weights

    @staticmethod
    def named(
        model: str, image_size: int | tuple[int, int] | None = None, context_length: int = 77
    ) -> "GLIPConfig":
        """The configuration of a row of SIZES, at its own or another image size (pixels)."""
        if model not in SIZES:
            raise InputError(f"unknown model '{model}': choose one of {', '.join(SIZES)}")
        return GLIPConfig(
            image_size or SIZES[model][0], *SIZES[model][1:], context_length=context_length
        )

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


def cut_tokens(tokens: Tensor, context_length: int) -> Tensor:
    """What tokenize() makes of the same texts at a shorter context_length. (n, T) -> (n, <= T)."""
    cut = tokens[:, :context_length].clone()
    cut[:, -1] = cut[:, -1].where(lengths(tokens) <= context_length, END)
    return cut


@lru_cache(maxsize=100_000)
def encode(text: str) -> tuple[int, ...]:
    """Clean a text and encode its words; nothing is added or cut."""
    return tuple(i for word in words(text) for i in encode_word(word))


@lru_cache(maxsize=100_000)
def words(text: str) -> list[str]:
    """Clean a text, of 4,096 characters at most, and split it into the tokenizer's words."""
    text = html.unescape(html.unescape(ftfy.fix_text(text[:4096])))
    found = WORD.findall(" ".join(text.split()).lower())
    return [word[:1000] for word in found]  # merging the pieces of an endless word takes for ever


def decode_tokens(ids: Iterable[int]) -> str:
    """Token ids, without start and end -> a text that has the same tokens."""
    pieces, byte = spelling()
    text = "".join(pieces[int(i)] for i in ids)
    words = (bytes(byte[c] for c in word) for word in text.split("</w>"))
    return " ".join(word.decode("utf-8", "replace") for word in words).strip()


@lru_cache
def spelling() -> tuple[list[str], dict[str, int]]:
    """id -> piece, and character -> byte: the vocabulary read backwards."""
    letters, ids, _ = vocabulary()
    return list(ids), {letter: byte for byte, letter in letters.items()}


def lengths(tokens: Tensor) -> Tensor:
    """Tokens of each text, start and end included; 0 is a word too, so none is counted. (n, T)."""
    return tokens.argmax(dim=1) + 1  # the end token has the highest id


# ------------------------------------------------------------------------------------------------
# Towers: open_clip's ViT CLIP, parameter names included, so that weights carry over one to one
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Which tokens of a batch are read, and where texts lie. Pictures come as (B, T, D); texts as
    (P, D), without fillers, and attend in a table of rows, one behind another where they fit."""

    read: Tensor | None = None  # (B,) the class or end tokens' places among B * T, or P; None: all
    places: Tensor | None = None  # (P,) the tokens' places in the table
    table: tuple[int, int] = (0, 0)  # its rows and their length, (R, T)

    def pick(self, x: Tensor) -> Tensor:
        """The tokens that are read. -> (B, 1, D)."""
        return x.flatten(0, -2)[self.read][:, None]

    def spread(self, x: Tensor, last: bool = False) -> Tensor:
        """Tokens, in the `last` block those that are read -> the table (R, T, D), elsewhere 0."""
        if self.places is None:
            return x
        places = self.places[self.read] if last else self.places
        table = x.new_zeros(math.prod(self.table), x.shape[-1])
        return table.index_put((places,), x.flatten(0, -2)).unflatten(0, self.table)

    def gather(self, table: Tensor, last: bool = False) -> Tensor:
        """The reverse of spread."""
        if self.places is None:
            return table
        places = self.places[self.read] if last else self.places
        found = table.flatten(0, 1).index_select(0, places)
        return found[:, None] if last else found


ALL = Layout()


def fused(device: torch.device) -> bool:
    """Whether attention is torch's kernel, which is told that texts are causal and needs a row for
    each. At CLIP's lengths plain products, with several texts a row, are faster on CPUs."""
    return device.type == "cuda"


def lay_out(tokens: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None, Layout]:
    """Texts (B, T) without what is behind their ends, as Layout says, on a device.

    Returns their tokens (P,), the position of each in its text (P,), what may attend to what
    (R, 1, T, T) where no kernel is told, and the layout.
    """
    fixed = torch.compiler.is_exporting() or tokens.is_meta  # sizes may not depend on contents
    if not fixed:  # attention is faster in rows of whole vectors
        tokens = F.pad(tokens, (0, -tokens.shape[1] % 16))
    (rows, length), ends = tokens.shape, lengths(tokens)
    kept = torch.arange(tokens.numel(), device=tokens.device)
    starts = kept[::length]                                                    # (B,)
    read = starts + ends - 1                                                   # (B,)
    if not fixed:
        kept, read = kept[kept % length < ends.repeat_interleave(length)], ends.cumsum(0) - 1
    text, position, allowed = kept // length, kept % length, None              # (P,)
    if not (fixed or fused(device)):
        starts, rows = shelve(ends, length)
    places = starts[text] + position                                           # (P,)
    if not fused(device):  # a token sees those of its own text, up to itself
        owner = text.new_full((rows * length,), -1).index_put((places,), text)
        owner = owner.unflatten(0, (rows, length))                             # (R, T)
        allowed = (owner[:, None, :, None] == owner[:, None, None]).tril().to(device)
    found = (tokens.flatten()[kept], position, read, places)
    tokens, position, read, places = (sent(t, device) for t in found)
    return tokens, position, allowed, Layout(read, places, (rows, length))


def shelve(ends: Tensor, length: int) -> tuple[Tensor, int]:
    """Texts of some lengths (B,), in their order, in rows of one length: where each begins, (B,),
    and the number of rows. What does not fit in a row begins the next."""
    starts, place = [], 0
    for needed in ends.tolist():
        if place % length + needed > length:
            place += -place % length
        starts.append(place)
        place += needed
    return ends.new_tensor(starts), -(-place // length)


class Attention(nn.Module):
    """Multi-head self-attention. x (B, T, D) or (P, D), allowed (..., T) bool or None -> the same
    shape; in the `last` block only for what is read -> (B, 1, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, allowed: Tensor | None, layout: Layout = ALL, last: bool = False
    ) -> Tensor:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if last:
            (wq, weight), (bq, bias) = (p.tensor_split([x.shape[-1]]) for p in (weight, bias))
            q = layout.spread(F.linear(layout.pick(x), wq, bq), last)          # (B, 1, D)
            k, v = layout.spread(F.linear(x, weight, bias)).chunk(2, dim=-1)
        else:  # (B, T, D); of texts (R, T, D), q of the last block as well
            q, k, v = layout.spread(F.linear(x, weight, bias)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        if fused(x.device):
            causal = layout.places is not None
            y = F.scaled_dot_product_attention(q, k, v, allowed, is_causal=causal)
        else:  # a product copies what is not contiguous, k transposed, which takes longer
            q, k, v = (t.contiguous() for t in (q * q.shape[-1] ** -0.5, k, v))
            logits = q @ k.mT                                                  # (B, h, T, T)
            if allowed is not None:
                logits = logits.masked_fill_(~allowed, -math.inf)
            y = logits.softmax(-1) @ v
        return self.out_proj(layout.gather(y.transpose(1, 2).flatten(2), last))  # (B, T, D)

    def of_class_token(self, x: Tensor) -> Tensor:
        """How much the first token attends to the others, mean of heads. (B, T, D) -> (B, T-1)."""
        (wq, wk, _), (bq, bk, _) = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q = F.linear(x[:, :1], wq, bq).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = F.linear(x, wk, bk).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        with torch.autocast(x.device.type, enabled=False):  # bf16 would tie patches, and masks
            q, k = at_least_fp32(q), at_least_fp32(k)
            logits = (q * q.shape[-1] ** -0.5) @ k.mT                          # (B, h, 1, T)
            return logits.softmax(-1)[:, :, 0, 1:].mean(dim=1)


class MLP(nn.Module):
    """Two linear maps with a GELU between, four times as wide inside. (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)
        self.quick_gelu = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x) if self.quick_gelu else F.gelu(x))


class Block(nn.Module):
    """Pre-norm transformer block. (B, T, D) -> (B, T, D); `last`: -> what is read, (B, 1, D)."""

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

    def forward(
        self, x: Tensor, allowed: Tensor | None, layout: Layout = ALL, last: bool = False
    ) -> Tensor:
        x = (layout.pick(x) if last else x) + self.attn(self.ln_1(x), allowed, layout, last)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks, shared by both towers. (B, T, D) -> (B, T, D), or what is read."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, layers) for _ in range(layers))
        self.recompute = False  # forget activations inside blocks, and compute them twice

    def forward(self, x: Tensor, allowed: Tensor | None = None, layout: Layout = ALL) -> Tensor:
        for block in self.resblocks:
            last = layout.read is not None and block is self.resblocks[-1]
            if self.recompute and self.training:
                x = checkpoint(block, x, allowed, layout, last, use_reentrant=False)
            else:
                x = block(x, allowed, layout, last)
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
        return self.features(images, ids_keep, visible) @ self.proj

    def features(self, images: Tensor, ids_keep: Tensor | None, visible: Tensor | None) -> Tensor:
        """The class token before its projection. (B, 3, H, W), (B, K), (B, K) -> (B, D)."""
        check_size(images, self.config)
        x = self.embed(images, self.config.grid, ids_keep)                     # (B, 1 + K, D)
        allowed = None if visible is None else attend_to(visible)
        first = Layout(torch.arange(x.shape[0], device=x.device) * x.shape[1])  # is what is read
        return self.ln_post(self.transformer(x, allowed, first)[:, 0])

    def embed(self, images: Tensor, grid: tuple[int, int], ids_keep: Tensor | None) -> Tensor:
        """What enters the transformer: class token, kept patches. (B, 1 + K, D).

        The paper masks after the position embedding; projection and position act on each patch
        alone, so that to gather pixels first gives the same tokens, and a masked patch costs
        nothing.
        """
        x = self.project(patchify(images, grid, ids_keep))                     # (B, K, D)
        positions = resample_positions(self.positional_embedding, self.config.grid, grid)
        positions = positions.to(x.dtype)  # not indexed: an index adds gradients in any order
        x = x + (positions[1:] if ids_keep is None else F.embedding(ids_keep, positions[1:]))
        first = (self.class_embedding.to(x.dtype) + positions[0]).expand(x.shape[0], 1, -1)
        return self.ln_pre(torch.cat([first, x], dim=1))

    def project(self, patches: Tensor) -> Tensor:
        """Patch embeddings before the position is added. (B, K, 3pp) -> (B, K, D)."""
        return F.linear(normalise(patches), self.conv1.weight.flatten(1))

    def attend(self, images: Tensor, features: bool = False) -> tuple[Tensor, Tensor | None]:
        """Where the class token looks, mean of heads and layers, (B, R, C); if asked, features().

        Pictures (B, 3, H, W) may have any size of whole patches; positions are resampled to it.
        """
        grid = tuple(side // self.config.patch_size for side in images.shape[2:])
        x, attention = self.embed(images, grid, None), 0.0
        *others, last = self.transformer.resblocks
        for block in others:
            attention = attention + block.attn.of_class_token(block.ln_1(x))
            x = block(x, None)
        attention = attention + last.attn.of_class_token(last.ln_1(x))         # (B, N)
        attention = (attention / (len(others) + 1)).unflatten(1, grid)
        return attention, self.ln_post(last(x, None)[:, 0]) if features else None


def check_size(images: Tensor, config: GLIPConfig) -> None:
    """Raise InputError for pictures (B, 3, H, W) of another size than the model's."""
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, *config.pixels):
        raise InputError(
            f"pictures have shape {tuple(images.shape)}, the model takes (B, 3, "
            f"{config.pixels[0]}, {config.pixels[1]}): resize them or load_model(image_size=...)"
        )


def attend_to(visible: Tensor) -> Tensor:
    """Hide fillers from every query; the class token stays. visible (B, K) -> (B, 1, 1, 1 + K)."""
    return F.pad(visible, (1, 0), value=True)[:, None, None, :]


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
        start = 10.0 if config.siglip else 1 / 0.07
        self.logit_scale = nn.Parameter(torch.tensor(math.log(start)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if config.siglip else None
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, MLP):
                module.quick_gelu = config.quick_gelu

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

        Attention is causal and the end token is read: what is behind it is not computed. Tokens
        may be on the CPU wherever the model is; then a GPU is not waited for.
        """
        length = tokens.shape[1]
        if length > self.config.context_length:
            raise InputError(f"{length} tokens, the model takes {self.config.context_length}")
        tokens, position, allowed, layout = lay_out(tokens, self.logit_scale.device)
        x = self.token_embedding(tokens) + F.embedding(position, self.positional_embedding)
        x = self.ln_final(self.transformer(x, allowed, layout)[:, 0])
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
# Save and load: plain dicts and tensors
# ------------------------------------------------------------------------------------------------

CACHE = Path(os.environ.get("NANOGLIP_CACHE", Path(__file__).parent / ".cache"))


def save_checkpoint(path: Path | str, model: GLIP, **state: object) -> None:
    """Write {"model_config", "model", **state}; state holds plain values and tensors."""
    content = {"model_config": asdict(model.config), "model": model.state_dict(), **state}
    write_safely(path, lambda file: torch.save(content, file))


def load_checkpoint(path: Path | str) -> dict:
    """Read a file of save_checkpoint, executing nothing in it; InputError for a damaged one."""
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such checkpoint")
    try:
        content = load_tensors(path)
    except Exception as error:  # torch raises many kinds for torn, foreign and malicious files
        raise InputError(
            f"{path}: not a readable nanoGLIP checkpoint ({type(error).__name__}); nothing in it "
            "was executed; train again or copy the file anew"
        ) from None
    if not isinstance(content, dict) or not {"model_config", "model"} <= content.keys():
        raise InputError(f"{path}: a checkpoint of another program; name one that train.py wrote")
    weights = content["model"]
    try:
        config = GLIPConfig(**content["model_config"])
        large = sum(v.nbytes for v in weights.values()) > Path(path).stat().st_size
        rest = config.width % config.heads or config.text_width % config.text_heads
        if large or rest or config.layers + config.text_layers > len(weights):
            raise ValueError("more than is in the file")
        with torch.device("meta"):  # takes no memory, whatever the config says
            GLIP(config).load_state_dict(weights, assign=True)
    except Exception as error:
        told = f"its weights do not fit its model_config ({type(error).__name__})"
        raise InputError(f"{path}: {told}; name one that train.py wrote") from None
    check_finite(weights, path)
    return content


def built(content: dict) -> GLIP:
    """The model in a checkpoint's content."""
    model = GLIP(GLIPConfig(**content["model_config"]))
    model.load_state_dict(content["model"])
    return model.eval()


def load_model(
    path: Path | str, image_size: int | tuple[int, int] | None = None
) -> tuple[GLIP, GLIPConfig]:
    """Rebuild a model from its file alone, positions resampled to image_size (pixels) if given.

    Raises InputError for a file that is missing, torn, foreign or not what its config says.
    """
    model = built(load_checkpoint(path))
    model = model if image_size is None else resized(model, image_size)
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
