"""The compiled passes through Gemma that an evaluation is made of: clean, with something spliced in, and backwards.

Rows lie over all devices of the mesh; Gemma's blocks are gathered one after the other where they are split.
"""
