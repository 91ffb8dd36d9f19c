"""Text masks: what stays of a caption, by each strategy's own rule."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

import data
import glip
from glip import InputError, tokenize
from nanoglip import files
from nanoglip.sources import captions
from nanoglip.sources.captions import LONGEST, TextMask
from nanoglip.sources.order import Batches, ConceptOrder
from nanoglip.sources.pictures import Source
from nanoglip.text import TEXT_MASKS, mask_text

CAPTIONS = ["a big red apple on the wooden table near an open window", "cat", "the dog's bone",
            "antidisestablishmentarianism beats floccinaucinihilipilification", "", "one two three",
            "! ! of ! of ! of the flag of the flag of France !"]  # fmt: skip


class Captions(Source):
    """Pairs as far as a text mask looks at them: caption i has counts[i] pictures."""

    def __init__(self, captions, counts=None):
        self.captions = captions
        self.concept = np.repeat(np.arange(len(captions)), counts or [1] * len(captions))
        self.held = np.empty(0, int)

    def stamp(self, ids):
        return str(self.texts(np.arange(len(self))))

    def __len__(self):
        return len(self.concept)

    def texts(self, ids):
        return [self.captions[i] for i in self.concept[ids]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CACHE", tmp_path)


def noise_of(batch, seed=0, length=LONGEST):
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed))


def words_of(row):
    """Token ids between the start and the end token."""
    row = row.tolist()
    return row[1 : row.index(glip.END)]


def is_subsequence(short, long):
    rest = iter(long)
    return all(x in rest for x in short)


@pytest.mark.parametrize("text_mask", TEXT_MASKS)
@pytest.mark.parametrize("length", [3, 5, 8, 77])
def test_every_text_mask_keeps_k_words_in_their_order(text_mask, length):
    apply = TextMask(text_mask, length, 1e-4, Captions(CAPTIONS))
    noise = noise_of(len(CAPTIONS))
    found = apply(CAPTIONS, noise)
    assert found.shape == (len(CAPTIONS), length) and found.dtype == torch.int64
    for row, whole in zip(found, tokenize(CAPTIONS), strict=True):
        kept, words = words_of(row), words_of(whole)
        assert row[0] == glip.START and len(kept) == min(len(words), length - 2)
        assert is_subsequence(kept, words)
        assert not row[len(kept) + 2 :].any()
    assert torch.equal(found, apply(CAPTIONS, noise.clone()))
    alone = torch.cat([apply([text], noise[i : i + 1]) for i, text in enumerate(CAPTIONS)])
    assert torch.equal(found, alone)  # whatever else is in the batch


def test_truncation_is_the_tokenizers():
    apply = TextMask("truncate", 6, 1e-4, Captions(CAPTIONS))
    assert torch.equal(apply(CAPTIONS, noise_of(len(CAPTIONS))), tokenize(CAPTIONS, 6))


def kept_places(text_mask, words, length, draws=4000, **inputs):
    """How often each word of one caption is kept, and which were kept together."""
    tokens = torch.tensor([glip.START, *range(1000, 1000 + words), glip.END]).expand(draws, -1)
    noise = noise_of(draws, length=words + 2)
    inputs = {name: value.expand(draws, -1) if torch.is_tensor(value) else value
              for name, value in inputs.items()}  # fmt: skip
    found = mask_text(text_mask, tokens, length, noise=noise, **inputs)[:, 1:-1] - 1000
    return torch.bincount(found.flatten(), minlength=words) / draws, found, noise


def test_random_is_uniform_over_words():
    often, _, _ = kept_places("random", 10, 6)
    assert (often - 0.4).abs().max() < 4.5 * math.sqrt(0.4 * 0.6 / 4000)


def test_block_is_in_a_row_and_starts_anywhere():
    _, found, _ = kept_places("block", 10, 6)
    assert all((b - a == 1).all() for a, b in pairwise(found.unbind(1)))
    first = torch.bincount(found[:, 0], minlength=7) / 4000
    assert len(first) == 7 and (first - 1 / 7).abs().max() < 4.5 * math.sqrt(6 / 49 / 4000)


def test_frequency_follows_the_formula():
    """Kept are the highest of u - (1 - sqrt(t / f)), the bracket never below 0."""
    shares = torch.tensor([0, 0.3, 0.1, 0.01, 1e-3, 1e-4, 1e-5, 0.2, 0.05, 0])
    threshold = 1e-3
    often, found, noise = kept_places(
        "frequency", 8, 5, word_shares=shares[None], text_threshold=threshold
    )
    f = shares[1:-1].double()
    drop = torch.where(f > threshold, 1 - (threshold / f).sqrt(), 0.0)
    scores = noise[:, 1:-1].double() - drop
    wanted = scores.topk(3).indices.sort().values
    assert (wanted == found).all(dim=1).sum() >= 3998  # a tie of float32 is forgiven
    assert often[5] > often[3] > often[2] > often[1] and often[0] < 0.05


def test_frequency_with_an_infinite_threshold_is_random():
    shares = torch.rand(1, 12)
    endless = kept_places("frequency", 10, 6, word_shares=shares, text_threshold=1e30)[1]
    assert torch.equal(endless, kept_places("random", 10, 6)[1])


def test_word_shares_are_counted_over_the_pictures_once(monkeypatch):
    pairs = Captions(["the cat", "the dog's cat !", "never shown"], [3, 1, 0])
    shares = captions.word_shares(pairs)
    counts = Counter({"the": 4, "cat": 4, "dog": 1, "'s": 1, "!": 1})
    assert shares == {word: n / 11 for word, n in counts.items()}
    monkeypatch.setattr(glip, "words", None)  # the second time it is read from the cache
    assert captions.word_shares(pairs) == shares


def test_the_pieces_of_a_word_have_its_number():
    text = "the floccinaucinihilipilification"
    pieces = len(glip.encode_word("floccinaucinihilipilification"))
    numbers = [7.0, 9.0]
    table = captions.per_token([text, "the"], pieces + 3, lambda text: numbers[: len(text.split())])
    assert pieces > 2
    assert table.tolist() == [[0, 7, *[9] * pieces, 0], [0, 7, *[0] * (pieces + 1)]]


def test_syntax_keeps_nouns_then_adjectives_then_verbs():
    text = "a big red apple lies on the wooden table"
    wanted = {3: "apple", 4: "apple table", 5: "big apple table", 7: "big red apple wooden table",
              8: "big red apple lies wooden table"}  # fmt: skip
    for length, words in wanted.items():
        apply = TextMask("syntax", length, 1e-4, Captions([text]))
        for seed in range(3):  # it is not random
            found = words_of(apply([text], noise_of(1, seed))[0])
            assert found == list(glip.encode(words))


def test_syntax_chooses_whole_words_and_then_cuts_as_clipas_code_does():
    """length - 2 words by class, in their order, joined, tokenized and cut to length tokens."""
    texts = [*CAPTIONS, "jumps over supercalifragilistic cats " * 5, "the of the " * 20 + "red dog"]
    for length in (3, 5, 8, 12):
        shortened = []
        for text in texts:
            order = np.argsort(captions.word_classes(text), kind="stable")[: length - 2]
            shortened.append(" ".join(glip.words(text)[i] for i in sorted(order)))
        apply = TextMask("syntax", length, 1e-4, Captions(texts))
        assert torch.equal(apply(texts, noise_of(len(texts))), tokenize(shortened, length))


@pytest.mark.parametrize(
    "text", ["", "a/b (c) d's e.g. 5%", "大笨象 ! ?", "<start_of_text> hi", "." * 9]
)
def test_every_word_has_one_class(text):
    assert len(captions.word_classes(text)) == len(glip.words(text))


def test_batches_mask_captions_by_their_address():
    """The same words at the same position for any number of processes."""
    train, _ = data.load("emoji", 32)
    config = glip.GLIPConfig(32, 8, 24, 1, 3, 10, 20, 1, 2)
    order = ConceptOrder(train.concept, 12, 3, "pretrain")
    apply = TextMask("frequency", 4, 1e-4, train)
    whole = Batches(train, order, config, 0, 1, apply)[5].tokens
    parts = [Batches(train, order, config, rank, 3, apply)[5].tokens for rank in range(3)]
    width = whole.shape[1]
    assert width == 4
    padded = [torch.nn.functional.pad(p, (0, width - p.shape[1])) for p in parts]
    assert torch.equal(whole, torch.cat(padded))
    assert not torch.equal(whole, Batches(train, order, config, 0, 1)[5].tokens[:, :width])


@pytest.mark.parametrize(
    ("name", "length", "words"),
    [
        ("nouns", 5, "unknown text mask 'nouns': choose one of truncate, random"),
        ("random", 2, "text_tokens 2 leaves no word"),
        ("frequency", 5, "text mask 'frequency' needs word_shares"),
        ("syntax", 5, "text mask 'syntax' needs word_ranks"),
    ],
)
def test_bad_input_is_told(name, length, words):
    with pytest.raises(InputError, match=words):
        mask_text(name, tokenize(["a b c d e f"]), length)
