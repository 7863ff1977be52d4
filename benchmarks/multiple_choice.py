"""What reading a question once instead of once an answer saves: lm-eval's own scoring in units of ours.

    python benchmarks/multiple_choice.py

Both score the same requests with the same model, in turn: questions and answers as long as those of four tasks (tokens
of random ids, which cost what words cost). Ours begins by scoring the longest question both ways, which is counted.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
import transformers
from harness import Row, in_turn, parser, save
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models

from masa.evaluation.language import language_model

VOCABULARY = 2048
TASKS = {"SciQ": (100, 4, 3), "MMLU, whole answers": (120, 4, 12), "ARC": (30, 4, 5), "PIQA": (12, 2, 22)}
"""Task -> tokens of a question, answers, tokens of an answer; each ± a third."""


def requests(task: str, questions: int) -> list[Any]:
    """Requests in lm-eval's form, always the same ones."""
    drawn = random.Random(0)
    question, answers, answer = TASKS[task]

    def words(count: int) -> list[int]:
        return drawn.choices(range(2, VOCABULARY), k=max(1, round(count * drawn.uniform(2 / 3, 4 / 3))))

    made = []
    for _ in range(questions):
        context = words(question)
        made += [(("", ""), context, words(answer)) for _ in range(answers)]
    return made


def main() -> int:
    given = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    width, layers, questions = (48, 2, 12) if given.quick else (576, 8, 24)
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "vocab_size": VOCABULARY}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1")
    lm = language_model(model, tokenizer, {"batch_size": 8, "max_length": 1024}, "cpu")
    rows = []
    for task in TASKS:
        asked = requests(task, questions)
        ways = {
            "ours": lambda asked=asked: lm._loglikelihood_tokens(asked),
            "lm-eval": lambda asked=asked: HFLM._loglikelihood_tokens(lm, asked, disable_tqdm=True),
        }
        timed = in_turn(task, ways, 2 if given.quick else 3)
        rows.append(
            Row(
                f"lm-eval's time, questions as long as {task}'s",
                timed.median("lm-eval") / timed.median("ours"),
                "times ours",
            )
        )
    told = {"layers": layers, "width": width, "questions": questions, "batch_size": 8, "threads": 1}
    return save("multiple_choice", rows, told, given.out)


if __name__ == "__main__":
    sys.exit(main())
