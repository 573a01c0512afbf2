import dataclasses
import json
import os
import struct
import zlib

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zo_jax
from zo_jax import ledger
from zo_jax.replay import arguments, check_replayable, replay
from zo_jax.train import choices, run_state, steps
from zo_jax.train.config import Config, ConfigError, from_dict
from zo_jax.train.data import batches
from zo_jax.train.data.corpus import load_corpus
from zo_jax.train.model import make_model
from zo_jax.train.optimizers import make_optimizer
from zo_jax.train.run import train_and_evaluate
from zo_jax.train.run_folder import checkpoint, metrics, resume
from zo_jax.train.tools.ledger import main
from zo_jax.train.validation import validate

HEADER = {"num_queries": 3, "versions": {"jax": "1"}, "perturbation": "rademacher"}
FUZZ = settings(
    max_examples=int(os.environ.get("ZO_JAX_FUZZ_EXAMPLES", "150")),
    deadline=None,
    derandomize="ZO_JAX_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)


def random_records(n, rng, q=3):
    bits = rng.integers(0, 2**32, (n, q), np.uint32)  # nan, infinities, denormals among them
    return [
        (rng.integers(0, 2**32, 2, np.uint32), np.float32(rng.normal()), bits[i].view(np.float32))
        for i in range(n)
    ]


def write(path, rows, header=HEADER):
    writer = ledger.Writer(path, header)
    for step, (key, loss, c) in enumerate(rows, 1):
        writer.append(step, ledger.REPLAYABLE, key, loss, c)
    writer.close()
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "ledger.bin", random_records(5, np.random.default_rng(0)))


def test_every_bit_comes_back(tmp_path):
    rows = random_records(40, np.random.default_rng(1))
    there = ledger.read(write(tmp_path / "l", rows))
    assert there.header == HEADER and there.valid.all() and there.replayable(0) == 40
    for record, (key, loss, c) in zip(there.records, rows, strict=True):
        assert record["key"].tobytes() == key.tobytes() and record["loss"] == loss
        assert record["projections"].tobytes() == c.tobytes()


def test_bytes_a_step(file):
    header = len(json.dumps(HEADER, sort_keys=True)) + 16
    assert file.stat().st_size == header + 5 * (4 * 4 + 4 + 3 * 4 + 4)


def test_torn_record_is_dropped_and_written_again(file):
    whole = file.read_bytes()
    for cut in (1, 17, 35):
        file.write_bytes(whole[:-cut])
        assert len(ledger.read(file).records) == 4
        writer = ledger.Writer(file, HEADER, 4)
        assert not writer.lost and file.stat().st_size == len(whole) - 36
        record = np.frombuffer(whole[-36:], np.uint8)
        key, loss, c = (
            record[8:16].view("<u4"),
            record[16:20].view("<f4"),
            record[20:32].view("<f4"),
        )
        writer.append(5, ledger.REPLAYABLE, key, loss[0], c)
        assert file.read_bytes() == whole


def test_corrupt_record_is_marked_and_blocks_replay(file):
    data = bytearray(file.read_bytes())
    data[-36 * 3 + 20] ^= 4  # of step 3
    file.write_bytes(data)
    there = ledger.read(file)
    assert there.corrupt == [3] and there.replayable(0) == 2 and there.replayable(3) == 5
    with pytest.raises(
        ledger.LedgerError, match=r"step 3 cannot be replayed: its record is damaged"
    ):
        check_replayable(there, 0, 4)
    check_replayable(there, 3, 5)
    # Going on from a later checkpoint: the record is lost, and says so.
    writer = ledger.Writer(file, HEADER, 5)
    assert writer.lost == [3]
    there = ledger.read(file)
    assert not there.corrupt and there.replayable(0) == 2 and there.replayable(3) == 5


def test_records_of_another_ledger_are_not_believed(tmp_path, file):
    other = write(
        tmp_path / "other",
        random_records(5, np.random.default_rng(2)),
        HEADER | {"perturbation": "gaussian"},
    )
    data, other_data = file.read_bytes(), other.read_bytes()
    file.write_bytes(data[:-36] + other_data[-36:])
    assert ledger.read(file).corrupt == [5]


def test_missing_records_are_lost(tmp_path):
    writer = ledger.Writer(tmp_path / "l", HEADER, 3)
    assert writer.lost == [1, 2, 3]
    writer.append(4, ledger.REPLAYABLE, [0, 0], 1.0, np.ones(3))
    there = ledger.read(tmp_path / "l")
    assert there.replayable(0) == 0 and there.replayable(3) == 4
    with pytest.raises(ledger.LedgerError, match="step 1 cannot be replayed: its record is lost"):
        check_replayable(there, 0, 4)


