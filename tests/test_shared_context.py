"""Multiple choice, a question read once: the log-likelihoods of lm-eval, which reads it once an answer."""

import random

import pytest
import torch
import transformers
from conftest import language_model as tiny
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models

import masa
from masa.evaluation import shared_context
from masa.evaluation.language import language_model

SIZE = {"hidden_size": 32, "vocab_size": 64}
LLAMA = SIZE | {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)
    ),
    "masa": lambda: masa.share(tiny(), "masa"),
    "window": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA, sliding_window=16)),
    "no positions": lambda: transformers.BloomForCausalLM(transformers.BloomConfig(n_layer=2, n_head=4, **SIZE)),
    "recurrent": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(num_hidden_layers=2, **SIZE)),
}


def harness(model, max_length=64, batch_size=3):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({str(i): i for i in range(64)}, unk_token="0")), eos_token="1"
    )
    return language_model(model.eval(), tokenizer, {"batch_size": batch_size, "max_length": max_length}, "cpu")


def requests(questions=7, vocab=60, longest=24, seed=0):
    rng = random.Random(seed)
    made = []
    for _ in range(questions):
        context = rng.choices(range(2, vocab), k=rng.randint(2, longest))
        made += [
            (("", ""), context, rng.choices(range(2, vocab), k=rng.randint(1, 5))) for _ in range(rng.randint(1, 4))
        ]
    rng.shuffle(made)
    return made


def alone(lm, asked):
    return HFLM._loglikelihood_tokens(lm, asked, disable_tqdm=True)


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_are_those_of_one_by_one(name):
    torch.manual_seed(0)
    lm, asked = harness(MODELS[name]()), requests()
    expected, found = alone(lm, asked), lm._loglikelihood_tokens(asked)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("name", ["llama", "gpt2", "masa"])
def test_a_context_is_read_once(name, monkeypatch):
    torch.manual_seed(0)
    lm, read = harness(MODELS[name]()), []
    asked = [
        (("", ""), [first, *range(2, 32)], answer) for first in range(2, 22) for answer in ([3], [4, 5], [6], [7, 8, 9])
    ]
    batch = shared_context._batch
    monkeypatch.setattr(shared_context, "_batch", lambda lm, qs: read.extend(q.length for q in qs) or batch(lm, qs))
    lm._loglikelihood_tokens(asked)
    assert sum(read) == 21 * (
        31 + 1 + 2
    )  # of one question twice, which was the check; lm-eval reads 20 x 4 x 31 and more


def test_16_bits_are_scored_as_lm_eval_does():
    torch.manual_seed(0)
    lm, asked = harness(MODELS["llama"]().to(torch.bfloat16)), requests()
    assert shared_context._questions(lm, asked) == []
    assert lm._loglikelihood_tokens(asked) == alone(lm, asked)


def test_what_is_too_long_or_gains_nothing_is_left_to_lm_eval():
    torch.manual_seed(0)
    lm = harness(MODELS["llama"](), max_length=20)
    long = [(("", ""), [2 + i % 50 for i in range(25)], [3, a]) for a in (4, 5)]
    rolling = [(("", ""), [1], [2 + (i * s) % 50 for i in range(18)]) for s in (1, 3)]
    asked = [*long, *rolling, *requests(3, longest=12)]
    places = {place for question in shared_context._questions(lm, asked) for place in question.places}
    assert not places & {0, 1, 2, 3}
    found, expected = lm._loglikelihood_tokens(asked), alone(lm, asked)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)


def test_many_answers_are_read_in_parts_that_fit():
    torch.manual_seed(0)
    lm = harness(MODELS["llama"](), max_length=32)
    asked = [(("", ""), list(range(2, 22)), [first, 5, 6, 7]) for first in range(2, 30)]
    assert all(question.length <= 32 for question in shared_context._questions(lm, asked))
    found, expected = lm._loglikelihood_tokens(asked), alone(lm, asked)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)


def test_the_check_sees_a_model_that_ignores_the_mask():
    torch.manual_seed(0)
    lm, asked = harness(MODELS["llama"]()), requests()
    forward = lm.model.forward

    def careless(*given, attention_mask=None, position_ids=None, **named):
        return forward(*given, **named)

    expected = alone(lm, asked)
    lm.model.forward = careless
    found = lm._loglikelihood_tokens(asked)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
