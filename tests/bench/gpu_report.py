"""gpu_check.json, and gpu_check.md for people."""

import json

from bench.report import SIDES, STEP_FLOPS

TITLES = {
    "variants": "dbcore on Stable Diffusion 1.5's shape, 512 pixels, bf16, batch 1",
    "compile": "The same with --compile",
    "sdxl": "dbcore on Stable Diffusion XL's shape, 1024 pixels, bf16, batch 1",
    "flux2": "dbcore on FLUX.2 [klein] 4B's shape, 512 pixels, bf16, batch 1",
}
FAMILIES = {"variants": "sd15", "sdxl": "sdxl", "flux2": "flux2"}


def write(report, folder):
    """Both files, each whole at any time."""
    for name, text in (
        ("gpu_check.json", json.dumps(report, indent=1)),
        ("gpu_check.md", markdown(report)),
    ):
        partial = folder / f"{name}.partial"
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(folder / name)


def markdown(report):
    rows = {name: part["rows"] for name, part in report["parts"].items()}
    lines = ["# What a GPU says of dbcore", ""]
    if report["tiny"]:
        lines += ["Tiny bases and a few steps: that it runs is all that this says.", ""]
    about = next((row for row in rows.get("bases", []) if row["name"] == "machine"), {})
    lines += [f"- {line}" for line in about.get("machine", [])]
    if "flops" in about:
        lines += [f"- matrix products alone, bf16: {about['flops'] / 1e12:.0f} TFLOP/s"]
    lines += ["", "| part | outcome | s |", "|---|---|---:|"]
    lines += [
        f"| {name} | {part.get('outcome', 'waits')} | {part.get('seconds', '')} |"
        for name, part in report["parts"].items()
    ]
    lines += tests(rows.get("tests", []))
    lines += in_turn(rows.get("plain", []) + rows.get("script", []))
    for name, title in TITLES.items():
        if rows.get(name):
            lines += [
                "",
                f"## {title}",
                "",
                *alone(rows[name], about.get("flops") if name in ("variants", "compile") else None),
            ]
    lines += forecasts(rows)
    lines += failures(report["parts"])
    return "\n".join(lines)


def tests(rows):
    if not rows:
        return []
    passed = sum(row["outcome"] == "passed" for row in rows)
    lines = [
        "",
        "## Tests marked gpu",
        "",
        f"{passed} of {len(rows)} passed.",
        "",
        "| test | outcome | s |",
        "|---|---|---:|",
    ]
    return lines + [f"| {row['test']} | {row['outcome']} | {row['seconds']} |" for row in rows]


def in_turn(rows):
    """dbcore and the script: a row a cost; of a program that did not end there is none."""
    cases, lines = {}, []
    for row in rows:
        for side in SIDES:
            if side in row:
                cases.setdefault(row["name"], {})[side] = row[side]
    for case, found in cases.items():
        ours, theirs = (found.get(side, {}) for side in SIDES)
        lines += [
            "",
            f"## dbcore and diffusers' script: {case}",
            "",
            "| | dbcore | script | script / dbcore |",
            "|---|---:|---:|---:|",
        ]
        lines += [
            f"| {name} | {number(one)} | {number(other)} | {ratio(other, one)} |"
            for name in dict.fromkeys([*ours, *theirs])
            for one, other in [(ours.get(name), theirs.get(name))]
        ]
    return lines


def alone(rows, flops):
    """dbcore alone: a row a setting."""
    columns = [
        "steps/s",
        "GPU memory, GB",
        "GPU memory of the steps, GB",
        "GPU memory reserved, GB",
        "steps began after, s",
        "loss",
    ]
    lines = [
        "| setting | " + " | ".join(columns) + " | of the arithmetic limit |",
        "|---|" + "---:|" * (len(columns) + 1),
    ]
    for row in rows:
        share = (
            f"{row['steps/s'] * STEP_FLOPS / flops:.0%}"
            if flops and "steps/s" in row and "batch" not in row["name"]
            else ""
        )
        lines.append(
            f"| {row['name']} | "
            + " | ".join(number(row.get(name)) for name in columns)
            + f" | {share} |"
        )
    return lines


def forecasts(rows):
    """The forecast of a run's largest phase against what was allocated."""
    lines = []
    for part, family in FAMILIES.items():
        taken = {row["name"]: row for row in rows.get(part, [])}
        for row in rows.get("forecast", []):
            measured = taken.get(row["name"], {}).get("GPU memory, GB")
            steps = taken.get(row["name"], {}).get("GPU memory of the steps, GB")
            if row["family"] == family and measured and "steps" in row:
                whole = row[row["largest"]]
                lines.append(
                    f"| {family}, {row['name']} | {row['largest']} | {whole:.2f} | "
                    f"{measured:.2f} | {whole / measured:.2f} | "
                    f"{row['steps']:.2f} | {steps:.2f} | {row['steps'] / steps:.2f} |"
                )
    head = [
        "",
        "## Forecast and measurement, GB",
        "",
        "| run | highest in | forecast | measured | ratio | steps: forecast | measured | ratio |",
        "|---|---|" + "---:|" * 6,
    ]
    return head + lines if lines else []


def failures(parts):
    lines = []
    for name, part in parts.items():
        wrong = [
            (row.get("name") or row.get("test"), row.get("error") or row.get("words"))
            for row in part["rows"]
            if "error" in row or row.get("outcome") == "failed"
        ]
        if "last words" in part and not wrong:
            wrong = [("", part["last words"])]
        for what, words in wrong:
            lines += ["", f"### {name}: {what}", "", "```", words.strip()[-1500:], "```"]
    return ["", "## What failed", *lines] if lines else []


def number(value):
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def ratio(one, other):
    return f"{one / other:.2f}" if one and other else ""
