"""What compression makes of a family's tiny model: two columns of the table of :mod:`family_models`, and their tests.

The statistics are compared with those of the whole model: one forward and one backward pass, hooks on the projections,
in float64 where the model's own code runs in it.
"""

import tempfile
from functools import cache

import torch
from family_models import CASES, VOCABULARY, close, letters_of, outputs

import masa
from masa.compression import calibrate, compress
from masa.errors import MasaError
from masa.sharing.families import layer_at
from masa.sharing.projections import family_of

SAMPLES, BATCH = 3, 2
"""Sequences, and how many run at once: the last batch is only a part."""
METHODS = ("svd-llm", "matrix-pca", "svd-fisher")
SINGLE = {"XGLM": "its mask is written for float32", "Qwen3-Next": "its recurrence computes in float32"}
"""Models whose code does not run in float64, or not all of it."""
ROUNDED = ("Jamba", "Qwen3-Next")
"""Models whose recurrences round more."""


def tokens():
    return torch.randint(4, VOCABULARY, (SAMPLES, 12), generator=torch.Generator().manual_seed(1))


def language(case):
    """The case's model, or MasaError: no tokens go into those of images and sound."""
    model = case.build()
    if "input_ids" not in case.inputs:
        calibrate(model, tokens(), projections=letters_of(case))
        raise AssertionError("images and sound have no tokens to calibrate on")
    return model


@cache
def statistics(title):
    case = CASES[title]
    options = {"projections": letters_of(case), "gradient_samples": SAMPLES, "batch_size": BATCH}
    return calibrate(language(case), tokens(), **options)


@cache
def refusal(title):
    """Why a family cannot be calibrated, or None."""
    try:
        statistics(title)
    except MasaError as error:
        return str(error)
    return None


def of_the_whole_model(model, ids, letters, dtype=torch.float64):
    """(letter, block) -> H of the projection's inputs and G of the gradients at its outputs, by autograd alone.

    Labels are drawn of the float32 model's predictions.
    """
    seen = {}
    with torch.no_grad():
        probabilities = model(input_ids=ids).logits.flatten(0, 1).float().softmax(-1)
    labels = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(0)).flatten()
    model.config._experts_implementation = "eager"  # no other runs in float64
    family = family_of(model.to(dtype))
    for letter in letters:
        for layer in family.layers(letter):
            place = family.place(layer, letter)

            def keep(module, args, output, key=(letter, layer)):
                seen[key] = args[0].detach().flatten(0, -2).double(), output

            layer_at(family.blocks[layer], place.path).register_forward_hook(keep)
    loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels, reduction="sum")
    gradients = torch.autograd.grad(loss, [output for _, output in seen.values()])
    found = {}
    for (key, (x, _)), gradient in zip(seen.items(), gradients, strict=True):
        g, layout = gradient.flatten(0, -2).double(), family.place(key[1], key[0]).layout
        if layout is not None:  # a fused layer's: row by row, as the layout numbers them
            rows = torch.arange(layout.groups * sum(layout.rows))
            g = g[:, layout.take(rows, key[0])]
        found[key] = x.T @ x, g.T @ g / ids.numel()
    return found


def calibrated(case):
    """Every statistic is that of the whole model."""
    found, dtype = statistics(case.title), torch.float32 if case.title in SINGLE else torch.float64
    exact = of_the_whole_model(case.build(), tokens(), letters_of(case), dtype)
    same(found, exact, 1e-4 if case.title in ROUNDED else 1e-5)
    return "yes"


def same(found, exact, tolerance=1e-5):
    """Fail unless a calibration's statistics are these."""
    assert exact
    for (letter, layer), (gram, gradients) in exact.items():
        for ours, true in ((found.gram(letter, layer), gram), (found.gradient_gram(letter, layer), gradients)):
            apart = float((ours - true).norm() / true.norm())
            assert apart < tolerance, (letter, layer, apart)


def near(case, a, b, what):
    """As ``close``, a hundred times wider for models that round more."""
    close(*((x / 100 if case.title in ROUNDED else x) for x in (a, b)), what)


def compressed(case):
    """Every method's model is finite, smaller by what was asked for, equal when folded, and when saved and loaded."""
    letters = letters_of(case)
    for method in METHODS:
        model = language(case)
        total = sum(p.numel() for p in model.parameters())
        kinds = [type(module) for module in model.modules()]
        model, report = compress(model, method, statistics(case.title), 0.3, projections=letters)
        assert 0.3 <= report.reduction_achieved < 0.5
        expected = outputs(model, case)
        assert torch.isfinite(expected).all()
        assert not torch.equal(expected, outputs(case.build(), case))
        assert masa.count_parameters(model).total == total - report.dense + report.stored
        folded = masa.fold(model)
        assert [type(module) for module in folded.modules()] == kinds
        near(case, outputs(folded, case), expected, f"{method}, folded")
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            near(case, outputs(masa.load(folder), case), expected, f"{method}, saved and loaded")
    return "yes"
