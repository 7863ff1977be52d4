"""Names of the methods, known without torch: what the configuration is checked against."""

ORIGINAL = "original"
"""The uncompressed model: a row of tables, and no method."""

METHODS = (
    "svd",
    "svd-llm",
    "svd-llm-update",
    "svd-llm-global",
    "svd-global",
    "svd-global-update",
    "svd-fisher",
    "svd-fisher-update",
    "basis-sharing",
    "direct-share",
    "post-share",
    "matrix-pca",
    "matrix-pca-role",
    "matrix-pca-data",
    "matrix-pca-fisher",
)
"""The keys of :data:`masa.compression.COMPRESSORS`, known without torch."""
