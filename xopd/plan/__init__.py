"""What fits on a cluster, and how long a step takes: arithmetic from a model's configuration.

`model_shape` counts a model, `Job` puts it on a `Cluster`, `rank_memory` and `step_time` plan it,
and `plan_text` prints both. `planned_cpu_step` is the same arithmetic for one process on a CPU,
where it can be measured.
"""

from xopd.plan.cluster import GPUS, Cluster, Gpu
from xopd.plan.errors import PlanError
from xopd.plan.job import Job, RolloutPlace, TeacherPlace
from xopd.plan.local import CpuStep, UpdateBatch, planned_cpu_step
from xopd.plan.losses import Head
from xopd.plan.memory import RankMemory, fits, largest_micro_batch, rank_memory
from xopd.plan.shape import ModelShape, model_shape, shape_of
from xopd.plan.table import plan_text
from xopd.plan.timing import StepTime, step_time

__all__ = [
    "GPUS",
    "Cluster",
    "CpuStep",
    "Gpu",
    "Head",
    "Job",
    "ModelShape",
    "PlanError",
    "RankMemory",
    "RolloutPlace",
    "StepTime",
    "TeacherPlace",
    "UpdateBatch",
    "fits",
    "largest_micro_batch",
    "model_shape",
    "plan_text",
    "planned_cpu_step",
    "rank_memory",
    "shape_of",
    "step_time",
]
