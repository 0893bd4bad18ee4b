"""Round trips, end tokens and golden ids of the SentencePiece and Hugging Face tokenizers."""

import gzip
import json
import string
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_jax.prompts import arithmetic
from dppo_jax.prompts.examples import PromptFileError
from dppo_jax.prompts.tokenizers import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    train_sentencepiece,
)

DATA = Path(__file__).parents[2] / "shared/data"
STORIES = DATA / "lm/stories260K"
QWEN = DATA / "tokenizers/qwen"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "new" / "arithmetic.model"
    return train_sentencepiece([arithmetic.ALPHABET], path)


def test_the_arithmetic_model_has_a_piece_for_each_character(digits):
    assert isinstance(digits, Tokenizer)
    assert digits.vocab_size == 16  # 13 characters, <unk>, <s>, </s>
    assert (digits.bos_id, digits.end_id, digits.pad_id) == (1, 2, 2)
    ids = digits.encode("47*86=")
    assert len(ids) == 6 and min(ids) > 2
    response = digits.encode_response("282+3760=4042")
    assert len(response) == 14 and response[-1] == digits.end_id
    assert digits.decode(response) == "282+3760=4042"  # the end token leaves no trace


@settings(deadline=None)
@given(st.text(arithmetic.ALPHABET))
def test_arithmetic_round_trip(digits, text):
    assert digits.decode(digits.encode(text)) == text


def test_training_twice_gives_the_same_file(tmp_path):
    texts = [arithmetic.prompt(a, 12) + arithmetic.solution(a, 12) for a in range(10, 60)]
    for name in ("one", "two"):
        train_sentencepiece(texts, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_char_model_keeps_spaces_as_they_are(tmp_path):
    tokenizer = train_sentencepiece(["a b  c"], tmp_path / "m")
    for text in ("a b  c", " a", "b ", "  "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_bpe_model_is_trained_to_size(tmp_path):
    texts = [f"the {word} sat on the mat" for word in ("cat", "hat", "rat", "bat")]
    tokenizer = train_sentencepiece(texts, tmp_path / "m", model_type="bpe", vocab_size=24)
    assert tokenizer.vocab_size == 24
    assert tokenizer.decode(tokenizer.encode("the rat sat")) == "the rat sat"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 16}, "follows from its texts"),
        ({"model_type": "bpe"}, "needs a vocab_size"),
    ],
)
def test_training_options_that_make_no_sense(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train_sentencepiece(["ab"], tmp_path / "m", **options)


def test_sentencepiece_choices(digits, tmp_path):
    path = tmp_path / "m"
    train_sentencepiece([string.ascii_lowercase], path)
    tokenizer = SentencePieceTokenizer(path, add_bos=True, end_id=5)
    assert tokenizer.encode("a")[0] == 1 and len(tokenizer.encode("a")) == 2
    assert tokenizer.encode_response("a")[-1] == 5 and tokenizer.encode_response("a")[0] != 1
    with pytest.raises(ValueError, match="end_id 99"):
        SentencePieceTokenizer(path, end_id=99)
    with pytest.raises(ValueError, match="vocabulary is larger"):
        digits.decode([3, 16])


def test_files_that_are_no_tokenizers(tmp_path):
    (tmp_path / "bad").write_text("{}")
    for name, message in (("absent", "no such"), ("bad", "not a")):
        with pytest.raises(PromptFileError, match=message):
            SentencePieceTokenizer(tmp_path / name)
        with pytest.raises(PromptFileError, match=message):
            HuggingFaceTokenizer(tmp_path / name)


@pytest.mark.skipif(not STORIES.is_dir(), reason="shared/data/lm is not beside the repository")
def test_stories260k_end_a_story_with_the_begin_token():
    tokenizer = SentencePieceTokenizer(STORIES / "tok512.model", add_bos=True, end_id=1)
    golden = json.load(gzip.open(STORIES / "golden_greedy.json.gz"))
    assert tokenizer.vocab_size == golden["config"]["vocab_size"]
    assert tokenizer.encode("Once upon a time, there was")[:6] == golden["greedy_ids"][:6]
    assert tokenizer.decode(golden["greedy_ids"]) == golden["greedy_text"]
    text = 'Lily had a ball.\nTim said, "Hi!"'
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.end_id]) == text


def word_level(path: Path, **config) -> Path:
    """A small tokenizer.json with a template that adds a begin token, as Llama's does."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "two": 3, "and": 4, "<pad>": 7}  # 5 and 6 are holes
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(["<s>", "</s>", "<pad>"])
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    model.enable_truncation(2)
    model.save(str(path / "tokenizer.json"))
    if config:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_hugging_face_tokenizer(tmp_path):
    path = word_level(tmp_path, eos_token={"content": "</s>"}, pad_token="<pad>")
    tokenizer = HuggingFaceTokenizer(path)
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.end_id, tokenizer.pad_id, tokenizer.vocab_size) == (2, 7, 8)
    assert tokenizer.encode("two and two") == [1, 3, 4, 3]  # not cut to the file's two
    assert tokenizer.encode_response("two") == [3, 2]
    assert tokenizer.decode([1, 3, 4, 3, 2, 7]) == "two and two"
    assert HuggingFaceTokenizer(path, add_special_tokens=False).encode("two") == [3]
    assert HuggingFaceTokenizer(path / "tokenizer.json", end_token="<pad>").end_id == 7
    with pytest.raises(ValueError, match="has no token '<nope>'"):
        HuggingFaceTokenizer(path, end_token="<nope>")


def test_a_hugging_face_end_token_must_be_named_somewhere(tmp_path):
    path = word_level(tmp_path)
    with pytest.raises(ValueError, match="set end_token"):
        HuggingFaceTokenizer(path)
    tokenizer = HuggingFaceTokenizer(path, end_token="</s>")
    assert (tokenizer.end_id, tokenizer.pad_id) == (2, 2)


@pytest.mark.skipif(not QWEN.is_dir(), reason="shared/data/tokenizers is not beside the repository")
def test_qwen_golden_ids(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(gzip.decompress((QWEN / "qwen3_tokenizer.json.gz").read_bytes()))
    config = (QWEN / "qwen3_tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(config)
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert tokenizer.end_id == 151645  # <|im_end|>
    for line in (QWEN / "golden_ids.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert tokenizer.encode(row["text"]) == row["ids"]
        assert tokenizer.decode(row["ids"]) == row["text"]
