"""What makes a training fast on a GPU, shown on a CPU: one cast a pass, no mask, one graph, fused kernels."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT
from test_image_training import MODEL
from test_training import spec_of
from torch._dynamo.utils import counters

from masa.models import language, timm_vit
from masa.runs import run
from masa.sharing.parameters import parameter_groups
from masa.training import trainer
from masa.training.attention import without_mask
from masa.training.language import pretrain
from masa.training.precision import CastOnce

SIZES = {"num_layers": 2, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 128, "num_attention_heads": 4}
SHARINGS = {
    "vanilla": {"method": "vanilla"},
    "gqa": {"method": "gqa", "num_key_value_heads": 2},
    "low-rank": {"method": "low-rank", "projections": "qkvo", "rank": 4},
    "sequential": {"method": "sequential", "projections": "qkvo", "sets": 1},
    "repeat-all-over": {"method": "repeat-all-over", "projections": "qkvo", "sets": 1},
    "masa": {"method": "masa", "projections": "qkvo", "atoms": 1},
    "masa-mlp": {"method": "masa", "projections": "qkv", "atoms": 1, "coefficients": "mlp"},
}
VIT = MODEL | {"num_layers": 2}
TEXTS = torch.randint(0, 128, (4, 16), generator=torch.Generator().manual_seed(0))


def made(method, mask=False):
    torch.manual_seed(0)
    model = language.build(SIZES, SHARINGS[method], 16).train()
    return model if mask else without_mask(model)


def vit(method):
    torch.manual_seed(0)
    return timm_vit.build(VIT, SHARINGS[method]).train()


def loss_of(model):
    if hasattr(model, "timm_model"):
        pixels = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        pixels = pixels.to(model.timm_model.patch_embed.proj.weight.dtype)
        return model(pixel_values=pixels).logits.float().square().mean()
    return model(input_ids=TEXTS, labels=TEXTS, use_cache=False).loss


def gradients(model, around=nullcontext):
    model.zero_grad()
    with around():
        loss = loss_of(model)
        loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("method", SHARINGS)
@pytest.mark.parametrize("build", [made, vit])
def test_weights_are_cast_once_and_gradients_arrive_at_the_masters(build, method):
    if build is vit and method == "gqa":
        pytest.skip("timm's attention has no fewer heads for keys and values")
    model = build(method)
    named = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    exact, expected = gradients(model)
    loss, found = gradients(model, CastOnce(model))
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < 0.03, "bfloat16 keeps three digits"
    assert loss == pytest.approx(exact, rel=0.01)
    after = {name: (id(p), p.detach()) for name, p in model.named_parameters()}
    assert list(after) == list(named), "in their order, which optimisers count on"
    assert all(after[name][0] == named[name][0] and torch.equal(after[name][1], named[name][1]) for name in named)
    assert torch.equal(gradients(model)[1], expected), "nothing of it stays"


def test_layers_multiply_in_the_lower_arithmetic_and_atoms_are_mixed_above_it():
    model, seen = made("masa"), {}
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda module, args: seen.update(activations=args[0].dtype))
    with CastOnce(model)():
        shared = model.model.shared
        seen |= {"mixed": layer.self_attn.q_proj.weight.dtype, "mlp": layer.mlp.c_fc.weight.dtype}
        seen |= {"atoms": {p.dtype for p in shared.parameters()}}
        loss_of(model)
    low = torch.bfloat16
    assert seen == {"activations": low, "mixed": low, "mlp": low, "atoms": {torch.float32}}


def test_checkpointing_recomputes_with_the_same_weights():
    model = made("masa")
    _, expected = gradients(model, CastOnce(model))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(gradients(model, CastOnce(model))[1], expected)


def test_one_by_one_gives_the_same_gradients_in_ddp_as_well(tmp_path):
    """Where several processes exchange gradients as they come."""
    model = made("masa")
    _, expected = gradients(model, CastOnce(model))
    cast = CastOnce(model, together=False)
    assert torch.equal(gradients(model, cast)[1], expected)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        parallel, asked = torch.nn.parallel.DistributedDataParallel(model), []
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: asked.append(p.grad.dtype))
        with cast():
            parallel(input_ids=TEXTS, labels=TEXTS, use_cache=False).loss.backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
    finally:
        torch.distributed.destroy_process_group()
    assert asked and set(asked) == {torch.float32}
    assert float((found / 2 - expected).norm() / expected.norm()) < 1e-6, "added to those of before"


def test_a_pass_that_fails_gives_the_weights_back():
    model = made("masa")
    before = list(model.parameters())
    with pytest.raises(RuntimeError, match="on the way"), CastOnce(model)():
        raise RuntimeError("on the way")
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert model.model.shared._open is None


def test_no_mask_is_made_and_the_bits_are_the_same():
    masked, expected = gradients(made("gqa", mask=True))
    loss, found = gradients(made("gqa"))
    assert loss == masked and torch.equal(found, expected)


@pytest.mark.parametrize(("mask", "attended"), [(True, {False}), (False, {True})])
def test_attention_of_the_compiled_model(mask, attended):
    """With transformers' own mask it is not causal by itself, which flash attention would need."""
    found = set()

    def look(graph, inputs):
        for node in graph.graph.nodes:
            if "scaled_dot_product_attention" in str(node.target):
                found.add(node.kwargs["is_causal"] and node.kwargs["attn_mask"] is None)
        return graph

    torch._dynamo.reset()
    model = made("vanilla", mask)
    model.compile(dynamic=False, backend=look)
    loss_of(model)
    assert found == attended


