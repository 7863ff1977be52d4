"""Small real models and data for all tests."""

import functools
import gc
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
import tqdm
from filelock import FileLock
from projects import ROOT, run_smoke
from warm import started

from masa.runs import memory

VERB = {"tokens": "pretrain", "images": "train-vit", "boxes": "train-vit"}
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in what a shell starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

# tqdm's lock is shared with forked processes: one that a test kills while it holds it would stop this one for good
tqdm.tqdm.monitor_interval = 0
tqdm.tqdm.set_lock(threading.RLock())


def pytest_configure():
    """A training in this process must not make it keep all memory: tests forked later count what they can get.

    Not a fixture, which trainings in fixtures of a wider scope would come before. That memory is kept otherwise is
    tested in a process of its own (test_training.py).
    """
    memory.keep_freed = lambda: False


SLOW = {
    *("slurm", "workflow", "readme", "notebooks", "page", "cost", "status", "start", "shares", "devices"),  # workflows
    *("training", "image_training", "training_speed", "optimizers", "run_folder", "checkpoint"),  # killed and resumed
    *("faults", "faults_processes", "corrupt_data", "security", "benchmarks", "lm_eval_command", "ecosystem", "export"),
    "docs",
}
"""Files of half a minute and more; `make test-fast` has none of them, and no test that needs a finished workflow."""


LONGEST = ("slurm", "benchmarks", "ecosystem", "lm_eval_command", "workflow", "training", "faults_processes", "readme")
LONGEST += ("notebooks", "corrupt_data", "families", "optimizers", "run_folder", "docs", "faults", "export")
"""Files of a minute and more; none of them may begin when the other workers have nothing left to do."""


def pytest_collection_modifyitems(items):
    """The longest files first, so that the others go on beside them; which tests are slow."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem.removeprefix("test_"), len(place)))
    for item in items:
        needs_run = {"smoke_project", "smoke_results"} & set(getattr(item, "fixturenames", ()))
        if needs_run or item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker("slow")


def language_model(layers=6, width=24, heads=4, **more):
    """A tiny Starcoder2, newly initialised."""
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    defaults = {
        "vocab_size": 64,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": True,
        "use_bias": True,
        "sliding_window": None,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
    }
    return Starcoder2ForCausalLM(Starcoder2Config(**(defaults | more)))


def llama_model(layers=6, width=32, heads=4, key_value_heads=2):
    """A tiny Llama with grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def kill_again_and_again(work, folder, times, seed=0):
    """Run ``work`` in forked processes and kill each with SIGKILL at a random moment after its first new step.

    A fork, because starting Python and torch takes longer than the training. Where one comes to its end before it is
    killed, the next begins anew. Returns how many were killed at work.
    """
    moments, killed = random.Random(seed), 0
    log = folder / "metrics.jsonl"

    def written():
        return log.stat().st_size if log.is_file() else 0

    for _ in range(5 * times):
        if killed == times:
            break
        before = written()
        child = os.fork()
        if not child:
            with Path(os.devnull).open("w") as silent:
                os.dup2(silent.fileno(), 2)
            status = 1
            try:
                work()
                status = 0
            finally:
                os._exit(status)
        while written() == before and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.15))
        try:
            os.kill(child, signal.SIGKILL)
            killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        except (ProcessLookupError, ChildProcessError):
            pass
    return killed


class Forked:
    """``work`` in a process of its own, without the seconds that starting Python and torch take.

    Args:
        work: returns an exit status or None; an exception is status 1.
        said: file for what it prints.
    """

    def __init__(self, work, said):
        self.file, self.status = said, None
        self.pid = os.fork()
        if not self.pid:
            status = 1
            try:
                with said.open("wb", buffering=0) as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                # pytest's capture replaces both
                sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
                status = work()
                status = status if isinstance(status, int) else 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)

    def poll(self):
        """The exit status (negative: the signal that killed it), or None while it works."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def wait(self, seconds=600):
        """The exit status at its end."""
        until(lambda: self.poll() is not None, seconds)
        return self.status

    def send(self, number):
        os.kill(self.pid, number)

    @property
    def said(self):
        return self.file.read_text() if self.file.is_file() else ""


def ranks(work, folder, count=2):
    """``work`` in as many processes of one training, as torchrun starts them, without the seconds that it takes.

    Their output is in rank-*.txt of the folder. That ``masa pretrain`` launches them is tested where it is looked at.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    meeting["MASTER_PORT"] = str(port)

    def one(rank):
        from accelerate.state import AcceleratorState, GradientState

        os.environ.update(meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        AcceleratorState._reset_state(reset_partial_state=True)  # of a training of this process, which was alone
        GradientState._reset_state()
        return work()

    folder.mkdir(exist_ok=True)
    return [Forked(functools.partial(one, rank), folder / f"rank-{rank}.txt") for rank in range(count)]


def until(true, seconds=600, process=None):
    """Wait until something is true, and fail if it is not in time, or if the process ends before."""
    end = time.monotonic() + seconds
    while not true():
        assert process is None or process.poll() is None, process.said
        assert time.monotonic() < end, "not in time"
        time.sleep(0.005)


def whole_checkpoints(out):
    """The steps of a run directory's checkpoints that were written to their end."""
    return sorted(int(p.parent.name[11:]) for p in out.glob("checkpoints/checkpoint-*/complete.json"))


def kill_after_checkpoints(work, out, count=2):
    """Run ``work`` in a process and kill it with SIGKILL as soon as it has written ``count`` whole checkpoints."""
    process = Forked(work, out.parent / "killed.txt")
    until(lambda: len(whole_checkpoints(out)) >= count, process=process)
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def stop_and_resume(pretrain, spec, option, data, folder, lines, number=signal.SIGTERM):
    """Stop ``masa pretrain`` by a signal after some lines of its log; it must go on to the bits of an unstopped run."""
    from masa.runs import run

    whole = pretrain(spec, data, folder / "whole")
    out = folder / "cut"
    command = [VERB[option], "--spec", json.dumps(spec), f"--{option}", data, "--out", out]
    process = started(*command, stderr=subprocess.PIPE)
    log = out / "metrics.jsonl"
    while not (log.is_file() and log.read_text().count("\n") > lines):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert f"stopped by {number.name} at step" in said
    assert not (out / "manifest.json").exists()
    assert pretrain(spec, data, out)["sha256"] == whole["sha256"]
    steps = [r["step"] for r in run.read_jsonl(log) if "loss" in r]
    assert steps == sorted(set(steps)), "no step is logged twice"


@pytest.fixture
def ids():
    """Token ids (2, 16) of a vocabulary of 64."""
    return torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))


