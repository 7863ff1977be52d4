"""How a factored model serves: disk, memory, prefill and decoding in terms of the original.

    python benchmarks/serving.py [--models SmolLM2-135M] [--reductions 20 50] [--rounds 8]
    python benchmarks/serving.py --models Llama-3.2-1B --layers 8 --rounds 3

Original, SVD-LLM, Fisher SVD, Matrix PCA and MASA with 20 and 50 % of attention removed, and MASA folded while it is
loaded. All are folders that transformers' from_pretrained reads, on one thread in float32 (bfloat16 where there is a
GPU).

- SmolLM2-135M is the real one, calibrated on this project's documentation. MASA's atoms are random, which speed does
  not depend on.
- Llama-3.2-1B is its shape, drawn at random, so that nothing can be calibrated. The sources are made directly, of what
  the methods come to elsewhere: SVD-LLM has one rank a projection, Fisher SVD leaves v dense, Matrix PCA has one atom
  for about five layers and the same residual rank for all.

Memory is that of a process of its own for every folder, libraries included: the peak while loading, what is resident
once every weight was read (a file is mapped, and comes into memory page by page as it is read), and the peak in
prefill, the median of three passes. Its limit is the original's, less what was saved on disk, plus one dense projection
and 1 %.

Speed is timed in turn in one process, where parameters that are equal are held once. Prefill is 512 tokens in one
pass; decoding is 16 greedy tokens after a prompt of 16, over the KV cache; on a
GPU also with the launches of a step recorded once and replayed over a static cache, since launching is most of what
eager decoding does there. The limit of decoding is that of reading weights: bytes that the original reads for a token
by those that this model does. Bandwidth is that of a sum.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Row, Timed, apart, in_turn, parser, save, status_bytes
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.utils import logging

import masa
from masa.compression import calibrate, compress
from masa.runs.run import read_json
from masa.sharing.bank import SharedProjections
from masa.sharing.compressed_sources import Factored
from masa.sharing.compression_spec import CompressionSpec
from masa.sharing.projections import family_of, model_shape
from masa.sharing.saving import bank_of
from masa.sharing.share import Sharing, install
from masa.sharing.spec import ATTENTION, ModelShape

REAL, DRAWN = "SmolLM2-135M", "Llama-3.2-1B"
METHODS = ("svd-llm", "svd-fisher", "matrix-pca")
TINY = {"num_layers": 5, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"intermediate_size": 128, "vocab_size": 256}
LARGE = {"num_layers": 16, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8}
LARGE |= {"intermediate_size": 8192, "vocab_size": 128256}
PREFILL, PROMPT, DECODED, BATCHES = 512, 16, 16, (1, 8)
SAMPLES, LENGTH = 16, 128
GRAPH = "decoding as a CUDA graph"
READ, PASSES = 512 * 2**20, 3
MIB = 2**20
TOLERANCE = 1e-5


@dataclass
class Served:
    """One model as it is served.

    Attributes:
        kind: "original", "low-rank", "atoms" or "folded".
        disk: bytes of its folder.
        memory: what its own process said, see :func:`inside`.
        read: bytes of weights that one token needs.
        difference: of its logits from the folded model's, where there are two.
    """

    label: str
    kind: str
    model: nn.Module
    disk: int
    memory: Mapping[str, int]
    read: int = 0
    difference: float | None = None


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--models", nargs="+", choices=(REAL, DRAWN), default=[REAL, DRAWN])
    made.add_argument("--reductions", nargs="+", type=int, default=[20, 50], metavar="PERCENT", help="of attention")
    made.add_argument("--layers", type=int, help=f"of {DRAWN}'s shape, in the place of its 16")
    made.add_argument("--rounds", type=int, default=8)
    made.add_argument("--inside", nargs=3, metavar=("FOLDER", "RUNTIME", "TOKENS"), help=argparse.SUPPRESS)
    given = made.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if given.inside:
        folder, runtime, tokens = given.inside
        print(json.dumps(inside(Path(folder), runtime, int(tokens))))
        return 0
    if given.quick:
        given.reductions, given.rounds = [50], 2
    rows, settings = [], {}
    for name in given.models:
        found, settings[name] = measure(name, given)
        rows += found
    settings |= {"rounds": given.rounds, "threads": 1, "device": device(), "dtype": str(dtype()).split(".")[1]}
    return save("serving", rows, settings | {"prompt": PROMPT, "decoded": DECODED}, given.out)


def measure(name: str, given: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """All rows of one shape, and what was measured."""
    torch.manual_seed(0)
    tokens = 64 if given.quick else PREFILL
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        models = list(served(name, given, Path(temporary), tokens))
        ids = torch.randint(1, models[0].model.config.vocab_size, (max(BATCHES), tokens), device=device())
        stream = torch.ones(READ // (64 if given.quick else 1) // 4, device=device())
        works: dict[str, Callable[[nn.Module], Callable[[], None]]] = {
            "prefill": lambda model: partial(forward, model, ids[:1]),
            **{f"decoding, batch {n}": lambda model, n=n: decoder_of(model, ids[:n, :PROMPT]) for n in BATCHES},
        }
        if torch.cuda.is_available():
            works |= {f"{GRAPH}, batch {n}": lambda model, n=n: graph_of(model, ids[:n, :PROMPT]) for n in BATCHES}
        timed = {}
        for what, work in works.items():
            try:
                ways = {served.label: work(served.model) for served in models}
            except RuntimeError as error:
                if not what.startswith(GRAPH):
                    raise
                print(f"{what} could not be recorded: {error}", file=sys.stderr)
                continue
            timed[what] = in_turn(f"{name}, {what}", ways | {"reading": stream.sum}, given.rounds)
        rows = []
        for one in models:
            rows += of_memory(one, models[0]) + of_speed(one, models[0], timed, tokens, stream.nbytes)
    bandwidth = stream.nbytes / timed["decoding, batch 1"].median("reading")
    rows.append(Row("bandwidth of reading", bandwidth / 1e9, "GB/s"))
    which = f"{name}, {given.layers} layers" if given.layers and name == DRAWN else name
    rows = [replace(row, what=f"{which}, {row.what}") for row in rows]
    about = {"config": models[0].model.config.to_dict(), "read": {one.label: one.read for one in models}}
    return rows, about | {"prefill": tokens}


def served(name: str, given: argparse.Namespace, base: Path, tokens: int) -> Iterator[Served]:
    """The original, and every other model beside it; of a folder there is one at a time."""
    folder, other = base / "original", base / "other"
    source, variants, ids = real(given) if name == REAL else drawn(given)
    source.to(dtype()).save_pretrained(folder)
    del source
    gc.collect()
    original = serve("original", "original", folder, "", tokens)
    yield original
    forked = given.quick and not torch.cuda.is_available()
    for percent in given.reductions:
        for method, make in variants.items():
            model = copy.deepcopy(original.model.cpu(), {id(p): p for p in original.model.parameters()})
            masa.save(make(model, percent / 100), other)
            original.model.to(device())
            del model
            kind = "low-rank" if method.startswith("svd") else "atoms"
            factored = serve(f"{method} {percent} %", kind, other, "factored", tokens, original.model, forked)
            factored.difference = apart_by(factored.model, load(other, "folded"), ids.to(device()))
            yield factored
            if method == "masa":
                yield serve(f"folded {percent} %", "folded", other, "folded", tokens, original.model, forked)
            shutil.rmtree(other)


def serve(
    label: str,
    kind: str,
    folder: Path,
    runtime: str,
    tokens: int,
    like: nn.Module | None = None,
    forked: bool = False,
) -> Served:
    """A folder measured in a process of its own, then loaded into this one.

    Args:
        forked: the process need not begin anew, where numbers mean nothing.
    """
    print(f"{label}: memory", file=sys.stderr, flush=True)
    if forked:
        memory = apart(partial(inside, folder, runtime, tokens))
    else:
        command = [sys.executable, __file__, "--inside", str(folder), runtime, str(tokens)]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        memory = json.loads(said.splitlines()[-1])
    model = load(folder, runtime)
    held = {} if like is None else dict(like.named_parameters())
    for key, parameter in model.named_parameters():
        same = key in held and parameter.shape == held[key].shape and torch.equal(parameter, held[key])
        parameter.data = held[key].data if same else parameter.data.clone()  # the file is deleted, and held no longer
    disk = sum(file.stat().st_size for file in folder.iterdir())
    return Served(label, kind, model, disk, memory, read_bytes(model))


def load(folder: Path, runtime: str) -> nn.Module:
    """As anyone would; the original has no runtime."""
    options = {"runtime": runtime} if runtime else {}
    return AutoModelForCausalLM.from_pretrained(folder, **options).to(device())


@torch.no_grad()
def inside(folder: Path, runtime: str, tokens: int) -> dict[str, int]:
    """Bytes of all weights, and the peaks while loading and in prefill: of this process, or of the GPU."""
    cuda = torch.cuda.is_available()

    def restart() -> None:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak() -> int:
        return torch.cuda.max_memory_allocated() if cuda else status_bytes("VmHWM")

    restart()
    model = load(folder, runtime)
    gc.collect()
    found = {"peak while loading": peak()}
    for parameter in model.parameters():
        parameter.amax()
    found["memory after loading"] = torch.cuda.memory_allocated() if cuda else status_bytes("VmRSS")
    ids = torch.arange(tokens, device=device())[None] % (model.config.vocab_size - 1) + 1
    peaks = []
    for _ in range(PASSES):
        restart()
        forward(model, ids)
        peaks.append(peak())
    return found | {"peak in prefill": statistics.median(peaks)}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def read_bytes(model: nn.Module) -> int:
    """Weights that one token needs: all but a table of embeddings that is not the head as well."""
    numbers, shared = sum(p.numel() for p in model.parameters()), bank_of(model)
    if shared is not None:
        numbers += sum(s.read_numbers() for s in shared.values()) - sum(p.numel() for p in shared.parameters())
    if not model.config.tie_word_embeddings:
        numbers -= model.get_input_embeddings().weight.numel()
    return numbers * model.dtype.itemsize


@torch.no_grad()
def forward(model: nn.Module, ids: Tensor) -> Any:
    """One pass over all tokens, as the first of a generation."""
    return model(input_ids=ids, use_cache=True, logits_to_keep=1)


def decoder_of(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """What decodes some tokens, each the likeliest after those before, from one prompt that is read only once."""
    prompt = forward(model, ids)

    @torch.no_grad()
    def decode() -> None:
        cache, output = copy.deepcopy(prompt.past_key_values), prompt
        for _ in range(DECODED):
            ids = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)

    return decode


def graph_of(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """As :func:`decoder_of`, over a static cache, with the launches of one step recorded once and replayed."""
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + DECODED)
    prompt = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = prompt.logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def step() -> None:
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        token.copy_(output.logits[:, -1:].argmax(-1))

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(PROMPT)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            rewind()
            step()
    torch.cuda.current_stream().wait_stream(side)
    rewind()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def decode() -> None:
        rewind()
        for _ in range(DECODED):
            graph.replay()

    return decode


def apart_by(model: nn.Module, other: nn.Module, ids: Tensor) -> float:
    """The largest difference of two models' logits, beside the largest logit: many tokens at once, then one."""

    def logits(of: nn.Module) -> Tensor:
        first = of(input_ids=ids[:, :-1], use_cache=True)
        last = of(input_ids=ids[:, -1:], past_key_values=first.past_key_values, use_cache=True)
        return torch.cat([first.logits, last.logits], dim=1).float()

    expected = logits(other)
    return float((logits(model) - expected).abs().max() / expected.abs().max())


