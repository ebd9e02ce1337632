"""The charts of the probes that a run file asks for by name; they may rest between steps."""

from __future__ import annotations

from tropd.report.charts import Chart, probes

ASKED_FOR = (
    Chart(
        id="unchanged",
        section="Machine",
        title="Weights that stay",
        about="Share of the weights whose value in bfloat16 is as before, by the probes change and geometry.",
        lines=probes(change__unchanged_bf16="since the start", geometry__unchanged_bf16="in an update"),
        format="share",
        rests=True,
    ),
    Chart(
        id="moved",
        section="Machine",
        title="Size of the change",
        about="Of a few matrices since the start: sum of all changes over the sum of all weights, and the norm of the "
        "change of the singular values over theirs.",
        lines=probes(change__moved="weights", change__drift="singular values"),
        rests=True,
    ),
    Chart(
        id="directions",
        section="Machine",
        title="Directions of the change",
        about="How much of the strongest directions of the change since the start lies in those that it had at the "
        "first look. 1 is all.",
        lines=probes(change__sim="similarity"),
        format="share",
        rests=True,
    ),
    Chart(
        id="angle",
        section="Machine",
        title="Turn of the matrices",
        about="The largest angle in degrees between the strongest directions of a matrix at the start and now.",
        lines=probes(change__angle="angle"),
        rests=True,
    ),
    Chart(
        id="rank",
        section="Machine",
        title="Stable rank of the change",
        about="Squared Frobenius norm of the change since the start over that of its largest singular value.",
        lines=probes(change__stable_rank="stable rank"),
        rests=True,
    ),
    Chart(
        id="rock",
        section="Trust",
        title="Listed types of tokens",
        about="Estimated KL where the student wrote one of the listed types, and elsewhere, by the probe rock.",
        lines=probes(rock__kl="listed", rock__others="others"),
        format="nats",
        rests=True,
    ),
)
