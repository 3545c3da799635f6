"""Tile sizes for TPUs: multiples of 128 lanes and 32 sublanes, within VMEM."""

from dataclasses import dataclass, replace

LANES = 128
# int8 packs 32 rows into a memory tile, so row tiles of 32 suit every dtype.
SUBLANES = 32
# Half of the default limit of 16 MiB (v4 and newer); the rest is for the compiler's buffers.
BUDGET = 8 * 2**20
# VMEM limit of the gather and combine kernels; v5e, v5p and v6e have 64 MiB or more.
LARGE = 48 * 2**20


def round_up(size: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def even(size: int, most: int, multiple: int = SUBLANES) -> int:
    """Return the tile that splits an axis evenly into the fewest tiles of about `most` at most."""
    return round_up(-(-size // -(-size // most)), multiple)


def split(size: int, tile: int, multiple: int = LANES) -> int:
    """Return the tile of an axis: `size` if it fits in `tile`, else a multiple of `multiple`, a divisor if possible."""
    if size <= tile:
        return size
    tile = max(tile // multiple, 1) * multiple
    divisors = [t for t in range(tile, tile // 2, -multiple) if size % t == 0]
    return divisors[0] if divisors else tile


@dataclass(frozen=True)
class Tiles:
    """Rows m, contraction k and columns n of a tile, with the sizes of the axes that they split."""

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
    """Halve the wider of k and n until two buffers of each block and the accumulators fit in VMEM."""
    while True:
        m, k, n = round_up(tiles.m, SUBLANES), round_up(tiles.k, LANES), round_up(tiles.n, LANES)
        need = 2 * (m * k * x_bytes + weights * k * n * w_bytes + outs * m * n * out_bytes) + 4 * weights * m * n
        if need <= BUDGET or max(tiles.k, tiles.n) <= LANES:
            return tiles
        if tiles.k > tiles.n:
            tiles = replace(tiles, k=split(tiles.inner, max(tiles.k // 2, LANES)))
        else:
            tiles = replace(tiles, n=split(tiles.cols, max(tiles.n // 2, LANES)))
