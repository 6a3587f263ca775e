"""The two plots of the report as hand-written SVG: no script, no library, colours from the page's CSS.

Each plot is drawn twice, for a wide and for a narrow screen, and CSS shows the one that fits: text inside a
scaled SVG would shrink below legibility on a phone.
"""

from __future__ import annotations

import math
from html import escape
from typing import Any

WIDE, NARROW = 720, 352
_TOP, _BOTTOM = 24, 40

Facts = dict[str, Any]


def responsive(draw: Any, *args: Any) -> str:
    """`draw(*args, width)` for both widths."""
    return "".join(
        f'<div class="{name}">{draw(*args, width)}</div>'
        for name, width in (("wide", WIDE), ("narrow", NARROW))
    )


def bands_plot(bands: Facts, width: int) -> str:
    """Loss bands over the epochs on a log scale: quantiles 10 to 90 % as an area, the median as a line."""
    groups = {name: bands[name] for name in ("kept", "trusted", "suspicious") if bands.get(name)}
    if not groups:
        return ""
    height = 340 if width == WIDE else 300
    left, right = 46, 86
    low, high = _log_range(groups)
    epochs = bands["epochs"]

    def x(epoch: float) -> float:
        return left + (width - left - right) * float(epoch / max(epochs - 1, 1))

    def y(loss: float) -> float:
        part = (math.log10(max(loss, low)) - math.log10(low)) / (math.log10(high) - math.log10(low))
        return height - _BOTTOM - (height - _TOP - _BOTTOM) * min(max(part, 0.0), 1.0)

    parts = [_log_grid(low, high, y, left, width - right)]
    half = (x(1) - x(0)) / 2 if epochs > 1 else 8.0
    for epoch in bands["left_out"]:
        a, b = max(x(epoch) - half, left), min(x(epoch) + half, width - right)
        parts.append(
            f'<rect class="gap" x="{a:.1f}" y="{_TOP}" width="{b - a:.1f}" height="{_plot(height)}"/>'
        )
        parts.append(_text((a + b) / 2, _TOP - 8, "left out", "tick", "middle"))
    for name, group in groups.items():
        upper = [(x(e), y(value)) for e, value in enumerate(group["p90"])]
        lower = [(x(e), y(value)) for e, value in enumerate(group["p10"])]
        parts.append(f'<path class="area {name}" d="{_path(upper)} L{_path(lower[::-1])[1:]} Z"/>')
        if name == "trusted":  # drawn over the grey of what was kept, where it mostly lies
            parts += [f'<path class="edge {name}" d="{_path(line)}"/>' for line in (upper, lower)]
    for name, group in groups.items():
        line = [(x(e), y(value)) for e, value in enumerate(group["p50"])]
        parts.append(f'<path class="line {name}" d="{_path(line)}"/>')
    ends = {name: y(group["p50"][-1]) for name, group in groups.items()}
    for name, at in _spread(ends, 17, _TOP + 8, height - _BOTTOM - 4).items():
        parts.append(_text(width - right + 8, at + 4, name, f"name {name}"))
    step = max(1, math.ceil(epochs / (10 if width == WIDE else 5)))
    parts += [
        _text(x(e), height - _BOTTOM + 18, str(e + 1), "tick", "middle") for e in range(0, epochs, step)
    ]
    parts.append(_text((left + width - right) / 2, height - 5, "epoch of proxy training", "axis", "middle"))
    summary = "; ".join(
        f"{name}: median {group['p50'][0]:.2g} after the first and {group['p50'][-1]:.2g} after the last "
        "epoch"
        for name, group in groups.items()
    )
    return _svg(width, height, f"Loss per epoch. {summary}.", parts)


def histogram_plot(histogram: Facts, width: int) -> str:
    """Share of samples per score bin: corpus as bars, trusted as a stepped line, the threshold dashed."""
    merge = 1 if width == WIDE else 2
    edges, corpus, trusted, split = _merged(histogram, merge)
    height = 320 if width == WIDE else 290
    left, right, top = 46, 14, 34
    floor = height - _BOTTOM
    tallest = max(corpus + (trusted or [])) or 1.0
    unit = _nice(tallest / 3)
    ceiling = unit * math.ceil(tallest / unit)

    def x(score: float) -> float:
        return left + (width - left - right) * (score - edges[0]) / (edges[-1] - edges[0])

    def y(share: float) -> float:
        return floor - (floor - top) * share / ceiling

    parts = []
    for i in range(round(ceiling / unit) + 1):
        parts.append(f'<path class="grid" d="M{left} {y(i * unit):.1f} H{width - right}"/>')
        parts.append(_text(left - 7, y(i * unit) + 4, f"{100 * i * unit:.3g} %", "tick", "end"))
    for i, share in enumerate(corpus):
        kind = "suspicious" if split is not None and i >= split else "kept"
        a, b = x(edges[i]), x(edges[i + 1])
        parts.append(
            f'<rect class="bar {kind}" x="{a + 0.5:.1f}" y="{y(share):.1f}" '
            f'width="{max(b - a - 1, 0.5):.1f}" '
            f'height="{floor - y(share):.1f}"/>'
        )
    if trusted:
        steps = [(x(edges[0]), floor * 1.0)]
        for i, share in enumerate(trusted):
            steps += [(x(edges[i]), y(share)), (x(edges[i + 1]), y(share))]
        parts.append(f'<path class="line trusted" d="{_path([*steps, (x(edges[-1]), floor)])}"/>')
    parts += _score_ticks(edges, x, floor + 18, 6 if width == WIDE else 4)
    threshold = histogram["threshold"]
    if threshold is not None:
        at = x(threshold)
        anchor, shift = ("end", -6) if at > width / 2 else ("start", 6)
        parts.append(f'<path class="threshold" d="M{at:.1f} {top - 24} V{floor}"/>')
        parts.append(_text(at + shift, top - 13, "threshold", "axis strong", anchor))
    middle = (left + width - right) / 2
    parts.append(_text(middle, height - 5, "score: more suspicious to the right", "axis", "middle"))
    return _svg(width, height, "Histogram of scores: " + _histogram_summary(histogram), parts)


