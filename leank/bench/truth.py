"""What decode computes, in float64 with torch, and how far a result is from it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from leank.bench.work import WrongResultError

MEASURE = "of its head's largest output"


def attend64(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: npt.NDArray[np.bool_] | None = None,
    *,
    sink: int = 0,
    recent: int = 0,
) -> torch.Tensor:
    """Attend by LeanK's rule with the query of a row's last token.

    A token j is seen whole if j < S0 or p - j < W, where p = L - 1 is the query's position. Of
    other tokens only the kept channels count, and a head that keeps none does not see them.

    Parameters
    ----------
    q : tensor [Hq, D]
    k, v : tensors [Hkv, L, D]
    keep : bool array [Hkv, D], optional
        None keeps everything: dense attention.
    sink, recent : int
        S0 and W.

    Returns
    -------
    float64 tensor [Hq, D]
    """
    n_heads, length, head_dim = k.shape
    j = torch.arange(length, device=k.device)
    whole = (j < sink) | (length - 1 - j < recent)
    out = []
    # Head by head: float64 copies of all heads may not fit beside what is measured.
    for g, q_g in enumerate(q.double().view(n_heads, -1, head_dim)):
        logits = q_g @ k[g].double().T
        if keep is not None:
            kept = torch.from_numpy(keep[g]).to(k.device)
            few = q_g[:, kept] @ k[g][:, kept].double().T
            logits = torch.where(whole, logits, few if keep[g].any() else -torch.inf)
        out.append(torch.softmax(logits * head_dim**-0.5, dim=1) @ v[g].double())
    return torch.cat(out)


def error_bound(dtype: torch.dtype) -> float:
    """Return the largest error that a result may have, relative to its head's largest output.

    In half types that is 4 roundings, u = eps / 2 each. Rounding the output takes up to one,
    rounding the probabilities of many tokens less, since their errors cancel: for normal values a
    plain computation of 1,024 to 40,000 tokens in bfloat16 stays under 1.3 u, and under 1.8 u if
    the scaled query is rounded too. About twice that is allowed. Leaving out a chunk of some
    hundred of 40,000 tokens costs ten times the bound.

    In float32 the sums over channels and tokens and the exponentials are no wider than the result:
    LeanK's were seen up to 17 eps off, for 1,024 to 131,072 tokens.
    """
    return (64 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps


def relative_error(out: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the largest error of [Hq, D], relative to its head's largest output; NaN if any is."""
    error = (out.double() - truth).abs().amax(1) / truth.abs().amax(1)
    return float("nan") if error.isnan().any() else float(error.max())


def checked_error(out: torch.Tensor, truth: torch.Tensor, where: str) -> float:
    """Return the relative error of [Hq, D].

    Raises
    ------
    WrongResultError
        If it is above `error_bound`; the message begins with `where`.
    """
    bound, error = error_bound(out.dtype), relative_error(out, truth)
    # Written so that NaN fails.
    if not error <= bound:
        raise WrongResultError(
            f"{where}: expected an error of at most {bound:.1e} {MEASURE}, got {error:.1e}"
        )
    return error
