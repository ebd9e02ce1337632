"""The commands of `tropd`, by name, and what each is for.  `tropd NAME` runs `main` of the module tropd.cli.NAME."""

from __future__ import annotations

LINES = {
    "demo": "OPD and TrOPD side by side on a small teacher and student: a minute on a laptop",
    "compare": "methods side by side: testbeds x learning rates x seeds, with intervals",
    "exact": "methods on tables of logits, where every divergence is a sum",
    "methods": "the methods: name, paper, evidence they need",
    "explain": "a method in full: equation, terms, evidence, knobs, readings",
    "doctor": "what will go wrong with a run, and what to change",
    "plan": "memory, time and servers that a run will need elsewhere",
    "train": "train from a run file",
    "resume": "go on from the newest checkpoint of a run",
    "launch": "a run as several processes: on a Ray cluster, or lines for torchrun and SLURM",
    "evaluate": "draw answers, grade them, say how sure the score is",
    "score": "what student and teacher say of rollouts in a file",
    "report": "one HTML file about one run or several: verdict, charts, tokens",
    "watch": "the same report, live in a browser while a run goes on",
    "inspect": "a step that was kept: its terms and its worst tokens",
    "export": "a checkpoint as a Hugging Face folder",
    "merge": "an adapter and its base as one plain model",
    "env": "versions and devices, and what tropd was run with: for a bug report",
    "version": "the version of tropd",
}
