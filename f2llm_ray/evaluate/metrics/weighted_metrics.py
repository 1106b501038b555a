"""Metrics of units that may count more than once: one definition for the score and for its resamples.

A builder takes the values of the units and returns a `Statistic`, which takes how often each unit counts. A unit
that counts w times scores as w equal units would, so resamples need no copies. Where all units count once, the
values are those of scikit-learn and scipy.

Shapes: n units, b resamples, m dims; g groups of equal values, c classes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from f2llm_ray.evaluate.metrics.intervals import Statistic, Values, mean_of

Builder = Callable[[Values, Values], Statistic]
"""From the target of each unit [n] and its value at each dim [n, m]."""
Metrics = dict[str, Builder]
"""How each metric of a kind of task is computed from the units, the main metric first."""

# Below this share of the variance over all units, what is left in a resample is rounding.
NO_VARIANCE = 1e-12


def mean(target_n: Values, value_nm: Values) -> Statistic:
    """The mean of values that are scores themselves."""
    del target_n
    return mean_of(value_nm)


def pearson(target_n: Values, value_nm: Values) -> Statistic:
    """Pearson's correlation of values and targets; 0 where either is constant, which orders nothing."""
    x_n, y_nm = _standard(target_n), _standard(value_nm)

    def statistic(weight_bn: Values) -> Values:
        def expected(v: Values) -> Values:
            return weight_bn @ v / weight_bn.sum(axis=1, keepdims=True)

        x_b1, y_bm = expected(x_n[:, None]), expected(y_nm)
        product_bm = expected(x_n[:, None] * y_nm) - x_b1 * y_bm
        return _correlation(product_bm, expected(x_n[:, None] ** 2) - x_b1**2, expected(y_nm**2) - y_bm**2)

    return statistic


def spearman(target_n: Values, value_nm: Values) -> Statistic:
    """Spearman's correlation: Pearson's of ranks, equal values sharing the mean of theirs; 0 where constant."""
    sides = [_Groups(side_n) for side_n in (target_n, *value_nm.T)]

    def statistic(weight_bn: Values) -> Values:
        middle_b1 = (weight_bn.sum(axis=1, keepdims=True) + 1) / 2
        x_bn, *y_mbn = (side.ranks(weight_bn) - middle_b1 for side in sides)
        weighted_bn = weight_bn * x_bn
        x_b = (weighted_bn * x_bn).sum(axis=1)
        scale_b = middle_b1[:, 0] ** 2 * weight_bn.sum(axis=1)
        return np.column_stack(
            [
                _correlation(
                    (weighted_bn * y_bn).sum(axis=1) / scale_b,
                    x_b / scale_b,
                    (weight_bn * y_bn**2).sum(axis=1) / scale_b,
                )
                for y_bn in y_mbn
            ]
        )

    return statistic


def average_precision(target_n: Values, value_nm: Values) -> Statistic:
    """Average precision of finding the targets that are 1 by the highest values; equal values come together.

    The sum over distinct values of the precision down to it, times the recall that it adds. 0 without positives.
    """

    def of_dim(positive_bg: Values, all_bg: Values) -> Values:
        precision_bg = positive_bg / np.maximum(all_bg, 1)
        added_bg = np.diff(positive_bg, axis=1, prepend=0)
        return (precision_bg * added_bg).sum(axis=1) / np.maximum(positive_bg[:, -1], 1)

    return _by_threshold(target_n, value_nm, of_dim)


def best_accuracy(target_n: Values, value_nm: Values) -> Statistic:
    """Accuracy at the threshold that is best for it; all are called positive from it on, and none may be."""

    def of_dim(positive_bg: Values, all_bg: Values) -> Values:
        positives_b, total_b = positive_bg[:, -1], all_bg[:, -1]
        right_bg = positive_bg + (total_b - positives_b)[:, None] - (all_bg - positive_bg)
        return np.maximum(right_bg.max(axis=1), total_b - positives_b) / total_b

    return _by_threshold(target_n, value_nm, of_dim)


def best_f1(target_n: Values, value_nm: Values) -> Statistic:
    """F1 of the positives at the threshold that is best for it."""

    def of_dim(positive_bg: Values, all_bg: Values) -> Values:
        return (2 * positive_bg / np.maximum(all_bg + positive_bg[:, -1:], 1)).max(axis=1)

    return _by_threshold(target_n, value_nm, of_dim)


def macro_f1(target_n: Values, value_nm: Values) -> Statistic:
    """The mean over classes of F1, targets being classes and values those that were found.

    Classes that no unit has or got are left out, as scikit-learn leaves them out.
    """
    return lambda weight_bn: np.column_stack([_macro_f1(target_n, value_n, weight_bn) for value_n in value_nm.T])


