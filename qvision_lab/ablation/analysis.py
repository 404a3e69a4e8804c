"""Statistics of a study's table: paired over seeds, corrected for multiple comparisons."""

import pandas as pd
from scipy.stats import t

from qvision_lab.ablation.study import BASE
from qvision_lab.evaluation.bootstrap import holm

LEVEL = 0.05  # of tests and intervals


def averages(table: pd.DataFrame) -> pd.DataFrame:
    """Means over `n` finished runs, one row per variant: scores and costs."""
    finished = table[table["failed"].isna()].drop(columns=["seed", "failed"])
    groups = finished.groupby("variant", sort=False)
    return groups.mean().assign(n=groups.size())


def differences(table: pd.DataFrame, metric: str = "CIDEr") -> pd.DataFrame:
    """What each variant has over the base: the mean of paired differences, one a seed.

    A run averages over its images, so that seeds are what varies. With five of them a paired
    t-interval has its nominal coverage; a bootstrap of five covers 84% and no rank test can come
    below p = 0.06.

    Returns one row a variant, with `n` pairs: `difference`, `low` and `high` of its interval, `p`,
    and `corrected`, Holm's p. The intervals of all variants of the table hold together
    (Bonferroni). NaN with less than two pairs.
    """
    if metric not in table or BASE not in set(table.dropna(subset=metric)["variant"]):
        known = ", ".join(table.columns.drop(["variant", "seed", "failed"]))
        raise ValueError(f"no {metric!r} of the base in this table; its metrics are {known}.")
    values = table.pivot(index="seed", columns="variant", values=metric).astype(float)
    variants = [name for name in table["variant"].unique() if name != BASE]
    paired = values[variants].sub(values[BASE], axis=0)
    n, mean, error = paired.count(), paired.mean(), paired.sem()
    half = error * t.isf(LEVEL / 2 / max((n > 1).sum(), 1), n - 1)
    statistic = (mean / error).abs().where(mean.ne(0) | error.isna(), 0)  # 0 / 0 is no difference
    p = pd.Series(2 * t.sf(statistic, n - 1), variants)
    columns = {"n": n, "difference": mean, "low": mean - half, "high": mean + half, "p": p}
    return pd.DataFrame({**columns, "corrected": holm(p)}).rename_axis("variant")


def summarise(table: pd.DataFrame, metric: str = "CIDEr") -> list[str]:
    """Sentences on a metric, one per variant, and on runs that failed.

    A difference is claimed where Holm's p is below 5%. For the others none is shown, which does not
    exclude one: the sentence gives the largest that the interval allows.
    """
    rows, means = differences(table, metric), averages(table)
    base = means.loc[BASE]
    sentences = [f"{metric} of the base is {base[metric]:.3g}, the mean of {base['n']:.0f} seeds."]
    for name, row in rows.sort_values("difference").iterrows():
        interval = f"[{row.low:+.3g}, {row.high:+.3g}] over {row.n:.0f} seeds"
        if row.n < 2:
            sentences.append(f"{name}: nothing can be said with {row.n:.0f} pairs of runs.")
        elif row.corrected < LEVEL:
            verb = "raises" if row.difference > 0 else "lowers"
            found = f"{verb} {metric} by {abs(row.difference):.3g}, {interval}"
            sentences.append(f"{name}: {found}, corrected p = {row.corrected:.2g}.")
        else:
            bound = max(abs(row.low), abs(row.high))
            shown = f"no difference shown, up to {bound:.3g} is possible"
            sentences.append(f"{name}: {shown}, {interval}.")
    for name, runs in table.dropna(subset="failed").groupby("variant", sort=False):
        sentences.append(f"{name}: {len(runs)} runs failed ({runs['failed'].iloc[0]}).")
    return sentences
