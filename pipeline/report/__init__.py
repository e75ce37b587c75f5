"""The report of a run: `python -m pipeline report RUN [RUN …]` writes HTML, JSON and Markdown.

`load` reads what the run wrote, `differences`, `targets` and `verdict` judge it, `curves` lays out its charts,
`summary` makes metrics.json, `page` the HTML and the Markdown, `seeds` the report over several runs, and `compare`
compares one recipe with another. Nothing is imported here, so that `--help` stays fast.
"""
