"""Steps of token ids: hand-made tables per tokenizer family, properties against the reference, faults."""

from __future__ import annotations

import base64
import importlib.metadata
import pickle
import re
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

import capo
from capo import steps as steps_module
from capo.steps import OutsideFences, Steps, TokenBytes, _Delimiter, _segment_reference, segment, step_texts, truncated

needs_native = pytest.mark.skipif(steps_module._native is None, reason="built without the native module")

# Stand-ins in the hand-made tables.
EOS, PAD = "<|eos|>", "<|pad|>"


def installed_file(distribution: str, suffix: str):
    """A file of an installed distribution, found without importing it."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs the tokenizer file {suffix} of the package {distribution}")
    found = [file.locate() for file in files if str(file).endswith(suffix)]
    if not found:
        pytest.skip(f"the installed {distribution} has no {suffix}")
    return found[0]


@pytest.fixture(scope="session")
def qwen_file():
    return installed_file("dashscope", "resources/qwen.tiktoken")


@pytest.fixture(scope="session")
def qwen(qwen_file) -> TokenBytes:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    eos = ["<|endoftext|>", "<|im_end|>"]
    return TokenBytes.from_tiktoken_file(qwen_file, special_tokens=special, eos_tokens=eos, num_tokens=151936)


@pytest.fixture(scope="session")
def llama3() -> TokenBytes:
    special = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|eot_id|>": 128009}
    path = installed_file("llama-models", "llama3/tokenizer.model")
    return TokenBytes.from_tiktoken_file(path, special_tokens=special, eos_tokens=["<|eot_id|>"], num_tokens=128256)


def sentencepiece_tokenizer() -> Tokenizer:
    """Llama 2's shape: ▁ for a space, a space put before the text, <0xNN> for bytes without a piece."""
    pieces = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [
        "▁",
        "▁▁",
        "▁The",
        "▁So",
        "The",
        "▁a",
        "▁b",
        "▁答",
        "答",
        ".",
        "a",
        "b",
        "c",
        "é",
        "T",
        "h",
        "e",
        "S",
        "o",
    ]
    pieces += ["\n", "\n\n", ".\n\n", "\n\n▁", "▁\n\n"]
    tokenizer = Tokenizer(
        models.BPE({piece: id_ for id_, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    return tokenizer


def byte_level_tokenizer() -> Tokenizer:
    """A small byte-level BPE; line ends fuse with what is beside them, as nothing is split before training."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = (
        ["a.\n\n"] * 9 + ["b\n\n"] * 5 + ["So a"] * 5 + ["答"] * 4 + ["c.\n\nSo"] * 3 + [" \n\n"] * 3 + ["🙂🙂"] * 3
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def sentencepiece() -> TokenBytes:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=sentencepiece_tokenizer(), eos_token="</s>", pad_token="<pad>")
    return TokenBytes.from_tokenizer(tokenizer)


@pytest.fixture(scope="session")
def byte_level() -> TokenBytes:
    return TokenBytes.from_tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(), eos_token="<|end|>", pad_token="<|pad|>")
    )


def ids_of(table: TokenBytes, pieces: list[str | bytes]) -> list[int]:
    by_bytes = {piece: id_ for id_, piece in enumerate(table._pieces) if piece}
    eos = int(table.eos.nonzero()[0])
    pad = int((table.special & ~table.eos).nonzero()[0])
    named = {EOS: eos, PAD: pad}
    return [named[p] if p in named else by_bytes[p.encode() if isinstance(p, str) else p] for p in pieces]


def batch(*responses: list[int], dtype: torch.dtype = torch.int64) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([0, *map(len, responses)])
    return torch.tensor([id_ for ids in responses for id_ in ids], dtype=dtype), lengths.cumsum(0)


def reference(ids, cu, table, delimiter="\n\n", max_steps=None) -> Steps:
    return _segment_reference(ids.cpu(), cu.to(torch.int64), table, _Delimiter(delimiter), max_steps)


def ranges(steps: Steps) -> tuple[list[int], list[int], list[int]]:
    return steps.starts.tolist(), steps.ends.tolist(), steps.cu_steps.tolist()


def owners(steps: Steps, num_tokens: int) -> str:
    """The step of every token of one response, as a digit; '.' for none."""
    text = ["."] * num_tokens
    for number, (start, end) in enumerate(zip(steps.starts.tolist(), steps.ends.tolist(), strict=True)):
        for token in range(start, end):
            assert text[token] == "."
            text[token] = str(number)
    return "".join(text)


def check(table: TokenBytes, ids: list[int], expected: str, delimiter="\n\n", max_steps=None) -> None:
    packed = batch(ids)
    assert owners(segment(*packed, table, delimiter, max_steps=max_steps), len(ids)) == expected
    assert owners(reference(*packed, table, delimiter, max_steps), len(ids)) == expected


# Hand-made tables: tokens, and the step of each ("." for none).

BYTES_OF_SMILE = [b"\xf0", b"\x9f", b"\x99", b"\x82"]

# Pieces that all vocabularies have: single bytes and a few fused ones.
COMMON = {
    "empty": ([], ""),
    "one step": (["a", "b", "c"], "000"),
    "delimiter token begins the next step": (["a", "\n\n", "b"], "011"),
    "two line ends begin the next step": (["a", "\n", "\n", "b"], "0111"),
    "fused delimiter ends the step": (["a", ".\n\n", "b"], "001"),
    "three steps": (["a", ".\n\n", "b", "\n\n", "c", EOS], "001222"),
    "one line end is none": (["a", "\n", "b"], "000"),
    "delimiter from the end of one token on": (["a", b"\n", ".\n\n", "b", "\n\n"], "00011"),
    "leading delimiters": (["\n\n", "\n", "a", "\n\n", "b"], "00011"),
    "leading white space": ([" ", "\n\n", " ", "\n", "\n\n", "a"], "000000"),
    "trailing delimiters": (["a", "\n\n", "b", "\n\n", "\n"], "01111"),
    "trailing fused": (["a", ".\n\n", EOS], "000"),
    "trailing white space after the only step": (["a", "\n\n", " ", "\n", EOS], "00000"),
    "empty pieces between": (["a", "\n\n", "\n\n", "\n", "b"], "01111"),
    "white space piece between": (["a", "\n\n", " ", "\n\n", "b"], "01111"),
    "fused, then a delimiter": (["a", ".\n\n", "\n\n", "b"], "0011"),
    "line end completes over three tokens": (["a", "\n", "b", "\n", "\n", "c"], "000111"),
    "carriage returns": (["a", "\r", "\n", "\r", "\n", "b"], "011111"),
    "mixed line ends": (["a", "\n", "\r", "\n", "b", "\r", "\n", "\n", "c"], "011112222"),
    "lone carriage returns are no line ends": (["a", "\r", "\r", "b", "\n", "\r", "\r", "\n", "c"], "0" * 9),
    "blank line with a space is none": (["a", "\n", " ", "\n", "b"], "00000"),
    "EOS joins the last step": (["a", "\n\n", "b", EOS], "0111"),
    "second EOS is padding": (["a", EOS, EOS, PAD], "00.."),
    "padding after EOS": (["a", "\n\n", "b", EOS, PAD, PAD], "0111.."),
    "EOS after padding": (["a", PAD, EOS], "0.."),
    "special token cuts": (["a", PAD, "b", "\n\n", "c"], "0.122"),
    "EOS in the middle cuts": (["a", EOS, "b", EOS], "0.11"),
    "EOS before white space is in the middle": (["a", EOS, "\n"], "0.."),
    "no delimiter over a special token": (["a", "\n", PAD, "\n", "b"], "00.11"),
    "leading special token": ([PAD, "\n\n", "a", "\n\n", "b"], ".0011"),
    "white space between special tokens": (["a", PAD, " ", "\n\n", PAD, "b"], "0....1"),
    "only EOS": ([EOS], "."),
    "only special tokens": ([PAD, EOS, PAD], "..."),
    "only white space": ([" ", "\n", "\t", " "], "...."),
    "only delimiters": (["\n\n", "\n\n", "\n", EOS], "...."),
    "character of four tokens after a delimiter": (["a", "\n\n", *BYTES_OF_SMILE, "b"], "0111111"),
    "character before a delimiter": ([*BYTES_OF_SMILE, "\n\n", *BYTES_OF_SMILE], "000011111"),
    "invalid bytes are text": ([b"\xff", b"\xfe", "\n\n", b"\x80", b"\xff", "\n", "\n", b"\xc3"], "00111222"),
    "stray continuation byte may begin a step": (["a", ".\n\n", b"\x80", "b"], "0011"),
    "no-break space is text": (["a", "\n\n", b"\xc2", b"\xa0", "\n\n", "b"], "011122"),
}

TIKTOKEN = {
    "fused with punctuation": (["Step", ")\n\n", "So", ":\n\n", "A", "}\n\n", "x", "$\n\n"], "00112233"),
    "fused CJK": (["答案", "。\n\n", "所以", "答"], "0011"),
    "three line ends in one token": (["A", "\n\n\n", "x"], "011"),
    "four line ends in one token": (["A", "\n\n\n\n", "x", " \n\n", "A"], "01112"),
    "fused carriage returns": (["A", "\r\n\r\n", "x", ".\r\n\r\n", "So"], "01112"),
    "line end of a fused token and the next": (["A", ".\n", "\n", "So"], "0011"),
    "carriage return line end and the next": (["A", ".\r\n", "\r\n", "So"], "0011"),
    "a space before the delimiter in its token": (["A", ".\n", " \n\n", "So"], "0001"),
    "spaces in the blank line": (["A", "\n \n", "x", "\n\t\n", "A"], "00000"),
    "part of a character behind the delimiter": (["A", "\n\n", b"\xf0\x9f", b"\x99", b"\x82", "x"], "011111"),
    "combining accent": (["e", "\n\n", b"\xcc\x81", "x"], "0111"),
    "zero-width space is text": (["A", "\n\n", "\u200b", "\n\n", "x"], "01122"),
    "ideographic space is text": (["A", "\n\n", "\u3000", "\n\n", "x"], "01122"),
    "headings": (["###", " Step", "A", "\n\n", "###", " Step", "x", "\n\n", "---"], "000111122"),
    "tab before the delimiter in its token": (["A", "\t\n\n", "x"], "001"),
    "list with breaks": (["A", "*\n\n", "\n", "x", ";\n\n", " ", "A", ".", "\n\n"], "001112222"),
}

SENTENCEPIECE = {
    "space before the first word": (["▁The", "▁a", "\n", "\n", "▁So", "▁b", EOS], "0011111"),
    "space token": (["▁", "a", "\n\n", "▁", "b"], "00111"),
    "double space between delimiters": (["a", "\n\n", "▁▁", "\n\n", "b"], "01111"),
    "byte tokens for line ends": (["▁The", b"\n", b"\n", "▁So"], "0111"),
    "byte token and piece": (["▁The", b"\n", "\n\n", "▁So"], "0111"),
    "CJK by bytes": (["▁答", "\n\n", b"\xe7", b"\xad", b"\x94", "a"], "011111"),
    "delimiter with a space behind": (["a", "\n\n▁", "b", ".\n\n", "c"], "01112"),
    "delimiter with a space before": (["a", "▁\n\n", "b"], "001"),
    "two fused tokens without text": (["a", "▁\n\n", "\n\n▁", "b"], "0011"),
}

BYTE_LEVEL = {
    "fused": (["a.\n\n", "So", " ", "a", ".\n\n", "b\n\n"], "011112"),
    "fused only": (["a.\n\n", "a.\n\n", "b\n\n", EOS], "0122"),
    "fused with the text that follows": (["c.\n\nSo", "a", "\n\n", "b"], "0122"),
    "step inside a token does not exist": (["c.\n\nSo", "\n\n", "a"], "011"),
    "blank rest of a step joins the next": (["c.\n\nSo", " ", "\n\n", "a"], "0111"),
    "blank rest at the end": (["a", "c.\n\nSo", " ", "\n\n", EOS], "00000"),
    "CJK": (["答", "\n\n", "答"], "011"),
}


def oracle_cases() -> list:
    cases = []
    families = {
        "qwen": COMMON | TIKTOKEN,
        "llama3": COMMON | TIKTOKEN,
        "sentencepiece": COMMON | SENTENCEPIECE,
        "byte_level": COMMON | BYTE_LEVEL,
    }
    for family, table in families.items():
        for name, (pieces, expected) in table.items():
            cases.append(pytest.param(family, pieces, expected, id=f"{family}-{name}".replace(" ", "_")))
    return cases


@pytest.mark.parametrize("family, pieces, expected", oracle_cases())
def test_each_token_has_the_step_of_the_table(family, pieces, expected, request):
    table = request.getfixturevalue(family)
    if family == "sentencepiece":
        pieces = [p.replace("▁", " ") if isinstance(p, str) else p for p in pieces]
    check(table, ids_of(table, pieces), expected)


def test_qwen_ids_written_by_hand(qwen):
    # "A.\n\nB" as sampled, "A", "\n\n", "B", and two line ends that the tokenizer itself would never produce.
    check(qwen, [32, 382, 33, 151645], "0011")
    check(qwen, [32, 271, 33, 151645], "0111")
    check(qwen, [32, 198, 198, 33, 151643], "01111")


def test_llama3_ids_written_by_hand(llama3):
    check(llama3, [32, 382, 33, 128009], "0011")
    check(llama3, [32, 271, 33, 128009, 128009], "0111.")
    check(llama3, [128000, 32, 271, 33], ".011")


# Delimiters.

SIMPLE = TokenBytes(
    [
        b"a", b"b", b"\n", b"\n\n", b".\n\n", b"##", b"#", b" ", b"\r\n", b"\xe7", b"\xad\x94", b"",
        b"Step 1", b"\xe7\xad\x94", b"", b"",
    ],
    special_ids=[15],
    eos_ids=[14],
)  # fmt: skip


@pytest.mark.parametrize(
    "delimiter, pieces, expected",
    [
        ("\n", ["a", "\n", "b", "\n\n", "a"], "01122"),
        ("\n", ["a", "\r\n", "b"], "011"),
        ("\r\n\r\n", ["a", "\n\n", "b"], "011"),
        (b"\n\n", ["a", "\r\n", "\n", "b"], "0111"),
        ("\n\n\n", ["a", "\n\n", "b", "\n\n", "\n", "a"], "000111"),
        ("##", ["a", "##", "b", "#", "#", "a"], "011222"),
        ("##", ["##", "a", "##", "##", "b", "##"], "001111"),
        ("##", ["##", "##"], ".."),
        ("##", ["a", "#", "b", "#", "a"], "00000"),
        ("答", ["a", b"\xe7", b"\xad\x94", "b"], "0111"),
        (b"\xad\x94", ["a", b"\xe7", b"\xad\x94", "b"], "0001"),  # no step begins inside a character
        (re.compile("Step [0-9]"), ["Step 1", "a", "Step 1", "b"], "0011"),
        (re.compile("(?=Step)"), ["a", "Step 1", "b", "Step 1"], "0112"),
        (re.compile(r"\n(?=#)"), ["a", "\n", "b", "\n", "#"], "00011"),
        (re.compile("[答]"), ["a", b"\xe7", "b", "答", "a"], "00011"),
        (re.compile(b"[\xad]"), ["a", b"\xe7", b"\xad\x94", "b"], "0001"),
        (re.compile(rb"\n\n"), ["a", "\r\n", "\r\n", "b"], "0000"),
        (re.compile("b*"), ["a", "a", "b", "a"], "0122"),
        (re.compile("^#", re.MULTILINE), ["a", "#", "\n", "#", "b", PAD, "#", "a"], "00011.22"),
    ],
)
def test_delimiters(delimiter, pieces, expected):
    check(SIMPLE, ids_of(SIMPLE, pieces), expected, delimiter)


BACKTICKS = "```"


@pytest.mark.parametrize(
    ("parts", "delimiter"),
    [
        (["Code:", f"\n\n{BACKTICKS}py\nx = 1\n\nStep 3: y = 2\n{BACKTICKS}", "\n\nDone."], "\n\n"),
        (["a", f"\n\n  ~~~\nx\n\n{BACKTICKS}\n\ny\n~~~~ ", "\n\nb"], "\n\n"),  # tildes are closed by tildes
        (["a", f"\n\n{BACKTICKS}`\nx\n\n{BACKTICKS}\n\ny\n{BACKTICKS}`", "\n\nb"], "\n\n"),  # four by four
        (["a", f"\n\n{BACKTICKS}\nx", "\n\ny"], "\n\n"),  # never closed
        (["a", f"\n\n{BACKTICKS}\nx", f"\n\n{BACKTICKS}py", "\n\n~~~\ny", "\n\n~~~"], "\n\n"),
        (["a", f"\n\n    {BACKTICKS}\nx", f"\n\n    {BACKTICKS}"], "\n\n"),  # an indented line is no fence
        (["a", f"\n\nin `{BACKTICKS}` line", f"\n\n`{BACKTICKS}` b"], "\n\n"),
        (["a", f"\n\n{BACKTICKS}x{BACKTICKS} is code", f"\n\nb\n{BACKTICKS}"], "\n\n"),
        (["So", "\n\n\\begin{align*}\na\n\nb\n\\end{align*}", "\n\nc"], "\n\n"),
        (["\\begin{a}\\begin{b}\n\nx\n\n\\end{b}\n\ny\\end{a}", "\n\nz"], "\n\n"),
        (["\\begin{a}\\begin{b}\n\nx\n\n\\end{b}", "\n\ny"], "\n\n"),  # the outer one is never closed
        (["\\begin{a}", "\n\nx\\end{b}", "\n\ny"], "\n\n"),
        (["a", f"##\n{BACKTICKS}\nx##y\n{BACKTICKS}\n", "##b"], "##"),
        (["a", f"\n{BACKTICKS}\nx\n答\r\n{BACKTICKS}", "\nb"], re.compile(r"\n")),
    ],
)  # fmt: skip
def test_fences_are_not_cut(parts, delimiter, qwen):
    text = "".join(parts)
    ids = ids_of(qwen, [bytes([byte]) for byte in text.encode()])
    fences = OutsideFences(delimiter)
    steps = segment(*batch(ids), qwen, fences)
    assert step_texts(torch.tensor(ids), steps, qwen) == [parts]
    assert ranges(steps) == ranges(reference(*batch(ids), qwen, fences))


def test_without_fences_in_the_text_the_steps_are_the_same():
    ids, cu = random_batch(60, 40)
    for delimiter in ("\n\n", "##", re.compile(r"\n+")):
        assert ranges(segment(ids, cu, SIMPLE, OutsideFences(delimiter))) == ranges(segment(ids, cu, SIMPLE, delimiter))
    with pytest.raises(ValueError, match="delimiter must be"):
        segment(ids, cu, SIMPLE, OutsideFences(""))


@pytest.mark.parametrize(
    "line", [f"{BACKTICKS}a\n", f"{BACKTICKS}\n\n", "~~~\n```\n", "\\begin{a}\n\n", "\\end{a}", "`" * 1000 + "\n"]
)
def test_fences_take_linear_time(line):
    text = (line * 200_000)[:200_000].encode()
    table = TokenBytes([bytes([byte]) for byte in range(256)])
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).int()
    begin = time.process_time()
    segment(ids, torch.tensor([0, len(ids)]), table, OutsideFences())
    assert time.process_time() - begin < 2


@pytest.mark.parametrize("delimiter", ["", b"", None, 3, ["\n"]])
def test_delimiter_of_another_type_is_named(delimiter):
    with pytest.raises(ValueError, match="delimiter must be"):
        segment(*batch([0]), SIMPLE, delimiter)


@pytest.mark.parametrize(
    "blank, expected",
    [
        *[(char, "0111111") for char in (" ", "\t", "\v", "\f", "\r")],
        *[(char, "0111222") for char in ("\u00a0", "\u0085", "\u2028", "\u2029", "\u200b", "\u3000")],
    ],
)
def test_white_space_is_ascii(blank, expected):
    """A line of ASCII white space is no step; other white space is text. Neither makes a blank line by itself."""
    table = TokenBytes([b"a", b"\n", blank.encode(), b"b"])
    ids = [0, 1, 1, 2, 1, 1, 3]
    # A carriage return before a line end belongs to the delimiter.
    check(table, ids, expected)
    check(table, [0, 2, 3], "000")
    check(table, [0, 1, 2, 3], "0000")


def test_tokens_without_bytes_stay_with_the_token_before():
    a, b, breaks, fused, nothing, pad = 0, 1, 3, 4, 11, 15
    check(SIMPLE, [nothing, a, fused, nothing, nothing, b, nothing], "0000011")
    check(SIMPLE, [a, breaks, nothing, b], "0111")
    check(SIMPLE, [a, nothing, breaks, b], "0011")
    check(SIMPLE, [nothing, nothing], "..")
    check(SIMPLE, [a, pad, nothing, b], "0.11")


@pytest.mark.parametrize(
    "char", ["\x80", "\u00e9", "\u07ff", "\u0800", "答", "\uffff", "\U00010000", "\U0010ffff"], ids=ascii
)
def test_no_step_begins_inside_a_character(char):
    """A character begun in the token that also holds the delimiter: its other bytes cannot begin the step."""
    encoded = char.encode()
    for cut in range(1, len(encoded)):
        rest = [bytes([byte]) for byte in encoded[cut:]]
        tokens = [b"a", b".\n\n" + encoded[:cut], *rest, b"b", b"", b"\x80"]
        table = TokenBytes(tokens)
        last = 2 + len(rest)
        for delimiter in ("\n\n", re.compile("\n+")):
            check(table, list(range(last + 1)), "00" + "0" * len(rest) + "1", delimiter)
            # A token without bytes is not in the way, and one continuation byte too many is text like any other.
            with_gap = [0, 1, last + 1, *range(2, last + 1)]
            check(table, with_gap, "000" + "0" * len(rest) + "1", delimiter)
            check(table, [*range(last), last + 2, last], "00" + "0" * len(rest) + "11", delimiter)


@pytest.mark.parametrize("lead", [0x41, 0x7F, 0x80, 0xBF, 0xC0, 0xC1, 0xF5, 0xFF], ids=hex)
def test_what_begins_no_character_does_not_hold_the_bytes_after_it(lead):
    table = TokenBytes([b"a", b".\n\n" + bytes([lead]), b"\x80", b"b"])
    check(table, [0, 1, 2, 3], "0011")


def test_step_cap_merges_the_rest_into_the_last_step():
    ids = ids_of(SIMPLE, ["a", "\n\n", "b", "\n\n", "a", ".\n\n", "b", EOS])
    check(SIMPLE, ids, "01122233", max_steps=None)
    check(SIMPLE, ids, "01122233", max_steps=4)
    check(SIMPLE, ids, "01122222", max_steps=3)
    check(SIMPLE, ids, "00000000", max_steps=1)
    check(SIMPLE, ids_of(SIMPLE, ["a", "\n\n", "b", PAD, "a", EOS]), "000...", max_steps=1)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"max_steps must be at least 1, got {wrong}"):
            segment(*batch(ids), SIMPLE, max_steps=wrong)


# Properties.

pieces = st.one_of(
    st.sampled_from([b"\n", b"\r", b"\n\n", b"\r\n", b".\n\n", b"a", b"b", b" ", b"#", b"##", b"", b"\n#"]),
    st.sampled_from([b"\xe7", b"\xad\x94", b"\xf0\x9f", b"\x99", b"\x82b", b"\x80", b"\xc3", b"\xff"]),
    st.sampled_from([b".\n\n\xf0", b".\n\n\xf0\x9f\x99", b"\x82", b"\xe7\xad\x94"]),
    st.binary(max_size=5),
)  # fmt: skip
DELIMITERS = [
    "\n\n", "\n", "\n\n\n", "#", "##", "a", "\n#", b"\x94", "答",
    re.compile(r"\s+"), re.compile("(?=a)"), re.compile(r"\b"), re.compile(rb"[\x80-\xff]"), re.compile(r"(?m)$|^#"),
]  # fmt: skip


@st.composite
def problems(draw):
    """A small vocabulary, a batch of random ids over it, a delimiter and a cap."""
    tokens = draw(st.lists(pieces, min_size=1, max_size=12))
    size = len(tokens) + 2
    table = TokenBytes([*tokens, b"", b""], special_ids=[size - 2], eos_ids=[size - 1])
    responses = draw(st.lists(st.lists(st.integers(0, size - 1), max_size=25), min_size=1, max_size=4))
    return table, responses, draw(st.sampled_from(DELIMITERS)), draw(st.sampled_from([None, None, 1, 2, 3]))


def inside_character(text: bytes, position: int) -> bool:
    """Whether a well-formed character reaches over ``position``; written apart from the package's own rule."""
    for start in range(max(0, position - 3), position):
        for end in range(position + 1, start + 5):
            try:
                if len(text[start:end].decode()) == 1:
                    return True
            except UnicodeDecodeError:
                continue
    return False


@settings(max_examples=600, deadline=None)
@given(problems())
def test_native_equals_reference_bit_for_bit(problem):
    table, responses, delimiter, max_steps = problem
    for dtype in (torch.int32, torch.int64):
        ids, cu = batch(*responses, dtype=dtype)
        actual = segment(ids, cu.to(dtype), table, delimiter, max_steps=max_steps)
        assert ranges(actual) == ranges(reference(ids, cu, table, delimiter, max_steps))


@settings(max_examples=300, deadline=None)
@given(problems())
def test_steps_partition_the_response(problem):
    table, responses, delimiter, max_steps = problem
    ids, cu = batch(*responses)
    steps = segment(ids, cu, table, delimiter, max_steps=max_steps)
    starts, ends, cu_steps = ranges(steps)
    assert len(cu_steps) == len(responses) + 1 and cu_steps[-1] == len(starts)
    for i, tokens in enumerate(responses):
        first, last = cu[i].item(), cu[i + 1].item()
        mine = list(zip(starts[cu_steps[i] : cu_steps[i + 1]], ends[cu_steps[i] : cu_steps[i + 1]], strict=True))
        assert max_steps is None or len(mine) <= max_steps
        edges = [edge for step in mine for edge in step]
        assert edges == sorted(edges) and all(start < end for start, end in mine)
        assert all(first <= edge <= last for edge in edges)
        text = table.join(tokens)
        assert text == b"".join(table[id_] for id_ in tokens)
        covered = {token for start, end in mine for token in range(start, end)}
        for start, end in mine:
            own = tokens[start - first : end - first]
            assert table.join(own).strip(b" \t\n\v\f\r")
            specials = [position for position, id_ in enumerate(own) if table.special[id_]]
            assert specials in ([], [len(own) - 1]) and all(table.eos[own[p]] for p in specials)
            after_special = start == first or table.special[tokens[start - first - 1]]
            assert after_special or not inside_character(text, len(table.join(tokens[: start - first])))
        if max_steps is None:
            # What has no step is special, or lies between special tokens with nothing but blanks and delimiters.
            rest = [id_ for t, id_ in enumerate(tokens, first) if t not in covered and not table.special[id_]]
            left = table.join(rest)
            if delimiter in ("\n\n", "\n", "\n\n\n"):
                assert not left.strip(b" \t\n\v\f\r")


@settings(max_examples=100, deadline=None)
@given(problems())
def test_a_batch_is_each_response_alone(problem):
    table, responses, delimiter, max_steps = problem
    together = segment(*batch(*responses), table, delimiter, max_steps=max_steps)
    first_token = 0
    for i, tokens in enumerate(responses):
        alone = segment(*batch(tokens), table, delimiter, max_steps=max_steps)
        mine = slice(together.cu_steps[i], together.cu_steps[i + 1])
        assert torch.equal(together.starts[mine], alone.starts + first_token)
        assert torch.equal(together.ends[mine], alone.ends + first_token)
        first_token += len(tokens)


QWEN_LINE_ENDS_AND_EOS = [198, 271, 382, 1406, 26809, 319, 151645, 151643]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(QWEN_LINE_ENDS_AND_EOS) | st.integers(0, 151935), max_size=60))
def test_random_ids_of_a_real_vocabulary(qwen, ids):
    packed = batch(ids)
    assert ranges(segment(*packed, qwen)) == ranges(reference(*packed, qwen))
    texts = step_texts(packed[0], segment(*packed, qwen), qwen)[0]
    assert all(text.strip(" \t\n\v\f\r") for text in texts)


def test_text_split_by_hand_has_the_same_steps(qwen):
    """Whatever tokens a text is cut into, the steps hold the same text, as long as no token reaches over a boundary."""
    parts = ["First, 3 + 4 = 7.", "\n\nSo \U0001f642 答案 is 7", "\n\n\n# Done\n\t", "\n\nThe end."]
    text = "".join(parts).encode()
    ids = ids_of(qwen, [bytes([byte]) for byte in text])
    steps = segment(*batch(ids), qwen)
    assert step_texts(torch.tensor(ids), steps, qwen) == [parts]


def random_batch(num_responses: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 2 * length, (num_responses,), generator=generator)
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return torch.randint(0, len(SIMPLE), (int(cu[-1]),), generator=generator), cu


@needs_native
def test_thread_count_does_not_matter():
    ids, cu = random_batch(3000, 400)
    expected = ranges(segment(ids, cu, SIMPLE, num_threads=1))
    first = cu[:201]
    assert ranges(reference(ids[: first[-1]], first, SIMPLE))[0] == expected[0][: expected[2][200]]
    for num_threads in (2, 3, 16):
        assert ranges(segment(ids, cu, SIMPLE, num_threads=num_threads)) == expected
    with pytest.raises(ValueError, match="num_threads must be at least 1, got 0"):
        segment(ids, cu, SIMPLE, num_threads=0)


def test_without_the_native_module(monkeypatch):
    ids, cu = random_batch(20, 30)
    expected = segment(ids, cu, SIMPLE)
    monkeypatch.setattr(steps_module, "_native", None)
    assert ranges(segment(ids, cu, SIMPLE)) == ranges(expected)


# Arguments.


def test_ids_may_be_strided_and_unaligned():
    ids, cu = random_batch(20, 30)
    expected = ranges(segment(ids, cu, SIMPLE))
    assert ranges(segment(ids.repeat_interleave(2)[::2], cu, SIMPLE)) == expected
    assert ranges(segment(torch.cat([ids[:1], ids]).to(torch.int32)[1:], cu, SIMPLE)) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_are_on_the_device_of_the_ids():
    ids, cu = random_batch(20, 30)
    steps = segment(ids.cuda(), cu.cuda(), SIMPLE)
    assert steps.starts.is_cuda and ranges(steps) == ranges(segment(ids, cu, SIMPLE))


@pytest.mark.parametrize("difference", [-1, 1])
def test_one_token_too_many_or_too_few_is_refused(difference):
    ids, cu = batch([0, 1, 2], [0, 0])
    cu[-1] += difference
    with pytest.raises(ValueError, match=rf"end with len\(token_ids\) = 5, got 0 .. {5 + difference}"):
        segment(ids, cu, SIMPLE)


@pytest.mark.parametrize(
    "cu, message",
    [
        (torch.tensor([1, 3]), "begin with 0"),
        (torch.tensor([0, 2, 1, 3]), "entry 1 is 2 and entry 2 is 1"),
        (torch.tensor([], dtype=torch.int64), "empty"),
        (torch.tensor([0.0, 3.0]), r"cu_seqlens must be a 1-D int32 or int64 tensor, got torch.float32 \[2\]"),
        (torch.tensor([[0, 3]]), r"cu_seqlens .* \[1, 2\]"),
        ([0, 3], "cu_seqlens .* list"),
        (None, "cu_seqlens .* NoneType"),
    ],
)
def test_wrong_cu_seqlens_are_named(cu, message):
    with pytest.raises(ValueError, match=message):
        segment(torch.tensor([0, 1, 0]), cu, SIMPLE)


@pytest.mark.parametrize("ids", [torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor([0], dtype=torch.int16), [0]])
def test_wrong_token_ids_are_named(ids):
    with pytest.raises(ValueError, match="token_ids must be a 1-D int32 or int64 tensor"):
        segment(ids, torch.tensor([0, 1]), SIMPLE)


def test_wrong_token_bytes_are_named():
    with pytest.raises(ValueError, match=r"token_bytes must be a capo.TokenBytes, got list"):
        segment(*batch([0]), [b"a"])


@pytest.mark.parametrize("delimiter", ["\n\n", "#"])
@pytest.mark.parametrize("wrong", [16, -1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_unknown_ids_are_named_with_their_position(wrong, dtype, delimiter):
    ids, cu = batch([0, 1], [2, wrong, 0], [wrong], dtype=dtype)
    message = rf"token_ids\[3\] is {wrong}, .* 0 to 15; .* num_tokens="
    for run in (segment, reference):
        with pytest.raises(ValueError, match=message):
            run(ids, cu, SIMPLE, delimiter)
    with pytest.raises(ValueError, match=message):
        truncated(ids, cu, SIMPLE)
    with pytest.raises(ValueError, match=message):
        step_texts(ids, Steps(cu[:0], cu[:0], cu * 0), SIMPLE)
    assert len(segment(*batch([0, 1], dtype=dtype), SIMPLE, delimiter).starts) == 1


def test_ids_are_not_cut_to_32_bits():
    for wrong in (2**32, 2**40 + 1, -(2**63)):
        with pytest.raises(ValueError, match=rf"token_ids\[1\] is {wrong}"):
            segment(*batch([0, wrong]), SIMPLE)


def test_the_first_unknown_id_is_named_whatever_the_threads():
    ids, cu = random_batch(3000, 400)
    places = [900_001, 400_003, 1_000_000]
    ids[places] = 99
    for num_threads in (1, 4):
        with pytest.raises(ValueError, match=rf"token_ids\[{min(places)}\] is 99"):
            segment(ids, cu, SIMPLE, num_threads=num_threads)


@pytest.mark.parametrize("num_responses", [0, 1, 3])
def test_no_tokens(num_responses):
    cu = torch.zeros(num_responses + 1, dtype=torch.int32)
    for delimiter in ("\n\n", "#"):
        steps = segment(torch.tensor([], dtype=torch.int64), cu, SIMPLE, delimiter)
        assert ranges(steps) == ([], [], [0] * (num_responses + 1))
        assert step_texts(torch.tensor([], dtype=torch.int64), steps, SIMPLE) == [[]] * num_responses


# Ids are the truth.


def test_ids_that_do_not_survive_a_round_trip_keep_their_steps(qwen_file, qwen):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in qwen_file.read_bytes().splitlines()}
    encoding = tiktoken.Encoding("qwen", pat_str=r"\s*[\r\n]+|\S+", mergeable_ranks=ranks, special_tokens={})
    # The text of these ids has one token for the two line ends, and one for the smile.
    ids = ids_of(qwen, ["a", "\n", "\n", *BYTES_OF_SMILE, "\n", "\n\n", "b"])
    assert encoding.encode_ordinary(encoding.decode(ids)) != ids
    check(qwen, ids, "0111111222")


class NeverEncodes(PreTrainedTokenizerFast):
    def _fail(self, *args, **kwargs):
        raise AssertionError("text was encoded")

    encode = __call__ = _encode_plus = _batch_encode_plus = encode_plus = tokenize = _fail


def test_text_is_never_encoded():
    tokenizer = NeverEncodes(tokenizer_object=byte_level_tokenizer(), eos_token="<|end|>")
    for encode in (tokenizer.encode, tokenizer, tokenizer.tokenize):
        with pytest.raises(AssertionError, match="text was encoded"):
            encode("a")
    table = TokenBytes.from_tokenizer(tokenizer)
    ids = ids_of(table, ["a.\n\n", "So", " ", "a", EOS])
    packed = batch(ids)
    steps = segment(*packed, table)
    assert owners(steps, 5) == "01111"
    assert step_texts(packed[0], steps, table) == [["a.\n\n", "So a"]]


def test_step_texts_are_the_bytes_of_the_tokens():
    ids = ids_of(SIMPLE, ["a", ".\n\n", b"\xe7", b"\xad\x94", "\n", "\n", b"\xe7", "b", EOS])
    ids, cu = batch(ids, [], ids_of(SIMPLE, [PAD, " ", EOS]), ids_of(SIMPLE, ["a", PAD, "b"]))
    texts = step_texts(ids, segment(ids, cu, SIMPLE), SIMPLE)
    assert texts == [["a.\n\n", "答", "\n\n\ufffdb"], [], [], ["a", "b"]]
    with pytest.raises(ValueError, match=r"steps end at token 15, but token_ids has 3"):
        step_texts(ids[:3], segment(ids, cu, SIMPLE), SIMPLE)


def test_truncated_responses_have_no_eos():
    a, eos, pad = ids_of(SIMPLE, ["a", EOS, PAD])
    ids, cu = batch([a, eos], [a], [], [a, eos, pad], [eos], [a, pad])
    assert truncated(ids, cu.to(torch.int32), SIMPLE).tolist() == [False, True, True, False, False, True]
    with pytest.raises(ValueError, match="no eos_ids"):
        truncated(torch.tensor([0]), torch.tensor([0, 1]), TokenBytes([b"a"]))


# Time.


@pytest.mark.parametrize(
    "pieces",
    [
        ["a", "\n\n"],
        ["\n"],
        ["\n", "a"],
        [""],
        ["a", "", "", ".\n\n", b"\xad\x94"],
        [b"\xad\x94"],
        [".\n\n", b"\xe7", ""],
        [" ", "\n\n"],
        [PAD, "a"],
    ],
    ids=repr,
)
@pytest.mark.parametrize("delimiter", ["\n\n", "##", re.compile(r"\n+")], ids=repr)
def test_long_responses_take_linear_time(pieces, delimiter):
    pattern = [11 if piece == "" else ids_of(SIMPLE, [piece])[0] for piece in pieces]
    ids = (pattern * 100_000)[:100_000]
    packed = batch(ids)

    def seconds(run):
        nonlocal steps
        begin = time.process_time()  # what else runs counts only as far as it slows the core down
        steps = run(*packed, SIMPLE, delimiter)
        return time.process_time() - begin

    steps = None
    for run in (segment, reference):
        assert any(seconds(run) < 1.0 for _ in range(3))
    if pieces == ["a", "\n\n"] and delimiter != "##":
        assert len(steps.starts) == 50_000  # the last separator joins the step before it
        capped = segment(*packed, SIMPLE, delimiter, max_steps=200)
        assert len(capped.starts) == 200 and capped.ends[-1] == 100_000


# Byte tables.


def byte_alphabet() -> dict[int, str]:
    """Byte -> character of byte-level vocabularies, as the tokenizers library itself writes it."""
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    chars = [*range(0x800), *range(0x800, 0xD800, 64), *range(0x10000, 0x110000, 4096), *range(0xE000, 0x10000, 64)]
    alphabet = {byte: chr(byte) for byte in range(0xC0, 0x100)}  # some of these are in no UTF-8 text
    for char in map(chr, chars):
        alphabet.update(zip(char.encode(), pre_tokenizer.pre_tokenize_str(char)[0][0], strict=True))
    return alphabet


@pytest.mark.parametrize("family", ["qwen", "llama3"])
def test_hugging_face_tokenizer_and_tiktoken_file_agree(family, request):
    table = request.getfixturevalue(family)
    alphabet = byte_alphabet()
    num_text = 151643 if family == "qwen" else 128000
    vocab = {"".join(map(alphabet.__getitem__, table[id_])): id_ for id_ in range(num_text)}
    assert len(vocab) == num_text
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eot|>")
    from_tokenizer = TokenBytes.from_tokenizer(tokenizer, num_tokens=len(table))
    assert torch.equal(from_tokenizer.data, table.data)
    assert torch.equal(from_tokenizer.offsets, table.offsets)
    assert from_tokenizer.eos.nonzero().tolist() == [[num_text]]
    assert torch.equal(from_tokenizer.special.nonzero().flatten(), torch.arange(num_text, len(table)))


def test_byte_alphabet_is_complete():
    expected = byte_alphabet()
    assert len(expected) == 256
    assert steps_module._byte_alphabet() == {char: byte for byte, char in expected.items()}


@pytest.mark.parametrize("make", [sentencepiece_tokenizer, byte_level_tokenizer])
def test_tokens_join_to_what_the_tokenizer_decodes(make):
    backend = make()
    table = TokenBytes.from_tokenizer(backend)
    for text in ("So a\n\nThe b.", "答 🙂\r\n\t é", "  a  b ", "\n\n", ""):
        ids = backend.encode(text, add_special_tokens=False).ids
        # The sentencepiece tokenizer puts a space before the text, and its decoder drops it.
        prefix = " " if make is sentencepiece_tokenizer and text else ""
        assert table.join(ids).decode() == prefix + backend.decode(ids) == prefix + text


def test_leading_space_of_a_continued_response_is_kept(sentencepiece):
    assert sentencepiece.join(ids_of(sentencepiece, [" The", " a"])) == b" The a"
    assert sentencepiece[sentencepiece._pieces.index(b"\n")] == b"\n"
    ids = torch.tensor(ids_of(sentencepiece, [" The", " a", "\n\n", " So", EOS]))
    steps = segment(ids, torch.tensor([0, 5]), sentencepiece)
    assert step_texts(ids, steps, sentencepiece) == [[" The a", "\n\n So"]]


@pytest.mark.parametrize("scheme, strips", [("always", True), ("first", True), ("never", False)])
def test_metaspace_decoder(scheme, strips):
    pieces = ["<unk>", "▁", "▁a", "a", "b", "▁▁", "\n"]
    backend = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    table = TokenBytes.from_tokenizer(backend, eos_ids=0)
    assert table._pieces == [b"", b" ", b" a", b"a", b"b", b"  ", b"\n"]
    decoded = backend.decode([2, 4, 1, 5, 3])
    assert table.join([2, 4, 1, 5, 3]).decode() == (" " if strips else "") + decoded == " ab   a"


def test_added_tokens_are_text_unless_special():
    backend = byte_level_tokenizer()
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("a b é\n\n", normalized=False)])
    backend.add_special_tokens(["<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    table = TokenBytes.from_tokenizer(tokenizer)
    think, text, end = (backend.token_to_id(t) for t in ("<think>", "a b é\n\n", "<|im_end|>"))
    assert table[think] == b"<think>" and table[text] == "a b é\n\n".encode() and table[end] == b""
    assert table.special.nonzero().flatten().tolist() == [0, 1, end]
    assert table.eos.nonzero().flatten().tolist() == [end]
    a, breaks = ids_of(table, ["a", "\n\n"])
    check(table, [think, a, breaks, think, end, end], "00111.")


def test_eos_ids_of_the_model_replace_the_tokenizers():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(), eos_token="<|end|>")
    assert TokenBytes.from_tokenizer(tokenizer).eos.nonzero().flatten().tolist() == [0]
    assert TokenBytes.from_tokenizer(tokenizer, eos_ids=[0, 1]).eos.nonzero().flatten().tolist() == [0, 1]
    assert TokenBytes.from_tokenizer(byte_level_tokenizer()).eos.any().item() is False


class SlowTokenizer(PreTrainedTokenizer):
    @property
    def vocab_size(self):
        return 2

    def get_vocab(self):
        return {"a": 0, "b": 1}

    def _tokenize(self, text, **kwargs):
        return list(text)


def test_ids_that_no_token_has_are_special():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: id_ + 10 * (id_ >= 100) for id_, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    table = TokenBytes.from_tokenizer(backend)
    assert len(table) == 266 and table.special.nonzero().flatten().tolist() == list(range(100, 110))
    a, b = (backend.token_to_id(char) for char in "ab")
    check(table, [a, 105, b], "0.1")


def test_tokens_that_a_tokenizer_calls_special_are_special():
    """What only transformers knows: a token of the vocabulary that is named as padding."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(), eos_token="<|end|>", pad_token="b")
    table = TokenBytes.from_tokenizer(tokenizer)
    assert table.special[tokenizer.convert_tokens_to_ids("b")]


def test_added_tokens_of_sentencepiece_vocabularies_are_decoded():
    backend = sentencepiece_tokenizer()
    backend.add_tokens([AddedToken("▁word", normalized=False)])
    table = TokenBytes.from_tokenizer(backend)
    assert table[backend.token_to_id("▁word")] == b" word"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.tensor([0, 2]), torch.tensor([2]), torch.tensor([0, 2])),
            r"starts \[2\] and ends \[1\] differ in length",
        ),
        (
            (torch.tensor([0]), torch.tensor([2]), torch.tensor([], dtype=torch.int64)),
            "cu_steps is empty; for B responses",
        ),
        (
            (torch.tensor([0.0]), torch.tensor([2]), torch.tensor([0, 1])),
            r"starts must be a 1-D .* got torch.float32 \[1\]",
        ),
        ((torch.tensor([0]), [2], torch.tensor([0, 1])), "ends must be a 1-D int32 or int64 tensor, got list"),
        ((torch.tensor([0]), torch.tensor([2]), torch.tensor([[0, 1]])), r"cu_steps must be a 1-D"),
    ],
)
def test_wrong_steps_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"Steps: {message}"):
        Steps(*arguments)


@pytest.mark.parametrize("tokenizer", [SlowTokenizer(), object(), None], ids=["slow", "object", "None"])
def test_tokenizers_without_byte_mapping_are_refused_with_advice(tokenizer):
    with pytest.raises(
        ValueError, match=rf"{type(tokenizer).__name__} has no byte mapping.*AutoTokenizer.*TokenBytes\("
    ):
        TokenBytes.from_tokenizer(tokenizer)


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.BPEDecoder(),
        decoders.CTC(),
        decoders.Fuse(),
        decoders.Sequence([decoders.ByteFallback(), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Strip(" ", 1, 0), decoders.Fuse()]),  # of every token
    ],
    ids=repr,
)
def test_decoders_that_depend_on_the_neighbours_are_refused(decoder):
    backend = Tokenizer(models.BPE({"a": 0, "##b": 1}, []))
    if decoder is not None:
        backend.decoder = decoder
    with pytest.raises(ValueError, match=r"Tokenizer has no byte mapping: its decoder .*TokenBytes\("):
        TokenBytes.from_tokenizer(backend)


def test_bytes_that_are_not_what_the_tokenizer_decodes_are_shown():
    chars = {char: id_ for id_, char in enumerate("Step 1")}
    backend = Tokenizer(models.BPE(chars, []))
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("Step", "Stop")])
    with pytest.raises(ValueError, match=r"the bytes give 'Step 1.*decode gives 'Stop 1.*from character 2 on"):
        TokenBytes.from_tokenizer(backend)


def test_padded_vocabulary():
    tokens = [b"a", b"b"]
    with pytest.raises(ValueError, match=r"token_ids\[1\] is 2"):
        segment(*batch([0, 2]), TokenBytes(tokens))
    table = TokenBytes(tokens, num_tokens=4)
    assert len(table) == 4 and table.special.tolist() == [False, False, True, True]
    check(table, [0, 2, 1], "0.1")
    with pytest.raises(ValueError, match="num_tokens is 1, but there are 2 tokens"):
        TokenBytes(tokens, num_tokens=1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tokens": [b"a", "b"]}, "token 1 must be bytes, got str 'b'"),
        ({"tokens": [b"a"], "special_ids": [1]}, "special_ids has 1, but the ids are 0 to 0"),
        ({"tokens": [b"a"], "eos_ids": -1}, "eos_ids has -1"),
        ({"tokens": [b"a"], "eos_ids": ["a"]}, "eos_ids has 'a'"),
    ],
)
def test_wrong_tables_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenBytes(**arguments)


def test_table_is_flat():
    table = TokenBytes([b"ab", b"", b"end", b"\xff"], special_ids=[1], eos_ids=2)
    assert bytes(table.data.tolist()) == b"ab\xff" and table.data.dtype == torch.uint8
    assert table.offsets.tolist() == [0, 2, 2, 2, 3] and table.offsets.dtype == torch.int64
    assert table.special.tolist() == [False, True, True, False]
    assert table.eos.tolist() == [False, False, True, False]
    assert repr(table) == "TokenBytes(4 tokens, 2 special, 1 eos)"


def test_table_survives_pickling():
    ids, cu = random_batch(20, 30)
    expected = ranges(segment(ids, cu, SIMPLE))
    assert ranges(segment(ids, cu, pickle.loads(pickle.dumps(SIMPLE)))) == expected


def tiktoken_lines(*tokens: tuple[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % id_ for token, id_ in tokens)


def test_tiktoken_file(tmp_path):
    path = tmp_path / "ranks"
    path.write_bytes(tiktoken_lines((b"a", 0), (b"\n\n", 3), (b"\xff", 1)) + b"\n")
    table = TokenBytes.from_tiktoken_file(path, special_tokens=["<s>", "</s>"], eos_tokens=["</s>"], num_tokens=7)
    assert table._pieces == [b"a", b"\xff", b"", b"\n\n", b"", b"", b""]
    assert table.special.tolist() == [False, False, True, False, True, True, True]
    assert table.eos.nonzero().tolist() == [[5]]
    table = TokenBytes.from_tiktoken_file(path, special_tokens={"</s>": 6}, eos_tokens=["</s>"])
    assert len(table) == 7 and table.eos.nonzero().tolist() == [[6]]
    with pytest.raises(ValueError, match="eos_tokens has '<end>'"):
        TokenBytes.from_tiktoken_file(path, special_tokens=["</s>"], eos_tokens=["<end>"])


@pytest.mark.parametrize("line", [b"YQ== x", b"YQ==", b"Y? 1", b"YQ== 0", b"YQ== -1", b"YQ== 1 2"])
def test_wrong_tiktoken_line_is_named(tmp_path, line):
    path = tmp_path / "ranks"
    path.write_bytes(tiktoken_lines((b"a", 0)) + line + b"\n")
    with pytest.raises(ValueError, match="ranks:2: "):
        TokenBytes.from_tiktoken_file(path)


def test_names_are_public():
    assert (
        capo.OutsideFences is OutsideFences
        and capo.segment is segment
        and capo.TokenBytes is TokenBytes
        and capo.Steps is Steps
    )
