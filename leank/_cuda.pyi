from typing import TypedDict

MAX_R: int
MAX_UNITS: int
STATE_HEADER: int
STATE_COLUMNS: int
STATE_OVERFLOW: int
STATE_OPEN: int
MOST_PIECE: int
HEAD_DIMS: tuple[int, ...]
LEARN_HEAD_DIMS: tuple[int, ...]

class DeviceInfo(TypedDict):
    capability: tuple[int, int]
    n_blocks: int
    smem_bytes: int

class Layer:
    """Addresses and sizes of one layer's cache on a device; it owns nothing."""

    def __init__(
        self,
        *,
        page: int,
        twin: int,
        table_stride: int,
        state: int,
        real: int,
        real_stride: int,
        geom: int,
        dtype: str,
        n_rows: int,
        n_heads: int,
        head_dim: int,
        sink: int,
        recent: int,
        slack: int,
        max_tokens: int,
    ) -> None: ...

def attend(
    layer: Layer,
    *,
    q: int,
    q_stride: tuple[int, int],
    k: int | None,
    k_stride: tuple[int, int],
    v: int | None,
    v_stride: tuple[int, int],
    o: int,
    lse: int | None,
    valid: int | None,
    sinks: int | None,
    n_q_heads: int,
    scale: float,
    softcap: float,
    work: int,
    n_blocks: int,
    smem_bytes: int,
    stream: int,
) -> None: ...
def span(
    layer: Layer,
    *,
    q: int,
    q_stride: tuple[int, int, int],
    k: int,
    k_stride: tuple[int, int, int],
    v: int,
    v_stride: tuple[int, int, int],
    o: int,
    lse: int | None,
    valid: int | None,
    sinks: int | None,
    position: int,
    scratch: int | None,
    twin_bytes: int,
    n_q_heads: int,
    n_columns: int,
    piece: int,
    columns_before: int,
    scale: float,
    softcap: float,
    work: int,
    n_blocks: int,
    smem_bytes: int,
    stream: int,
) -> None: ...
def span_piece(
    layer: Layer, *, n_q_heads: int, n_columns: int, twin_bytes: int, smem_bytes: int
) -> tuple[int, int]: ...
def append(
    layer: Layer,
    *,
    k: int,
    k_stride: tuple[int, int, int],
    v: int,
    v_stride: tuple[int, int, int],
    valid: int | None,
    position: int,
    n_columns: int,
    columns_before: int,
    stream: int,
) -> None: ...
def crop(layer: Layer, n_columns: int, stream: int, /) -> None: ...
def step_columns(
    layer: Layer, mask: int | None, mask_b: int, valid: int, misfit: int, stream: int, /
) -> None: ...
def gather(layer: Layer, row: int, n_tokens: int, k: int, v: int, stream: int, /) -> None: ...
def copy_pages(
    to: Layer,
    from_: Layer,
    pairs: int,
    n_pairs: int,
    page_bytes: int,
    twin_bytes: int,
    stream: int,
    /,
) -> None: ...
def geometry(keep: bytes, n_heads: int, head_dim: int, /) -> tuple[bytes, int, int]: ...
def attend_work_bytes(head_dim: int, r: int, n_blocks: int, /) -> int: ...
def plan_parts(
    end: bytes, full_lo: bytes, n_kept: bytes, head_dim: int, sink: int, n_blocks: int, /
) -> list[tuple[int, int, int, int, int]]: ...

_Strided = tuple[int, int, int, int]  # address, strides of row, head and column in elements
_LearnSizes = tuple[int, int, int, int, int, int, int]  # B, Hq, Hkv, Lc, T, D, Dv

def learn_work_bytes(*, sizes: _LearnSizes, backward: bool, n_blocks: int) -> int: ...
def learn_forward(
    *,
    dtype: str,
    sizes: _LearnSizes,
    q: _Strided,
    k_context: _Strided,
    v_context: _Strided,
    k: _Strided,
    v: _Strided,
    alpha: int,
    start: int | None,
    hidden: int | None,
    sink: int,
    recent: int,
    scale: float,
    work: int,
    n_blocks: int,
    smem_bytes: int,
    stream: int,
    o: int,
    lse: int,
) -> None: ...
def learn_backward(
    *,
    dtype: str,
    sizes: _LearnSizes,
    q: _Strided,
    k_context: _Strided,
    v_context: _Strided,
    k: _Strided,
    v: _Strided,
    alpha: int,
    start: int | None,
    hidden: int | None,
    sink: int,
    recent: int,
    scale: float,
    work: int,
    n_blocks: int,
    smem_bytes: int,
    stream: int,
    d_o: _Strided,
    o: _Strided,
    lse: int,
    dq: int,
    dk: int,
    dv: int,
    dalpha: int,
) -> None: ...
def device_count() -> int: ...
def device_info(device: int, /) -> DeviceInfo: ...
def built() -> str: ...
