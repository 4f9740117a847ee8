"""The user's own files: tables, archives and folders, read one way whatever source names them.

A file becomes a `Segment` of columns (`delimited`, `records`, `parquet`, `archives`, `folders`), all files of a place a
`Table` (`table`). `roles` finds out what the columns are, `reader` reads their cells, and `splits` makes the contracts.
"""
