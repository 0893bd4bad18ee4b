r"""What stands around a problem when the policy sees it: instructions, examples, chat markup.

A template is bound to the run's tokenizer, so that everything else handles bare problems:

    train.train.tokenizer = @templates.TemplatedTokenizer()
    templates.TemplatedTokenizer.tokenizer = @tokenizers.HuggingFaceTokenizer()
    templates.TemplatedTokenizer.template = @templates.chat()
    templates.chat.folder = %MODEL_DIR
    templates.chat.user = "boxed"
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from dppo_jax.prompts.examples import PromptFileError
from dppo_jax.prompts.tokenizers import Tokenizer

USER_TEXTS = {
    "problem": "{problem}",
    # Qwen2.5-Math's and DeepSeek-R1's model cards.
    "boxed": "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}.",
    # DAPO-Math-17k's own rows, arXiv 2503.14476.
    "dapo": "Solve the following math problem step by step. The last line of your response should"
    " be of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
    '\n\n{problem}\n\nRemember to put your answer on its own line after "Answer:".',
}
"""What a user says, by name. The project's sets hold bare problems, so all of them fit all."""

Shots = Sequence[tuple[str, str]]
"""Worked examples: (problem, answer as the policy should write it)."""


@dataclass(frozen=True)
class Template:
    """Text before and after a problem. `whole`: with all control tokens, so none are added."""

    before: str
    after: str
    whole: bool

    def render(self, problem: str) -> str:
        """The text that is tokenised."""
        return f"{self.before}{problem}{self.after}"


def plain(text: str = "{problem}", few_shot: Shots = (), separator: str = "\n\n") -> Template:
    """For base models: `text` around the problem, after worked examples in the same form.

    `text` holds `{problem}` once; other braces stand for themselves. An example is `text` with its
    answer directly after it, so end `text` as the answer should begin.
    """
    text = _user_text(text)
    shots = "".join(text.replace("{problem}", p) + a + separator for p, a in few_shot)
    before, after = text.split("{problem}")
    return Template(shots + before, after, whole=False)


def chat(
    folder: str,
    user: str = "problem",
    system: str | None = None,
    few_shot: Shots = (),
    enable_thinking: bool | None = None,
) -> Template:
    """The chat template of a Hugging Face model folder, ready for the assistant to speak.

    `user` is one of USER_TEXTS or text that holds `{problem}` once. `few_shot` become turns of
    user and assistant. None leaves `system` and `enable_thinking` to the template's own defaults.
    The template is `chat_template.jinja` or in `tokenizer_config.json`, as transformers looks for
    it, and runs in jinja2's sandbox: a downloaded file cannot reach anything.
    """
    user = _user_text(user)
    source, tokens = _read_chat(Path(folder).expanduser())
    marker = "\x1dproblem\x1d"  # stands for the problem while the template runs
    messages = [] if system is None else [{"role": "system", "content": system}]
    for problem, answer in (*few_shot, (marker, "")):
        messages.append({"role": "user", "content": user.replace("{problem}", problem)})
        messages.append({"role": "assistant", "content": answer})
    thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    try:
        text = environment.from_string(source).render(
            messages=messages[:-1], add_generation_prompt=True, **tokens, **thinking
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise PromptFileError(f"{folder}: its chat template cannot be used ({error})") from error
    if text.count(marker) != 1:
        raise PromptFileError(
            f"{folder}: its chat template writes the user's text {text.count(marker)} times"
        )
    before, after = text.split(marker)
    return Template(before, after, whole=True)


def r1_distill() -> Template:
    """The prompt of the sanity test's runs on DeepSeek-R1-Distill-Qwen: sail-sg/Precision-RL
    @5b044859, template r1_distill_qwen. The response begins inside <think>."""
    asked = " Please reason step by step, and put your final answer within \\boxed{}.\n"
    bar, blank = "\N{FULLWIDTH VERTICAL LINE}", "\N{LOWER ONE EIGHTH BLOCK}"
    return Template(
        f"<{bar}begin{blank}of{blank}sentence{bar}><{bar}User{bar}>",
        f"{asked}<{bar}Assistant{bar}><think>\n",
        whole=True,
    )


class TemplatedTokenizer:
    """A tokenizer whose prompts are problems put into a template; the rest is as it was."""

    def __init__(self, tokenizer: Tokenizer, template: Template):
        self._tokenizer, self.template = tokenizer, template
        self.vocab_size, self.end_id = tokenizer.vocab_size, tokenizer.end_id
        self.pad_id = tokenizer.pad_id

    def encode(self, text: str) -> list[int]:
        """The rendered problem's tokens; begin tokens are added where the template has none."""
        rendered = self.template.render(text)
        if self.template.whole:
            return self._tokenizer.encode_response(rendered)[:-1]
        return self._tokenizer.encode(rendered)

    def encode_response(self, text: str) -> list[int]:
        """The response's tokens and the end token."""
        return self._tokenizer.encode_response(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        return self._tokenizer.decode(ids)


def rendered(tokenizer: Tokenizer, problem: str) -> str:
    """What the policy sees of a problem, as text."""
    if isinstance(tokenizer, TemplatedTokenizer):
        return tokenizer.template.render(problem)
    return problem


def _user_text(text: str) -> str:
    text = USER_TEXTS.get(text, text)
    if text.count("{problem}") != 1:
        near = difflib.get_close_matches(text, USER_TEXTS, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{text!r} must hold {{problem}} once, or be one of {', '.join(USER_TEXTS)}{meant}"
        )
    return text


def _read_chat(folder: Path) -> tuple[str, dict[str, str]]:
    """The template's source, and the special tokens that it may write by name."""
    file = folder / "tokenizer_config.json"
    if not folder.is_dir() or not (file.is_file() or (folder / "chat_template.jinja").is_file()):
        raise PromptFileError(
            f"{folder}: no chat template; give the folder of a model with tokenizer_config.json"
            " or chat_template.jinja"
        )
    try:
        config: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise PromptFileError(f"{file}: not JSON ({error})") from error
    tokens = {
        name: text if isinstance(text, str) else text["content"]
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (text := config.get(name)) is not None
    }
    if (own := folder / "chat_template.jinja").is_file():
        return own.read_text("utf-8"), tokens
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = {each["name"]: each["template"] for each in source}.get("default")
    if not isinstance(source, str):
        raise PromptFileError(f"{file}: holds no chat_template; the model may be a base model:"
                              " bind templates.plain() instead")  # fmt: skip
    return source, tokens


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
