"""How many parameters each part of the published model has, down to the last one."""

from collections.abc import Iterator
from dataclasses import asdict

from qvision_lab.benchmark.harness import Table, growing_table, machine
from qvision_lab.captioning import Captioner
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.parameters import parameter_table


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Count the published model's parts; no captioner takes part, and nothing is quicker."""
    parts = map(asdict, parameter_table(QVisionConfig()))
    return growing_table("parameters", parts, quick=quick, machine=machine(gpu=False))
