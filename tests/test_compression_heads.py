"""DirectShare and PostShare: whole heads read from earlier layers."""

from __future__ import annotations

import torch
from compression_models import LAYERS, statistics, tiny_llama, tokens, weight

import masa
from masa.compression import compress


def compressed(method: str, reduction: float, **options):
    return compress(tiny_llama(), method, statistics(), reduction, tokens=tokens(), **options)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()[:2]).logits


def test_shared_heads_are_copies_of_an_earlier_layer_that_keeps_its_own():
    model, report = compressed("direct-share", 0.3)
    dense, plain = tiny_llama(), masa.fold(model)
    index = model.model.shared["q"].index
    assert index.shape == (LAYERS, 2) and index.max() + 1 == model.model.shared["q"].num_heads
    shared = {tuple(row[:2]) for row in report.learned["shared"]["q"]}
    assert shared and all(layer > 0 for layer, _ in shared)
    rows, columns = weight(plain, "q", 0).shape[0] // 2, weight(plain, "o", 0).shape[1] // 2
    for layer in range(LAYERS):
        for head in range(2):
            q = weight(plain, "q", layer)[head * rows : (head + 1) * rows]
            o = weight(plain, "o", layer)[:, head * columns : (head + 1) * columns]
            own_q = weight(dense, "q", layer)[head * rows : (head + 1) * rows]
            own_o = weight(dense, "o", layer)[:, head * columns : (head + 1) * columns]
            assert torch.equal(q, own_q) == ((layer, head) not in shared)
            assert torch.equal(o, own_o) or (layer, head) in shared


def test_chains_of_shared_heads_end_at_a_root():
    from masa.compression.methods.head_sharing import Match, roots

    found = roots([Match((3, 0), (2, 1), 0.9), Match((2, 1), (1, 0), 0.8), Match((1, 1), (0, 0), 0.7)])
    assert found == {(3, 0): (1, 0), (2, 1): (1, 0), (1, 1): (0, 0)}


def test_identical_heads_are_found_first_and_shared_without_loss():
    model = tiny_llama()
    for letter in "qkv":
        w = weight(model, letter, 4)
        rows = len(w) // 2
        w[:rows] = weight(model, letter, 1)[rows:]
    columns = weight(model, "o", 4)
    columns[:, :24] = weight(model, "o", 1)[:, 24:]
    expected = logits(model)
    model, report = compress(model, "direct-share", None, 1 / (LAYERS * 2) - 0.01)
    assert report.learned["shared"]["k"][0][:4] == [4, 0, 1, 1]
    assert torch.equal(logits(model), expected)


def test_post_training_pulls_matched_heads_together():
    model, report = compressed("post-share", 0.25, steps=20, lr=1e-2, pull=0.9)
    losses = report.learned["losses"]
    assert losses[-1][1] < 0.8 * losses[0][1]
    assert not any(p.grad is not None for p in model.parameters())
