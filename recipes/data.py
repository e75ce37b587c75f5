"""
# The embedded data set, generated from a seed

```bash
python -m recipes.data --config recipes/pocket/0_data.yaml
```
"""

from pipeline.data.pocket.build import PocketArguments, build
from pipeline.training.entry import run


def main(args: PocketArguments) -> None:
    build(args)


if __name__ == "__main__":
    run(main)
