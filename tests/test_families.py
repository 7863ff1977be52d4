"""Every family of the table on a tiny model: found, split, shared, trained, saved, loaded, folded."""

import json
import logging
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT
from family_models import (
    CASES,
    COLUMNS,
    EXPERTS,
    GROUPED,
    LATENT,
    SPEC,
    TEXT,
    Case,
    cells,
    close,
    letters_of,
    outputs,
    rows,
    way,
)
from torch import nn

import masa
from masa.sharing.fused import FusedLinear
from masa.sharing.projections import family_of, model_shape
from masa.sharing.stacks import bank_of, stack_of

TITLES = pytest.mark.parametrize("title", CASES)


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


# ------------------------------------------------------------------------------------------ whose rows are whose


@TITLES
def test_splitting_and_joining_change_nothing(title):
    case = CASES[title]
    model = case.build()
    expected, before = outputs(model, case), {k: v.clone() for k, v in model.state_dict().items()}
    family = case.family(model)
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
        self.family = case.family(self.model)
        self.layer = max(set.intersection(*(set(self.family.layers(p)) for p in "qkv")))
        self.family.split(self.layer, "qkv")
        self.block = self.family.blocks[self.layer]
        self.inputs = {name: x[:1, :length] if name.endswith("ids") else x[:1] for name, x in case.inputs.items()}

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
        self.model(**self.inputs)
        for handle in handles:
            handle.remove()
        weights = torch.randn(seen["out"].shape[-1], generator=torch.Generator().manual_seed(3))
        (gradient,) = torch.autograd.grad((seen["out"][..., position, :] * weights).sum(), seen["by"])
        return float(gradient.abs().max())

    def rows(self, letter):
        return self.family.at(self.layer, letter).out_features

    def columns(self, letter):
        layout = self.family.place(self.layer, letter).layout
        if layout is None:
            return torch.arange(self.rows(letter))
        return layout.take(torch.arange(layout.groups * sum(layout.rows)), letter)


ALONE = {
    "GPT-OSS": "every head has a sink beside the keys",
    "Qwen3-Next": "the rows of Q hold a gate of the output as well",
}
"""Why a single position's output hangs on its query, too."""


@pytest.mark.parametrize("title", [t for t, c in CASES.items() if "input_ids" in c.inputs and "q" in letters_of(c)])
def test_queries_keys_and_values_are_what_they_are_called(title):
    """By what attention is: another position reads keys and values and no query; a single one reads its value alone."""
    two, one = Probe(CASES[title], 2), Probe(CASES[title], 1)
    assert two.of("q", 1) == 0
    assert two.of("k", 1) > 1e-8
    assert two.of("v", 1) > 1e-8
    if title not in ALONE:
        assert one.of("q", 0) < 1e-8
        assert one.of("k", 0) < 1e-8
    assert one.of("v", 0) > 1e-8


# --------------------------------------------------------------------------------- some projections, some of the blocks


@pytest.mark.parametrize("title", [t for t, c in CASES.items() if c.family().fused])
@pytest.mark.parametrize("letter", ["v", "q", "u"])
def test_one_projection_of_a_fused_layer(title, letter, tmp_path):
    """The rows of the others keep their values and their places, in the family's own order, through save and fold."""
    case = CASES[title]
    plain = case.build()
    family = case.family(plain)
    if letter not in family.paths or "." not in family.paths[letter]:
        pytest.skip(f"no {letter}")
    before = {p: family.at(1, p).weight.clone() for p in family.paths}
    model = masa.share(plain, SPEC | {"projections": letter}, stack=case.stack)
    expected, wanted = outputs(model, case), bank_of(model).weight(letter, 1).detach()
    model.save_pretrained(tmp_path)
    back = masa.load(tmp_path)
    close(outputs(back, case), expected, "loaded")
    folded = masa.fold(back)
    close(outputs(folded, case), expected, "folded")
    family = case.family(folded)
    for p in family.paths:
        torch.testing.assert_close(family.at(1, p).weight, wanted if p == letter else before[p], rtol=0, atol=0)


