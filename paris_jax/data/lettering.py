"""Renders text in a small bitmap font, so that contact sheets have captions on machines without fonts."""

import numpy as np

ROWS, COLUMNS = 5, 3
# Each character is five rows of three pixels, one octal digit per row, from the top.
GLYPHS = {
    "a": "25755", "b": "65656", "c": "34443", "d": "65556", "e": "74647", "f": "74644", "g": "34553", "h": "55755",
    "i": "72227", "j": "11152", "k": "55655", "l": "44447", "m": "57755", "n": "65555", "o": "25552", "p": "65644",
    "q": "25563", "r": "65655", "s": "34216", "t": "72222", "u": "55557", "v": "55552", "w": "55775", "x": "55255",
    "y": "55222", "z": "71247", "0": "25552", "1": "26227", "2": "61247", "3": "61216", "4": "55711", "5": "74616",
    "6": "34757", "7": "71222", "8": "75757", "9": "75716", ".": "00002", ",": "00024", "-": "00700", "'": "22000",
    ":": "02020", "!": "22202", "?": "61202", "(": "12221", ")": "42224", "/": "11244", "_": "00007", " ": "00000",
}  # fmt: skip
UNKNOWN = "77777"


def write_line(text: str, width: int, scale: int = 2) -> np.ndarray:
    """Draws one line of text, cut to `width` pixels: ((ROWS + 2) * scale, width) uint8, 0 background to 255 ink."""
    line = np.zeros((ROWS + 2, max(1, len(text)) * (COLUMNS + 1)), np.uint8)
    for place, letter in enumerate(text.lower()):
        for row, bits in enumerate(GLYPHS.get(letter, UNKNOWN)):
            for column in range(COLUMNS):
                line[row + 1, place * (COLUMNS + 1) + column] = 255 * (int(bits) >> (COLUMNS - 1 - column) & 1)
    line = line.repeat(scale, 0).repeat(scale, 1)[:, :width]
    return np.pad(line, ((0, 0), (0, width - line.shape[1])))
