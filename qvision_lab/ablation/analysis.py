"""Statistics of a study's table: paired over seeds, corrected for multiple comparisons."""

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import t

from qvision_lab.ablation.study import BASE
from qvision_lab.evaluation.bootstrap import holm

LEVEL = 0.05  # of tests and intervals


def averages(table: pd.DataFrame) -> pd.DataFrame:
    """Means over `n` finished runs, one row per variant: scores and costs."""
    finished = table[table["failed"].isna()].drop(columns=["seed", "failed"])
    groups = finished.groupby("variant", sort=False)
    return groups.mean(numeric_only=True).assign(n=groups.size())


def differences(
    table: pd.DataFrame, metric: str = "CIDEr", margin: float | None = None
) -> pd.DataFrame:
    """What each variant has over the base: the mean of paired differences, one a seed.

    A run averages over its images, so that seeds are what varies. With five of them a paired
    t-interval has its nominal coverage; a bootstrap covers 84%, no rank test gets below p = 0.06.

    Returns one row a variant, with `n` pairs: `difference`, `low` and `high` of its interval, `p`,
    and `corrected`, Holm's p; NaN with less than two pairs. The intervals of all variants hold
    together (Bonferroni). With a `margin`, chosen before the runs, also `equivalent`: Holm's p of
    two one-sided tests (Schuirmann 1987, J. Pharmacokinet. Biopharm. 15:657) that the difference
    lies within it. ValueError for a metric that the base has not, and for several lengths at once.
    """
    if metric not in table or BASE not in set(table.dropna(subset=metric)["variant"]):
        known = ", ".join(table.columns.drop(["variant", "seed", "failed"]))
        raise ValueError(f"no {metric!r} of the base in this table; its metrics are {known}.")
    if table.duplicated(["variant", "seed"]).any():
        raise ValueError("a variant has several runs of one seed: choose a length by `part`.")
    values = table.pivot(index="seed", columns="variant", values=metric).astype(float)
    variants = [name for name in table["variant"].unique() if name != BASE]
    paired = values[variants].sub(values[BASE], axis=0)
    n, mean, error = paired.count(), paired.mean(), paired.sem()
    half = error * t.isf(LEVEL / 2 / max((n > 1).sum(), 1), n - 1)
    statistic = (mean / error).abs().where(mean.ne(0) | error.isna(), 0)  # 0 / 0 is no difference
    p = pd.Series(2 * t.sf(statistic, n - 1), variants)
    columns = {"n": n, "difference": mean, "low": mean - half, "high": mean + half, "p": p}
    rows = pd.DataFrame(columns | {"corrected": holm(p)}).rename_axis("variant")
    if margin is not None:
        outside = t.sf((margin - mean.abs()) / error, n - 1)
        rows["equivalent"] = holm(pd.Series(outside, variants))
    return rows


def part(
    table: pd.DataFrame, length: int, equal: str = "steps", tuned: bool = True
) -> pd.DataFrame:
    """The runs of one length, which can be compared: trained as many steps, or as long (`compute`).

    An arm without a cost of its own, such as the base, is in both. ValueError if there are none.
    """
    rows = table[table["length"] == length]
    rows = rows[rows["tuned"] == tuned] if "tuned" in rows else rows
    own = rows["equal"] == equal
    rows = rows[own | ~rows["variant"].isin(rows.loc[own, "variant"])]
    if rows.empty:
        lengths = ", ".join(map(str, sorted(table["length"].unique())))
        raise ValueError(f"no runs of {length} steps, tuned: {tuned}; lengths are {lengths}.")
    return rows


