"""A language model for others: a Hugging Face folder with its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from masa.data.tokens import load_tokenizer
from masa.errors import MasaError
from masa.export.source import Source
from masa.runs import run
from masa.runs.files import sha256_of

FORMATS = ("hf", "gguf")
LIBRARY, TASK = "transformers", "text-generation"


def write(model: nn.Module, folder: Path, source: Source) -> dict[str, Any] | None:
    """Write the folded model and its tokenizer.

    Returns:
        What is known of the tokenizer; None if there is none.

    Raises:
        MasaError: a tokenizer with more tokens than the model has embeddings.
    """
    config = model.config
    config.use_cache = True  # training switches it off, and generation would be slow without
    model.generation_config.use_cache = True
    model.save_pretrained(folder)
    if source.tokenizer is None:
        return None
    tokenizer = load_tokenizer(source.tokenizer)
    if len(tokenizer) > config.vocab_size:
        raise MasaError(
            f"{source.tokenizer} has {len(tokenizer)} tokens, but the model's vocabulary is {config.vocab_size}."
        )
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    return {
        "sha256": sha256_of(source.tokenizer / "tokenizer.json"),
        "vocab_size": len(tokenizer),
        "eos_token": tokenizer.eos_token,
        "eos_token_id": tokenizer.eos_token_id,
        "verified": source.spec is not None,
    }


def data_digest(manifest: Mapping[str, Any]) -> str:
    """What :func:`masa.training.language.pretrain` kept of the tokens."""
    return run.digest(manifest["train"])


def describe_data(source: Source) -> dict[str, Any]:
    """Rows of the card's section on data."""
    if source.data is None:
        return {}
    corpus, held_out = source.data["corpus"], source.data["validation"]
    return {
        "source": corpus.get("source"),
        "sha256 of the source": corpus.get("sha256"),
        "reader": corpus.get("reader"),
        "tokens available for training": source.data["train"]["tokens"],
        "sha256 of the tokens": ", ".join(s["sha256"] for s in source.data["train"]["shards"]),
        "held-out tokens": held_out["tokens"],
        "held-out words": held_out["words"],
        "held-out documents": held_out["documents"],
        "sha256 of the tokenizer": source.data["tokenizer"],
    }


def usage(source: Source) -> str:
    """Python that loads the exported folder and generates; it runs in that folder."""
    if source.tokenizer is None:
        return (
            "import torch\nfrom transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained(".")  # this folder, or its name on the hub\n'
            "print(model(torch.tensor([[0]])).logits.shape)  # no tokenizer came with the model\n"
        )
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # this folder, or its name on the hub\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        'inputs = tokenizer("The name of the", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]))\n"
    )


POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""What configurations call the longest text."""


def limits(source: Source, config: Mapping[str, Any]) -> list[str]:
    """What a reader must know before use."""
    longest = next((config[name] for name in POSITIONS if config.get(name)), None)  # none where distance is a bias
    allowed = f"{longest:,} tokens" if longest else "any number of tokens"
    found = [
        f"It reads at most {allowed} at once, and was not trained on longer texts."
        if source.spec
        else f"Its configuration allows {allowed} at once.",
        "It completes text. It was not trained to follow instructions or to be safe, and says false things fluently."
        if source.spec
        else "Compression changes what a model says, also where its perplexity hardly moves; what its origin may not "
        "be used for, it may not be used for either.",
    ]
    return found
