"""The charts of a report, in reading order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tropd.report.asked_for import ASKED_FOR
from tropd.report.charts import (
    Chart,
    alarm_names,
    chart_as_data,
    evaluated,
    every,
    fixed,
    of_followers,
    of_teachers,
    positions,
    probes,
    ratio_quantiles,
)
from tropd.report.history import History

SECTIONS = {
    "Learning": "Is the student becoming better, and what pulls it?",
    "Trust": "How far the teacher is from what the student writes. x is the teacher's log-probability of a written "
    "token minus the student's: below 0 the teacher finds it less likely than the student does.",
    "Support": "Do the two models look at the same next tokens, and how sure are they?",
    "Text": "What the student writes, before anything is learned from it.",
    "Machine": "The optimiser's steps and where the time goes.",
    "Alarms": "Signs that a run has gone wrong, with their likely causes.",
}

CHARTS = (
    Chart(
        id="accuracy",
        section="Learning",
        title="Held-out score",
        about="Score on held-out prompts after so many steps; bars are 95 % intervals over prompts.",
        kind="scores",
        lines=evaluated,
    ),
    Chart(
        id="reward",
        section="Learning",
        title="Reward of the rollouts",
        about="Mean reward that the grader gives the rollouts of a step, on training prompts.",
        lines=probes(reward__mean="mean reward"),
    ),
    Chart(
        id="shares",
        section="Learning",
        title="What each term trains on",
        about="Share of the written tokens that each term of the objective touches; what is missing to 100 % is "
        "trained by no term.",
        kind="stacked",
        lines=every("share/", ("trusted", "outlier", "guidance")),
        format="share",
    ),
    Chart(
        id="losses",
        section="Learning",
        title="Loss of each term",
        about="Each term's part of the loss; a policy-gradient term has no target value, so only sudden change means "
        "something.",
        lines=every("loss/", ("trusted", "outlier", "guidance")),
        zero=False,
    ),
    Chart(
        id="trust",
        section="Trust",
        title="Trust share and total variation",
        about="Mean of min(teacher's probability / student's, 1) over the student's tokens: the share that the teacher "
        "would have accepted. 1 minus it estimates the total variation between the two models.",
        lines=probes(trust__share="trusted share", trust__tv="total variation"),
        format="share",
    ),
    Chart(
        id="teachers",
        section="Trust",
        title="Total variation to each teacher",
        about="Where a run has several teachers: how far the student is from each, on the prompts that are its own.",
        lines=of_teachers("trust/tv"),
        format="share",
    ),
    Chart(
        id="followed",
        section="Trust",
        title="Divergence from a teacher that follows",
        about="Estimated KL of the student to what its teacher has become: the mean of minus x.",
        lines=of_followers("kl"),
        format="nats",
    ),
    Chart(
        id="shock",
        section="Trust",
        title="Jump when the teacher is copied",
        about="By how much that divergence changes from the step before a copy to the step after it.",
        lines=of_followers("shock"),
        format="nats",
        rests=True,
    ),
    Chart(
        id="ratio",
        section="Trust",
        title="Log-ratio of the written tokens",
        about="The inner band holds 90 % of the tokens' x, the outer one 98 %, the dotted lines all of them.",
        kind="band",
        lines=ratio_quantiles,
        format="nats",
    ),
    Chart(
        id="tail",
        section="Trust",
        title="Tokens far outside",
        about="Share of tokens that the teacher finds at least e⁵ = 148 times less likely than the student, and of "
        "those that it finds impossible.",
        lines=probes(**{"ratio__below_-5": "x below −5", "ratio__infinite": "teacher says impossible"}),
        format="share",
    ),
    Chart(
        id="places",
        section="Trust",
        title="Where in the answer they differ",
        about="Total variation by part of the answer, from its beginning (bottom) to its end (top).",
        kind="heat",
        lines=positions("tv"),
        format="share",
    ),
    Chart(
        id="overlap",
        section="Support",
        title="Overlap of the likeliest tokens",
        about="Top-k tokens that both models share, and the probability that each puts on the other's top-k.",
        lines=probes(
            overlap__top_k="shared top-k",
            mass__student_in_teacher_top_k="student on the teacher's",
            mass__teacher_in_student_top_k="teacher on the student's",
        ),
        format="share",
    ),
    Chart(
        id="shared",
        section="Support",
        title="Probability of the shared tokens",
        about="What each model gives to the top-k tokens that both share.",
        lines=probes(mass__student_shared="student", mass__teacher_shared="teacher"),
        format="share",
    ),
    Chart(
        id="entropy",
        section="Support",
        title="Entropy",
        about="Mean entropy of the next token in nats, and the mean absolute gap between the two models.",
        lines=probes(entropy__student="student", entropy__teacher="teacher", entropy__gap="gap"),
        format="nats",
    ),
    Chart(
        id="length",
        section="Text",
        title="Length of the answers",
        about="Tokens of an answer: the mean and the longest of a step, and the horizon where it was below the limit.",
        lines=probes(length__mean="mean", length__max="longest", rollout__horizon="horizon"),
        format="tokens",
    ),
    Chart(
        id="finish",
        section="Text",
        title="Cut off and repeating",
        about="Share of answers that ran into the limit, and mean share of repeated 4-grams in an answer.",
        lines=probes(finish__truncated="cut off", repetition__4gram="repeated 4-grams"),
        format="share",
    ),
    Chart(
        id="authors",
        section="Text",
        title="Who wrote the tokens",
        about="Response tokens of a step by author; the teacher writes prefixes only where the method asks for them.",
        kind="stacked",
        lines=fixed(tokens__student="student", tokens__teacher="teacher"),
        format="tokens",
    ),
    Chart(
        id="gradient",
        section="Machine",
        title="Gradient norm before clipping",
        about="Length of the gradient as it came, on a logarithmic axis.",
        lines=fixed(gradient_norm="gradient norm"),
        log=True,
        zero=False,
    ),
    Chart(
        id="seconds",
        section="Machine",
        title="Seconds of each phase",
        about="Where the time of a step goes.",
        kind="stacked",
        lines=every("seconds/", ("rollout", "score", "train", "sync", "record", "evaluate")),
        format="seconds",
    ),
    Chart(
        id="speed",
        section="Machine",
        title="Tokens per second",
        about="Prompt and response tokens of a step over its whole time.",
        lines=fixed(tokens_per_second="tokens per second"),
        format="tokens",
    ),
    Chart(
        id="mismatch",
        section="Machine",
        title="Sampler against trainer",
        about="Mean absolute difference between the log-probabilities of who sampled and who trains; 0 is perfect.",
        lines=probes(mismatch__behavior="mean difference"),
        format="nats",
    ),
    Chart(
        id="staleness",
        section="Machine",
        title="Drift of what was written ahead",
        about="By how much the student has moved since its rollouts were written: mean absolute difference between "
        "the log-probabilities with which their tokens were drawn and those of training.",
        lines=probes(staleness__drift="mean difference"),
        format="nats",
    ),
    Chart(
        id="rate",
        section="Machine",
        title="Learning rate",
        about="The optimiser's learning rate at each step.",
        lines=fixed(learning_rate="learning rate"),
    ),
    *ASKED_FOR,
    Chart(
        id="alarms",
        section="Alarms",
        title="When alarms were raised",
        about="Each mark is a stretch of steps with that alarm.",
        kind="marks",
        lines=alarm_names,
    ),
)


def charts_of(runs: Sequence[History]) -> list[dict[str, Any]]:
    """With several runs, a chart of a few lines becomes one chart for each line, so that runs can be compared."""
    drawn = []
    for chart in CHARTS:
        lines = chart.lines(runs) if chart.kind == "lines" and len(runs) > 1 and chart.id != "losses" else []
        if len(lines) < 2:
            drawn.append(chart_as_data(chart, runs))
            continue
        for number, line in enumerate(lines):
            title = f"{chart.title}: {line.label}"
            single = replace(chart, id=f"{chart.id}-{number}", title=title, lines=lambda _, line=line: [line])
            drawn.append(chart_as_data(single, runs))
    return [chart for chart in drawn if chart is not None]
