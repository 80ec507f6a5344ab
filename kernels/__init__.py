"""The arithmetic: op table, NumPy reference, model graphs, file formats. Knows no actor and nothing async."""
