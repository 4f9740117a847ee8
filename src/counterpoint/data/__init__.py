"""Data sources: built-in sets, and adapters for the user's own data. Listing them imports neither torch nor numpy.

The command line names a source as `NAME` or `NAME:ARGUMENT` (`arcade`, `xd-violence:/data/xd`). Options follow a question
mark (`arcade?train=100&seed=1`, `videos:/data/mine?visual=r3d_18`). Each source is one file of this package with a function
`load(argument: str | None, *, ...)`. Sources that read the same files through the same library share a file. A source that
serves several tasks returns the contract of the task that is asked for.
"""

from __future__ import annotations

import glob
import importlib
import inspect
import os
import re
from dataclasses import dataclass
from typing import Any

from counterpoint.errors import CounterpointError, unknown


@dataclass(frozen=True)
class Source:
    """One row of `counterpoint data`."""

    name: str
    task: str  # the one it serves by default
    module: str
    gives: str
    licence: str
    size: str  # of the training, valid and test split
    argument: str | None = None  # what follows the colon, None when nothing does
    needs: str = ""  # the extra that must be installed
    may: str | None = None  # what can follow the colon but need not
    also: tuple[str, ...] = ()  # further tasks it serves
    function: str = "load"  # in the module

    @property
    def tasks(self) -> tuple[str, ...]:
        return (self.task, *self.also)


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "arcade",
            "bags",
            "counterpoint.data.arcade",
            "audio-visual game clips: violent (explosions, hits, hurts, lasers) or not; sound late or off-screen in part",
            "CC0 (sprites and sounds of the arcade package)",
            "320 + 100 + 200 clips, 4.1 h of video in all, drawn once (about a minute) into 36 MB of features",
            needs="demo",
            also=("aligned",),
        ),
        Source(
            "sprites",
            "aligned",
            "counterpoint.data.sprites",
            "pictures of game sprites with captions; ?sound=1 adds their sounds; for `views` the event is the label",
            "CC0 (sprites and sounds of the arcade package)",
            "1,600 + 200 + 400 pictures, drawn once (half a minute) into 27 MB",
            needs="demo",
            also=("views",),
        ),
        Source(
            "async-bags",
            "bags",
            "counterpoint.data.async_bags",
            "synthetic bags of feature rows with audio-visual asynchrony and known truth: data of MACIL-SD's claim",
            "made on the spot",
            "320 + 200 + 200 bags, made in a second",
        ),
        Source(
            "xd-violence",
            "bags",
            "counterpoint.data.xd_violence",
            "the XD-Violence benchmark in its published I3D + VGGish feature layout",
            "the user's copy",
            "4,754 videos, about 60 GB of features",
            argument="DIR",
        ),
        Source(
            "ucf-crime",
            "bags",
            "counterpoint.data.ucf_crime",
            "the UCF-Crime benchmark: its videos with the authors' lists, Anomaly_Train.txt and the annotation of the test videos",
            "the user's copy",
            "1,610 + 290 videos, 128 hours; a tenth of training is the valid split",
            argument="DIR",
            needs="video",
        ),
        Source(
            "videos",
            "bags",
            "counterpoint.data.videos",
            "your own video files in DIR/train/{violent,normal} and DIR/test/{violent,normal}, with DIR/truth.csv; DIR/valid too, "
            "or a tenth of training",
            "yours",
            "what you have",
            argument="DIR",
            needs="video",
        ),
        Source(
            "cifar10",
            "views",
            "counterpoint.data.cifar10",
            "photographs of ten kinds of objects, 32 x 32 pixels (cifar10:DIR: from a folder)",
            "no licence stated by its authors (Krizhevsky 2009)",
            "45,000 + 5,000 + 10,000 images, a download of 170 MB; or a subset of 9,000 + 1,000 + 2,000 in $COUNTERPOINT_DATA",
            may="DIR",
        ),
        Source(
            "digits",
            "views",
            "counterpoint.data.digits",
            "handwritten digits, 8 x 8 pixels scaled up to 32 x 32",
            "CC BY 4.0 (UCI, optical recognition of handwritten digits; rides in scikit-learn)",
            "1,295 + 143 + 359 images, at hand",
        ),
        Source(
            "digit-patterns",
            "views",
            "counterpoint.data.digits",
            "handwritten digits under random patterns, an easy feature that hides a harder one: data of MCL's claim",
            "CC BY 4.0 (UCI, optical recognition of handwritten digits; rides in scikit-learn)",
            "969 + 109 + 719 images, at hand",
            function="load_patterns",
        ),
        Source(
            "digit-styles",
            "views",
            "counterpoint.data.digits",
            "handwritten digits in eight colour styles, of which training sees three: data of BSS's claim",
            "CC BY 4.0 (UCI, optical recognition of handwritten digits; rides in scikit-learn)",
            "1,081 + 120 + 596 images, and the last 596 in unseen styles, at hand",
            function="load_styles",
        ),
        Source(
            "digit-canvases",
            "views",
            "counterpoint.data.digits",
            "several handwritten digits in a grid, on noise; the digits present are labels: data of OBoW's and MLCD's claims",
            "CC BY 4.0 (UCI, optical recognition of handwritten digits; rides in scikit-learn)",
            "2,000 + 500 + 500 images, at hand",
            function="load_canvases",
        ),
        Source(
            "tile-canvases",
            "views",
            "counterpoint.data.digits",
            "a handwritten digit among tiles of texture in random colours; the digit is the class: data of CMD's claim",
            "CC BY 4.0 (UCI, optical recognition of handwritten digits; rides in scikit-learn)",
            "2,000 + 500 + 500 images, at hand",
            function="load_tiles",
        ),
        Source(
            "digit-colours",
            "views",
            "counterpoint.data.digits",
            "three handwritten digits as colours; two of them are the class, one of 100: data of DisWOT's claim",
            "CC BY 4.0 (UCI, optical recognition of handwritten digits; rides in scikit-learn)",
            "2,000 + 500 + 500 images, at hand",
            function="load_colours",
        ),
        Source(
            "digit-overlays",
            "views",
            "counterpoint.data.digits",
            "a turned handwritten digit; half of the pictures, the targets, have a second digit over it: data for SepCLR",
            "CC BY 4.0 (UCI, optical recognition of handwritten digits; rides in scikit-learn)",
            "2,000 + 500 + 500 images, at hand",
            function="load_overlays",
        ),
        Source(
            "latent-factors",
            "views",
            "counterpoint.data.latent_factors",
            "pictures of 8 x 8 pixels with known causes, of which half, the targets, have more: data of SepCLR's claim",
            "made on the spot",
            "8,000 + 1,000 + 1,000 images, made in a second",
        ),
        Source(
            "query-digits",
            "views",
            "counterpoint.data.query_digits",
            "digits under labels that are often those of another sense, with captions as found on the web: data of CAPro's claim",
            "CC BY 4.0 (UCI, optical recognition of handwritten digits; rides in scikit-learn)",
            "1,000 + 125 + 540 pictures, at hand",
        ),
        Source(
            "query-canvases",
            "views",
            "counterpoint.data.query_digits",
            "pictures of one to three digits under several labels, which are often those of another sense, with captions",
            "CC BY 4.0 (UCI, optical recognition of handwritten digits; rides in scikit-learn)",
            "1,000 + 400 + 400 pictures, at hand",
            function="load_canvases",
        ),
        Source(
            "web-digits",
            "views",
            "counterpoint.data.digits",
            "labelled digits, and unlabelled web pictures of another distribution, most without a digit: data of KD3's claim",
            "CC BY 4.0 (UCI, optical recognition of handwritten digits; rides in scikit-learn)",
            "600 + 125 + 540 digits and 2,000 web pictures, at hand",
            function="load_web",
        ),
        Source(
            "digit-numbers",
            "targets",
            "counterpoint.data.numbers",
            "two handwritten digits side by side; the target is the number that they write, 0 to 99: data of SupReMix's claim",
            "CC BY 4.0 (UCI, optical recognition of handwritten digits; rides in scikit-learn)",
            "600 + 300 + 1,500 images, at hand",
            function="load_numbers",
        ),
        Source(
            "diabetes",
            "targets",
            "counterpoint.data.numbers",
            "a table: ten numbers of a patient; the target is the progression of the disease after a year",
            "no licence stated by its authors (Efron et al. 2004; rides in scikit-learn)",
            "266 + 66 + 110 patients, at hand",
            function="load_diabetes",
        ),
        Source(
            "pulses",
            "targets",
            "counterpoint.data.numbers",
            "noisy series of beats of varying form; the target is their number a minute",
            "made on the spot",
            "600 + 500 + 500 series of 4 seconds, made in a moment",
            function="load_pulses",
        ),
        Source(
            "photographs",
            "views",
            "counterpoint.data.photographs",
            "squares of two photographs, to learn to enlarge pictures; ?sprites=1 adds game sprites: data of PCL-SR's claim",
            "CC BY 2.0 (danielbuechele, vultilion; ride in scikit-learn)",
            "24 + 8 + 8 squares of 96 pixels, at hand",
        ),
        Source(
            "shapes",
            "dense",
            "counterpoint.data.shapes",
            "textured shapes on a flat ground, with a class for each pixel, boxes and captions: data of PixPro's claim",
            "made on the spot",
            "1,200 + 200 + 200 images, made in a second",
            also=("views", "aligned"),
        ),
        Source(
            "sensors",
            "dense",
            "counterpoint.data.sensors",
            "street-like scenes seen by four sensors (rgb, some at night, depth, events, lidar), with a class for each pixel and "
            "captions: data of Any2Seg's claim",
            "made on the spot",
            "800 + 200 + 200 scenes of 48 x 48 pixels, made in seconds",
            also=("views", "aligned"),
        ),
        Source(
            "phantoms",
            "dense",
            "counterpoint.data.phantoms",
            "slices of synthetic volumes of three tissues, of which one training volume has masks: data of Global-Local's claim",
            "made on the spot",
            "21 + 1 + 8 volumes of 16 slices, made in a second",
            also=("views",),
        ),
        Source(
            "brains",
            "dense",
            "counterpoint.data.brains",
            "slices of brains with grey and white matter, bent from the template that the package nilearn brings",
            "BSD (nilearn); the template is free with attribution (McConnell Brain Imaging Centre)",
            "12 + 1 + 4 subjects of 16 slices, made in seconds",
            needs="dense",
            also=("views",),
        ),
        Source(
            "medical-shapes",
            "dense",
            "counterpoint.data.medical_shapes",
            "four synthetic kinds of imaging with contradictory rules, and natural pictures: data of ESP-MedSAM's claim",
            "made on the spot",
            "600 + 80 + 160 images, made in a second",
            also=("views",),
        ),
        Source(
            "moving-shapes",
            "frames",
            "counterpoint.data.moving_shapes",
            "clips of look-alike shapes that turn, are covered and disappear, with their identities: data of CTVIS's claim",
            "made on the spot",
            "120 + 40 + 40 clips of 12 frames, made in seconds",
        ),
        Source(
            "shifted-shapes",
            "regions",
            "counterpoint.data.shifted_shapes",
            "shapes with boxes in two domains, clean and inverted on textured ground: data of WSCoL's claim",
            "made on the spot",
            "300 + 300 training pictures of 64 pixels with 40 proposals, made in seconds",
        ),
        Source(
            "moving-objects",
            "tokens",
            "counterpoint.data.moving_objects",
            "sentences on invented objects, some with clips of their size, speed and bounciness: data of VidLanKD's claim",
            "made on the spot",
            "10,000 + 2,400 + 2,400 texts and 5,000 with clips, made in a second",
        ),
        Source(
            "texts",
            "tokens",
            "counterpoint.data.texts",
            "your own texts, a line or a row each, some with videos: FILE.txt, a folder of them, or a table",
            "yours",
            "what you have",
            argument="PLACE",
        ),
        Source(
            "grid-chats",
            "chats",
            "counterpoint.data.grid_chats",
            "questions and captions of pictures of a grid of coloured shapes, some answers wrong: data of RITUAL's claim",
            "made on the spot",
            "1,500 + 150 + 300 pictures with 3 chats each, made in a second",
        ),
        Source(
            "digit-documents",
            "chats",
            "counterpoint.data.digit_documents",
            "pictures of two handwritten digits with captions, and documents of several: data of COSMO's claim",
            "CC BY 4.0 (UCI, optical recognition of handwritten digits; rides in scikit-learn)",
            "1,500 + 300 + 300 pairs, 500 + 50 + 50 documents, made in a second",
        ),
        Source(
            "digit-questions",
            "chats",
            "counterpoint.data.digit_questions",
            "ten kinds of questions about handwritten digits, some much rarer than others: data of CoMD's claim",
            "CC BY 4.0 (UCI, optical recognition of handwritten digits; rides in scikit-learn)",
            "400 questions, 300 + 600 of valid and test, made in a moment",
        ),
        Source(
            "misconceptions",
            "chats",
            "counterpoint.data.misconceptions",
            "invented facts that texts tell truly or falsely, and choices between truth and misconception: data of LOL's claim",
            "made on the spot",
            "5,000 chats, 75 + 225 choices, made in a moment",
        ),
        Source(
            "media-requests",
            "chats",
            "counterpoint.data.media_requests",
            "requests for texts, pictures, sounds and films, whose answers name modality and prompt: data of SwitchGPT's claim",
            "made on the spot",
            "3,000 plain chats, 1,176 requests, 72 + 144 requests by new wordings for new entities, made in a moment",
        ),
        Source(
            "chats",
            "chats",
            "counterpoint.data.chat_files",
            "your own chats with pictures: JSON or JSONL of messages, LLaVA's, POPE's and MME's layouts: ?images=DIR&size=PIXELS",
            "yours",
            "what you have",
            argument="PLACE",
        ),
        Source(
            "digit-scenes",
            "generation",
            "counterpoint.data.digit_scenes",
            "a handwritten digit in a colour, size and place, with a caption; the digit is the class: data of SupCon-T2I's claim",
            "CC BY 4.0 (UCI, optical recognition of handwritten digits; rides in scikit-learn)",
            "1,200 + 400 + 400 pictures of 16 pixels, drawn in a second",
        ),
        Source(
            "digit-subjects",
            "generation",
            "counterpoint.data.digit_subjects",
            "drawings of digits as subjects, 8 frames of each in other scenes, with captions: data of CustomContrast's claim",
            "CC BY 4.0 (UCI, optical recognition of handwritten digits; rides in scikit-learn)",
            "150 + 50 + 50 subjects, 2,000 pictures of 16 pixels, drawn in a second",
        ),
        Source(
            "subjects",
            "generation",
            "counterpoint.data.subject_folders",
            "your own subjects: a folder of pictures for each in FOLDER, with captions in captions.jsonl where you have them",
            "yours",
            "what you have",
            argument="FOLDER",
        ),
        Source(
            "symbol-tasks",
            "demonstrations",
            "counterpoint.data.symbol_tasks",
            "random maps from symbols to labels with demonstrations and queries, and plain texts: data of MEND's claim",
            "made on the spot",
            "3,000 + 100 + 200 tasks with 4 queries each and 6,000 texts, made in a moment",
        ),
        Source(
            "demonstrations",
            "demonstrations",
            "counterpoint.data.demonstration_files",
            "your own tasks in MetaICL's layout: rows of task, input, output and options: FILE.jsonl or a folder; ?texts=FILE",
            "yours",
            "what you have",
            argument="PLACE",
        ),
        Source(
            "latent-classes",
            "episodes",
            "counterpoint.data.latent_classes",
            "items of many rare Gaussian classes with made-up names, and of classes that training lacks: data of SINC's claim",
            "made on the spot",
            "8,000 + 1,500 + 1,500 items of 1,000 known and 60 + 60 unseen classes, made in a moment",
        ),
        Source(
            "features",
            "episodes",
            "counterpoint.data.feature_files",
            "your own features of frozen encoders with class names or captions: .npz, embeddings of a run, or tables: ?slots=A,B",
            "yours",
            "what you have",
            argument="PLACE",
        ),
        Source(
            "task-dialogs",
            "dialogs",
            "counterpoint.data.task_dialogs",
            "booking dialogs whose turns have a domain, an intent, a slot and a value: data of SPACE-2's claim",
            "made on the spot",
            "3,000 + 1,000 + 1,000 annotated dialogs and 3,000 without annotation, made in a second",
        ),
        Source(
            "dialogs",
            "dialogs",
            "counterpoint.data.dialog_files",
            "your own dialogs in the chat format (JSONL of messages), some with annotations: FILE.jsonl or a folder",
            "yours",
            "what you have",
            argument="PLACE",
        ),
        Source(
            "digit-streams",
            "aligned",
            "counterpoint.data.digit_streams",
            "two handwritten digits side by side and their words, in five phases of right digits: data of Mod-X's claim",
            "CC BY 4.0 (UCI, optical recognition of handwritten digits; rides in scikit-learn)",
            "3,840 + 1,000 + 1,000 pairs, at hand",
        ),
        Source(
            "digit-words",
            "aligned",
            "counterpoint.data.digit_streams",
            "a handwritten digit as noisy intensities, and its word; the digit is the class: data of COCONUT's claim",
            "CC BY 4.0 (UCI, optical recognition of handwritten digits; rides in scikit-learn)",
            "1,000 + 140 + 300 pairs, at hand",
            function="load_words",
        ),
        Source(
            "spoken-words",
            "aligned",
            "counterpoint.data.spoken_words",
            "spoken digits of several speakers, or spoken commands in many voices, with transcripts; intents are the classes",
            "recorded: CC BY-SA 4.0 (Free Spoken Digit Dataset), the user's copy; espeak NG, which speaks the commands, is "
            "GPL-3.0-or-later, run as a process of its own",
            "432 + 48 + 120 commands, spoken once (seconds); or 360 + 40 + 100 digits in $COUNTERPOINT_DATA",
            needs="speech",
            may="KIND",
        ),
        Source(
            "digit-domains",
            "views",
            "counterpoint.data.digit_domains",
            "one handwritten digit in five domains, with a name in each: data of MulKI's claim; for `aligned` with the names",
            "CC BY 4.0 (UCI, optical recognition of handwritten digits; rides in scikit-learn)",
            "3,200 + 2,000 + 2,000 images of 8 pixels, at hand",
            also=("aligned",),
        ),
        Source(
            "stream",
            "views",
            "counterpoint.data.streams",
            "another source in phases, learned one after another: ?by=class&phases=5, or by domain, group, several sources",
            "the source's",
            "as the source",
            argument="SOURCE",
            also=("aligned",),
        ),
        Source(
            "digit-parties",
            "federations",
            "counterpoint.data.digit_parties",
            "a public set of two handwritten digits and their words, and seven parties with few right digits: data of CreamFL's "
            "claim",
            "CC BY 4.0 (UCI, optical recognition of handwritten digits; rides in scikit-learn)",
            "200 + 400 + 400 public pairs and 7 x 300 private items, at hand",
        ),
        Source(
            "parties",
            "federations",
            "counterpoint.data.federations",
            "your own federation: DIR/public.csv, and DIR/parties/NAME.csv for each party, with the columns of `manifest`",
            "yours",
            "what you have",
            argument="DIR",
        ),
        Source(
            "styled-shapes",
            "views",
            "counterpoint.data.styled_shapes",
            "one coloured shape in one of four drawing styles, with its name: data of VL2V-ADiP's and its siblings' claims; for "
            "`aligned` with captions",
            "made on the spot",
            "2,048 + 512 + 1,024 images of 16 pixels, made in a second",
            also=("aligned",),
        ),
        Source(
            "clusters",
            "views",
            "counterpoint.data.clusters",
            "synthetic grey pictures of Gaussian clusters of very different sizes: data of iSogCLR's claim",
            "made on the spot",
            "440 + 480 + 480 images, made in a moment",
        ),
        Source(
            "glyphs",
            "aligned",
            "counterpoint.data.glyphs",
            "named icons in 14 drawing styles: pictures and captions, split by name; for `views` the style is the label",
            "SIL OFL, Apache-2.0, MIT, CC BY 4.0, by font (of the qtawesome package)",
            "13,256 + 1,480 + 2,000 icons, drawn once (seconds) into 7 MB",
            needs="glyphs",
            also=("views",),
        ),
        Source(
            "speech",
            "aligned",
            "counterpoint.data.speech",
            "icons, their names and the names spoken in many voices; with ?pairing=m3 a text in five languages and a spoken "
            "word determine the picture together, neither alone",
            "icons as of glyphs; espeak NG, which speaks, is GPL-3.0-or-later, run as a process of its own",
            "3,600 + 400 + 1,000 triplets and 1,000 in unheard voices, spoken once (seconds) into 115 MB",
            needs="speech",
        ),
        Source(
            "events",
            "aligned",
            "counterpoint.data.events",
            "short synthetic sounds, one event each, and their names, to compose clips of two events: data of TeminAL's claim",
            "made on the spot",
            "480 + 160 + 160 sounds of 0.4 seconds, made in a second",
        ),
        Source(
            "scores",
            "aligned",
            "counterpoint.data.scores.pairs",
            "snippets of engraved chorales and of their sound, aligned by onset; test and unpaired also in a simulated scan and "
            "recording",
            "music in the public domain; its encodings (music21's corpus) by permission, no licence stated; soundfont GPL-2",
            "2,055 + 277 + 1,202 pairs, 3,808 unpaired, drawn and played once (about 35 s) into 143 MB",
            needs="music",
        ),
        Source(
            "xor",
            "aligned",
            "counterpoint.data.xor",
            "synthetic bits in three modalities; only the first two together determine the third: data of Symile's claim",
            "made on the spot",
            "4,096 + 1,000 + 1,000 items, made in a moment",
        ),
        Source(
            "digit-halves",
            "aligned",
            "counterpoint.data.digits",
            "upper and lower halves of handwritten digits, or the upper as a frozen network sees it",
            "CC BY 4.0 (UCI, optical recognition of handwritten digits; rides in scikit-learn)",
            "1,260 + 140 + 397 pairs, at hand",
            function="load_halves",
        ),
        Source(
            "noisy-triplets",
            "aligned",
            "counterpoint.data.noisy_triplets",
            "synthetic triplets, many of them mismatched: data of gradient harmonization's claim",
            "made on the spot",
            "1,600 + 1,000 + 1,000 triplets, made in a moment",
        ),
        Source(
            "latent-views",
            "aligned",
            "counterpoint.data.latent_views",
            "synthetic items of five classes in three modalities that share few hidden causes: data of M3CoL's claim",
            "made on the spot",
            "240 + 800 + 800 items, made in a moment",
        ),
        Source(
            "clustered-pairs",
            "aligned",
            "counterpoint.data.clustered_pairs",
            "synthetic vectors in two modalities, close together in 40 clusters: data of DCD's claim",
            "made on the spot",
            "3,000 + 300 + 300 items, made in a moment",
        ),
        Source(
            "digit-captions",
            "aligned",
            "counterpoint.data.digits",
            "handwritten digits, 8 x 8 pixels, with captions of mostly other words: data of the improved baselines' claim",
            "CC BY 4.0 (UCI, optical recognition of handwritten digits; rides in scikit-learn)",
            "300 + 143 + 359 pairs, at hand",
            function="load_captions",
        ),
        Source(
            "digit-pairs",
            "aligned",
            "counterpoint.data.digits",
            "two handwritten digits side by side and the words that name them, some swapped: data of ALBEF's claim",
            "CC BY 4.0 (UCI, optical recognition of handwritten digits; rides in scikit-learn)",
            "1,024 + 500 + 500 pairs, at hand",
            function="load_pairs",
        ),
        Source(
            "visits",
            "sequences",
            "counterpoint.data.interactions",
            "synthetic histories of users who follow chains of items, with random items between",
            "made on the spot",
            "600 users, 200 items, made in a moment",
            function="load_visits",
        ),
        Source(
            "movielens",
            "sequences",
            "counterpoint.data.interactions",
            "MovieLens-100K, films that users rated in order of time: from the package recbole (movielens:DIR: from a folder)",
            "research use, no redistribution (GroupLens; rides in the package recbole)",
            "943 users, 1,682 films, 100,000 ratings",
            may="DIR",
            function="load_movielens",
        ),
        Source(
            "themed-bundles",
            "sequences",
            "counterpoint.data.bundles",
            "synthetic sets of items near a theme, with noisy features of the items: data of CLHE's claim",
            "made on the spot",
            "500 + 100 + 300 sets of 400 items, made in a moment",
            function="load_themed",
        ),
        Source(
            "bundles",
            "sequences",
            "counterpoint.data.bundles",
            "your own sets, such as playlists: a row for each item of a set; ?features=FILE.npz has vectors of items",
            "yours",
            "what you have",
            argument="FILE",
        ),
        Source(
            "interactions",
            "sequences",
            "counterpoint.data.interactions",
            "your own users and items, an interaction in a row with its time: ?user=COLUMN&item=COLUMN&time=COLUMN",
            "yours",
            "what you have",
            argument="FILE",
        ),
        Source(
            "manifest",
            "aligned",
            "counterpoint.data.manifest",
            "your own items in any modalities (image, text, audio, video, vector), any of them missing: CSV, JSONL, Parquet, "
            "WebDataset",
            "yours",
            "what you have",
            argument="FILE",
            also=("targets",),
            function="load_manifest",
        ),
        Source(
            "imagefolder",
            "views",
            "counterpoint.data.tables",
            "your own images in DIR/CLASS/ or DIR/train/CLASS/ and DIR/test/CLASS/; captions from a metadata.csv",
            "yours",
            "what you have",
            argument="DIR",
            also=("aligned", "targets"),
            function="load_imagefolder",
        ),
        Source(
            "masks",
            "dense",
            "counterpoint.data.masks",
            "your own images with a class for each pixel, in DIR/images/ and DIR/masks/; several modalities side by side",
            "yours",
            "what you have",
            argument="DIR",
            also=("views", "aligned"),
        ),
        Source(
            "volumes",
            "dense",
            "counterpoint.data.volumes",
            "your own scans as NIfTI files with a class for each voxel, in DIR/images/ and DIR/masks/, slice by slice",
            "yours",
            "what you have",
            argument="DIR",
            also=("views",),
        ),
        Source(
            "ytvis",
            "frames",
            "counterpoint.data.ytvis",
            "your own video frames with tracked boxes or masks, in the JSON layout of YouTube-VIS: ?images=DIR names their folder",
            "yours",
            "what you have",
            argument="FILE",
        ),
        Source(
            "coco",
            "regions",
            "counterpoint.data.coco",
            "pictures with boxes of your own, in COCO's JSON layout, and a second domain to adapt to",
            "yours",
            "what you have",
            argument="FILE",
            needs="dense",
        ),
        Source(
            "parquet",
            "views",
            "counterpoint.data.tables",
            "your own images with labels or captions in Parquet files: ?image=COLUMN&label=COLUMN&text=COLUMN. Or "
            "images, series or columns of numbers with a real-valued ?target=COLUMN",
            "yours",
            "what you have",
            argument="PATH",
            also=("aligned", "targets"),
            function="load_parquet",
        ),
        Source(
            "csv",
            "views",
            "counterpoint.data.tables",
            "your own images with labels or captions, their paths in CSV files: options as parquet's",
            "yours",
            "what you have",
            argument="PATH",
            also=("aligned", "targets"),
            function="load_csv",
        ),
        Source(
            "webdataset",
            "views",
            "counterpoint.data.tables",
            "your own images with labels or captions in WebDataset tar files: options as parquet's",
            "yours",
            "what you have",
            argument="PATTERN",
            also=("aligned", "targets"),
            function="load_webdataset",
        ),
        Source(
            "lance",
            "views",
            "counterpoint.data.stores",
            "your own items in tables of Lance: images with labels or targets, by parquet's options; any modalities, by manifest's",
            "yours",
            "what you have",
            argument="DIR",
            needs="lance",
            also=("aligned", "targets"),
            function="load_lance",
        ),
        Source(
            "litdata",
            "views",
            "counterpoint.data.stores",
            "your own items in optimised folders of litdata: options as lance's",
            "yours",
            "what you have",
            argument="DIR",
            needs="litdata",
            also=("aligned", "targets"),
            function="load_litdata",
        ),
    )
}