_modules = 0


@pytest.fixture(autouse=True)
def settled():
    """What has been imported is no matter of the garbage collector's any more.

    accelerate collects as every training begins: that would go through all objects of all libraries and tests, and in
    a forked process copy each page of them. It took longer than most trainings here.
    """
    global _modules
    if len(sys.modules) != _modules:
        gc.collect()
        gc.freeze()
        _modules = len(sys.modules)


@pytest.fixture(autouse=True)
def seeded():
    """Every test begins with the same random numbers, and without what a training left switched on."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Train a spec once and in peace: the manifest that all disturbed trainings of it must end with."""
    made = {}

    def train(pretrain, spec, data):
        spec = spec | {"training": spec["training"] | {"checkpoint_minutes": 60}}  # which changes no bit
        key = json.dumps([pretrain.__module__, spec, str(data)], sort_keys=True)
        if key not in made:
            made[key] = pretrain(spec, data, tmp_path_factory.mktemp("undisturbed") / "run")
        return made[key]

    return train


@pytest.fixture(scope="session")
def mirror():
    """The offline data mirror, where this machine has one."""
    path = os.environ.get("MASA_MIRROR")
    if not path:
        pytest.skip("MASA_MIRROR is not set")
    return path


@pytest.fixture(scope="session")
def cache():
    """Downloads are kept between test runs, as the workflow keeps them."""
    return ROOT / "cache"


def common(factory, config):
    """A folder that all workers of a session have in common; a worker's own lies in it."""
    base = factory.getbasetemp()
    return base.parent if hasattr(config, "workerinput") else base


@pytest.fixture(scope="session")
def smoke_project(tmp_path_factory, request):
    """A copy of the project after a full smoke run, made once for all workers (three minutes): read only."""
    base = common(tmp_path_factory, request.config)
    folder, finished = base / "smoke_project", base / "smoke_project.finished"
    with FileLock(base / "smoke_project.lock"):
        if not finished.exists():
            shutil.rmtree(folder, ignore_errors=True)  # another worker's, which failed
            run_smoke(folder)
            finished.touch()
    return folder


@pytest.fixture(scope="session")
def smoke_results(request):
    """``results/smoke`` of a finished smoke run: read only.

    MASA_SMOKE=DIR takes those of a checkout that has them, and saves three minutes while a test is being written.
    """
    kept = os.environ.get("MASA_SMOKE")
    folder = Path(kept).resolve() if kept else request.getfixturevalue("smoke_project")
    assert (folder / "results/smoke/tables/table1.csv").is_file(), f"{folder} has no finished results/smoke"
    return folder / "results/smoke"


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The image directory of scikit-learn's digits: 8 x 8, one channel, ten classes."""
    from masa.data import images

    folder = tmp_path_factory.mktemp("images") / "digits"
    images.prepare({"name": "digits"}, folder.parent / "cache", None, folder)
    return folder


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    """A token directory with a little structure to learn: vocabulary 64, 20,000 training tokens."""
    from masa.data import tokenize
    from masa.runs import run

    folder = tmp_path_factory.mktemp("tokens")
    generator = np.random.default_rng(0)

    def stream(n):
        ids = np.cumsum(generator.integers(1, 3, n)) % 64
        return ids.astype("<u2")

    train = tokenize._write_shard(folder / "train-00000.bin", stream(20_000))
    held_out = tokenize._write_shard(folder / "validation.bin", stream(600))
    run.write_json(
        folder / "manifest.json",
        {
            "dtype": "<u2",
            "vocab_size": 64,
            "tokenizer": "none",
            "train": {"tokens": 20_000, "shards": [train]},
            "validation": held_out | {"documents": 2, "words": 300, "bytes": 1500, "document_ends": [300, 600]},
        },
    )
    return folder
