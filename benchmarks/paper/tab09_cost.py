"""Table 9: what serving on CPUs costs beside GPUs. A calculation, not a measurement: prices are inputs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.paper.alone import alone
from benchmarks.paper.experiment import Experiment, Result, table
from benchmarks.paper.workbench import Workbench

INPUTS = Path(__file__).with_name("tab09_prices.json")


def run(bench: Workbench) -> Result:
    """Calculate with the prices and rates of the file, and for the range of what memoization may save."""
    inputs = json.loads(INPUTS.read_text())
    gpu, cpu = inputs["gpu"], inputs["cpu"]
    rows = [
        {
            "saved": None,
            "cpu_tokens_per_second": cpu["tokens_per_second"],
            "cpu_machines": gpu["tokens_per_second"] / cpu["tokens_per_second"],
            "gpu_per_million": _per_million(gpu["dollars_per_hour"], gpu["tokens_per_second"]),
            "cpu_per_million": _per_million(cpu["dollars_per_hour_of_cores_alone"], cpu["tokens_per_second"]),
        }
    ]
    for saved in inputs["memoization_saves"]:
        rate = cpu["tokens_per_second"] / (1 - saved)
        needed = gpu["tokens_per_second"] / rate
        rows.append(
            {
                "saved": saved,
                "cpu_tokens_per_second": rate,
                "cpu_machines": needed,
                "gpu_per_million": _per_million(gpu["dollars_per_hour"], gpu["tokens_per_second"]),
                "cpu_per_million": _per_million(
                    cpu["dollars_per_hour"] + cpu["memory_dollars_per_hour"] * (saved > 0), rate
                ),
            }
        )
    return {"inputs": inputs, "rows": rows}


def _per_million(dollars_per_hour: float, tokens_per_second: float) -> float:
    return dollars_per_hour / 3600 / tokens_per_second * 1e6


def text(result: Result) -> str:
    """Print the inputs and what follows from them."""
    inputs = result["inputs"]
    lines = [
        [
            "nothing; cores alone are paid" if row["saved"] is None else f"{row['saved']:.0%}",
            row["cpu_tokens_per_second"],
            row["cpu_machines"],
            row["cpu_per_million"],
            row["gpu_per_million"],
            row["gpu_per_million"] / row["cpu_per_million"],
        ]
        for row in result["rows"]
    ]
    header = ["memoization saves", "tokens/s, one CPU machine", "machines for the GPUs' rate", "$/M tokens, CPU"]
    header += ["$/M tokens, GPU", "GPU / CPU"]
    given = table(
        ["input", "GPUs", "CPU machine"],
        [[name, inputs["gpu"][name], inputs["cpu"].get(name)] for name in inputs["gpu"]],
    )
    extra = f"More memory for the store: {inputs['cpu']['memory_dollars_per_hour']:g} $/h. {inputs['note']}"
    return f"Inputs (`tab09_prices.json`, to be replaced by one's own):\n\n{given}\n{extra}\n\n" + table(header, lines)


EXPERIMENT = Experiment(
    name="tab09_cost",
    where="Table 9",
    title="Cost of serving on CPUs and on GPUs",
    paper="LLaMA-65B: 5.54 tokens/s on four instances of two A10 GPUs, 1.01 on one CPU instance, 6.06 on six; "
    "six CPU instances cost 1.29 times less to buy and 1.8 times less to rent.",
    differs="Nothing is measured: no GPU and no such model is at hand. The paper's rates are kept, prices "
    "are inputs. Rates are of decoding, where memodb does not memoize (a step computes one row of "
    "attention): what memoization saves is an assumption. The paper's ratio of 1.8 follows from its rates if the CPU "
    "machine costs 1.60 $/h, which is its 64 cores at 0.025 $/h and nothing for 1 TB of memory; the "
    "second row pays for it. More memory, for the store, is paid where memoization saves something. After an edit of "
    "the "
    "prices, run this script again.",
    calculated=True,
    version=2,
    data=False,
    run=run,
    text=text,
)

if __name__ == "__main__":
    sys.exit(alone(EXPERIMENT))
