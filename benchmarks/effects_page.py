"""The part of docs/results.md that `effects.py` has measured, from the cells that it keeps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from page import RESULTS, write_part

from edge_steer.measure.evaluation_set import pick_evenly
from edge_steer.preset import PRESETS, load_preset, preset_names

Row = dict[str, Any]
OURS, FORMER, PUBLISHED = "default", "former default", "published"
ADDITIONS = ("addition, attention", "addition, stream")
POSITIONS = ("-1", "-1/2", "0", "+1/2", "+1")


def write_page(top: Path, results: Path = RESULTS) -> None:
    """Write the part anew from all cells under `top`."""
    rows = [
        {"model": file.parent.parent.name, "preset": file.parent.name, **read(file), "folder": file.parent}
        for file in sorted(top.glob("*/*/effects.json"))
    ]
    rows = [row for row in rows if OURS in row and FORMER in row]
    models = sorted({row["model"] for row in rows}, key=lambda name: sizes.index(name) if name in sizes else 9)
    parts = [
        "## Effect at equal divergence",
        "",
        "`python benchmarks/effects.py` (resumes; cells that are missing were not measured)",
        "",
        "Each method's dials at a KL of 0.25 from unsteered (within 20 %, or 90° where a turn never costs so much), "
        "and the change of the probe gap from one end to the other, nats per token, with its standard error over 12 "
        "probes. Probes and neutral passages are others than calibration measured on. *default* is what `calibrate "
        "--preset` makes; *former default* is rotation at the norms before attention; *addition* is the better of "
        "attention norms and residual stream; *ablation* has no dial and *system prompt* asks for the trait in words: "
        "both cost what they cost. *standard* and *adaptive* turn to an angle, so none of their dials is a small turn: "
        "they have no place at a budget.",
        "",
        *headline(rows, models),
        "",
        *effect_table(rows, models),
        "",
        *choice_part(rows, models),
        "",
        *texts_part(rows, models),
        "",
        *cross_part(rows, models),
    ]
    write_part(results, "effects.py", "\n".join(parts))


sizes = ["smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"]


def read(file: Path) -> Row:
    found: Row = json.loads(file.read_text())
    return found


def both(row: Row, method: str) -> float | None:
    """The change of the gap from the negative end to the positive; None where the method has no such cell."""
    cell = row.get(method)
    return None if cell is None else cell["positive"]["effect"] - cell["negative"]["effect"]


def best_addition(row: Row) -> float | None:
    found = [each for each in (both(row, name) for name in ADDITIONS) if each is not None]
    return max(found) if found else None


def mean(values: Sequence[float | None]) -> float | None:
    known = [each for each in values if each is not None]
    return sum(known) / len(known) if known else None


def headline(rows: Sequence[Row], models: Sequence[str]) -> list[str]:
    lines = [
        "| model | presets | default | : former default | : addition at its best sites | : published |",
        "|---|---|---|---|---|---|",
    ]
    for model in [*models, "all"]:
        mine = [row for row in rows if model in (row["model"], "all")]
        ours = mean([both(row, OURS) for row in mine])
        assert ours is not None
        # A method that a preset does not allow does nothing there.
        others = [
            mean([both(row, FORMER) for row in mine]),
            mean([best_addition(row) for row in mine]),
            mean([both(row, PUBLISHED) or 0.0 for row in mine]),
        ]
        cells = [f"{ours / other:.2f} ×" if other and other > 0 else "–" for other in others]
        lines.append(f"| {model} | {len(mine)} | {ours:.2f} | {' | '.join(cells)} |")
    return lines


def effect_table(rows: Sequence[Row], models: Sequence[str]) -> list[str]:
    lines = [
        "| model | preset | chosen | − | + | both | former | addition | published | ablation | system prompt |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in models:
        for row in rows:
            if row["model"] != model:
                continue
            ours = row[OURS]
            ends = [f"{ours[side]['effect']:+.2f} ± {ours[side]['error']:.2f} at {ours[side]['dial']:+.3g}°"
                    for side in ("negative", "positive")]  # fmt: skip
            others = [both(row, FORMER), best_addition(row), both(row, PUBLISHED), both(row, "ablation"),
                      both(row, "system prompt")]  # fmt: skip
            shown = ["–" if each is None else f"{each:.2f}" for each in others]
            lines.append(
                f"| {model} | {row['preset']} | {ours['sites']} | {' | '.join(ends)} | **{both(row, OURS):.2f}** | "
                f"{' | '.join(shown)} |"
            )
    return lines


def choice_part(rows: Sequence[Row], models: Sequence[str]) -> list[str]:
    """Every candidate at the budget, and whether the quick choice took the best."""
    found = [(row, read(file)) for row in rows if (file := row["folder"] / "candidates.json").exists()]
    if not found:
        return []
    names = list(found[0][1])
    lines, right, lost = [], 0, []
    for model in models:
        for row, each in found:
            if row["model"] != model:
                continue
            chosen = row[OURS]["sites"].partition(",")[0]
            best = max(each.values())
            right += each[chosen] == best
            lost.append(1 - each[chosen] / best)
            cells = [
                f"**{each[name]:.2f}**" if name == chosen else f"{each[name]:.2f}" for name in names if name in each
            ]
            lines.append(f"| {model} | {row['preset']} | {' | '.join(cells)} |")
    return [
        "## Was the quick choice right",
        "",
        "The same figure for every candidate, the one that calibration chose in bold. It chose by 8 other probes at a "
        f"KL of 0.08. It took the best in {right} of {len(lost)}; where it did not, it lost "
        f"{max(lost):.0%} at most, {sum(lost) / len(lost):.1%} on average over all.",
        "",
        f"| model | preset | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
        *lines,
    ]


def texts_part(rows: Sequence[Row], models: Sequence[str]) -> list[str]:
    kinds = {"texts": "greedy", "sampled": "sampled"}
    found = [
        (row, read(file), how)
        for row in rows
        for name, how in kinds.items()
        if (file := row["folder"] / f"{name}.json").exists()
    ]
    found = [each for each in found if "judged" in each[1]]
    if not found:
        return []
    places = sorted({each["where"] for _, each, _ in found if "where" in each})
    lines = [
        "## Texts",
        "",
        "24 prompts that are in no preset, answered in 32 tokens at both ends of the budget, at half and off: "
        "greedily, and sampled at temperature 0.8, the i-th prompt with seed i. "
        "Judged by Qwen2.5-Coder-1.5B, unsteered: the share of answers whose log-odds of yes over no are higher for "
        "the positive end's name than for the negative's (\"Is the tone of this answer cheerful? Say yes or no.\"). "
        "*Wrong way*: the share of answers at an end whose score moved against the turn. Refusals are counted by their "
        "phrases, repetition is the share of repeated 4-grams. "
        + (f"\\*: on another machine ({'; '.join(places)})." if places else ""),
        "",
        "| model | preset | | judged positive at −1 | −½ | off | +½ | +1 | wrong way − / + | refusals − / off / + | "
        "repetition − / off / + |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in models:
        for row, each, how in found:
            if row["model"] != model:
                continue
            judged = each["judged"]
            shares = [
                f"{sum(score > 0 for score in judged[name]) / len(judged[name]):.0%}" if name in judged else ""
                for name in POSITIONS
            ]
            wrong = [
                f"{sum(sign * (now - off) < 0 for now, off in zip(judged[name], judged['0'], strict=True)) / 24:.0%}"
                for name, sign in (("-1", -1), ("+1", 1))
            ]
            refusals = " / ".join(str(each["refusals"][name]) for name in ("-1", "0", "+1"))
            repeated = " / ".join(f"{each['repetition'][name]:.2f}" for name in ("-1", "0", "+1"))
            cells = [
                model,
                row["preset"],
                f"{how}{' *' if 'where' in each else ''}",
                *shares,
                " / ".join(wrong),
                refusals,
                repeated,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *examples([(row, each) for row, each, how in found if how == "greedy"])]


def examples(found: Sequence[tuple[Row, Row]]) -> list[str]:
    """The first three prompts' answers of the largest model's sentiment: by rule, not by hand."""
    row, each = max(found, key=lambda pair: (pair[0]["preset"] == "sentiment", sizes.index(pair[0]["model"])))
    prompts = pick_evenly((PRESETS / "open_ended.txt").read_text(encoding="utf-8").splitlines(), 24)
    about = load_preset(row["preset"])
    lines = [f"The first three of them, {row['preset']} on {row['model']}:", ""]
    for number, prompt in enumerate(prompts[:3]):
        lines += [f"- *{prompt}*"]
        for name, end in (("-1", about.negative_name), ("0", "off"), ("+1", about.positive_name)):
            text = " ".join(each["texts"][name][number].split())
            lines += [f"  - {end} ({each['judged'][name][number]:+.1f}): {text}"]
    return lines


def cross_part(rows: Sequence[Row], models: Sequence[str]) -> list[str]:
    lines: list[str] = []
    for model in models:
        found = {
            row["preset"]: read(file)
            for row in rows
            if row["model"] == model and (file := row["folder"] / "cross.json").exists()
        }
        if not found:
            continue
        names = [name for name in preset_names() if name in found]
        lines += [
            f"### What each preset does to the others' probes, {model}",
            "",
            f"| steering \\ probes | {' | '.join(preset_names())} |",
            f"|---|{'---|' * len(preset_names())}",
            *(f"| {name} | {' | '.join(f'{found[name][other]:+.2f}' for other in preset_names())} |" for name in names),
            "",
        ]
    if not lines:
        return []
    return [
        "## Presets against each other",
        "",
        "The change of a preset's probe gap from the negative end of a steering to its positive one, at the budget (6 "
        "probes each).",
        "",
        *lines,
    ]
