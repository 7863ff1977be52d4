"""Read a tokenizer as its file means it: its own splitting, nothing cut off, nothing filled up.

``AutoTokenizer`` builds a tokenizer.json anew by the class that a ``config.json`` or ``tokenizer_config.json`` beside
it names, with that class's splitting; and a file that was saved after a truncating call goes on truncating. So the file
is read by itself, and what comes out is compared with :mod:`tokenizers`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from masa.errors import MasaError

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
FILES += ("tekken.json", "tiktoken.model")
"""Of which a folder with a tokenizer has one."""
PATTERNS = ["tokenizer*", "*.model", "vocab*", "merges.txt", "tekken.json", "added_tokens.json", "*.jinja"]
PATTERNS += ["special_tokens_map.json", "config.json"]
"""What is fetched of a tokenizer on the hub."""
SAMPLE = (
    'Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance.\n'
    "\tfor (int i = 0; i < 1024; ++i) {  total += prices[i] * 0.19;  }\n\n"
    "In 1969, Neil Armstrong's crew didn't need 4,096 bytes: they'd 2,048 words of RAM.   https://example.org/?q=a&b=c\n"
    "Das Mädchen aß 3½ Äpfel für 12,50 €. 我们在这里。Это тоже текст. ¿Qué tal? हिन्दी भाषा 🙂\r\n"
)
"""Text in which splittings differ: numbers, apostrophes, runs of spaces, line ends, other scripts."""
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a directory, and never one of the same name on the hub.

    Args:
        directory: holds it.
        trust_remote_code: run Python that the folder brings, where there is no tokenizer.json.

    Raises:
        MasaError: there is none, or it cannot be read.
    """
    directory = Path(directory)
    if not has_tokenizer(directory):
        raise MasaError(
            f"{directory} holds no tokenizer.json, nor another file of one ({', '.join(FILES[1:])}): give the "
            "folder that `masa tokenizer --out` wrote, or that of a pretrained tokenizer."
        )
    file = directory / "tokenizer.json"
    try:
        tokenizer = _of_file(directory) if file.is_file() else _auto(directory, trust_remote_code)
    except Exception as error:  # of a corrupt tokenizer.json the reader raises nothing more particular
        read = file if file.is_file() else directory
        raise MasaError(
            f"No tokenizer could be read from {read} ({_line(error)}); make it anew with `masa tokenizer`, or fetch "
            "it again."
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise MasaError(
            f"The tokenizer in {directory} has no form of the tokenizers library ({type(tokenizer).__name__}). Save it "
            "once as tokenizer.json."
        )
    _as_read(tokenizer.backend_tokenizer)
    if file.is_file():
        check_splitting(tokenizer, file, [SAMPLE])
    return tokenizer


def _as_read(fast: Any) -> None:
    """Nothing cut off, nothing filled up, and of BPE no merge left out by chance: that is for training alone."""
    fast.no_truncation()
    fast.no_padding()
    if getattr(fast.model, "dropout", None):
        fast.model.dropout = None


def has_tokenizer(directory: Path) -> bool:
    """Whether a folder holds a file of a tokenizer."""
    return any((directory / name).is_file() for name in FILES)


def _of_file(directory: Path) -> Any:
    """The tokenizer that tokenizer.json describes, with the special tokens that the files beside it name."""
    from transformers import PreTrainedTokenizerFast

    logger = logging.getLogger("transformers.tokenization_utils_base")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it says that this is not the class that the settings name: that is the point
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    finally:
        logger.setLevel(level)
    if tokenizer.eos_token is None:
        _name_specials(tokenizer, directory)
    return tokenizer


def _name_specials(tokenizer: Any, directory: Path) -> None:
    """Where no file beside it names special tokens: those of the class that AutoTokenizer would take."""
    try:
        theirs, known = _auto(directory), tokenizer.get_vocab()
    except Exception:  # then it has none, which is said where one is needed
        return
    for name in _NAMED:
        token = getattr(theirs, name, None)
        if getattr(tokenizer, name) is None and token in known:
            setattr(tokenizer, name, token)


def _auto(directory: Path, trust_remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)


def check_splitting(tokenizer: Any, file: Path, texts: Sequence[str]) -> None:
    """See that a tokenizer splits texts as its file does.

    Raises:
        MasaError: it does not; both counts are said.
    """
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(file))
    _as_read(plain)
    try:
        wanted = [plain.encode(text, add_special_tokens=False).ids for text in texts]
        found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    except Exception as error:  # of a word that is not in the vocabulary the library raises nothing more particular
        raise MasaError(
            f"The tokenizer in {file} cannot split all text ({_line(error)}). Use one that has a token for what it "
            "does not know."
        ) from error
    if found != wanted:
        raise MasaError(
            f"transformers splits text otherwise than {file} says: {sum(map(len, found)):,} tokens instead of "
            f"{sum(map(len, wanted)):,} on a sample. Remove from tokenizer_config.json what changes the splitting, or "
            "save the tokenizer anew with transformers."
        )


def start_of(tokenizer: Any) -> int | None:
    """The start token that a tokenizer itself puts before every text; None where it puts none, as most do.

    The one rule on start tokens: where there is one, every document begins with it, in calibration as in lm-eval's
    tasks, and it is never scored. Perplexities and lm-eval's rolling likelihoods, which need a first token to predict
    from, take :func:`first_of`.
    """
    start = getattr(tokenizer, "bos_token_id", None)
    if start is None:
        return None
    return start if tokenizer("a")["input_ids"][:1] == [start] else None


def first_of(tokenizer: Any) -> int:
    """The token that the first of a document is predicted from: the start token, else the end token.

    Raises:
        MasaError: the tokenizer has neither.
    """
    found = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
    if found is None:
        raise MasaError("The tokenizer has neither a start nor an end token to predict the first token from.")
    return found


def encoded(tokenizer: Any, texts: Iterable[str], batch: int = 256) -> Iterator[list[int]]:
    """Tokens of each text without special ones; a batch is encoded at once, on all cores."""
    left = iter(texts)
    while group := list(itertools.islice(left, batch)):
        yield from tokenizer(group, add_special_tokens=False)["input_ids"]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
