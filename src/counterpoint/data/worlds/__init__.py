"""Worlds: known truth that is drawn once and rendered in many forms.

A world has two parts. `scene(seed...)` draws a truth, a small frozen record; it neither reads files nor renders. Rendering
functions turn a truth into pictures, sounds, texts or vectors, in different styles. So a data source is an adapter of a few
lines: it draws truths, renders them and returns the form of a task.

    digits    one or several handwritten digits on a canvas
    events    sound events in time, one or several in a scene
    sprites   moving sprites on a landscape, with visible and audible events
"""
