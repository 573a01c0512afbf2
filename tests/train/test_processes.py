"""Several real processes on this machine, which exchange numbers over gloo."""

import concurrent.futures
import functools
import os
from pathlib import Path
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import fine_tune
import pytest

from zo_jax.train import lifeline
from zo_jax.train.run_folder import checkpoint, metrics

ROOT = Path(__file__).parents[2]
# Few leaves and no sample, for short programs.
SMALL = ("scope=/fc/", "train.sample_tokens=0")
LENGTH = ("train.num_steps=150", "train.eval_interval=50", "train.checkpoint_interval=25")
# Seconds for what must end, or must come: many times what it takes.
PATIENCE = 600

STARTED: list[subprocess.Popen] = []


def start(folder, num_processes, *fields, own=(), befores=None, env=None, small=SMALL):
    """The processes of one small run, each with one device.

    `own` [process: arguments] are what some of them are given besides, `befores` what each is
    started by, `env` other values of environment variables, `small` what makes it quick.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "main.py"), f"--config={ROOT / 'tests/train/tiny.py'}"]
    command += [
        f"--workdir={folder}",
        *(f"--config.{field}" for field in (*small, *LENGTH, *fields)),
    ]
    if num_processes > 1:
        command += ["--distributed", f"--coordinator=localhost:{port}"]
        command += [f"--num_processes={num_processes}"]
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(
            [
                *(befores[i] + command[1:] if befores else command),
                f"--process_id={i}",
                *dict(own).get(i, ()),
            ],
            stdout=pipe,
            stderr=pipe,
            text=True,
            env=os.environ | (env or {}),
        )
        for i in range(num_processes)
    ]
    STARTED.extend(processes)
    return processes


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    while STARTED:
        STARTED.pop().kill()


def wait_for_rows(folder, count, processes):
    count += len(metrics.read(folder / "metrics.csv"))
    deadline = time.monotonic() + PATIENCE
    while all(p.poll() is None for p in processes) and time.monotonic() < deadline:
        if len(metrics.read(folder / "metrics.csv")) >= count:
            return
        time.sleep(0.01)
    for process in processes:
        process.kill()
    raise AssertionError([process.communicate() for process in processes])


def end(processes):
    """(exit codes, outputs), of processes that must end."""
    outputs = ["".join(process.communicate(timeout=PATIENCE)) for process in processes]
    return [process.returncode for process in processes], outputs


def losses_of(folder):
    return [(r["step"], r["loss"], r["eval_loss"]) for r in metrics.read(folder / "metrics.csv")]


@pytest.mark.slow
def test_killed_and_resumed_on_other_numbers_of_processes(tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    # Numbers that are equal to the bit in different programs are so as XLA compiles them for users.
    begin = functools.partial(start, env={"XLA_FLAGS": ""})
    assert end(begin(whole, 1))[0] == [0]

    processes = begin(folder, 4)
    wait_for_rows(folder, 20, processes)
    processes[2].kill()
    codes, outputs = end(processes)
    assert codes == [76, 76, -signal.SIGKILL, 76], (codes, outputs)
    for i in (0, 1, 3):
        assert f"stopped: process {i} of 4 cannot go on" in outputs[i], outputs[i]

    processes = begin(folder, 2)
    wait_for_rows(folder, 20, processes)
    processes[1].send_signal(signal.SIGTERM)  # a preemption notice to one of them
    codes, outputs = end(processes)
    assert codes == [75, 75], outputs
    saved = checkpoint.complete_steps(folder / "checkpoints")[-1]
    assert f"the run is saved at step {saved} in" in outputs[0]
    assert "replaying steps" in outputs[0] or "continuing from the checkpoint" in outputs[0]

    codes, outputs = end(begin(folder, 1))
    assert codes == [0] and f"continuing from the checkpoint of step {saved}" in outputs[0]
    # Four, two and one process, with queries alone split, are one run, to the bit.
    assert losses_of(folder) == losses_of(whole)
    assert (folder / "ledger.bin").read_bytes() == (whole / "ledger.bin").read_bytes()


@pytest.mark.slow
def test_the_first_process_refuses_for_all(tmp_path):
    folder = tmp_path / "run"
    codes, (output,) = end(start(folder, 1, "train.num_steps=3"))
    assert codes == [0] and "finished 3 steps" in output and "Warning" not in output, output
    codes, outputs = end(start(folder, 2, "zo.num_queries=4", "mesh.data=2"))
    assert codes == [2, 76], outputs
    assert "zo.num_queries (there 3, here 4)" in outputs[0]
    assert "the first process gave up" in outputs[1]


RATE = "--config.optimizer.learning_rate=0.02"
# What processes are given besides, and what all of them say.
DIFFERENT = {
    "two of three": (
        {
            1: [RATE, "--config.train.num_steps=9"],
            2: ["--config.seed=1", "--config.data.source=text", "--config.data.path={}"],
        },
        [
            "optimizer.learning_rate is 0.01 in process 0, 0.02 in process 1, 0.01 in process 2",
            "train.num_steps is 150 in process 0, 9 in process 1, 150 in process 2",
            "seed is 0 in process 0, 0 in process 1, 1 in process 2",
            "data.source is 'shakespeare' in process 0",
            "'text' in process 2",
        ],
    ),
    "two that cannot begin": (
        {1: ["--config.train.batch_size=-1"], 2: ["--config.zo.queries=3"]},
        [
            "process 1 cannot begin: train.batch_size",
            "process 2 cannot begin: --config.zo.queries",
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", DIFFERENT)
def test_processes_that_differ_do_not_begin(tmp_path, what):
    arguments, said = DIFFERENT[what]
    (tmp_path / "text").write_text("another text " * 100)
    own = {i: [one.format(tmp_path / "text") for one in some] for i, some in arguments.items()}
    codes, outputs = end(start(tmp_path / "run", 3, own=own))
    assert codes == [78] * 3, outputs
    for output in outputs:
        assert output.startswith("stopped: the processes of the run differ: ")
        assert all(word in output for word in said) and output.count("\n") == 1, output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_text_behind_the_same_path(tmp_path):
    """As on two machines: each process sees its own file, or none, at the path that all are
    given.
    """
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    (tmp_path / "0/text").write_text("one text " * 100)
    for content in (None, "another one " * 100):
        if content:
            (tmp_path / "1/text").write_text(content)
        fields = ("data.source=text", "data.path=text")
        code = "import os, sys; os.chdir(sys.argv[1]); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"  # noqa: E501
        befores = [[sys.executable, "-c", code, str(tmp_path / str(i))] for i in range(2)]
        codes, outputs = end(start(tmp_path / "run", 2, *fields, befores=befores))
        assert codes == [78, 78], outputs
        word = (
            "corpus.text is"
            if content
            else "process 1 cannot begin: data.path=text matches no file"
        )
        assert all(word in output for output in outputs), outputs


@pytest.mark.slow
def test_what_none_can_begin_is_an_error(tmp_path):
    codes, outputs = end(start(tmp_path / "run", 2, "train.batch_size=-1"))
    assert codes == [2, 2] and all("error: train.batch_size" in output for output in outputs)


@pytest.mark.slow
def test_a_death_while_a_checkpoint_is_written(tmp_path):
    folder = tmp_path / "run"
    processes = start(folder, 2, "train.checkpoint_interval=1", "train.num_steps=100000")
    deadline = time.monotonic() + PATIENCE
    while not list(folder.glob("checkpoints/*orbax-checkpoint-tmp*")):
        assert time.monotonic() < deadline and processes[0].poll() is None
        time.sleep(0.001)
    processes[1].kill()
    codes, outputs = end(processes)
    assert codes == [76, -signal.SIGKILL] and "cannot go on" in outputs[0], (codes, outputs)


FAULTY = """
from pathlib import Path
import sys

