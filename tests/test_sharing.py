"""The mechanism against independent references and in everything that PyTorch does to a model."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import language_model, llama_model
from torch.utils._python_dispatch import TorchDispatchMode

import masa
from masa.sharing.projections import SharedLinear, SharedProjections, decoder, family_of
from masa.sharing.weight_sources import Atoms, LowRank, Repeat, Sequential

SPECS = [
    {"method": "vanilla"},
    {"method": "gqa", "num_key_value_heads": 2},
    {"method": "low-rank"},
    {"method": "sequential"},
    {"method": "repeat-all-over"},
    {"method": "masa", "projections": "qkv"},
    {"method": "masa", "projections": "qkvo"},
    {"method": "masa", "projections": "vo", "atoms": 5},
    {"method": "masa", "coefficients": "mlp"},
    {"method": "masa", "coefficients": "mlp", "coefficient_norm": "fixed", "embedding_dim": 16},
    {"method": "masa", "coefficients": "legendre"},
    {"method": "masa-per-head"},
    {"method": "relaxed"},
    {"method": "masa", "dictionaries": ["qv"]},
    {"method": "masa", "projections": "qkv", "dictionaries": ["qk"], "atoms": {"qk": 4, "v": 2}},
    {"method": "masa", "dictionaries": ["qkvo"]},
    {"method": "masa", "projections": "qkvoud"},
    {"method": "sequential", "projections": "qkvoud", "sets": 3},
]
SHARED = [spec for spec in SPECS if spec["method"] not in ("vanilla", "gqa")]


def label(spec):
    return "-".join(str(v) for v in spec.values())


@pytest.fixture(params=SPECS, ids=label)
def spec(request):
    return request.param


@pytest.fixture(params=SHARED, ids=label)
def shared_spec(request):
    return request.param


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss


def gradients(model, ids):
    model.zero_grad()
    loss_of(model, ids).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def weights_of(model, letter):
    path = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}[letter]
    return [getattr(block.self_attn, path).weight for block in model.model.layers]


def test_share_returns_the_model_itself():
    model = language_model()
    assert masa.share(model, masa.SharingSpec(method="masa", projections="qkvo", atoms=2)) is model


def test_atoms_equal_the_sum_of_the_paper_in_float64():
    model = masa.share(language_model().double(), {"method": "masa", "atoms": 3})
    source = model.model.shared["q"]
    for layer, weight in enumerate(weights_of(model, "q")):
        reference = sum(source.coefficients("q")[layer, s] * source.atoms[s] for s in range(3))
        assert weight.dtype == torch.float64
        torch.testing.assert_close(weight, reference, rtol=1e-12, atol=1e-14)


def test_as_many_atoms_as_layers_reproduce_any_weights():
    dense = [torch.randn(24, 24) for _ in range(6)]
    source = Atoms("q", 6, (24, 24), atoms=6)
    with torch.no_grad():
        source.atoms.copy_(torch.stack(dense))
        source.maker["q"].values.copy_(torch.eye(6))
    for made, wanted in zip(source.weights()["q"], dense, strict=True):
        torch.testing.assert_close(made, wanted, rtol=0, atol=1e-6)


def test_one_atom_is_full_sharing_up_to_scale():
    model = masa.share(language_model(), {"method": "masa", "atoms": 1})
    stack = torch.stack(weights_of(model, "v")).flatten(1)
    assert torch.linalg.matrix_rank(stack) == 1


@pytest.mark.parametrize("coefficients", ["direct", "mlp"])
@pytest.mark.parametrize("norm", ["free", "fixed"])
def test_synthesised_weights_start_with_the_dense_standard_deviation(coefficients, norm):
    spec = {"method": "masa", "atoms": 4, "coefficients": coefficients, "coefficient_norm": norm}
    model = masa.share(language_model(layers=12, width=64), spec)
    dense = language_model(layers=12, width=64)
    for letter in "qkvo":
        stds = torch.stack([w.std() for w in weights_of(model, letter)])
        wanted = torch.stack([w.std() for w in weights_of(dense, letter)]).mean()
        assert (stds / wanted - 1).abs().max() < 0.08
        rows = model.model.shared[letter].coefficients(letter)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(12), rtol=1e-5, atol=1e-5)
        cosines = (rows @ rows.T - torch.eye(12)).abs()
        assert cosines.mean() < 0.6, "layers must differ at the start"
        assert cosines.max() < 0.9999


def test_low_rank_starts_at_the_dense_scale_of_its_best_approximation():
    source = LowRank("q", 4, (48, 48), rank=48)
    source.reset_parameters(0.02)
    assert abs(torch.stack(source.weights()["q"]).std() / 0.02 - 1) < 0.05
    assert torch.linalg.matrix_rank(LowRankAt(8).weights()["q"][0]) == 8


def LowRankAt(rank):
    source = LowRank("q", 4, (48, 48), rank=rank)
    source.reset_parameters(0.02)
    return source


def test_assignment_of_layers_to_sets():
    sequential, repeat = (kind("q", 6, (4, 4), sets=3) for kind in (Sequential, Repeat))
    assert [sequential.set_of(i) for i in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [repeat.set_of(i) for i in range(6)] == [0, 1, 2, 0, 1, 2]
    torch.nn.init.normal_(next(sequential.parameters()))
    assert sequential.weights()["q"][0] is sequential.weights()["q"][1] or torch.equal(
        sequential.weights()["q"][0], sequential.weights()["q"][1]
    )


def test_gqa_is_transformers_own():
    model = masa.share(language_model(), {"method": "gqa", "num_key_value_heads": 1})
    again = language_model(num_key_value_heads=1)
    again.load_state_dict(model.state_dict())
    ids = torch.randint(0, 64, (1, 8))
    assert torch.equal(model.eval()(ids).logits, again.eval()(ids).logits)


def test_every_parameter_gets_a_gradient_and_is_registered_once(spec, ids):
    model = masa.share(language_model(), spec)
    grads = gradients(model, ids)
    assert all(torch.isfinite(g).all() for g in grads.values())
    none = ("k_proj.bias", "right") if spec["method"] == "relaxed" else ("k_proj.bias",)  # the left factor is zero yet
    assert all(g.abs().sum() > 0 for n, g in grads.items() if not n.endswith(none)), "softmax ignores k's bias"
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len({id(p) for _, p in model.named_parameters(remove_duplicate=False)}) == len(names) - 1  # tied embeddings


def test_gradients_equal_those_of_weights_written_out(shared_spec, ids):
    """dL/dD through the bank against autograd on the same sum, written as plainly as possible."""
    model = masa.share(language_model().double(), shared_spec)
    expected = gradients(model, ids)
    bank = model.model.shared
    model.zero_grad()
    plain = masa.fold(model).train()
    loss_of(plain, ids).backward()
    outputs, seeds = [], []
    for letter in bank.projections:
        path = family_of(model).paths[letter]
        for layer, block in enumerate(plain.model.layers):
            outputs.append(bank[bank._source_of[letter]].weights()[letter][layer])
            seeds.append(block.get_submodule(path).weight.grad)
    torch.autograd.backward(outputs, seeds)
    for name, p in bank.named_parameters():
        torch.testing.assert_close(p.grad, expected[f"model.shared.{name}"], rtol=1e-9, atol=1e-12)


def test_fold_keeps_the_logits_and_leaves_the_model_alone(spec, ids):
    model = masa.share(language_model(), spec).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        plain = masa.fold(model)
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    assert not any(isinstance(m, SharedLinear | SharedProjections) for m in plain.modules())
    assert not hasattr(plain, "sharing")
    assert {k: v.shape for k, v in plain.state_dict().items()} == {
        k: v.shape for k, v in language_model(num_key_value_heads=plain.config.num_key_value_heads).state_dict().items()
    }
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_generation_matches_the_folded_model(shared_spec, ids):
    model = masa.share(language_model(), shared_spec).eval()
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **arguments), masa.fold(model).generate(ids, **arguments))


class CountMatmuls(TorchDispatchMode):
    """Counts matrix products whose result has ``elements`` numbers."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and result.numel() == self.elements:
            self.count += 1
        return result


