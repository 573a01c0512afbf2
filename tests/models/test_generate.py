import dataclasses
import io

import jax
import jax.numpy as jnp
from model_files import smollm2, write_folder
import numpy as np
import pytest
import reference_models as reference
from test_tokenizer import write

from zo_jax import models
from zo_jax.models.generate import _likeliest
from zo_jax.train.tools import generate as command

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [7], [2, 7, 1, 8]]


@pytest.fixture(params=["gpt2", "llama 3", "mistral, window", "qwen 2, windows", "qwen 3"])
def model(request, tmp_path):
    write_folder(tmp_path, reference.CASES[request.param])
    return models.load(tmp_path)


def one_after_the_other(m, logits, prompt, num_tokens):
    """The likeliest tokens without a cache: all of the text again for each."""
    ids = np.zeros((1, 32), np.int32)
    ids[0, : len(prompt)] = prompt
    for n in range(len(prompt), len(prompt) + num_tokens):
        ids[0, n] = np.argmax(logits(m.params, ids)[0, n - 1])
    return ids[0, len(prompt) : len(prompt) + num_tokens].tolist()


def test_batch_with_cache_is_each_prompt_alone_without_one(model):
    # More tokens than a chunk has.
    out = models.generate(model, model.params, PROMPTS, max_tokens=18, stop_tokens=())
    logits = jax.jit(model.logits)
    for prompt, tokens in zip(PROMPTS, out.tokens, strict=True):
        assert tokens.tolist() == one_after_the_other(model, logits, prompt, 18)
    assert out.texts == ["", "", ""] and out.tokens_per_second > 0


def make_model():
    """Its logits depend on the last token alone: token i is followed by i + 1."""
    m = models.create(reference.CASES["gpt2"] | {"tie_word_embeddings": False}, jax.random.key(0))
    p = jax.tree.map(jnp.zeros_like, m.params)
    eye = jnp.eye(11, 16)
    p["wte"]["weight"], p["lm_head"]["weight"] = eye, 9 * jnp.roll(eye, 1, axis=0)
    p["ln_f"]["scale"] = jnp.ones(16)
    return dataclasses.replace(m, params=p)


def test_stop_tokens_end_a_row_and_the_others_go_on():
    m = make_model()
    out = models.generate(m, m.params, [[3], [7]], max_tokens=6, stop_tokens=(9,))
    assert [row.tolist() for row in out.tokens] == [[4, 5, 6, 7, 8], [8]]
    # The model's own end is token 2.
    out = models.generate(m, m.params, [[8], [1]], max_tokens=20)
    assert [row.tolist() for row in out.tokens] == [[9, 10, 0, 1], []]


def test_stop_strings_end_a_text_before_them(tmp_path):
    tokens = write(tmp_path).backend
    tokens.add_tokens(["<e>", *"cdfghijk"])
    m = dataclasses.replace(make_model(), tokenizer=models.tokenizer.Tokenizer(tokens))
    out = models.generate(m, m.params, ["d", [9]], max_tokens=20, stop=["h i"], stop_tokens=())
    assert out.texts[0] == " f g " and out.tokens[0].tolist() == [5, 6, 7, 8]
    # "<e>", token 2, is special: it is no text.
    assert out.texts[1] == " k a b c d f g " and out.tokens[1].tolist() == [10, *range(9)]


def test_draws_follow_the_probabilities():
    m = make_model()
    m.params["lm_head"]["weight"] = jnp.zeros((11, 16)).at[:3, 5].set(jnp.array([1.0, 0.5, 0.0]))
    prompts = [[5]] * 600
    draw = lambda **settings: np.concatenate(
        models.generate(m, m.params, prompts, max_tokens=1, stop_tokens=(), **settings).tokens
    )
    # The hidden state of token 5 is a one at 5, less its mean, over its deviation.
    x = np.eye(16)[5] - 1 / 16
    logits = np.zeros(11)
    logits[:3] = np.array([1, 0.5, 0]) * x[5] / np.sqrt(np.mean(x**2) + 1e-5) / 2.0
    p = np.exp(logits) / np.exp(logits).sum()
    drawn = np.bincount(draw(temperature=2.0), minlength=11) / 600
    # Four standard deviations of a frequency.
    assert np.all(np.abs(drawn - p) < 4 * np.sqrt(p * (1 - p) / 600))
    assert set(draw(temperature=2.0, top_p=float(p[0] + 0.5 * p[1]))) == {0, 1}
    assert set(draw(temperature=2.0, top_p=0.01)) == {0} == set(draw())
    assert np.array_equal(draw(temperature=2.0, seed=3), draw(temperature=2.0, seed=3))
    assert not np.array_equal(draw(temperature=2.0, seed=3), draw(temperature=2.0, seed=4))


@pytest.mark.parametrize("top_p, kept", [(0.4, 1), (0.5, 1), (0.51, 2), (0.8, 3), (1.0, 4)])
def test_the_smallest_set_of_the_likeliest(top_p, kept):
    p = np.array([[0.125, 0.5, 0.125 - 1e-3, 0.25 + 1e-3]])
    left = np.isfinite(_likeliest(jnp.log(p), jnp.float32(top_p)))[0]
    assert set(np.flatnonzero(left)) == set(np.argsort(-p[0])[:kept])


@pytest.mark.parametrize(
    "prompts, settings, message",
    [
        ([], {}, "at least one"),
        ([[1], []], {}, "at least one token"),
        ([[11]], {"max_tokens": 3}, r"\[0, 11\)"),
        ([[1] * 30], {"max_tokens": 3}, "30 tokens and max_tokens 3.*context of 32"),
        ([[1]], {"top_p": 0.0, "max_tokens": 3}, "top_p"),
        ([[1]], {"temperature": -1.0, "max_tokens": 3}, "temperature"),
        (["text"], {"max_tokens": 3}, "no tokenizer"),
        ([[1]], {"stop": ["x"], "max_tokens": 3}, "stop strings need a tokenizer"),
    ],
)
def test_what_cannot_be_generated(prompts, settings, message):
    m = make_model()
    with pytest.raises(ValueError, match=message):
        models.generate(m, m.params, prompts, **settings)


def test_command_line(tmp_path, capsys, monkeypatch):
    m = make_model()
    models.save(tmp_path, m, m.params)
    tokens = write(
        tmp_path, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"
    ).backend
    tokens.add_tokens([*"cdfghijkl"])
    tokens.save(str(tmp_path / "tokenizer.json"))
    assert command.main([str(tmp_path), "--prompt=d", "--prompt=h", "--max-tokens=2"]) == 0
    out = capsys.readouterr()
    assert out.out == "d f g\nh i j\n" and "4 tokens" in out.err
    monkeypatch.setattr("sys.stdin", io.StringIO("d\n"))
    assert command.main([str(tmp_path), "--chat", "--system=a ", "--max-tokens=2"]) == 0
    assert capsys.readouterr().out == "f g\n"
    assert command.main([str(tmp_path / "none"), "--prompt=d"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert command.main([str(tmp_path), "--system=x", "--prompt=d"]) == 2


@pytest.mark.slow
def test_smollm2_goes_on_and_answers():
    m = models.load(smollm2())
    out = models.generate(
        m,
        m.params,
        [
            "The capital of France is",
            [{"role": "user", "content": "What is the capital of Japan?"}],
        ],
        max_tokens=16,
        stop=["."],
    )
    assert out.texts[0].startswith(" Paris") and "Tokyo" in out.texts[1]
    assert all("." not in text for text in out.texts)
