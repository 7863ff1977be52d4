"""One pass of statistics: right, reusable, bounded and loud about what is broken."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from compression_models import LAYERS, VOCABULARY, WIDTH, projection_inputs, statistics, tiny_llama, tokens, weight

from masa.compression import Calibration, calibrate, compress
from masa.compression.calibration.statistics import model_sha256, tokens_sha256
from masa.errors import MasaError


def test_autocorrelations_are_those_of_a_plain_forward_pass():
    inputs = projection_inputs(tiny_llama(), tokens())
    for layer in range(LAYERS):
        for letter, source in zip("qkvo", "qqqo", strict=True):
            x = inputs[source, layer]
            exact = x.T @ x
            found = statistics().gram(letter, layer)
            assert found.dtype == torch.float64
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


def test_mean_outputs_and_drift_are_those_of_the_hidden_states():
    model = tiny_llama()
    caught = []
    for block in model.model.layers:
        block.register_forward_hook(lambda m, a, out: caught.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(tokens())
    means = torch.stack([out.mean((0, 1)) for out in caught])
    for layer in range(LAYERS):
        torch.testing.assert_close(statistics().mean_output(layer), means[layer], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        p = model.lm_head(model.model.norm(means)).softmax(-1).double()
    exact = [(p[i] * (p[i] / p[i + 1]).log()).sum().item() for i in range(LAYERS - 1)]
    assert statistics().drift == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_batch_size_does_not_matter(batch_size):
    found = calibrate(tiny_llama(), tokens(), batch_size=batch_size)
    for layer in (0, LAYERS - 1):
        a, b = found.gram("o", layer), statistics().gram("o", layer)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_calibration_leaves_the_model_as_it_was():
    model = tiny_llama().train()
    before = copy.deepcopy(model.state_dict())
    calibrate(model, tokens())
    assert model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_saved_statistics_are_read_back_bit_by_bit_and_give_the_same_compression(tmp_path):
    streamed = calibrate(tiny_llama(), tokens(), directory=tmp_path / "streamed")
    statistics().save(tmp_path / "saved")
    streamed.save(tmp_path / "copied")
    for found in (streamed, *(Calibration.load(tmp_path / name) for name in ("streamed", "saved", "copied"))):
        assert torch.equal(found.gram("q", 2), statistics().gram("q", 2))
        assert found.drift == statistics().drift
    data = json.loads((tmp_path / "saved" / "calibration.json").read_text())
    assert data["tokens_sha256"] == tokens_sha256(tokens())
    assert data["model_sha256"] == model_sha256(tiny_llama())
    one, _ = compress(tiny_llama(), "svd-global", statistics())
    two, _ = compress(tiny_llama(), "svd-global", tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_directory_keeps_no_statistics_in_memory(tmp_path):
    assert not calibrate(tiny_llama(), tokens(), directory=tmp_path)._layers


def test_a_bfloat16_model_is_calibrated_in_float32_block_by_block():
    model = tiny_llama().to(torch.bfloat16)
    found = calibrate(model, tokens(), dtype=torch.float32)
    exact = calibrate(copy.deepcopy(model).float(), tokens())
    assert next(model.parameters()).dtype == torch.bfloat16
    a, b = found.gram("o", LAYERS - 1), exact.gram("o", LAYERS - 1)
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.01 * float(b.abs().max()))
    compressed, _ = compress(model, "matrix-pca", found, 0.2)
    assert {p.dtype for p in compressed.model.shared.parameters()} == {torch.bfloat16}


def test_the_feed_forward_network_can_be_calibrated_and_compressed_too():
    letters = "qkvogud"
    model = tiny_llama()
    found = calibrate(model, tokens(), projections=letters)
    assert found.gram("d", 0).shape == (64, 64) and found.gram("g", 0).shape == (WIDTH, WIDTH)
    _, report = compress(model, "svd-global", found, 0.2, projections=letters)
    assert 0.2 <= report.reduction_achieved < 0.21
    assert report.parameters_before - report.parameters_after == report.dense - report.stored
    with pytest.raises(MasaError, match="'gu'"):
        compress(tiny_llama(), "svd-global", statistics(), 0.2, projections=letters)


def test_other_models_and_changed_weights_have_other_hashes():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-6
    assert len({model_sha256(m) for m in (model, tiny_llama(), tiny_llama().to(torch.bfloat16))}) == 3
    assert tokens_sha256(tokens()) != tokens_sha256(tokens().view(4, 48))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(0, 4, dtype=torch.long), r"\(N, T\)"),
        (torch.zeros(4, dtype=torch.long), r"\(N, T\)"),
        (torch.rand(2, 4), "integers"),
        ([[1, 2], [3]], "one length"),
        (torch.full((2, 4), VOCABULARY), "vocabulary"),
    ],
)
def test_bad_tokens_are_refused(ids, message):
    with pytest.raises(MasaError, match=message):
        calibrate(tiny_llama(), ids)


def test_broken_weights_and_activations_are_named():
    model = tiny_llama()
    weight(model, "o", 2)[0, 0] = float("inf")
    with pytest.raises(MasaError, match=r"'o'.*layer 2"):
        calibrate(model, tokens())
    model = tiny_llama()
    model.model.layers[4].input_layernorm.weight.data[0] = float("nan")
    with pytest.raises(MasaError, match="q/k/v of layer 4"):
        calibrate(model, tokens())
    with pytest.raises(MasaError, match="shares weights already"):
        calibrate(compress(tiny_llama(), "svd")[0], tokens())


def test_damaged_folders_are_named(tmp_path):
    with pytest.raises(MasaError, match="no finished calibration"):
        Calibration.load(tmp_path)
    statistics().save(tmp_path)
    (tmp_path / "layer-003.safetensors").write_bytes(b"short")
    with pytest.raises(MasaError, match=r"layer-003.*corrupt"):
        Calibration.load(tmp_path).gram("q", 3)
    (tmp_path / "layer-003.safetensors").unlink()
    with pytest.raises(MasaError, match=r"layer-003.*missing"):
        Calibration.load(tmp_path)
    (tmp_path / "calibration.json").write_text('{"format": 7}')
    with pytest.raises(MasaError, match="format 7"):
        Calibration.load(tmp_path)


def test_an_interrupted_calibration_leaves_nothing_that_looks_finished(tmp_path):
    calibrate(tiny_llama(), tokens(), directory=tmp_path)

    def interrupt(what, done, of):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_llama(), tokens(), directory=tmp_path, progress=interrupt)
    with pytest.raises(MasaError, match="no finished calibration"):
        Calibration.load(tmp_path)


def test_gradient_moments_are_those_of_autograd():
    """For one token there is nothing to average: G is the outer product of the gradient with itself."""
    model, ids = tiny_llama(), tokens(1, 1)
    found = calibrate(model, ids, gradient_samples=1)
    probabilities = model(ids).logits[0, -1].softmax(-1)
    outputs = {}
    layer = model.model.layers[2].self_attn
    handle = layer.v_proj.register_forward_hook(lambda m, a, out: outputs.setdefault("v", out))
    candidates = []
    for label in range(VOCABULARY):
        outputs.clear()
        logits = model(ids).logits[0]
        (g,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, torch.tensor([label])), outputs["v"])
        candidates.append(torch.outer(g.flatten(), g.flatten()).double())
    handle.remove()
    exact = found.gradient_gram("v", 2)
    distances = torch.stack([(c - exact).norm() for c in candidates])
    assert distances.min() < 1e-4 * exact.norm()  # the label drawn is one of the vocabulary's
    assert probabilities[distances.argmin()] > 0
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_gradients_are_saved_and_missed_where_there_are_none(tmp_path):
    statistics().save(tmp_path)
    found = Calibration.load(tmp_path)
    assert torch.equal(found.gradient_gram("o", 1), statistics().gradient_gram("o", 1))
    with pytest.raises(MasaError, match="gradient_samples"):
        compress(tiny_llama(), "svd-fisher", calibrate(tiny_llama(), tokens()))