# Sources that read a place on disk, and the content they expect there.
PLACES = {
    "imagefolder": "pictures, a folder for each class",
    "masks": "pictures and masks, a folder for each",
    "manifest": "items in several modalities, a row each",
    "interactions": "users and items, an interaction in a row",
    "csv": "pictures with labels or captions",
    "parquet": "the same in Parquet files",
    "lance": "items in a table of Lance",
    "litdata": "items in an optimised folder of litdata",
    "videos": "video files",
}


def source_name(spec: str) -> str:
    """Return the name in `NAME:ARGUMENT?OPTIONS`; of a stream, that of its first source."""
    name, _, argument = spec.partition("?")[0].partition(":")
    if name != "stream" or not argument:
        return name
    from urllib.parse import unquote  # 20 ms of every start otherwise

    return source_name(unquote(argument.partition(",")[0]))


def load(spec: str, *, task: str | None = None, **options: Any) -> Any:
    """Load the data of a source.

    Args:
        spec: `NAME` or `NAME:ARGUMENT`, with `?OPTION=VALUE&OPTION=VALUE` after it if wanted. Brackets, asterisks and question
            marks of a path that exists belong to the path. `memory:...` names an object that this process holds (memory.py).
        task: bags, views, dense, frames, regions, targets, sequences, chats, aligned, federations or generation; the result is
            that task's contract (`BagData`, `ImageData`, `DenseData`, `ClipData`, `RegionData`, `TargetData`, `HistoryData`,
            `ChatData`, `AlignedData`, `FederatedData`, `GenerationData`). A source for aligned also serves generation, by its
            pictures and captions. Default: the source's first task.
        options: options of the source; they override those in `spec`.

    Raises CounterpointError for an unknown name or option, and for a missing or superfluous argument. Raises it too for a
    source that does not serve the task. Raises DataError for files that are missing or damaged.
    """
    name = spec.partition("?")[0].partition(":")[0]
    if name == "memory":
        from counterpoint.data.memory import load_memory

        return load_memory(spec, task)
    place, query = _place_and_query(spec)
    argument = place.partition(":")[2]
    if name not in SOURCES:
        if os.path.lexists(spec):
            ways = (f"{way}:{spec} ({what})" for way, what in PLACES.items())
            raise CounterpointError(f"'{spec}' is a path, not a data source; say how to read it: {', '.join(ways)}")
        raise unknown("data source", name, SOURCES)
    source = SOURCES[name]
    if source.argument and not argument:
        raise CounterpointError(f"data source '{name}' needs a path: --data {name}:{source.argument}")
    if task == "generation" and task not in source.tasks and "aligned" in source.tasks:  # of its pictures and captions
        from counterpoint.data.generation import of_aligned

        return of_aligned(load(spec, task="aligned", **options))
    if task is not None and task not in source.tasks:
        fit = ", ".join(other.name for other in SOURCES.values() if task in other.tasks)
        raise CounterpointError(
            f"data source '{name}' is for the task {' or '.join(source.tasks)}, not for {task}; "
            + (f"sources for that task: {fit}" if fit else "no source serves that task yet")
        )
    if argument and not source.argument and not source.may:
        raise CounterpointError(f"data source '{name}' takes no argument, got '{argument}'")
    loader = getattr(importlib.import_module(source.module), source.function)
    if task is not None and source.also:
        options["task"] = task
    return loader(argument or None, **(_options(name, query, loader) | options))


