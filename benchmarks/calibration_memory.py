"""Memory and time of calibration with gradients, and of compression by what it found.

    python benchmarks/calibration_memory.py [--whole] [--model FOLDER]    # default: random Llamas

On a CPU: a Llama of SmolLM2-135M's shape in float32, every linear layer, 4 x 2,048 tokens, all of them with gradients;
the peak is that of a process of its own, libraries and weights included. With --whole the graph of the whole model
beside it, as calibration once held it (18 GB): what both take, in turn, each time in a new process.

Where there is a GPU, besides: a random Llama of Llama-3.2-1B's shape in bfloat16, attention, 8 x 1,024 tokens, all of
them with gradients, in one call that is the first of its process, and then 20 % of attention by three methods, each on
the model made anew. The peak is torch.cuda.max_memory_allocated, weights included.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from harness import Row, Timed, apart, parser, save, status_bytes
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from masa.compression import calibrate, compress

GIB, ATTENTION = 2**30, "qkvo"
LAYERS = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "o_proj",
    "g": "gate_proj",
    "u": "up_proj",
    "d": "down_proj",
}
METHODS = ("svd-llm", "svd-fisher", "matrix-pca")


@dataclass(frozen=True)
class Setting:
    """A Llama, what it is calibrated on, and where."""

    name: str
    width: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    samples: int
    length: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def model(self) -> nn.Module:
        """The same weights each time."""
        torch.manual_seed(0)
        sizes = {"hidden_size": self.width, "intermediate_size": self.ffn, "num_hidden_layers": self.layers}
        heads = {"num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "tie_word_embeddings": True}
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                made = LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=self.vocabulary))
        finally:
            torch.set_default_dtype(before)
        return made.eval()

    def tokens(self, vocabulary: int | None = None) -> Tensor:
        """The same ids (N, T) each time."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(vocabulary or self.vocabulary, (self.samples, self.length), generator=generator)

    @property
    def told(self) -> str:
        """Its tokens, for a row."""
        return f"{self.samples} x {self.length:,} tokens"


SMALL = Setting("SmolLM2-135M's shape", 576, 1536, 30, 9, 3, 49152, 4, 2048)
LARGE = Setting("Llama-3.2-1B's shape", 2048, 8192, 16, 32, 8, 128256, 8, 1024, "cuda", torch.bfloat16)
QUICK = Setting("a tiny Llama", 48, 96, 3, 4, 2, 128, 4, 32)


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--model", help="folder, GGUF file or hub id instead of SmolLM2-135M's shape")
    made.add_argument("--whole", action="store_true", help="the whole model's graph beside it, on the CPU")
    made.add_argument("--gpu-only", action="store_true", help="nothing on the CPU")
    made.add_argument("--rounds", type=int, default=1, help="how often on the CPU")
    made.add_argument("--threads", type=int, default=1, help="of the CPU")
    given = made.parse_args()
    torch.set_num_threads(given.threads)
    rows = (
        [] if given.gpu_only else on_cpu(QUICK if given.quick else SMALL, given)
    )  # first: a process that has used a GPU cannot fork
    if given.quick:
        rows += with_compression(QUICK)
    elif torch.cuda.is_available():
        rows += with_compression(LARGE)
    settings = {"threads": given.threads, "model": given.model, "rounds": given.rounds, "projections": "all"}
    if torch.cuda.is_available():
        settings["gpu"] = torch.cuda.get_device_name()
    return save("calibration_memory", rows, settings, given.out)


