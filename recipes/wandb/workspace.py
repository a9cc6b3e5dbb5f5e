"""Create the Hi-Merging dashboard in a W&B project: a saved view, made once.

    pip install wandb-workspaces
    python recipes/wandb/workspace.py ENTITY PROJECT

Needs: a network and `wandb login`. W&B keeps dashboards on its server and imports them only this
way. README.md in this folder shows what comes out.
"""

import sys

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

TASKS_NOTE = "One curve per task: base, its own adapter alone, merged; and the share kept."


def dashboard(entity: str, project: str) -> ws.Workspace:
    """Return the view; nothing is sent before `save()`."""
    return ws.Workspace(
        name="Hi-Merging",
        entity=entity,
        project=project,
        sections=[
            ws.Section(
                name="Does it merge?",
                is_open=True,
                panels=[
                    wr.LinePlot(
                        title="score of the merged adapter",
                        x="train/global_step",
                        y=["himerge/score", "himerge/best_score"],
                    ),
                    wr.LinePlot(
                        title="share of each source kept",
                        x="train/global_step",
                        metric_regex="himerge/kept/.*",
                    ),
                    wr.ScalarChart(title="best score", metric="himerge/best_score"),
                ],
            ),
            ws.Section(
                name="Which layers fight?",
                is_open=True,
                panels=[
                    wr.MediaBrowser(media_keys=["himerge/heatmap_image"]),
                    wr.MediaBrowser(media_keys=["himerge/conflict_image"]),
                    wr.LinePlot(
                        title="layers by kind of conflict",
                        x="himerge/round",
                        metric_regex="himerge/conflicts/.*",
                    ),
                    wr.WeavePanelSummaryTable(table_name="himerge/contributions"),
                ],
            ),
            ws.Section(
                name="Every task",
                panels=[
                    wr.MarkdownPanel(markdown=TASKS_NOTE),
                    wr.LinePlot(x="himerge/round", metric_regex="himerge/merged/.*"),
                    wr.LinePlot(x="himerge/round", metric_regex="himerge/alone/.*"),
                    wr.LinePlot(x="himerge/round", metric_regex="himerge/base/.*"),
                ],
            ),
            ws.Section(
                name="What it costs",
                panels=[
                    wr.LinePlot(x="himerge/round", y=["himerge/seconds"]),
                    wr.LinePlot(x="himerge/round", y=["himerge/scores_computed"]),
                ],
            ),
        ],
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(dashboard(sys.argv[1], sys.argv[2]).save().url)
