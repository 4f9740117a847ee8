#!/usr/bin/env bash
# peft's LoRA of torch.nn.MultiheadAttention adds the adapter of the output projection twice.
#
# One would guess: a LoRA layer adds (alpha / r) B A to the weight it adapts, once, for in_proj and for out_proj.
# What happens: with target_modules naming the attention, the output equals a network with 2 (alpha / r) B A in out_proj, and once in
# in_proj. merge_and_unload gives the same doubled network, so the two agree and nothing looks wrong.
# Who is hurt: whoever reads the saved adapter elsewhere (a server, a merge script, another framework) and adds B A once: the outputs
# differ by as much as the adapter itself. The output projection also learns at twice the scale that lora_alpha says. open_clip's towers
# and PyTorch's own transformer layers are made of this module.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place" \
    torch==2.14.1 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0
OMP_NUM_THREADS=1 PYTHONPATH="$place" python3 - <<'PY'
import copy

import peft
import torch
import torch.nn.functional as F
from torch import nn

print("peft", peft.__version__, "torch", torch.__version__)
torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


base, x = Net().eval(), torch.randn(2, 5, 16)
config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["attn"], init_lora_weights=False)
model = peft.get_peft_model(copy.deepcopy(base), config).eval()
weights = dict(model.named_parameters())


def update(name):
    of = "base_model.model.attn." + name
    return weights[of + "lora_B.default.weight"] @ weights[of + "lora_A.default.weight"]  # alpha / r is 1


inside, outside = update(""), update("base_layer.out_proj.")
seq = x.transpose(0, 1)
with torch.no_grad():
    found = model(x)
    merged = copy.deepcopy(model).merge_and_unload()(x)
    apart = []
    for times in (0, 1, 2):
        attn = base.attn
        wanted = F.multi_head_attention_forward(
            seq, seq, seq, 16, 2, attn.in_proj_weight + inside, attn.in_proj_bias, None, None, False, 0.0,
            attn.out_proj.weight + times * outside, attn.out_proj.bias, training=False, need_weights=False,
        )[0].transpose(0, 1)
        apart.append(float((found - wanted).abs().max()))
        print(f"output adapter counted {times} times: apart from peft by {apart[-1]:.1e}")
    print(f"merged network apart from the adapted one by {float((merged - found).abs().max()):.1e}")
assert apart[1] > 0.1, apart
assert apart[2] < 1e-5, apart
assert float((merged - found).abs().max()) < 1e-5
PY
