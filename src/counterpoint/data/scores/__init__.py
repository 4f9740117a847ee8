"""`scores`: snippets of engraved music and of its sound, aligned by note onsets: Bach's chorales in two domains.

An item is one onset: a window of the score and a window of the sound, both centred on it. The score is a grand staff
(soprano and alto above, tenor and bass below) in one endless line, a strip, 120 pixels high; the sound is mono at
22,050 Hz, played from the same notes. A snippet as a paper cuts it is the centre of a window: 80 x 100 pixels (half of
160 x 200) and `seconds` of sound. What lies around it (20 pixels above and below, 10 left and right, half a snippet of
sound before and after) is there for shifts, stretching and rotation. Beyond a piece's ends are paper and silence.

    domain   score                                           sound
    clean    verovio's font Leipzig, black on white           the piano at a strict tempo, all notes equally loud
    real     other fonts and spacings, uneven ink, turned     other keyboards, tempo that drifts and waits at fermatas,
             by up to 1.5 degrees here and there, blurred,    hands apart, touch, detuning, a room, noise, narrow band
             on grey paper with stains and grain

Real is a likeness: nothing here was scanned or recorded. Training, valid and test are clean, of different pieces;
`shifts["real"]` is the test pieces in the real domain; `unpaired` holds real-domain snippets of further pieces, some
pieces as score only and the others as sound only, so that not even a piece is paired. `groups` are the pieces' numbers.
No two pieces begin with the same tune: Bach set many a tune several times, and it must not stand in training and test.
A chorale says many a phrase twice, so a snippet may have a twin at another place of its piece; a retrieval measure that
counts one right answer per query has its ceiling there.

What is read: chorales in four parts with one voice each, of 24 to 56 quarters, from the MusicXML files of the package
music21; there are 155 with tunes of their own. Repeats are played once; lyrics, grace notes, ornaments, words and
repeat signs are left out, in print and in sound. music21 and pretty_midi are found, never imported: only their files
are read. SVG becomes pixels through resvg, which is one wheel without a system library (cairosvg wants cairo) and draws
what verovio writes, nested views and symbols.

Licences: the music is in the public domain. No licence is stated for its encodings: most of the files say "PDF (c) 2004
Margaret Greentree" and "used by permission"; music21 (BSD-3-Clause) says in its corpus/license.txt that it distributes
the corpus with the encoders' permission and that some encodings may not be used commercially. Nothing of them is in
this package. verovio is LGPL-3.0-only and brings its fonts; resvg_py, tinysoundfont and pretty_midi are MIT; the
soundfont TimGM6mb.sf2 (T. Brechbill), which rides in pretty_midi, names no licence in itself; Debian distributes it
under the GPL-2.

    notes.py        chorales read from the corpus
    engraving.py    the printed page
    synthesis.py    the sound
    renditions.py   pieces engraved and played, kept in the cache
    windows.py      what an item shows of its piece
    pairs.py        the source
"""