def on_cpu(setting: Setting, given: argparse.Namespace) -> list[Row]:
    """Processor seconds and peak of the process; with --whole, of the whole graph too."""
    ways: dict[str, Callable[[nn.Module, Tensor], Any]] = {"block by block": block_by_block}
    if given.whole or given.quick:
        ways["whole graph"] = whole_graph
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, list[float]] = {way: [] for way in ways}

    def measured(work: Callable[[nn.Module, Tensor], Any]) -> tuple[float, float]:
        Path("/proc/self/clear_refs").write_text("5")  # a child inherits the high-water mark
        model = given_model(given.model) if given.model else setting.model()
        tokens = setting.tokens(model.config.vocab_size)
        started = time.process_time()
        work(model, tokens)
        return time.process_time() - started, status_bytes("VmHWM") / GIB

    for number in range(given.rounds):
        for way in list(ways) if number % 2 == 0 else reversed(list(ways)):
            spent, peak = apart(lambda way=way: measured(ways[way]))
            print(f"{way}: {spent:.1f} s of the processor, {peak:.2f} GiB", flush=True)
            seconds[way].append(spent)
            peaks[way].append(peak)
    rows, timed, told = [], Timed(seconds), f"{given.model or setting.name}, {setting.told}"
    for way in ways:
        target = "<= 3" if way == "block by block" and not given.quick else ""
        rows.append(Row(f"{told}, {way}: peak of the process", max(peaks[way]), "GiB", target=target))
        rows.append(Row(f"{told}, {way}: time of the processor", timed.median(way), "s"))
    if len(ways) > 1:
        target = "" if given.quick else ">= 1"
        rows.append(timed.speed(f"{told}: speed, block by block : whole graph", *ways, target))
        first, second = (max(peaks[way]) for way in ways)
        rows.append(Row(f"{told}: peak, block by block : whole graph", first / second))
    return rows


def given_model(name: str) -> nn.Module:
    """From a folder; the import is here since the random ones need less of the package."""
    from masa.models.pretrained import load_pretrained

    return load_pretrained(name)[0]


def block_by_block(model: nn.Module, tokens: Tensor) -> None:
    """As ``masa calibrate`` does it: what enters the blocks, and the statistics, are written as they are known."""
    with tempfile.TemporaryDirectory() as folder:
        calibrate(model, tokens, directory=folder, projections="all", gradient_samples=len(tokens))


def whole_graph(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """The same statistics, those of gradients out of one graph of all blocks and all tokens."""
    with tempfile.TemporaryDirectory() as folder:
        calibrate(model, tokens, directory=folder, projections="all")
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def add(gradient: Tensor) -> None:
            rows = gradient.flatten(0, -2)
            found[name] = (rows.T @ rows).double()

        return lambda module, args, output: output.register_hook(add) and None

    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    for name, module in model.named_modules():
        if name.endswith(tuple(LAYERS.values())):
            module.register_forward_hook(watch(name))
    logits = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
    labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
    nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    return found


def with_compression(setting: Setting) -> list[Row]:
    """Seconds and peak on a device: calibration, part by part, and every method at 20 %."""
    gpu, targets = setting.device == "cuda", ("<= 15", "<= 8") if setting is LARGE else ("", "")
    rows, began, told = [], {}, f"{setting.name}, {setting.told}"

    def measured(what: str, work: Callable[[], Any], time_target: str = "", peak_target: str = "") -> Any:
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        result = work()
        if gpu:
            torch.cuda.synchronize()
        rows.append(Row(f"{told}, {what}: time", time.perf_counter() - started, "s", target=time_target))
        if gpu:
            peak = torch.cuda.max_memory_allocated() / GIB
            rows.append(Row(f"{told}, {what}: peak of the GPU", peak, "GiB", target=peak_target))
        print(f"{what}: {rows[-2 if gpu else -1].value:.2f} s", flush=True)
        return result

    def progress(what: str, done: int, of: int) -> None:
        began.setdefault((what, done == of), time.perf_counter())

    tokens, model, started = setting.tokens(), setting.model(), time.perf_counter()
    work = partial(calibrate, model, tokens, projections=ATTENTION, gradient_samples=len(tokens), progress=progress)
    statistics = measured(f"calibration with gradients on {setting.device}", work, *targets)
    parts = "hash of the weights", "forward", "labels and loss", "backward"
    for name, (first, then) in zip(parts, pairwise([started, *began.values()]), strict=True):
        rows.append(Row(f"{told}, of which {name}", then - first, "s"))
    del model, work
    for method in METHODS:  # each compresses its model in place
        measured(f"{method} at 20 % on {setting.device}", partial(compress, setting.model(), method, statistics, 0.2))
    return rows


if __name__ == "__main__":
    sys.exit(main())
