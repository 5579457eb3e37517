"""The Triton kernels of the node: down and through f; through f alone; back through B; through f; through A.

Shapes: `M` rows of all samples, `D` in_features, `E` out_features, `RANK` ranks of all branches, `BRANCH` of each,
`PADDED` the power of two ≥ 16 above; a program holds tiles of `ROWS` × `COLUMNS`. Offsets of rows are int64: M · E may
pass 2³¹. Every mask moves with its loop. `COMPUTE` is the type in which tiles are multiplied; sums are fp32.
`PRECISION` is how fp32 tiles are multiplied, `EXACT` how the rank space does, whatever the type of x.
Nothing is added up with atomics: what rows of several programs add to is stored for each program, and torch sums it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nolora_vision.kernels.triton_formulas import (
    aurora,
    aurora_gradients,
    elementwise,
    load_square,
    load_vector,
    one_plus_tanh,
    product,
    store_square,
)


@triton.jit
def load_v(v, rows, ranks, M, rows_per_sample, RANK: tl.constexpr, PER_SAMPLE: tl.constexpr):
    """v of the layer: (1, PADDED), or that of the sample of each row: (ROWS, PADDED)."""
    if PER_SAMPLE:
        offsets = (rows // rows_per_sample)[:, None] * RANK + ranks[None, :]
        mask = (rows < M)[:, None] & (ranks < RANK)[None, :]
        return tl.load(v + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        return load_vector(v, ranks, RANK)


@triton.jit
def rank_space(
    h, v, gate, bias, first, second, third, rows, ranks, M, rows_per_sample, scale,
    NAME: tl.constexpr, PER_SAMPLE: tl.constexpr, RANK: tl.constexpr, BRANCH: tl.constexpr, EXACT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """z = s · f(h) ⊙ v ⊙ (1 + tanh(G h + c)): (ROWS, PADDED), leaving out what is None."""
    if NAME == "aurora":
        f = aurora(h, first, second, ranks, RANK, BRANCH, EXACT, INTERPRETED)
    else:
        f = elementwise(h, first, second, third, ranks, NAME, RANK)[0]
    z = f * scale
    if v is not None:
        z *= load_v(v, rows, ranks, M, rows_per_sample, RANK, PER_SAMPLE)
    if gate is not None:
        weight = tl.trans(load_square(gate, ranks, RANK, BRANCH))
        z *= one_plus_tanh(product(h, weight, EXACT, INTERPRETED) + load_vector(bias, ranks, RANK))
    return z


@triton.jit
def rank_space_gradients(
    dz, h, v, gate, bias, first, second, third, d_v, small, rows, ranks, M, rows_per_sample, scale,
    NAME: tl.constexpr, PER_SAMPLE: tl.constexpr, SMALL: tl.constexpr, RANK: tl.constexpr, BRANCH: tl.constexpr,
    EXACT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """dh = u ∂f/∂h + dp G, with u = s dz v m at f, m = 1 + tanh p, p = G h + c, dp = s dz v f m (2 − m).

    The sums over these rows go to `small`, in the order v, G, c, θ: dv = Σ s dz m f (to `d_v` for each row if v belongs
    to a sample), dG = dpᵀ h, dc = Σ dp, dθ = Σ u ∂f/∂θ.
    """
    inside = ranks < RANK
    g = dz * scale  # becomes s dz m, then u
    if NAME == "aurora":
        f = aurora(h, first, second, ranks, RANK, BRANCH, EXACT, INTERPRETED)
    else:
        f, slope, by_first, by_second, by_third = elementwise(h, first, second, third, ranks, NAME, RANK)
    dh = tl.zeros_like(h)
    after_v = small if v is None or PER_SAMPLE else small + RANK
    theta = after_v
    if gate is not None:
        weight = load_square(gate, ranks, RANK, BRANCH)
        m = one_plus_tanh(product(h, tl.trans(weight), EXACT, INTERPRETED) + load_vector(bias, ranks, RANK))
        dp = g * f * m * (2.0 - m)
        if v is not None:
            dp *= load_v(v, rows, ranks, M, rows_per_sample, RANK, PER_SAMPLE)
        dh = product(dp, weight, EXACT, INTERPRETED)
        g *= m
        theta += RANK * BRANCH + RANK
        if SMALL:
            store_square(after_v, product(tl.trans(dp), h, EXACT, INTERPRETED), ranks, RANK, BRANCH)
            tl.store(after_v + RANK * BRANCH + ranks, tl.sum(dp, axis=0), mask=inside)
    if v is not None:
        if SMALL and PER_SAMPLE:
            tl.store(d_v + rows[:, None] * RANK + ranks[None, :], g * f, mask=(rows < M)[:, None] & inside[None, :])
        elif SMALL:
            tl.store(small + ranks, tl.sum(g * f, axis=0), mask=inside)
        g *= load_v(v, rows, ranks, M, rows_per_sample, RANK, PER_SAMPLE)
    if NAME == "aurora":
        into_spline = theta + RANK * BRANCH
        return dh + aurora_gradients(
            h, g, first, second, theta, into_spline, ranks, RANK, BRANCH, SMALL, EXACT, INTERPRETED
        )
    else:
        if SMALL and first is not None:
            tl.store(theta + ranks, tl.sum(g * by_first, axis=0), mask=inside)
        if SMALL and second is not None:
            tl.store(theta + RANK + ranks, tl.sum(g * by_second, axis=0), mask=inside)
        if SMALL and third is not None:
            tl.store(theta + 2 * RANK + ranks, tl.sum(g * by_third, axis=0), mask=inside)
        return dh + g * slope


@triton.jit(do_not_specialize=["M", "rows_per_sample"])
def features_kernel(
    x, down, v, gate, bias, first, second, third, h_out, z_out, M, D, x_stride, rows_per_sample, scale,
    NAME: tl.constexpr, PER_SAMPLE: tl.constexpr, RANK: tl.constexpr, BRANCH: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """K1: h = x Aᵀ and z = s · v ⊙ f(h) ⊙ gate for ROWS rows, reading x: (M, D) once."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, PADDED)
    row, rank = (rows < M)[:, None], (ranks < RANK)[None, :]
    h = tl.zeros((ROWS, PADDED), tl.float32)
    for start in range(0, D, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        tile = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=row & (columns < D)[None, :], other=0.0)
        a = tl.load(down + ranks[None, :] * D + columns[:, None], mask=rank & (columns < D)[:, None], other=0.0)
        h += product(tile.to(COMPUTE), a.to(COMPUTE), PRECISION, INTERPRETED)
    z = rank_space(
        h, v, gate, bias, first, second, third, rows, ranks, M, rows_per_sample, scale,
        NAME, PER_SAMPLE, RANK, BRANCH, EXACT, INTERPRETED,
    )  # fmt: skip
    at = rows[:, None] * RANK + ranks[None, :]
    tl.store(h_out + at, h, mask=row & rank)
    tl.store(z_out + at, z, mask=row & rank)


