"""Calibration and compression of other families: fused projections, some of the blocks, masks that differ by block."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import transformers
from compression_models import WHOLE_BLOCKS, letters
from family_compression import near, of_the_whole_model, refusal, same, statistics, tokens
from family_models import CASES, GROUPED, VOCABULARY, calibrate, close, compress, letters_of, outputs

import masa
from masa.compression import COMPRESSORS, Calibration
from masa.compression import calibrate as calibrated
from masa.compression import compress as compressed
from masa.compression.calibration import calls
from masa.errors import MasaError
from masa.sharing.projections import family_of

OTHERS = {
    "no tokens alone": ("T5", "BART", "Whisper"),
    "no loss": ("T5's encoder",),
    "keys and values of other blocks": ("Gemma 3n",),
    "no language model": [title for title, case in CASES.items() if "input_ids" not in case.inputs],
}


@pytest.mark.parametrize("title", [t for t in CASES if not any(t in titles for titles in OTHERS.values())])
def test_every_family_is_calibrated_and_compressed(title):
    assert calibrate(CASES[title]) == compress(CASES[title]) == "yes"


@pytest.mark.parametrize("title", [t for titles in OTHERS.values() for t in titles])
def test_others_are_refused_in_a_sentence(title):
    said = refusal(title)
    assert said is not None and len(said) < 300, said


def test_what_blocks_hand_on_beside_hidden_states_is_seen():
    """T5's first block makes the position bias of all."""
    model = CASES["T5's encoder"].build()
    with pytest.raises(MasaError, match="one at a time"):
        calibrated(model, tokens())


# -------------------------------------------------------------------------------------------- blocks that are not alike

FULL, WINDOW = "full_attention", "sliding_attention"
MIXED = {
    "Gemma2ForCausalLM": {"layer_types": [WINDOW, FULL, WINDOW], "attn_logit_softcapping": 2.0},
    "Gemma3ForCausalLM": {"layer_types": [WINDOW, WINDOW, FULL]},  # and other tables of RoPE
    "Olmo3ForCausalLM": {"layer_types": [WINDOW, FULL, WINDOW]},
    "Exaone4ForCausalLM": {"layer_types": [WINDOW, WINDOW, FULL]},
    "Cohere2ForCausalLM": {"layer_types": [WINDOW, FULL, WINDOW]},
    "Qwen2ForCausalLM": {"layer_types": [FULL, WINDOW, WINDOW], "use_sliding_window": True},
    "GptOssForCausalLM": {"layer_types": [WINDOW, FULL, WINDOW], "num_local_experts": 4},
    "MistralForCausalLM": {},
    "SmolLM3ForCausalLM": {"no_rope_layers": [1, 0, 1]},
    "GPTNeoForCausalLM": {"num_hidden_layers": 4, "num_layers": 4, "window_size": 4}
    | {"attention_types": [[["global", "local"], 2]]},
}
"""Models of which some blocks see 4 tokens back and others everything, or have RoPE or not."""


def mixed(kind, **changes):
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    sizes = GROUPED | {"num_hidden_layers": 3, "sliding_window": 4} | MIXED[kind] | changes
    known = {*vars(cls.config_class()), *(cls.config_class.attribute_map or {})}
    return cls(cls.config_class(**{k: v for k, v in sizes.items() if k in known})).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MIXED)
def test_every_block_has_its_own_mask_and_positions(kind, attention):
    def build():
        model = mixed(kind)
        if attention == "eager" or type(model)._supports_sdpa:
            model.set_attn_implementation(attention)
        return model

    letters = "".join(family_of(build()).paths)
    found = calibrated(build(), tokens(), projections=letters, batch_size=2, gradient_samples=3)
    same(found, of_the_whole_model(build(), tokens(), letters))


def test_masks_and_positions_of_all_batches_are_kept_once():
    from masa.compression.calibration.stream import BlockStream

    model = mixed("Gemma3ForCausalLM")
    stream = BlockStream(model, torch.randint(4, VOCABULARY, (12, 16)), batch_size=2)
    tensors = {
        id(t): t
        for found in stream._arguments.values()
        for call in found
        for value in call.kwargs.values()
        for t in (value if isinstance(value, tuple) else (value,))
        if isinstance(t, torch.Tensor)
    }
    assert len(stream._arguments) == 6
    assert len(tensors) <= 2 + 2 * 2 + 1  # a mask of each kind, RoPE's tables of each kind, position ids