sys.path.insert(0, str(Path({tests!r})))
from tiny import get_config

from zo_jax.train import loop

take_step = loop.Loop._take_step


def fail_at_step_20(self, replayed):
    if self.step == 20:
        raise ZeroDivisionError("a fault that nobody planned")
    return take_step(self, replayed)


loop.Loop._take_step = fail_at_step_20
"""


@pytest.mark.slow
def test_an_exception_that_nobody_planned_ends_all_at_once(tmp_path):
    faulty = tmp_path / "faulty.py"
    faulty.write_text(FAULTY.format(tests=str(Path(__file__).parent)))
    processes = start(tmp_path / "run", 2, own={1: [f"--config={faulty}"]})
    codes, outputs = end(processes)
    assert codes == [76, 1], outputs
    assert "process 0 of 2 cannot go on" in outputs[0], outputs[0]
    assert "ZeroDivisionError: a fault that nobody planned" in outputs[1], outputs[1]
    # JAX's barrier at the end of a process is not waited for.
    assert "arrier" not in outputs[1] and "hutdown" not in outputs[1], outputs[1]


REWARDED = """
from pathlib import Path
import sys

sys.path.insert(0, {tests!r})
import fine_tune

from zo_jax.train.config import ObjectiveConfig


def get_config():
    folder = Path(__file__).parent
    config = fine_tune.get_config(folder)
    config.task.labels, config.task.answer_tokens = "", 50
    path = f"{{folder / 'reward.py'}}:capitals"
    config.objective = ObjectiveConfig(name="reward", path=path, max_new_tokens=8)
    config.zo.num_queries, config.zo.epsilon, config.zo.perturbation = 2, 0.3, "low_rank"
    return config


