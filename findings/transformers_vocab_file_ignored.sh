#!/usr/bin/env bash
# transformers 5: a tokenizer made with the keyword vocab_file reads no file and raises nothing; it knows its special tokens alone.
#
# One would guess: BertTokenizer(vocab_file="vocab.txt") and GPT2Tokenizer(vocab_file=..., merges_file=...) read these files, as in
#   version 4, or refuse the keywords.
# What happens: the keywords are kept among the other settings and not used. BERT's tokenizer maps each word to [UNK]; GPT-2's, which
#   has no unknown token, returns no token at all. The same path as the first positional argument, and from_pretrained of the folder,
#   read the file.
# Who is hurt: small language or text-picture models with a vocabulary of their own. Training runs on, each text has the same
#   embedding, and a contrastive loss stays at the logarithm of the batch size.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/packages" transformers==5.24.0 tokenizers==0.23.3
PLACE="$place" PYTHONPATH="$place/packages" python3 - <<'PY'
import json
import os
from pathlib import Path

import transformers
from transformers import BertTokenizer, GPT2Tokenizer

folder = Path(os.environ["PLACE"]) / "words"
folder.mkdir()
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "is", "red"]
(folder / "vocab.txt").write_text("\n".join(words))
(folder / "vocab.json").write_text(json.dumps({"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}))
(folder / "merges.txt").write_text("#version: 0.2\na b\n")

made = {
    "keyword": BertTokenizer(vocab_file=str(folder / "vocab.txt")),
    "positional": BertTokenizer(str(folder / "vocab.txt")),
}
found = {way: tokenizer("the cat is red")["input_ids"] for way, tokenizer in made.items()}
pairs = GPT2Tokenizer(vocab_file=str(folder / "vocab.json"), merges_file=str(folder / "merges.txt"))
found["GPT-2, keywords"] = pairs("ab")["input_ids"]
print(f"transformers {transformers.__version__}, 'the cat is red' by BertTokenizer, 'ab' by GPT2Tokenizer")
for way, numbers in found.items():
    print(f"{way:16s} {numbers}")
assert found["keyword"] == [2, 1, 1, 1, 1, 3], found
assert found["positional"] == [2, 5, 6, 7, 8, 3], found
assert found["GPT-2, keywords"] == [], found
PY