Variants = dict[str, Callable[[nn.Module, float], nn.Module]]
"""Method -> what makes it of a model, whose parameters stay as they are, and a reduction."""


def real(given: argparse.Namespace) -> tuple[nn.Module, Variants, Tensor]:
    """The pretrained model, the methods as they are, calibrated, and some text. With --quick it is a tiny model."""
    if given.quick:
        model, tokens = random_llama(TINY), torch.randint(1, TINY["vocab_size"], (4, 32))
    else:
        from masa.models import pretrained  # which need more than a machine with a GPU may have
        from masa.study import config

        c = config.load()
        with tempfile.TemporaryDirectory() as folder:
            pretrained.fetch(REAL, c["pretrained"][REAL], Path(c["cache"]), config.mirror(c), Path(folder))
            path = read_json(Path(folder) / pretrained.MANIFEST, "masa pretrained")["path"]
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        text = "\n\n".join(p.read_text(encoding="utf-8") for p in sorted(Path("docs").glob("*.md")))
        tokens = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids
        tokens = tokens[0, : SAMPLES * LENGTH].view(SAMPLES, LENGTH)
    with torch.enable_grad():
        calibration = calibrate(model, tokens, gradient_samples=len(tokens) // 2)

    def compressed(method: str, model: nn.Module, reduction: float) -> nn.Module:
        return compress(model, method, calibration, reduction)[0]

    return (
        model,
        {method: partial(compressed, method) for method in METHODS} | {"masa": shared},
        tokens[:1, : PROMPT + 1],
    )


def drawn(given: argparse.Namespace) -> tuple[nn.Module, Variants, Tensor]:
    """A random model of the shape, sources made directly, and random tokens."""
    sizes = TINY if given.quick else LARGE
    model = random_llama(sizes | ({"num_layers": given.layers} if given.layers else {}))
    ids = torch.randint(1, model.config.vocab_size, (1, PROMPT + 1))
    return model, {method: partial(made_directly, method) for method in METHODS} | {"masa": shared}, ids


def random_llama(sizes: Mapping[str, Any]) -> nn.Module:
    names = {"num_layers": "num_hidden_layers"}
    own = {names.get(key, key): value for key, value in sizes.items() if key not in ("tied", "dtype")}
    settings = {"tie_word_embeddings": sizes.get("tied", True), "bos_token_id": None, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**own, **settings)).eval()


