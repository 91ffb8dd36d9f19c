"""Our tokenizer as transformers' tokenizer.json, with ids that are the same.

transformers' own CLIPTokenizer leaves curled quotes, ligatures and full-width letters as they are;
here ftfy's tables replace them. Mojibake and HTML entities take more than tables: ours alone
repairs them.
"""

from ftfy import chardata

import glip

START, END = "<|startoftext|>", "<|endoftext|>"  # transformers' names of CLIP's special tokens

CASED = r"[\p{Lu}\p{Ll}]"

WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def normalizers() -> list[dict]:
    """What ftfy.fix_text and our cleaning do to a text, in their order."""
    controls = "".join(f"\\x{{{code:x}}}" for code in chardata.CONTROL_CHARS)
    repairs = [
        *(({"String": chr(code)}, bytes([code]).decode("sloppy-windows-1252"))
          for code in range(0x80, 0xA0)),
        *(({"String": chr(code)}, text) for code, text in chardata.LIGATURES.items()),
        *(({"String": chr(code)}, text) for code, text in chardata.WIDTH_MAP.items()),
        ({"Regex": chardata.SINGLE_QUOTE_RE.pattern}, "'"),
        ({"Regex": chardata.DOUBLE_QUOTE_RE.pattern}, '"'),
        ({"Regex": r"\x1b\[[\d;]*[a-zA-Z]"}, ""),  # a terminal's escape sequences
        ({"Regex": f"[{controls}]"}, ""),
        ({"Regex": rf"(?<={CASED})\u03a3(?!{CASED})"}, "\u03c2"),  # a sigma at a word's end
    ]  # fmt: skip
    replaced = [{"type": "Replace", "pattern": what, "content": text} for what, text in repairs]
    return [*replaced, {"type": "NFC"}, {"type": "Lowercase"}]


def tokenizer(context_length: int) -> tuple[dict, dict]:
    """tokenizer.json and tokenizer_config.json, for AutoTokenizer and CLIPProcessor."""
    _, pieces, ranks = glip.vocabulary()
    vocabulary = {piece: i for piece, i in pieces.items() if i < glip.START}
    special = {START: glip.START, END: glip.END}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
    }  # fmt: skip
    whole = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": name, "special": True, **flags}
                         for name, i in special.items()],
        "normalizer": {"type": "Sequence", "normalizers": normalizers()},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": WORD}, "behavior": "Removed", "invert": True},
            byte_level,
        ]},
        "post_processor": {
            "type": "RobertaProcessing", "sep": [END, glip.END], "cls": [START, glip.START],
            "trim_offsets": False, "add_prefix_space": False,
        },
        "decoder": {"type": "Sequence", "decoders": [
            byte_level, {"type": "Replace", "pattern": {"Regex": "</w>$"}, "content": ""},
            {"type": "Replace", "pattern": {"String": "</w>"}, "content": " "},
        ]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": END, "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>", "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False, "vocab": vocabulary | special,
            "merges": [" ".join(pair) for pair in ranks],
        },
    }  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # CLIPTokenizer would make its own repairs
        "bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END,
        "model_max_length": context_length,
    }  # fmt: skip
    return whole, config
