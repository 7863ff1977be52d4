"""A language model for others: a Hugging Face folder with its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from masa.data.tokens import TOKENIZER_FILES, load_tokenizer
from masa.errors import MasaError
from masa.export.source import Source
from masa.models.beside import hand_on
from masa.models.both_versions import versions, write_for_both
from masa.models.positions import POSITIONS, positions_of
from masa.runs import run
from masa.runs.files import sha256_of

FORMATS = ("hf", "gguf")
LIBRARY, TASK = "transformers", "text-generation"
READ = (
    "from transformers import AutoModelForCausalLM\n"
    'model = AutoModelForCausalLM.from_pretrained(".", local_files_only=True)'
)
LOGITS = ".logits"


def write(model: nn.Module, folder: Path, source: Source) -> dict[str, Any]:
    """Write the folded model and its tokenizer, readable by transformers 4 and 5, and what else its folder has.

    Returns:
        ``transformers``: the versions that read the folder as it is meant;
        ``tokenizer``: what is known of it, None if there is none; ``handed_on``: see
        :func:`masa.models.beside.hand_on`.

    Raises:
        MasaError: a tokenizer with more tokens than the model has embeddings.
    """
    config = model.config
    config.use_cache = True  # training switches it off, and generation would be slow without
    model.generation_config.use_cache = True
    model.save_pretrained(folder)
    write_for_both(folder)
    known = None if source.tokenizer is None else _tokenizer(source.tokenizer, config, source)
    if source.spec is None:
        handed = hand_on(source.model, folder)
        if source.tokenizer not in (None, source.model):
            handed["files"] |= hand_on(source.tokenizer, folder, TOKENIZERS)["files"]
        return {"tokenizer": known, "handed_on": handed, "transformers": versions(folder)}
    if known is not None:
        tokenizer = load_tokenizer(source.tokenizer)
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.save_pretrained(folder)
        write_for_both(folder)
    return {"tokenizer": known, "transformers": versions(folder)}


TOKENIZERS = ("tokenizer*", "*token*.json", "vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken", "*.jinja")
"""Files of a tokenizer that is not in the model's own folder."""


def _tokenizer(folder: Path, config: Any, source: Source) -> dict[str, Any]:
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > config.vocab_size:
        raise MasaError(f"{folder} has {len(tokenizer)} tokens, but the model's vocabulary is {config.vocab_size}.")
    file = next(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
    return {
        "sha256": sha256_of(file),
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


def example(model: nn.Module) -> torch.Tensor:
    """Ids (2, T) to compare logits on."""
    length = min(64, positions_of(model) or 64)
    return torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


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