def shared(model: nn.Module, reduction: float) -> nn.Module:
    """MASA with as many atoms a projection as leave about so much of the attention."""
    atoms = max(1, round((1 - reduction) * model.config.num_hidden_layers))
    return masa.share(model, {"method": "masa", "projections": ATTENTION, "atoms": atoms}).eval()


def made_directly(method: str, model: nn.Module, reduction: float) -> nn.Module:
    """The structure of a method's result with random values, see above."""
    shape = model_shape(model, family_of(model))
    sizes = {p: shape.shapes[p][0] * shape.shapes[p][1] for p in ATTENTION}
    kept = {"v"} if method == "svd-fisher" else set()
    part = (1 - reduction) * sum(sizes.values()) - sum(sizes[p] for p in kept)
    part /= sum(size for p, size in sizes.items() if p not in kept)
    sources = [source_of(method, p, shape, part, p in kept).to(model.dtype) for p in ATTENTION]
    for parameter in nn.ModuleList(sources).parameters():
        nn.init.normal_(parameter, std=0.02)
    install(model, SharedProjections(sources))
    dense = shape.num_layers * sum(sizes.values())
    model.sharing = Sharing(CompressionSpec(method, reduction, ATTENTION), dense)
    return model


def source_of(method: str, letter: str, shape: ModelShape, part: float, dense: bool) -> Factored:
    """One projection that keeps about this part of its numbers."""
    layers, (out, inp) = list(range(shape.num_layers)), shape.shapes[letter]
    if dense:
        return Factored(letter, len(layers), (out, inp), dense=layers)
    groups = [layers[i : i + 5] for i in layers[::5]] if method == "matrix-pca" else []
    rank = int((part * len(layers) - len(groups)) / len(layers) * out * inp / (out + inp))
    return Factored(
        letter,
        len(layers),
        (out, inp),
        atoms=[{"layers": group, "atoms": 1} for group in groups],
        factors=[{"layers": [layer], "rank": max(1, rank)} for layer in layers],
        transposed=True,  # as compression stores them
    )


