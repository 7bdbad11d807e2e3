"""Draws docs/ratio.svg: the mean importance ratio by top-p, of log-probabilities over all ids and over the kept ones.

``python docs/ratio.py``. Policy and engine are the same, so the ratio should be 1.
"""

from pathlib import Path

import torch

import leafkernels

TOKENS, VOCABULARY = 1_000, 2_000
WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 24, 60  # margins
LEAST = 0.6


def mean_ratios(top_p: float) -> tuple[float, float]:
    """Over the whole vocabulary and over the kept ids, for tokens of which some are certain and some open.

    Probabilities fall with the rank to the power of -a, a from 1.2 to 4, as those of words do.
    """
    generator = torch.Generator().manual_seed(0)
    power = 1.2 + 2.8 * torch.rand(TOKENS, 1, generator=generator, dtype=torch.float64)
    logits = -power * torch.arange(1, VOCABULARY + 1, dtype=torch.float64).log()
    mask = leafkernels.SamplingMask.from_logits(logits, top_p=top_p)
    is_kept = torch.ones_like(logits, dtype=torch.bool)
    if top_p < 1:
        lengths = mask.offsets.diff()[:, None]
        is_kept = torch.arange(VOCABULARY) < lengths  # the likeliest come first
    engine = logits.masked_fill(~is_kept, -torch.inf).log_softmax(1)
    ids = engine.exp().multinomial(1, generator=generator).squeeze(1)
    of_engine = engine.gather(1, ids[:, None]).squeeze(1)
    whole = leafkernels.surprisal_entropy(logits, ids).logprobs
    kept = leafkernels.surprisal_entropy(logits, ids, sampling_mask=mask).logprobs
    return (whole - of_engine).exp().mean().item(), (kept - of_engine).exp().mean().item()


def draw(points: list[tuple[float, float, float]]) -> str:
    def place(x: float, y: float) -> str:
        across = LEFT + (x - 0.5) / 0.5 * (WIDTH - LEFT - RIGHT)
        return f"{across:.1f},{TOP + (1.05 - y) / (1.05 - LEAST) * (HEIGHT - TOP - BOTTOM):.1f}"

    def at(x: float, y: float, text: str, more: str) -> str:
        across, down = place(x, y).split(",")
        return f'<text x="{across}" y="{down}" {more}>{text}</text>'

    parts = []
    for y in (0.6, 0.7, 0.8, 0.9, 1.0):
        (x1, y1), (x2, y2) = (place(x, y).split(",") for x in (0.5, 1.0))
        parts.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#ccc"/>')
        parts.append(at(0.5, y, f"{y:.1f}", 'dx="-10" dy="4" text-anchor="end"'))
    for x in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        parts.append(at(x, LEAST, f"{x:.1f}", 'dy="22" text-anchor="middle"'))
    parts.append(at(0.75, LEAST, "top-p", 'dy="44" text-anchor="middle"'))
    for column, colour, text, lift in ((2, "#1a7f37", "over the kept ids", -8), (1, "#cf222e", "over all ids", 18)):
        line = " ".join(place(point[0], point[column]) for point in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        parts.append(at(0.62, points[6][column], text, f'dy="{lift}" fill="{colour}" dx="8"'))
    parts.append(f'<text x="{LEFT}" y="14">mean ratio</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="13" fill="#333">\n<rect width="100%" height="100%" fill="#fff"/>\n'
        f"{body}\n</svg>\n"
    )


if __name__ == "__main__":
    shares = [0.5 + n / 50 for n in range(26)]
    found = [(share, *mean_ratios(min(share, 1.0))) for share in shares]
    for share, whole, kept in found[::5]:
        print(f"top-p {share:.1f}: {whole:.3f} over all ids, {kept:.3f} over the kept ids")
    Path(__file__).with_name("ratio.svg").write_text(draw(found), encoding="utf-8")
