"""What makes training and sampling fast, mostly on a CPU. Nothing else depends on how it is done.

Each module computes what a library computes as well, in less time. A test shows that the two agree, and the module can
be removed together with the lines that ask for it, in `models/generation.py`, `training/`, `rl/` and the recipe reward.
"""
