"""Dense attention of other libraries on the same GPU, for ``leank bench decode``.

Each peer is a context in which it attends with q [B, Hq, 1, D] to k and v [B, Hkv, L, D]. Whatever
it compiles or plans is done there, before anything is timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

from leank.bench.lines import Shape, Timing
from leank.bench.truth import attend64, error_bound, relative_error
from leank.bench.work import Work

# Looser than for LeanK: only a result that is wrong is to be found.
_BOUND_FACTOR = 2
# FlashInfer's documentation and vLLM use pages of 16 tokens.
_PAGE_TOKENS = 16
_WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends


class PeerError(Exception):
    """Why a peer is left out; one line of text."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """Attention by one library, and how it understands memory."""

    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    # Row b of k or v as [Hkv, L, D].
    row: Callable[[torch.Tensor, int], torch.Tensor] = lambda x, b: x[b]


@contextlib.contextmanager
def _sdpa(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor) -> Iterator[Peer]:
    with sdpa_kernel(backend):
        yield Peer(functools.partial(sdpa, enable_gqa=True))


@contextlib.contextmanager
def _flex(q: torch.Tensor, k: torch.Tensor) -> Iterator[Peer]:
    # Compiled for this shape alone. What other shapes left behind counts against a limit, beyond
    # which torch would run it uncompiled; with fullgraph that is an error.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    yield Peer(functools.partial(compiled, enable_gqa=True))


@contextlib.contextmanager
def _flashinfer(backend: str, q: torch.Tensor, k: torch.Tensor) -> Iterator[Peer]:
    try:
        import flashinfer
    except ModuleNotFoundError as error:
        if error.name != "flashinfer":
            raise
        raise PeerError("not installed: pip install flashinfer-python") from error
    n_rows, n_heads, length, head_dim = k.shape
    if length % _PAGE_TOKENS:
        raise PeerError(f"expected a multiple of {_PAGE_TOKENS} tokens, got {length}")
    n_pages = length // _PAGE_TOKENS
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=k.device)
    # Tensor cores: what its documentation advises for more than a few query heads per KV head.
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=True, backend=backend
    )
    wrapper.plan(
        torch.arange(n_rows + 1, dtype=torch.int32, device=k.device) * n_pages,
        torch.arange(n_rows * n_pages, dtype=torch.int32, device=k.device),
        torch.full((n_rows,), _PAGE_TOKENS, dtype=torch.int32, device=k.device),
        q.shape[1],
        n_heads,
        head_dim,
        _PAGE_TOKENS,
        q_data_type=k.dtype,
    )
    # The same random memory, understood as pages in which tokens come before heads.
    pages = n_rows * n_pages, _PAGE_TOKENS, n_heads, head_dim

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return wrapper.run(q[:, :, 0], (k.view(pages), v.view(pages)))[:, :, None]

    def row(x: torch.Tensor, b: int) -> torch.Tensor:
        return x.view(n_rows, length, n_heads, head_dim)[b].transpose(0, 1)

    yield Peer(attend, row)


PEERS = {
    "cudnn": functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "flash": functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "flex": _flex,
    # It takes fa3 on Hopper by itself, for decoding too.
    "flashinfer fa2": functools.partial(_flashinfer, "fa2"),
    "flashinfer fa3": functools.partial(_flashinfer, "fa3"),
}


def measure_peers(
    work: Work, shape: Shape, n_layers: int, dtype: torch.dtype, time: Callable
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time each peer on random K and V.

    Parameters
    ----------
    work : Work
    shape : Shape
    n_layers : int
        Layers that are captured together.
    dtype : torch.dtype
    time : leank.bench.layers.Timer

    Returns
    -------
    us : dict
        Microseconds of one layer by peer.
    reasons : dict
        Why a peer has no time.
    """
    kv_shape = (shape.n_rows, work.n_heads, shape.length, work.head_dim)
    q_shape = (shape.n_rows, work.n_q_heads, 1, work.head_dim)
    q = torch.randn(q_shape, device="cuda", dtype=dtype)
    try:
        layers = [
            tuple(torch.randn(kv_shape, device="cuda", dtype=dtype) for _ in "kv")
            for _ in range(n_layers)
        ]
    except torch.OutOfMemoryError as error:
        return {}, dict.fromkeys(PEERS, _reason(error))
    us, reasons = {}, {}
    for name, peer in PEERS.items():
        try:
            us[name] = _measure(peer, q, layers, time)
        # Whatever other libraries raise is reported, and the rest is measured.
        except Exception as error:
            reasons[name] = _reason(error)
        # Ends the run if the peer left the device in an error.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return us, reasons


def _measure(peer: Callable, q: torch.Tensor, layers: list, time: Callable) -> Timing:
    with peer(q, layers[0][0]) as made:
        out = made.attend(q, *layers[0])
        bound = _BOUND_FACTOR * error_bound(q.dtype)
        # The last row too: there an offset that overflowed would show.
        for b in sorted({0, len(q) - 1}):
            k, v = (made.row(x, b) for x in layers[0])
            error = relative_error(out[b, :, 0], attend64(q[b, :, 0], k, v))
            if not error <= bound:
                raise PeerError(
                    f"wrong result: expected an error of at most {bound:.1e} of the largest "
                    f"output, got {error:.1e}"
                )

        def step() -> None:
            for k, v in layers:
                made.attend(q, k, v)

        (us,) = time(step)
        return us.over(len(layers))


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # torch.compile says in the first line where, and in the second what.
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