def capitals(prompts, completions, rows):
    return [sum(c.isupper() for c in text) / 8 for text in completions]


def fails(prompts, completions, rows):
    raise KeyError("nothing here")
"""


@pytest.fixture
def rewarded(tmp_path):
    """`start` of a run whose completions are scored, of so many processes."""
    file = tmp_path / "reward.py"
    file.write_text(REWARDED.format(tests=str(Path(__file__).parent)))
    fine_tune.write_base(tmp_path / "base")
    fine_tune.write_examples(tmp_path / "examples.jsonl")

    def begin(folder, n, *fields):
        own = {i: [f"--config={file}"] for i in range(n)}
        return start(tmp_path / folder, n, *fields, own=own, small=())

    return begin


@pytest.mark.slow
def test_each_process_scores_what_its_members_write(rewarded, tmp_path):
    short = "train.num_steps=4", "train.eval_interval=2"
    one, two = rewarded("one", 1, *short), rewarded("two", 2, *short)
    for processes in (one, two):
        codes, outputs = end(processes)
        assert codes == [0] * len(processes), outputs
    numbers = lambda folder: [
        float(x or "nan") for row in losses_of(tmp_path / folder) for x in row
    ]
    assert numbers("two") == pytest.approx(numbers("one"), nan_ok=True, rel=1e-4)
    fails = f"objective.path={tmp_path / 'reward.py'}:fails"
    codes, outputs = end(rewarded("failed", 2, *short, fails))
    assert codes == [70, 70], outputs
    assert all("failed for each of" in output for output in outputs)


@pytest.mark.slow
def test_a_population_of_killed_processes_goes_on_to_the_same_bits(rewarded, tmp_path):
    length = "train.num_steps=60", "train.eval_interval=30"
    assert end(rewarded("whole", 2, *length))[0] == [0, 0]
    for killed in (0, 1):
        processes = rewarded("run", 2, *length)
        wait_for_rows(tmp_path / "run", 5, processes)
        processes[killed].kill()
        codes, outputs = end(processes)
        expected = [76, 76]
        expected[killed] = -signal.SIGKILL
        assert codes == expected, (codes, outputs)
    codes, outputs = end(rewarded("run", 2, *length))
    assert codes == [0, 0], outputs
    whole, run = (tmp_path / name / "ledger.bin" for name in ("whole", "run"))
    assert run.read_bytes() == whole.read_bytes()
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")


def test_a_lifeline_tells_of_a_death_and_not_of_a_goodbye():
    for dies in (True, False):
        told, table, came = [], {}, threading.Condition()

        def exchange(i, value, table=table, came=came):
            with came:
                table[i] = value
                came.notify_all()
                came.wait_for(lambda: len(table) == 3, timeout=10)
            return [table[k] for k in range(3)]

        def connect(i, told=told, exchange=exchange):
            given = lambda value: exchange(i, value)
            return lifeline.connect(i, 3, "localhost", given, lambda: told.append(i))

        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            lines = list(pool.map(connect, range(3)))
        if not dies:
            lines[1].say_goodbye()
        lines[1]._sockets[0].shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + (10 if dies else 0.3)
        while 0 not in told and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (0 in told) == dies and 2 not in told


@pytest.fixture
def two_machines():
    """Two network namespaces and a cable between them: (commands that run in them, a function that
    cuts the cable). Needs the right to make them.
    """
    names = [f"zo_jax_{os.getpid()}_{i}" for i in range(2)]
    run = lambda line: subprocess.run(line.split(), capture_output=True).returncode == 0
    ends = [f"zo{os.getpid() % 100_000}_{i}" for i in range(2)]
    lines = [f"ip netns add {name}" for name in names]
    lines.append(
        f"ip link add {ends[0]} netns {names[0]} type veth peer {ends[1]} netns {names[1]}"
    )
    for i, (name, one) in enumerate(zip(names, ends, strict=True)):
        lines += [f"ip -n {name} addr add 10.9.0.{i + 1}/24 dev {one}"]
        lines += [f"ip -n {name} link set {one} up"]
    try:
        if not shutil.which("ip") or not all(run(line) for line in lines):
            pytest.skip("no right to make network namespaces")
        commands = [["ip", "netns", "exec", name, sys.executable] for name in names]
        yield commands, lambda: run(f"ip -n {names[1]} link set {ends[1]} down")
    finally:
        for name in names:
            run(f"ip netns del {name}") if shutil.which("ip") else None


@pytest.mark.slow
def test_a_machine_that_vanishes_is_noticed_before_jax_aborts(two_machines):
    commands, cut = two_machines
    code = """if True:
        import socket, sys, time
        from zo_jax.train.lifeline import Lifeline
        if sys.argv[1] == "0":
            server = socket.create_server(("10.9.0.1", 7777))
            print("listening", flush=True)
            one, _ = server.accept()
        else:
            one = socket.create_connection(("10.9.0.1", 7777), 10)
        Lifeline([one], lambda: print("gone", flush=True))
        print("connected", flush=True)
        time.sleep(60)
    """
    processes = []
    for i in range(2):
        one = subprocess.Popen(
            [*commands[i], "-c", code, str(i)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        processes.append(one)
        STARTED.append(one)
        assert one.stdout.readline() == ("listening\n", "connected\n")[i]
    assert processes[0].stdout.readline() == "connected\n"
    assert cut()
    told = [one.stdout.readline() for one in processes]
    assert told == ["gone\n", "gone\n"]


@pytest.mark.slow
def test_who_waits_for_one_that_never_comes_ends_in_one_line(tmp_path):
    code = """if True:
        import sys
        from zo_jax.train import processes
        processes._JOIN_TIMEOUT = 1
        processes.join(*sys.argv[1:2], 2, int(sys.argv[2]))
    """
    for i in (0, 1):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            where = f"localhost:{free.getsockname()[1]}"
        command = [sys.executable, "-c", code, where, str(i)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)
        assert done.returncode == 76, done
        assert done.stderr.startswith("stopped: --distributed: not all processes came within 1 s")
        assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_nobody_to_join(tmp_path):
    command = [sys.executable, str(ROOT / "main.py"), "--distributed", f"--workdir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 76 and "give --coordinator=HOST:PORT" in done.stderr, done
