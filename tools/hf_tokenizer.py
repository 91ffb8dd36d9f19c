"""Our tokenizer as transformers' tokenizer.json, with the same ids.

transformers' own CLIPTokenizer keeps typographic quotes, ligatures and full-width letters; here
ftfy's tables replace them. Mojibake and HTML entities need more than tables: ours repairs them.
"""

from ftfy import chardata

import glip

START, END = "<|startoftext|>", "<|endoftext|>"  # transformers' names of CLIP's special tokens
CASED = r"[\p{Lu}\p{Ll}]"
WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def normalizers() -> list[dict]:
    """What ftfy.fix_text and our cleaning do to a text, in their order."""
    controls = "".join(f"\\x{{{code:x}}}" for code in chardata.CONTROL_CHARS)
    sloppy = {code: bytes([code]).decode("sloppy-windows-1252") for code in range(0x80, 0xA0)}
    tables = sloppy, chardata.LIGATURES, chardata.WIDTH_MAP
    repairs = [
        *(({"String": chr(code)}, text) for table in tables for code, text in table.items()),
        ({"Regex": chardata.SINGLE_QUOTE_RE.pattern}, "'"),
        ({"Regex": chardata.DOUBLE_QUOTE_RE.pattern}, '"'),
        ({"Regex": r"\x1b\[[\d;]*[a-zA-Z]"}, ""),  # a terminal's escape sequences
        ({"Regex": f"[{controls}]"}, ""),
        ({"Regex": rf"(?<={CASED})\u03a3(?!{CASED})"}, "\u03c2"),  # a sigma at a word's end
    ]
    replaced = [{"type": "Replace", "pattern": what, "content": text} for what, text in repairs]
    return [*replaced, {"type": "NFC"}, {"type": "Lowercase"}]


def tokenizer(context_length: int) -> tuple[dict, dict]:
    """tokenizer.json and tokenizer_config.json, for AutoTokenizer and CLIPProcessor."""
    _, ids, ranks = glip.vocabulary()
    pieces = {piece: i for piece, i in ids.items() if i < glip.START}
    special = {START: glip.START, END: glip.END}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    split = {"type": "Split", "pattern": {"Regex": WORD}, "behavior": "Removed", "invert": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}  # fmt: skip
    ends = [{"type": "Replace", "pattern": {"Regex": "</w>$"}, "content": ""},
            {"type": "Replace", "pattern": {"String": "</w>"}, "content": " "}]  # fmt: skip
    content = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": name, "special": True, **flags}
                         for name, i in special.items()],
        "normalizer": {"type": "Sequence", "normalizers": normalizers()},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "RobertaProcessing", "sep": [END, glip.END], "cls": [START, glip.START],
            "trim_offsets": False, "add_prefix_space": False,
        },
        "decoder": {"type": "Sequence", "decoders": [byte_level, *ends]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": END, "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>", "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False, "vocab": pieces | special,
            "merges": [" ".join(pair) for pair in ranks],
        },
    }  # fmt: skip
    return content, {
        "tokenizer_class": "PreTrainedTokenizerFast",  # CLIPTokenizer would make its own repairs
        "bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END,
        "model_max_length": context_length,
    }  # fmt: skip
