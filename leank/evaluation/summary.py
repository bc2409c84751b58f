"""What an evaluation says: scores by task and length, what they lose against dense, and limits.

Every method was asked the same items as the dense model, so differences are taken item by item.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

CONFIDENCE = 0.95  # of the intervals, two-sided
N_DEPTHS = 10  # of a heat map

Record = dict[str, Any]


def summarise(
    records: Sequence[Record], shares: Mapping[str, Mapping[str, float] | None]
) -> list[Record]:
    """Return what each method kept and lost.

    Parameters
    ----------
    records : sequence of dict
        One of each item, as `leank.evaluation.run` logs them.
    shares : mapping
        By the names of the methods, dense first: `leank.masks.kept_shares`, or None.

    Returns
    -------
    list of dict
        For each method:

        - ``name``, ``kept`` (its shares), ``bytes_share`` (mean over items, of a dense cache);
        - ``tasks``, ``lengths``, ``cells`` (task and length) and ``mean`` over tasks, each with
          ``n``, ``dense``, ``score``, ``loss_points`` = 100 (dense - score) and its limits
          ``low_points`` and ``high_points``: the normal approximation to the mean of paired
          differences, two-sided 95%; None for a single item;
        - ``kl``, the mean over all items that have one, and ``text`` with ``n``, ``perplexity``
          and ``kl`` of plain text, or None;
        - ``needle``, mean scores by depth and length, where a task hides one needle.
    """
    dense = next(iter(shares))
    scored = [r for r in records if r["methods"][dense]["score"] is not None]
    text = [r for r in records if r["methods"][dense]["score"] is None]
    found = []
    for name, kept in shares.items():
        tasks = [{"task": t} | _scores(rs, name, dense) for t, rs in _groups(scored, "task")]
        lengths = [
            # Tasks count alike, however many items of them there are.
            {"length": n} | _mean([_scores(of, name, dense) for _, of in _groups(rs, "task")])
            for n, rs in _groups(scored, "length")
        ]
        cells = [
            {"task": t, "length": n} | _scores(of, name, dense)
            for t, rs in _groups(scored, "task")
            for n, of in _groups(rs, "length")
        ]
        kls = [kl for r in records if (kl := r["methods"][name]["kl"]) is not None]
        found.append(
            {
                "name": name,
                "kept": None if kept is None else dict(kept),
                "bytes_share": float(np.mean([r["methods"][name]["share"] for r in records])),
                "tasks": tasks,
                "lengths": lengths,
                "cells": cells,
                "mean": _mean(tasks) if tasks else None,
                "kl": float(np.mean(kls)) if kls else None,
                "text": _text(text, name) if text else None,
                "needle": _needle(scored, name),
            }
        )
    return found


def _groups(records: Sequence[Record], key: str) -> Iterable[tuple[Any, list[Record]]]:
    for value in dict.fromkeys(r[key] for r in records):
        yield value, [r for r in records if r[key] == value]


def _scores(records: Sequence[Record], name: str, dense: str) -> Record:
    """Return scores of items that are alike, and the limits of what they lose."""
    score, best = (np.array([r["methods"][of]["score"] for r in records]) for of in (name, dense))
    points, n = 100 * (best - score), len(records)
    variance = float(points.var(ddof=1)) / n if n > 1 else math.nan
    return {
        "n": n,
        "dense": float(best.mean()),
        "score": float(score.mean()),
        **_limits(float(points.mean()), variance),
    }


def _mean(scores: Sequence[Record]) -> Record:
    """Return the mean of independent means."""
    means = {key: float(np.mean([s[key] for s in scores])) for key in ("dense", "score")}
    errors = [math.nan if s["error_points"] is None else s["error_points"] for s in scores]
    variance = float(np.square(errors).sum()) / len(errors) ** 2
    loss = float(np.mean([s["loss_points"] for s in scores]))
    return {"n": sum(s["n"] for s in scores)} | means | _limits(loss, variance)


def _limits(points: float, variance: float) -> Record:
    if math.isnan(variance):
        return {
            "loss_points": points,
            "error_points": None,
            "low_points": None,
            "high_points": None,
        }
    error = math.sqrt(variance)
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * error
    return {
        "loss_points": points,
        "error_points": error,
        "low_points": points - half,
        "high_points": points + half,
    }


def _text(records: Sequence[Record], name: str) -> Record:
    nll, kl = (np.mean([r["methods"][name][key] for r in records]) for key in ("nll", "kl"))
    return {"n": len(records), "perplexity": math.exp(nll), "kl": float(kl)}


def _needle(records: Sequence[Record], name: str) -> Record | None:
    """Return mean scores [depth][length], None where no item is."""
    hidden = [r for r in records if r["depth"] is not None]
    if not hidden:
        return None
    lengths = sorted({r["length"] for r in hidden})
    cells: list[list[list[float]]] = [[[] for _ in lengths] for _ in range(N_DEPTHS)]
    for r in hidden:
        depth = min(int(r["depth"] * N_DEPTHS), N_DEPTHS - 1)
        cells[depth][lengths.index(r["length"])].append(r["methods"][name]["score"])
    means = [[float(np.mean(cell)) if cell else None for cell in row] for row in cells]
    return {"lengths": lengths, "score": means}
