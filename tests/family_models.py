"""Tiny random models of many families, and the table of docs/reference/families.md: a row each, a function a column.

    python tests/family_models.py        # go through all of them and write the table

A model's own class and configuration are used throughout; only its sizes are ours.
"""

import re
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import transformers
from conftest import ROOT

import masa
from masa.errors import MasaError
from masa.sharing.projections import family_of
from masa.sharing.stacks import bank_of, stack_of

TABLE = ROOT / "docs" / "reference" / "families.md"
VOCABULARY = 64
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
"""Sizes of a model of text; names that a configuration has not are left out."""
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = GROUPED | {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
EXPERTS |= {"n_routed_experts": 2, "shared_expert_intermediate_size": 16}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
LATENT |= {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
DBRX = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 32}
DBRX |= {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}}
DBRX |= {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 2, "moe_top_k": 1, "hidden_size": 32}}
GEMMA = {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
GEMMA |= {"vocab_size_per_layer_input": 64, "activation_sparsity_pattern": [0.0] * 6, "intermediate_size": [48] * 6}
GEMMA |= {"layer_types": ["sliding_attention", "full_attention"] * 3, "altup_num_inputs": 2}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
DECODER = {"is_decoder": True, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
WHISPER = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 8}
WHISPER |= {"max_target_positions": 32, "max_source_positions": 16, "pad_token_id": 0, "decoder_start_token_id": 0}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0}
IMAGES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "initializer_range": 0.2,
}
SOUND = {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
SOUND |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        title: of the family.
        kind: class of transformers.
        sizes: of its configuration, beside those of its kind.
        base: the sizes of its kind.
        stack: which blocks share, in a model with several stacks.
    """

    title: str
    kind: str
    sizes: dict = field(default_factory=dict)
    base: dict = field(default_factory=lambda: GROUPED)
    stack: str | None = None

    def build(self):
        """The model, the same every time, in eval()."""
        torch.manual_seed(0)
        cls = getattr(transformers, self.kind)
        known = vars(cls.config_class())
        names = {*known, *(cls.config_class.attribute_map or {})}
        config = cls.config_class(**{k: v for k, v in self.base.items() if k in names} | self.sizes)
        config._attn_implementation = "eager"
        return cls(config).eval()

    @property
    def inputs(self):
        """What it is called with: two short sequences."""
        generator = torch.Generator().manual_seed(1)
        if self.base is IMAGES:
            return {"pixel_values": torch.randn(2, 1, 8, 8, generator=generator)}
        if self.base is SOUND:
            return {"input_values": torch.randn(2, 64, generator=generator)}
        ids = torch.randint(4, VOCABULARY, (2, 9), generator=generator)
        if self.kind == "WhisperForConditionalGeneration":
            return {"input_features": torch.randn(2, 8, 32, generator=generator), "decoder_input_ids": ids}
        return {"input_ids": ids} | ({"decoder_input_ids": ids} if self.stack else {})

    def family(self, model=None):
        """Of a new model, or of one that was built."""
        model = model if model is not None else self.build()
        return family_of(model, stack_of(model, self.stack))


def _cases():
    text = [
        Case("Llama", "LlamaForCausalLM"),
        Case("Mistral", "MistralForCausalLM"),
        Case("Qwen2", "Qwen2ForCausalLM"),
        Case("Qwen3", "Qwen3ForCausalLM"),
        Case("Gemma", "GemmaForCausalLM"),
        Case("Gemma 2", "Gemma2ForCausalLM"),
        Case("Gemma 3", "Gemma3ForCausalLM"),
        Case("OLMo", "OlmoForCausalLM"),
        Case("OLMo 2", "Olmo2ForCausalLM"),
        Case("SmolLM3", "SmolLM3ForCausalLM"),
        Case("Granite", "GraniteForCausalLM"),
        Case("Cohere", "CohereForCausalLM"),
        Case("StableLM", "StableLmForCausalLM"),
        Case("Exaone 4", "Exaone4ForCausalLM"),
        Case("Starcoder2", "Starcoder2ForCausalLM"),
        Case("Apertus", "ApertusForCausalLM"),
        Case("Nemotron", "NemotronForCausalLM"),
        Case("Phi", "PhiForCausalLM", base=TEXT),
        Case("OPT", "OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}, TEXT),
        Case("XGLM", "XGLMForCausalLM", {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}, TEXT),
        Case("GPT-J", "GPTJForCausalLM", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, TEXT),
        Case("GPT-Neo", "GPTNeoForCausalLM", {"num_layers": 2, "attention_types": [[["global"], 2]]}, TEXT),
        Case("CTRL", "CTRLLMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48, "n_positions": 32}, TEXT),
    ]
    experts = [
        Case("Mixtral", "MixtralForCausalLM", base=EXPERTS),
        Case("Qwen2-MoE", "Qwen2MoeForCausalLM", base=EXPERTS),
        Case("Qwen3-MoE", "Qwen3MoeForCausalLM", base=EXPERTS),
        Case("OLMoE", "OlmoeForCausalLM", base=EXPERTS),
        Case("GPT-OSS", "GptOssForCausalLM", base=EXPERTS),
        Case("GLM-4-MoE", "Glm4MoeForCausalLM", LATENT, EXPERTS),
        Case("DeepSeek-V3", "DeepseekV3ForCausalLM", LATENT | {"head_dim": 4, "num_key_value_heads": 4}, EXPERTS),
        Case("Llama 4", "Llama4ForCausalLM", {"intermediate_size_mlp": 48}, EXPERTS),
    ]
    fused = [
        Case("Phi-3", "Phi3ForCausalLM"),
        Case("GLM-4", "Glm4ForCausalLM"),
        Case("GPT-NeoX", "GPTNeoXForCausalLM", base=TEXT),
        Case("BLOOM", "BloomForCausalLM", {"n_layer": 2, "n_head": 4}, TEXT),
        Case("Falcon", "FalconForCausalLM", {"bias": True, "multi_query": False}, TEXT),
        Case("Falcon, multi-query", "FalconForCausalLM", {"multi_query": True}, TEXT),
        Case("Falcon, new decoder", "FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}, TEXT),
        Case("GPT-2", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4}, TEXT),
        Case("GPT-BigCode", "GPTBigCodeForCausalLM", {"n_embd": 32, "n_layer": 2, "n_head": 4}, TEXT),
        Case(
            "GPT-BigCode, all heads",
            "GPTBigCodeForCausalLM",
            {"n_embd": 32, "n_layer": 2, "n_head": 4, "multi_query": False},
            TEXT,
        ),
        Case("MPT", "MptForCausalLM", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 32}, TEXT),
        Case("CodeGen", "CodeGenForCausalLM", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, TEXT),
        Case("Persimmon", "PersimmonForCausalLM", base=TEXT),
        Case("DBRX", "DbrxForCausalLM", DBRX, TEXT),
    ]
    hybrid = [
        Case("Gemma 3n", "Gemma3nForCausalLM", GEMMA),
        Case("Moshi", "MoshiForCausalLM", {"ffn_dim": 48}, GROUPED | {"num_key_value_heads": 4}),
        Case("Qwen3-Next", "Qwen3NextForCausalLM", LINEAR | {"num_hidden_layers": 8}, EXPERTS),
        Case(
            "Jamba",
            "JambaForCausalLM",
            {"num_hidden_layers": 8, "attn_layer_offset": 1, "attn_layer_period": 2}
            | {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
            EXPERTS,
        ),
        Case("Bamba", "BambaForCausalLM", MAMBA | {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]}),
        Case("Falcon-H1", "FalconH1ForCausalLM", MAMBA | {"mamba_d_ssm": 64}),
        Case("LFM2", "Lfm2ForCausalLM", {"num_hidden_layers": 4, "full_attn_idxs": [1, 3]}),
        Case(
            "NemotronH",
            "NemotronHForCausalLM",
            {"hybrid_override_pattern": "M*-*", "num_hidden_layers": 4}
            | {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1},
            EXPERTS,
        ),
        Case("RecurrentGemma", "RecurrentGemmaForCausalLM", {"num_hidden_layers": 6, "lru_width": 32}),
    ]
    encoders = [
        Case("BERT", "BertForMaskedLM", base=TEXT),
        Case("RoBERTa", "RobertaForMaskedLM", {"pad_token_id": 1}, TEXT),
        Case("ELECTRA", "ElectraForMaskedLM", {"embedding_size": 32}, TEXT),
        Case("DistilBERT", "DistilBertForMaskedLM", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}, TEXT),
        Case("MPNet", "MPNetForMaskedLM", {"pad_token_id": 1}, TEXT),
        Case("DeBERTa", "DebertaForMaskedLM", base=TEXT),
        Case("DeBERTa-v2", "DebertaV2ForMaskedLM", base=TEXT),
        Case("ModernBERT", "ModernBertForMaskedLM", {"pad_token_id": 0}, TEXT),
        Case("BART's decoder", "BartForCausalLM", DECODER, TEXT),
        Case("Whisper's decoder", "WhisperForCausalLM", WHISPER | DECODER, TEXT),
        Case("T5's encoder", "T5EncoderModel", T5, TEXT),
    ]
    others = [
        Case("ViT", "ViTForImageClassification", base=IMAGES),
        Case("DeiT", "DeiTForImageClassification", base=IMAGES),
        Case("DINOv2", "Dinov2ForImageClassification", base=IMAGES),
        Case("BEiT", "BeitForImageClassification", base=IMAGES),
        Case("CLIP's images", "CLIPVisionModel", base=IMAGES),
        Case("SigLIP's images", "SiglipVisionModel", base=IMAGES),
        Case("YOLOS", "YolosForObjectDetection", {"image_size": [8, 8], "num_detection_tokens": 3}, IMAGES),
        Case("Wav2Vec2", "Wav2Vec2Model", TEXT | SOUND, SOUND),
        Case("HuBERT", "HubertModel", TEXT | SOUND, SOUND),
    ]
    small = {k: v for k, v in GROUPED.items() if k != "max_position_embeddings"}
    pictures = {k: v for k, v in IMAGES.items() if k != "num_channels"}
    visual = {"depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "mlp_ratio": 2}
    mrope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
    both = {"text_config": small, "vision_config": pictures}
    llava = {
        "text_config": small | {"model_type": "llama"},
        "vision_config": pictures | {"model_type": "clip_vision_model"},
    }
    idefics = {"text_config": small | {"model_type": "llama"}, "vision_config": pictures}
    several = [
        Case("LLaVA", "LlavaForConditionalGeneration", llava),
        Case("Gemma 3, images", "Gemma3ForConditionalGeneration", both),
        Case("Idefics 3", "Idefics3ForConditionalGeneration", idefics),
        Case("Qwen2-VL", "Qwen2VLForConditionalGeneration", {"text_config": small | mrope, "vision_config": visual}),
        Case("T5", "T5ForConditionalGeneration", T5, TEXT, stack="decoder.block"),
        Case("BART", "BartForConditionalGeneration", WHISPER | DECODER, TEXT, stack="encoder.layers"),
        Case("Whisper", "WhisperForConditionalGeneration", WHISPER | DECODER, TEXT, stack="decoder.layers"),
    ]
    return [*text, *experts, *fused, *hybrid, *encoders, *others, *several]


CASES = {case.title: case for case in _cases()}


# ------------------------------------------------------------------------------------------------------------- columns

SPEC = {"method": "masa", "atoms": 1}
TOLERANCE = 4e-6
"""Of outputs of about 1, in float32."""


@torch.no_grad()
def outputs(model, case):
    """Its logits, or its last hidden states, in eval()."""
    model.eval()
    found = model(**case.inputs)
    return next(found[name] for name in ("logits", "last_hidden_state") if name in found)


def letters_of(case):
    """Those that a tiny model of the family has in one shape, which is all that could be shared."""
    family = case.family()
    return "".join(p for p in family.paths if len(family.shapes(p)) == 1)


def difference(a, b):
    return float((a - b).abs().max())


def close(a, b, what):
    """Fail unless two outputs are equal, but for rounding; return their difference."""
    found, scale = difference(a, b), max(1.0, float(b.abs().max()))
    assert found <= TOLERANCE * scale, f"{what}: {found:.1e} of {scale:.1f}"
    return found


@dataclass
class Passed:
    """What a family's model came to on its way through the columns."""

    shared: torch.nn.Module
    trained: bool
    folder: Path
    folded: Path
    expected: torch.Tensor


@cache
def way(title):
    """Share all that a family has, train one step, save, and fold: the models and folders of the columns below."""
    case = CASES[title]
    plain, letters = case.build(), letters_of(case)
    model = masa.share(plain, SPEC | {"projections": letters}, stack=case.stack)
    bank = bank_of(model)
    before = {name: p.detach().clone() for name, p in bank.named_parameters()}
    # not train(): dropout of a model of two layers may drop whole layers
    found = model(**case.inputs)
    loss = next(found[name] for name in ("logits", "last_hidden_state") if name in found)
    weights = torch.randn(loss.shape, generator=torch.Generator().manual_seed(2))
    (loss * weights).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad / parameter.grad.norm().clamp_min(1e-6)
    moved = all(not torch.equal(p, before[name]) for name, p in bank.named_parameters())
    folder = Path(tempfile.mkdtemp(prefix="family-"))
    model.save_pretrained(folder / "factored")
    expected = outputs(model, case)
    folded = masa.fold(model)
    folded.save_pretrained(folder / "plain")
    torch.save({"inputs": case.inputs, "expected": outputs(folded, case)}, folder / "outputs.pt")
    assert {k: v.shape for k, v in folded.state_dict().items()} == {
        k: v.shape for k, v in case.build().state_dict().items()
    }
    assert [type(m).__name__ for m in folded.modules()] == [type(m).__name__ for m in case.build().modules()]
    close(outputs(folded, case), expected, "folded")
    return Passed(model, moved, folder / "factored", folder / "plain", expected)


def projections(case):
    """Letters, those that only some blocks have with their number."""
    family = case.family()
    count, found = len(family.blocks), {}
    for letter in letters_of(case):
        found.setdefault(len(family.layers(letter)), []).append(letter)
    return "; ".join(" ".join(p) + (f" (in {n} of {count})" if n < count else "") for n, p in found.items())


def share(case):
    shared = way(case.title).shared
    assert bank_of(shared).projections == letters_of(case)
    return "yes"


def train(case):
    assert way(case.title).trained
    return "yes"


def save_load(case):
    passed = way(case.title)
    for back in (masa.load(passed.folder), type(passed.shared).from_pretrained(passed.folder)):
        close(outputs(back, case), passed.expected, "loaded")
    return "yes"


def fold(case):
    passed = way(case.title)
    back = type(passed.shared).from_pretrained(passed.folded)
    assert case.family(back).paths == case.family().paths
    close(outputs(back, case), passed.expected, "folded and loaded")
    return "yes"


def calibrate(case):
    """The statistics of every projection are those of the whole model (:mod:`family_compression`)."""
    from family_compression import calibrated

    return calibrated(case)


def compress(case):
    """By several methods, folded, saved and loaded (:mod:`family_compression`)."""
    from family_compression import compressed

    return compressed(case)


def gguf(case):
    """Whether llama.cpp's converter knows the class (its pinned release, see masa.models.gguf_writing)."""
    return "yes" if case.kind in known_to_llama_cpp() else "no"


@cache
def known_to_llama_cpp():
    from masa.models import gguf_writing as export

    program = export.converter(None, ROOT / "cache")
    with zipfile.ZipFile(program) as wheel:
        sources = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".py")]
    return {
        name
        for source in sources
        for call in re.findall(r"register\(([^)]*)\)", source)
        for name in re.findall(r'"(\w+)"', call)
    }


COLUMNS = {
    "projections": projections,
    "share": share,
    "train": train,
    "save, load": save_load,
    "fold": fold,
    "calibrate": calibrate,
    "compress": compress,
    "GGUF": gguf,
}
"""Name of a column -> what it says of a case; it raises where the product fails, and MasaError is a "no"."""


def cells(case, columns=tuple(COLUMNS)):
    """A row of the table, without its title."""
    found = {}
    for name in columns:
        try:
            found[name] = COLUMNS[name](case)
        except MasaError:
            found[name] = "no"
    return found


def rows():
    """What the table says today: title -> column -> cell."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(split[0][2:], row[2:], strict=True)) for row in split[1:]}


def write():
    """Go through all families and write the table into its page."""
    lines = ["| family | class | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for case in CASES.values():
        print(case.title, file=sys.stderr, flush=True)
        lines.append(" | ".join([f"| {case.title}", f"`{case.kind}`", *cells(case).values()]) + " |")
    before, _, rest = TABLE.read_text(encoding="utf-8").partition("| family |")
    after = rest[rest.index("\n\n") :] if "\n\n" in rest else "\n"
    TABLE.write_text(before + "\n".join(lines) + after, encoding="utf-8")


if __name__ == "__main__":
    write()