ARITHMETIC = {
    "float32": lambda model: nullcontext,
    "autocast": lambda model: lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "cast once": CastOnce,
}


CASES = [*((method, "cast once") for method in SHARINGS), ("masa", "float32"), ("masa", "autocast")]


@pytest.mark.parametrize(("method", "arithmetic"), CASES)
@pytest.mark.parametrize("build", [made, vit])
def test_one_graph_without_a_break_and_never_again(build, method, arithmetic):
    if build is vit and method == "gqa":
        pytest.skip("timm's attention has no fewer heads for keys and values")
    torch._dynamo.reset()
    counters.clear()
    model = build(method)
    around = ARITHMETIC[arithmetic](model)
    model.compile(dynamic=False, backend="aot_eager")
    groups = parameter_groups(
        model, {"learning_rate": 1e-3, "weight_decay": 0.1, "coefficients_learning_rate_ratio": 1}
    )
    optimizer = torch.optim.AdamW(groups, fused=True)
    for step in range(4):
        gradients(model, around)
        optimizer.step()
        if step == 1:
            compiled = counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    assert (compiled, counters["stats"]["unique_graphs"]) == (1, 1)


def test_a_compiled_run_ends_on_the_same_bits(tokens, tmp_path):
    """With its scores taken by the model as it was written, and without its compilation in the time of its steps."""
    spec = spec_of(steps=6, evaluations=2, compile=True, checkpoint_minutes=1e-9)
    spec["model"] |= {"num_layers": 2}
    spec["sharing"] |= {"atoms": 1, "projections": "qkvo"}
    first = pretrain(spec, tokens, tmp_path / "a")
    again = pretrain(spec, tokens, tmp_path / "b")
    assert first["sha256"] == again["sha256"]
    plain = pretrain(spec | {"training": spec["training"] | {"compile": False}}, tokens, tmp_path / "c")
    assert first["training"]["validation_loss"] == pytest.approx(plain["training"]["validation_loss"], rel=1e-4)
    assert first["training"]["training_seconds"] < 20, "the minute of compiling is not in it"
    log = [r for r in run.read_jsonl(tmp_path / "a" / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in log] == [1, 2, 3, 4, 5, 6]


def test_compiling_and_fsdp_are_refused(tokens, tmp_path):
    spec = spec_of(compile=True, parallel="fsdp")
    with pytest.raises(trainer.MasaError, match=r"training.compile: true needs training.parallel: ddp"):
        pretrain(spec, tokens, tmp_path)


LIGER = """
import json, torch
from masa.models import language
from masa.training.fused import FusedKernels, fits
torch.manual_seed(0)
sizes = dict(num_layers=2, hidden_size=64, intermediate_size=128, vocab_size=96, num_attention_heads=4)
model = language.build(sizes, {"method": "gqa", "num_key_value_heads": 2}, 32).train()
assert fits(model)
ids = torch.randint(0, 96, (2, 32))

def gradients(count):
    model.zero_grad()
    options = {} if count is None else {"num_items_in_batch": torch.tensor(count)}
    loss = model(input_ids=ids, labels=ids, use_cache=False, **options).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

found = {}
for count in (62, None):
    expected = gradients(count)
    with FusedKernels(model)():
        fused = gradients(count)
    back = gradients(count)
    assert torch.equal(back[1], expected[1]), "the model's own functions are back"
    apart = float((fused[1] - expected[1]).norm() / expected[1].norm())
    found[str(count)] = [float(abs(fused[0] - expected[0])), apart]
print(json.dumps(found))
"""


def test_ligers_kernels_give_the_same_loss_and_gradients():
    """In Triton's interpreter, which runs them on a CPU."""
    pytest.importorskip("liger_kernel")
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", LIGER]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for loss, apart in json.loads(done.stdout.splitlines()[-1]).values():
        assert loss < 1e-5 and apart < 1e-5
