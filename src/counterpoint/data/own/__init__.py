"""Read the user's own files: tables, archives and folders, in the same way for every source.

A file becomes a `Segment` of columns (`delimited`, `records`, `parquet`, `archives`, `folders`). All files of a place become
a `Table` (`table`). `roles` assigns roles to the columns, `reader` reads their cells, `splits` splits the rows, and
`contracts` makes the contracts.
"""
