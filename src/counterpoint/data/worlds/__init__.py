"""Worlds: known truth that is drawn once and rendered into many forms.

A world has two functions. `scene(seed...)` draws a truth, a small frozen record, and reads or renders nothing.
Rendering turns a truth into pictures, sounds, texts or vectors, in one style or another. A data source is then an adapter of
a few lines: it asks for truths, renders them and hands over the form that a task takes.

    digits    one or several handwritten digits on a canvas
    sprites   moving sprites on a landscape, with what happens among them, seen and heard
"""
