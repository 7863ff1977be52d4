"""Vision Transformers through the same mechanism: shared, counted, folded to plain timm, stored and read back."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from conftest import ROOT

import masa
from masa.evaluation import analysis
from masa.models import timm_vit, vit
from masa.sharing.projections import FusedLinear, SharedLinear, blocks, decoder, family_of
from masa.sharing.spec import ModelShape
from masa.study import kinds

SIZES = {
    "family": "vit",
    "image_size": 8,
    "patch_size": 2,
    "channels": 1,
    "num_classes": 10,
    "num_layers": 6,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
SPECS = [
    {"method": "vanilla"},
    {"method": "low-rank"},
    {"method": "low-rank", "projections": "kv", "rank": 5},
    {"method": "sequential"},
    {"method": "repeat-all-over", "projections": "qkv"},
    {"method": "masa"},
    {"method": "masa", "projections": "qkv"},
    {"method": "masa", "projections": "o"},
    {"method": "masa", "projections": "qo", "atoms": {"q": 2, "o": 3}},
    {"method": "masa", "projections": "qkvoud"},
    {"method": "masa", "coefficients": "mlp", "coefficient_norm": "fixed"},
    {"method": "masa", "dictionaries": ["qk", "vo"]},
]


def label(spec):
    return "-".join(str(v) for v in spec.values())


def plain_vit(**more):
    """A tiny VisionTransformer, as timm's users make it."""
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 24, "depth": 6}
    return timm.create_model("vit_tiny_patch16_224", **(sizes | {"num_heads": 4, "mlp_ratio": 2} | more))


def wrapped(spec="masa", **more):
    return timm_vit.build(SIZES | more, masa.SharingSpec.coerce(spec).to_dict(), classes=list("abcdefghij"))


