"""What a user reads, copies and edits: one thin module for each stage, and a folder of YAML files for each scale."""

import gc

# Importing torch and transformers makes objects by the million, and looking for garbage among them after every 700
# takes a sixth of the time until a recipe answers `--help`.
gc.set_threshold(100_000, 20, 20)