def test_other_headers(file):
    ledger.Writer(file, HEADER | {"versions": {"jax": "2"}}, 5).close()
    with pytest.raises(ledger.LedgerError, match="another run"):
        ledger.Writer(file, HEADER | {"perturbation": "sphere"}, 5)


def test_full_disk_leaves_the_file_as_it_was(small_disk):
    writer = ledger.Writer(small_disk / "l", HEADER)
    rng, filler = np.random.default_rng(0), (small_disk / "filler").open("wb", buffering=0)
    for size in (4096, 1):
        try:
            while filler.write(b"x" * size) == size:
                pass
        except OSError:
            pass
    step = 0
    with pytest.raises(OSError, match="No space left"):
        for key, loss, c in random_records(1000, rng):
            writer.append(step + 1, ledger.REPLAYABLE, key, loss, c)
            step += 1
    there = ledger.read(small_disk / "l")
    assert len(there.records) == step and there.valid.all()
    assert (small_disk / "l").stat().st_size % 36 == ledger.Writer(
        small_disk / "l", HEADER, 0
    )._start % 36


@FUZZ
@given(data=st.data())
def test_reader_survives_any_damage(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.unlink(missing_ok=True)
    whole = bytearray(write(path, random_records(3, np.random.default_rng(3))).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole)))
        how = data.draw(st.sampled_from(("flip", "cut", "insert", "length")))
        if how == "flip" and at < len(whole):
            whole[at] ^= data.draw(st.integers(1, 255))
        elif how == "cut":
            del whole[at:]
        elif how == "insert":
            whole[at:at] = data.draw(st.binary(max_size=64))
        elif len(whole) >= 16:
            whole[8:12] = struct.pack("<I", data.draw(st.integers(0, 2**32 - 1)))
    path.write_bytes(whole)
    try:
        there = ledger.read(path)
    except ledger.LedgerError:
        return
    assert there.replayable(0) <= 3
    for record in there.records[: there.replayable(0)]:
        arguments(record)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=12), x, max_size=4),
)


@FUZZ
@given(header=JSON, body=st.binary(max_size=200))
@example(header={"num_queries": 2**40}, body=b"")
@example(header={"num_queries": True}, body=b"")
@example(header={"num_queries": 1, "scope": ["x"]}, body=b"")
def test_reader_survives_any_header(tmp_path_factory, header, body):
    """A well-formed file with a header that says anything at all."""
    path = tmp_path_factory.getbasetemp() / "strange"
    text = json.dumps(header).encode()
    path.write_bytes(b"ZOLEDGER" + struct.pack("<II", len(text), zlib.crc32(text)) + text + body)
    try:
        there = ledger.read(path)
        replay({"w": jnp.zeros(3)}, there, optax.sgd(0.1), to_step=0)
    except ledger.LedgerError:
        pass


FIELDS = st.sampled_from([f.name for f in dataclasses.fields(Config)])


@FUZZ
@given(
    fields=JSON
    | st.dictionaries(FIELDS, JSON, max_size=3)
    | st.dictionaries(
        st.sampled_from(("zo", "train", "model")),
        st.dictionaries(st.sampled_from(("num_queries", "num_steps", "width", "size")), JSON),
        max_size=3,
    )
)
def test_any_configuration_is_read_or_refused(fields):
    try:
        validate(from_dict(fields))
    except ConfigError as error:
        assert str(error)


