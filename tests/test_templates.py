"""What stands around a problem: exact texts, transformers' own ids, and `dppo data show`."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from dppo_jax.prompts import store
from dppo_jax.prompts.templates import (
    USER_TEXTS,
    Template,
    TemplatedTokenizer,
    chat,
    plain,
    r1_distill,
    rendered,
)
from dppo_jax.prompts.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer


@pytest.fixture(scope="module")
def qwen(shared_data, tmp_path_factory):
    """Folders of Qwen2.5 and Qwen3 as the hub has them; the two share their vocabulary."""
    files = shared_data / "tokenizers" / "qwen"
    folders = {}
    for name in ("qwen2.5", "qwen3"):
        folders[name] = tmp_path_factory.mktemp(name)
        with gzip.open(files / "qwen3_tokenizer.json.gz") as packed:
            (folders[name] / "tokenizer.json").write_bytes(packed.read())
        config = (files / f"{name}_tokenizer_config.json").read_text()
        (folders[name] / "tokenizer_config.json").write_text(config)
    return folders


def test_qwen_chat_word_for_word(qwen):
    asked = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert chat(str(qwen["qwen3"])).render("1+1?") == asked
    assert chat(str(qwen["qwen3"]), enable_thinking=False).render("1+1?") == (
        asked + "<think>\n\n</think>\n\n"
    )
    own = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    assert chat(str(qwen["qwen2.5"])).render("1+1?") == (
        f"<|im_start|>system\n{own}<|im_end|>\n{asked}"
    )
    # Qwen2.5-Math's prompt, which oat calls qwen_math
    math = chat(str(qwen["qwen2.5"]), system=r"Please reason step by step, \boxed{}.")
    assert math.render("1+1?") == (
        f"<|im_start|>system\nPlease reason step by step, \\boxed{{}}.<|im_end|>\n{asked}"
    )


@pytest.mark.parametrize("model", ["qwen2.5", "qwen3"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"system": "Be short.", "user": "boxed"},
        {"user": "dapo", "few_shot": (("2+2?", "\\boxed{4}"), ("3+3?", "<think>\nsix\n</think>6"))},
        {"enable_thinking": False},
    ],
    ids=["bare", "boxed", "few_shot", "no_thinking"],
)
def test_ids_are_those_of_transformers(qwen, model, options):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(qwen[model]))
    user = USER_TEXTS[options.get("user", "problem")]
    messages = [{"role": "system", "content": options["system"]}] if "system" in options else []
    for problem, answer in options.get("few_shot", ()):
        messages.append({"role": "user", "content": user.replace("{problem}", problem)})
        messages.append({"role": "assistant", "content": answer})
    problem = "Find $\\frac{1}{2}$ of {x}; 1½ Führer"
    messages.append({"role": "user", "content": user.replace("{problem}", problem)})
    thinking = {k: v for k, v in options.items() if k == "enable_thinking"}
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False,
                                          **thinking)  # fmt: skip
    template = chat(str(qwen[model]), **options)
    ours = TemplatedTokenizer(HuggingFaceTokenizer(qwen[model]), template)
    assert rendered(ours, problem) == expected
    if model == "qwen3":  # whose tokenizer.json it is; Qwen2.5 has no token for <think>
        assert ours.encode(problem) == theirs.encode(expected, add_special_tokens=False)
    assert ours.decode(ours.encode_response("4")) == "4"
    assert isinstance(ours, Tokenizer) and ours.end_id == theirs.eos_token_id


def test_the_sanity_tests_prompt():
    assert r1_distill().render("1+1?") == (
        "<｜begin▁of▁sentence｜><｜User｜>1+1? Please reason step by step, and put your final"
        " answer within \\boxed{}.\n<｜Assistant｜><think>\n"
    )


def test_a_base_model_with_worked_examples():
    template = plain("Q: {problem}\nA:", few_shot=(("1+1", " 2"), ("2+2", " \\boxed{4}")))
    assert template.render("x{y}") == "Q: 1+1\nA: 2\n\nQ: 2+2\nA: \\boxed{4}\n\nQ: x{y}\nA:"
    assert plain().render("x") == "x"


@given(st.text())
def test_the_problem_stands_as_it_is(problem):
    for template in (plain("Q: {problem}\n{}A:"), Template("<a>", "<b>", True)):
        before, after = template.render("").split("\n{}A:")[0], template.after
        assert template.render(problem).startswith(before[: len(template.before)])
        assert template.render(problem)[len(template.before) :] == problem + after


def test_begin_tokens_are_added_once(shared_data):
    stories = SentencePieceTokenizer(shared_data / "lm/stories260K/tok512.model", add_bos=True)
    templated = TemplatedTokenizer(stories, plain("Once upon a time, {problem}"))
    assert templated.encode("there was") == stories.encode("Once upon a time, there was")
    assert templated.encode("x")[0] == stories.bos_id
    whole = TemplatedTokenizer(stories, Template("", "", whole=True))
    assert whole.encode("there was") == stories.encode("there was")[1:]


@pytest.mark.parametrize("text", ["no place", "{problem} {problem}"])
def test_text_without_one_place_is_refused(text):
    with pytest.raises(ValueError, match="must hold {problem} once, or be one of problem, boxed"):
        plain(text)


def test_a_name_near_a_known_one():
    with pytest.raises(ValueError, match="did you mean 'boxed'"):
        plain("boxd")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no chat template; give the folder"),
        ("{", "not JSON"),
        ({}, "holds no chat_template; the model may be a base model"),
        ({"chat_template": "{{ "}, "cannot be used"),
        ({"chat_template": "{{ raise_exception('no system') }}"}, "no system"),
        ({"chat_template": "{{ messages.append(1) }}"}, "cannot be used"),
        ({"chat_template": "{{ ''.__class__.__mro__ }}"}, "cannot be used"),
        ({"chat_template": "nothing of it"}, "writes the user's text 0 times"),
    ],
)
def test_templates_that_cannot_be_used(tmp_path, config, message):
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        chat(str(tmp_path))


def test_where_a_template_is_looked_for(tmp_path):
    file = tmp_path / "tokenizer_config.json"
    text = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"
    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": text}]
    file.write_text(json.dumps({"chat_template": named, "bos_token": {"content": "<s>"}}))
    assert chat(str(tmp_path)).render("x") == "<s>x"
    (tmp_path / "chat_template.jinja").write_text("[{{ messages[0].content }}]\n")
    assert chat(str(tmp_path)).render("x") == "[x]"  # the file is newer than the field


@pytest.mark.parametrize(
    ("name", "file", "problems", "longest"),
    [
        ("dapo_math_17k", "rl_prompts/dapo_math_17k.parquet", 993, 332),
        ("sanity_math_1k5", "rl_prompts/precision_rl_sanity_math_1k5.jsonl.gz", 1460, 1067),
        ("aime24", "eval/aime24.jsonl.gz", 30, 416),
    ],
)
def test_the_papers_sets_in_qwens_template(
    dppo, qwen, shared_data, tmp_path, name, file, problems, longest
):
    file = shared_data / file
    if file.suffix == ".parquet":  # its first thousand rows: all of them take half a minute
        parquet.write_table(parquet.read_table(file).slice(0, 1000), tmp_path / file.name)
        file = tmp_path / file.name
    store.prepare(name, tmp_path, file)
    done = dppo("data", "show", name, "-n", "1", "--tokenizer", qwen["qwen3"], "--user", "boxed",
                "--data-dir", tmp_path, "--json")  # fmt: skip
    result = json.loads(done.out)
    assert (result["problems"], result["tokens"]["longest"]) == (problems, longest)
    (shown,) = result["shown"]
    assert (
        shown["text"].startswith("<|im_start|>user\n") and "\\boxed{}.<|im_end|>" in shown["text"]
    )
    assert result["tokens"]["shortest"] <= shown["tokens"] <= longest and shown["answer"]


def test_show_for_people(dppo, toy_recipe, tmp_path):
    done = dppo("data", "show", "arithmetic", "-n", "2", "--recipe", toy_recipe)
    assert done.status == 0, done.err
    first, text, *_, last = done.out.splitlines()
    assert first == "---- 10*11: answer 110, tokens 6" and text == "10*11="
    assert last.startswith("---- arithmetic train: 800 problems; prompt tokens: shortest 6")
    store.prepare("stories", tmp_path)
    done = dppo("data", "show", "stories", "-n", "0", "--split", "test", "--data-dir", tmp_path)
    assert done.out.startswith("---- stories test: ") and done.out.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["aime99"], "did you mean aime2"),
        (["aime24"], "aime24 is not prepared; run: dppo data prepare aime24"),
        (["stories", "-n", "-1"], "-n -1"),
        (["stories", "--split", "dev"], "no split 'dev'; there is test, train"),
        (["stories", "--tokenizer", "nowhere"], "no chat template"),
        (["stories", "--tokenizer", "x", "--recipe", "y"], "--recipe or --tokenizer"),
    ],
)
def test_show_refuses(dppo, tmp_path, arguments, message):
    done = dppo("data", "show", *arguments, "--data-dir", tmp_path)
    assert done.status == 2 and message in done.err and len(done.err.splitlines()) == 1