def parts(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """All comparisons in a study's table, by a title: each `part`, or all of it without lengths.

    Parts that the base has no run in, of an unfinished study, are left out.
    """
    if "length" not in table:
        return {"": table}
    kinds = table.assign(tuned=table.get("tuned", True))[["length", "equal", "tuned"]]
    kinds = kinds.drop_duplicates().sort_values(["tuned", "length", "equal"], ascending=False)
    titles = {"steps": "{} steps", "compute": "as long as {} steps of the base"}
    found = {
        titles[equal].format(length) + ", tuned" * tuned: part(table, length, equal, tuned)
        for length, equal, tuned in kinds.itertuples(index=False)
    }
    return {title: rows for title, rows in found.items() if BASE in set(rows["variant"])}


def differences_of_scenes(
    table: pd.DataFrame, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Differences of the share of true captions, with seeds and scenes as sources of variance.

    Both are resampled together (Owen 2007, Ann. Appl. Stat. 1:386, which is conservative), so that
    an interval holds for other seeds and other scenes. Columns as those of `differences`.
    """
    true = table.pivot(index="seed", columns="variant", values="true_scenes")
    rng, rows = np.random.default_rng(seed), {}
    variants = [name for name in table["variant"].unique() if name != BASE]
    for name in variants:
        pairs = true[[name, BASE]].dropna()
        rows[name] = {"n": len(pairs), "difference": np.nan, "low": np.nan, "high": np.nan}
        if len(pairs) > 1:
            ours, theirs = (np.array([[*y] for y in pairs[arm]]) == "y" for arm in (name, BASE))
            change = ours.astype(int) - theirs  # [seeds, scenes]
            weights = [rng.multinomial(n, [1 / n] * n, resamples) / n for n in change.shape]
            draws = np.einsum("rs,sn,rn->r", weights[0], change, weights[1])
            tail = LEVEL / 2 / len(variants)
            low, high = np.quantile(draws, [tail, 1 - tail])
            rows[name] |= {"difference": change.mean(), "low": low, "high": high}
    return pd.DataFrame.from_dict(rows, "index").rename_axis("variant")


def crossover(
    table: pd.DataFrame, variant: str, metric: str = "CIDEr", resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """The steps at which a variant and the base change places, and the ends of a 95% interval.

    Mean paired differences are joined by straight lines over log steps; where they change sign last
    is the crossover, infinite where they never do. The interval resamples the seeds of each length,
    of which the `table` has one run for each variant.
    """
    values = table.pivot(index=["length", "seed"], columns="variant", values=metric).astype(float)
    change = (values[variant] - values[BASE]).dropna()
    lengths = np.log(change.index.levels[0].to_numpy(float))
    by_length = [change[length].to_numpy() for length in change.index.levels[0]]
    rng = np.random.default_rng(seed)
    draws = [
        _crossing(lengths, [rng.choice(x, len(x)).mean() for x in by_length])
        for _ in range(resamples)
    ]
    tails = np.quantile(draws, [LEVEL / 2, 1 - LEVEL / 2], method="nearest")  # of infinities, too
    return _crossing(lengths, [x.mean() for x in by_length]), *tails


def _crossing(lengths: Float[np.ndarray, " L"], change: list[float]) -> float:
    places = [i for i in range(len(change) - 1) if change[i] * change[i + 1] < 0]
    if not places:
        return np.inf
    (x, y), (a, b) = (values[places[-1] : places[-1] + 2] for values in (lengths, change))
    return float(np.exp(x + (y - x) * a / (a - b)))


def summarise(table: pd.DataFrame, metric: str = "CIDEr", margin: float | None = None) -> list[str]:
    """Sentences on a metric, one per variant, and on runs that failed.

    A difference is claimed where Holm's p is below 5%, equivalence where that of its tests is.
    Where neither is, the sentence gives the largest difference that the interval allows.
    """
    rows, means = differences(table, metric, margin), averages(table)
    base = means.loc[BASE]
    sentences = [f"{metric} of the base is {base[metric]:.3g}, the mean of {base['n']:.0f} seeds."]
    for name, row in rows.sort_values("difference").iterrows():
        interval = f"[{row.low:+.3g}, {row.high:+.3g}] over {row.n:.0f} seeds"
        found = f"nothing can be said with {row.n:.0f} pairs of runs"
        if row.corrected < LEVEL:
            verb = "raises" if row.difference > 0 else "lowers"
            found = f"{verb} {metric} by {abs(row.difference):.3g}, {interval}"
            found += f", corrected p = {row.corrected:.2g}"
        elif row.get("equivalent", 1) < LEVEL:
            found = f"within {margin:.3g} of the base, {row.difference:+.3g}, {interval}"
            found += f", corrected p = {row.equivalent:.2g}"
        elif row.n > 1:
            bound = max(abs(row.low), abs(row.high))
            found = f"no difference shown, up to {bound:.3g} is possible, {interval}"
        sentences.append(f"{name}: {found}.")
    for name, runs in table.dropna(subset="failed").groupby("variant", sort=False):
        sentences.append(f"{name}: {len(runs)} runs failed ({runs['failed'].iloc[0]}).")
    return sentences
