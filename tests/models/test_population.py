import jax
import jax.numpy as jnp
from model_files import write_folder
import numpy as np
import pytest
import reference_models as reference

import zo_jax
from zo_jax import models
from zo_jax.models import lora, population

PROMPTS = [[3, 1, 4, 1, 5], [7], [2, 7, 1]]


@pytest.fixture(scope="module", params=["gpt2", "llama, biases", "qwen 3"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("population")
    write_folder(folder, reference.CASES[request.param])
    return models.load(folder)


def alone(family, params, key, scale):
    moved = family.perturb(params, key, scale)
    return jax.tree.map(
        lambda x: x.form() if hasattr(x, "form") else x, moved, is_leaf=lambda x: hasattr(x, "form")
    )


@pytest.mark.parametrize("rank", [1, 2])
def test_every_member_is_the_perturbed_model(model, rank):
    family, M = zo_jax.low_rank(rank), 3
    keys = jax.random.split(jax.random.key(5), M)
    scales = jnp.array([0.05, -0.05, 0.1])
    members = jax.jit(lambda p: population.populate(p, family, keys, scales))(model.params)
    tokens = np.asarray(reference.TOKENS)
    together = jax.jit(model.logits)(members, np.tile(tokens, (M, 1)))
    for i in range(M):
        expected = model.logits(alone(family, model.params, keys[i], scales[i]), tokens)
        own = together[i * len(tokens) : (i + 1) * len(tokens)]
        assert np.max(np.abs(own - expected)) < 2e-5 * np.std(expected)
    assert np.max(np.abs(together[: len(tokens)] - together[-len(tokens) :])) > 0.01


def test_members_write_what_they_would_alone(model):
    family, M = zo_jax.low_rank(1), 4
    keys, scales = jax.random.split(jax.random.key(1), M), jnp.array([0.1, -0.1, 0.2, 0.3])
    options = dict(max_tokens=8, temperature=0.7, seed=3)
    together = population.generate_all(
        model, model.params, PROMPTS, family, keys, scales, **options
    )
    texts = set()
    for i, member in enumerate(together):
        params = alone(family, model.params, keys[i], scales[i])
        expected = models.generate(model, params, PROMPTS, **options)
        for a, b in zip(member.tokens, expected.tokens, strict=True):
            np.testing.assert_array_equal(a, b)
        texts.add(tuple(map(tuple, member.tokens)))
    assert len(texts) > 1


def test_factors_beside_a_quantised_base_are_a_population_too(model):
    family = zo_jax.low_rank(1)
    keys, scales = jax.random.split(jax.random.key(2), 2), jnp.array([0.3, -0.3])
    quantized = models.quantize(model, 8)
    factors = lora.init(jax.random.key(0), model, 4, targets=r"(_proj|c_attn|c_fc)$")
    members = lora.attach(quantized.params, population.populate(factors, family, keys, scales))
    together = models.generate(quantized, members, PROMPTS * 2, max_tokens=6)
    for i in range(2):
        own = lora.attach(quantized.params, alone(family, factors, keys[i], scales[i]))
        expected = models.generate(quantized, own, PROMPTS, max_tokens=6)
        for a, b in zip(together.tokens[3 * i : 3 * i + 3], expected.tokens, strict=True):
            np.testing.assert_array_equal(a, b)
