"""Streaming text: whole characters only, and nothing lost."""

import gzip
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dppo_jax.prompts.streaming import UNFINISHED, TextStream
from dppo_jax.prompts.tokenizers import HuggingFaceTokenizer, train_sentencepiece

DATA = Path(__file__).parents[2] / "shared/data"
QWEN = DATA / "tokenizers/qwen"


@pytest.fixture(scope="module")
def by_bytes(tmp_path_factory):
    """A byte-level tokenizer whose tokens are bytes and a few pairs of them, as Qwen's are."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: number for number, character in enumerate(alphabet)} | {"he": 256}
    vocab["</s>"] = 257
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("h", "e")]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(["</s>"])
    path = tmp_path_factory.mktemp("bytes") / "tokenizer.json"
    model.save(str(path))
    return HuggingFaceTokenizer(path, end_token="</s>")


def streamed(tokenizer, ids, step=1):
    stream = TextStream(tokenizer)
    pieces = [stream.push(ids[at : at + step]) for at in range(0, len(ids), step)]
    return [*pieces, stream.finish()]


@settings(max_examples=60)
@given(st.text(st.characters(exclude_characters=UNFINISHED, codec="utf-8")), st.integers(1, 3))
@example("héllo 世界 👩‍👩‍👧 𝄞", 1)
def test_a_character_is_shown_when_it_is_whole(by_bytes, text, step):
    ids = by_bytes.encode_response(text)
    pieces = streamed(by_bytes, ids, step)
    assert "".join(pieces) == text
    assert not any(UNFINISHED in piece for piece in pieces)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 257), max_size=30))
def test_nothing_is_lost_of_broken_bytes(by_bytes, ids):
    assert "".join(streamed(by_bytes, ids)) == by_bytes.decode(ids)


def test_text_comes_with_its_token(by_bytes):
    assert streamed(by_bytes, by_bytes.encode("heh"))[:2] == ["he", "h"]


def test_blanks_between_words_of_sentencepiece(tmp_path):
    tokenizer = train_sentencepiece(
        ["the cat sat on the mat"] * 9, tmp_path / "m", vocab_size=24, model_type="bpe"
    )
    text = "the cat sat on the mat"
    assert "".join(streamed(tokenizer, tokenizer.encode(text))) == text


@pytest.mark.skipif(not QWEN.is_dir(), reason="shared/data/tokenizers is not beside the repository")
def test_qwen_golden_texts(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(gzip.decompress((QWEN / "qwen3_tokenizer.json.gz").read_bytes()))
    tokenizer = HuggingFaceTokenizer(file, end_token="<|im_end|>")
    for line in (QWEN / "golden_ids.jsonl").read_text().splitlines():
        row = json.loads(line)
        pieces = streamed(tokenizer, row["ids"])
        assert "".join(pieces) == row["text"]
        assert UNFINISHED in row["text"] or not any(UNFINISHED in piece for piece in pieces)
