"""The colours of all pictures: one hue from light to dark, in even steps of perceived lightness (OKLCH)."""

from __future__ import annotations

# From 0 to the largest value. DARK is for a dark background, where the lightest colour is the largest value.
LIGHT = ("#f1f8fd", "#c4dff2", "#98c5eb", "#70a9e3", "#4f8cd8", "#386dc7", "#2b4fb1", "#243294", "#1d1673")
DARK = ("#1a1d2a", "#20315b", "#22497f", "#1f639f", "#2180b8", "#3a9dca", "#64bad9", "#98d5e4", "#d4eced")


def color(value: float, stops: tuple[str, ...] = LIGHT) -> tuple[int, int, int]:
    """Red, green and blue, from 0 to 255, of a value from 0 to 1."""
    place = min(max(value, 0.0), 1.0) * (len(stops) - 1)
    below = min(int(place), len(stops) - 2)
    share = place - below
    first, second = (bytes.fromhex(stop[1:]) for stop in stops[below : below + 2])
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue
