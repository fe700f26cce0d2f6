"""Draw the figures of README.md and docs/ as SVG, into docs/figures/.

    python -m docs.scripts.figures        # or: make tables

The overview has a light and a dark file, and its numbers come from benchmarks/results/. The others
have no background and colours that can be read on a white and on a dark page.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

from benchmarks.tables.result_files import reader
from benchmarks.tables.summary import BYTES, SLOTS, in_bytes, in_slots, library

FOLDER = Path(__file__).parents[2] / "docs" / "figures"
WIDTH = 640
BLUE, ORANGE, GREEN, GREY = "#3b82c4", "#c9721a", "#4a9463", "#7d848d"
# Text, faint fills, accent and second accent of a page.
LIGHT = {"text": "#1f2328", "soft": "#59636e", "fill": "#eaeef2", "bar": "#2f74b5"}
DARK = {"text": "#e6edf3", "soft": "#9198a1", "fill": "#262c36", "bar": "#5aa2e0"}


def svg(height: int, parts: list[str], title: str) -> str:
    """An SVG file; `title` is what a screen reader says."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-4 0 {WIDTH + 8} {height}" role="img"'
        f' font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
    )
    return "\n".join([head, f"<title>{escape(title)}</title>", *parts, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, colour: str = GREY, look: str = "") -> str:
    """Words; `look` may hold `bold`, `middle`, `end`, `mono` and a size."""
    size = next((part for part in look.split() if part.isdigit()), "18")
    about = f'font-size="{size}"'
    about += ' font-weight="600"' if "bold" in look else ""
    about += ' font-family="ui-monospace, Menlo, Consolas, monospace"' if "mono" in look else ""
    for anchor in ("middle", "end"):
        about += f' text-anchor="{anchor}"' if anchor in look else ""
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}" {about}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, edge: str = "none") -> str:
    """A rectangle with round corners."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}"'
        f' stroke="{edge}" stroke-width="1.5"/>'
    )


def arrow(x: float, y: float, to_x: float, to_y: float, colour: str = GREY) -> list[str]:
    """A line with a head, to the right or down."""
    right = abs(to_x - x) > abs(to_y - y)
    tip = (
        f"{to_x - 8:g},{to_y - 5:g} {to_x:g},{to_y:g} {to_x - 8:g},{to_y + 5:g}"
        if right
        else f"{to_x - 5:g},{to_y - 8:g} {to_x:g},{to_y:g} {to_x + 5:g},{to_y - 8:g}"
    )
    return [
        f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{colour}"'
        ' stroke-width="2"/>',
        f'<polyline points="{tip}" fill="none" stroke="{colour}" stroke-width="2"/>',
    ]


def overview(colours: dict[str, str]) -> str:
    """Adapters with their bytes; what each of four budgets stores, and what is kept of the gain."""
    read = reader()
    ink, soft, fill, bar = (colours[key] for key in ("text", "soft", "fill", "bar"))
    n, total = library(read)
    rows = [(f"--budget {b}", "one file", *in_bytes(read, b)) for b in BYTES]
    rows += [(f"--budget {k}", f"{k} adapters", *in_slots(read, k)) for k in SLOTS]
    parts = [
        text(0, 24, f"{n} LoRA adapters", ink, "bold 17"),
        text(0, 46, f"{total / 1e6:.1f} MB, {total / n / 1e6:.2f} MB each", soft, "15"),
    ]
    for i in range(n):
        parts.append(box(i % 4 * 36, 62 + i // 4 * 40, 30, 34, bar))
    parts += arrow(156, 180, 196, 180, soft)
    parts += [
        text(214, 24, "a pack within your budget", ink, "bold 17"),
        text(640, 24, "kept", ink, "bold end 17"),
        text(640, 46, "of the gain", soft, "end 15"),
        text(214, 46, "bytes, beside the adapters'", soft, "15"),
    ]
    for i, (budget, what, nbytes, _, kept) in enumerate(rows):
        y = 66 + i * 60
        parts += [
            text(214, y + 14, budget, ink, "mono 15"),
            text(510, y + 14, f"{what}, {nbytes / 1e6:.1f} MB", soft, "end 15"),
            box(214, y + 22, 296, 14, fill),
            box(214, y + 22, 296 * nbytes / total, 14, bar),
            text(640, y + 36, f"{kept:.1%}", ink, "bold end 22"),
        ]
    return svg(
        304,
        parts,
        f"{n} adapters of {total / 1e6:.1f} MB become a pack; "
        + "; ".join(f"{b}: {x / 1e6:.1f} MB, {k:.1%} kept" for b, _, x, _, k in rows),
    )


def slots_and_bytes() -> str:
    """Five slots beside one file of all adapters."""
    members = (("gec-de", "gec-fr"), ("qa-de", "qa-en", "qa-fr"), ("date-en",))
    lengths = ((30, 90), (52, 60), (24, 48), (40, 110), (20, 70), (34, 40))
    names = [name for group in members for name in group]
    parts = [
        text(0, 22, "slots: --budget 3", BLUE, "bold mono 18"),
        text(350, 22, "bytes: --budget 3%", ORANGE, "bold mono 18"),
    ]
    for i, group in enumerate(members):
        y = 44 + i * 76
        parts += [
            box(0, y, 270, 60, "none", BLUE),
            text(14, y + 25, f"cluster-{i}", BLUE, "bold 18"),
            text(14, y + 47, ", ".join(group), GREY, "18"),
        ]
    parts.append(box(350, 44, 290, 212, "none", ORANGE))
    for i, (name, (four, two)) in enumerate(zip(names, lengths)):
        y = 58 + i * 32
        parts += [
            text(364, y + 16, name, GREY, "18"),
            box(456, y + 2, four, 18, ORANGE),
            box(458 + four, y + 2, two, 18, "none", ORANGE),
        ]
    parts += [
        text(0, 292, "files for mlx-lm, Swift, PEFT", GREY, "17"),
        text(350, 292, "one file; filled 4 bit, hollow 2 bit", GREY, "17"),
    ]
    return svg(300, parts, "Three slots serve six tasks; one file holds six adapters at low bits")


def low_rank(x: float, y: float, colour: str, name: str) -> list[str]:
    """An update as a tall and a wide factor."""
    return [
        box(x, y, 16, 76, colour),
        box(x + 24, y, 76, 16, colour),
        text(x + 64, y + 54, name, colour, "bold middle 18"),
    ]


def merge() -> str:
    """Two updates become one, fitted to what the members' modules put out."""
    parts = [
        text(0, 22, "members", GREY, "bold 18"),
        text(232, 22, "on ten rows per task", GREY, "bold 18"),
        text(520, 22, "merge", GREY, "bold 18"),
        *low_rank(0, 44, BLUE, "num-de"),
        *low_rank(0, 164, ORANGE, "num-es"),
        *arrow(116, 82, 216, 82),
        *arrow(116, 202, 216, 202),
    ]
    for y, colour in ((60, BLUE), (180, ORANGE)):
        parts += [
            box(232, y, 180, 44, "none", colour),
            text(322, y + 28, "outputs to match", colour, "middle 18"),
        ]
    parts += [*arrow(426, 88, 506, 130), *arrow(426, 196, 506, 154)]
    parts += [*low_rank(520, 104, GREEN, "both")]
    parts.append(text(520, 212, "same rank", GREY, "17"))
    parts.append(text(520, 234, "one scale", GREY, "17"))
    return svg(256, parts, "Two low-rank updates become one that matches the outputs of both")


