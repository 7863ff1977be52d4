"""What llama.cpp makes of a GGUF file, beside what transformers makes of the folder that it came from.

Both must split texts into the same tokens and continue them with the same greedy tokens. llama.cpp runs inside its
Python binding xllamacpp, in float32 throughout.
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from masa.data.tokenizers import load_tokenizer
from masa.errors import MasaError
from masa.export.source import Source
from masa.models.gguf_writing import EXTRA
from masa.models.positions import positions_of

TEXTS = (
    "The length of the name is 12345 characters, e.g. 3.14 or 2,000,000.",
    "  two spaces,\ttab\n\nnew lines \r\n and an end with spaces   ",
    "don't we'll I'd they've it's 'quoted' (brackets) [x] {y} a_b-c/d\\e",
    "Größe, naïve, Łódź, Ελληνικά, русский, עברית, हिन्दी, 漢字かな, 한국어, 🙂👍🏽, ½ ² ٣ Ⅷ",
    "def f(x):\n    return x ** 2  # a comment\n",
)
"""Digits, spaces, line breaks, contractions, scripts and code: where tokenizers differ."""

PROMPTS = (
    "The name of the",
    "Returns a list of all",
    "In the year 1984, the",
    "If this parameter is not",
    " ".join(TEXTS),
)
TOKENS = 32
NEAR_TIE = 0.01
"""Nats between two tokens below which rounding may decide, and a difference is reported as a tie."""
LIKELY = 20
"""So many of the likeliest tokens at every place are compared by their log-probabilities."""
TOLERANCE = {"float32": 0.05, "float16": 0.1, "bfloat16": 0.3}
"""Nats by which these may differ, by the dtype that llama.cpp multiplies in. A model read wrong is off by more."""


def require() -> None:
    """See that the binding is installed.

    Raises:
        MasaError: it is not.
    """
    if find_spec("xllamacpp") is None:
        raise MasaError(
            f"The check of a GGUF file needs llama.cpp's Python binding xllamacpp, which is not installed: {EXTRA}. Or "
            "go without: --no-check."
        )


def usage(name: str, source: Source) -> str:
    """Python that loads the exported file and generates; it runs in its folder."""
    return (
        "import xllamacpp  # pip install xllamacpp; any other program on llama.cpp reads the file, too\n\n"
        "parameters = xllamacpp.CommonParams()\n"
        f'parameters.model.path = "{name}"\n'
        "server = xllamacpp.Server(parameters)\n"
        'answer = server.handle_completions({"prompt": "The name of the", "n_predict": 20, "temperature": 0})\n'
        'print(answer["choices"][0]["text"])\n'
    )


class LlamaCpp:
    """A GGUF file in llama.cpp on the CPU: float32 cache, one thread, no fused attention.

    Raises:
        MasaError: llama.cpp cannot read the file.
    """

    def __init__(self, file: Path, context: int) -> None:
        import xllamacpp as llama

        p = llama.CommonParams()
        p.model.path = str(file)
        p.n_ctx, p.n_parallel, p.n_gpu_layers, p.verbosity = context, 1, 0, 0
        p.cache_type_k = p.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        p.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        p.cpuparams.n_threads, p.warmup, p.ui = 1, False, False
        try:
            self.server = llama.Server(p)
        except Exception as error:  # of the binding, in no particular class
            raise MasaError(f"llama.cpp cannot read {file}: {error}") from error
        # to this machine itself, whatever proxy is set
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        # splitting needs no turn of its loop; a server that is let go before the loop has begun waits for it for ever
        self._post("/completion", {"prompt": [0], "n_predict": 1, "cache_prompt": False})

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens at its ends."""
        return self._post("/tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"]

    def continue_(self, ids: list[int], tokens: int) -> list[tuple[int, dict[int, float]]]:
        """Greedy tokens after ``ids``, until one that ends the text, with the log-probabilities of the likeliest.

        llama.cpp tells no probabilities at a token that is half a character; there all are empty.
        """
        asked = {"prompt": ids, "n_predict": tokens, "temperature": 0, "top_k": 1, "return_tokens": True}
        answer = self._post("/completion", asked | {"n_probs": LIKELY, "cache_prompt": False})
        steps = answer.get("completion_probabilities") or []
        found = [{top["id"]: top["logprob"] for top in step["top_logprobs"]} for step in steps]
        made = answer["tokens"]
        return list(zip(made, found if len(found) == len(made) else [{}] * len(made), strict=True))

    def log_probabilities(self, ids: list[int], forced: int) -> dict[int, float]:
        """Log-probability of every token after ``ids``.

        Args:
            forced: a token that is a whole character, which is "said" so that the probabilities are told.
        """
        asked = {"prompt": ids, "n_predict": 1, "temperature": 0, "logit_bias": [[forced, 1e4]], "n_probs": 10**6}
        answer = self._post("/completion", asked | {"cache_prompt": False})
        return {top["id"]: top["logprob"] for top in answer["completion_probabilities"][0]["top_logprobs"]}

    def _post(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        try:
            with self.opener.open(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise MasaError(f"llama.cpp refuses {path}: {error.read().decode(errors='replace')}") from error


def check(file: Path, plain: Path, dtype: str, prompts: tuple[str, ...] = PROMPTS, tokens: int = TOKENS) -> dict:
    """Compare a GGUF file with the Hugging Face folder that it was made from.

    Args:
        file: GGUF.
        plain: folder, with its tokenizer.
        dtype: of both.
        prompts: texts to continue.
        tokens: at most so many a prompt.

    Returns:
        ``texts`` tokenised alike, greedy ``tokens`` compared over all ``prompts``, ``ties`` (differences below
        :data:`NEAR_TIE`), and ``largest_logprob_difference`` in nats, of the
        :data:`LIKELY` likeliest tokens at every place.

    Raises:
        MasaError: a text is split otherwise, or a greedy token is another and no near tie; the message shows it.
    """
    print("export: transformers and llama.cpp continue the same texts", file=sys.stderr, flush=True)
    model, tokenizer = _plain(plain)
    context = min(positions_of(model) or 512, 512)
    llama = LlamaCpp(file, context)
    for text in (*TEXTS, *prompts):
        ours, theirs = tokenizer(text, add_special_tokens=False)["input_ids"], llama.tokenize(text)
        if ours != theirs:
            raise MasaError(f"llama.cpp splits {text!r} into {theirs}, the tokenizer into {ours}.")
    compared, ties, largest = 0, [], 0.0
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"][: context // 2]
        count = min(tokens, context - len(ids))
        expected, chances = _continued(model, ids, count)
        theirs = llama.continue_(ids, count)
        equal, gap, tie = _compared(f"{file.name}, after {prompt[:40]!r}", expected, chances, theirs, dtype)
        ends = model.generation_config.eos_token_id
        if tie is None and len(theirs) < len([token for token in expected if token not in (ends or ())]):
            ended = expected[len(theirs)]
            near = [float(chances[len(theirs)][ended] - chances[len(theirs)][end]) for end in ends or ()]
            tie = min(near, default=NEAR_TIE + 1)  # an end may be as likely
        if tie is not None and tie > NEAR_TIE:
            raise MasaError(
                f"After {prompt[:40]!r} llama.cpp stops at token {len(theirs)}, transformers goes on with {ended} "
                f"({tokenizer.convert_ids_to_tokens(ended)!r}): its ends are others than eos_token_id {ends} of "
                "generation_config.json. Mend that in the model's folder, or say --no-check."
            )
        compared, largest = compared + equal, max(largest, gap)
        ties += [] if tie is None else [{"prompt": prompt, "token": equal, "nats": tie}]
    return {
        "texts": len(TEXTS) + len(prompts),
        "prompts": len(prompts),
        "tokens": compared,
        "ties": ties,
        "program": "llama.cpp",
        "largest_logprob_difference": largest,
    }


def _plain(folder: Path) -> tuple[Any, Any]:
    """transformers' model in float32, which generates without penalties of its own, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    where = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = load_tokenizer(folder)
    tokenizer.model_max_length = 10**9  # no warning: the texts are split, not read
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where).eval()
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=tokenizer.eos_token_id)
    return model, tokenizer


def _continued(model: Any, ids: list[int], count: int) -> tuple[list[int], list[Any]]:
    """transformers' greedy tokens, and the log-probabilities (V,) at each."""
    import torch

    how = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    made = model.generate(torch.tensor([ids]), max_new_tokens=count, **how)
    return made.sequences[0, len(ids) :].tolist(), [logits[0].log_softmax(-1) for logits in made.logits]


def _compared(
    where: str, expected: list[int], chances: list[Any], theirs: list[tuple[int, dict[int, float]]], dtype: str
) -> tuple[int, float, float | None]:
    """How many greedy tokens are equal, the largest difference in nats, and the near-tie that ended it, if one did."""
    largest = 0.0
    for place, (token, likeliest) in enumerate(theirs[: len(expected)]):
        gaps = [abs(float(chances[place][other]) - value) for other, value in likeliest.items() if value > -10]
        largest = max(largest, *gaps, 0.0)
        if largest > TOLERANCE[dtype]:
            raise MasaError(
                f"{where} and {place} equal tokens: log-probabilities of llama.cpp and transformers differ by "
                f"{largest:.3g} nats ({dtype}). The file does not compute what the model does."
            )
        if token != expected[place]:
            gap = float(chances[place][expected[place]] - chances[place][token])
            if gap > NEAR_TIE:
                raise MasaError(
                    f"{where} and {place} equal tokens: transformers says {expected[place]} and llama.cpp {token}, "
                    f"{gap:.3g} nats apart ({dtype}). The file does not compute what the model does."
                )
            return place, largest, gap  # the texts are different ones from here on
    return min(len(theirs), len(expected)), largest, None
