"""Draws the pictures of docs/method.md.

    python docs/pictures.py       writes docs/pictures/*.svg; tests/test_site.py compares them

A picture has its own light background, so it is readable on a dark page too.
"""

from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "pictures"
INK, PAPER = "#1c2733", "#fbfbf8"
DEVICE, HOST, MODEL = "#d6e6f7", "#dff0da", "#f7e8cf"  # what runs on an accelerator, on a CPU, and what is stored


class Picture:
    """Boxes and arrows. A point is the middle of a box, in pixels."""

    def __init__(self, title: str, width: int, height: int):
        self.title, self.width, self.height = title, width, height
        self.parts = []

    def box(self, x: int, y: int, text: str, color: str, width: int = 150) -> None:
        """A box with a line of text per line."""
        lines = text.split("\n")
        height = 18 * len(lines) + 16
        corner = f'x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width}" height="{height}"'
        self.parts.append(f'<rect {corner} rx="6" fill="{color}" stroke="{INK}"/>')
        for i, line in enumerate(lines):
            self.text(x, y - 9 * (len(lines) - 1) + 18 * i + 5, line, bold=len(lines) > 1 and i == 0)

    def text(self, x: int, y: float, text: str, bold: bool = False, anchor: str = "middle") -> None:
        weight = ' font-weight="bold"' * bold
        self.parts.append(f'<text x="{x}" y="{y:g}" text-anchor="{anchor}"{weight}>{escape(text)}</text>')

    def arrow(self, *points: tuple[int, int], text: str = "", dashed: bool = False) -> None:
        """A line through the points with a head at its end; the text stands above its first part."""
        path = " ".join(f"{x},{y}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' * dashed
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{INK}" marker-end="url(#head)"{dash}/>')
        if text:
            (x, y), (to_x, to_y) = points[:2]
            self.text((x + to_x) // 2, (y + to_y) / 2 - 6, text)

    def svg(self) -> str:
        head = f'<path d="M0,0 L9,4 L0,8 z" fill="{INK}"/>'
        begin = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'font-family="system-ui, sans-serif" font-size="13" fill="{INK}">',
            f"<title>{escape(self.title)}</title>",
            f'<defs><marker id="head" markerWidth="9" markerHeight="8" refX="9" refY="4" orient="auto">{head}</marker>'
            "</defs>",
            f'<rect width="{self.width}" height="{self.height}" rx="8" fill="{PAPER}"/>',
        ]
        return "\n".join([*begin, *self.parts, "</svg>"]) + "\n"


def stages() -> Picture:
    p = Picture("Which stage makes which model", 900, 250)
    p.box(85, 60, "base model", MODEL, 120)
    p.box(265, 60, "SFT\nquestions and\nworked solutions", DEVICE)
    p.box(455, 60, "warm-up\nan early epoch", MODEL, 130)
    p.box(455, 180, "SFT\nthe best epoch", MODEL, 130)
    p.box(640, 60, "ReFT\nquestions and\nexecuted rewards", DEVICE)
    p.box(820, 60, "ReFT\nthe best iteration", MODEL, 135)
    p.box(640, 180, "rerankers\nsamples of the\nwarm-up model", DEVICE)
    p.box(820, 180, "table\ntop-1, voting,\nrerank", HOST, 135)
    p.arrow((145, 60), (190, 60))
    p.arrow((340, 60), (390, 60))
    p.arrow((265, 95), (265, 180), (390, 180))
    p.arrow((520, 60), (565, 60))
    p.arrow((715, 60), (752, 60))
    p.arrow((520, 180), (565, 180))
    p.arrow((640, 95), (640, 145), dashed=True)
    p.arrow((715, 180), (752, 180))
    p.arrow((820, 87), (820, 145))
    p.text(85, 235, "blue: trains   green: host   yellow: a model", anchor="start")
    return p


def iteration() -> Picture:
    p = Picture("What flows in one PPO iteration", 900, 300)
    p.text(20, 28, "accelerator", bold=True, anchor="start")
    p.text(20, 288, "host", bold=True, anchor="start")
    p.box(80, 220, "Example\nquestion, answer", HOST, 130)
    p.box(230, 220, "Prompt\ntoken ids", HOST, 110)
    p.box(330, 90, "rollout engine\nsamples with\nthe policy", DEVICE, 130)
    p.box(430, 220, "Completion\ntext of the ids", HOST, 130)
    p.box(590, 220, "executor\nruns the program", HOST, 140)
    p.box(770, 220, "Verdict\nanswer, reward\n1, 0.1 or 0", HOST, 130)
    p.box(560, 90, "scoring\npolicy, reference,\nvalues", DEVICE, 140)
    p.box(770, 90, "update\nadvantages, clipped\nloss, AdamW", DEVICE, 160)
    p.arrow((145, 220), (175, 220))
    p.arrow((230, 193), (230, 90), (265, 90))
    p.arrow((395, 90), (430, 90), (430, 193))
    p.arrow((395, 74), (490, 74), text="same ids")
    p.arrow((495, 220), (520, 220))
    p.arrow((660, 220), (705, 220))
    p.arrow((770, 185), (770, 125))
    p.arrow((630, 90), (690, 90))
    p.arrow((770, 55), (770, 30), (330, 30), (330, 55), dashed=True)
    p.text(550, 22, "the new policy samples the next iteration")
    return p


def row() -> Picture:
    p = Picture("What PPO knows about each token of a row", 900, 250)
    tokens = ["Question", "…", "solution():", "result", "= 6 * 7", "return", "result", "EOS"]
    for i, token in enumerate(tokens):
        p.box(195 + 90 * i, 60, token, HOST if i < 3 else DEVICE, 84)
    p.text(285, 30, "prompt: given")
    p.text(600, 30, "response: sampled, each token is an action")
    lines = {
        "log-probability": ["✓"] * 5,
        "KL penalty": ["−β·KL"] * 5,
        "reward of the answer": ["0", "0", "0", "0", "1"],
        "value, advantage": ["✓"] * 5,
    }
    for j, (name, values) in enumerate(lines.items()):
        p.text(150, 110 + 34 * j, name, bold=True, anchor="end")
        for i, value in enumerate(values):
            p.text(465 + 90 * i, 110 + 34 * j, value)
    return p


def voting() -> Picture:
    p = Picture("How n samples of one question become one answer", 900, 230)
    p.box(80, 115, "question", HOST, 100)
    for i, (answer, score) in enumerate((("42", "0.7"), ("42", "0.6"), ("36", "0.9"), ("none", ""))):
        p.box(260, 40 + 50 * i, f"sample {i + 1}", DEVICE, 100)
        p.arrow((130, 115), (210, 40 + 50 * i))
        p.box(420, 40 + 50 * i, answer, HOST, 70)
        p.arrow((310, 40 + 50 * i), (385, 40 + 50 * i), text="runs" if i == 0 else "")
        p.text(490, 45 + 50 * i, score)
    p.text(490, 18, "reranker")
    for y, name in (
        (50, "voting\nthe most frequent: 42"),
        (115, "rerank\nthe best score: 36"),
        (180, "upper bound\nany that is right"),
    ):
        p.box(740, y, name, MODEL, 190)
        p.arrow((530, 115), (645, y))
    return p


PICTURES = {"stages": stages, "iteration": iteration, "row": row, "voting": voting}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
