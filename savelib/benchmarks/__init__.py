"""Benchmarks of reward models by name. Each gives rows (hub id or local file) and figures (of scores)."""

from savelib.benchmarks import judgebench, ppe, rewardbench, rewardbench2, rmbench
from savelib.benchmarks.rows import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        rewardbench.BENCHMARK,
        rewardbench2.BENCHMARK,
        rmbench.BENCHMARK,
        ppe.PREFERENCE,
        ppe.CORRECTNESS,
        judgebench.BENCHMARK,
    )
}
