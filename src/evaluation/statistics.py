"""95% intervals and tests of accuracies, and of differences between two on the same questions."""

from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000  # of the bootstrap, which is seeded


def confidence_interval(right: float, questions: int) -> tuple[float, float]:
    """95% bootstrap interval of an accuracy, in %: percentiles over resamples of the questions. A resample of n
    questions, k of them answered right, has Binomial(n, k / n) right answers."""
    resampled = np.random.default_rng(0).binomial(questions, right / questions, RESAMPLES) / questions
    return tuple(np.percentile(100 * resampled, [2.5, 97.5]).tolist())


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
        """95% bootstrap interval of `points`; a resample draws questions with both answers."""
        shares = np.array([self.gained, self.lost, self.questions - self.gained - self.lost]) / self.questions
        drawn = np.random.default_rng(0).multinomial(self.questions, shares, RESAMPLES)  # (resamples, 3)
        return tuple(np.percentile(100 * (drawn[:, 0] - drawn[:, 1]) / self.questions, [2.5, 97.5]).tolist())

    @property
    def p_value(self) -> float:
        """McNemar's exact test (McNemar 1947): gains and losses as fair coin tosses, two-sided."""
        from scipy.stats import binomtest  # takes half a second, also at the start of a training

        changed = self.gained + self.lost
        return float(binomtest(self.gained, changed).pvalue) if changed else 1.0


def compare(first: dict[str, bool], second: dict[str, bool]) -> Difference:
    """Two models' {question's id: whether the answer is right}, which must have the same ids."""
    assert first.keys() == second.keys()
    gained = sum(right and not first[id_] for id_, right in second.items())
    return Difference(gained, sum(right and not second[id_] for id_, right in first.items()), len(first))