def test_all_layers_are_made_by_one_gemm_a_projection_and_forward(ids):
    model = masa.share(language_model(), {"method": "masa", "projections": "qkv"})
    with CountMatmuls(6 * 24 * 24) as counter:
        model(ids)
    assert counter.count == 3


def test_evaluation_keeps_no_weight_and_sees_every_change(ids):
    model = masa.share(language_model(), {"method": "masa"}).eval()
    with torch.no_grad():
        with CountMatmuls(6 * 24 * 24) as counter:
            first = model(ids).logits
        assert counter.count == 0, "the weights of one layer at most"
        model.model.shared["q"].atoms.mul_(2.0)
        second = model(ids).logits
        assert not torch.equal(first, second)
        for p in model.model.shared.parameters():
            p.data.mul_(1.5)  # as weight averaging does; no version counter sees it
        third = model(ids).logits
        assert not torch.allclose(second, third)
        torch.testing.assert_close(third, masa.fold(model)(ids).logits)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, third)


def test_training_after_evaluation_uses_fresh_weights(ids):
    model = masa.share(language_model(), {"method": "masa"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(3):
        model.eval()
        with torch.no_grad():
            model(ids)
        model.train()
        loss = loss_of(model, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(shared_spec, reentrant, ids):
    model = masa.share(language_model(), shared_spec).train()
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, grad in gradients(model, ids).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("coefficients", ["direct", "mlp"])
def test_autocast_mixes_in_float32_and_multiplies_in_bfloat16(coefficients, ids):
    model = masa.share(language_model(), {"method": "masa", "coefficients": coefficients}).train()
    seen = {}
    projection = model.model.layers[0].self_attn.q_proj

    def look(module, args, output):
        seen["dtype"], seen["weight"] = output.dtype, module.weight

    projection.register_forward_hook(look)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, ids)
    loss.backward()
    assert seen["dtype"] == torch.bfloat16
    exact = model.model.shared["q"].weights()["q"][0]
    assert torch.equal(seen["weight"], exact.bfloat16()), "rounded once, after the mix"
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert abs(loss.item() - loss_of(model, ids).item()) < 0.05


def test_bfloat16_parameters(ids):
    model = masa.share(language_model().bfloat16(), {"method": "masa"})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    loss_of(model, ids).backward()
    assert weights_of(model, "q")[0].dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("compiled_spec", [SPECS[3], SPECS[8], SPECS[10]], ids=label)
def test_compile(compiled_spec, mode, ids):
    torch._dynamo.reset()
    model = masa.share(language_model(layers=3), compiled_spec)
    getattr(model, mode)()
    with torch.set_grad_enabled(mode == "train"):
        check_compiled(model, mode, ids)


def check_compiled(model, mode, ids):
    expected = loss_of(model, ids)
    expected_grads = gradients(model, ids) if mode == "train" else {}
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        loss = compiled(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    if mode == "train":
        loss.backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, expected_grads[name], rtol=1e-4, atol=1e-6)


def test_deepcopy_is_independent(shared_spec, ids):
    model = masa.share(language_model(), shared_spec).train()
    loss_of(model, ids)  # leaves weights with a graph behind
    twin = copy.deepcopy(model)
    assert twin.model.shared is not model.model.shared
    assert twin.model.layers[0].self_attn.v_proj._shared is twin.model.shared
    with torch.no_grad():
        for p in twin.model.shared.parameters():
            p.zero_()
        for p in twin.model.shared.buffers():
            p.zero_()
    changed, kept = loss_of(twin.eval(), ids), loss_of(model.eval(), ids)
    assert not torch.equal(changed, kept)
    assert torch.equal(loss_of(model.eval(), ids), kept)


DDP = """
import sys, torch, masa
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from conftest import language_model
dist.init_process_group("gloo")
torch.manual_seed(0)
model = masa.share(language_model(), {"method": "masa", "coefficients": "mlp"})
ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1))
alone = {}
for name, p in model.named_parameters(): p.grad = None
model(input_ids=ids, labels=ids).loss.backward()
alone = {n: p.grad.clone() for n, p in model.named_parameters()}
model.zero_grad()
parallel = torch.nn.parallel.DistributedDataParallel(model)
mine = ids[2 * dist.get_rank(): 2 * dist.get_rank() + 2]
parallel(input_ids=mine, labels=mine).loss.backward()
for n, p in model.named_parameters():
    torch.testing.assert_close(p.grad, alone[n], rtol=1e-4, atol=1e-6)
print("same gradients")
dist.destroy_process_group()
"""


def test_two_process_ddp_gives_the_single_process_gradients(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29513", script]
    result = subprocess.run(
        [*map(str, command), str(Path(__file__).parent)], capture_output=True, text=True, timeout=240, check=False
    )
    assert result.stdout.count("same gradients") == 2, result.stderr[-2000:]


def test_llama_with_grouped_query_attention(ids):
    model = masa.share(llama_model(), {"method": "masa", "projections": "qkvogud", "atoms": 3})
    gradients(model, ids)
    with torch.no_grad():
        torch.testing.assert_close(masa.fold(model)(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-6)


def test_biases_stay_with_their_layers():
    dense = language_model()
    with torch.no_grad():
        for i, block in enumerate(dense.model.layers):
            block.self_attn.q_proj.bias.fill_(i)
    model = masa.share(dense, {"method": "sequential"})
    assert [b.self_attn.q_proj.bias[0].item() for b in model.model.layers] == list(range(6))


def test_sharing_twice_and_unknown_architectures_are_refused():
    model = masa.share(language_model(), "masa")
    with pytest.raises(masa.MasaError, match="already shares"):
        masa.share(model, "masa")
    with pytest.raises(masa.MasaError, match="no list of transformer blocks"):
        masa.share(torch.nn.Linear(2, 2), "masa")
    from transformers import MambaConfig, MambaForCausalLM

    with pytest.raises(masa.MasaError, match=r"no list of transformer blocks .* \(backbone\.layers: MambaBlock\)"):
        masa.share(MambaForCausalLM(MambaConfig(num_hidden_layers=2, hidden_size=8, vocab_size=16)), "masa")


def test_the_meta_device_takes_no_memory():
    with torch.device("meta"):
        model = masa.share(language_model(layers=12, width=768, heads=12), {"method": "masa", "coefficients": "mlp"})
    assert all(p.is_meta for p in model.parameters())
    assert decoder(model).shared["q"].atoms.shape == (4, 768, 768)