def test_a_model_that_passes_more_from_block_to_block_is_refused():
    """Its last norm reads the embeddings again, and no block can be run by itself then."""
    model, first = mixed("MistralForCausalLM"), []
    model.model.layers[0].register_forward_pre_hook(lambda m, args, kwargs: first.append(args[0]), with_kwargs=True)
    norm = model.model.norm
    own = norm.forward
    norm.forward = lambda x: own(x + first[-1].mean((0, 1)))
    with pytest.raises(MasaError, match="passes more from block to block than hidden states"):
        calibrated(model, tokens())


def test_gradients_that_go_past_a_block_are_refused():
    """Gemma 4's last blocks read keys and values of earlier ones: forward all is right, backward a part is missing."""
    cls = transformers.Gemma4ForCausalLM
    sizes = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": [WINDOW, FULL] * 2, "sliding_window": 4}
    sizes |= {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "global_head_dim": 8}
    config = cls.config_class(**{k: v for k, v in GROUPED.items() if k in vars(cls.config_class())} | sizes)
    torch.manual_seed(0)
    model = cls(config).eval()
    letters = "".join(p for p in family_of(model).paths if len(family_of(model).shapes(p)) == 1)
    with pytest.raises(MasaError, match=r"gradients of blocks .*A calibration without gradients may do"):
        calibrated(model, tokens(), projections=letters, gradient_samples=3)
    found = calibrated(model, tokens(), projections=letters, batch_size=2)
    for (letter, layer), (gram, _) in of_the_whole_model(model, tokens(), letters, torch.float32).items():
        assert float((found.gram(letter, layer) - gram).norm() / gram.norm()) < 1e-5, (letter, layer)


def test_heads_of_another_width():
    """ELECTRA's and RemBERT's embeddings and heads are narrower than their blocks."""
    cls = transformers.ElectraForCausalLM
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = cls.config_class(**sizes, embedding_size=16, vocab_size=VOCABULARY, is_decoder=True)
    model = cls(config).eval()
    found = calibrated(model, tokens(), gradient_samples=3)
    assert len(found.drift) == 2 and all(value > 0 for value in found.drift)
    same(found, of_the_whole_model(model, tokens(), "qkvo"))


def test_a_projection_that_is_never_called_is_named():
    """As where a fused kernel reads the weight and passes the layer by."""
    model = mixed("MistralForCausalLM")
    attention = model.model.layers[1].self_attn
    own = attention.k_proj
    assert own.bias is None

    class Reading(torch.nn.Linear):
        def __call__(self, x):
            return torch.nn.functional.linear(x, self.weight)

    own.__class__ = Reading
    with pytest.raises(MasaError, match=r"'k' of layer 1 is not called.*leave it out"):
        calibrated(model, tokens(), projections="qkvo")
    assert calibrated(model, tokens(), projections="qo").inputs == ["qkv", "o"]


# ------------------------------------------------------------------------------------------ every method, some families

SPECIAL = ("Phi-3", "Qwen3-Next", "GPT-2", "GPT-NeoX", "Falcon, new decoder", "LFM2", "Mixtral", "OLMo", "Gemma 2")
"""Unequal parts, transposed layers, heads in turn, attention in some blocks, experts, norms without weights."""


REFUSED = {"GPT-2": "bias", "GPT-NeoX": "bias", "LFM2": "turned", "Qwen3-Next": "not made of 4 heads"}
REFUSED |= {"Falcon, new decoder": "turned"}
"""What keeps heads from being aligned; elsewhere they are."""

KEPT = {"GPT-2": "has a bias", "GPT-NeoX": "has a bias", "Mixtral": "MixtralForCausalLM has none that masa knows there"}
KEPT |= dict.fromkeys(("Qwen3-Next", "LFM2"), "has none that masa knows there")
NORMED = {"Gemma 2": "a norm comes after it"}
"""What keeps blocks from being left out, and from being replaced by a map."""


@pytest.mark.parametrize("title", SPECIAL)
@pytest.mark.parametrize("method", sorted(COMPRESSORS))
def test_every_method(method, title):
    case = CASES[title]
    model, found = case.build(), statistics(title)
    options = {"steps": 2} if method == "post-share" else {}
    try:
        model, report = compressed(model, method, found, 0.3, tokens=tokens(), projections=letters(method), **options)
    except MasaError as error:  # what the method needs, said before anything is changed
        known = REFUSED if method == "matrix-pca-aligned" else KEPT | (NORMED if method == "replace-me" else {})
        assert method in ("matrix-pca-aligned", *WHOLE_BLOCKS) and known[title] in str(error)
        return
    expected = outputs(model, case)
    assert torch.isfinite(expected).all() and report.reduction_achieved >= 0.3
    near(case, outputs(masa.fold(model), case), expected, "folded")
    assert all(len(m.weight) for n, m in model.named_modules() if n.endswith("q_proj"))


