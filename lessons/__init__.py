"""A course in notebooks, beside a finished run of pocket: see `lessons/README.md`."""
