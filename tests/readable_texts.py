"""Texts and tokenizers that masa reads."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from readable import Case, file, files


def read_texts(path: Path | str) -> list[str]:
    """As calibration and --evaluate read it, having seen that the workflow reads the same documents."""
    from masa.data import documents
    from masa.data.texts import Documents

    found = list(Documents(path).check())
    if isinstance(path, str) or (path.is_dir() and len(list(path.glob("README.md"))) and len(found) == 1):
        return found  # of a hub's layout, for which the workflow has the reader `hub`
    column = "page" if path.name == "pages.jsonl" else "text"
    corpus = {"source": f"file:{path}", "reader": "files", "shuffle_buffer": 1, "column": column}
    again = list(documents.read(corpus, Path(), None, "all"))
    assert sorted(text.strip() for text in found) == sorted(text.strip() for text in again)
    return found


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def arrow_file(folder: Path) -> Path:
    import pyarrow

    table = pyarrow.table({"text": ["one", "two"], "n": [1, 2]})
    with pyarrow.ipc.new_file(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    return folder / "a.arrow"


def parquet(name: str, **columns: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        import pyarrow.parquet

        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / name)
        return folder / name

    return make


def json_column(folder: Path) -> Path:
    import datasets

    rows = [{"text": "one"}, {"text": None}, {"text": 'a "word"'}]
    features = datasets.Features({"text": datasets.Json()})
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def saved_to_disk(folder: Path) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(folder / "saved")
    return folder / "saved"


def zstandard(text: str) -> bytes:
    import pyarrow

    return pyarrow.compress(text.encode(), codec="zstd", asbytes=True)


TWO = lines({"text": "one"}, {"text": "two"})
DATASETS = "datasets 5.2.0, packaged_modules/json/json.py: "

CASES: dict[str, list[Case]] = {}
READ: dict[str, Callable[[Path], Any]] = {"texts": read_texts}

CASES["texts"] = [
    Case("JSON lines: `.jsonl`, `.ndjson`, `.json`", "a row is a document", file("a.ndjson", TWO), ["one", "two"]),
    Case("the same, in capitals", "the same", file("A.JSONL", TWO), ["one", "two"]),
    Case("the same, `.gz`", "the same", file("c4-validation.json.gz", gzip.compress(TWO.encode())), ["one", "two"]),
    Case("the same, `.zst`", "the same", file("a.jsonl.zst", zstandard(TWO) * 2), ["one", "two"] * 2),
    Case("the same, `.bz2` or `.xz`", "the same", file("a.jsonl.xz", lzma.compress(TWO.encode())), ["one", "two"]),
    Case("the same, without a suffix", "the same, by its content", file("part-00000", TWO), ["one", "two"]),
    Case(
        "compressed, but not called so",
        "decompressed, by its first bytes",
        file("a.jsonl", bz2.compress(TWO.encode())),
        ["one", "two"],
    ),
    Case(
        "a JSON array of objects",
        "an element is a document",
        file("a.json", '[{"text": "one"},\n{"text": "two"}]'),
        ["one", "two"],
    ),
    Case("a JSON array of texts", "an element is a document", file("a.json", '["one", "two"]'), ["one", "two"]),
    Case(
        "JSON objects on several lines each",
        "an object is a document",
        file("a.json", '{\n "text": "one"\n}\n'),
        ["one"],
    ),
    Case(
        "what `masa text` writes",
        "its documents",
        file("held_out.json", json.dumps({"name": "x", "source": "file:x", "documents": ["one", "two"]}, indent=1)),
        ["one", "two"],
    ),
    Case(
        "Parquet",
        "a row is a document; no other column is read",
        parquet("a.parquet", text=["one", "two"], n=[1, 2]),
        ["one", "two"],
    ),
    Case("Parquet, whatever it is called", "the same, by its first bytes", parquet("part-0", text=["one"]), ["one"]),
    Case(
        "Parquet with a `Json` column",
        "its values as they were, without quotes",
        json_column,
        ["one", 'a "word"'],
        DATASETS + "one row of another type makes a column `Json`, whose texts are stored as JSON",
    ),
    Case("Arrow, file or stream", "a row is a document", arrow_file, ["one", "two"]),
    Case("a folder of `save_to_disk`", "its rows", saved_to_disk, ["one", "two"]),
    Case(
        "CSV, TSV: comma, tab, semicolon, bar",
        "a row is a document",
        file("a.csv", 'n;text\n1;"one;\n1"\n2;NA\n'),
        ["one;\n1", "NA"],
    ),
    Case(
        "CSV with a separator in a text without quotes",
        "refused, with file and line",
        file("a.csv", "n,text\n1,one\n2,two, and more\n"),
        re.compile(r"a\.csv, line 3: 3 fields, but the header has 2\. Put a text"),
    ),
    Case("plain text: `.txt` and all else", "one document", file("a.txt", "one\ntwo\n"), ["one\ntwo\n"]),
    Case("a byte order mark", "no part of the text", file("a.jsonl", "\ufeff" + TWO), ["one", "two"]),
    Case("blank lines between rows", "nothing", file("a.jsonl", "\n" + TWO + "\n  \n" + TWO), ["one", "two"] * 2),
    Case(
        "a row whose text is null",
        "passed over, and counted on stderr",
        file("a.jsonl", TWO + lines({"text": None})),
        ["one", "two"],
    ),
    Case(
        "a number or an object instead of text",
        "refused, with file, line and what was expected",
        file("a.jsonl", TWO + lines({"text": 12})),
        re.compile(r"a\.jsonl, line 3: 'text' is int, expected text"),
        DATASETS
        + "it would become '12', also where the column is declared as text, and other texts would come in quotes",
    ),
    Case(
        "the same in Parquet and Arrow, as a struct",
        "the same",
        parquet("a.parquet", text=[{"text": "one"}]),
        re.compile(r"a\.parquet, row 1: 'text' is dict, expected text"),
    ),
    Case(
        "one such row among thousands",
        "the same",
        file("a.jsonl", TWO * 9000 + lines({"text": {"a": 1}}) + TWO),
        re.compile(r"a\.jsonl, line 18001: 'text' is dict, expected text"),
    ),
    Case(
        "text under another name",
        "`--column`, `data.corpus.column`; `content` and `page` are found",
        file("pages.jsonl", lines({"page": "one"})),
        ["one"],
    ),
    Case(
        "no such column",
        "refused, with the names that there are",
        file("a.jsonl", lines({"words": "one"})),
        re.compile(r"a\.jsonl, line 1: no column 'text'.*Available: words\. Set --column"),
    ),
    Case(
        "a lone surrogate",
        "refused, with file and line",
        file("a.jsonl", TWO + '{"text": "a\\ud800b"}\n'),
        re.compile(r"a\.jsonl, line 3: 'text' holds a lone surrogate \(\\ud800 at character 1\)"),
    ),
    Case(
        "not UTF-8",
        "refused, with file and line",
        file("a.txt", b"one\ncaf\xe9\n"),
        re.compile(r"a\.txt, line 2: not UTF-8"),
    ),
    Case(
        "UTF-16",
        "refused, with the mend",
        file("a.txt", "one".encode("utf-16")),
        re.compile(r"UTF-16, not UTF-8: convert it"),
    ),
    Case(
        "UTF-32",
        "the same",
        file("a.txt", "one".encode("utf-32")),
        re.compile(r"UTF-32, not UTF-8: convert it"),
    ),
    Case("a file of no bytes", "refused", file("a.csv", ""), re.compile(r"a\.csv is empty, without even a header")),
    Case(
        "bad JSON",
        "refused, with file and line",
        file("a.jsonl", TWO + "{oops\n"),
        re.compile(r"a\.jsonl, line 3: not valid JSON"),
    ),
    Case(
        "cut short",
        "refused, with the last whole line",
        file("a.jsonl.gz", gzip.compress(TWO.encode() * 9)[:-9]),
        re.compile(r"a\.jsonl\.gz is corrupt or truncated after line \d+"),
    ),
    Case(
        "a zip archive, a PDF, other bytes",
        "refused",
        file("a.txt", b"PK\x03\x04 and more"),
        re.compile("a zip archive: unpack it"),
    ),
    Case(
        "no text at all", "refused", file("a.jsonl", lines({"text": " "})), re.compile(r"a\.jsonl holds no text at all")
    ),
    Case(
        "`[`, `*` or `?` in a file's name",
        "read as it is written, where there is such a file",
        file("my[v1].jsonl", TWO),
        ["one", "two"],
    ),
    Case(
        "a glob",
        "all files of it, sorted",
        files(file("b.jsonl", lines("b")), file("a.jsonl", lines("a")), of="*.jsonl"),
        ["a", "b"],
    ),
    Case(
        "a folder",
        "all files of text in it, sorted",
        files(
            file("x/b.jsonl", lines("b")),
            file("a.jsonl.gz", gzip.compress(lines("a").encode())),
            file("README.md", "no"),
        ),
        ["a", "b"],
    ),
    Case(
        "a folder of several formats",
        "refused: name some",
        files(file("a.jsonl", TWO), file("b.txt", "b")),
        re.compile(r"several formats \(1 json, 1 text\): name some"),
    ),
    Case(
        "a folder of several splits",
        "refused: `--split`",
        files(file("train.jsonl", TWO), file("test.jsonl", TWO)),
        re.compile(r"holds the splits test and train: say which one \(--split\)"),
    ),
    Case(
        "a folder in the hub's layout (a README.md with `configs`)",
        "its train split; `--subset`, `--split`",
        files(
            file(
                "README.md",
                "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a.jsonl\n---\n",
            ),
            file("a.jsonl", lines({"text": "one"})),
            file("b.txt", "no"),
        ),
        ["one"],
    ),
    Case(
        "a data set on the hub, `hub:ORG/NAME[@COMMIT]`",
        "streamed; `MASA_MIRROR` stands in for the hub",
        file("org/name/train.csv", "text\none\n"),
        ["one"],
    ),
]


def tokenizer_folder(config: dict | None = None, **state: Any) -> Callable[[Path], Path]:
    """A word-level tokenizer in Hugging Face's layout, with something beside it, or in its state."""

    def make(folder: Path) -> Path:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        core = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<u>": 2, "one": 3, "two-three": 4}, unk_token="<u>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if "truncation" in state:
            core.enable_truncation(state["truncation"])
            core.enable_padding(length=8, pad_token="<u>", pad_id=2)
        fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<u>")
        fast.save_pretrained(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text()) | (config or {})
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return make


