"""The report of a run: `python -m pipeline report RUN [RUN …]` writes HTML, JSON and Markdown.

`load` reads what the run wrote, `differences` and `targets` judge it, `curves` and `svg` lay out its charts, `summary`
makes metrics.json, `tables` and `page` make the HTML and the Markdown, `seeds` is the report over several runs, and
`compare` compares one recipe with another. Nothing is imported here, so that `--help` stays fast.
"""
