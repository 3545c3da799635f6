"""Tile sizes that the TPU accepts: lanes of 128, sublanes of 32, and everything within VMEM."""

from dataclasses import dataclass, replace

LANES = 128
# The narrowest type (int8) packs 32 rows into a tile of memory, so row tiles of 32 fit every type.
SUBLANES = 32
# Half of the 16 MiB that every generation since v4 grants a kernel without being asked, for what the compiler adds.
BUDGET = 8 * 2**20
# What the gather and combine kernels ask for; v5e, v5p and v6e have 64 MiB or more.
LARGE = 48 * 2**20


def round_up(size: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def even(size: int, most: int, multiple: int = SUBLANES) -> int:
    """Tile of an axis that is cut into as few tiles of at most about `most` as possible, of about the same size."""
    return round_up(-(-size // -(-size // most)), multiple)


def split(size: int, tile: int, multiple: int = LANES) -> int:
    """Tile of an axis: all of it if it fits in `tile`, else a multiple of `multiple`, dividing `size` if possible."""
    if size <= tile:
        return size
    tile = max(tile // multiple, 1) * multiple
    whole = [t for t in range(tile, tile // 2, -multiple) if size % t == 0]
    return whole[0] if whole else tile


@dataclass(frozen=True)
class Tiles:
    """Rows, contraction and columns of a tile, with the sizes they cut up."""

    m: int
    k: int
    n: int
    rows: int
    inner: int
    cols: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Number of tiles along rows, contraction and columns."""
        return -(-self.rows // self.m), -(-self.inner // self.k), -(-self.cols // self.n)


def fit(tiles: Tiles, *, x_bytes: int, w_bytes: int, out_bytes: int, weights: int, outs: int) -> Tiles:
    """Halve the wider of the contraction and column tiles until two buffers of each block and the sums fit in VMEM."""
    while True:
        m, k, n = round_up(tiles.m, SUBLANES), round_up(tiles.k, LANES), round_up(tiles.n, LANES)
        need = 2 * (m * k * x_bytes + weights * k * n * w_bytes + outs * m * n * out_bytes) + 4 * weights * m * n
        if need <= BUDGET or max(tiles.k, tiles.n) <= LANES:
            return tiles
        if tiles.k > tiles.n:
            tiles = replace(tiles, k=split(tiles.inner, max(tiles.k // 2, LANES)))
        else:
            tiles = replace(tiles, n=split(tiles.cols, max(tiles.n // 2, LANES)))
