"""Gradients, block by block: those of the whole graph, of every kind of model, in the memory of one block."""

from __future__ import annotations

import weakref

import pytest
import torch
from compression_models import LAYERS, VOCABULARY, tiny_llama, tokens

from masa.compression import calibrate
from masa.compression.calibration import gradients
from masa.errors import MasaError
from masa.sharing.projections import family_of
from masa.study.cost import compression as cost

SAMPLES, SIZE = 5, 2
"""Sequences that run backward, of eight, and how many at once: the last batch is only a part."""


def starcoder2(**changes):
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    return _other(Starcoder2Config, Starcoder2ForCausalLM, sliding_window=None)


def granite(**changes):
    """Its embeddings, residuals and logits are scaled."""
    from transformers import GraniteConfig, GraniteForCausalLM

    scales = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 0.2}
    return _other(GraniteConfig, GraniteForCausalLM, **scales)


def _other(config, model, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15}
    return model(config(**sizes, **heads, max_position_embeddings=64, **changes)).eval()


MODELS = {
    "tied": tiny_llama,
    "untied": lambda: tiny_llama(tie_word_embeddings=False),
    "every head its own keys": lambda: tiny_llama(num_key_value_heads=4),
    "one head of keys": lambda: tiny_llama(num_key_value_heads=1),
    "starcoder2": starcoder2,
    "granite": granite,
}


def of_the_whole_graph(model, ids, dtype):
    """G of every projection by autograd alone: all blocks, all tokens and all logits in one graph of one dtype.

    Labels are drawn of the float32 model's predictions, as they are there.
    """
    paths, blocks, outputs = family_of(model).paths, model.base_model.layers, {}
    with torch.no_grad():
        probabilities = model(ids).logits.flatten(0, 1).float().softmax(-1)
    labels = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(0)).flatten()
    model.to(dtype)
    for layer, block in enumerate(blocks):
        for letter, path in paths.items():
            key = letter, layer
            block.get_submodule(path).register_forward_hook(lambda m, a, out, key=key: outputs.update({key: out}))
    loss = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), labels, reduction="sum")
    found = torch.autograd.grad(loss, list(outputs.values()))
    rows = {key: g.flatten(0, 1).double() for key, g in zip(outputs, found, strict=True)}
    return {key: g.T @ g / len(g) for key, g in rows.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 2e-6)])
@pytest.mark.parametrize("name", MODELS)
def test_they_are_those_of_the_whole_graph(name, dtype, tolerance):
    model = MODELS[name]()
    letters = "".join(family_of(model).paths)
    found = calibrate(model, tokens(), projections=letters, batch_size=SIZE, gradient_samples=SAMPLES)
    exact = of_the_whole_graph(MODELS[name](), tokens()[:SAMPLES], dtype)
    assert found.gradient_samples == SAMPLES and len(exact) == len(letters) * found.num_layers
    for (letter, layer), g in exact.items():
        assert float(g.norm()) > 0
        assert float((found.gradient_gram(letter, layer) - g).norm() / g.norm()) < tolerance, (letter, layer)


def test_neither_batches_nor_chunks_of_logits_change_the_labels(monkeypatch):
    whole = calibrate(tiny_llama(), tokens(), batch_size=8, gradient_samples=8)
    monkeypatch.setattr(gradients, "LOGITS", 7 * VOCABULARY)
    cut = calibrate(tiny_llama(), tokens(), batch_size=3, gradient_samples=8)
    for letter in "qkvo":
        for layer in range(LAYERS):
            a, b = whole.gradient_gram(letter, layer), cut.gradient_gram(letter, layer)
            assert float((a - b).norm() / a.norm()) < 2e-6


def test_one_block_has_a_graph_at_a_time():
    """Numbers that are held for a backward pass, at their most: as many in a deep model as in a shallow one."""

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor

    def most(layers, work):
        model, alive, counts = tiny_llama(num_hidden_layers=layers), weakref.WeakSet(), []
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}  # there anyway

        def hold(tensor):
            held = Held(tensor)
            if tensor.untyped_storage().data_ptr() not in weights:
                alive.add(held)
            counts.append(sum(held.tensor.numel() for held in alive))
            return held

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda held: held.tensor):
            work(model)
        return max(counts)

    def ours(model):
        calibrate(model, tokens(), gradient_samples=8)

    assert most(2, ours) == most(6, ours)
    assert most(6, lambda model: model(tokens()).logits.sum().backward()) > 2 * most(6, ours)


