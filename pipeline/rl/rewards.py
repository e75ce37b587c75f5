"""The rewards of a rollout: reward models and reward functions, called together, checked and kept.

TRL calls its reward functions one after the other, and turns what they return into advantages at once. Here, the first
of these calls calls all functions. That is how a reward that is only measured (weight 0) knows which completions the
others have scored, and how PPO gets the rewards themselves, which TRL throws away:

    completions ──► Rewards ──► table (B, rewards) ──► TRL asks for its columns, one by one
                                       └─────────────► PPO reads `Rewards.table`
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import is_async_callable

from pipeline.errors import RunStopped, UserError
from pipeline.models.kernels.length_groups import call_by_length
from pipeline.models.tokenizer import as_text, special_tokens
from pipeline.rewards import loading


class RewardModel:
    """A sequence classifier with one label, as a reward function.

    It reads a completion that was cut off as it stands, without the end of turn that its chat template adds. One that
    spells a special token, piece by piece, is encoded as text, so that it cannot forge a turn.

    Args:
        model: The classifier, on its device; maybe wrapped or compiled.
        tokenizer: Its tokenizer.
        ends: Token ids that end a turn of the policy.
        template: Further arguments of the chat template, `chat_template_kwargs`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        ends: Collection[int],
        template: Mapping[str, Any],
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.ends, self.template = ends, template
        self._special = special_tokens(tokenizer)

    @torch.inference_mode()
    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float]:
        """Return the score of each completion, a list of messages or a text like its prompt."""
        texts = []
        for prompt, completion, ids in zip(prompts, completions, completion_ids, strict=True):
            if isinstance(prompt, str):
                texts.append(prompt + completion)
            else:
                texts.append(self.render(prompt + completion, ended=len(ids) > 0 and ids[-1] in self.ends))
        device = next(self.model.parameters()).device
        inputs = self.tokenizer(
            text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
        ).to(device)
        # On an accelerator, a pass of its own costs more than the padding.
        output = call_by_length(self.model, inputs) if device.type == "cpu" else self.model(**inputs)
        scores: list[float] = output.logits[:, 0].tolist()
        return scores

    def render(self, messages: list[dict[str, Any]], ended: bool) -> str:
        """Return the text of a conversation, whose last message is the policy's.

        Args:
            messages: The conversation.
            ended: Whether the policy ended its turn. If it did not, what the template adds to the message goes.
        """

        def written(messages: list[dict[str, Any]]) -> str:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, **self.template)
            return text

        messages = as_text(messages, self._special)
        text = written(messages)
        if ended:
            return text
        # What follows a content that is known is what follows any other.
        marked = written([*messages[:-1], {**messages[-1], "content": "MARK"}])
        _, found, end = marked.rpartition("MARK")
        return text.removesuffix(end) if found else text


class Rewards:
    """All rewards of a trainer.

    Every reward function gets its own copy of completions and columns. A reward with weight 0 is measured and logged,
    and has no other effect: a completion that no reward with a weight has scored does not get a score at all.

    Args:
        trainer: A `GRPOTrainer` that has been constructed. Its reward functions are replaced by `columns`.

    Attributes:
        functions: A `RewardModel` or a function for each reward.
        table: (B, rewards), what they returned for the latest completions of this process; NaN for None.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.functions: list[Callable[..., Any]] = []
        tokenizers = trainer.reward_processing_classes
        for function, tokenizer, name in zip(trainer.reward_funcs, tokenizers, trainer.reward_func_names, strict=True):
            if isinstance(function, torch.nn.Module):
                template = trainer.chat_template_kwargs
                self.functions.append(RewardModel(function, tokenizer, trainer.eos_token_ids, template))
            else:
                self.functions.append(loading.guard_reward(function, name))
        self.table = torch.empty(0, len(self.functions))
        self._completions: Any = None
        self.columns = [partial(self._column, index) for index in range(len(self.functions))]

    @property
    def models(self) -> list[RewardModel | None]:
        """The reward model of each reward, None for a function."""
        return [function if isinstance(function, RewardModel) else None for function in self.functions]

    def _column(self, index: int, completions: Any = None, **arguments: Any) -> list[float]:
        """Return the rewards of one function; NaN where it has none."""
        # TRL passes the same list of completions to every function, and a new one for each rollout.
        if completions is None or completions is not self._completions:
            if completions is not None:
                arguments["completions"] = completions
            self.table = self._score(arguments).to(self.trainer.accelerator.device)
            self._completions = completions
        column: list[float] = self.table[:, index].tolist()
        return column

    def _score(self, arguments: dict[str, Any]) -> Tensor:
        """Call all functions, the asynchronous ones together. Return a table with a column for each."""
        returned: list[Any] = [None] * len(self.functions)
        waiting = []
        for index, function in enumerate(self.functions):
            if is_async_callable(function):
                waiting.append(index)
            else:
                with self._stop_if_it_fails(index):
                    returned[index] = function(**arguments)

        async def answer(index: int) -> None:
            with self._stop_if_it_fails(index):
                returned[index] = await self.functions[index](**arguments)

        async def answer_all() -> None:
            await asyncio.gather(*map(answer, waiting))

        if waiting:
            # One loop serves the whole run, so that a function can keep its connections.
            asyncio.run_coroutine_threadsafe(answer_all(), self.trainer.async_loop).result()
        rows = [[torch.nan if reward is None else float(reward) for reward in column] for column in returned]
        table = torch.tensor(rows, dtype=torch.float32).T.contiguous()
        self._stop_if_broken(table)
        weighted = self.trainer.reward_weights != 0
        table[table[:, weighted].isnan().all(dim=1)] = torch.nan
        return table

    @contextmanager
    def _stop_if_it_fails(self, index: int) -> Iterator[None]:
        """Raise `RunStopped`, which names the function and the checkpoint to go on from, for a function that fails.

        It may fail on one process of several, and only the first process reports a `UserError`.
        """
        name, function = self.trainer.reward_func_names[index], self.functions[index]
        try:
            yield
        except UserError as error:
            raise RunStopped(f"{error} ({self._where()}. Correct the reward, and start again.)") from error
        except (Exception, SystemExit) as error:
            if isinstance(function, RewardModel) or isinstance(error, RunStopped):
                raise
            frames = traceback.extract_tb(error.__traceback__)
            files = [frame.filename for frame in frames if frame.filename not in (__file__, loading.__file__)]
            # The line of the function's own file, rather than one of a library that it called.
            lines = [frame.lineno for frame in frames if files and frame.filename == files[0]]
            place = f"{files[0]}:{lines[-1]}" if files else "when it was called"
            raise RunStopped(
                f"The reward {name} raised {type(error).__name__}: {' '.join(str(error).split())} ({place}) "
                f"{self._where()}. Correct the reward, and start again."
            ) from error

    def _stop_if_broken(self, table: Tensor) -> None:
        """Raise `RunStopped` for a reward that is infinite, or that is NaN and comes from a reward model.

        TRL reads NaN as "not scored": completions whose reward model broke would be skipped silently.
        """
        for name, function, column in zip(self.trainer.reward_func_names, self.functions, table.T, strict=True):
            broken = column.isinf() | (column.isnan() & isinstance(function, RewardModel))
            if broken.any():
                raise RunStopped(
                    f"The reward {name} was {column[broken][0]:g} for {int(broken.sum())} of {len(column)} completions "
                    f"{self._where()}. Nothing was learned from them. Correct the reward, and start again."
                )

    def _where(self) -> str:
        return f"in step {self.trainer.state.global_step + 1}; {self.trainer.last_good()}"
