"""Examples: read, split, put into tokens and batches, scored."""

import dataclasses
import json

import fine_tune
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zo_jax import models
from zo_jax.train.config import PUBLISHED_TASKS, TaskConfig
from zo_jax.train.data.sources import DataError
from zo_jax.train.tasks import answers, encode, scores
from zo_jax.train.tasks.example import Example, split
from zo_jax.train.tasks.files import read_examples
from zo_jax.train.tasks.order import Order
from zo_jax.train.tasks.published import PUBLISHED, read_published

TOKENIZER = fine_tune.tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labelled(**fields):
    return TaskConfig(
        name="file", **dict(template="{a} is", labels='{"0": "-", "1": "+"}') | fields
    )


def test_a_file_of_labels(tmp_path):
    path = write(tmp_path / "x.jsonl", [dict(a="x {y}", label=1), dict(a=2, label="0")])
    first, second = read_examples(labelled(), path, None)
    assert first == Example("x {y} is", ("-", "+"), (1,))
    assert (second.prompt, second.right) == ("2 is", (0,))
    (tmp_path / "x.csv").write_text('\ufeffa,label\n"b, c",1\n')
    (example,) = read_examples(labelled(), str(tmp_path / "x.csv"), None)
    assert (example.prompt, example.right) == ("b, c is", (1,))


def test_a_file_of_answers_and_of_conversations(tmp_path):
    path = write(tmp_path / "x.jsonl", [dict(a="x", b="yes")])
    chat = TOKENIZER.chat
    of_target = lambda **fields: TaskConfig(name="file", **fields)
    (plain,) = read_examples(of_target(template="{a}?", target="b"), path, chat)
    assert plain == Example("x?", (" yes",), (0,), ("yes",))
    (asked,) = read_examples(of_target(template="{a}?", target="b", chat=True), path, chat)
    assert asked == Example("[user]x?\n[assistant]", ("yes\n",), (0,), ("yes",))
    messages = [
        dict(role="system", content="s"),
        *({"role": r, "content": r} for r in ("user", "assistant")),
    ]
    path = write(tmp_path / "y.jsonl", [dict(messages=messages)])
    (whole,) = read_examples(of_target(target="messages", chat=True), path, chat)
    assert whole.prompt == "[system]s\n[user]user\n[assistant]" and whole.options == (
        "assistant\n",
    )