@triton.jit(do_not_specialize=["M", "rows_per_sample"])
def space_kernel(
    h_in, v, gate, bias, first, second, third, z_out, M, rows_per_sample, scale,
    NAME: tl.constexpr, PER_SAMPLE: tl.constexpr, RANK: tl.constexpr, BRANCH: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, EXACT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The second half of K1: z = s · v ⊙ f(h) ⊙ gate for ROWS rows of h: (M, RANK)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, PADDED)
    inside = (rows < M)[:, None] & (ranks < RANK)[None, :]
    at = rows[:, None] * RANK + ranks[None, :]
    z = rank_space(
        tl.load(h_in + at, mask=inside, other=0.0).to(tl.float32),
        v, gate, bias, first, second, third, rows, ranks, M, rows_per_sample, scale,
        NAME, PER_SAMPLE, RANK, BRANCH, EXACT, INTERPRETED,
    )  # fmt: skip
    tl.store(z_out + at, z, mask=inside)


@triton.jit(do_not_specialize=["M", "rows_per_sample"])
def up_kernel(
    dy, h_in, up, v, gate, bias, first, second, third, dz_out, d_up, M, E, dy_stride, rows_per_sample, scale,
    NAME: tl.constexpr, PER_SAMPLE: tl.constexpr, RANK: tl.constexpr, BRANCH: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """K3, first half: dz = dy B for ROWS rows and, if `d_up` is given, their part of dB = dyᵀ z, from one read of dy.

    dy: (M, E); d_up: (programs, E, RANK).
    """
    block = tl.program_id(0).to(tl.int64)
    rows = block * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, PADDED)
    row, rank = (rows < M)[:, None], (ranks < RANK)[None, :]
    at = rows[:, None] * RANK + ranks[None, :]
    if d_up is not None:
        z = rank_space(
            tl.load(h_in + at, mask=row & rank, other=0.0),
            v, gate, bias, first, second, third, rows, ranks, M, rows_per_sample, scale,
            NAME, PER_SAMPLE, RANK, BRANCH, EXACT, INTERPRETED,
        ).to(COMPUTE)  # fmt: skip
    dz = tl.zeros((ROWS, PADDED), tl.float32)
    for start in range(0, E, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        outer = (columns < E)[:, None] & rank
        tile = tl.load(dy + rows[:, None] * dy_stride + columns[None, :], mask=row & (columns < E)[None, :], other=0.0)
        tile = tile.to(COMPUTE)
        b = tl.load(up + columns[:, None] * RANK + ranks[None, :], mask=outer, other=0.0).to(COMPUTE)
        dz += product(tile, b, PRECISION, INTERPRETED)
        if d_up is not None:
            part = product(tl.trans(tile), z, PRECISION, INTERPRETED)
            tl.store(d_up + (block * E + columns[:, None]) * RANK + ranks[None, :], part, mask=outer)
    tl.store(dz_out + at, dz, mask=row & rank)


@triton.jit(do_not_specialize=["M", "rows_per_sample"])
def rank_kernel(
    dz, h_in, v, gate, bias, first, second, third, dh_out, z_out, d_v, small, M, rows_per_sample, scale,
    NAME: tl.constexpr, PER_SAMPLE: tl.constexpr, SMALL: tl.constexpr, STRIDE: tl.constexpr, RANK: tl.constexpr,
    BRANCH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """K3, second half: from dz to dh and the gradients of v, G, c and θ, for ROWS rows; and z, if `z_out` is given.

    `small` has STRIDE numbers for each program.
    """
    block = tl.program_id(0).to(tl.int64)
    rows = block * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, PADDED)
    inside = (rows < M)[:, None] & (ranks < RANK)[None, :]
    at = rows[:, None] * RANK + ranks[None, :]
    h = tl.load(h_in + at, mask=inside, other=0.0).to(tl.float32)
    if z_out is not None:
        z = rank_space(
            h, v, gate, bias, first, second, third, rows, ranks, M, rows_per_sample, scale,
            NAME, PER_SAMPLE, RANK, BRANCH, EXACT, INTERPRETED,
        )  # fmt: skip
        tl.store(z_out + at, z, mask=inside)
    dh = rank_space_gradients(
        tl.load(dz + at, mask=inside, other=0.0).to(tl.float32),
        h, v, gate, bias, first, second, third, d_v, small + block * STRIDE, rows, ranks, M, rows_per_sample, scale,
        NAME, PER_SAMPLE, SMALL, RANK, BRANCH, EXACT, INTERPRETED,
    )  # fmt: skip
    tl.store(dh_out + at, dh, mask=inside)


@triton.jit(do_not_specialize=["M", "BLOCKS"])
def input_kernel(
    x, dh, down, dx, d_down, M, D, x_stride, dx_stride, BLOCKS,
    ACCUMULATE: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """K4: dA = dhᵀ x (if `d_down` is given) and dx += dh A (if `dx` is), for COLUMNS columns of BLOCKS · ROWS rows."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    group = tl.program_id(1).to(tl.int64)
    ranks = tl.arange(0, PADDED)
    column, rank = columns < D, ranks < RANK
    if dx is not None:
        across = ranks[:, None] * D + columns[None, :]
        a = tl.load(down + across, mask=rank[:, None] & column[None, :], other=0.0).to(COMPUTE)
    total = tl.zeros((COLUMNS, PADDED), tl.float32)
    for block in range(BLOCKS):
        rows = (group * BLOCKS + block) * ROWS + tl.arange(0, ROWS)
        row = (rows < M)[:, None]
        g = tl.load(dh + rows[:, None] * RANK + ranks[None, :], mask=row & rank[None, :], other=0.0).to(COMPUTE)
        if d_down is not None:
            tile = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=row & column[None, :], other=0.0)
            total += product(tl.trans(tile.to(COMPUTE)), g, PRECISION, INTERPRETED)
        if dx is not None:
            into = dx + rows[:, None] * dx_stride + columns[None, :]
            update = product(g, a, PRECISION, INTERPRETED)
            if ACCUMULATE:
                update += tl.load(into, mask=row & column[None, :], other=0.0).to(tl.float32)
            tl.store(into, update, mask=row & column[None, :])
    if d_down is not None:
        at = d_down + (group * RANK + ranks[None, :]) * D + columns[:, None]
        tl.store(at, total, mask=column[:, None] & rank[None, :])
