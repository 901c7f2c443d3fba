"""What tasks have in common that hide something at several depths of prompts of several lengths."""

from dataclasses import dataclass

from kvpress.evals.metrics import words_found
from kvpress.evals.task import Sample, Task, check_count, check_counts, check_depths


@dataclass(frozen=True, kw_only=True)
class GridTask(Task):
    """Samples at each of `lengths` and `depths`, `repeats` times, scored by the words that the answer has.

    Raises:
        TaskError: a parameter out of range.
    """

    metric = "words_found"

    lengths: tuple[int, ...] = (1000, 2000, 4000)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    repeats: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self.lengths, "lengths", 1)
        check_depths(self.depths)
        check_count(self.repeats, "repeats", 1)

    def grid(self) -> list[tuple[int, float]]:
        """Length and depth of each sample, in order."""
        return [(length, depth) for _ in range(self.repeats) for length in self.lengths for depth in self.depths]

    def score(self, sample: Sample, answer: str) -> float:
        return words_found(answer, sample.answers)