def v_measure(target_n: Values, value_nm: Values) -> Statistic:
    """V-measure of clusters: the harmonic mean of homogeneity and completeness (Rosenberg and Hirschberg 2007)."""

    def entropy(weight_bn: Values, *codes: Values) -> Values:
        order_n, start_g = _cells(np.column_stack(codes))
        share_bg = np.add.reduceat(weight_bn[:, order_n], start_g, axis=1) / weight_bn.sum(axis=1, keepdims=True)
        return -(share_bg * np.log(np.where(share_bg > 0, share_bg, 1))).sum(axis=1)

    def of_dim(weight_bn: Values, value_n: Values) -> Values:
        class_b, cluster_b = entropy(weight_bn, target_n), entropy(weight_bn, value_n)
        shared_b = np.maximum(class_b + cluster_b - entropy(weight_bn, target_n, value_n), 0)
        homogeneity_b = np.where(class_b > 0, shared_b / np.where(class_b > 0, class_b, 1), 1)
        completeness_b = np.where(cluster_b > 0, shared_b / np.where(cluster_b > 0, cluster_b, 1), 1)
        both_b = homogeneity_b + completeness_b
        return 2 * homogeneity_b * completeness_b / np.where(both_b > 0, both_b, 1)

    return lambda weight_bn: np.column_stack([of_dim(weight_bn, value_n) for value_n in value_nm.T])


class _Groups:
    """Equal values of a column, from the lowest on."""

    def __init__(self, value_n: Values) -> None:
        self.order_n, self.start_g = _cells(value_n[:, None])
        sizes_g = np.diff(self.start_g, append=len(value_n))
        self.group_n = np.empty(len(value_n), dtype=np.int64)
        self.group_n[self.order_n] = np.repeat(np.arange(len(sizes_g)), sizes_g)

    def sums(self, weight_bn: Values) -> Values:
        """How often the units of each group count together [b, g]."""
        return np.add.reduceat(weight_bn[:, self.order_n], self.start_g, axis=1)

    def ranks(self, weight_bn: Values) -> Values:
        """The mean rank of each unit [b, n], from 1, where every unit is repeated as often as it counts."""
        sum_bg = self.sums(weight_bn)
        rank_bg = np.cumsum(sum_bg, axis=1) - (sum_bg - 1) / 2
        return rank_bg[:, self.group_n]


def _by_threshold(target_n: Values, value_nm: Values, of_dim: Callable[[Values, Values], Values]) -> Statistic:
    """A statistic of the positives and of all units at or above each distinct value [b, g], highest first."""
    groups = [_Groups(-value_n) for value_n in value_nm.T]

    def statistic(weight_bn: Values) -> Values:
        return np.column_stack(
            [
                of_dim(
                    np.cumsum(group.sums(weight_bn * target_n), axis=1), np.cumsum(group.sums(weight_bn), axis=1)
                )
                for group in groups
            ]
        )

    return statistic


def _macro_f1(target_n: Values, value_n: Values, weight_bn: Values) -> Values:
    classes_c = np.union1d(target_n, value_n)
    is_target_nc, is_value_nc = target_n[:, None] == classes_c, value_n[:, None] == classes_c
    hit_bc = weight_bn @ (is_target_nc & is_value_nc)
    count_bc = weight_bn @ is_target_nc + weight_bn @ is_value_nc
    return (2 * hit_bc / np.maximum(count_bc, 1)).sum(axis=1) / (count_bc > 0).sum(axis=1)


def _cells(codes_nc: Values) -> tuple[np.ndarray, np.ndarray]:
    """An order [n] that brings equal rows together, and where each group of them starts [g]."""
    order_n = np.lexsort(codes_nc.T[::-1])
    new_n = np.ones(len(order_n), dtype=bool)
    new_n[1:] = (np.diff(codes_nc[order_n], axis=0) != 0).any(axis=1)
    return order_n, np.flatnonzero(new_n)


def _standard(values: Values) -> Values:
    """Mean 0 and variance 1 by column, so that sums of squares lose no digits; constant columns become 0."""
    constant = np.ptp(values, axis=0) == 0
    spread = np.where(constant, 1.0, values.std(axis=0))
    return np.where(constant, 0.0, (values - values.mean(axis=0)) / np.where(spread > 0, spread, 1.0))


def _correlation(product: Values, variance_x: Values, variance_y: Values) -> Values:
    some = (variance_x > NO_VARIANCE) & (variance_y > NO_VARIANCE)
    return np.where(some, product / np.sqrt(np.where(some, variance_x * variance_y, 1.0)), 0.0)
