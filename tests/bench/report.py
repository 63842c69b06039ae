"""What `make bench` has measured, as report.json and report.md."""

import json
import statistics

SIDES = ("dbcore", "script")
# forward, and backward through the activations, of SD 1.5's UNet at 512 x 512, batch 1
STEP_FLOPS = 1.78e12
NOTES = """Both programs ran with the same base, photos, prompt, seed, resolution, batch, precision,
steps, rank and rate, in turn, each in a process of its own. steps/s leaves out the first tenth of
the steps and the last one. The script encodes its photos anew in every step, so that its encoding
is in its steps. After the steps, dbcore writes a report, here without its pictures, which the
script has not; the script loads the pipeline anew. dbcore draws class and validation pictures in
the base's recommended number of sampler steps (25, unless its folder says otherwise); the script in
50, and 25 at its end, for which it has no option."""


def write(report, folder):
    """report.json and report.md; returns the latter's text."""
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    script = report["script"]
    lines = ["# dbcore against diffusers' DreamBooth script", "", *report["machine"], "", NOTES, "",
             *(f"- {name}: {value}" for name, value in script.items())]
    lines += (growth_table(report["cases"]) if report["growth"]
              else [line for case in report["cases"] for line in table(case)])
    lines += validation_cost({case["name"]: case["medians"] for case in report["cases"]})
    if "answers" in report:
        lines += ["", "| answered after | s |", "|---|---:|",
                  *(f"| `{name}` | {seconds:.2f} |" for name, seconds in report["answers"].items())]
    if "flops" in report:
        lines += ["", f"Matrix products alone, bf16: {report['flops'] / 1e12:.0f} TFLOP/s."]
        lines += [f"{case['name']}: {side} uses {median * STEP_FLOPS / report['flops']:.0%} of it."
                  for case in
                  report["cases"] if case["name"] == "sd15" for side in SIDES
                  if (median := case["medians"][side].get("steps/s"))]
    text = "\n".join(lines)
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    return text


def table(case):
    """One case: a row a cost, lowest to highest of the rounds in brackets, and the settings."""
    rounds = len(case["runs"]["dbcore"])
    lines = ["", f"## {case['name']}: {case['title']}", "",
             f"| median of {rounds} | dbcore | script | dbcore better by |", "|---|---:|---:|---:|"]
    for name in dict.fromkeys(name for side in SIDES for name in case["medians"][side]):
        values = [[run[name] for run in case["runs"][side] if name in run] for side in SIDES]
        cells = [f"{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})" if v else "-"
                 for v in values]
        lines.append(f"| {name} | {' | '.join(cells)} | {better(name, case['medians'])} |")
    shown = (f"{who}: `{' '.join(words(case[who]))}`" for who in ("both", *SIDES) if case[who])
    return [*lines, "", "Options of " + "; of ".join(shown) + "."]


def validation_cost(medians):
    """What drawing on the way costs: the whole command of `validation` less that of `toy`."""
    if not {"toy", "validation"} <= set(medians):
        return []
    ours, theirs = (medians["validation"][side]["whole command, s"]
                    - medians["toy"][side]["whole command, s"]
                    for side in SIDES)
    return ["", f"Drawing 4 pictures twice costs dbcore {ours:.1f} s, the script {theirs:.1f} s."]


def better(name, medians):
    ours, theirs = (medians[side].get(name) for side in SIDES)
    if not ours or not theirs:
        return "-"
    return f"{ours / theirs if name == 'steps/s' else theirs / ours:.2f} x"


def growth_table(cases):
    """A row a value of a knob; in each cell dbcore, then the script."""
    costs = list(dict.fromkeys(name for case in cases for side in SIDES
                               for name in case["medians"][side]))
    lines = ["", "| dbcore / script | " + " | ".join(costs) + " |", "|---|" + "---:|" * len(costs)]
    for case in cases:
        cells = [" / ".join(f"{case['medians'][side][name]:.2f}" if name in case["medians"][side]
                            else "-"
                            for side in SIDES) for name in costs]
        lines.append(f"| {case['title']} | {' | '.join(cells)} |")
    return lines


def words(options):
    """{"rank": 4, "gradient_checkpointing": True} as --rank 4 --gradient_checkpointing."""
    return [word for name, value in options.items()
            for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]
