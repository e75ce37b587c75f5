"""A chat model whose answers are measured or compared."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
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
        self, rows: Sequence[Mapping[str, Any]], begun: Sequence[int] = (), **options: Any
    ) -> list[list[Completion]]:
        """Return the completions of the prompt of each row: dialogues with tools, if the model may call any.

        They begin with the ids `begun`, which count towards the length limit. The text of a dialogue is its last
        message, and its tokens are the ones that the model sampled.
        """
        if self.toolbox is None:
            encoded = self.encode([row["prompt"] for row in rows])
            room = max(1, self.max_new_tokens - len(begun))
            found = self.complete([[*ids, *begun] for ids in encoded], room, **options)
            for some in found if begun else ():
                for place, one in enumerate(some):
                    tokens = [*begun, *one.tokens]
                    text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
                    some[place] = Completion(text, tokens, one.stopped)
            return found

        samples = options.pop("samples", 1)
        opened = [self.toolbox.open(row) for row in rows for _ in range(samples)]
        template = {**self.template, **self.toolbox.template(self.tokenizer)}
        encoded = encode_prompts(self.tokenizer, [prompt for prompt, _ in opened], template)
        dialogues = [Dialogue(ids, tools) for ids, (_, tools) in zip(encoded, opened, strict=True)]
        # Results are written as in training, where they are not preceded by a list of tools.
        del template["tools"]
        self.conduct(dialogues, template, begun, **options)
        completions, ends = [], end_tokens(self.model, self.tokenizer)
        for dialogue in dialogues:
            # A dialogue that ends with a call was cut off, because there was no room for the result.
            last = dialogue.messages[-1] if dialogue.messages else {}
            answered = last.get("role") == "assistant" and not last.get("tool_calls")
            own = [token for token, sampled in zip(dialogue.tokens, dialogue.sampled, strict=True) if sampled]
            stopped = bool(answered and own and own[-1] in ends)
            # Omit the end tokens of earlier turns, which did not end the answer.
            tokens = [token for token in own if token not in ends] + own[-1:] * stopped
            text = str(last.get("content") or "") if answered else ""
            environment = self.toolbox.environment_of(dialogue.tools)
            completions.append(Completion(text, tokens, stopped, tuple(dialogue.messages), environment))
        self.tally.add(len(completions))
        self.counts["answers"] += len(completions)
        self.counts["cut off"] += sum(not completion.stopped for completion in completions)
        return [completions[start : start + samples] for start in range(0, len(completions), samples)]

    def conduct(
        self, dialogues: Sequence[Dialogue], template: Mapping[str, Any], begun: Sequence[int] = (), **options: Any
    ) -> None:
        """Let the model answer the prompt of each dialogue, and continue after its calls; `begun` as for `answer`."""
        single = replace(self, counts=Counter(), tally=Tally("turns"))
        seeds = count(options.pop("seed", 0))

        def complete(texts: Sequence[list[int]], room: int) -> tuple[list[list[int]], None]:
            found = single.complete(texts, room, seed=next(seeds), **options)
            return [completion.tokens for (completion,) in found], None

        room = max(1, self.max_new_tokens - len(begun))
        started = complete([[*dialogue.prompt, *begun] for dialogue in dialogues], room)[0]
        for dialogue, further in zip(dialogues, started, strict=True):
            tokens = [*begun, *further]
            # Without a toolbox, a turn is not parsed into messages.
            called = read_turn(self.tokenizer, tokens, dialogue.prompt, dialogue.tools) if self.toolbox else None
            dialogue.add_turn(tokens, None, called)
        ends = end_tokens(self.model, self.tokenizer)
        bounds: dict[str, Any] = {"limit": self.max_new_tokens, "context": self.positions or sys.maxsize}
        converse(dialogues, complete, self.tokenizer, ends=ends, turns=self.turns, template=template, **bounds)

    def complete(self, prompts: Sequence[list[int]], limit: int, **options: Any) -> list[list[Completion]]:
        """Complete encoded prompts. If one leaves less room than `limit` in the context, its answer is shorter."""
        # Prompts with enough room are completed together; the others in groups of about the same room, whose answers
        # are limited by the smallest room. Prompts that fill the context get empty answers.
        room = [self.positions - len(prompt) if self.positions else limit for prompt in prompts]
        completions: list[list[Completion]] = [[Completion("", [], False)] * options.get("samples", 1) for _ in prompts]
        cramped = sorted((i for i, left in enumerate(room) if 0 < left < limit), key=lambda i: room[i])
        groups = [[i for i, left in enumerate(room) if left >= limit]]
        groups += [cramped[start : start + GROUP] for start in range(0, len(cramped), GROUP)]
        for group in filter(None, groups):
            shortest = min([limit, *(room[i] for i in group)])
            some = [prompts[i] for i in group]
            if self.vllm is not None:
                found = self.vllm.generate(some, max_new_tokens=shortest, **options)
                self.tally.add(len(some) * options.get("samples", 1))
            else:
                own: dict[str, Any] = {"max_new_tokens": shortest, "on_batch": self.tally.add}
                found = generate(self.model, self.tokenizer, some, **own, **options)
            for i, answers in zip(group, found, strict=True):
                completions[i] = answers
        self.counts["answers"] += sum(map(len, completions))
        self.counts["cut off"] += sum(not answer.stopped for answers in completions for answer in answers)
        return completions

    @property
    def positions(self) -> int:
        """The length of the context in tokens, 0 if it is not limited."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 0
