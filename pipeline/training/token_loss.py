"""The loss of a reward model at every token of an answer, in addition to the one at its last token.

A mistake is easiest to see at the token that makes it, and the last token has to find it again. Verifiers that learn to
judge at every token are also better at the last one (Cobbe et al. 2021, "Training verifiers …", 2110.14168).

    chosen    <user> 3 - 8 = <assistant> 3 - 8 = -5 <end>
    rejected  <user> 3 - 8 = <assistant> 3 - 8 = 11 <end>
                                                 ^^^^^^^^ where they differ, and what the loss compares
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.arguments import option


@dataclass
class TokenLossArguments:
    """The weight of the loss at every token."""

    token_loss_coef: float = option(
        0.0, "Weight of a loss that compares the mean scores at all tokens of two answers; 0 compares their ends only."
    )


def token_loss(scores: Tensor, input_ids: Tensor, attention_mask: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """Return -log sigmoid(mean chosen score - mean rejected score - margin), averaged over pairs.

    The means are over the tokens of a text from the first one that differs between the two texts of its pair.

    Args:
        scores: The score at each token, (2 B, T): B chosen texts, then the B rejected ones, padded on the right.
        input_ids: The tokens, (2 B, T).
        attention_mask: 0 for padding, (2 B, T).
        margin: By how much the chosen text of each pair should be better, (B,), or a number for all pairs.
    """
    # If one text is the beginning of the other, they differ where its padding begins: -1 is not a token.
    chosen, rejected = input_ids.masked_fill(attention_mask == 0, -1).chunk(2)
    # True from the first token that differs, for both texts.
    differs = ((chosen != rejected).cumsum(1) > 0).repeat(2, 1) & attention_mask.bool()
    means = (scores.float() * differs).sum(1) / differs.sum(1).clamp(min=1)
    better, worse = means.chunk(2)
    return -torch.nn.functional.logsigmoid(better - worse - margin).mean()
