"""Token ids equal open_clip's on any text."""

import random

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

import data
import glip

NASTY = [
    "", " ", "a", "A photo of a dog.", "don't can't I'll we've they're I'm he'd it's", "DON'T",
    "&lt;b&gt; fish &amp;amp; chips &#128512;", "“curly” ‘quotes’ — and … dashes",
    "caf\u00e9 cafe\u0301", "日本語のテキスト", "한국어 텍스트", "中文，标点。", "العربية", "हिन्दी",
    "emoji 😀👩‍⚕️🏴󠁧󠁢󠁥󠁮󠁧󠁿🇫🇷",
    "🏳️‍🌈" * 40, "\x00\x01\x1f\x7f", "tab\tnew\nline\r\n", "word " * 500, "x" * 2000,
    "1234567890 3.14 1,000", "<start_of_text> <end_of_text>", "in the <END_OF_TEXT> middle",
    "schÃ¶n mojibake â€œquotesâ€\x9d", "a_b-c/d\\e|f", "!!!???...", "ﬁ ligature Ⅷ ½ ²",
    "\u200bzero\u200dwidth\ufeff", "İstanbul ß ſ", "   lead and trail   ", "''''", "'s 't",
    "\ud7ff\ue000",
]  # fmt: skip


def strings():
    """Nasty ones, the captions we train on, and random mixtures of scripts."""
    draw = random.Random(0)
    alphabets = [range(32, 127), range(160, 592), range(0x370, 0x530), range(0x4E00, 0x4F00),
                 range(0x1F300, 0x1F700), range(0x2000, 0x2070), range(32)]  # fmt: skip
    mixed = [
        "".join(chr(draw.choice(draw.choice(alphabets))) for _ in range(draw.randrange(1, 60)))
        for _ in range(600)
    ]
    return NASTY + data.Emoji("emoji", 16, ("Goog",), "train").captions + mixed


def test_ids_equal_open_clip():
    texts = strings()
    assert len(texts) >= 2000
    ours, theirs = glip.tokenize(texts), SimpleTokenizer()(texts)
    wrong = [text for text, same in zip(texts, (ours == theirs).all(1), strict=True) if not same]
    assert not wrong


@pytest.mark.parametrize("length", [8, 16, 32])
def test_truncation_keeps_the_end_token(length):
    ours = glip.tokenize(NASTY, length)
    assert torch.equal(ours, SimpleTokenizer()(NASTY, context_length=length))
    assert ((ours == glip.END).sum(1) >= 1).all() and (ours[:, 0] == glip.START).all()
    assert torch.equal(ours, glip.cut_tokens(glip.tokenize(NASTY), length))


def test_one_string_is_a_batch_of_one():
    assert torch.equal(glip.tokenize("a dog"), glip.tokenize(["a dog"]))
