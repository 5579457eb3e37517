"""Every nonlinearity and its derivatives in Triton, on tiles in registers; the definition stands in eager.py.

Shapes: tiles are (rows, `PADDED`) in fp32, with `RANK` ranks of all branches, `BRANCH` of each, and padding above them.
Parameters of f are (1, `PADDED`). Symbols are those of eager.py: u is the gradient that arrives at f, θ its parameters.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ------------------------------------------------------------------------------------------------------- ingredients


@triton.jit
def product(a, b, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """a b in fp32. Triton's interpreter multiplies bf16 wrongly, so there bf16 values are multiplied as fp32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def tanh(x):
    """tanh x to about 2e-7 of its size, at 0 too: its series below |x| = 1/4, else (1 − e) / (1 + e), e = exp(−2 |x|).

    2 σ(2x) − 1 would be off by 1e-7 of 1, not of x. libdevice has a tanh, but the interpreter does not run it.
    """
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = x * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def one_plus_tanh(x):
    """1 + tanh x = 2 σ(2x), exact to its own size where it is near 0, which a sum is not."""
    return 2.0 * tl.sigmoid(2.0 * x)


@triton.jit
def load_vector(source, ranks, RANK: tl.constexpr):
    """One number for each rank, 0 in the padding: (1, PADDED) in fp32."""
    return tl.load(source + ranks, mask=ranks < RANK, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_square(source, ranks, RANK: tl.constexpr, BRANCH: tl.constexpr):
    """The (BRANCH, BRANCH) matrices of all branches, kept below one another, on the diagonal: (PADDED, PADDED)."""
    row, column = ranks[:, None], ranks[None, :]
    own = (row // BRANCH == column // BRANCH) & (row < RANK) & (column < RANK)
    return tl.load(source + row * BRANCH + column % BRANCH, mask=own, other=0.0).to(tl.float32)


@triton.jit
def store_square(target, value, ranks, RANK: tl.constexpr, BRANCH: tl.constexpr):
    """What `load_square` would load: the blocks on the diagonal of value, below one another."""
    row, column = ranks[:, None], ranks[None, :]
    own = (row // BRANCH == column // BRANCH) & (row < RANK) & (column < RANK)
    tl.store(target + row * BRANCH + column % BRANCH, value, mask=own)


@triton.jit
def sum_of_branch(value, ranks, RANK: tl.constexpr, BRANCH: tl.constexpr):
    """At each rank the sum over all ranks of its branch: (rows, PADDED), 0 in the padding."""
    total = tl.zeros_like(value)
    for k in tl.static_range(RANK // BRANCH):  # type: ignore[attr-defined]
        own = ranks[None, :] // BRANCH == k
        total += tl.where(own, tl.sum(tl.where(own, value, 0.0), axis=1, keep_dims=True), 0.0)
    return total


# ------------------------------------------------------------- nonlinearities: (f, ∂f/∂h, then ∂f/∂θ as far as any)


@triton.jit
def gelu(h):
    """f = h Φ(h); ∂f/∂h = Φ(h) + h φ(h), φ(h) = exp(−h²/2) / √(2π)."""
    below = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
    return h * below, below + h * tl.exp(-0.5 * h * h) * 0.3989422804014327


@triton.jit
def silu(h):
    """f = h σ(h); ∂f/∂h = σ (1 + h (1 − σ))."""
    s = tl.sigmoid(h)
    return h * s, s * (1.0 + h * (1.0 - s))


@triton.jit
def swish(h, beta):
    """f = h m, m = 1 + tanh(β h / 2) = 2 σ(β h); ∂f/∂h = m + (β h / 2) m (2 − m); ∂f/∂β = (h² / 2) m (2 − m)."""
    m = 2.0 * tl.sigmoid(beta * h)
    bend = m * (2.0 - m)
    return h * m, m + 0.5 * beta * h * bend, 0.5 * h * h * bend


@triton.jit
def residual_tanh(h, mix, slope):
    """f = h + a (t − h), t = tanh(b h); ∂f/∂h = 1 + a (b (1 − t²) − 1); ∂f/∂a = t − h; ∂f/∂b = a h (1 − t²)."""
    t = tanh(slope * h)
    bend = 1.0 - t * t
    return h + mix * (t - h), 1.0 + mix * (slope * bend - 1.0), t - h, mix * h * bend


@triton.jit
def rational(h, linear, square, pole):
    """f = h n / d, n = 1 + p h + q h², d = 1 + t² h².

    ∂f/∂h = (1 + 2 p h + 3 q h² − 2 t² h² n / d) / d; ∂f/∂p = h² / d; ∂f/∂q = h³ / d; ∂f/∂t = −2 t h³ n / d².
    """
    s = h * h
    d = 1.0 + pole * pole * s
    ratio = (1.0 + linear * h + square * s) / d
    slope = (1.0 + 2.0 * linear * h + 3.0 * square * s - 2.0 * pole * pole * s * ratio) / d
    return h * ratio, slope, s / d, h * s / d, -2.0 * pole * h * s * ratio / d


@triton.jit
def elementwise(h, first, second, third, ranks, NAME: tl.constexpr, RANK: tl.constexpr):
    """(f, ∂f/∂h, ∂f/∂θ1, ∂f/∂θ2, ∂f/∂θ3) of the formula of this name, with zeros for the θ that it lacks."""
    f, slope = h, tl.full(h.shape, 1.0, tl.float32)
    by_first = tl.zeros_like(h)
    by_second, by_third = by_first, by_first
    if NAME == "tanh":
        f = tanh(h)
        slope = 1.0 - f * f
    elif NAME == "relu":
        f, slope = tl.maximum(h, 0.0), tl.where(h > 0, 1.0, 0.0)
    elif NAME == "gelu":
        f, slope = gelu(h)
    elif NAME == "silu":
        f, slope = silu(h)
    elif NAME == "swish":
        f, slope, by_first = swish(h, load_vector(first, ranks, RANK))
    elif NAME == "residual_tanh":
        mix, bend = load_vector(first, ranks, RANK), load_vector(second, ranks, RANK)
        f, slope, by_first, by_second = residual_tanh(h, mix, bend)
    elif NAME == "rational":
        p, q = load_vector(first, ranks, RANK), load_vector(second, ranks, RANK)
        f, slope, by_first, by_second, by_third = rational(h, p, q, load_vector(third, ranks, RANK))
    else:
        tl.static_assert(NAME == "identity", "no such formula")
    return f, slope, by_first, by_second, by_third


# ------------------------------------------------------------------------------------------------------------ aurora


@triton.jit
def basis(h, n):
    """(φ_n, ∂φ_n/∂h): the n-th cubic B-spline, φ = (max(2 − d, 0)³ − 4 max(1 − d, 0)³) / 6, d = |h − centre| / 0.4.

    ∂φ/∂h = sign(h − centre) (2 max(1 − d, 0)² − max(2 − d, 0)² / 2) / 0.4.
    """
    away = (h - ((n - 1.0) * 0.4 - 1.0)) * 2.5
    wide, narrow = tl.maximum(2.0 - tl.abs(away), 0.0), tl.maximum(1.0 - tl.abs(away), 0.0)
    slope = (2.0 * narrow * narrow - 0.5 * wide * wide) * 2.5
    return (wide * wide * wide - 4.0 * narrow * narrow * narrow) / 6.0, tl.where(away < 0, -slope, slope)


@triton.jit
def aurora(
    h, mixer, spline, ranks,
    RANK: tl.constexpr, BRANCH: tl.constexpr, EXACT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """f = tanh(H tanh h) + Σ_n w_n Σ_i φ_n(h_i), i over the ranks of the same branch."""
    mixed = tl.trans(load_square(mixer, ranks, RANK, BRANCH))
    f = tanh(product(tanh(h), mixed, EXACT, INTERPRETED))
    for n in range(8):
        weight = tl.load(spline + ranks * 8 + n, mask=ranks < RANK, other=0.0).to(tl.float32)[None, :]
        f += weight * sum_of_branch(basis(h, n)[0], ranks, RANK, BRANCH)
    return f


@triton.jit
def aurora_gradients(
    h, u, mixer, spline, d_mixer, d_spline, ranks,
    RANK: tl.constexpr, BRANCH: tl.constexpr, SMALL: tl.constexpr, EXACT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """dh = (1 − a²)(H dq) + Σ_n φ_n'(h) Σ_j u_j w_jn with a = tanh h, q = tanh(H a), dq = u (1 − q²); dH = dq aᵀ;
    dw_n = Σ u Σ_i φ_n(h_i). The sums of these rows go to d_mixer and d_spline.
    """
    a = tanh(h)
    matrix = load_square(mixer, ranks, RANK, BRANCH)
    q = tanh(product(a, tl.trans(matrix), EXACT, INTERPRETED))
    dq = u * (1.0 - q * q)
    dh = product(dq, matrix, EXACT, INTERPRETED) * (1.0 - a * a)
    if SMALL:
        store_square(d_mixer, product(tl.trans(dq), a, EXACT, INTERPRETED), ranks, RANK, BRANCH)
    for n in range(8):
        phi, slope = basis(h, n)
        weight = tl.load(spline + ranks * 8 + n, mask=ranks < RANK, other=0.0).to(tl.float32)[None, :]
        dh += slope * sum_of_branch(u * weight, ranks, RANK, BRANCH)
        if SMALL:
            d_weight = tl.sum(u * sum_of_branch(phi, ranks, RANK, BRANCH), axis=0)
            tl.store(d_spline + ranks * 8 + n, d_weight, mask=ranks < RANK)
    return dh
