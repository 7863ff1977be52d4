"""masa.compress in one call: whatever holds text or ids in, a smaller model of transformers out."""

import json

import datasets
import pytest
import torch
from conftest import llama_model
from torch.utils.data import DataLoader

import masa
import masa.compression

WORDS = [f"w{i}" for i in range(60)]
TEXTS = [" ".join(WORDS[(i * j + i) % 60] for j in range(1, 90)) for i in range(1, 9)]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "[UNK]", "[END]", "[PAD]"])}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", eos_token="[END]", pad_token="[PAD]")


def model():
    torch.manual_seed(0)
    return llama_model().eval()


def batches(tokenizer):
    def collate(rows):
        return tokenizer(rows, padding=True, return_tensors="pt")

    return DataLoader(TEXTS, batch_size=3, collate_fn=collate)


def forms(tokenizer, folder):
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    lines = folder / "texts.jsonl"
    lines.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return {
        "list": TEXTS,
        "generator": (text for text in TEXTS),
        "file": lines,
        "Dataset of texts": datasets.Dataset.from_dict({"text": TEXTS}),
        "Dataset of ids": datasets.Dataset.from_dict({"input_ids": ids}),
        "IterableDataset": datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
        "DataLoader": batches(tokenizer),
        "DataLoader of tensors": DataLoader(torch.tensor(ids), batch_size=2),
        "tensor": torch.tensor(ids),
        "lists of ids": ids,
    }


FORMS = ("list", "generator", "file", "Dataset of texts", "Dataset of ids", "IterableDataset")
FORMS += ("DataLoader", "DataLoader of tensors", "tensor", "lists of ids")


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_data(name, tokenizer, tmp_path, ids):
    data = forms(tokenizer, tmp_path)[name]
    dense = model()
    smaller = masa.compress(dense, data, reduction=0.3, method="svd-llm", tokenizer=tokenizer, samples=16, length=32)
    assert smaller is dense and 0.3 <= smaller.compression_report.reduction_achieved < 0.32
    assert smaller.compression_report.calibration["samples"] * smaller.compression_report.calibration["length"] > 400
    smaller.save_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(masa.load(tmp_path / "out")(ids).logits, smaller(ids).logits)


def test_padding_is_no_data(tokenizer):
    """Batches with padding give the tokens of the texts, and no others."""
    from masa.compression.calibration.texts import tokens_of

    short = [*TEXTS[:3], "w1 w2 w3"]
    loader = DataLoader(short, batch_size=4, collate_fn=lambda rows: tokenizer(rows, padding=True, return_tensors="pt"))
    found = tokens_of(loader, model(), None, None, 64, 27, 0)
    expected = [i for text in short for i in tokenizer(text)["input_ids"]]
    assert found.flatten().tolist() == expected[: found.numel()] and found.shape == (10, 27)


def test_it_is_both_steps(tokenizer):
    tokens = torch.tensor([tokenizer(text)["input_ids"] for text in TEXTS])
    once = masa.compress(model(), tokens, reduction=0.3, method="svd-fisher")
    statistics = masa.calibrate(model(), tokens, gradient_samples=8)
    twice, report = masa.compression.compress(model(), "svd-fisher", statistics, 0.3)
    from_statistics = masa.compress(model(), statistics, reduction=0.3, method="svd-fisher")
    for name, tensor in once.state_dict().items():
        assert torch.equal(tensor, twice.state_dict()[name]), name
        assert torch.equal(tensor, from_statistics.state_dict()[name]), name
    assert report.stored == once.compression_report.stored


def test_it_may_be_called_where_nothing_is_to_be_trained(ids):
    """Under inference_mode, as around a whole script: gradients are computed, and the result can be trained on."""
    dense, tokens = model(), torch.randint(0, 60, (8, 32))
    with torch.inference_mode():
        smaller = masa.compress(dense, tokens, reduction=0.3, method="svd-fisher")
    smaller(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in smaller.model.shared.parameters())


@pytest.mark.parametrize("unit", [None, "KB", "KiB"])
def test_a_size_in_bytes(unit, tmp_path):
    whole = sum(p.numel() * p.element_size() for p in model().parameters())
    target = whole - 20_000
    size = target if unit is None else f"{target / {'KB': 1000, 'KiB': 1024}[unit]:.3f}{unit}"
    smaller = masa.compress(model(), size=size, method="svd")
    found = sum(p.numel() * p.element_size() for p in smaller.parameters())
    assert target - 2_500 < found <= target + 16


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"data": TEXTS}, "either reduction=0.2"),
        ({"data": TEXTS, "reduction": 0.2, "size": 100}, "either reduction=0.2"),
        ({"data": TEXTS, "size": "1 bit"}, "number of bytes"),
        ({"data": TEXTS, "size": 10}, "out of reach: the model has"),
        ({"data": TEXTS, "size": "90GB"}, "out of reach"),
        ({"data": TEXTS, "reduction": 0.2}, "give tokenizer="),
        ({"data": 7, "reduction": 0.2}, "not int"),
        ({"data": [], "reduction": 0.2}, "hold no tokens"),
        ({"data": [3.5], "reduction": 0.2}, "must be integers"),
        ({"data": None, "reduction": 0.2}, "needs data to calibrate on"),
        ({"data": "svd-llm", "reduction": 0.2}, "is a method"),
        ({"data": "no/such/file", "reduction": 0.2}, "does not exist"),
        ({"data": datasets.Dataset.from_dict({"body": TEXTS}), "reduction": 0.2}, "say which one with column="),
        ({"data": datasets.Dataset.from_dict({"text": TEXTS}), "column": "body", "reduction": 0.2}, "no column 'body'"),
        ({"data": datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": []})), "reduction": 0.2}, "splits"),
        ({"data": [{"labels": [1]}], "reduction": 0.2}, "no input_ids, but labels"),
        ({"data": torch.full((4, 8), 99), "reduction": 0.2}, "vocabulary has 64"),
        ({"data": TEXTS, "reduction": 0.2, "method": "svd-lm"}, "Did you mean"),
    ],
)
def test_what_cannot_be_done(arguments, match):
    with pytest.raises(masa.MasaError, match=match):
        masa.compress(model(), arguments.pop("data"), **{"method": "svd-llm"} | arguments)


@pytest.mark.parametrize("head", ["LlamaModel", "LlamaForSequenceClassification"])
def test_models_without_a_head_over_the_vocabulary(head, tokenizer, tmp_path, ids):
    import transformers

    torch.manual_seed(0)
    config = llama_model().config
    config.pad_token_id = 0
    dense = getattr(transformers, head)(config).eval()
    smaller = masa.compress(dense, TEXTS, reduction=0.3, method="matrix-pca", tokenizer=tokenizer, samples=8, length=32)
    back = masa.load(masa.save(smaller, tmp_path))
    assert type(back).__name__ == head
    with torch.no_grad():
        torch.testing.assert_close(back(ids)[0], smaller(ids)[0])
    with pytest.raises(masa.MasaError, match="predicts no tokens"):
        masa.calibrate(getattr(transformers, head)(config), torch.zeros(2, 8, dtype=int), gradient_samples=1)