@pytest.mark.parametrize(
    "rows, fields, message",
    [
        ([dict(a=1, label=1), dict(b=1)], {}, r"line 2: there is no column 'label'; there are b"),
        ([dict(a=1, label=2)], {}, "line 1: the label '2' is none of 0, 1"),
        ([dict(label=0)], {}, "no column 'a'"),
        ([], {}, "holds no rows"),
        ([dict(a=1, label=0)], dict(template="{a.real}"), "must name columns alone"),
        ([dict(a=1, label=0)], dict(template="{a"), "cannot be read"),
        ([dict(a=1, label=0)], dict(labels='{"0": "-"}'), "two texts or more"),
        ([dict(a=1, label=0)], dict(labels="[1]"), "must map each label to a text"),
        ([dict(a=1, label=0)], dict(labels="{"), "is no JSON"),
        ([dict(a=1, label=0)], dict(chat=True), "need the tokenizer of the model"),
        ([dict(a=1, b="")], dict(labels="", target="b"), "the column b is empty"),
        ([dict(a=1, b=[{}])], dict(labels="", target="b"), "messages with role and content"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_line(tmp_path, rows, fields, message):
    path = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match=message) as error:
        read_examples(labelled(**fields), path, None)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"label": 0}\nno\n')
    (tmp_path / "y.csv").write_text("a,label\n1\n")
    for name, message in (
        ("x.jsonl", "line 2 is no JSON"),
        ("y.csv", "line 2 has not as many cells"),
        ("z.jsonl", "cannot be read"),
        ("z.txt", "must end in .jsonl or .csv"),
    ):
        config = TaskConfig(name="file", template="", labels='{"0": "-", "1": "+"}')
        with pytest.raises(DataError, match=message):
            read_examples(config, str(tmp_path / name), None)


# A row of each data set, and the example of it, as the appendix of the paper has it.
ROWS = {
    "sst2": (
        dict(sentence="a fine film ", label=1),
        ("a fine film It was", (" terrible", " great"), (1,)),
    ),
    "rte": (
        dict(premise="P.", hypothesis="H.", label=1),
        ('P.\nDoes this mean that "H." is true? Yes or No?\n', ("Yes", "No"), (1,)),
    ),
    "cb": (
        dict(premise="P.", hypothesis="H.", label=2),
        (
            'Suppose P. Can we infer that "H."? Yes, No, or Maybe?\n',
            ("Yes", "No", "Maybe"),
            (2,),
        ),
    ),
    "boolq": (
        dict(passage="P.", question="is it so", answer=False),
        ("P. Is it so?\n", ("Yes", "No"), (1,)),
    ),
    "wsc": (
        dict(text="Mark told Pete.", span1_text="Mark", span2_text="He", label=1),
        (
            'Mark told Pete.\nIn the previous sentence, does the pronoun "he" refer to Mark? '
            "Yes or No?\n",
            ("Yes", "No"),
            (0,),
        ),
    ),
    "wic": (
        dict(word="bank", sentence1="A.", sentence2="B.", label=0),
        (
            'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA.\nB.\n',
            ("Yes", "No"),
            (1,),
        ),
    ),
    "multirc": (
        dict(paragraph="P.", question="Q?", answer="A", label=1),
        (
            'P.\nQuestion: Q?\nI found this answer "A". Is that correct? Yes or No?\n',
            ("Yes", "No"),
            (0,),
        ),
    ),
    "copa": (
        dict(
            premise="It rained.",
            question="effect",
            choice1="The road got wet.",
            choice2="I ran.",
            label=0,
        ),
        ("It rained so", (" the road got wet.", " I ran."), (0,)),
    ),
    "record": (
        dict(
            passage="P\n@highlight\nA did.",
            query="And @placeholder won.",
            entities=["A", "B", "A"],
            answers=["B"],
        ),
        ("P\n- A did.\n-", (" And A won.", " And B won."), (1,)),
    ),
    "squad": (
        dict(title="T", context="C", question=" Q? ", answers={"text": ["x", "y"]}),
        ("Title: T\nContext: C\nQuestion: Q?\nAnswer:", (" x\n",), (0,), ("x", "y")),
    ),
    "drop": (
        dict(passage="P", question="Q?", answers_spans={"spans": ["3"]}),
        ("Passage: P\nQuestion: Q?\nAnswer:", (" 3\n",), (0,), ("3",)),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED_TASKS)
def test_published_prompts(name):
    row, expected = ROWS[name]
    assert PUBLISHED[name].make(row) == Example(*expected)


def test_a_copy_of_a_data_set(tmp_path):
    row = ROWS["sst2"][0]
    write(tmp_path / "train.jsonl", [row, row | {"label": -1}, row])
    write(tmp_path / "validation.jsonl", [row])
    train, validation = read_published("sst2", str(tmp_path))
    assert (len(train), len(validation)) == (2, 1) and train[0] == Example(*ROWS["sst2"][1])
    with pytest.raises(DataError, match="is not the data set of task rte: KeyError"):
        read_published("rte", str(tmp_path))
    with pytest.raises(DataError, match="must be a folder with a copy"):
        read_published("sst2", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"cannot be reached \(HF_HUB_OFFLINE is set\).*task\.path"):
        read_published("sst2", "")


def test_parts_are_disjoint_and_of_the_seed():
    examples = [Example(str(i), ("-", "+"), (0,)) for i in range(30)]
    parts = split(examples, (10, 5, 5), 0, "x")
    assert [len(part) for part in parts] == [10, 5, 5]
    assert len({x.prompt for part in parts for x in part}) == 20
    assert parts == split(examples, (10, 5, 5), 0, "x") != split(examples, (10, 5, 5), 1, "x")
    shares = split(examples, (40, 10, 10), 0, "x")
    assert [len(part) for part in shares] == [20, 5, 5]
    with pytest.raises(DataError, match="too few"):
        split(examples[:2], (10, 5, 5), 0, "x")


def test_every_epoch_has_each_example_once_in_batches_of_like_lengths():
    lengths = np.random.default_rng(0).integers(3, 200, 96)
    order = Order(lengths, 8, seed=5)
    epochs = [np.concatenate([order.batch(12 * e + i)[0] for i in range(12)]) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(96))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    padded = sum(8 * order.batch(i)[1] for i in range(12))
    assert padded < 1.25 * lengths.sum() and 96 * lengths.max() > 1.7 * lengths.sum()
    assert all(lengths[order.batch(i)[0]].max() <= order.batch(i)[1] for i in range(36))
    assert len({order.batch(i)[1] for i in range(36)}) <= 8
    again, other = Order(lengths, 8, 5), Order(lengths, 8, 6)
    assert np.array_equal(again.batch(20)[0], order.batch(20)[0])
    assert not np.array_equal(other.batch(20)[0], order.batch(20)[0])
    assert Order(lengths[:3], 8, 0).batch(7)[0].shape == (8,)


def test_epochs_of_the_same_batches_in_orders_of_their_own():
    lengths = np.random.default_rng(0).integers(3, 200, 96)
    order = Order(lengths, 8, seed=5, same_batches=True)
    epochs = [[tuple(order.batch(12 * e + i)[0]) for i in range(12)] for e in range(3)]
    assert epochs[0] == [tuple(Order(lengths, 8, 5).batch(i)[0]) for i in range(12)]
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]


def test_what_follows_begins_where_its_tokens_do():
    ids, start = encode.encode(TOKENIZER, "ab", "cd", 10)
    assert TOKENIZER.decode(ids[start:]) == "cd" and TOKENIZER.decode(ids) == "abcd"
    ids, start = encode.encode(TOKENIZER, "abcdef", "gh", 5)
    assert TOKENIZER.decode(ids) == "defgh" and start == 3
    with pytest.raises(DataError, match="max_tokens=2 has no room for 'gh'"):
        encode.encode(TOKENIZER, "abcdef", "gh", 2)
    with pytest.raises(DataError, match="a token must come before"):
        encode.encode(TOKENIZER, "", "gh", 5)


def test_labels_are_of_one_token_or_are_options():
    make = lambda *options: [Example(p, options, (0,)) for p in ("x", "yz")]
    tokens = encode.label_tokens(TOKENIZER, make("-", "+"))
    assert TOKENIZER.decode(tokens) == "-+"
    assert encode.label_tokens(TOKENIZER, make("--", "+")) is None
    assert encode.label_tokens(TOKENIZER, [*make("-", "+"), *make("+", "-")]) is None


@pytest.fixture(scope="module")
def model():
    m = models.create(fine_tune.FIELDS, jax.random.key(0))
    params = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, m.params)
    return dataclasses.replace(m, params=params, tokenizer=TOKENIZER)


