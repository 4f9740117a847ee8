"""The world of sprites: moving pictures on a landscape, with masks, boxes, identities, captions and sounds known.

    scenes.py     the truth: what happens when, and when it is seen and heard
    artwork.py    pictures and sounds of the package `arcade`
    casts.py      what each kind of event shows
    drawing.py    pictures of a scene at any time, and what stands where in them
    captions.py   what is seen, in words
    sounds.py     what is heard

`arcade` makes its clips from this world, and `sprites` its pictures with captions.
"""
