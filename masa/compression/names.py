"""The methods and where each is written: known without torch, so that a configuration can be checked.

A method's module is imported when it is first asked for, and no other depends on it, so that a new method or a change
of one makes no result of another obsolete.
"""

ORIGINAL = "original"
"""The uncompressed model: a row of tables, and no method."""

METHODS = {
    "svd": "svd_llm",
    "svd-llm": "svd_llm",
    "svd-llm-update": "svd_llm",
    "svd-llm-global": "svd_llm",
    "svd-global": "svd_llm",
    "svd-global-update": "svd_llm",
    "svd-fisher": "svd_llm",
    "svd-fisher-update": "svd_llm",
    "basis-sharing": "basis_sharing",
    "direct-share": "head_sharing",
    "post-share": "head_sharing",
    "matrix-pca": "matrix_pca",
    "matrix-pca-role": "matrix_pca",
    "matrix-pca-data": "matrix_pca",
    "matrix-pca-fisher": "matrix_pca",
    "matrix-pca-aligned": "aligned_pca",
    "sparse-magnitude": "in_place",
    "sparse-wanda": "in_place",
    "sparse-gpt": "in_place",
    "sparse-2-4": "in_place",
    "sparse-fisher": "in_place",
    "sparse-fisher-update": "in_place",
    "sparse-dictionary": "sparse_dictionary",
    "sparse-dictionary-fisher": "sparse_dictionary",
    "low-rank-sparse": "low_rank_sparse",
    "low-rank-sparse-fisher": "low_rank_sparse",
    "dictionary-pairs": "dictionary_pairs",
    "mixed": "mixed",
    "mixed-fisher": "mixed",
    "dictionary-pairs-fisher": "dictionary_pairs",
    "drop-blocks": "block_dropping",
    "replace-me": "block_dropping",
}
"""Method -> its module below :mod:`masa.compression.methods`."""

GRADIENT_SAMPLES = 12
"""Calibration sequences that also run backward, where a method needs gradients and nobody said how many."""


def modules(method: str) -> list[str]:
    """Modules that decide what a method gives, besides those that they import."""
    found = ["masa.compression.sweep"]
    return found if method == ORIGINAL else [*found, f"masa.compression.methods.{METHODS[method]}"]


def needs_gradients(method: str) -> bool:
    """Whether a method truncates in the metric of the loss, whose calibration also runs backward."""
    return "fisher" in method
