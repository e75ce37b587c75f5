"""A chat model whose answers are measured or compared."""

import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.models.generation import Completion, encode_prompts, end_tokens, generate
from pipeline.models.vllm_sampler import VLLMSampler
from pipeline.progress import Tally
from pipeline.tools.dialogue import Dialogue, converse, read_turn
from pipeline.tools.loading import Toolbox

GROUP = 64
"""Prompts that nearly fill the context are answered in groups of this size."""


@dataclass(frozen=True)
class ChatModel:
    """A language model with its tokenizer and the length limit of its answers in tokens.

    `vllm` samples instead of the model. `counts` has the number of answers so far and, under `"cut off"`, how many the
    limit or the context cut off. `template` has arguments of the chat template, `toolbox` what the model may call, and
    `turns` is how often it may read results (default: as often as they fit).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    vllm: VLLMSampler | None = None
    counts: Counter[str] = field(default_factory=Counter)
    template: Mapping[str, Any] = field(default_factory=dict)
    tally: Tally = field(default_factory=lambda: Tally("answers"))
    toolbox: Toolbox | None = None
    turns: int | None = None

    def sample(self, prompts: Sequence[Any], **options: Any) -> list[list[Completion]]:
        """Return the completions of each conversation; `options` as for `generate`."""
        return self.complete(self.encode(prompts), self.max_new_tokens, **options)

    def encode(self, prompts: Sequence[Any]) -> list[list[int]]:
        """Return the token ids of each conversation, followed by the generation prompt."""
        return encode_prompts(self.tokenizer, prompts, self.template)

    def answer(
        self, rows: Sequence[Mapping[str, Any]], beginning: Sequence[int] = (), **options: Any
    ) -> list[list[Completion]]:
        """Return the completions of the prompt of each row: dialogues with tools, if the model may call any.

        Args:
            rows: Rows with a `prompt`, and the columns that an environment reads.
            beginning: Token ids that all answers begin with; they count towards the length limit.
            **options: As for `generate`: `samples`, `temperature`, `seed`, …

        Returns:
            A list for each row, with `samples` completions (default: 1). The text of a dialogue is its last message, ""
            if that is not an answer, and its tokens are the ones that the model sampled.
        """
        if self.toolbox is None:
            return self._answer_once([row["prompt"] for row in rows], beginning, **options)

        samples = options.pop("samples", 1)
        opened = [self.toolbox.open(row) for row in rows for _ in range(samples)]
        template = {**self.template, **self.toolbox.template(self.tokenizer)}
        encoded = encode_prompts(self.tokenizer, [prompt for prompt, _ in opened], template)
        dialogues = [Dialogue(ids, tools) for ids, (_, tools) in zip(encoded, opened, strict=True)]
        # Results are written as in training, where they are not preceded by a list of tools.
        del template["tools"]
        self.conduct(dialogues, template, beginning, **options)
        ends = end_tokens(self.model, self.tokenizer)
        completions = [_as_completion(dialogue, ends, self.toolbox) for dialogue in dialogues]
        self.tally.add(len(completions))
        self.counts["answers"] += len(completions)
        self.counts["cut off"] += sum(not completion.stopped for completion in completions)
        return [completions[start : start + samples] for start in range(0, len(completions), samples)]

    def _answer_once(self, prompts: Sequence[Any], beginning: Sequence[int], **options: Any) -> list[list[Completion]]:
        """Return the completions of each conversation, without tools; arguments as for `answer`."""
        encoded = self.encode(prompts)
        room = max(1, self.max_new_tokens - len(beginning))
        completions = self.complete([[*ids, *beginning] for ids in encoded], room, **options)
        if not beginning:
            return completions
        for answers in completions:
            answers[:] = [self._preceded(beginning, answer) for answer in answers]
        return completions

    def _preceded(self, beginning: Sequence[int], completion: Completion) -> Completion:
        """Return a completion with the token ids that it continues."""
        tokens = [*beginning, *completion.tokens]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        return Completion(text, tokens, completion.stopped)

    def conduct(
        self, dialogues: Sequence[Dialogue], template: Mapping[str, Any], beginning: Sequence[int] = (), **options: Any
    ) -> None:
        """Let the model answer the prompt of each dialogue, and continue after its calls.

        `template` has further arguments of the chat template; the others are as for `answer`.
        """
        single = replace(self, counts=Counter(), tally=Tally("turns"))
        # Each turn has a seed of its own.
        seeds = count(options.pop("seed", 0))

        def complete(texts: Sequence[list[int]], room: int) -> tuple[list[list[int]], None]:
            completions = single.complete(texts, room, seed=next(seeds), **options)
            return [completion.tokens for (completion,) in completions], None

        room = max(1, self.max_new_tokens - len(beginning))
        first_turns, _ = complete([[*dialogue.prompt, *beginning] for dialogue in dialogues], room)
        for dialogue, first_turn in zip(dialogues, first_turns, strict=True):
            tokens = [*beginning, *first_turn]
            message = None
            # Without a toolbox, a turn is not parsed into messages.
            if self.toolbox:
                message = read_turn(self.tokenizer, tokens, dialogue.prompt, dialogue.tools)
            dialogue.add_turn(tokens, None, message)
        ends = end_tokens(self.model, self.tokenizer)
        limits: dict[str, Any] = {"limit": self.max_new_tokens, "context": self.positions or sys.maxsize}
        converse(dialogues, complete, self.tokenizer, ends=ends, turns=self.turns, template=template, **limits)

    def complete(self, prompts: Sequence[list[int]], limit: int, **options: Any) -> list[list[Completion]]:
        """Complete encoded prompts. If one leaves less room than `limit` in the context, its answer is shorter."""
        # Prompts with enough room are completed together; the others in groups of about the same room, whose answers
        # are limited by the smallest room. Prompts that fill the context get empty answers.
        rooms = [self.positions - len(prompt) if self.positions else limit for prompt in prompts]
        roomy = [index for index, room in enumerate(rooms) if room >= limit]
        cramped = [index for index, room in enumerate(rooms) if 0 < room < limit]
        cramped.sort(key=lambda index: rooms[index])
        groups = [cramped[start : start + GROUP] for start in range(0, len(cramped), GROUP)]
        if roomy:
            groups.insert(0, roomy)
        completions: list[list[Completion]] = [[Completion("", [], False)] * options.get("samples", 1) for _ in prompts]
        for group in groups:
            shortest = min(limit, *(rooms[index] for index in group))
            batch = [prompts[index] for index in group]
            if self.vllm is not None:
                sampled = self.vllm.generate(batch, max_new_tokens=shortest, **options)
                self.tally.add(len(batch) * options.get("samples", 1))
            else:
                options_of_group: dict[str, Any] = {"max_new_tokens": shortest, "on_batch": self.tally.add, **options}
                sampled = generate(self.model, self.tokenizer, batch, **options_of_group)
            for index, answers in zip(group, sampled, strict=True):
                completions[index] = answers
        finished = [answer.stopped for answers in completions for answer in answers]
        self.counts["answers"] += len(finished)
        self.counts["cut off"] += finished.count(False)
        return completions

    @property
    def positions(self) -> int:
        """The length of the context in tokens, 0 if it is not limited."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 0


def _as_completion(dialogue: Dialogue, ends: Collection[int], toolbox: Toolbox) -> Completion:
    """Return the answer that a dialogue has led to; `ends` are the ids that end a turn."""
    last = dialogue.messages[-1] if dialogue.messages else {}
    # A dialogue that ends with a call was cut off, because there was no room for the result.
    is_answered = last.get("role") == "assistant" and not last.get("tool_calls")
    sampled = [token for token, is_sampled in zip(dialogue.tokens, dialogue.sampled, strict=True) if is_sampled]
    stopped = bool(is_answered and sampled and sampled[-1] in ends)
    # Omit the end tokens of earlier turns, which did not end the answer.
    tokens = [token for token in sampled if token not in ends]
    if stopped:
        tokens.append(sampled[-1])
    text = str(last.get("content") or "") if is_answered else ""
    return Completion(text, tokens, stopped, tuple(dialogue.messages), toolbox.environment_of(dialogue.tools))
