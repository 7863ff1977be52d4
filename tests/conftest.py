"""Small real models and data for all tests."""

import os
import random
import signal
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)


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


@pytest.fixture
def ids():
    """Token ids (2, 16) of a vocabulary of 64."""
    return torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded():
    """Every test begins with the same random numbers, and without what a training left switched on."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(False)


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


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The image directory of scikit-learn's digits: 8 x 8, one channel, ten classes."""
    from masa.vision import images

    folder = tmp_path_factory.mktemp("images") / "digits"
    images.prepare({"name": "digits"}, folder.parent / "cache", None, folder)
    return folder
