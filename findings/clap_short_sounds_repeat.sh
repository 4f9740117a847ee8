#!/usr/bin/env bash
# CLAP's feature extractor of transformers repeats a short sound until 10 seconds are full, so its order of events is lost.
#
# One would guess: a sound that is shorter than the window is padded with silence, as other audio extractors do by default.
# What happens: padding is "repeatpad". Two seconds low and two seconds high become low, high, low, high; the features equal
#   those of the sound played twice. With padding="pad" there are one low and one high part.
# Who is hurt: evaluations and training of temporal relations ("a before b") with clips below 5 seconds: "b before a" is true, too.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place" transformers==5.24.0 numpy==2.4.6 torch==2.14.1
PYTHONPATH="$place" python3 - <<'PY'
import numpy as np
import transformers
from transformers import ClapFeatureExtractor

extractor = ClapFeatureExtractor()
rate = extractor.sampling_rate
time = np.arange(2 * rate) / rate
low, high = (np.sin(2 * np.pi * pitch * time).astype(np.float32) for pitch in (440, 3000))
sound = np.concatenate([low, high])


def features(wave, **more):
    return extractor(wave, sampling_rate=rate, return_tensors="np", **more)["input_features"][0, 0]


def parts(rows):
    """List which pitch is loudest, each change once."""
    loud = rows.max(1) > rows.max() - 60  # not silence
    found = ["high" if row.argmax() > 25 else "low" for row in rows[loud]]
    return [name for n, name in enumerate(found) if not n or found[n - 1] != name]


default, silence = parts(features(sound)), parts(features(sound, padding="pad"))
twice = bool(np.array_equal(features(sound), features(np.concatenate([sound, sound]))))
print(f"transformers {transformers.__version__}: padding {extractor.padding!r}: {default}; padding 'pad': {silence}")
print(f"features equal those of the sound played twice: {twice}")
assert default == ["low", "high", "low", "high"], default
assert silence == ["low", "high"], silence
assert twice
PY
