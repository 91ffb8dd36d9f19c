"""What captions decide: text masks, and which pairs an epoch of pre-training shows.

Both need to know how often words occur: one pass over the training captions, kept in the cache.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Annotated

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from glip import InputError, encode_word, lengths, tokenize, words
from nanoglip import files
from nanoglip.files import cached, cached_array, open_regular
from nanoglip.masks import Setting, required_inputs
from nanoglip.sources.pictures import Source
from nanoglip.text import TEXT_MASKS, mask_text

# --- Words: what text masks need beside noise -----------------------------------------------------

LONGEST = 256  # tokens of a caption that a text mask chooses from
CLASSES = ("NN", "JJ", "VB")  # nouns, adjectives, verbs: how their tags begin


class TextMask:
    """A text mask of the registry with the inputs that it requires: captions -> shorter tokens."""

    def __init__(self, text_mask: str, text_tokens: int, threshold: float, pairs: Source) -> None:
        self.text_mask, self.text_tokens, self.threshold = text_mask, text_tokens, threshold
        self.inputs = required_inputs(TEXT_MASKS[text_mask])
        self.shares = word_shares(pairs) if "word_shares" in self.inputs else {}

    def __call__(self, captions: list[str], noise: Tensor) -> Tensor:
        """Tokens (n, text_tokens) of n captions, by noise (n, LONGEST)."""
        tokens = tokenize(captions, LONGEST)
        length = int(lengths(tokens).max())

        def shares(text: str) -> list[float]:
            return [self.shares.get(word, 0.0) for word in words(text)]

        supplies = {
            "text_threshold": lambda: self.threshold,
            "word_shares": lambda: per_token(captions, length, shares),
            "word_ranks": lambda: per_token(captions, length, word_ranks),
        }
        inputs = {name: supply() for name, supply in supplies.items() if name in self.inputs}
        tokens, noise = tokens[:, :length], noise[:, :length]
        return mask_text(self.text_mask, tokens, self.text_tokens, noise=noise, **inputs)


def per_token(
    captions: list[str], length: int, of_words: Callable[[str], Sequence[float]]
) -> Tensor:
    """A number for every word of a caption, at each of the word's tokens; else 0. (n, length)."""
    table = torch.zeros(len(captions), length)
    for row, text in zip(table, captions, strict=True):
        pieces = np.array([len(encode_word(word)) for word in words(text)], int)
        numbers = np.repeat(np.array(of_words(text), np.float32), pieces)[: length - 2]
        row[1 : 1 + len(numbers)] = torch.from_numpy(numbers)
    return table


def captions_of(
    pairs: Source, purpose: str, block: int = 10_000
) -> Iterator[tuple[np.ndarray, list[str]]]:
    """All training captions, by blocks: (ids, texts)."""
    begins = range(0, len(pairs), block)
    for begin in tqdm(begins, purpose, unit="0,000 captions", disable=len(begins) < 10):
        ids = np.arange(begin, min(begin + block, len(pairs)))
        ids = np.setdiff1d(ids, pairs.held, assume_unique=True)
        yield ids, pairs.texts(ids)


def word_shares(pairs: Source) -> dict[str, float]:
    """Each word's share of all words in the training captions: one pass, kept in the cache."""

    def count() -> dict[str, int]:
        texts = (text for _, block in captions_of(pairs, "counting words") for text in block)
        return Counter(word for text in texts for word in words(text))

    counts = cached(files.CACHE / f"words-{pairs.key()}.json", count)
    total = sum(counts.values())
    return {word: n / total for word, n in counts.items()}


def word_classes(text: str) -> list[int]:
    """0 noun, 1 adjective, 2 verb, 3 other, for each word, by textblob's own lexicon."""
    from textblob.en import tag

    found = words(text)
    tags = tag(" ".join(found), tokenize=False) if found else []
    if len(tags) != len(found):  # it split or joined some: one at a time
        tags = [tag(word, tokenize=False)[0] for word in found]
    return [CLASSES.index(k[:2]) if k[:2] in CLASSES else len(CLASSES) for _, k in tags]


@lru_cache(maxsize=100_000)
def word_ranks(text: str) -> tuple[int, ...]:
    """Each word's place in syntax_text's order of choice: by class, equal ones as they stand.

    CLIPA sorts by np.argsort's default, in which the order of equals depends on the machine.
    """
    order = np.argsort(word_classes(text), kind="stable")
    return tuple(np.argsort(order).tolist())


