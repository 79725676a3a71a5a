"""What `edgellm verify` finds out about a bundle, as its manifest stores it; text, tasks and marks lie beside it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QualityMark:
    """A figure that has to be at most (`max_…`) or at least (`min_…`) a limit."""

    name: str  # a key of marks.yaml: max_perplexity_ratio, min_top1_agreement, …
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return self.value <= self.limit if self.name.startswith("max_") else self.value >= self.limit

    def __str__(self) -> str:
        kind, _, figure = self.name.partition("_")
        bound = "at most" if kind == "max" else "at least"
        return f"{figure.replace('_', ' ')} {self.value:.4g}, allowed is {bound} {self.limit:g}"


@dataclass(frozen=True)
class TaskScore:
    """How many of one kind of task were answered exactly; `original` where the original was asked as well."""

    kind: str
    total: int
    passed: int
    original: int | None = None


@dataclass(frozen=True)
class Quality:
    """What was measured of a bundle, and what of it was judged. Without marks it was not judged; unset, not measured.

    Perplexities are over `num_tokens` tokens in windows of `window`; everything below `original` needs one. Divergence
    is of the original's distribution from the bundle's, in nats.
    """

    scheme: str = ""  # whose marks were applied
    text: str = ""  # name of the text
    text_sha256: str = ""
    num_tokens: int = 0  # that were scored
    window: int = 0
    executor: str = ""
    perplexity: float = 0.0
    tasks: tuple[TaskScore, ...] = ()
    original: str = ""  # name of the checkpoint that it was compared with
    original_perplexity: float | None = None
    perplexity_ratio_error: float | None = None  # standard error of perplexity / original_perplexity
    kl_divergence: float | None = None  # mean over positions
    kl_divergence_p99: float | None = None
    top1_agreement: float | None = None
    cosine: float | None = None
    marks: tuple[QualityMark, ...] = ()
    accepted: bool = False  # a failed mark was let through on purpose
    created: str = ""

    @property
    def failed(self) -> tuple[QualityMark, ...]:
        """The marks that were not reached."""
        return tuple(mark for mark in self.marks if not mark.passed)

    @property
    def tasks_passed(self) -> int:
        """Over all kinds."""
        return sum(score.passed for score in self.tasks)

    @property
    def num_tasks(self) -> int:
        """Over all kinds."""
        return sum(score.total for score in self.tasks)

    @property
    def original_tasks_passed(self) -> int | None:
        """Over all kinds; None where the original was not asked."""
        counts = [score.original for score in self.tasks]
        return None if not counts or None in counts else sum(count or 0 for count in counts)

    def summary(self) -> str:
        """A line for people: the verdict, and the figures behind it."""
        if not self.num_tokens:
            return "not verified"
        tasks = f"{self.tasks_passed} of {self.num_tasks} tasks"
        if not self.marks:
            return f"not judged (no original): perplexity {self.perplexity:.2f}, {tasks}"
        if not self.failed:
            return f"passed as {self.scheme}: {'; '.join(map(str, self.marks))}"
        verdict = "FAILED (let through)" if self.accepted else "FAILED"
        return f"{verdict} as {self.scheme}: {'; '.join(map(str, self.failed))}"


__all__ = ["Quality", "QualityMark", "TaskScore"]