def test_a_hybrid_shares_in_the_blocks_that_have_it_and_says_so_once(caplog, tmp_path):
    case = CASES["Qwen3-Next"]
    with caplog.at_level(logging.WARNING, "masa"):
        model = masa.share(case.build(), {"method": "masa", "atoms": "L/2", "projections": "qkvo"})
    said = [record.getMessage() for record in caplog.records if record.name == "masa"]
    assert said == [
        "masa: 2 of 8 blocks have all of q, k, v, o; in the others what is missing is passed over "
        "(linear_attn: Qwen3NextGatedDeltaNet, mlp: Qwen3NextSparseMoeBlock)."
    ]
    shared = bank_of(model)
    assert shared["q"].num_layers == 2, "L is the number of blocks that have Q"
    assert shared["q"].num_atoms == 1
    model.save_pretrained(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert description["format"] == 3
    assert description["layers"] == {p: [3, 7] for p in "qkvo"}
    assert bank_of(masa.load(tmp_path)).layers == dict.fromkeys("qkvo", (3, 7))
    dense = sum(m.weight.numel() for n, m in case.build().named_modules() if n.endswith(("q_proj", "k_proj", "v_proj")))
    dense += sum(m.weight.numel() for n, m in case.build().named_modules() if n.endswith("o_proj"))
    counted = masa.count_parameters(model)
    assert counted.attention_dense == dense
    assert counted.attention == dense // 2 + 4 * 2


def test_numbers_in_layers_are_those_of_each_projection():
    """One dense block before those of experts: L is 1 for its FFN and 2 for attention."""
    case = CASES["GLM-4-MoE"]
    model = masa.share(case.build(), {"method": "masa", "atoms": "L", "projections": "qu"})
    assert {p: bank_of(model)[p].num_atoms for p in "qu"} == {"q": 2, "u": 1}
    with pytest.raises(masa.MasaError, match=r"sets = 'L/1': L is not one number here \(q: 2, u: 1 blocks\)"):
        masa.share(case.build(), {"method": "sequential", "sets": "L/1", "projections": "qu"})
    with pytest.raises(masa.MasaError, match="more than L = 1"):
        masa.share(case.build(), {"method": "masa", "atoms": 2, "projections": "qu"})
    with pytest.raises(masa.MasaError, match="needs the same layers, but 'gu' is in g: 1, u: 2 blocks"):
        shape = model_shape(plain := case.build(), family_of(plain))
        odd = type(shape)(2, 32, 4, 4, shape.shapes, {"g": (0,)})
        masa.SharingSpec("masa", projections="gu", atoms=1, dictionaries=("gu",)).resolve(odd)
    mlp = masa.share(case.build(), {"method": "masa", "atoms": 1, "coefficients": "mlp", "projections": "qku"})
    assert outputs(mlp, case).isfinite().all()


def test_weights_are_made_once_a_forward_pass_where_the_model_calls_its_decoder_past_the_base():
    for title in ("OPT", "BERT", "LLaVA", "Whisper"):
        case = CASES[title]
        model = masa.share(case.build(), SPEC | {"projections": "qv"}, stack=case.stack)
        made, make = [], bank_of(model).make
        bank_of(model).make = lambda made=made, make=make: made.append(1) or make()
        model(**case.inputs)
        assert made == [1], title
        assert stack_of(model).home.shared is bank_of(model)


# ------------------------------------------------------------------------------------------ what is refused

STAGES = {"depths": [2, 2], "num_heads": [2, 2], "window_size": 2}
REFUSED = {
    "experts": (
        "MixtralForCausalLM",
        "u",
        EXPERTS,
        {},
        "no projection u of its own .*MixtralSparseMoeBlock.* q, k, v, o",
    ),
    "latent": (
        "DeepseekV3ForCausalLM",
        "qkvo",
        EXPERTS,
        LATENT,
        "no projection q, k, v of its own .*kv_a_proj_with_mqa",
    ),
    "state": ("MambaForCausalLM", "qkvo", TEXT, {}, r"no list of transformer blocks with attention .*MambaBlock"),
    "shapes": ("MiMoV2FlashForCausalLM", "qkvo", EXPERTS, {"swa_num_key_value_heads": 4}, "has k in several shapes"),
    "stacks": ("T5Model", "qkvo", TEXT, {"d_model": 32, "num_layers": 2}, r"2 stacks .*stack='decoder.block'"),
    "stages": ("SwinModel", "qkvo", {"image_size": 16, "patch_size": 2, "embed_dim": 16}, STAGES, "2 stacks"),
    "gate": ("BertForMaskedLM", "qg", TEXT, {}, "no projection g of its own .* q, k, v, o, u, d"),
    "gqa": ("BertForMaskedLM", None, TEXT, {}, "'gqa' does not exist for BertForMaskedLM"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refusal_is_one_short_sentence_that_says_what_is_there(kind):
    name, projections, base, sizes, message = REFUSED[kind]
    model = Case(kind, name, sizes, base).build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    spec = SPEC | {"projections": projections} if projections else {"method": "gqa", "num_key_value_heads": 1}
    with pytest.raises(masa.MasaError, match=message) as refusal:
        masa.share(model, spec)
    said = str(refusal.value)
    assert len(said) < 330
    assert said.count("\n") == 0
    assert kind == "gqa" or said.endswith("(docs/howto/family.md).")
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items()), "nothing is half done"


def test_a_stack_that_is_not_there_is_refused():
    with pytest.raises(masa.MasaError, match=r"no stack of blocks 'decoder.layers'; there are 'encoder.block', 'dec"):
        masa.share(CASES["T5"].build(), SPEC, stack="decoder.layers")


def test_a_part_that_was_shared_by_itself_is_saved_with_the_whole(tmp_path):
    case = CASES["Whisper"]
    model = case.build()
    masa.share(model.model.decoder, SPEC | {"projections": "qkv"})
    expected = outputs(model, case)
    masa.save(model, tmp_path)
    back = masa.load(tmp_path)
    close(outputs(back, case), expected, "loaded")
    assert back.sharing.spec.projections == "qkv"
    close(outputs(masa.fold(model), case), expected, "folded")


# ------------------------------------------------------------------------------------------ families nobody ever named


class Attention(nn.Module):
    """Llama's by hand, under the names of a family that does not exist."""

    def __init__(self, names, width=16, heads=2, groups=1):
        super().__init__()
        self.head_dim, self.n_heads, self.groups = width // heads, heads, groups
        for name, out in names.items():
            self.add_module(name, nn.Linear(width, out, bias=False))


def model_of(attention, path, lists="stages", **ffn):
    """A list of two blocks with attention at a path and an FFN."""
    blocks = []
    for _ in range(2):
        block = nn.Module()
        block.add_module(path, attention())
        mlp = nn.Module()
        for name, layer in ffn.items():
            mlp.add_module(name, layer())
        block.add_module("feed_forward", mlp)
        blocks.append(block)
    model = nn.Module()
    model.add_module(lists, nn.ModuleList(blocks))
    return model


def test_a_family_of_known_parts_needs_no_entry():
    names = {"query": 16, "key": 8, "value": 8, "out_proj": 16}
    model = model_of(
        lambda: Attention(names),
        "self_attention",
        up_proj=lambda: nn.Linear(16, 24),
        down_proj=lambda: nn.Linear(24, 16),
    )
    family = family_of(model)
    assert dict(family.paths) == {
        "q": "self_attention.query",
        "k": "self_attention.key",
        "v": "self_attention.value",
        "o": "self_attention.out_proj",
        "u": "feed_forward.up_proj",
        "d": "feed_forward.down_proj",
    }
    shape = model_shape(model, family)
    assert (shape.num_layers, shape.hidden_size, shape.num_attention_heads, shape.num_key_value_heads) == (2, 16, 2, 1)
    masa.share(model, SPEC | {"projections": "qkvoud"})
    assert bank_of(model).projections == "qkvoud"


@pytest.mark.parametrize(
    ("path", "fused", "out", "order"),
    [
        ("self_attn", "W_pack", "o_proj", [("q", 16), ("k", 8), ("v", 8)]),  # Baichuan's, with fewer keys
        ("attention", "wqkv", "wo", [("q", 16), ("k", 8), ("v", 8)]),  # InternLM 2, one key/value head
    ],
)
def test_fused_layers_of_models_with_code_of_their_own(path, fused, out, order):
    model = model_of(lambda: Attention({fused: 32, out: 16}), path)
    family, weight = family_of(model), getattr(getattr(model.stages[0], path), fused).weight
    start = 0
    for letter, count in order:
        assert torch.equal(family.at(0, letter).weight, weight[start : start + count])
        start += count


def test_heads_that_take_turns_in_groups():
    """InternLM 2 with two key/value heads: [q q k v] for each of them."""
    model = model_of(lambda: Attention({"wqkv": 64, "wo": 32}, width=32, heads=4), "attention")
    weight = model.stages[0].attention.wqkv.weight.view(2, 4, 8, 32)
    family = family_of(model)
    assert torch.equal(family.at(0, "q").weight, weight[:, :2].reshape(32, 32))
    assert torch.equal(family.at(0, "k").weight, weight[:, 2].reshape(16, 32))
    assert torch.equal(family.at(0, "v").weight, weight[:, 3].reshape(16, 32))


@pytest.mark.parametrize("odd", ["an order that nobody knows", "sizes that do not fit", "another family's"])
def test_a_fused_layer_is_never_guessed(odd):
    names = {
        "an order that nobody knows": {"in_proj": 48, "o_proj": 16},
        "sizes that do not fit": {"qkv": 33, "proj": 16},
    }
    attention = lambda: Attention(names.get(odd, {"query_key_value": 32, "dense": 16}))  # noqa: E731
    path = {"an order that nobody knows": "self_attn", "sizes that do not fit": "attn"}.get(odd, "self_attention")
    model = model_of(attention, path)
    if odd == "another family's":  # ChatGLM's has the names of BLOOM's and another order
        for block in model.stages:
            block.self_attention.core_attention = nn.Identity()
    with pytest.raises(masa.MasaError, match="no list of transformer blocks"):
        masa.share(model, SPEC)


def test_attention_with_a_state_and_attention_to_others_are_no_self_attention():
    names = {"q_proj": 16, "k_proj": 16, "v_proj": 16, "o_proj": 16}

    def delta():
        attention = Attention(names)
        attention.A_log = nn.Parameter(torch.zeros(2))
        return attention

    for model in (model_of(delta, "self_attn"), model_of(lambda: Attention(names), "cross_attn")):
        with pytest.raises(masa.MasaError, match="no list of transformer blocks"):
            family_of(model)


def test_subclasses_of_linear_that_compute_otherwise_are_not_taken():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = CASES["Llama"].build()
    for block in model.model.layers:
        block.mlp.up_proj.__class__ = Doubled
    with pytest.raises(masa.MasaError, match="no projection u of its own"):
        masa.share(model, SPEC | {"projections": "u"})


def test_a_model_on_no_device_is_shared_too():
    for title in ("Phi-3", "GPT-2", "BLOOM", "Qwen3-Next"):
        case = CASES[title]
        with torch.device("meta"):
            model = masa.share(case.build(), SPEC | {"projections": "qkvo"})
        assert masa.count_parameters(model).attention < masa.count_parameters(model).attention_dense


def test_grouped_heads_in_another_family():
    case = Case("Qwen3", "Qwen3ForCausalLM", {"num_key_value_heads": 4}, GROUPED)
    model = masa.share(case.build(), {"method": "gqa", "num_key_value_heads": 2})
    again = transformers.Qwen3ForCausalLM(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(outputs(model, case), outputs(again, case))
