"""Ridge regression of many labels at once, with a penalty that fits features of unit variance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def ridge(features: np.ndarray, goal: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Predictions [row, label] for `held_out`: those of scikit-learn's `StandardScaler` and `Ridge(alpha=n_features)`, at a
    fifth of the time.

    With standardized features that penalty is one unit of ridge on a kernel of unit diagonal. Solved in rows or in
    features, whichever are fewer.
    """
    weights, mean, centre = ridge_weights(features, goal)
    return (held_out - mean) @ weights + centre


def ridge_weights(features: np.ndarray, goal: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The map of `ridge`: weights [feature, label] of features less their mean [feature], and the mean goal [label]."""
    mean, std = features.mean(0), _spread(features)
    x, centre = (features - mean) / std, goal.mean(0)
    if len(x) < x.shape[1]:
        kernel = x @ x.T
        kernel[np.diag_indices_from(kernel)] += x.shape[1]
        weights = x.T @ np.linalg.solve(kernel, goal - centre)
    else:
        covariance = x.T @ x
        covariance[np.diag_indices_from(covariance)] += x.shape[1]
        weights = np.linalg.solve(covariance, x.T @ (goal - centre))
    return weights / std[:, None], mean, centre


def cross_validated(features: np.ndarray, goal: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Predictions [row, label] of each row by the `ridge` of the rows of other folds; goal [row, label], folds [row]."""
    return CrossValidation(features, folds).predict(goal)


class CrossValidation:
    """The `ridge` of the rows of other folds, for labels that may come some at a time: all that hangs on the features alone
    is had once. Products of the features too are had once for all folds, where features are fewer than rows."""

    def __init__(self, features: np.ndarray, folds: np.ndarray):
        """features [row, feature]; folds [row]."""
        from scipy.linalg import lu_factor

        self._inside = [folds == fold for fold in range(int(folds.max()) + 1)]
        self._in_rows = min((~rows).sum() for rows in self._inside) < features.shape[1]
        self._fits: list[tuple[np.ndarray, np.ndarray, Any]] = []
        """Of each fold mean and spread [feature] of the other rows, and their factored kernel or covariance."""
        self._x = features if self._in_rows else features - features.mean(0)
        products: list[np.ndarray] = []
        if not self._in_rows:  # what is near zero loses few digits in differences of products
            products = [self._x[rows].T @ self._x[rows] for rows in self._inside]
        for fold, rows in enumerate(self._inside):
            others = self._x[~rows]
            mean, std = others.mean(0), _spread(others)
            if self._in_rows:
                x = (others - mean) / std
                square = x @ x.T
            else:
                square = sum(products[:fold] + products[fold + 1 :]) - len(others) * np.outer(mean, mean)
                square /= np.outer(std, std)
            square[np.diag_indices_from(square)] += len(std)
            self._fits.append((mean, std, lu_factor(square, overwrite_a=True, check_finite=False)))

    def predict(self, goal: np.ndarray) -> np.ndarray:
        """Predictions [row, label]; goal [row, label]."""
        from scipy.linalg import lu_solve

        out = np.empty_like(goal)
        with_goal: list[np.ndarray] = []
        if not self._in_rows:
            with_goal = [self._x[rows].T @ goal[rows] for rows in self._inside]
        for fold, (rows, (mean, std, factored)) in enumerate(zip(self._inside, self._fits, strict=True)):
            centre = goal[~rows].mean(0)
            if self._in_rows:
                x = (self._x[~rows] - mean) / std
                weights = x.T @ lu_solve(factored, goal[~rows] - centre, check_finite=False)
            else:
                right = sum(with_goal[:fold] + with_goal[fold + 1 :]) - (~rows).sum() * np.outer(mean, centre)
                weights = lu_solve(factored, right / std[:, None], check_finite=False)
            out[rows] = (self._x[rows] - mean) / std @ weights + centre
        return out


def _spread(features: np.ndarray) -> np.ndarray:
    """Standard deviation [feature]; 1 where it is nothing but rounding of a constant."""
    std = features.std(
        0, dtype=np.float64
    )  # in float32 a sum of equal numbers is off by more, the more they are
    rounding = max(8 * np.finfo(features.dtype).eps, len(features) * np.finfo(np.float64).eps)
    std[std <= rounding * np.abs(features).max(0)] = 1
    return std.astype(features.dtype)


class FoldRidge:
    """Ridge regressions of rows in folds, each fitted without some folds, at the cost of little more than one.

    As `ridge`, but features are standardized over all rows, whose labels that does not use: products of the features are
    had once, and a fit takes those of its folds.
    """

    def __init__(self, features: np.ndarray, folds: np.ndarray):
        """features [row, feature]; folds [row]."""
        self._x = (features - features.mean(0)) / _spread(features)
        self._inside = [folds == fold for fold in range(int(folds.max()) + 1)]
        self._in_rows = len(features) < features.shape[1]
        if self._in_rows:
            self._kernel = self._x @ self._x.T
        else:
            self._products = [self._x[inside].T @ self._x[inside] for inside in self._inside]

    def predict(self, goal: np.ndarray, without: Sequence[int]) -> dict[int, np.ndarray]:
        """Predictions [row of the fold, label] of the fit without some folds, by fold of these; goal [row, label]."""
        tests = {fold: self._inside[fold] for fold in without}
        train = ~np.any([*tests.values()], axis=0)
        y = goal[train]
        centre, penalty = y.mean(0), self._x.shape[1]
        if self._in_rows:
            kernel = self._kernel[np.ix_(train, train)]
            mean = kernel.mean(0)
            centred = kernel - mean - mean[:, None] + mean.mean()
            centred[np.diag_indices_from(centred)] += penalty
            weights = np.linalg.solve(centred, y - centre)
            out = {}
            for fold, test in tests.items():
                cross = self._kernel[np.ix_(test, train)]
                out[fold] = (cross - cross.mean(1, keepdims=True) - mean + mean.mean()) @ weights + centre
            return out
        x = self._x[train]
        mean = x.mean(0)
        kept = [product for fold, product in enumerate(self._products) if fold not in without]
        covariance = np.sum(kept, axis=0) - len(x) * np.outer(mean, mean)
        covariance[np.diag_indices_from(covariance)] += penalty
        weights = np.linalg.solve(covariance, x.T @ (y - centre))
        return {fold: (self._x[test] - mean) @ weights + centre for fold, test in tests.items()}
