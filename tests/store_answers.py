"""Ask the toy world the course's questions and store the answers: `make answers`, some 80 minutes
on one core.

Each question is one `dbcore toybench` command. What it finds goes to data/toybench_results.json,
from which data/results/answers.md and notebook 07 have their tables; runs and pictures stay in
work_dirs/answers, so that a stopped run goes on.
"""

import json
import shlex
import sys
from pathlib import Path

import dbcore
from dbcore.__main__ import main
from dbcore.tools.evaluate import cell
from dbcore.toybench.bench import COPIES, PROMPT, SUBJECT

RESULTS = dbcore.DATA / "toybench_results.json"
WORK = "work_dirs/answers"
ANSWERS = dbcore.DATA / "results" / "answers.md"
START, END = "<!-- answers: made by make answers -->", "<!-- end of answers -->"
SHOWN = {SUBJECT: "right subject", "subject, subject encoder": "subject",
         "prompt, clip_image": "CLIP-T",
         PROMPT: "right prompt", "PRES, subject encoder": "PRES", "DIV, subject encoder": "DIV",
         COPIES: "copies"}
SIZE = "--num_subjects 6 --num_prompts 8 --num_images 2", WORK
SIZES = {"prior": ("--quick", f"{WORK}/quick"),  # where it is not SIZE
         "newer methods": ("--num_subjects 6 --num_prompts 4 --num_images 2", f"{WORK}/newer")}
SHORT, SHORTER = "--max_train_steps 60", "--max_train_steps 40"
RATE = "3e-3"  # the UNet's, as the toy base recommends it


def each(option, values, more=SHORT):
    """Ways to train that differ in one option."""
    return {f"{value}": f"{more} {option} {value}" for value in values}


QUESTIONS = {  # the first way is the one that the others are compared with
    "prior": {"with": "--with_prior_preservation", "without": ""},
    "text encoder": {"UNet only": SHORT, "own rate": f"{SHORT} --train_text_encoder",
                     "shared rate": f"{SHORT} --train_text_encoder --text_encoder_lr {RATE}"},
    "rank": each("--rank", (4, 1, 2, 8, 16, 32)),
    "rate": each("--learning_rate", ("2e-4", "5e-5", "5e-4", "1e-3", "1.5e-3", RATE)),
    "steps": each("--max_train_steps", (150, 25, 50, 100, 400, 800), more=""),
    "photos": each("--num_photos", (5, 1, 3, 10)),
    "words": {"sks and noun": f"{SHORT} --instance_prompt 'a photo of sks {{class}}'",
              "no noun": f"{SHORT} --instance_prompt 'a photo of sks'",
              "wrong noun": f"{SHORT} --instance_prompt 'a photo of sks robot'",
              "common word": f"{SHORT} --instance_prompt 'a photo of snow {{class}}'",
              "random letters": f"{SHORT} --instance_prompt 'a photo of xjqv {{class}}'"},
    "method": {"LoRA": SHORT, "DoRA": f"{SHORT} --use_dora", "rsLoRA": f"{SHORT} --use_rslora",
               "min-SNR": f"{SHORT} --snr_gamma 5",
               "all layers": f"{SHORT} --lora_layers all",
               "batch 1": f"{SHORT} --train_batch_size 1",
               **{f"full {rate}": f"{SHORT} --full_finetuning --learning_rate {rate}"
                  for rate in ("5e-5", "2e-4")}},
    "newer methods": {
        "LoRA": SHORTER,
        "class images": f"{SHORTER} --with_prior_preservation --num_class_images 24",
        "prior prediction": f"{SHORTER} --prior_prediction",
        "caption dropout": f"{SHORTER} --caption_dropout 0.1",
        "logit-normal": f"{SHORTER} --weighting_scheme logit_normal",
        "T-LoRA": f"{SHORTER} --use_tlora",
        "pivotal": f"{SHORTER} --train_text_encoder_ti --token_abstraction sks",
        # adapters at the rates nearest to LoRA's fidelity, of those that were tried
        "OFT": f"{SHORTER} --adapter oft --learning_rate 1e-3",
        "LoKr": f"{SHORTER} --adapter lokr --learning_rate 1e-2",
        "LoHa": f"{SHORTER} --adapter loha --learning_rate 1e-2",
        "DoRA": f"{SHORTER} --use_dora",
        "schedule-free": f"{SHORTER} --optimizer AdamWScheduleFree",
        "Prodigy": f"{SHORTER} --optimizer Prodigy --learning_rate 1"},
}


def ask(question):
    """One question's {"command", "table", "mean", "differences"}, all of them toybench's."""
    size, folder = SIZES.get(question, SIZE)
    ways = " ".join(f"--vary {shlex.quote(f'{name}={options}')}"
                    for name, options in QUESTIONS[question].items())
    command = f"toybench {size} {ways} --output_dir {folder}"
    main(shlex.split(command))
    found = json.loads(Path(folder, "toybench.json").read_text(encoding="utf-8"))
    table = Path(folder, "toybench.md").read_text(encoding="utf-8")
    return {"command": f"python -m dbcore {command}", "table": table, "mean": found["mean"],
            "differences": found["differences"]}


def summary(answers):
    """Markdown for data/results/answers.md: one row a way to train, the measures that tell most."""
    lines = ["| question | way to train | " + " | ".join(SHOWN.values()) + " |",
             "|---|---|" + "---:|" * len(SHOWN)]
    for question, answer in answers.items():
        # a new way is not asked yet
        for way in (way for way in QUESTIONS[question] if way in answer["mean"]):
            # copies were not counted from the beginning
            cells = [cell(answer["mean"][way].get(measure)) for measure in SHOWN]
            lines.append(f"| {question} | {way} | " + " | ".join(cells) + " |")
            question = ""  # once for all its rows
    return "\n".join(lines)


def store(answers):
    """The answers into data/, their summary into ANSWERS."""
    RESULTS.write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")
    text = ANSWERS.read_text(encoding="utf-8")
    before, after = text[:text.index(START) + len(START)], text[text.index(END):]
    ANSWERS.write_text(f"{before}\n{summary(answers)}\n{after}", encoding="utf-8")


if __name__ == "__main__":
    answers = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for question in sys.argv[1:] or QUESTIONS:
        answers[question] = ask(question)
        store({name: answers[name] for name in QUESTIONS if name in answers})
