"""95% intervals of accuracies, and of differences between two on the same questions, with the test of no difference."""

from dataclasses import dataclass
from math import sqrt

Z = 1.959964  # of the normal distribution, for 95% on two sides


def confidence_interval(right: float, questions: int) -> tuple[float, float]:
    """95% score interval of an accuracy, in % (Wilson 1927)."""
    share, weight = right / questions, Z**2 / questions
    center, half = share + weight / 2, sqrt(weight * (share * (1 - share) + weight / 4))
    return 100 * max(0.0, (center - half) / (1 + weight)), 100 * min(1.0, (center + half) / (1 + weight))


@dataclass(frozen=True)
class Difference:
    """A second model's answers compared with a first one's, on the same questions."""

    gained: int  # questions that only the second one got right
    lost: int  # questions that only the first one got right
    questions: int

    @property
    def points(self) -> float:
        """Accuracy of the second minus that of the first, in percentage points."""
        return 100 * (self.gained - self.lost) / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of `points`: Wald's after half a question is added to each cell (Agresti and Min 2005)."""
        count, changed = self.questions + 2, self.gained + self.lost + 1
        share = (self.gained - self.lost) / count
        half = Z * sqrt(changed / count - share**2) / sqrt(count)
        return 100 * max(-1.0, share - half), 100 * min(1.0, share + half)

    @property
    def p(self) -> str:
        """The p-value of McNemar's exact test (McNemar 1947): gains and losses as fair coin tosses, two-sided."""
        from scipy.stats import binomtest  # takes half a second, also at the start of a training

        p = binomtest(self.gained, self.gained + self.lost).pvalue if self.gained + self.lost else 1.0
        return f"{p:.2g}" if p > 1e-99 else "<1e-99"


def compare(first: dict[str, bool], second: dict[str, bool]) -> Difference:
    """Two models' {question's id: whether the answer is right}, which must have the same ids."""
    assert first.keys() == second.keys()
    gained = sum(right and not first[id_] for id_, right in second.items())
    return Difference(gained, sum(right and not second[id_] for id_, right in first.items()), len(first))
