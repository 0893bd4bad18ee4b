"""`dppo sample` as a user has it, and pieces of text that carry their tokens' probabilities."""

import json
import math
from pathlib import Path

import jax
import pytest
from test_streaming import by_bytes  # noqa: F401  a fixture

from dppo_jax import conversation
from dppo_jax.console import SHADES, Console
from dppo_jax.conversation import Sample
from dppo_jax.hf_exchange import write_folder
from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.decoder import Model
from dppo_jax.models.hf_config import to_json
from dppo_jax.prompts.streaming import TextStream
from dppo_jax.sampling.requests import SamplingParams
from dppo_jax.sharding import MeshConfig
from dppo_jax.stored_policy import of_folder

ASK = ("--prompt", "12*34=", "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def run(dppo, toy_recipe, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sample") / "run"
    flags = ("--gin.STEPS=1", "--gin.train.train.eval_sets=()")
    done = dppo("train", toy_recipe, "--workdir", workdir, *flags)
    assert done.status == 0, done.err
    return workdir


@pytest.fixture(scope="module")
def folder(by_bytes, tmp_path_factory):  # noqa: F811
    """A Hugging Face folder with a tokenizer of bytes."""
    place = tmp_path_factory.mktemp("hf") / "model"
    place.mkdir()
    config = DecoderConfig(
        vocab_size=258, width=16, layers=1, heads=2, kv_heads=2, head_size=8, mlp_width=16
    )
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    write_folder(place, model, params, to_json(config, "float32"), "float32", None)
    by_bytes._model.save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return place


def test_a_run_a_recipe_and_a_folder_answer(dppo, toy_recipe, run, folder):
    """The same seed gives the same answers; one JSON object and nothing else."""
    found = {}
    for name, policy in {"recipe": toy_recipe, "run": run, "folder": folder}.items():
        asked = ("sample", policy, *ASK, "-n", 3, "--seed", 5, "--json", "--logprobs")
        done = dppo(*asked)
        assert done.status == 0 and done.out.count("\n") == 1 and not done.err, done.err
        found[name] = json.loads(done.out)
        assert found[name]["prompt"] == "12*34=" and len(found[name]["samples"]) == 3
        for sample in found[name]["samples"]:
            assert 1 <= sample["tokens"] == len(sample["token_ids"]) <= 6
            assert all(logp <= 0 for logp in sample["logprobs"])
            ended = sample["finish_reason"] == "stop"
            assert ended or sample["tokens"] == 6
        assert found[name]["tokens"] == sum(s["tokens"] for s in found[name]["samples"])
        assert found[name]["tokens_per_second"] > 0
    again = json.loads(dppo(*asked).out)
    assert again["samples"] == found["folder"]["samples"]
    assert found["run"]["samples"] != found["recipe"]["samples"]  # one step was trained
    assert len({sample["text"] for sample in found["run"]["samples"]}) > 1


def test_a_short_answer_compiles_little_whatever_it_might_have_taken(folder, monkeypatch):
    mesh = MeshConfig().build()
    policy = of_folder(folder, mesh)
    end = policy.tokenizer.end_id
    sampling = SamplingParams(max_new_tokens=5000, stop_ids=(end,), logit_bias=((end, 100.0),))
    engines, engine_for = [], conversation.engine_for

    def kept(*arguments):
        engines.append(engine_for(*arguments))
        return engines[-1]

    monkeypatch.setattr(conversation, "engine_for", kept)
    done = conversation.converse(policy, "12*34=", sampling, mesh)
    stats = engines[0].stats
    assert done.tokens == 1 and done.seconds > 0
    assert done.compile_seconds == stats.compile_seconds > 0
    # the copy of the weights, a prefill, its hidden states' places, a decoding loop
    assert stats.compilations <= 4


def test_what_people_see(dppo, run):
    shown = dppo("sample", run, *ASK, "-n", 2, "--seed", 5, "--logprobs")
    answers = json.loads(dppo("sample", run, *ASK, "-n", 2, "--seed", 5, "--json").out)
    first, second = (sample["text"] for sample in answers["samples"])
    assert shown.out.startswith(f"answer 1 of 2\n{first}\nanswer 2 of 2\n{second}\n")
    assert (
        "0.5 or more" in shown.out
        and f"{answers['tokens']} tokens in " in shown.out
        and "tokens/s, and " in shown.out
    )