def swatch(kind: str) -> str:
    """A legend mark that repeats the line or fill of `kind`; the text beside it is the label."""
    shape = {
        "trusted": '<path class="line trusted" d="M0 8 H26"/>',
        "kept": '<rect class="area kept" width="26" height="16"/><path class="line kept" d="M0 8 H26"/>',
        "suspicious": '<rect class="area suspicious" width="26" height="16"/>'
        '<path class="line suspicious" d="M0 8 H26"/>',
        "kept-bar": '<rect class="bar kept" x="5" width="16" height="16"/>',
        "suspicious-bar": '<rect class="bar suspicious" x="5" width="16" height="16"/>',
    }[kind]
    return f'<svg class="swatch" viewBox="0 0 26 16" aria-hidden="true">{shape}</svg>'


def _histogram_summary(histogram: Facts) -> str:
    if histogram["threshold"] is None:
        return "no threshold is recorded."
    edges, threshold = histogram["edges"], histogram["threshold"]
    from_bin = sum(edge < threshold - 1e-9 * max(1.0, abs(threshold)) for edge in edges)
    text = f"{100 * sum(histogram['corpus'][from_bin:]):.1f} % of the corpus lies over the threshold"
    if histogram["trusted"]:
        text += f", and {100 * sum(histogram['trusted'][from_bin:]):.1f} % of the trusted samples"
    return text + "."


def _merged(histogram: Facts, merge: int) -> tuple[list[float], list[float], list[float] | None, int | None]:
    """Bins joined `merge` at a time so that the threshold stays on an edge; the bin it starts, if any."""
    edges, threshold = histogram["edges"], histogram["threshold"]
    split = None
    if threshold is not None:
        split = min(range(len(edges)), key=lambda i: abs(edges[i] - threshold))
    first = (split or 0) % merge
    starts = sorted({0, *range(first, len(edges) - 1, merge)})
    ends = [*starts[1:], len(edges) - 1]

    def join(shares: list[float] | None) -> list[float] | None:
        return None if shares is None else [sum(shares[a:b]) for a, b in zip(starts, ends, strict=True)]

    corpus = join(histogram["corpus"]) or []
    at = None if split is None else next((i for i, a in enumerate(starts) if a >= split), len(starts))
    return [edges[a] for a in starts] + [edges[-1]], corpus, join(histogram["trusted"]), at


def _score_ticks(edges: list[float], x: Any, y: float, count: int) -> list[str]:
    unit = _nice((edges[-1] - edges[0]) / count)
    first = math.ceil(edges[0] / unit)
    places = max(0, -math.floor(math.log10(unit)))
    ticks = []
    for i in range(first, math.floor(edges[-1] / unit) + 1):
        ticks.append(_text(x(i * unit), y, f"{i * unit:.{places}f}".replace("-", "−"), "tick", "middle"))
    return ticks


def _nice(step: float) -> float:
    """The next of 1, 2, 5 × 10ⁿ at or above `step`."""
    power = 10.0 ** math.floor(math.log10(max(step, 1e-12)))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)


def _log_range(groups: dict[str, Facts]) -> tuple[float, float]:
    values = [value for group in groups.values() for name in ("p10", "p90") for value in group[name]]
    low, high = max(min(values), 1e-5), max(max(values), 1e-4)
    low, high = low / 1.25, high * 1.25
    return (low, high) if high / low > 4 else (low / 2, high * 2)


def _log_grid(low: float, high: float, y: Any, left: float, right: float) -> str:
    factors = (1,) if math.log10(high / low) > 2 else (1, 2, 5)
    parts = []
    for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for factor in factors:
            value = factor * 10.0**exponent
            if low <= value <= high:
                parts.append(f'<path class="grid" d="M{left} {y(value):.1f} H{right:.1f}"/>')
                parts.append(
                    _text(
                        left - 7,
                        y(value) + 4,
                        f"{value:g}" if value > 5e-4 else f"{value:.0e}",
                        "tick",
                        "end",
                    )
                )
    return "".join(parts)


def _spread(wanted: dict[str, float], gap: float, low: float, high: float) -> dict[str, float]:
    """Move labels apart to at least `gap`, keeping their order and the range."""
    names = sorted(wanted, key=lambda name: wanted[name])
    placed: list[float] = []
    for name in names:
        placed.append(max(wanted[name], placed[-1] + gap if placed else low))
    over = max(0.0, placed[-1] - high)
    for i in reversed(range(len(placed))):
        ceiling = high if i == len(placed) - 1 else placed[i + 1] - gap
        placed[i] = min(placed[i] - over / 2 if over else placed[i], ceiling)
    return dict(zip(names, placed, strict=True))


def _plot(height: float) -> float:
    return height - _TOP - _BOTTOM


def _path(points: list[tuple[float, float]]) -> str:
    return "M" + " L".join(f"{px:.1f} {py:.1f}" for px, py in points)


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: int, height: int, label: str, parts: list[str]) -> str:
    label = escape(label)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}"><title>{label}</title>'
        f"{''.join(parts)}</svg>"
    )
