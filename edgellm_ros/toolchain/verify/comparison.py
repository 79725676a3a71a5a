"""Sums up how two models' logits differ over a text: perplexity, KL divergence, most likely tokens, cosine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.errors import ToolchainError

Logits = npt.NDArray[np.float32]  # (positions, rows)


@dataclass(frozen=True)
class TextFigures:
    """What a text showed; what needs an original is None without one. Divergences are in nats."""

    num_tokens: int  # scored for perplexity
    perplexity: float
    original_perplexity: float | None = None
    ratio_error: float | None = None  # standard error of perplexity / original_perplexity, tokens taken as independent
    kl_divergence: float | None = None  # KL(original ‖ bundle), mean over positions
    kl_divergence_p99: float | None = None
    top1_agreement: float | None = None
    cosine: float | None = None  # of logits less their mean, which softmax ignores; mean over positions


class Comparison:
    """Takes logits in pieces, so that memory does not grow with the text."""

    def __init__(self) -> None:
        self._loss: list[npt.NDArray[np.float64]] = []  # of the tokens that have a row, in nats
        self._original_loss: list[npt.NDArray[np.float64]] = []
        self._kl: list[npt.NDArray[np.float64]] = []
        self._same: list[npt.NDArray[np.bool_]] = []
        self._cosine: list[npt.NDArray[np.float64]] = []

    def add(self, logits: Logits, targets: npt.NDArray[np.integer[Any]], original: Logits | None = None) -> None:
        """Logits (n, rows) after n positions; targets (n,) the row of the token that follows, -1 for one without a row.

        `original` has the other model's logits of the same positions. Raises ToolchainError for those not finite.
        """
        scored = np.flatnonzero(targets >= 0)
        logs = _log_softmax(logits, "the bundle's")
        self._loss.append(-logs[scored, targets[scored]].astype(np.float64))
        if original is None:
            return
        original_logs = _log_softmax(original, "the original's")
        self._original_loss.append(-original_logs[scored, targets[scored]].astype(np.float64))
        self._kl.append(np.einsum("ij,ij->i", np.exp(original_logs), original_logs - logs, dtype=np.float64))
        self._same.append(logs.argmax(-1) == original_logs.argmax(-1))
        self._cosine.append(_cosine(logits, original))

    def figures(self) -> TextFigures:
        """Over everything added; raises ToolchainError where no token was scored."""
        loss = np.concatenate(self._loss)
        if not len(loss):
            raise ToolchainError(
                "no token of the text has a row in the reduced head, so nothing can be scored; choose another text"
            )
        perplexity = float(np.exp(loss.mean()))
        if not self._kl:
            return TextFigures(len(loss), perplexity)
        original, kl = np.concatenate(self._original_loss), np.concatenate(self._kl)
        ratio = float(np.exp((loss - original).mean()))
        return TextFigures(
            num_tokens=len(loss),
            perplexity=perplexity,
            original_perplexity=float(np.exp(original.mean())),
            ratio_error=ratio * float((loss - original).std()) / len(loss) ** 0.5,
            kl_divergence=float(kl.mean()),
            kl_divergence_p99=float(np.quantile(kl, 0.99)),
            top1_agreement=float(np.concatenate(self._same).mean()),
            cosine=float(np.concatenate(self._cosine).mean()),
        )


def _log_softmax(logits: Logits, whose: str) -> Logits:
    if not np.isfinite(logits).all():
        raise ToolchainError(f"{whose} logits are not finite; nothing can be compared")
    shifted: Logits = logits - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return shifted


def _cosine(one: Logits, other: Logits) -> npt.NDArray[np.float64]:
    a, b = one - one.mean(-1, keepdims=True), other - other.mean(-1, keepdims=True)
    product = np.einsum("ij,ij->i", a, b, dtype=np.float64)
    lengths = np.einsum("ij,ij->i", a, a, dtype=np.float64) * np.einsum("ij,ij->i", b, b, dtype=np.float64)
    cosine: npt.NDArray[np.float64] = product / np.sqrt(np.maximum(lengths, 1e-30))
    return cosine
