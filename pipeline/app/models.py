"""The models of the page and of the chat: loaded on first use, and sampled token by token."""

import math
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline import hardware
from pipeline.config.output_directory import recorded_template_kwargs
from pipeline.errors import Problem, UserError
from pipeline.files import holds_model
from pipeline.models.generation import Messages, encode_prompts, end_tokens
from pipeline.models.kernels.sampler import accepts_argument
from pipeline.models.loading import load_model
from pipeline.report.load import stage_info
from pipeline.stages import stage_order
from pipeline.tools.dialogue import Dialogue, Message, Tools, answer_calls, read_turn, readable
from pipeline.tools.loading import Toolbox

ENDED = "ended its answer"
"""Value of `Answer.stopped` if the model itself ended the answer."""
COLDEST = 1e-6
"""Lowest temperature at which tokens are drawn. Logits divided by a lower one may exceed the range of float32."""
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: greedily below temperature `COLDEST`; `top_k` 0 and `top_p` 1 keep all tokens."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Token:
    """A token of an answer, with the most probable tokens at its position.

    Log-probabilities are in nats, before temperature, top-k and top-p. A token of a tool's result has NaN and [].
    """

    id: int
    # What it adds to the answer. This may differ from its own text: some tokenizers join words without a space.
    text: str
    log_prob: float
    alternatives: list[tuple[str, float]]


@dataclass(frozen=True)
class Loaded:
    """A model that is never modified, so that several threads may use it at once.

    `context` is in tokens, `sys.maxsize` if it is unlimited; `template` has the arguments of the chat template.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: int
    template: Values = field(default_factory=dict)

    def encode(self, messages: Messages, template: Values | None = None) -> list[int]:
        """Return the tokens of a conversation, with the generation prompt.

        Without a chat template, as for a pretrained model, the contents of the messages are lines of a text.

        Args:
            messages: The conversation.
            template: Arguments of the chat template. Default: the model's.

        Raises:
            UserError: If the tokens leave no room for an answer.
        """
        if template is None:
            template = self.template
        if self.tokenizer.chat_template:
            (ids,) = encode_prompts(self.tokenizer, [messages], template)
        else:
            ids = self.tokenizer("\n".join(message["content"] for message in messages))["input_ids"]
        if len(ids) >= self.context:
            remedy = f"is longer than the context of {self.name}, which is {self.context} tokens; shorten it"
            raise UserError(Problem("prompt", f"{len(ids)} tokens", remedy))
        return ids

    def open(self, row: Values, toolbox: Toolbox | None, template: Values | None = None) -> Dialogue:
        """Return the dialogue that begins with the prompt of a row, as trainers encode it, and has the tools for it.

        `toolbox` is None if there are no tools. `template` and errors are as for `encode`.
        """
        if template is None:
            template = self.template
        if toolbox is None:
            return Dialogue(self.encode(row["prompt"], template), {})
        prompt, tools = toolbox.open(row)
        return Dialogue(self.encode(prompt, {**template, **toolbox.template(self.tokenizer)}), tools)


@dataclass
class Answer:
    """An answer that a model is writing; with tools, it has several turns."""

    loaded: Loaded
    # The turns that have ended, with the results of tools.
    dialogue: Dialogue
    # The tokens of the turn that is being written.
    turn: list[int] = field(default_factory=list)
    # The tokens of all turns and results.
    tokens: list[Token] = field(default_factory=list)
    # Time of the model's own forward passes.
    seconds: float = 0.0
    # Why the model stopped, "" while it writes.
    stopped: str = ""
    _decoded: str = ""

    @property
    def messages(self) -> list[Message]:
        """The turns and results so far; one empty message before the first token."""
        messages = list(self.dialogue.messages)
        if self.turn or not self.tokens:
            # Special tokens and incomplete characters are removed.
            text = str(self.loaded.tokenizer.decode(self.turn, skip_special_tokens=True)).rstrip("\ufffd")
            messages.append({"role": "assistant", "content": text})
        return messages

    @property
    def text(self) -> str:
        """The text so far, with calls of tools and their results as lines."""
        return readable(self.messages)

    def add(self, token: int, log_probs: Tensor | None = None) -> None:
        """Append a token. `log_probs` are the log-probabilities of all tokens at its position, None for a tool's."""
        decode = self.loaded.tokenizer.decode
        previous = self._decoded
        ids = [earlier.id for earlier in self.tokens]
        self._decoded = str(decode([*ids, token]))
        # What a token adds may differ from its own text, which is shown only if it changes the text so far.
        text = str(decode([token]))
        if self._decoded.startswith(previous):
            text = self._decoded[len(previous) :]
        if log_probs is None:
            self.tokens.append(Token(token, text, math.nan, []))
            return
        best = log_probs.topk(min(5, len(log_probs)))
        best_texts = [str(decode([alternative])) for alternative in best.indices.tolist()]
        alternatives = list(zip(best_texts, best.values.tolist(), strict=True))
        self.tokens.append(Token(token, text, float(log_probs[token]), alternatives))
        self.turn.append(token)

    def end_turn(self, ends: Sequence[int], limit: int) -> list[int]:
        """End a turn and, unless it calls tools, the answer.

        Args:
            ends: Tokens that end a turn.
            limit: Maximum number of tokens of the whole answer.

        Returns:
            The tokens of the results of tools, [] if there are none or they do not fit.
        """
        loaded = self.loaded
        dialogue = self.dialogue
        self.stopped = ENDED
        if not dialogue.tools:
            return []
        message = read_turn(loaded.tokenizer, self.turn, [*dialogue.prompt, *dialogue.tokens], dialogue.tools)
        dialogue.add_turn(self.turn, None, message)
        self.turn = []
        if dialogue.pending(ends):
            continuing = answer_calls(
                [dialogue],
                loaded.tokenizer,
                ends=ends,
                template=loaded.template,
                limit=limit,
                context=loaded.context,
            )
            self.stopped = "" if continuing else f"no room for a result in {limit} tokens"
        results = dialogue.tokens[len(self.tokens) :]
        for token in results:
            self.add(token)
        return results


