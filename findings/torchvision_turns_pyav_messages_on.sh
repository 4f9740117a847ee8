#!/usr/bin/env bash
# Importing torchvision turns PyAV's message handler on for the whole process (torchvision 0.23, PyAV 18.1).
#
# One would guess: importing torchvision changes nothing in another library. A program that decodes video with PyAV behaves the same
# with and without it.
# What happens: PyAV ignores FFmpeg's messages by default (level None), because handling them in Python does not go well with threads.
# torchvision sets the level to ERROR when it is imported, where PyAV is installed. From then on each message of FFmpeg takes the
# interpreter's lock, also in the threads of a decoder. We have seen a process that stood still for ever: it closed a file, which waits
# for these threads. torchvision 0.26 no longer does this.
# Who is hurt: everybody who decodes video with PyAV in threads, in a process in which any library imports torchvision, such as timm or
# transformers. One way round it: av.logging.set_level(None) after the imports.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
cd "$here"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
  torch==2.8.0 torchvision==0.23.0 numpy==2.2.6 av==18.1.0
cat > run.py <<'PY'
import av
import av.logging

before = av.logging.get_level()
import torchvision

after = av.logging.get_level()
print("torchvision", torchvision.__version__, "PyAV", av.__version__)
print("level before:", before, " after the import of torchvision:", after)
assert before is None, "PyAV's default changed"
assert after == av.logging.ERROR, "importing torchvision no longer sets PyAV's level"
av.logging.set_level(None)
assert av.logging.get_level() is None
PY
env/bin/python run.py