# --- Sampling: which share of the pairs an epoch of pre-training shows ----------------------------


Share = Annotated[float, Setting("share of the pairs that an epoch has", 1e-9, 1)]


def balanced_sampling(
    clusters: np.ndarray, sampling_share: Share = 0.5,
    sampling_power: Annotated[float, Setting("n pairs of a cluster count as n^power", 0, 1)] = 0.2,
) -> np.ndarray:  # fmt: skip
    """DynamiCS: a cluster of n pairs keeps a number that grows as n^power. (M,) ids -> (M,).

    The probabilities add up to sampling_share x M; no pair has more than 1. arXiv 2604.27932.
    """
    _, number, size = np.unique(clusters, return_inverse=True, return_counts=True)
    wanted, budget = size ** (sampling_power - 1.0), sampling_share * len(clusters)
    low, high = 0.0, 1.0 / wanted.min()
    for _ in range(60):  # the factor by which the sum of capped probabilities meets the budget
        factor = (low + high) / 2
        kept = (size * np.minimum(1, factor * wanted)).sum()
        low, high = (factor, high) if kept < budget else (low, factor)
    return np.minimum(1, high * wanted)[number]


def rare_sampling(caption_scores: np.ndarray, sampling_share: Share = 0.5) -> np.ndarray:
    """WFPP: the pairs whose captions have the rarest words, in every epoch the same. (M,) -> (M,).

    A caption's score is the mean of its words' sqrt(t / share), at most 1 each: our reading of
    arXiv 2410.10879, which asks that long captions score no worse than short ones.
    """
    count = round(sampling_share * len(caption_scores))
    kept = np.argsort(-caption_scores, kind="stable")[:count]
    probability = np.zeros(len(caption_scores))
    probability[kept] = 1.0
    return probability


SAMPLINGS = {"clusters": balanced_sampling, "words": rare_sampling}


def sampling_probabilities(
    sampling: str, pairs: Source, settings: dict[str, float], clusters: str, text_threshold: float
) -> np.ndarray:
    """The probability that an epoch shows each picture (M,), 0 if held out. Raises InputError."""
    ids = np.setdiff1d(np.arange(len(pairs)), pairs.held, assume_unique=True)
    if sampling == "clusters":
        found = read_clusters(clusters, len(pairs) + len(pairs.left_out))
        given = np.delete(found, pairs.left_out)[ids]
    else:
        given = caption_scores(pairs, text_threshold)[ids]
    chances = np.zeros(len(pairs))
    chances[ids] = SAMPLINGS[sampling](given, **settings)
    return chances


def read_clusters(path: str, count: int) -> np.ndarray:
    """Cluster ids (count,), from a .npy or a text file: held-out pairs have one, too.

    The data's order is that of a table's rows, a folder's names, and in shards of keys.
    """
    try:
        with open_regular(path, 2**33) as file:
            if path.endswith(".npy"):  # mapped, for its heading may claim to be of any size
                found = np.asarray(np.lib.format.open_memmap(path, mode="r"))
            else:
                found = np.loadtxt(file, dtype=np.int64)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise InputError(f"--clusters {path}: cannot be read ({error})") from None
    if found.shape != (count,) or found.dtype.kind not in "iu":
        raise InputError(
            f"--clusters {path}: {found.dtype} of shape {found.shape}, but the data have {count} "
            "pairs; give one whole number for each, in the data's order"
        )
    return found


def caption_scores(pairs: Source, threshold: float) -> np.ndarray:
    """Mean over each caption's words of min(1, sqrt(threshold / word's share)), (M,), cached."""

    def score() -> np.ndarray:
        scores = np.zeros(len(pairs), np.float32)
        shares = word_shares(pairs)
        chances = {word: min(1.0, math.sqrt(threshold / shares[word])) for word in shares}
        for ids, texts in captions_of(pairs, "scoring captions"):
            for i, found in zip(ids, map(words, texts), strict=True):
                scores[i] = sum(chances[w] for w in found) / max(1, len(found))
        return scores

    path = files.CACHE / f"scores-{pairs.key()}-{threshold:g}.npy"
    return cached_array(path, len(pairs), score)
