#!/usr/bin/env bash
# transformers 5: generate() with a callable as custom_generate hands it no streamer, and the streamer never learns of the end.
#
# One would guess: a callable with the arguments of transformers' own decoding loop, which has `streamer`, is given the streamer that
#   generate() got. Or generate() refuses the two together.
# What happens: generate() gives the streamer the prompt, then calls the loop with streamer=None. No token follows, and end() is not
#   called. The returned tokens are complete. generate() takes the arguments that the callable has beyond those of its own loop, and
#   so drops all that the own loop has too.
# Who is hurt: own decoding rules (contrastive, by branches) behind a page that shows an answer as it grows. Its reader waits for a
#   token or for the end, and gets neither.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/packages" torch==2.14.1 transformers==5.24.0
PYTHONPATH="$place/packages" python3 - <<'PY'
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
model = GPT2LMHeadModel(GPT2Config(vocab_size=40, bos_token_id=None, eos_token_id=None, **sizes)).eval()
prompt = torch.tensor([[1, 2, 3]])


class Counting:
    """A streamer that counts what it is told."""

    def __init__(self):
        self.puts = self.ends = 0

    def put(self, value):
        self.puts += 1

    def end(self):
        self.ends += 1


given = []


def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, streamer=None, **more):
    """Decode by the library's own loop, with the arguments that it has."""
    given.append(streamer)
    return type(model)._sample(
        model, input_ids, logits_processor, stopping_criteria, generation_config, streamer=streamer, **more
    )


def answered(**more):
    streamer = Counting()
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        streamer=streamer,
        **more,
    )
    return found.tolist(), streamer


plain, own = answered(), answered(custom_generate=loop)
print(f"transformers {transformers.__version__}, torch {torch.__version__}: 3 tokens of a prompt, 5 new ones")
for name, (tokens, streamer) in {"own loop of generate": plain, "the same as a callable": own}.items():
    print(f"{name:24s} {len(tokens[0])} tokens, streamer: {streamer.puts} times put, {streamer.ends} times end")
print(f"streamer that the callable was given: {given[0]}")
assert plain[0] == own[0]
assert (plain[1].puts, plain[1].ends) == (6, 1)
assert (own[1].puts, own[1].ends, given) == (1, 0, [None])
PY