@pytest.fixture
def images():
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_folded_model_is_plain_timm_with_the_same_logits(spec, images):
    model = masa.share(plain_vit(), spec)
    state, model = model.training, model.eval()
    folded = masa.fold(model)
    assert state
    assert type(folded).__module__.startswith("timm.")
    assert not any(isinstance(m, SharedLinear | FusedLinear) or "masa" in type(m).__module__ for m in folded.modules())
    other = plain_vit().eval()
    assert other.load_state_dict(folded.state_dict(), strict=True)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(other(images), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(model(images), expected)


@pytest.mark.parametrize("spec", SPECS[1:], ids=label)
def test_every_parameter_learns_and_the_stack_is_made_once(spec, images, monkeypatch):
    model = masa.share(plain_vit(), spec).train()
    shared, made = decoder(model).shared, []
    make = type(shared).make
    monkeypatch.setattr(type(shared), "make", lambda self: made.append(1) or make(self))
    torch.nn.functional.cross_entropy(model(images), torch.tensor([1, 2, 3])).backward()
    assert len(made) == 1
    assert all(p.grad is not None for p in model.parameters())
    assert len({id(p) for p in model.parameters()}) == len(list(model.named_parameters(remove_duplicate=False)))


def test_gradients_equal_those_of_the_folded_weights(images):
    """dL/dC and dL/dD follow from the gradient of the fused matrices by the chain rule of Eq. 2."""
    model = masa.share(plain_vit(), "masa").double().train()
    folded = masa.fold(model).train()
    target = torch.tensor([1, 2, 3])
    for m in (model, folded):
        torch.nn.functional.cross_entropy(m(images.double()), target).backward()
    family, shared = family_of(model), decoder(model).shared
    for index, letter in enumerate("qkv"):
        source = shared[letter]
        dense = torch.stack([b.attn.qkv.weight.grad.view(3, 24, 24)[index] for b in blocks(folded)])
        c, d = source.maker[letter].values, source.atoms
        torch.testing.assert_close(d.grad, torch.einsum("ls,loi->soi", c, dense), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(c.grad, torch.einsum("loi,soi->ls", dense, d), rtol=1e-5, atol=1e-8)
    assert family.projection(blocks(folded)[0], "k").weight.data_ptr() != blocks(folded)[0].attn.qkv.weight.data_ptr()


def test_what_is_not_shared_keeps_its_values():
    torch.manual_seed(0)
    before = plain_vit()
    torch.manual_seed(0)
    model = masa.share(plain_vit(), {"method": "masa", "projections": "v"})
    for old, new in zip(blocks(before), blocks(model), strict=True):
        assert torch.equal(old.attn.qkv.weight[:48], torch.cat([new.attn.qkv.q.weight, new.attn.qkv.k.weight]))
        assert torch.equal(old.attn.qkv.bias, new.attn.qkv.bias)
        assert torch.equal(old.attn.proj.weight, new.attn.proj.weight)


def test_initial_weights_have_the_dense_standard_deviation():
    model = masa.fold(masa.share(plain_vit(embed_dim=96, depth=12), {"method": "masa", "coefficients": "mlp"}))
    for block in blocks(model):
        assert block.attn.qkv.weight.detach().std() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("width", "layers", "heads", "dense", "shared", "reduction"),
    [(64, 12, 4, 0.317, 0.186, 2 / 3), (256, 12, 8, 4.805, 2.708, 2 / 3), (256, 24, 8, 9.554, 4.312, 5 / 6)],
)
def test_the_papers_sizes_and_reductions(width, layers, heads, dense, shared, reduction):
    """Patch 4, MLP width = d, 32 x 32 RGB, 100 classes; S = 4. Coefficients are the rest of the reduction."""
    sizes = {"image_size": 32, "patch_size": 4, "channels": 3, "num_classes": 100}
    sizes |= {"num_layers": layers, "hidden_size": width, "num_attention_heads": heads, "intermediate_size": width}
    with torch.device("meta"):
        vanilla = masa.count_parameters(timm_vit.build(sizes, {"method": "vanilla"}))
        ours = masa.count_parameters(timm_vit.build(sizes, {"method": "masa", "atoms": 4}))
        qkv = masa.count_parameters(timm_vit.build(sizes, {"method": "masa", "projections": "qkv", "atoms": 4}))
    assert vanilla.total / 1e6 == pytest.approx(dense, abs=6e-4)
    assert ours.total / 1e6 == pytest.approx(shared, abs=6e-4)
    assert vanilla.attention == ours.attention_dense == layers * 4 * width**2
    assert ours.attention == 4 * 4 * (width**2 + layers)
    assert ours.attention_reduction == pytest.approx(reduction, abs=1.1e-3)
    assert round(ours.attention_reduction, 2 if width == 64 else 3) == round(reduction, 2 if width == 64 else 3)
    assert qkv.attention_reduction == pytest.approx(0.75 * reduction, abs=1e-3)


def test_torch_free_shape_is_the_models():
    model = timm_vit.build(SIZES, {"method": "vanilla"})
    from masa.sharing.projections import model_shape

    assert model_shape(model, family_of(model)) == ModelShape.of_sizes(vit.resolve(SIZES))


@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_factored_round_trip(spec, images, tmp_path):
    model = wrapped(spec).eval()
    masa.save(model, tmp_path)
    back = masa.load(tmp_path)
    assert type(back) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(back(images).logits, model(images).logits, rtol=1e-5, atol=1e-6)
    assert masa.count_parameters(back).total == masa.count_parameters(model).total
    assert list(back.config.id2label.values()) == list("abcdefghij")


def test_plain_folder_is_read_by_timm_and_by_transformers(images, tmp_path):
    from transformers import AutoModelForImageClassification

    model = wrapped("masa").eval()
    timm_vit.save_plain(model, tmp_path)
    by_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    by_hf = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(images).logits
        torch.testing.assert_close(by_timm(images), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(by_hf(images).logits, expected, rtol=1e-5, atol=1e-6)
    assert by_timm.pretrained_cfg["input_size"] == (1, 8, 8)
    assert by_hf.config.id2label[3] == "d"


def test_weights_are_described_like_a_language_models():
    described = analysis.describe_weights(masa.share(plain_vit(), {"method": "masa", "projections": "qk"}))
    assert {k: len(v) for k, v in described["effective_rank"].items()} == dict.fromkeys("qkvo", 6)
    assert set(described["coefficients"]) == {"q", "k"}


def test_gradient_checkpointing(images):
    model = masa.share(plain_vit(), "masa").train()
    losses, grads = [], []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        loss = model(images).square().sum()
        loss.backward()
        losses.append(loss.item())
        grads.append(decoder(model).shared["q"].atoms.grad.clone())
    assert losses[0] == losses[1]
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 3}, r"patch_size = 3 does not divide image_size = 8. Choose one of \[1, 2, 4, 8\]"),
        ({"num_attention_heads": 5}, "num_attention_heads = 5 does not divide hidden_size = 24"),
        ({"channels": 2}, "channels = 2; images have 1"),
        ({"num_classes": 1}, "at least 2"),
        ({"hidden_size": 0}, "hidden_size must be an integer of at least 1"),
        ({"patch": 2}, "Did you mean 'patch_size'"),
        ({"global_pool": "tokn"}, "Did you mean 'token'"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be a number of at least 0 and less than 1, got 1.0"),
        ({"num_classes": 11}, "num_classes = 11, but the data has 10 classes"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(masa.MasaError, match=message):
        wrapped(**change)


def test_unknown_family():
    with pytest.raises(masa.MasaError, match="Did you mean 'vit'"):
        kinds.of({"model": {"family": "vitt"}})


def test_what_has_no_meaning_here(tmp_path):
    with pytest.raises(masa.MasaError, match="'gqa' does not exist for VisionTransformer"):
        masa.share(plain_vit(), {"method": "gqa", "num_key_value_heads": 2})
    with pytest.raises(masa.MasaError, match="no language model: compression calibrates on tokens"):
        masa.compress(plain_vit(), torch.zeros(2, 8, dtype=int), method="matrix-pca", reduction=0.2)
    with pytest.raises(masa.MasaError, match="no language model: compression calibrates on tokens"):
        masa.calibrate(plain_vit(), torch.zeros(2, 8, dtype=int))
    with pytest.raises(masa.MasaError, match="has no Hugging Face config"):
        masa.save(masa.share(plain_vit(), "masa"), tmp_path)
    with pytest.raises(masa.MasaError, match="no list of transformer blocks"):
        masa.share(timm.create_model("test_resnet"), "masa")


def test_a_vit_checkpoint_of_another_size_is_refused(tmp_path):
    masa.save(wrapped("masa"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["img_size"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(masa.MasaError, match="pos_embed has shape"):
        masa.load(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_language_models_do_not_import_timm(tmp_path):
    code = (
        "import sys, masa, masa.training.language; from masa.models import language;"
        "sizes = dict(num_layers=3, hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=8);"
        "m = language.build(sizes, {'method': 'masa'}, 8); masa.save(m, sys.argv[1]); masa.load(sys.argv[1]);"
        "bad = sorted(m for m in sys.modules if m.split('.')[0] == 'timm'); assert not bad, bad[:9]"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
