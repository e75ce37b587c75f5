"""
# Stage 3: sample answers of the stage-2 model, and label which of two is preferred

```bash
accelerate launch --config_file accelerate_config.yaml -m recipes.preferences --config recipes/pocket/3_preferences.yaml
```
"""

from pipeline.preferences.collect import PreferenceArguments, collect
from pipeline.training.entry import run


def main(args: PreferenceArguments) -> None:
    collect(args)


if __name__ == "__main__":
    run(main)
