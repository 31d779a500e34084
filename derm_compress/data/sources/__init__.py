"""One file a source: a function `read(request: Request)` -> (Dataset, what the report adds).

A new source is a file here and a line in `derm_compress.data.load.SOURCES`, by whose name notebook
01 offers it; a folder with a csv of a published layout is a yaml here instead.
"""
