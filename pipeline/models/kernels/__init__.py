"""Code that makes training and sampling fast, mostly on a CPU. Nothing else depends on how it works.

Each module computes the same as a library, in less time. A test shows that the two agree, and the module can be removed
together with the lines that use it, in `models/generation.py`, `training/`, `rl/` and the recipe reward.
"""