def _place_and_query(spec: str) -> tuple[str, str]:
    """Split a spec into `NAME:ARGUMENT` and the options that follow it.

    A question mark is part of the path where such a path exists, or where no `word=` follows it.
    """
    marks = [match.start() for match in re.finditer(r"\?", spec)]
    name, _, argument = spec.partition(":")
    if not marks or not argument or marks[0] < len(name):
        place, _, query = spec.partition("?")
        return place, query
    if os.path.lexists(argument):
        return spec, ""
    for at in reversed(marks):
        if os.path.lexists(spec[len(name) + 1 : at]):
            return spec[:at], spec[at + 1 :]
    at = next((at for at in reversed(marks) if re.match(r"\w+=", spec[at + 1 :])), marks[0])
    if not re.match(r"\w+=", spec[at + 1 :]) and glob.glob(argument):  # a pattern of its own
        return spec, ""
    return spec[:at], spec[at + 1 :]


def _options(name: str, query: str, loader: Any) -> dict[str, Any]:
    """Parse `key=value&...` as keyword arguments of `loader`, each as the type of its default."""
    known = {
        k: p.default
        for k, p in inspect.signature(loader).parameters.items()
        if p.kind is p.KEYWORD_ONLY and k != "task"
    }
    out: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        if key not in known:
            raise unknown(f"'{name}' option", key, known)
        try:
            out[key] = type(known[key])(value)
        except ValueError as error:
            raise CounterpointError(
                f"data source '{name}': {key}={value} is not a {type(known[key]).__name__}"
            ) from error
    return out