def of_memory(one: Served, original: Served) -> list[Row]:
    """Disk, memory, and how far memory is beyond its limit."""
    rows = [Row(f"{one.label}: disk", one.disk / MIB, "MiB")]
    rows += [Row(f"{one.label}: {what}", found / MIB, "MiB") for what, found in one.memory.items()]
    if one.kind in ("low-rank", "atoms"):
        family = model_shape(one.model, family_of(one.model))
        dense = max(out * inp for out, inp in (family.shapes[p] for p in ATTENTION)) * one.model.dtype.itemsize
        for what in ("memory after loading", "peak in prefill"):
            limit = 1.01 * original.memory[what] - (original.disk - one.disk) + dense
            beyond = (one.memory[what] - limit) / MIB
            rows.append(Row(f"{one.label}: {what}, beyond its limit", beyond, "MiB", target="<= 0"))
    if one.difference is not None:
        target = "<= 1" if dtype() == torch.float32 else ""
        unit = "1e-5 of the largest logit"
        rows.append(Row(f"{one.label}: logits beside folded", one.difference / TOLERANCE, unit, target=target))
    return rows


def of_speed(one: Served, original: Served, timed: Mapping[str, Timed], prefill: int, stream: int) -> list[Row]:
    """Tokens a second, ratios to the original, and what the limit leaves."""
    rows, label = [], one.label
    targets = {"prefill": ">= 0.97"}
    if one.kind in ("low-rank", "folded"):
        first, more = (">= 1.00", ">= 0.97") if one.kind == "low-rank" else (">= 0.98", ">= 0.98")
        targets |= {"decoding, batch 1": first, "decoding, batch 8": more}
        targets |= {f"{GRAPH}, batch 1": first, f"{GRAPH}, batch 8": more}
    for what, found in timed.items():
        tokens = prefill if what == "prefill" else DECODED * int(what.split()[-1])
        rows.append(Row(f"{label}: {what}", tokens / found.median(label), "tokens/s"))
        if one is not original:
            ratio = found.speed(f"{label}: {what} : original", label, "original", targets.get(what, ""))
            rows.append(ratio)
            if what != "prefill":
                expected = original.read / one.read
                spread = None if ratio.spread is None else ratio.spread / expected
                target = ">= 0.90" if one.kind == "atoms" and what == "decoding, batch 1" else ""
                name = f"{label}: {what}, measured : limit"
                rows.append(Row(name, ratio.value / expected, spread=spread, target=target))
    found = timed["decoding, batch 1"].seconds
    parts = [one.read * DECODED / s / (stream / r) for s, r in zip(found[label], found["reading"], strict=True)]
    return [*rows, Row(f"{label}: decoding, batch 1, share of bandwidth", statistics.median(parts), "of the bandwidth")]


if __name__ == "__main__":
    sys.exit(main())
