"""The commands: every stage that has one, in the order of the usage."""

from pharmacist.pipeline.bench.options import BENCH
from pharmacist.pipeline.stages.align import ALIGN
from pharmacist.pipeline.stages.attack import ATTACK
from pharmacist.pipeline.stages.curate import CURATE, LABEL
from pharmacist.pipeline.stages.demo import DEMO
from pharmacist.pipeline.stages.evaluate import EVALUATE
from pharmacist.pipeline.stages.repair import REPAIR
from pharmacist.pipeline.stages.report import REPORT
from pharmacist.pipeline.stages.sweep import SWEEP


COMMANDS = {
    stage.name: stage for stage in (DEMO, CURATE, LABEL, ALIGN, ATTACK, SWEEP, REPAIR, EVALUATE, BENCH, REPORT)
}
