"""How sure a number is: bootstrap intervals, and which differences of two runs are real.

    interval(hits)              95 % interval of a share; hits (n,): is each example right?
    interval(x, y, statistic=f) of any f(x, y), x and y (n,) of the same examples
    difference(a, b)            two models on the same examples: difference, interval, p
    compare(a, b)               the same for every metric of two runs, with a verdict
    keep, kept                  arrays of a run to a file, and back

Arrays of per-example outcomes go in and floats come out. Examples are what is drawn: another seed
of the same training is another model, and its distance from the first is in none of these numbers.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.stats

import glip
from glip import InputError

LEVEL, DRAWS = 0.95, 2999


def interval(
    *outcomes: np.ndarray, statistic: Callable = np.mean, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile bootstrap of statistic(*outcomes) over examples; outcomes (n,) each.

    The resampled mean of n rights and wrongs is binomial, so that a share needs no drawing. Where
    all are right, or all wrong, no resample differs: there the exact binomial interval is given.
    Of no examples nothing is known: 0 to 1.
    """
    first = np.asarray(outcomes[0])
    if statistic is np.mean and first.dtype == bool:
        right, n = int(first.sum()), len(first)
        if not n:
            return 0.0, 1.0
        if right in (0, n):
            low, high = scipy.stats.binomtest(right, n).proportion_ci(level, "exact")
        else:
            low, high = (k / n for k in scipy.stats.binom.interval(level, n, right / n))
        return float(low), float(high)
    found = scipy.stats.bootstrap(
        outcomes, statistic, paired=True, vectorized=False, n_resamples=DRAWS,
        confidence_level=level, method="percentile", rng=0, batch=1 + 10**7 // len(first),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def difference(a: np.ndarray, b: np.ndarray, level: float = LEVEL) -> dict[str, float]:
    """Shares of two models, b's lead, its interval (paired bootstrap), p (McNemar's exact test).

    a and b (n,) bool: which of the same n examples each gets right. An example says something only
    where the two differ: if neither were better, each would win half of these.
    """
    n, gained, lost = len(a), int((b & ~a).sum()), int((a & ~b).sum())
    shares = [lost / n, gained / n, 1 - (lost + gained) / n]
    # To draw n of the examples with replacement is to draw how many of each of three kinds.
    drawn = np.random.default_rng(0).multinomial(n, shares, DRAWS)             # (DRAWS, 3)
    low, high = np.quantile((drawn[:, 1] - drawn[:, 0]) / n, [(1 - level) / 2, (1 + level) / 2])
    p = scipy.stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return {
        "a": float(a.mean()), "b": float(b.mean()), "difference": (gained - lost) / n,
        "low": float(low), "high": float(high), "p": float(p),
    }  # fmt: skip


def compare(
    a: dict[str, dict[str, np.ndarray]], b: dict[str, dict[str, np.ndarray]], level: float = LEVEL
) -> dict[str, dict[str, dict]]:
    """difference() of every metric, {column: {metric: hits (n,)}} twice, and whether it is "real".

    Many metrics are many chances to be fooled: p is Benjamini and Hochberg's over all of them, and
    real is what lies below 1 - level. Of what is called real, that share is expected to be wrong.
    """
    tables = {
        column: {metric: difference(hits, b[column][metric], level) for metric, hits in own.items()}
        for column, own in a.items()
    }
    rows = [row for table in tables.values() for row in table.values()]
    corrected = scipy.stats.false_discovery_control([row["p"] for row in rows])
    for row, p in zip(rows, corrected, strict=True):
        row |= {"p": float(p), "real": bool(p < 1 - level)}
    return tables


def describe(tables: dict[str, dict[str, dict]]) -> str:
    """compare()'s tables as text, and what they do not say."""
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
        f"{1 - LEVEL:.2g}) between these two models;\nwhether their recipes differ, more seeds say"
    )
    return "\n".join(lines)


def keep(path: Path, columns: dict[str, dict[str, np.ndarray]], examples: str) -> None:
    """Write whole numbers (n,) by column and question; `examples` says which were asked about."""
    arrays = {
        f"{column}/{question}": found.astype(np.int32)
        for column, questions in columns.items() for question, found in questions.items()
    }  # fmt: skip
    arrays["examples"] = np.array(examples)
    glip.write_safely(path, lambda file: np.savez_compressed(file, **arrays))


def kept(path: Path) -> tuple[dict[str, dict[str, np.ndarray]], str]:
    """What keep() was given; executes nothing. Raises InputError for another file."""
    columns = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                column, _, question = name.partition("/")
                if question:
                    columns.setdefault(column, {})[question] = arrays[name]
            return columns, str(arrays["examples"])
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path}: not what evaluate.py writes ({type(error).__name__}); remove it, and the run "
            "is evaluated again"
        ) from None
