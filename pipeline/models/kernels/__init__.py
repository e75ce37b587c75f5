"""Code that makes training and sampling fast, mostly on a CPU. Nothing else depends on how it works.

Each module computes the same as a library, in less time, as a test shows. A module can be removed with its uses.
"""