def with_dropout(folder: Path) -> Path:
    from tokenizers import Tokenizer, models

    vocab = {"</s>": 0, "o": 1, "n": 2, "e": 3, " ": 4, "t": 5, "w": 6, "-": 7, "h": 8, "r": 9, "on": 10, "one": 11}
    core = Tokenizer(models.BPE(vocab, [("o", "n"), ("on", "e")], dropout=0.999, unk_token="</s>"))
    core.save(str(folder / "tokenizer.json"))
    return folder


def without_unknown(folder: Path) -> Path:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"</s>": 0, "one": 1})).save(str(folder / "tokenizer.json"))
    return folder


def read_tokenizer(path: Path) -> list[int]:
    from masa.data.tokenizers import load_tokenizer

    return load_tokenizer(path).backend_tokenizer.encode("one two-three one one").ids


READ["tokenizers"] = read_tokenizer
CASES["tokenizers"] = [
    Case("a folder with tokenizer.json", "splits as the file says", tokenizer_folder(), [3, 4, 3, 3]),
    Case(
        "tokenizer.json that was saved after a truncating or padding call",
        "nothing is cut off or filled up",
        tokenizer_folder(truncation=2),
        [3, 4, 3, 3],
        "tokenizers 0.23.3 keeps both in the file (huggingface/tokenizers, `Tokenizer.enable_truncation`)",
    ),
    Case(
        "a config.json or tokenizer_config.json beside it that names a class with another splitting",
        "splits as the file says; a difference on a sample is refused with both counts",
        tokenizer_folder({"tokenizer_class": "GPT2Tokenizer"}),
        [3, 4, 3, 3],
        "transformers 5.23.0: AutoTokenizer builds the class's own splitting (huggingface/transformers#45488, #45920)",
    ),
    Case(
        "a folder without tokenizer.json (tokenizer.model, tekken.json, vocab.json, …)",
        "read by AutoTokenizer, if it can",
        file("tokenizer/notes.txt", "no tokenizer here"),
        re.compile(r"holds no tokenizer\.json, nor another file of one"),
    ),
    Case(
        "BPE that was saved with dropout",
        "no merge is left out by chance",
        with_dropout,
        [11, 4, 5, 6, 1, 7, 5, 8, 9, 3, 3, 4, 11, 4, 11],
        "tokenizers 0.23.3 keeps it in the file and applies it to every text (`models.BPE`, dropout)",
    ),
    Case(
        "a vocabulary of words without a token for others",
        "refused",
        without_unknown,
        re.compile(r"tokenizer\.json cannot split all text \(WordLevel error"),
    ),
    Case(
        "a damaged tokenizer.json",
        "refused",
        files(file("tokenizer.json", '{"version": "1.0", "model": 3}')),
        re.compile(r"No tokenizer could be read from .*tokenizer\.json .*fetch it again"),
    ),
]
