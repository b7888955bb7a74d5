"""Pieces of a text add up to it with every kind of tokenizer, and no text moves a terminal's cursor."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Callable
from contextlib import redirect_stdout

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import BertTokenizerFast, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from spec_envs import generate
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.experiments import stream
from spec_envs.prompts.sets import decode
from spec_envs.text import Detokenizer, TextStream, encodable, printable
from tests.support.models.tiny import REAL

WORDS = ["▁", "▁the", "▁a", "a", "b", "▁▁", ".", "'s", "é", "😀", "\ufffd", "\n"]


def fast(tokenizer: Tokenizer, **settings: object) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def metaspace() -> PreTrainedTokenizerBase:
    """Return a tokenizer that marks spaces with ▁."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *WORDS, "</s>"])}, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return fast(words, eos_token="</s>")


def byte_fallback() -> PreTrainedTokenizerBase:
    """Return a tokenizer as in Llama 2 and Mistral: a space before the text, and bytes for unknown characters."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    pieces = Tokenizer(models.BPE({w: i for i, w in enumerate(vocabulary)}, [], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    pieces.decoder = decoders.Sequence(steps)
    pieces.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return fast(pieces, eos_token="</s>", bos_token="<s>")


def byte_level() -> PreTrainedTokenizerBase:
    """Return a tokenizer like GPT-2's: a character for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = Tokenizer(models.BPE({w: i for i, w in enumerate(alphabet)}, []))
    pieces.decoder = decoders.ByteLevel()
    pieces.add_special_tokens([AddedToken("<end>", special=True)])
    pieces.add_tokens(["<tool>"])
    return fast(pieces, eos_token="<end>")


def word_pieces() -> PreTrainedTokenizerBase:
    """Return a tokenizer like BERT's, which cleans up spaces when it decodes."""
    words = [
        "[UNK]",
        "[PAD]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "##ing",
        "it",
        "'",
        "s",
        "##'",
        "n't",
        ".",
        "do",
        "not",
    ]
    made = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    made.clean_up_tokenization_spaces = True
    return made


def word_level() -> PreTrainedTokenizerBase:
    """Return a tokenizer without a decoder, so that words are joined by spaces."""
    return fast(Tokenizer(models.WordLevel({"the": 0, "a": 1, ".": 2, "<unk>": 3}, unk_token="<unk>")))


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "metaspace": metaspace,
    "byte fallback": byte_fallback,
    "byte level": byte_level,
    "word pieces": word_pieces,
    "word level": word_level,
}


def streamed(detokenize: Detokenizer, groups: list[list[int]]) -> list[str]:
    text = TextStream(detokenize)
    return [*(text.push(ids) for ids in groups), text.finish()]


def assert_pieces_add_up(tokenizer: PreTrainedTokenizerBase, groups: list[list[int]]) -> None:
    """Assert that the pieces add up to the text."""
    ids = [token for group in groups for token in group]
    pieces = streamed(Detokenizer.of(tokenizer), groups)
    assert "".join(pieces) == decode(tokenizer, ids)


groups_of = st.lists(st.lists(st.integers(0, 1000), max_size=5), max_size=60)


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", TOKENIZERS)
@given(groups=groups_of)
def test_pieces_add_up_to_the_text(kind: str, groups: list[list[int]]) -> None:
    tokenizer = TOKENIZERS[kind]()
    size = len(tokenizer) + 1  # one id that the tokenizer does not have, as in padded models
    assert_pieces_add_up(tokenizer, [[token % size for token in group] for group in groups])


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", ["byte fallback", "byte level"])
@given(text=st.text(), sizes=st.lists(st.integers(0, 9)))
def test_pieces_of_single_bytes_add_up(kind: str, text: str, sizes: list[int]) -> None:
    """Hypothesis draws any text; the ids of its bytes come in groups of any sizes."""
    tokenizer = TOKENIZERS[kind]()
    if kind == "byte level":
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        names = [letter for word, _ in words for letter in word]
    else:
        names = [f"<0x{byte:02X}>" for byte in text.encode()]
    ids, groups = [tokenizer.convert_tokens_to_ids(name) for name in names], []
    for size in sizes:
        groups.append(ids[:size])
        ids = ids[size:]
    assert_pieces_add_up(tokenizer, [*groups, ids])
    whole = text.removeprefix(" ") if kind == "byte fallback" else text
    assert decode(tokenizer, [token for group in [*groups, ids] for token in group]) == whole


@pytest.mark.model
@pytest.mark.fuzz
@given(groups=st.lists(st.lists(st.integers(0, 49151), max_size=5), max_size=60), text=st.text())
def test_pieces_of_the_default_model_add_up(groups: list[list[int]], text: str) -> None:
    tokenizer = load_tokenizer(REAL)
    assert_pieces_add_up(tokenizer, groups)
    assert_pieces_add_up(tokenizer, [[token] for token in tokenizer(text)["input_ids"]])


def test_piece_is_yielded_as_soon_as_it_is_certain() -> None:
    tokenizer = byte_fallback()
    ids = tokenizer.convert_tokens_to_ids(
        ["▁the", "▁a", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "▁a", "<0xF0>", "</s>"]
    )
    assert streamed(Detokenizer.of(tokenizer), [[token] for token in ids]) == [
        *("the", " a", "", "", "", "", "😀 a", "", "", "\ufffd"),
    ]
    ids = byte_level().convert_tokens_to_ids([*"the", *"ðŁĺĢ", "a", "ð"])
    assert streamed(Detokenizer.of(byte_level()), [[token] for token in ids]) == [
        *("t", "h", "e", "", "", "", "😀", "a", "", "\ufffd"),
    ]


