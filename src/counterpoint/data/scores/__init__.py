"""`scores`: snippets of engraved music and of its sound, aligned by note onsets: Bach's chorales in two domains.

An item is one onset: a window of the score and a window of the sound, both centred on it. The score is a strip: a grand staff
in one endless line, 120 pixels high. Soprano and alto are above, tenor and bass below. The sound is mono at 22,050 Hz,
played from the same notes. The centre of a window is a snippet as in the papers: 80 x 100 pixels (half of 160 x 200) and
`seconds` of sound. The margin around the snippet leaves room for shifts, stretching and rotation: 20 pixels above and
below, 10 left and right, and half a snippet of sound before and after. Beyond a piece's ends are paper and silence.

    domain   score                                           sound
    clean    verovio's font Leipzig, black on white           the piano at a strict tempo, all notes equally loud
    real     other fonts and spacings, uneven ink, turned     other keyboards, tempo that drifts and waits at fermatas,
             by up to 1.5 degrees here and there, blurred,    hands apart, touch, detuning, a room, noise, narrow band
             on grey paper with stains and grain

The real domain is simulated: its pictures are not scanned and its sounds are not recorded. Training, valid and test splits are
clean and hold different pieces. `shifts["real"]` is the test pieces in the real domain. `unpaired` holds real-domain
snippets of further pieces. Each of these pieces has only a score or only a sound, so that no piece is paired. `groups` are
the pieces' numbers.

No two pieces begin with the same tune: Bach set many tunes several times, and training and test must not share one. A chorale
repeats many phrases, so a snippet may have an equal one elsewhere in its piece. This limits a retrieval measure that
counts one correct answer per query.

The source reads chorales in four parts with one voice each, of 24 to 56 quarters, from music21's MusicXML files. There are 155
with different tunes. Repeats are played once. Lyrics, grace notes, ornaments, words and repeat signs are omitted.
music21 and pretty_midi must be installed, but are never imported: only their files are read. resvg converts SVG to pixels. It
is one wheel without a system library (cairosvg needs cairo). It draws the nested views and symbols that verovio writes.

Licences: the music is in the public domain. The files state no licence for its encodings. Most of them hold two texts: "PDF
(c) 2004 Margaret Greentree" and "used by permission". By its corpus/license.txt, music21
(BSD-3-Clause) distributes the corpus with the encoders' permission, and some encodings may not be used commercially. This
package contains none of them. verovio is LGPL-3.0-only and includes its fonts. resvg_py, tinysoundfont and pretty_midi are MIT. The
soundfont TimGM6mb.sf2 (T. Brechbill) comes with pretty_midi and names no licence in itself. Debian distributes it under
the GPL-2.

    notes.py        chorales read from the corpus
    engraving.py    the printed page
    synthesis.py    the sound
    renditions.py   pieces engraved and played, kept in the cache
    windows.py      the part of a piece that an item shows
    pairs.py        the source
"""
