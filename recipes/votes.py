"""
# Stage 3: people say which of two answers they prefer

```bash
python -m recipes.votes --config recipes/pocket-people/3_votes.yaml
```

It writes the data set of the votes that the page has collected, and ends with exit code 4 while there are too few.
"""

from pipeline.preferences.people import VoteArguments, wait_for_votes
from pipeline.training.entry import run


def main(args: VoteArguments) -> None:
    wait_for_votes(args)


if __name__ == "__main__":
    run(main)
