"""Code that makes training and sampling fast, mostly on a CPU. Nothing else depends on how it works.

Each module computes the same as a library, in less time. A test shows that they agree; it can be removed with its uses.
"""