def train_steps(config, tmp_path, num_steps=5):
    corpus = load_corpus(config.data)
    model = make_model(config.model, corpus.tokenizer.vocab_size)
    state = run_state.init_state(config, model)
    start = jax.tree.map(np.array, state.params)
    writer = ledger.Writer(tmp_path / "l", resume.run_header(config, model, state))
    train_step = steps.make_train_step(config, model)
    for step in range(num_steps):
        tokens, _ = batches.read_batches(config, corpus.train_NT, step)
        state, _, record = train_step(state, step, tokens, None)
        writer.append(step + 1, ledger.REPLAYABLE, *jax.device_get(record))
    return start, jax.tree.map(np.array, state), ledger.read(tmp_path / "l")


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer, perturbation, scope",
    [
        ("sgd", "rademacher", "full"),
        ("adam", "gaussian", "reduced"),
        ("adamw", "sphere", "reduced"),
        ("muon", "low_rank", "full"),
        ("mudamw", "rademacher", "blocks/0/fc"),
        ("adam", "rademacher in groups", "reduced"),
    ],
)
def test_replay_equals_training_to_the_bit(tiny_config, tmp_path, optimizer, perturbation, scope):
    tiny_config.optimizer.name = optimizer
    tiny_config.zo.perturbation = perturbation.removesuffix(" in groups")
    if perturbation.endswith(" in groups"):
        tiny_config.zo.groups = "layers"
    tiny_config.scope = scope
    start, end, there = train_steps(tiny_config, tmp_path)
    model = make_model(tiny_config.model, there.header["vocab_size"])
    optimizer = make_optimizer(tiny_config.optimizer, 6)
    subset = choices.scope_of(tiny_config, model)
    half = replay(start, there, optimizer, subset=subset, to_step=2)
    assert jax.tree.structure(half) == jax.tree.structure(end.train)
    for from_there in (start, half):
        again = replay(from_there, there, optimizer, subset=subset)
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(end.train), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_replay_equals_numpy(tiny_config, tmp_path):
    tiny_config.optimizer.name = "sgd"
    start, end, there = train_steps(tiny_config, tmp_path)
    params = jax.tree.map(lambda x: x.astype(np.float64), start)
    direction = jax.jit(zo_jax.rademacher().direction)
    for i, record in enumerate(there.records):
        key = jax.random.fold_in(choices.base_key(tiny_config), i)
        assert record["key"].tolist() == jax.random.key_data(key).tolist()
        for k, c in zip(jax.random.split(key, 3), record["projections"], strict=True):
            z = direction(start, k)
            params = jax.tree.map(
                lambda p, z, c=c: p - 1e-2 * float(c) * np.array(z, np.float64) / 3, params, z
            )
    for a, b in zip(jax.tree.leaves(end.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_replay_refuses(tiny_config, tmp_path):
    start, _, there = train_steps(tiny_config, tmp_path, 2)
    optimizer = make_optimizer(tiny_config.optimizer, 6)
    other = jax.tree.map(np.array, start)
    other["wte"]["embedding"][3, 2] += 1e-6
    with pytest.raises(ledger.LedgerError, match="begins with other parameters"):
        replay(other, there, optimizer)
    with pytest.raises(ledger.LedgerError, match=r"step 3 is not between 0, .* and 2"):
        replay(start, there, optimizer, to_step=3)


@pytest.mark.slow
def test_command_line(tiny_config, tmp_path, capsys):
    train_and_evaluate(tiny_config, tmp_path / "run")
    assert main([str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "6 steps of 3 rademacher queries, 36 bytes each" in out and "reaches step 6" in out
    args = [str(tmp_path / "run"), "--to-step=6", f"--out={tmp_path / 'out'}"]
    assert main(args) == 0
    out = capsys.readouterr().out
    for step in (4, 6):
        assert f"step {step}: parameters and optimiser state are equal to the bit" in out
    there = [checkpoint.complete_steps(tmp_path / name) for name in ("out", "run/checkpoints")]
    assert there == [[6], [4, 6]]
    assert len(metrics.read(tmp_path / "run/metrics.csv")) == 7

    assert main([str(tmp_path / "run"), "--to-step=7"]) == 2
    assert "step 7 is not between 0" in capsys.readouterr().err
    assert main([str(tmp_path / "run"), f"--out={tmp_path / 'o'}"]) == 2
    assert "--out needs --to-step" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    # A ledger whose projection was changed with care, checksum and all, leads elsewhere, and that
    # is said.
    path = tmp_path / "run/ledger.bin"
    there = ledger.read(path)
    rows = [(r["key"], r["loss"], r["projections"].copy()) for r in there.records]
    rows[4][2][0] += 1
    path.unlink()
    write(path, rows, there.header)
    assert main(args[:2]) == 1
    out = capsys.readouterr().out
    assert (
        "step 4: parameters and optimiser state are equal" in out
        and "step 6: parameters and optimiser state are NOT EQUAL" in out
    )


@pytest.mark.slow
def test_hybrid_modes_say_from_where_they_replay(tiny_config, tmp_path, capsys):
    tiny_config.mode, tiny_config.fo.bp_interval = "calibrate", 3
    tiny_config.train.checkpoint_interval = 3
    train_and_evaluate(tiny_config, tmp_path / "run")
    run = str(tmp_path / "run")
    assert main([run, "--to-step=2"]) == 0
    assert "2 steps have a backprop gradient" in capsys.readouterr().out
    assert main([run, "--to-step=5"]) == 0
    assert "beginning at the checkpoint of step 3" in capsys.readouterr().out
    checkpoint_3 = tmp_path / "run/checkpoints/3"
    checkpoint_3.rename(tmp_path / "away")
    assert main([run, "--to-step=5"]) == 2
    assert "step 3 cannot be replayed: it has a backprop gradient" in capsys.readouterr().err
