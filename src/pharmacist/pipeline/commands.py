"""The commands: every stage that has one, in the order of the usage."""

from pharmacist.pipeline.bench.options import BenchOptions
from pharmacist.pipeline.demo import DemoOptions
from pharmacist.pipeline.stage import Stage
from pharmacist.pipeline.stages.align import ALIGN
from pharmacist.pipeline.stages.attack import ATTACK
from pharmacist.pipeline.stages.curate import CURATE
from pharmacist.pipeline.stages.evaluate import EVALUATE
from pharmacist.pipeline.stages.label import LABEL
from pharmacist.pipeline.stages.repair import REPAIR
from pharmacist.pipeline.stages.report import REPORT
from pharmacist.pipeline.sweep import SweepOptions


DEMO = Stage(
    name="demo",
    options=DemoOptions,
    run="pharmacist.pipeline.demo:demo",
    summary="the whole story on the embedded world, offline, in minutes",
    example="pharmacist demo --output-dir runs/demo",
)
SWEEP = Stage(
    name="sweep",
    options=SweepOptions,
    run="pharmacist.pipeline.sweep:sweep",
    summary="attack in many ways and report the worst case that keeps the task",
    example="pharmacist sweep --model runs/aligned --task task.jsonl --harmful attack.jsonl --samples 640 "
    "--grid.learning_rate '[1e-4, 1e-3]' --grid.poison_ratio '[0.05, 0.1]' --evaluate.prompts prompts.jsonl "
    "--evaluate.task task-test.jsonl --evaluate.judge probe --evaluate.safe judge-safe.jsonl "
    "--evaluate.harmful judge-harmful.jsonl --output-dir runs/sweep",
)
BENCH = Stage(
    name="bench",
    options=BenchOptions,
    run="pharmacist.pipeline.bench:bench",
    summary="a grid of selectors, defenses and attacks, every stage of it once",
    example="pharmacist bench --config recipes/embedded.yaml --output-dir runs/bench",
)
COMMANDS = {
    stage.name: stage for stage in (DEMO, CURATE, LABEL, ALIGN, ATTACK, SWEEP, REPAIR, EVALUATE, BENCH, REPORT)
}