def write(loaded: Loaded, prompt: Sequence[int], sampling: Sampling, tools: Tools | None = None) -> Iterator[Answer]:
    """Answer a prompt, from `Loaded.encode`. Yield the same answer after each of its tokens and results of tools."""
    answer = Answer(loaded, Dialogue(list(prompt), tools or {}))
    ends = end_tokens(loaded.model, loaded.tokenizer)
    limit = min(sampling.max_new_tokens, loaded.context - len(prompt))
    tokens = sample_tokens(loaded.model, prompt, sampling)
    results: list[int] | None = None
    while not answer.stopped:
        start = time.perf_counter()
        token, log_probs = tokens.send(results)
        answer.seconds += time.perf_counter() - start
        answer.add(token, log_probs)
        results = None
        is_cut_off = token not in ends and len(answer.tokens) == limit
        if token in ends or is_cut_off:
            results = answer.end_turn(ends, limit)
        if is_cut_off or (results and len(answer.tokens) == limit):
            if limit < sampling.max_new_tokens:
                answer.stopped = f"the context of {loaded.context} tokens is full"
            else:
                answer.stopped = f"limit of {limit} tokens"
        yield answer


@torch.inference_mode()
def sample_tokens(
    model: PreTrainedModel, prompt: Sequence[int], sampling: Sampling
) -> Generator[tuple[int, Tensor], Sequence[int] | None]:
    """Yield tokens endlessly, each with all log-probabilities at its position, shape (vocabulary,).

    Tokens that are sent to the generator, such as results of tools, follow the one that it yielded last.
    """
    config = GenerationConfig(do_sample=sampling.temperature >= COLDEST)
    if config.do_sample:
        config.update(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    process = model._get_logits_processor(config, device=model.device)
    generator = torch.Generator(model.device).manual_seed(sampling.seed)
    optional = {}
    if accepts_argument(model, "logits_to_keep"):
        optional["logits_to_keep"] = 1
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([list(prompt)], device=model.device)
    while True:
        logits = model(input_ids=ids, cache=cache, use_cache=True, **optional).logits[:, -1].float()
        if config.do_sample:
            token = int(torch.multinomial(process(ids, logits).softmax(-1)[0], 1, generator=generator))
        else:
            token = int(logits[0].argmax())
        results = yield token, logits.log_softmax(-1)[0]
        # The cache holds what came before, so that the next pass needs only the new tokens.
        ids = torch.tensor([[token, *(results or ())]], device=model.device)


def load(path: str, option: str, name: str = "") -> Loaded:
    """Load a model that can answer.

    Args:
        path: Folder or Hub id.
        option: Argument that named it, for messages.
        name: What visitors call it. Default: the name of the folder, or the Hub id.

    Raises:
        UserError: If it cannot be loaded, is broken, or nothing ends its answers.
    """
    if not name:
        name = Path(path).name if Path(path).is_dir() else path
    model, tokenizer = load_model(path, option, chat=False)
    if tokenizer.eos_token_id is None:
        raise UserError(Problem(option, path, "its tokenizer has no eos token to end answers with; add one"))
    model.to(hardware.accelerator() or "cpu").eval()
    # On a CPU, plain attention is the fastest for single tokens.
    if model.device.type == "cpu":
        model.float().set_attn_implementation("eager")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    return Loaded(name, model, tokenizer, context, recorded_template_kwargs(path))


class Models:
    """The models that the page offers by name. A visitor cannot name any other.

    Attributes:
        stages: Names of the run's stages that generate text, in the order of training.
        names: These, and the folders and Hub ids of `further_models`.
    """

    def __init__(self, run: Path, further_models: Sequence[str] = ()) -> None:
        folders = [folder.name for folder in run.glob("[0-9]*_*") if holds_model(folder)]
        self.stages = sorted((name for name in folders if stage_info(name).generates), key=stage_order)
        # Name -> path, and the option that named it.
        self._paths = {name: (str(run / name), "RUN") for name in self.stages}
        self._paths |= {name: (name, "--model") for name in further_models}
        self.names = list(self._paths)
        self._loaded: dict[str, Loaded] = {}
        self._locks = {name: Lock() for name in self.names}

    def get(self, name: str) -> Loaded:
        """Return a model, which is loaded at the first request, or raise a `UserError` if it cannot be loaded."""
        # Several visitors may request models at once. Each model has its own lock, so that a loaded one does not wait
        # for another.
        with self._locks[name]:
            if name not in self._loaded:
                path, option = self._paths[name]
                self._loaded[name] = load(path, option, name)
            return self._loaded[name]

    def load_stages(self) -> None:
        """Load the models of the run, so that the first visitor does not wait. Print why one cannot be loaded."""
        for name in self.stages:
            try:
                self.get(name)
            except UserError as error:
                print(error, flush=True)