def d2c() -> str:
    """Weakened adapters, an estimated partition, and one that is measured and corrected."""
    # A task's regret under its own adapter at full strength and at two lower ones.
    shades = ("0.05", "0.1", "0.5", "0.05", "0.3", "0.95", "0.05", "0.15", "0.6")
    shades += ("0.05", "0.4", "0.8")
    dots = {"a": (262, 108), "b": (300, 112), "c": (262, 212), "d": (316, 204)}
    parts = [
        text(0, 22, "1 probe", GREY, "bold 18"),
        text(228, 22, "2 estimate", GREY, "bold 18"),
        text(444, 22, "3 measure, learn", GREY, "bold 18"),
    ]
    for i, shade in enumerate(shades):
        x, y = i % 3 * 36, 60 + i // 3 * 36
        parts.append(f'<rect x="{x}" y="{y}" width="32" height="32" rx="3" fill="{BLUE}"'
                     f' fill-opacity="{shade}"/>')  # fmt: skip
    parts += [text(0, 232, "task x strength", GREY, "17"), *arrow(160, 132, 204, 132)]
    for shift in (0, 220):
        for cy in (112, 200):
            parts.append(f'<ellipse cx="{286 + shift}" cy="{cy}" rx="58" ry="38" fill="none"'
                         f' stroke="{GREY}" stroke-width="1.5"/>')  # fmt: skip
        for name, (x, y) in dots.items():
            x += shift
            colour = ORANGE if name == "b" else BLUE
            if shift and name == "b":
                x, y = 494, 178
                parts += arrow(496, 116, 494, 166, ORANGE)
            parts.append(f'<circle cx="{x}" cy="{y}" r="8" fill="{colour}"/>')
    parts += arrow(362, 156, 420, 156)
    parts.append(text(444, 270, "until none can win", GREY, "17"))
    return svg(
        280,
        parts,
        "Weakened adapters give estimates; what they propose is measured and corrects them",
    )


