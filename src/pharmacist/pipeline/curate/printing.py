"""What `curate` says at the end."""

from rich.table import Table

from pharmacist.core.progress import console
from pharmacist.core.rundir import RunDir
from pharmacist.pipeline.ranking import Ranking


def show(ranking: Ranking, run: RunDir, selected: str) -> None:
    """Prints counts by reason, what the selector says of itself, where the results lie and what comes next."""
    table = Table(title=f"{len(ranking.table)} rows ranked, {int(ranking.table['selected'].sum())} selected")
    for column in ("reason", "selected", "left out"):
        table.add_column(column, justify="left" if column == "reason" else "right")
    for reason, *counts in ranking.counts().itertuples():
        table.add_row(reason, *map(str, counts))
    console().print(table)
    lines = []
    if "template_origin" in run.manifest.extra:
        lines.append(f"prompts are rendered by {run.manifest.extra['template_origin']}")
    if questions := ranking.about.get("questions"):
        told = ", ".join(f"{name} {quality['combined']['auc']:.3f}" for name, quality in questions.items())
        lines.append(f"AUC on held-out references, by question: {told}")
    if labels := ranking.about.get("labels"):
        if labels["auc_after"] is not None:
            lines.append(
                f"AUC on {labels['labels']} labelled rows: {labels['auc_before']:.3f} without labels, "
                f"{labels['auc_after']:.3f} with those of other prompts (standard error "
                f"{labels['standard_error']:.3f})"
            )
        lines.append(f"labels: {labels['advice']}")
    if changed := ranking.about.get("changed"):
        lines.append(f"labels: {changed['entered']} rows entered the selection, {changed['left']} left it")
    if len(ranking.to_label) and "labels" not in ranking.about:
        lines.append(
            f"{len(ranking.to_label)} labels would help most: pharmacist label {run.root}, or label them on the page; "
            "then the same command with --labels labels.json"
        )
    lines += [f"without more references it cannot see: {reason}" for reason in ranking.about.get("cannot_see", [])]
    lines += [f"scores {run.path('scores.parquet')}", f"core subset {run.path(selected)}"]
    lines += [f"page {run.path('report.html')}"]
    lines += [f"next: pharmacist align --data {run.path(selected)} --model MODEL --output-dir DIR"]
    for line in lines:
        console().print(line, soft_wrap=True, markup=False)
