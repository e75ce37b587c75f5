"""Classifiers that transformers lacks: reward models and critics based on Llama 4.

Importing `pipeline.models` registers them, so that `AutoModelForSequenceClassification` and
`AutoModelForTokenClassification` make, save and load them like its own.
"""

from typing import Any

import transformers
from torch import nn
from transformers import Llama4TextConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pipeline.models.patches import name_body_of_llama4

TASKS: dict[str, tuple[Any, Any]] = {
    "SequenceClassification": (GenericForSequenceClassification, transformers.AutoModelForSequenceClassification),
    "TokenClassification": (GenericForTokenClassification, transformers.AutoModelForTokenClassification),
}
"""The transformers mixin that adds a linear head to any text model, and the Auto class of existing ones."""
# Names of the linear head in transformers' classifiers.
HEAD_NAMES = ("score", "classifier")


def find_head(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the name of a classifier's head and the head, or ("", an empty module) if the model does not have one."""
    for name in HEAD_NAMES:
        if hasattr(model, name):
            return name, getattr(model, name)
    return "", nn.Module()


def classifier(config_class: type[PreTrainedConfig], task: str) -> type[PreTrainedModel]:
    """Return the class of a text model with a linear head: transformers' own, or a new one if it has none.

    Args:
        config_class: Class of the text model's configuration.
        task: A key of `TASKS`.
    """
    mixin, auto_class = TASKS[task]
    if config_class in auto_class._model_mapping:
        return auto_class._model_mapping[config_class]
    language_model = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    base = next(cls for cls in language_model.__mro__ if cls.__name__.endswith("PreTrainedModel"))
    name = base.__name__.removesuffix("PreTrainedModel") + f"For{task}"
    # The body is under the same attribute as in the language model, so that the names of its weights match.
    attributes: dict[str, Any] = {
        "config_class": config_class,
        "base_model_prefix": language_model.base_model_prefix,
        "__module__": __name__,
        # transformers would look this up in the source of the class's module, which is this one.
        "_can_set_experts_implementation_cached_value": base._can_set_experts_implementation(),
    }
    return type(name, (mixin, base), attributes)


name_body_of_llama4()
for task, (_, auto_class) in TASKS.items():
    auto_class.register(Llama4TextConfig, classifier(Llama4TextConfig, task), exist_ok=True)