def excess_and_kept() -> str:
    """Losses on a line, and the two differences."""
    base, pack, own, y = 580, 150, 60, 120

    def mark(x: float, name: str, colour: str) -> list[str]:
        return [
            f'<circle cx="{x}" cy="{y}" r="8" fill="{colour}"/>',
            text(x, y + 34, name, colour, "bold middle 18"),
        ]

    def span(x: float, to: float, at: float, words: str, colour: str) -> list[str]:
        ends = "".join(f"M{e:g} {at - 6:g}V{at + 6:g}" for e in (x, to))
        return [
            f'<path d="{ends}M{x:g} {at:g}H{to:g}" stroke="{colour}" stroke-width="2"/>',
            text((x + to) / 2, at - 12, words, colour, "middle 18"),
        ]

    parts = [
        f'<line x1="20" y1="{y}" x2="620" y2="{y}" stroke="{GREY}" stroke-width="2"/>',
        *mark(own, "own", GREEN),
        *mark(pack, "pack", ORANGE),
        *mark(base, "base", GREY),
        *span(own, pack, 86, "excess", ORANGE),
        *span(pack, base, 86, "kept", GREEN),
        *span(own, base, 40, "what the adapters gain", GREY),
        text(320, 190, "kept: the share of the gain", GREEN, "middle 18"),
        text(620, 108, "loss", GREY, "end 17"),
    ]
    return svg(
        204,
        parts,
        "Excess is the loss above the own adapters', kept the share of the gain that is left",
    )


def pack_file() -> str:
    """A plain and a compact pack, and what is in the compact file."""
    parts = [text(0, 22, "plain", BLUE, "bold 17"), text(230, 22, "compact", ORANGE, "bold 17")]
    for i, name in enumerate(("manifest.json", "cluster-0/", "cluster-1/")):
        parts += [box(0, 36 + i * 52, 180, 42, "none", BLUE),
                  text(14, 62 + i * 52, name, GREY, "mono 17")]  # fmt: skip
    parts += [
        box(230, 36, 230, 42, "none", ORANGE),
        text(244, 62, "manifest.json", GREY, "mono 17"),
        box(230, 88, 410, 146, "none", ORANGE),
        text(244, 114, "compact.safetensors", GREY, "mono 17"),
    ]
    for i, (name, widths) in enumerate((("4bit", (60, 90, 40)), ("2bit", (100, 50, 90)))):
        y, x = 126 + i * 34, 300.0
        parts.append(text(244, y + 19, name, GREY, "mono 17"))
        for width, colour in zip(widths, (BLUE, ORANGE, GREEN)):
            parts.append(box(x, y, width, 26, colour))
            x += width + 4
    parts += [
        text(244, 218, "counts, index", GREY, "mono 17"),
        text(230, 262, "one colour: the rows of one adapter", GREY, "17"),
    ]
    return svg(272, parts, "A plain pack has a directory per adapter, a compact one a single file")


FIGURES: dict[str, Callable[[], str]] = {
    "overview-light.svg": lambda: overview(LIGHT),
    "overview-dark.svg": lambda: overview(DARK),
    "slots-and-bytes.svg": slots_and_bytes,
    "merge.svg": merge,
    "d2c.svg": d2c,
    "excess-and-kept.svg": excess_and_kept,
    "pack-file.svg": pack_file,
}


def main() -> None:
    """Write all figures."""
    for name, draw in FIGURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
