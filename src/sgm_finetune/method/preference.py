"""Losses of preferences (docs/method.md section 10), one for each example, as functions of log-probabilities or scores.

x: a prompt. y: an answer, the chosen or the rejected one. |y|: the number of its tokens. log π(y|x): the answer's
log-probability in nats, summed over its tokens. log π₀(y|x): the same of the base model. A ratio is
log π(y|x) − log π₀(y|x). σ is the logistic function. All arguments are float tensors of one shape.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """−log σ(β (chosen − rejected)), of the two ratios (eq. 40; Rafailov et al., arXiv 2305.18290, equation 7).

    >>> dpo(torch.tensor(3.0), torch.tensor(3.0), beta=0.1)
    tensor(0.6931)
    """
    return -logsigmoid(beta * (chosen - rejected))


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """−log σ(chosen − rejected), of the two scores that a reward model gives (eq. 48).

    It is the negative log-probability of the choice in the model of Bradley and Terry (Biometrika 39, 1952).

    >>> bradley_terry(torch.tensor(2.0), torch.tensor(2.0))
    tensor(0.6931)
    """
    return -logsigmoid(chosen - rejected)


def ipo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """(chosen − rejected − 1/(2β))², of the two ratios a token (eq. 41; Azar et al., arXiv 2310.12036, equation 17).

    A ratio a token is the ratio over |y|. The paper has whole ratios; its authors mean those a token, as TRL notes.

    >>> ipo(torch.tensor(5.0), torch.tensor(0.0), beta=0.1)
    tensor(0.)
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


def orpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """−chosen − β log σ(log odds(chosen) − log odds(rejected)) (eq. 42; Hong et al., arXiv 2403.07691).

    The arguments are log π(y|x)/|y|, log-probabilities a token; the odds of p are p/(1 − p).

    >>> orpo(torch.tensor(0.5).log(), torch.tensor(0.5).log(), beta=1.0)
    tensor(1.3863)
    """
    return -chosen - beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(log_probability: Tensor) -> Tensor:
    """log(p/(1 − p)); of a probability that rounds to 1, that of the largest number below 1."""
    below_one = -torch.finfo(log_probability.dtype).eps
    log_probability = log_probability.clamp(max=below_one)
    return log_probability - torch.log(-torch.expm1(log_probability))


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """−log σ(β (chosen − rejected) − γ), of the log-probabilities a token (eq. 43; Meng et al., arXiv 2405.14734).

    >>> simpo(torch.tensor(-1.0), torch.tensor(-1.5), beta=2.0, gamma=1.0)
    tensor(0.6931)
    """
    return -logsigmoid(beta * (chosen - rejected) - gamma)


def kto(
    ratio: Tensor, desirable: Tensor, moved: Tensor | float, beta: float, weights: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """w (1 − σ(±β (ratio − moved))), + for a good answer (eq. 44; Ethayarajh et al., arXiv 2402.01306).

    `moved` is how far the model has moved from its base (`divergence`), without a gradient. `weights` are those of good
    and of bad answers.

    >>> kto(torch.tensor([0.0, 0.0]), torch.tensor([True, False]), moved=0.0, beta=0.1, weights=(1.0, 2.0))
    tensor([0.5000, 1.0000])
    """
    distance = beta * (ratio - moved)
    good, bad = weights
    return torch.where(desirable, good * torch.sigmoid(-distance), bad * torch.sigmoid(distance))


def divergence(ratios: Tensor) -> Tensor:
    """How far the model has moved from its base: the mean ratio of answers to other prompts, or 0 if it is negative
    (eq. 45).

    >>> divergence(torch.tensor([1.0, 2.0])), divergence(torch.tensor([-1.0, 0.0]))
    (tensor(1.5000), tensor(0.))
    """
    return ratios.mean().clamp(min=0.0)


def apo_zero(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """1 − σ(β chosen) + σ(β rejected), of the two ratios (eq. 46; D'Oosterlinck et al., arXiv 2408.06266, equation 7).

    It raises the chosen answers and lowers the rejected ones.

    >>> apo_zero(torch.tensor(0.0), torch.tensor(0.0), beta=0.1)
    tensor(1.)
    """
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """σ(β chosen) + 1 − σ(β (chosen − rejected)), of the two ratios (eq. 47; arXiv 2408.06266, equation 8).

    It lowers both answers, the rejected one more: for chosen answers that are worse than the model's own.

    >>> apo_down(torch.tensor(0.0), torch.tensor(0.0), beta=0.1)
    tensor(1.)
    """
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))
