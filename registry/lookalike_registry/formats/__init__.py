"""Adapter files of other programs, written and read. Torch, but for process.py.

    export.py   one of our files → the files of a format       kohya.py              LoRA, A1111's
    load.py     a foreign file → one of ours                   diffusers_lora.py     LoRA
    process.py  exporting, as a process of its own             textual_inversion.py  learned words
                                                               custom_diffusion.py   K and V

A file is only taken whole: keys that are not understood refuse it, each by its name.
"""
