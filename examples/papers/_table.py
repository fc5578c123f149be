"""One table and one page of pictures, from stored results."""

import json
from pathlib import Path

BEGIN, END = "<!-- results -->", "<!-- /results -->"
COLUMNS = (
    "paper",
    "claim",
    "setting here",
    "ours, 95 % interval",
    "strongest baseline at equal cost",
    "does it hold?",
    "command",
    "commit",
)


def load(folder: Path, names: list[str]) -> dict[str, dict | None]:
    """Return each script's result, or None where it has none."""
    paths = {name: folder / f"{name}.json" for name in names}
    return {n: json.loads(p.read_text()) if p.is_file() else None for n, p in paths.items()}


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:#.3g}".rstrip(".")


def shown(figure: dict) -> str:
    """Return a figure in words: what it is, its mean, its interval and its unit."""
    unit = f" {figure['unit']}" if figure["unit"] else ""
    ends = [number(figure[end]) for end in ("low", "high")]
    interval = "" if ends[0] == ends[1] == number(figure["mean"]) else f" [{ends[0]}, {ends[1]}]"
    return f"{figure['what']}: {number(figure['mean'])}{interval}{unit}"


def decided(check: dict) -> str:
    word = "holds" if check["holds"] else "doesn't hold"
    return f"{check['claim']}: {word} ({shown(check)}; {check['side']} {check['bound']:g}?)"


def table(results: dict[str, dict | None]) -> str:
    """Return a table in Markdown, a row for each script."""
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    for name, result in results.items():
        command = f"`python examples/papers/{name}.py`"
        if result is None:
            rows.append([f"`{name}`", *[""] * 4, "not run", command, ""])
            continue
        paper = result["paper"]
        held = [check["holds"] for check in result["checks"]]
        link = f"[arXiv:{paper['arxiv']}](https://arxiv.org/abs/{paper['arxiv']})"
        rows.append(
            [
                f"{paper['authors']}, {link}",
                result["claim"],
                result["setting"],
                shown(result["ours"]),
                shown(result["baseline"]),
                f"{result['verdict']}, {sum(held)} of {len(held)} checks",
                f"`{result['command']}`",
                result["commit"] or "unknown",
            ]
        )
    return "".join(f"| {' | '.join(cell(text) for text in row)} |\n" for row in rows)


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def pictures(results: dict[str, dict | None]) -> str:
    """Return a page in Markdown: the picture of each script, and what decided on its claim."""
    parts = ["# The reproductions in pictures\n"]
    for name, result in results.items():
        if result is None:
            parts.append(f"## {name}\n\nNot run.\n")
            continue
        versions = ", ".join(f"{host} {version}" for host, version in result["versions"].items())
        checks = "\n".join(f"- {decided(check)}" for check in result["checks"])
        parts.append(
            f"## {name}\n\n{result['claim']} **{result['verdict'].capitalize()}.**\n\n"
            f"![{name}]({name}.png)\n\n{result['caption']}\n\n{checks}\n\n"
            f"{result['cpu_seconds']} seconds of CPU, {versions}.\n"
        )
    return "\n".join(parts)


def put(text: str, table: str) -> str:
    """Return a page with the table between its markers; as it is where it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}{END}{after}" if begin and end else text


def between(text: str) -> str | None:
    """Return what stands between the markers, or None where a page has none."""
    _, begin, rest = text.partition(BEGIN)
    inside, end, _ = rest.partition(END)
    return inside.lstrip("\n") if begin and end else None
