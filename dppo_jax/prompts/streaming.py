"""Text of a response while its tokens arrive; no character is ever shown in part."""

from collections.abc import Sequence

from dppo_jax.prompts.tokenizers import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of a character's first bytes


class TextStream:
    """Decodes tokens as they come: the pieces put together are `tokenizer.decode` of all ids.

    Each piece is the text of the new tokens after a few that were shown before, as some
    decoders drop the blank at the beginning of what they are given. A piece whose last character
    may still grow is held back until the tokens that complete it.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._decode = tokenizer.decode
        self._ids: list[int] = []
        self._context = 0  # the tokens from here on are decoded
        self._shown = 0  # the text of those before this one was given out

    def push(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete; often empty."""
        self._ids += ids
        text = self._new_text()
        if text.endswith(UNFINISHED):
            return ""
        if text:  # tokens without text, such as special ones, move nothing
            self._context, self._shown = self._shown, len(self._ids)
        return text

    def finish(self) -> str:
        """What was held back, though it may be broken; the stream is then at its end."""
        text = self._new_text()
        self._context = self._shown = len(self._ids)
        return text

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._context : self._shown])
        return self._decode(self._ids[self._context :])[len(before) :]
