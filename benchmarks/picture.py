"""Draw the README's chart from the table in `docs/measured.md`: `python -m benchmarks.picture`."""

from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "measured.md"
PICTURE = ROOT / "docs" / "images" / "speedups.svg"
SHAPE = "512 x 151936"
REFERENCE = "log_softmax + gather"
COLOURS = {"`cpp`": "#0b3c8c", "`compiled`": "#1f77d0", "torch.compile": "#edae49"}
LABELS = {"torch.compile": f"torch.compile of {REFERENCE}"}
BAR, GAP, LEFT, WIDTH, TOP = 13, 12, 190, 760, 62


def rows(text: str) -> list[dict[str, str]]:
    """The rows of the page's table, by column."""
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    header = next(line for line in lines if line[0] == "logits")
    return [dict(zip(header, line, strict=True)) for line in lines if len(line) == len(header) and " x " in line[0]]


def picture(text: str) -> str:
    """An SVG with a group of bars for each measured mode of `SHAPE`: how many times as fast as `REFERENCE`."""
    shown = [row for row in rows(text) if row["logits"].startswith(SHAPE)]
    times = [{name: float(row[REFERENCE]) / float(row[name]) for name in COLOURS} for row in shown]
    longest = max(max(group.values()) for group in times)
    unit = (WIDTH - LEFT - 60) / longest
    height = TOP + len(shown) * (len(COLOURS) * BAR + GAP) + 8
    parts = [f'<text x="12" y="22" font-size="15">{SHAPE} logits: times as fast as {REFERENCE}</text>']
    x = 12
    for name, colour in COLOURS.items():
        label = LABELS.get(name, name.strip("`"))
        parts.append(f'<rect x="{x}" y="35" width="11" height="11" fill="{colour}"/>')
        parts.append(f'<text x="{x + 16}" y="45">{escape(label)}</text>')
        x += 40 + 7 * len(label)
    y = TOP
    for row, group in zip(shown, times, strict=True):
        name = f"{row['logits'].removeprefix(SHAPE).strip()}, {row['mode']}"
        middle = y + len(COLOURS) * BAR / 2 + 4
        parts.append(f'<text x="{LEFT - 8}" y="{middle:g}" text-anchor="end">{escape(name)}</text>')
        for candidate, colour in COLOURS.items():
            wide = group[candidate] * unit
            parts.append(f'<rect x="{LEFT}" y="{y}" width="{wide:.1f}" height="{BAR - 2}" fill="{colour}"/>')
            parts.append(f'<text x="{LEFT + wide + 5:.1f}" y="{y + 10}" font-size="11">{group[candidate]:.1f}</text>')
            y += BAR
        y += GAP
    line = f'<path d="M{LEFT + unit:.1f} {TOP - 4}V{height - 12}" stroke="#888" stroke-dasharray="3"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join([*parts, line]) + "\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(TABLE.read_text(encoding="utf-8")), encoding="utf-8")
