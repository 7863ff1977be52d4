"""Tiny random models of the architectures that llama.cpp knows, and their GGUF files by llama.cpp's own converter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 304
TOKENS = 300
TEXT = "the length of a name is 12 or 345 characters, and nothing (else) is written here: don't, x = f(y) + 1\n"
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_FACTORS = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 2.0, 4.0, 8.0]}
_GLOBAL = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
_BOTH = {"full_attention": _GLOBAL, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}

MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama, biases, wide heads": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama 3": ("llama", {"head_dim": 64, "rope_parameters": _LLAMA3 | {"original_max_position_embeddings": 8192}}),
    "llama 3, other": (
        "llama",
        {
            "head_dim": 64,
            "rope_parameters": _LLAMA3 | {"original_max_position_embeddings": 3000, "low_freq_factor": 1.7},
        },
    ),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama, yarn": (
        "llama",
        {
            "head_dim": 64,
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
            | {"original_max_position_embeddings": 32},
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "granite": (
        "granite",
        {"attention_multiplier": 0.4, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "num_hidden_layers": 7,
            "rope_parameters": _BOTH,
        },
    ),
    "phi2": (
        "phi",
        {"intermediate_size": 128, "num_key_value_heads": 4, "rope_parameters": {"partial_rotary_factor": 0.5}},
    ),
    "phi3": ("phi3", {"sliding_window": None, "rope_parameters": {"partial_rotary_factor": 1.0}}),
    "phi3, longrope": (
        "phi3",
        {
            "sliding_window": None,
            "original_max_position_embeddings": 512,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "longrope", "partial_rotary_factor": 1.0} | _FACTORS,
        },
    ),
    "olmo": ("olmo", {"clip_qkv": 0.5}),
    "olmo2": ("olmo2", {}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "starcoder2": ("starcoder2", {"use_bias": True, "rope_parameters": {"rope_theta": 1e5}}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "gpt2": ("gpt2", {"intermediate_size": None}),
    "gpt_neox": ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    "gpt_neox, one after the other": ("gpt_neox", {"use_parallel_residual": False, "num_key_value_heads": 4}),
    "bloom": ("bloom", {"intermediate_size": None}),
}
SENTENCEPIECE = ("gemma", "gemma2", "gemma3_text", "phi3")
"""transformers' names of those that the converter wants a ``tokenizer.model`` for."""


def tiny(name: str, seed: int = 0):
    """A model of :data:`MODELS` in which every tensor matters."""
    kind, changes = MODELS[name]
    settings = _SIZES | {"vocab_size": VOCABULARY} | changes
    kinds = {"gpt2": ("num_key_value_heads",), "bloom": ("num_key_value_heads", "max_position_embeddings")}
    settings = {k: v for k, v in settings.items() if k not in kinds.get(kind, ())}
    if kind in ("gpt2", "bloom"):
        settings.pop("intermediate_size", None)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # biases and norms, too
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def byte_level(folder: Path) -> None:
    """A byte-level BPE tokenizer of 300 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    core.train_from_iterator(
        [TEXT * 3], trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=special, initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def sentencepiece(folder: Path) -> None:
    """``tokenizer.model`` of 300 pieces, and the settings beside it."""
    import sentencepiece as pieces

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(TEXT * 20)
    pieces.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=TOKENS,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        user_defined_symbols=["<|endoftext|>"],  # which llama.cpp looks up in Phi-3's
        minloglevel=2,
    )
    (folder / "text.txt").unlink()
    (folder / "tokenizer.vocab").unlink()
    settings = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<pad>"}))


_CONVERT = """
import sys
from masa.models.llama_cpp_converter import prepared
converter, folders = prepared(sys.argv[1], "gpt-2"), sys.argv[2:]
for folder in folders:
    sys.argv = ["convert", folder, "--outfile", folder + ".gguf", "--outtype", "f32"]
    try:
        converter.main()
    except BaseException as error:
        print(f"{folder}: {type(error).__name__}: {error}", file=sys.stderr)
"""


def convert(program: Path, folders: list[Path]) -> None:
    """``FOLDER.gguf`` beside every folder, in one process."""
    command = [sys.executable, "-P", "-c", _CONVERT, str(program), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if missing := [f.name for f in folders if not f.with_name(f.name + ".gguf").is_file()]:
        raise AssertionError(f"{missing}: {done.stderr[-3000:]}")
