"""Write a Llama with random weights that is small enough for any backend, even where each kernel is interpreted.

    python examples/tiny_llama.py FOLDER

Its tokens are bytes, and what it says means nothing.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import closing
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from lineshaft_conformance.harness.tiny import EVEN, write


def main(folder: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    with closing(write({**EVEN, "vocab_size": len(letters)}, seed=0)) as made:
        shutil.copytree(made.path, folder, dirs_exist_ok=True)
    tokenizer = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/tiny_llama.py FOLDER")
    main(Path(sys.argv[1]))
