"""Text to token ids and back: SentencePiece models and Hugging Face `tokenizer.json` files."""

import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import sentencepiece
import tokenizers

from dppo_jax.prompts.examples import PromptFileError


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the project needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Every id is below it; a model's own vocabulary may be larger."""

    @property
    def end_id(self) -> int:
        """The token that ends a response; the sampler stops at it."""

    @property
    def pad_id(self) -> int:
        """A valid id to fill columns with. Masks alone say which tokens are real."""

    def encode(self, text: str) -> list[int]:
        """A prompt's tokens, with what the model expects at the start of every text."""

    def encode_response(self, text: str) -> list[int]:
        """A response's tokens: nothing before the text, the end token after it."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; begin, end and other control tokens leave no trace."""


class SentencePieceTokenizer:
    """A SentencePiece `.model` file.

    `end_id` is the model's </s> unless given. llama2.c's story models need `add_bos=True` and
    `end_id=1`: their training text puts <s> before every story and never </s>, so at the end of a
    story they emit the <s> of the next one.
    """

    def __init__(self, path: str | Path, *, add_bos: bool = False, end_id: int | None = None):
        if not Path(path).is_file():
            raise PromptFileError(f"{path}: no such SentencePiece model file")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=os.fspath(path))
        except RuntimeError as error:
            raise PromptFileError(f"{path}: not a SentencePiece model ({error})") from error
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int | None = _id_or_none(self._model.bos_id())
        end = _id_or_none(self._model.eos_id()) if end_id is None else end_id
        if end is None:
            raise ValueError(f"{path} has no </s>: set end_id to the token that ends a response")
        if not 0 <= end < self.vocab_size:
            raise ValueError(f"{path}: end_id {end} is not below the {self.vocab_size} tokens")
        if add_bos and self.bos_id is None:
            raise ValueError(f"{path} has no <s>: set add_bos=False")
        self.end_id: int = end
        pad = _id_or_none(self._model.pad_id())
        self.pad_id: int = end if pad is None else pad
        self._add_bos = add_bos

    def encode(self, text: str) -> list[int]:
        """The text's pieces, after <s> if the tokenizer was made with `add_bos`."""
        return self._model.encode(text, add_bos=self._add_bos)

    def encode_response(self, text: str) -> list[int]:
        """The text's pieces and the end token.

        A model trained with a dummy prefix reads the text as if a space came before it.
        """
        return [*self._model.encode(text), self.end_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the pieces. A dummy prefix at the start, a space, is dropped."""
        ids = [int(token) for token in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(
                f"token ids {min(ids)}..{max(ids)} do not fit the tokenizer's {self.vocab_size}:"
                " the model's vocabulary is larger than the tokenizer's"
            )
        return self._model.decode(ids)


class HuggingFaceTokenizer:
    """A `tokenizer.json` file, or a folder that holds one, read by the `tokenizers` library.

    The end token is `end_token` (a token's text, such as `<|im_end|>`), else the `eos_token` of
    the `tokenizer_config.json` beside the file. `add_special_tokens` keeps Hugging Face's meaning:
    the file's own template is applied to prompts, which for Llama adds the begin token.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        end_token: str | None = None,
        add_special_tokens: bool = True,
    ):
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise PromptFileError(f"{file}: no such tokenizer file")
        try:
            self._model = tokenizers.Tokenizer.from_file(os.fspath(file))
        except Exception as error:  # the library raises plain Exception
            raise PromptFileError(f"{file}: not a tokenizer.json ({error})") from error
        # Settings saved in the file would cut or pad what they are not asked to.
        self._model.no_truncation()
        self._model.no_padding()
        config = _tokenizer_config(file.with_name("tokenizer_config.json"))
        end_token = end_token or _token_text(config.get("eos_token"))
        if end_token is None:
            raise ValueError(f"{file}: no tokenizer_config.json names the eos_token; set end_token")
        pad_token = _token_text(config.get("pad_token")) or end_token
        self.end_id: int = self._id_of(end_token, file)
        self.pad_id: int = self._id_of(pad_token, file)
        self.vocab_size: int = max(self._model.get_vocab().values()) + 1  # ids may have holes
        self._add_special_tokens = add_special_tokens

    def encode(self, text: str) -> list[int]:
        """The text's tokens, with those that the file's template adds."""
        return self._model.encode(text, add_special_tokens=self._add_special_tokens).ids

    def encode_response(self, text: str) -> list[int]:
        """The text's tokens without any template, and the end token."""
        return [*self._model.encode(text, add_special_tokens=False).ids, self.end_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the tokens; special tokens and ids that no token has are left out."""
        return self._model.decode([int(token) for token in ids], skip_special_tokens=True)

    def _id_of(self, token: str, file: Path) -> int:
        token_id = self._model.token_to_id(token)
        if token_id is None:
            raise ValueError(f"{file}: has no token {token!r}")
        return token_id


def train_sentencepiece(
    texts: Iterable[str],
    path: str | Path,
    *,
    model_type: str = "char",
    vocab_size: int | None = None,
) -> SentencePieceTokenizer:
    """Trains a SentencePiece model on the texts, writes it to `path` and opens it.

    The default makes every character of the texts a piece of its own (`vocab_size` follows from
    them), which for the arithmetic task is `train_sentencepiece([arithmetic.ALPHABET], path)`.
    Other types (`unigram`, `bpe`) need `vocab_size`. Ids 0, 1, 2 are <unk>, <s>, </s>. Texts are
    taken as they are: no normalisation and no dummy prefix, so that decoding gives back what was
    encoded. The same texts give the same file: one thread, no sampling.
    """
    texts = list(texts)
    if model_type == "char":
        if vocab_size is not None:
            raise ValueError("a char model's vocab_size follows from its texts; leave it out")
        vocab_size = len(set("".join(texts).replace(" ", "\N{LOWER ONE EIGHTH BLOCK}"))) + 3
    elif vocab_size is None:
        raise ValueError(f"model_type {model_type!r} needs a vocab_size")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type=model_type,
        vocab_size=vocab_size,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        max_sentence_length=2**20,  # longer texts would be skipped without a word
        num_threads=1,
        minloglevel=2,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_bytes(model.getvalue())
    unfinished.replace(path)
    return SentencePieceTokenizer(path)


def _id_or_none(token: int) -> int | None:
    """SentencePiece says -1 for a control token that the model lacks."""
    return None if token < 0 else token


def _tokenizer_config(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _token_text(token: object) -> str | None:
    """A token as configurations write it: its text, or an object that holds it as `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
