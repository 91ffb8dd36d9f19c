"""Captions as tokens: cut, decoded, and shortened by the text masks of the field.

    noise (B, T), lengths (B,) with start and end  ->  scores (B, T)  ->  the highest words are kept

A text mask is one function and one line in TEXT_MASKS; its inputs and settings are declared as
those of masks.py. Shapes: B captions of T tokens.
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from glip import END, InputError, lengths, vocabulary
from nanoglip.masks import Setting, call_row


def cut_tokens(tokens: Tensor, context_length: int) -> Tensor:
    """The tokens of the same texts at a shorter context_length. (n, T) -> (n, <= T)."""
    cut = tokens[:, :context_length].clone()
    cut[:, -1] = cut[:, -1].where(lengths(tokens) <= context_length, END)
    return cut


def decode_tokens(ids: Iterable[int]) -> str:
    """A text that has these token ids, start and end left out."""
    pieces, byte = spelling()
    text = "".join(pieces[int(i)] for i in ids)
    words = (bytes(byte[c] for c in word) for word in text.split("</w>"))
    return " ".join(word.decode("utf-8", "replace") for word in words).strip()


@lru_cache
def spelling() -> tuple[list[str], dict[str, int]]:
    """id -> piece, and character -> byte: the vocabulary read backwards."""
    letters, ids, _ = vocabulary()
    return list(ids), {letter: byte for byte, letter in letters.items()}


# --- Text masks -----------------------------------------------------------------------------------


def truncate_text(noise: Tensor, lengths: Tensor) -> Tensor:
    """CLIP: the first words are kept. noise (B, T) -> scores (B, T)."""
    return -torch.arange(noise.shape[1], device=noise.device).expand_as(noise)


def random_text(noise: Tensor, lengths: Tensor) -> Tensor:
    """CLIPA's random text mask (2305.07017, on text tokens): every word is equally likely."""
    return noise


def block_text(noise: Tensor, lengths: Tensor, keep: int) -> Tensor:
    """CLIPA's block text mask (2305.07017, on text tokens): `keep` words in a row, anywhere."""
    free = (lengths - 2 - keep).clamp(min=0)[:, None]  # words that are dropped
    first = 1 + (noise[:, :1] * (free + 1)).long()                             # (B, 1)
    place = torch.arange(noise.shape[1], device=noise.device)
    return ((place >= first) & (place < first + keep)).to(noise)


def frequency_text(
    noise: Tensor, lengths: Tensor, word_shares: Tensor,
    text_threshold: Annotated[float, Setting("words of smaller shares are rare", 1e-12)] = 1e-4,
) -> Tensor:  # fmt: skip
    """CLIPF (2412.16148, method section): frequent words are dropped more often. -> scores (B, T).

    A word with the share f of all words is dropped with probability 1 - sqrt(t / f), t the
    text_threshold; that is subtracted from the noise, GLIP's rule for words. word_shares (B, T).
    """
    return noise - (1 - (text_threshold / word_shares.clamp(min=1e-12)).sqrt()).clamp(min=0)


def syntax_text(noise: Tensor, lengths: Tensor, word_ranks: Tensor, keep: int) -> Tensor:
    """CLIPA's syntax mask, as its code has it: `keep` words are chosen, then cut to `keep` tokens.

    word_ranks (B, T): each token's word in the order of choice, from 0; nouns come first, then
    adjectives, verbs and others. No noise: a caption is shortened in the same way every time.
    """
    place = torch.arange(noise.shape[1], device=noise.device)
    return -(place + noise.shape[1] * (word_ranks >= keep)).to(noise)


TEXT_MASKS = {
    "truncate": truncate_text,
    "random": random_text,
    "block": block_text,
    "frequency": frequency_text,
    "syntax": syntax_text,
}


def mask_text(
    text_mask: str, tokens: Tensor, text_tokens: int, *, noise: Tensor | None = None,
    generator: torch.Generator | None = None, **inputs: object,
) -> Tensor:  # fmt: skip
    """Shorten captions to text_tokens, start and end included. (B, T) -> (B, text_tokens).

    The start and end token stay, and so does the order of what is kept; shorter captions are
    padded with zeros. A pure function of `noise` (B, T), drawn from `generator` if absent. Raises
    InputError for an unknown mask, fewer than 3 tokens, or an input that is missing, by name.
    """
    if text_tokens < 3:
        raise InputError(f"text_tokens {text_tokens} leaves no word between start and end: give 3")
    batch, length = tokens.shape
    if noise is None:
        device = generator.device if generator else tokens.device
        noise = torch.rand(batch, length, generator=generator, device=device)
    if tuple(noise.shape) != (batch, length):
        raise InputError(f"noise has shape {tuple(noise.shape)}, the texts {(batch, length)}")
    ends = tokens.argmax(dim=1)  # the end token has the highest id              (B,)
    inputs = {**inputs, "keep": text_tokens - 2}
    scores = call_row(TEXT_MASKS, "text mask", text_mask, (noise, ends + 1), inputs)
    place = torch.arange(length, device=tokens.device)
    scores = scores.float().masked_fill(place > ends[:, None], -math.inf)
    scores = scores.masked_fill((place == 0) | (place == ends[:, None]), math.inf)
    kept = scores.topk(min(text_tokens, length), dim=1).indices.sort(dim=1).values
    return F.pad(tokens.gather(1, kept), (0, text_tokens - kept.shape[1]))
