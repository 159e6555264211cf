"""The orders in which a run reads its rows. An order decides the row at each position of all global batches.

The position alone decides the row. So a resumed run, and a run on another number of processes, read the same rows.
"""

import bisect
from collections.abc import Callable

import grain
import numpy as np
from jaxtyping import Float, Int

from kd_jax.resolve import check_number

# The orders that a config may name.
__all__ = ["curriculum", "shuffled"]

CONSTANT = 60  # of the reciprocal rank fusion


class shuffled:
    """All rows in a random order, which is another order in each pass."""


class curriculum:
    """The easy rows first. Each of several stages of the run adds rows that are harder for the student.

    The stages are equal parts of the run, as in `schedules.by_stage`. Stage s of S has the first (s + 1) floor(n / S) of
    the n rows, with the easiest rows first, and the last stage has all rows. Within a stage the rows are shuffled anew
    for each pass.

    Args:
      stages: the number of stages.

    Raises:
      ValueError: `stages` is not a whole number of at least 1.

    References:
      "POCL", https://arxiv.org/abs/2506.05695, 2025. In the published code a stage is a run of its own, with a number of
      passes over its rows.
    """

    def __init__(self, stages: int = 4):
        if check_number("stages", stages, low=1) != int(stages):
            raise ValueError(f"stages must be a whole number, but is {stages!r}.")
        self.stages = int(stages)

    def row_at(
        self, ranking: Int[np.ndarray, " N"], *, batch_size: int, total_steps: int, seed: int
    ) -> Callable[[int], int]:
        """Returns the function from a position in the sequence of all global batches to the index of the row.

        After the run the positions belong to the last stage.

        Args:
          ranking: the indices of all rows, with the easiest row first.
          batch_size: the number of rows of a global batch; each step reads one batch.
          total_steps: the number of steps of the run.
          seed: the seed of the order within the stages.

        Raises:
          ValueError: there are more stages than steps or than rows.

        Example:
          >>> row_at = curriculum(stages=2).row_at(np.array([2, 3, 0, 1]), batch_size=2, total_steps=4, seed=0)
          >>> sorted({row_at(position) for position in range(4)})
          [2, 3]
          >>> sorted({row_at(position) for position in range(4, 8)})
          [0, 1, 2, 3]
        """
        for name, count in {"steps": total_steps, "training rows": len(ranking)}.items():
            if self.stages > count:
                raise ValueError(f"stages={self.stages} is more than the {count} {name}; set fewer stages.")
        # Stage s begins at the first step with step * stages // total_steps == s.
        starts = [-(-stage * total_steps // self.stages) * batch_size for stage in range(self.stages)]
        # Stages need different seeds, because equal seeds give similar orders of similar numbers of rows.
        seeds = np.random.SeedSequence(seed).generate_state(self.stages).tolist()
        parts = [
            grain.MapDataset.range(size).shuffle(seed=part_seed).repeat()  # each pass has its own order
            for size, part_seed in zip(stage_sizes(len(ranking), self.stages), seeds, strict=True)
        ]

        def row_at(position: int) -> int:
            stage = bisect.bisect_right(starts, position) - 1
            return int(ranking[parts[stage][position - starts[stage]]])

        return row_at


def stage_sizes(num_rows: int, stages: int) -> list[int]:
    """Returns the number of rows in each stage of a curriculum.

    Example:
      >>> stage_sizes(10, 4)
      [2, 4, 6, 10]
    """
    return [(stage + 1) * (num_rows // stages) for stage in range(stages - 1)] + [num_rows]


def easy_first(
    rouge_l: Float[np.ndarray, " N"], cross_entropy: Float[np.ndarray, " N"], constant: float = CONSTANT
) -> Int[np.ndarray, " N"]:
    """Returns the indices of the rows, with the easiest row first: the reciprocal rank fusion of two ranks.

    A row's score is 1 / (constant + rank) + 1 / (constant + rank), with the ranks from 1. Of rows with the same ROUGE-L,
    the earlier row is easier. Equal cross-entropies keep the order of ROUGE-L. Equal scores keep the order of the
    cross-entropy, in which such ties are resolved.

    Args:
      rouge_l: the student's ROUGE-L on its own answer to each row; a larger number is easier.
      cross_entropy: the student's cross-entropy on each row's response; a smaller number is easier.
      constant: the number that is added to each rank.

    Example:
      >>> easy_first(np.array([10.0, 30.0, 20.0]), np.array([2.0, 1.0, 3.0])).tolist()
      [1, 0, 2]

    References:
      Cormack et al., "Reciprocal Rank Fusion outperforms Condorcet and Individual Rank Learning Methods", SIGIR 2009. The
      two ranks, and the order of ties, are those of "POCL", https://arxiv.org/abs/2506.05695, 2025, and its code.
    """
    by_rouge = np.argsort(-rouge_l, kind="stable")
    by_cross_entropy = by_rouge[np.argsort(cross_entropy[by_rouge], kind="stable")]
    score = np.zeros(len(rouge_l))
    for order in (by_rouge, by_cross_entropy):
        score[order] += 1 / (constant + 1 + np.arange(len(order)))
    return by_cross_entropy[np.argsort(-score[by_cross_entropy], kind="stable")]
