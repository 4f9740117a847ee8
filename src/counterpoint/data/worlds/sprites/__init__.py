"""The world of sprites: moving pictures on a landscape, with masks, boxes, identities, captions and sounds known.

    scenes.py     the truth: the events, and when each is seen and heard
    artwork.py    pictures and sounds of the package `arcade`
    casts.py      the sprites that each kind of event shows
    drawing.py    pictures of a scene at any time, and the object at each pixel
    captions.py   captions of the visible objects
    sounds.py     the sound track

The source `arcade` makes its clips from this world, and `sprites` its pictures with captions.
"""
