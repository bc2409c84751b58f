from typing import Literal, TypedDict

import numpy as np
import numpy.typing as npt

DType = Literal["float32", "bfloat16", "float16"]

PAGE_TOKENS: int
CHANNEL_STEP: int
MAX_HEAD_DIM: int

class Memory(TypedDict):
    k_bytes: int
    v_bytes: int
    total_bytes: int
    slab_bytes: int
    n_pages: int
    n_twins: int

class LayerCache:
    """Packed K and V of one attention layer; see ``leank.LayerCache``."""

    def __init__(
        self,
        keep: npt.NDArray[np.bool_],
        *,
        n_rows: int,
        sink: int,
        recent: int,
        slack: int = 64,
        dtype: DType = "float32",
        v_dim: int | None = None,
        max_tokens: int | None = None,
        max_call: int = 1,
    ) -> None: ...
    @property
    def keep(self) -> npt.NDArray[np.bool_]: ...
    @property
    def n_rows(self) -> int: ...
    @property
    def n_columns(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def v_dim(self) -> int: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def sink(self) -> int: ...
    @property
    def recent(self) -> int: ...
    @property
    def slack(self) -> int: ...
    @property
    def max_tokens(self) -> int | None: ...
    @property
    def lengths(self) -> npt.NDArray[np.int64]: ...
    @property
    def prompt_lengths(self) -> npt.NDArray[np.int64]: ...
    @property
    def lo(self) -> npt.NDArray[np.int64]: ...
    @property
    def real(self) -> npt.NDArray[np.bool_]: ...
    def expect_prompt(self, n_columns: int) -> None: ...
    def append(
        self, k: np.ndarray, v: np.ndarray, valid: npt.NDArray[np.bool_] | None = None
    ) -> None: ...
    def crop(self, n_columns: int) -> None: ...
    def hold(self, on: bool) -> None: ...
    def select(self, rows: npt.NDArray[np.int64]) -> None: ...
    def reset(self) -> None: ...
    def copy(self) -> LayerCache: ...
    def gather(self, row: int) -> tuple[np.ndarray, np.ndarray]: ...
    def memory(self) -> Memory: ...

def decode(
    cache: LayerCache,
    q: np.ndarray,
    k: np.ndarray | None = None,
    v: np.ndarray | None = None,
    *,
    valid: npt.NDArray[np.bool_] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: npt.NDArray[np.float32] | None = None,
    out: np.ndarray | None = None,
    n_threads: int = 0,
) -> np.ndarray: ...
def learn_forward(
    q: np.ndarray,
    k_context: np.ndarray,
    v_context: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    alpha: npt.NDArray[np.float32],
    *,
    sink: int,
    recent: int,
    scale: float,
    start: npt.NDArray[np.int64] | None = None,
    hidden: npt.NDArray[np.bool_] | None = None,
    n_threads: int = 0,
) -> tuple[np.ndarray, npt.NDArray[np.float32]]: ...
def learn_backward(
    d_o: np.ndarray,
    o: np.ndarray,
    lse: npt.NDArray[np.float32],
    q: np.ndarray,
    k_context: np.ndarray,
    v_context: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    alpha: npt.NDArray[np.float32],
    *,
    sink: int,
    recent: int,
    scale: float,
    start: npt.NDArray[np.int64] | None = None,
    hidden: npt.NDArray[np.bool_] | None = None,
    n_threads: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, npt.NDArray[np.float32]]: ...
def predict_memory(
    keep: npt.NDArray[np.bool_],
    lengths: npt.NDArray[np.int64],
    *,
    sink: int,
    recent: int,
    slack: int = 64,
    dtype: DType = "float32",
    v_dim: int | None = None,
    max_tokens: int | None = None,
    max_call: int = 1,
) -> Memory: ...
def select_channels(
    scores: npt.NDArray[np.float32], ratio: float, align: int
) -> npt.NDArray[np.bool_]: ...
def check_mask(keep: npt.NDArray[np.bool_], align: int) -> None: ...
def isa() -> str: ...
def isa_built() -> dict[str, bool]: ...
def build_info() -> dict[str, str | int | bool]: ...
def _force_isa(name: str) -> None: ...
def _fail_allocation(n: int) -> None: ...
def _poison(on: bool) -> None: ...
