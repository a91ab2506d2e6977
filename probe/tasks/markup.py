"""Text without its marks: what LaTeX and Markdown put around an answer."""

from __future__ import annotations

import re
import unicodedata


def plain(text: str) -> str:
    """Text without the marks of LaTeX and Markdown; of a text with \\boxed{…} or "####" what is in or behind it."""
    text = text.strip()
    if "####" in text and (behind := text.rpartition("####")[2].strip()):
        text = behind
    if "\\" in text or "$" in text or "{,}" in text:
        text = _without_latex(text)
    text = re.sub(r"\s*[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", _superscript, text)
    text = re.sub(r"(?<=\d)(?=[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])", " ", text)
    text = re.sub(r"[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]", _vulgar, text)
    text = text.translate(_SIGNS).replace("℃", "°C").replace("℉", "°F")
    text = re.sub(r"\*\*|__|`|^\s*#+\s+", "", text)
    text = re.sub(r"(?<!\S)\*(?=\S)|(?<=[^\s*])\*(?!\S)", "", text)
    return text.strip()


_SIGNS = str.maketrans(
    {"−": "-", "’": "'", "‘": "'", "“": '"', "”": '"', "\u2009": " ", "\u202f": " ", "\xa0": " "}
    | {chr(0xFF10 + n): str(n) for n in range(10)}
)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")


def _superscript(match: re.Match[str]) -> str:
    return f"^{match[0].strip().translate(_RAISED)}"


def _vulgar(match: re.Match[str]) -> str:
    return unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/")


def _without_latex(text: str) -> str:
    boxed = _boxed(text)
    text = text if boxed is None else boxed
    text = re.sub(r"\$([^$]*)\$(?!\d)", r"\1", text)
    text = re.sub(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r"\1", text)
    for _ in range(2):
        text = re.sub(r"(\d)?\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))", _fraction, text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b", "°", text)
    text = re.sub(r"\^\{([^{}]*)\}", r"^\1", text)
    text = re.sub(r"\\(?:times|cdot)\b", "×", text)
    text = text.replace("{,}", ",").replace("\\pm", "±")
    text = re.sub(r"\\(?:left|right|displaystyle)\b|\\[()\[\]!]", "", text)
    text = re.sub(r"\\[,;:~ ]|~|\\quad\b", " ", text)
    return re.sub(r"\\([$%&#_{}])", r"\1", text).strip()


def _fraction(match: re.Match[str]) -> str:
    whole, top, below = match[1], match[2] or match[3] or "", match[4] or match[5] or ""
    return f"{whole} {top}/{below}" if whole else f"{top}/{below}"


def _boxed(text: str) -> str | None:
    """What the last \\boxed{…} has in it, braces balanced; None without one."""
    starts = [match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]
    if not starts:
        return None
    depth, start = 1, starts[-1]
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if not depth:
            return text[start:at]
    return text[start:]
