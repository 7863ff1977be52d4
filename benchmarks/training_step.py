"""One optimiser step of MASA-QKVO against the plain model's, and our model class against a minimal GPT's.

    python benchmarks/training_step.py [--quick]

Everything is timed in turn in one process, one thread, with the shapes of the paper's comparison (sequence 256, batch
16, L = 12, S = 4) at a width that a CPU can run; on a GPU at the paper's d = 768. A ratio above 1 means that MASA's
step is the faster one. Variants: float32, bfloat16 (autocast), gradient accumulation (4 passes), checkpointing,
``torch.compile``; the peak memory of a step; and which part of a step goes into making the weights, which is the most
that making them once an optimiser step, and not once a pass, could save where gradients are accumulated.

The minimal GPT is `minimal_gpt.py`: learned positions instead of RoPE and one matrix for q, k and v, as in nanoGPT.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from harness import Row, in_turn, parser, peak_bytes, save
from minimal_gpt import MinimalGPT
from torch import Tensor, nn

from masa.models import language
from masa.runs import memory
from masa.sharing.parameters import parameter_groups
from masa.sharing.projections import decoder

LAYERS, ATOMS, CONTEXT, BATCH, VOCABULARY, HEAD = 12, 4, 256, 16, 2048, 32
RECIPE = {"learning_rate": 3e-3, "weight_decay": 0.1, "coefficients_learning_rate_ratio": 1.0}
METHODS = {"vanilla": {"method": "vanilla"}, "masa": {"method": "masa", "projections": "qkvo", "atoms": ATOMS}}


def build(method: str, width: int, device: torch.device) -> nn.Module:
    """One of our language models, in training mode."""
    sizes = {"num_layers": LAYERS, "hidden_size": width, "intermediate_size": 4 * width, "vocab_size": VOCABULARY}
    torch.manual_seed(0)
    sizes["num_attention_heads"] = width // HEAD
    return language.build(sizes, METHODS[method], CONTEXT).to(device).train()


def stepper(
    model: nn.Module, ids: Tensor, bf16: bool = False, passes: int = 1, loss: Callable[..., Tensor] | None = None
) -> Callable[[], None]:
    """One optimiser step as the Trainer makes it: forward, backward, clipping, AdamW."""
    groups = parameter_groups(model, RECIPE) if loss is None else model.parameters()
    optimizer = torch.optim.AdamW(groups, lr=3e-3, fused=True)
    parameters = list(model.parameters())

    def of(part: Tensor) -> Tensor:
        return loss(part) if loss else model(input_ids=part, labels=part, use_cache=False).loss

    def step() -> None:
        for part in ids.chunk(passes):
            with torch.autocast(ids.device.type, dtype=torch.bfloat16) if bf16 else nullcontext():
                value = of(part)
            (value / passes).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def variants(width: int, ids: Tensor) -> dict[str, Callable[[], dict[str, Callable[[], None]]]]:
    """Name of a variant -> what makes the two steps to compare."""

    def pair(change: Callable[[nn.Module], Any] = lambda m: m, **options: Any) -> dict[str, Callable[[], None]]:
        return {method: stepper(change(build(method, width, ids.device)), ids, **options) for method in METHODS}

    def checkpointed(model: nn.Module) -> nn.Module:
        model.activation_checkpointing_enable({"use_reentrant": False})
        return model

    return {
        "float32": pair,
        "bfloat16": lambda: pair(bf16=True),
        "accumulation, 4 passes": lambda: pair(passes=4),
        "checkpointing": lambda: pair(checkpointed),
        "torch.compile": lambda: pair(torch.compile),
    }


def making(width: int, ids: Tensor, rounds: int) -> Row:
    """Which part of a step goes into making MASA's weights and into what their gradients become."""
    model = build("masa", width, ids.device)
    shared = decoder(model).shared
    gradients = {p: [torch.randn_like(w) for w in ws] for p, ws in shared.make().items()}

    def make() -> None:
        weights = shared.make()
        torch.autograd.backward(
            [w for ws in weights.values() for w in ws], [g for gs in gradients.values() for g in gs]
        )

    timed = in_turn("making weights", {"step": stepper(model, ids), "make": make}, rounds)
    share = timed.median("make") / timed.median("step")
    return Row(f"making the weights, part of a step, float32, d = {width}", share, "of the step")


def memory_of(width: int, ids: Tensor, variant: str) -> Row:
    """Peak memory of a step, of the model and of its optimiser, beside the plain model's."""
    used = {}
    for method in METHODS:

        def prepare(method: str = method) -> Callable[[], None]:
            return variants(width, ids)[variant]()[method]

        used[method] = peak_bytes(prepare)
    return Row(
        f"peak memory of a step, MASA : vanilla, {variant}, d = {width}",
        used["masa"] / used["vanilla"],
        target="<= 1.05",
    )


def model_class(width: int, ids: Tensor, rounds: int) -> Row:
    """transformers' Starcoder2 against the minimal GPT: tokens a second, in float32."""
    gpt = MinimalGPT(LAYERS, width, width // HEAD, VOCABULARY, CONTEXT).to(ids.device).train()
    ways = {
        "minimal GPT": stepper(gpt, ids, loss=gpt),
        "Starcoder2": stepper(build("vanilla", width, ids.device), ids),
    }
    timed = in_turn(f"model class, d = {width}", ways, rounds)
    target = ">= 0.97" if width >= 192 else ""
    return timed.speed(f"training, Starcoder2 : minimal GPT, d = {width}", "Starcoder2", "minimal GPT", target)


def main() -> int:
    given = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    memory.keep_freed()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    batch = 2 if given.quick else BATCH
    ids = torch.randint(0, VOCABULARY, (batch, CONTEXT), generator=torch.Generator().manual_seed(0)).to(device)
    narrow, wide, model_widths = (768, 1536, (768,)) if cuda else (64, 128, (64, 192))
    rounds, warm_up = (1, 1) if given.quick else (24, 2)
    rows = []
    for name, make in variants(narrow, ids).items():
        if given.quick and name == "torch.compile":
            continue
        timed = in_turn(name, make(), rounds, warm_up)
        what = f"training step, MASA-QKVO : vanilla, {name}, d = {narrow}"
        rows.append(timed.speed(what, "masa", "vanilla", ">= 1.00"))
    timed = in_turn(f"float32, d = {wide}", variants(wide, ids)["float32"](), max(1, rounds // 2), warm_up)
    rows.append(timed.speed(f"training step, MASA-QKVO : vanilla, float32, d = {wide}", "masa", "vanilla", ">= 1.00"))
    rows.append(making(narrow, ids, max(1, rounds // 2)))
    if not cuda:
        rows += [memory_of(narrow, ids, variant) for variant in ("float32", "bfloat16", "checkpointing")]
    rows += [model_class(width, ids, max(1, rounds // (1 + width // 64))) for width in model_widths]
    settings = {"layers": LAYERS, "atoms": ATOMS, "context": CONTEXT, "batch": batch, "head_dim": HEAD}
    return save("training_step", rows, settings | {"device": device.type, "threads": 1}, given.out)


if __name__ == "__main__":
    sys.exit(main())
