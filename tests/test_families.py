"""Every family of the table on a tiny model: found, split, shared, trained, saved, loaded, folded."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from family_models import (
    CASES,
    COLUMNS,
    cells,
    close,
    letters_of,
    outputs,
    rows,
    way,
)

from masa.sharing.fused import FusedLinear
from masa.sharing.projections import family_of

TITLES = pytest.mark.parametrize("title", CASES)
FUSED = [title for title in CASES if family_of(CASES[title].build()).fused]


@TITLES
def test_the_table_is_up_to_date(title):
    """A row says what happens: `python tests/family_models.py` writes the table."""
    columns = [name for name in COLUMNS if name != "GGUF" or (ROOT / "cache").is_dir()]
    written = rows()[title]
    assert {name: written[name] for name in columns} == cells(CASES[title], columns)


def test_the_table_has_every_family_and_no_other():
    assert list(rows()) == list(CASES)
    assert len(CASES) >= 35


def test_folded_folders_load_without_masa():
    """In a process that never imports masa: the ordinary class, the same outputs."""
    code = """
import sys, torch, transformers
transformers.logging.set_verbosity_error()
for kind, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    model, found = getattr(transformers, kind).from_pretrained(folder + "/plain", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"], (kind, found)
    saved = torch.load(folder + "/outputs.pt")
    with torch.no_grad():
        made = model.eval()(**saved["inputs"])
    made = next(made[name] for name in ("logits", "last_hidden_state") if name in made)
    assert (made - saved["expected"]).abs().max() <= 4e-6 * max(1, made.abs().max()), kind
assert "masa" not in sys.modules
"""
    folders = [part for title, case in CASES.items() for part in (case.kind, str(way(title).folded.parent))]
    subprocess.run([sys.executable, "-c", code, *folders], check=True, cwd=ROOT)


# ------------------------------------------------------------------------------------------------- whose rows are whose


@TITLES
def test_splitting_and_joining_change_nothing(title):
    case = CASES[title]
    model = case.build()
    expected, before = outputs(model, case), {k: v.clone() for k, v in model.state_dict().items()}
    family = family_of(model)
    for layer in range(len(family.blocks)):
        family.split(layer, "qkvogud")
    assert sum(isinstance(m, FusedLinear) for m in model.modules()) == len(family.fused) * len(family.blocks)
    close(outputs(model, case), expected, "split")
    for name, module in list(model.named_modules()):
        if isinstance(module, FusedLinear):
            model.set_submodule(name, module.join())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(outputs(model, case), expected)


class Probe:
    """The gradient of one position's output by what one layer's projections say at the first position."""

    def __init__(self, case, length):
        self.model = case.build()
        self.family = family_of(self.model)
        self.layer = max(self.family.layers("q"))
        self.family.split(self.layer, "qkv")
        self.block = self.family.blocks[self.layer]
        self.ids = case.inputs["input_ids"][:1, :length]

    def of(self, letter, position):
        """Largest entry: how much the output of the *block* at a position hangs on the projection at the first one."""
        seen, handles = {}, []

        def watch(module, args, output):
            # what the layer makes of the first position, moved by a variable
            seen["by"] = torch.zeros(self.rows(letter), requires_grad=True)
            moved = output.clone()
            moved[:, 0, self.columns(letter)] = moved[:, 0, self.columns(letter)] + seen["by"]
            return moved

        def keep(module, args, output):
            seen["out"] = output[0] if isinstance(output, tuple) else output

        place = self.family.place(self.layer, letter)
        handles.append(self.block.get_submodule(place.path).register_forward_hook(watch))
        handles.append(self.block.register_forward_hook(keep))
        self.model(input_ids=self.ids)
        for handle in handles:
            handle.remove()
        weights = torch.randn(seen["out"].shape[-1], generator=torch.Generator().manual_seed(3))
        (gradient,) = torch.autograd.grad((seen["out"][0, position] * weights).sum(), seen["by"])
        return float(gradient.abs().max())

    def rows(self, letter):
        return self.family.at(self.layer, letter).out_features

    def columns(self, letter):
        layout = self.family.place(self.layer, letter).layout
        if layout is None:
            return torch.arange(self.rows(letter))
        return layout.take(torch.arange(layout.groups * sum(layout.rows)), letter)


@pytest.mark.parametrize("title", [t for t, c in CASES.items() if "input_ids" in c.inputs and "q" in letters_of(c)])
def test_queries_keys_and_values_are_what_they_are_called(title):
    """By what attention is: another position reads keys and values and no query; a single one reads its value alone."""
    two, one = Probe(CASES[title], 2), Probe(CASES[title], 1)
    assert two.of("q", 1) == 0
    assert two.of("k", 1) > 1e-8
    assert two.of("v", 1) > 1e-8
    assert one.of("q", 0) < 1e-8
    assert one.of("k", 0) < 1e-8
    assert one.of("v", 0) > 1e-8
