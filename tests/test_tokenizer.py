"""Token ids equal open_clip's on any text, and those of our export in transformers."""

import html
import json
import random

import emoji
import ftfy
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

import glip
from nanoglip.sources.emoji import Emoji
from nanoglip.text import cut_tokens, decode_tokens
from tools import hf_tokenizer

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
    return NASTY + Emoji("emoji", 16, ("Goog",), "train").captions + mixed


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
    assert torch.equal(ours, cut_tokens(glip.tokenize(NASTY), length))


def test_one_string_is_a_batch_of_one():
    assert torch.equal(glip.tokenize("a dog"), glip.tokenize(["a dog"]))


def test_transformers_has_our_ids(tmp_path):
    """Of every emoji's name, of hostile strings and of random mixtures of scripts; but for what the
    model card names. Read back, they are our texts."""
    from transformers import AutoTokenizer

    for name, content in zip(("", "_config"), hf_tokenizer.tokenizer(77), strict=True):
        (tmp_path / f"tokenizer{name}.json").write_text(json.dumps(content))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    names = sorted({row["en"].strip(":").replace("_", " ") for row in emoji.EMOJI_DATA.values()})
    assert len(names) > 3000 and sum("\u2019" in name for name in names) > 20
    repaired = [text for text in strings() if html.unescape(text) == text == ftfy.fix_encoding(text)
                and not any(name in text.lower() for name in glip.SPECIAL)]  # fmt: skip
    assert len(repaired) > 2000
    texts = [*names, *repaired, "\uff26\uff35\uff2c\uff2c\u3000width", "it\uff07s \uff76\uff9e",
             "\u201ehi\u201d", "\x1b[31mred\x1b[0m", "a\x85b \x9f", "'\u017f",
             "e\u0301 \ufb01\u017f", "\u039f\u0394\u039f\u03a3 \u03a3\u03b1\u03a3"]  # fmt: skip
    found = theirs(texts, truncation=True)["input_ids"]
    ours = [row[: row.argmax() + 1].tolist() for row in glip.tokenize(texts)]
    assert [text for text, a, b in zip(texts, found, ours, strict=True) if a != b] == []
    for text in ("", *names[::50]):
        shown = theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)
        assert shown == decode_tokens(glip.encode(text))
    assert theirs("&amp;")["input_ids"] != theirs("&")["input_ids"]  # as the card says