def test_a_warm_start_is_seen(dppo):
    """Whoever asks a recipe waits for the policy that it begins with."""
    recipe = Path(__file__).parents[1] / "configs/recipes/arithmetic_cpu.gin"
    brief = "--gin.initial_policy.warm_started_policy.steps=2"
    shown = dppo("sample", recipe, *ASK, brief)
    assert shown.status == 0 and shown.out.startswith("warm start 2/2  nll "), shown.err
    assert "warm start" not in dppo("sample", recipe, *ASK, brief, "--json").out


def test_pieces_are_coloured_by_probability(capsys):
    console = Console()
    console.answer(0, 1)
    console.pieces([("so", -0.01), ("me", math.log(0.4)), ("[b]", -9.0)], coloured=True)
    console.legend()
    shown = capsys.readouterr().out
    assert shown == "some[b]\n\nprobability   0.9 or more  0.5 or more  0.1 or more  less "
    styles = [next(style for least, style in SHADES if p >= least) for p in (0.95, 0.4, 1e-4)]
    assert styles == ["green", "dark_orange", "bold red"]


def test_a_folder_is_asked_in_its_chat_template(dppo, folder):
    """The same answer as to the template's text, written by hand."""
    template = folder / "chat_template.jinja"
    asked = ("sample", folder, "--temperature", 0, "--max-new-tokens", 6, "--json", "--logprobs")
    template.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<a>")
    chat = dppo(*asked, "--prompt", "hello", "--chat")
    template.unlink()
    assert chat.status == 0, chat.err
    by_hand, without = (
        json.loads(dppo(*asked, "--prompt", text).out) for text in ("<user>hello<a>", "hello")
    )
    found = json.loads(chat.out)
    assert found["samples"] == by_hand["samples"] != without["samples"]


def test_stop_strings_and_greedy(dppo, folder):
    asked = ("sample", folder, "--prompt", "hello", "--temperature", 0, "--json")
    (plain,) = json.loads(dppo(*asked, "--max-new-tokens", 6).out)["samples"]
    assert plain["tokens"] == 6
    readable = [c for c in plain["text"] if c.isascii()] or ["\ufffd"]
    more = ("--max-new-tokens", 6, "--stop", readable[0], "--seed", 9)
    (cut,) = json.loads(dppo(*asked, *more).out)["samples"]
    assert cut["finish_reason"] == "stop" and plain["text"].startswith(cut["text"])
    assert cut["text"].endswith(readable[0]) and cut["tokens"] < 6


def test_a_piece_is_whole_characters(by_bytes):  # noqa: F811
    """A character of three bytes comes once, with the probability of all three."""
    sample = Sample(TextStream(by_bytes))
    ids = by_bytes.encode("a€b")
    logp = [-0.5, -1.0, -2.0, -3.0, -0.25]
    assert len(ids) == 5
    pieces = sample.take(ids[:3], logp[:3], last=False)
    assert [piece.text for piece in pieces] == ["a"]
    pieces = sample.take(ids[3:], logp[3:], last=True)
    assert [piece.text for piece in pieces] == ["€", "b"] and sample.text == "a€b"
    assert [piece.logp for piece in sample.pieces] == [-0.5, -6.0, -0.25]
    broken = Sample(TextStream(by_bytes))
    broken.take(ids[:2], logp[:2], last=True)
    assert math.isclose(sum(piece.logp for piece in broken.pieces), -1.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such recipe, run or folder"),
        (["nowhere.gin"], "nowhere.gin"),
        (["RUN", "--temperature", "-1"], "temperature=-1.0 must be"),
        (["RUN", "--top-p", "0"], "top_p=0.0"),
        (["RUN", "-n", "0"], "n must be at least 1"),
        (["RUN", "--max-new-tokens", "0"], "max_new_tokens and n must be at least 1"),
        (["RUN", "--stop", ""], "stop_strings holds an empty string"),
        (["RUN", "--stop", "\udcff"], "is not valid UTF-8"),
        (["RUN", "--prompt", ""], "the prompt has no tokens"),
        (["RUN", "--prompt", "\udcff"], "the prompt is not valid UTF-8"),
        (["EMPTY"], "is no recipe (*.gin), run directory, Hugging Face folder"),
        (["FOLDER", "--chat"], "holds no chat_template"),
        (["RUN", "--chat"], "a recipe asks in its own template: leave --chat out"),
        (["FOLDER", "--gin.SEED=1"], "has no recipe that --gin.SEED=1 could change"),
    ],
)
def test_bad_input_is_one_line(dppo, run, folder, tmp_path, arguments, message):
    places = {"RUN": run, "EMPTY": tmp_path, "FOLDER": folder}
    given = [places.get(argument, argument) for argument in arguments]
    done = dppo("sample", "--prompt", "1*1=", *given)
    assert done.status == 2 and done.err.count("\n") == 1 and message in done.err, done.err
