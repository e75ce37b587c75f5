"""The report of a run: `python -m pipeline report RUN [RUN …]` writes HTML, JSON and Markdown.

`reading` loads what the run wrote, `differences` and `promises` judge it, `curves` and `svg` draw it,
`summary` makes metrics.json of it, `tables` and `page` the HTML, `markdown` its twin and `seeds` the
comparison of several runs. Nothing is imported here, so that `--help` stays fast.
"""
