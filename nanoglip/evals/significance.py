"""Confidence of a number: bootstrap intervals, and which differences of two models are real.

    interval(hits)              95 % interval of a share; hits (n,): is each example right?
    interval(x, y, statistic=f) of any f(x, y), x and y (n,) of the same examples
    by_unit(hits, unit)         counts that replace hits where answers depend on each other, such as
                                those about the captions of one picture
    difference(a, b)            two models on the same examples: difference, interval, p
    compare(a, b)               the same for every metric of two models, with a verdict

Examples are resampled, models are not: the distance between two seeds is in none of these numbers.
"""

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from glip import InputError
from nanoglip import files

LEVEL, DRAWS = 0.95, 2999


def by_unit(hits: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """The number of right answers and of all answers in each unit. (n,) twice -> (U, 2).

    Units, counted from 0, are independent of each other; answers within one are not.
    """
    return np.stack([np.bincount(unit, hits), np.bincount(unit)], axis=1).astype(int)


def as_counts(hits: np.ndarray) -> np.ndarray:
    """by_unit()'s counts (U, 2), where each of hits (n,) is its own unit."""
    return hits if hits.ndim == 2 else by_unit(hits, np.arange(len(hits)))


def resampled_interval(counts: np.ndarray) -> tuple[float, float]:
    """Percentile bootstrap of a ratio of sums over units, from whole numbers (U, 2)."""
    kinds, number = np.unique(counts, axis=0, return_counts=True)
    # A resample is given by how many units of each kind it has: a multinomial draw.
    draws = np.random.default_rng(0).multinomial(len(counts), number / len(counts), DRAWS)
    right, asked = (draws @ kinds).T
    low, high = np.quantile(right / asked, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def interval(*outcomes: np.ndarray, statistic: Callable = np.mean) -> tuple[float, float]:
    """Percentile bootstrap of statistic(*outcomes) over examples; outcomes (n,) each.

    The resampled mean of rights and wrongs is binomial, so that a share needs no drawing. Counts of
    by_unit() are resampled by unit. Where all answers are right, or all wrong, no resample differs:
    the exact binomial interval of as many units is given. No examples give 0 to 1.
    """
    import scipy.stats

    first = np.asarray(outcomes[0])
    if statistic is np.mean and (first.dtype == bool or first.ndim == 2):
        counts = as_counts(first)
        n, (right, asked) = len(counts), counts.sum(axis=0).tolist()
        if not n:
            return 0.0, 1.0
        if right in (0, asked):
            found = scipy.stats.binomtest(n * bool(right), n).proportion_ci(LEVEL, "exact")
        elif asked == n:
            found = (k / n for k in scipy.stats.binom.interval(LEVEL, n, right / n))
        else:
            return resampled_interval(counts)
    else:
        found = scipy.stats.bootstrap(
            outcomes, statistic, paired=True, vectorized=False, n_resamples=DRAWS, rng=0,
            confidence_level=LEVEL, method="percentile", batch=1 + 10**7 // len(first),
        ).confidence_interval  # fmt: skip
    low, high = found
    return float(low), float(high)


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Shares of two models, b's lead, its interval (paired bootstrap), p (sign-flip test).

    a and b (n,) bool: which of the same n examples each gets right; or by_unit()'s counts of them.
    """
    a, b = as_counts(a), as_counts(b)
    lead, asked = b[:, 0] - a[:, 0], a[:, 1]
    low, high = resampled_interval(np.stack([lead, asked], axis=1))
    shares = {"a": a[:, 0], "b": b[:, 0], "difference": lead}
    shares = {name: float(found.sum() / asked.sum()) for name, found in shares.items()}
    return {**shares, "low": low, "high": high, "p": sign_flip_p(lead)}


def sign_flip_p(lead: np.ndarray) -> float:
    """Exact p of a sign-flip test; lead (U,): by how many answers one model leads in each unit.

    If the models were equal, each unit's lead would have either sign with equal probability. Where
    no lead is above one answer, this is McNemar's exact test.
    """
    import scipy.stats

    chances = np.ones(1)  # of every total that flipped signs can give: -T, -T + 2, ..., T
    sizes, counts = np.unique(np.abs(lead[lead != 0]), return_counts=True)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        own = np.zeros(size * count + 1)
        own[::size] = scipy.stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, own)
    totals = np.arange(-len(chances) + 1, len(chances), 2)
    return min(1.0, float(chances[np.abs(totals) >= abs(lead.sum())].sum()))


def compare(
    a: dict[str, dict[str, np.ndarray]], b: dict[str, dict[str, np.ndarray]]
) -> dict[str, dict[str, dict]]:
    """difference() of every metric, {column: {metric: hits (n,)}} twice, and whether it is "real".

    p is corrected for the number of metrics (Benjamini and Hochberg). A difference is called real
    if p is below 5 %: at most that share of them is then expected to be wrong.
    """
    import scipy.stats

    tables = {
        column: {metric: difference(hits, b[column][metric]) for metric, hits in own.items()}
        for column, own in a.items()
    }
    rows = [row for table in tables.values() for row in table.values()]
    corrected = scipy.stats.false_discovery_control([row["p"] for row in rows])
    for row, p in zip(rows, corrected.tolist(), strict=True):
        row |= {"p": p, "real": p < 1 - LEVEL}
    return tables


def comparison_table(tables: dict[str, dict[str, dict]]) -> str:
    """compare()'s tables as text."""
    lines, width = [], max(32, *(len(column) + 1 for column in tables))
    for column, table in tables.items():
        lines.append(f"{column:{width}}{'A':>8}{'B':>10}      B - A (95 %)              p")
        for metric, row in table.items():
            between = f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
            p = "<0.0001" if row["p"] < 1e-4 else f"{row['p']:.4f}"
            lines.append(
                f"{metric:{width}}{100 * row['a']:>8.1f} %{100 * row['b']:>8.1f} %"
                f"{100 * row['difference']:>+9.1f} ({between}){p:>{24 - len(between)}}"
                + "  real" * row["real"]
            )
    found = [row["real"] for table in tables.values() for row in table.values()]
    lines.append(
        f"{sum(found)} of {len(found)} differences are real (p, corrected for their number, below "
        f"{1 - LEVEL:.2g}) between these two models;\nto compare their recipes, train more seeds"
    )
    return "\n".join(lines)


def save_outcomes(
    path: Path, columns: dict[str, dict[str, np.ndarray]], examples: str, model: str
) -> None:
    """Write ranks (n,) by column and question, and the digests of the examples and the model."""
    arrays = {
        f"{column}/{question}": np.asarray(found, np.int32)
        for column, questions in columns.items() for question, found in questions.items()
    }  # fmt: skip
    arrays |= {"examples": np.array(examples), "model": np.array(model)}
    files.write_safely(path, lambda file: np.savez_compressed(file, **arrays))


def load_outcomes(path: Path) -> tuple[dict[str, dict[str, np.ndarray]], str, str]:
    """What save_outcomes() was given; raises InputError for another file."""
    columns = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                column, _, question = name.partition("/")
                if question:
                    columns.setdefault(column, {})[question] = arrays[name]
            return columns, str(arrays["examples"]), str(arrays.get("model", ""))
    except (ValueError, KeyError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        why = f"not what evaluate.py writes ({type(error).__name__})"
        raise InputError(f"{path}: {why}; remove it, and the run is evaluated again") from None