def test_pieces_decode_only_recent_tokens() -> None:
    tokenizer, asked = byte_fallback(), []
    of = Detokenizer.of(tokenizer)
    counted = Detokenizer(lambda ids: asked.append(len(ids)) or of(ids), of.joined)  # type: ignore[func-returns-value]
    ids = tokenizer.convert_tokens_to_ids(["▁the", "a", "▁a", "<0x41>"]) * 500
    assert "".join(streamed(counted, [[token] for token in ids])) == decode(tokenizer, ids)
    assert max(asked) < 200


def test_spaces_before_punctuation_are_kept() -> None:
    made = word_pieces()
    assert decode(made, made.convert_tokens_to_ids(["it", "'", "s"])) == "it ' s"


def test_pieces_of_a_generation_add_up(tiny: dict) -> None:
    decoder = load_decoder(tiny["target"], None, "cpu", "float32")
    whole = generate(decoder, None, None, [3, 4, 5], 12).run()
    halves = Detokenizer(
        lambda ids: b"".join(("é" if i % 2 else "ab").encode()[i % 2 :] for i in ids).decode(errors="replace")
    )
    decoder.detokenize = halves
    pieces = list(generate(decoder, None, None, [3, 4, 5], 12).pieces())
    assert "".join(pieces) == halves(whole.tokens) and len(pieces) == 13


@pytest.mark.parametrize("mode", ["ansi", "human"])
def test_rendered_text_has_no_control_characters(mode: str, tiny: dict) -> None:
    env = gym.make("SpecK-v0", **(tiny | {"drafter": "lookup"}), render_mode=mode).unwrapped
    alphabet = [
        bytes([b])
        for b in (0xF0, 0x9F, 0x98, 0x80, 0x20, 0x1B, 0x61, 0xC3, 0xA9, 0x62, 0x9B, 0x07, 0x41, 0x42, 0x43, 0x44)
    ]
    env.decoder.detokenize = Detokenizer(lambda ids: b"".join(alphabet[i] for i in ids).decode(errors="replace"))
    shown = io.StringIO()
    with redirect_stdout(shown):
        env.reset(seed=3, options={"prompt": "the a of"})
        done = False
        while not done:
            _, _, done, _, info = env.step(2)
        text = env.render() if mode == "ansi" else shown.getvalue()
    plain = text
    for colour in ("\x1b[32m", "\x1b[31m", "\x1b[1m", "\x1b[0m"):
        plain = plain.replace(colour, "")
    assert printable(info["text"]) in plain and "\x1b" not in plain and "\x07" not in plain


def test_rendered_tree_shows_tokens_with_spaces(tiny: dict) -> None:
    env = gym.make("SpecDepth-v0", **tiny, render_mode="ansi").unwrapped
    tokenizer = metaspace()
    names = tokenizer.convert_tokens_to_ids(["▁the", "▁a", "b", "▁the"])
    of = Detokenizer.of(tokenizer)
    env.decoder.detokenize = Detokenizer(lambda ids: of([names[i % 4] for i in ids]))
    env.reset(seed=0)
    while not env.decoder.cycles:
        env.step(0)
    nodes = env.decoder.cycles[-1].nodes.tokens.tolist()
    expected = {repr([" the", " a", "b", " the"][token % 4]) for token in nodes}
    lines = env.render().split("\n")
    shown = {line.split("m", 1)[1].removesuffix("\x1b[0m") for line in lines[2:] if "\x1b[3" in line}
    assert shown == expected
    assert env.render().startswith("\x1b[1m") and np.asarray(nodes).size


def test_printable_replaces_control_characters() -> None:
    assert printable("a\tb\ncé😀\u200d") == "a\tb\ncé😀\u200d"
    for nasty in ("\x1b]0;title\x07", "\x9b31m", "\r", "\x00", "\x7f", "\u202e", "\ud83d"):
        shown = printable(f"a{nasty}b")
        assert shown[0] == "a" and shown[-1] == "b" and len(shown) == len(nasty) + 2
        assert not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in shown) and "\u202e" not in shown


def test_encodable_replaces_lone_surrogates() -> None:
    assert encodable("a\ud83d") == "a\ufffd" and encodable("\ud83d\ude00") == "😀" and encodable("\ufeffa") == "\ufeffa"
    assert encodable("\ude00\ud83d") == "\ufffd\ufffd"


def test_command_prints_the_whole_text(
    tiny: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    halves = [bytes([byte]) for byte in b"\xf0\x9f\x98\x80\x1b\xc3\xa9 abcdefgh"]
    detokenize = Detokenizer(lambda ids: b"".join(halves[i] for i in ids).decode(errors="replace"))
    decoder = load_decoder(tiny["target"], tiny["drafter"], "cpu", "float32")
    decoder.detokenize = detokenize
    monkeypatch.setattr(stream, "decoder_for", lambda env, control: decoder)
    monkeypatch.setattr(stream, "load_tokenizer", lambda name: load_tokenizer(tiny["target"]))
    for prompt in ("the a of", "we you def"):
        monkeypatch.setattr("sys.argv", ["stream", prompt, "--max-new-tokens", "30"])
        stream.main()
        shown = capsys.readouterr().out.rsplit("\n\n", 1)[0]
        assert shown == printable(detokenize(decoder.tokens)) and "\x1b" not in shown
