"""Mathematics of adapters: compressing them and merging several into one.

Pure functions on tensors. No file, name or database is known here, and torch is imported at the
top of the modules: whoever runs without torch imports none of them but `rules`, the table of what
combines with what.
"""
