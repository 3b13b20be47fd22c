"""What the shares of noise say that a CVS leaves (`denoising` measures them); without torch, as the
index of reports asks it of every training.

Shares are `study.results.noise_shares`: {"left", "ignoring", "linear": one for each of `LEVELS`},
or {} of what promises nothing.
"""

from collections.abc import Mapping, Sequence

LEVELS = (0.05, 0.17, 0.5, 1.0, 2.5)
"""Noise levels sigma, of pictures in [-1, 1], at which is measured."""
_ASKED = (0.17, 0.5)


def ignored(shares: Mapping[str, Sequence[float]]) -> list[str]:
    """Why a network of these shares is no denoiser, [] of one and of {}: at 0.17 and 0.5 it has to
    go half of the way from c_skip, which one leaves that ignores its input, to the best linear
    denoiser of such views."""
    reasons = []
    for i, level in enumerate(LEVELS if shares else ()):
        left, ignoring, linear = (shares[name][i] for name in ("left", "ignoring", "linear"))
        if level in _ASKED and not ignoring - left >= 0.5 * (ignoring - linear):
            reasons.append(
                f"the network ignores its input: of noise {level:g} it leaves {left:.2f}, c_skip "
                f"alone {ignoring:.2f}, the best linear denoiser {linear:.2f}"
            )
    return reasons


def table(shares: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """Rows of shares, a noise level each, in per cent; [] of {}."""
    names = {"left": "left, %", "ignoring": "ignoring its input, %"}
    names["linear"] = "best linear denoiser, %"
    return [
        {"noise level": level} | {text: 100 * shares[name][i] for name, text in names.items()}
        for i, level in enumerate(LEVELS if shares else ())
    ]