def test_the_update_writes_into_fused_layers():
    """With all ranks nothing is lost, and the update finds the dense outputs again."""
    for title in ("Phi-3", "GPT-2", "Falcon, new decoder"):
        case, exact = CASES[title], outputs(CASES[title].build(), CASES[title])
        errors = []
        for method in ("svd-llm", "svd-llm-update"):
            model, _ = compressed(case.build(), method, statistics(title), 0.05, tokens=tokens(), projections="qkvo")
            errors.append(float((outputs(model, case) - exact).norm()))
        assert errors[1] < 3 * errors[0], title


# ---------------------------------------------------------------------------------------------- only some of the blocks


def test_what_is_passed_over_is_said_once(caplog):
    case = CASES["LFM2"]
    with caplog.at_level(logging.WARNING, logger="masa"):
        model = masa.compress(case.build(), tokens(), reduction=0.3, method="svd-llm")
    said = [record.message for record in caplog.records if "passed over" in record.message]
    assert len(said) == 1 and said[0].startswith("masa: 2 of 4 blocks have all of q, k, v, o")
    report = model.compression_report
    dense = {p: out * inp for p, (out, inp) in report.shapes.items()}
    assert report.dense == 2 * sum(dense.values())
    assert {tuple(layers) for found in report.learned["ranks"].values() for layers, _ in found} == {(1,), (3,)}


def test_groups_are_of_the_blocks_that_have_a_projection():
    case = CASES["LFM2"]
    _, report = compressed(case.build(), "matrix-pca", statistics("LFM2"), 0.3)
    assert report.learned["groups"] == [[1, 3]]
    _, report = compressed(case.build(), "direct-share", statistics("LFM2"), 0.2)
    assert {(match[0], match[2]) for found in report.learned["shared"].values() for match in found} == {(3, 1)}
    letters = letters_of(case)
    _, report = compressed(case.build(), "matrix-pca", statistics("LFM2"), 0.3, projections=letters)
    assert report.learned["groups"]["q"] == [[1, 3]]
    assert [layer for group in report.learned["groups"]["d"] for layer in group] == [0, 1, 2, 3]


def test_a_projection_that_is_not_there_names_those_that_are():
    model = CASES["Mixtral"].build()
    for call in (
        lambda: calibrated(model, tokens(), projections="qkvod"),
        lambda: compressed(model, "svd", projections="d"),
    ):
        with pytest.raises(MasaError, match=r"has no projection d .*q, k, v, o"):
            call()


# ---------------------------------------------------------------------------------------------------- in the three ways


@pytest.mark.parametrize("title", ["Phi-3", "GPT-2", "GPT-NeoX", "LFM2"])
def test_one_call_and_two_commands_come_to_the_same(title, tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from masa.cli import main

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    case = CASES[title]
    case.build().save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(
        tmp_path / "model"
    )
    ids = torch.randint(4, VOCABULARY, (6, 40), generator=torch.Generator().manual_seed(1))
    lines = [json.dumps({"text": " ".join(f"w{i}" for i in row)}) for row in ids.tolist()]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    folder, statistics_, out = (str(tmp_path / name) for name in ("model", "statistics", "smaller"))
    data = ["--text", str(tmp_path / "texts.jsonl"), "--samples", "6", "--length", "16", "--gradient-samples", "3"]
    main(["calibrate", folder, *data, "--out", statistics_])
    main(
        ["compress", folder, "--method", "svd-fisher", "--calibration", statistics_, "--reduction", "0.3", "--out", out]
    )
    capsys.readouterr()
    by_command = masa.load(out)
    found = Calibration.load(statistics_)
    by_call = masa.compress(case.build(), found, reduction=0.3, method="svd-fisher")
    close(outputs(by_command, case), outputs(by_call, case), "commands and call")
    main(["export", out, "--out", str(tmp_path / "plain")])
    plain = type(case.build()).from_pretrained(tmp_path / "plain")
    close(outputs(plain, case), outputs(by_call, case), "exported")


def test_the_probe_is_one_short_sequence():
    assert calls.Calls(mixed("MistralForCausalLM"), tokens()).probe.shape == (1, calls.PROBE)
