"""One file a source: a function of a Request that gives a Dataset and what the report adds.

A new source is a file here and a line in `derm_compress.data.load.SOURCES`.
"""
