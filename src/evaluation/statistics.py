"""How sure an accuracy is, and a difference of two on the same questions. Leaves out where the answers come from."""

from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000  # of the bootstrap, which is seeded


def confidence_interval(right: float, questions: int) -> tuple[float, float]:
    """95% bootstrap interval, in %, of an accuracy: percentiles over resamples of the questions.

    A resample of n questions, k of them answered right, has Binomial(n, k / n) right answers: those are drawn.
    """
    resampled = np.random.default_rng(0).binomial(questions, right / questions, RESAMPLES) / questions
    return tuple(np.percentile(100 * resampled, [2.5, 97.5]).tolist())


@dataclass(frozen=True)
class Difference:
    """Of two models' answers to the same questions."""

    gained: int  # questions that only the second one got right
    lost: int  # that only the first one got right
    questions: int

    @property
    def points(self) -> float:
        """Accuracy of the second less that of the first, in percentage points."""
        return 100 * (self.gained - self.lost) / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        """95% bootstrap interval of `points`, over the questions as pairs of answers."""
        shares = np.array([self.gained, self.lost, self.questions - self.gained - self.lost]) / self.questions
        drawn = np.random.default_rng(0).multinomial(self.questions, shares, RESAMPLES)  # (resamples, 3)
        resampled = 100 * (drawn[:, 0] - drawn[:, 1]) / self.questions
        return tuple(np.percentile(resampled, [2.5, 97.5]).tolist())

    @property
    def p_value(self) -> float:
        """Of McNemar's exact test (McNemar 1947): gains and losses as fair coin tosses, two-sided."""
        from scipy.stats import binomtest  # half a second of every start, training's too

        changed = self.gained + self.lost
        return float(binomtest(self.gained, changed).pvalue) if changed else 1.0


def compare(first: dict[str, bool], second: dict[str, bool]) -> Difference:
    """Two models' {question's id: whether the answer is right}, which must be of the same questions."""
    assert first.keys() == second.keys()
    gained = sum(right and not first[id_] for id_, right in second.items())
    return Difference(gained, sum(right and not second[id_] for id_, right in first.items()), len(first))