@pytest.mark.parametrize("batch_size", [3, 8])
def test_what_enters_the_blocks_lies_in_files_and_changes_no_bit(batch_size, tmp_path, monkeypatch):
    """Memory holds none of it, and nothing is left, whatever a killed calibration had left there."""
    left_over = tmp_path / "statistics" / gradients.FOLDER / "0-0"
    left_over.parent.mkdir(parents=True)
    left_over.write_text("cut sh")
    kept, keep = [], gradients.BlockInputs.keep

    def watched(inputs):
        keep(inputs)
        kept.append(sum(file.stat().st_size for file in inputs.folder.iterdir()))
        assert not any(isinstance(batch, torch.Tensor) for batches in inputs._kept for batch in batches)

    known = {"batch_size": batch_size, "gradient_samples": SAMPLES}
    in_memory = calibrate(tiny_llama(), tokens(), **known)
    monkeypatch.setattr(gradients.BlockInputs, "keep", watched)
    found = calibrate(tiny_llama(), tokens(), directory=left_over.parents[1], **known)
    inputs = SAMPLES * tokens().shape[1] * tiny_llama().config.hidden_size * 4
    assert len(kept) == LAYERS and all(inputs < now / n < 2 * inputs + 10_000 for n, now in enumerate(kept, 1))
    assert not left_over.parent.exists()
    for layer in range(LAYERS):
        assert torch.equal(found.gradient_gram("v", layer), in_memory.gradient_gram("v", layer))


def test_nothing_is_left_where_gradients_stop_half_way(tmp_path, monkeypatch):
    monkeypatch.setattr(gradients, "not_finite", lambda moments: ["q"])
    with pytest.raises(MasaError, match="NaN or infinity in the gradients"):
        calibrate(tiny_llama(), tokens(), directory=tmp_path, gradient_samples=2)
    assert not (tmp_path / gradients.FOLDER).exists()


def test_more_sequences_than_there_are_means_all_of_them():
    all_of_them = calibrate(tiny_llama(), tokens(), gradient_samples=8)
    found = calibrate(tiny_llama(), tokens(), gradient_samples=100)
    assert found.gradient_samples == 8
    assert torch.equal(found.gradient_gram("o", 1), all_of_them.gradient_gram("o", 1))


def test_a_bfloat16_model_may_have_gradients_in_float32():
    model = tiny_llama().to(torch.bfloat16)
    found = calibrate(model, tokens(), dtype=torch.float32, gradient_samples=8)
    exact = calibrate(tiny_llama(), tokens(), gradient_samples=8)
    assert next(model.parameters()).dtype == torch.bfloat16
    ratio = float(found.gradient_gram("v", 2).trace() / exact.gradient_gram("v", 2).trace())
    assert 0.5 < ratio < 2  # some labels differ


def test_the_model_is_left_as_it_was():
    model = tiny_llama()
    model.model.layers[1].requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: forward(*args, **kwargs)  # as accelerate wraps it
    wrapped = model.model.forward
    found = calibrate(model, tokens(), gradient_samples=8)
    assert model.model.forward is wrapped
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    plain = calibrate(tiny_llama(), tokens(), gradient_samples=8)
    assert torch.equal(found.gradient_gram("q", 0), plain.gradient_gram("q", 0))


def test_broken_gradients_are_named():
    model = tiny_llama(attention_bias=False)

    def overflow(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda g: g * float("inf"))

    model.model.layers[3].self_attn.o_proj.register_forward_hook(overflow)
    with pytest.raises(MasaError, match=r"gradients at the output of '\w' of layer 3"):
        calibrate(model, tokens(), gradient_samples=2)
    assert all(p.requires_grad for p in model.parameters())


def test_the_plan_knows_how_many_logits_there_are_at_once():
    assert cost.LOGITS == gradients.LOGITS