def log_probs(model, text):
    """Of each character after the first, float64, by all logits."""
    ids = TOKENIZER.encode(text)
    logits = np.asarray(model.logits(model.params, ids[None]), np.float64)[0]
    logits -= np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    return logits[np.arange(len(ids) - 1), ids[1:]], logits[-1]


EXAMPLES = [
    Example("ab", ("xyz", "u"), (1,)),
    Example("cdefg", ("v", "wx"), (0,)),
    Example("h", ("t", "tu", "tuv"), (0, 2)),
]


def test_scores_of_labels_are_logits_at_the_ends(model):
    examples = [Example(p, ("-", "+"), (i,)) for i, p in enumerate(("ab", "cdefg"))]
    batch = encode.encode_labelled(TOKENIZER, examples, 20)
    labels = encode.label_tokens(TOKENIZER, examples)
    got = jax.jit(lambda b: scores.labelled_scores(model, model.params, b, jnp.array(labels)))(
        batch
    )
    for row, example in zip(got, examples, strict=True):
        _, last = log_probs(model, example.prompt)
        expected = last[labels]
        np.testing.assert_allclose(row - row[0], expected - expected[0], rtol=1e-4, atol=1e-4)


def test_scores_of_options_are_mean_log_probabilities(model):
    batch = encode.encode_chosen(TOKENIZER, EXAMPLES, 20)
    got = jax.jit(lambda b: scores.chosen_scores(model, model.params, b, 3))(batch)
    assert got.shape == (3, 3)
    for row, example in zip(got, EXAMPLES, strict=True):
        for k, option in enumerate(example.options):
            expected = np.mean(log_probs(model, example.prompt + option)[0][-len(option) :])
            np.testing.assert_allclose(row[k], expected, rtol=1e-4, atol=1e-4)
        assert np.all(np.isneginf(row[len(example.options) :]))
    loss = scores.choice_losses(got, batch.right)
    p = np.exp(np.asarray(got, np.float64))
    p /= p.sum(axis=1, keepdims=True)
    expected = -np.log(np.sum(p * batch.right, axis=1))
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)


def test_losses_of_answers_are_of_their_tokens_alone(model):
    batch = encode.encode_written(TOKENIZER, EXAMPLES, 20)
    got = jax.jit(lambda b: scores.written_losses(model, model.params, b, 3))(batch)
    for loss, example in zip(got, EXAMPLES, strict=True):
        option = example.options[example.right[0]]
        expected = -np.mean(log_probs(model, example.prompt + option)[0][-len(option) :])
        np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-4)


def test_a_head_that_is_no_array_has_the_same_losses(model):
    quantized = models.quantize(model, 8)
    batch = encode.encode_written(TOKENIZER, EXAMPLES, 20)
    got = scores.written_losses(quantized, quantized.params, batch, 3)
    whole = dataclasses.replace(
        model,
        params=jax.tree.map(
            lambda x: x.form() if hasattr(x, "form") else x,
            quantized.params,
            is_leaf=lambda x: hasattr(x, "form"),
        ),
    )
    expected = scores.written_losses(whole, whole.params, batch, 3)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_answers_are_compared_as_squad_does():
    assert answers.f1("The cat sat", ["a cat sat down", "dog"]) == pytest.approx(2 * 2 / 5)
    assert answers.f1("", ["x"]) == 0 and answers.f1("the", ["a"]) == 1
    assert answers.exact_match("Cat!", ["dog", "the cat"]) and not answers.exact_match("c", ["d"])
