"""All scripts, in the order in which they run: what others read comes first."""

from __future__ import annotations

from benchmarks.paper import (
    ext01_workloads,
    ext02_condense,
    fig01_breakdown,
    fig03_similarity,
    fig04_threshold,
    fig07_embedding,
    fig10_speedup,
    fig11_reuse,
    fig12_lengths,
    fig13_dbsize,
    fig15_llama,
    gpt2_wikitext,
    sec52_embedders,
    sec53_search,
    tab02_levels,
    tab03_build,
    tab04_breakdown,
    tab05_accuracy,
    tab06_fetch,
    tab07_selective,
    tab08_sparse,
    tab09_cost,
)

__all__ = ["EXPERIMENTS"]

EXPERIMENTS = tuple(
    module.EXPERIMENT
    for module in (
        fig01_breakdown,
        fig03_similarity,
        fig12_lengths,
        fig15_llama,
        sec52_embedders,
        sec53_search,
        tab06_fetch,
        tab04_breakdown,
        tab09_cost,
        fig04_threshold,
        fig07_embedding,
        fig11_reuse,
        tab02_levels,
        tab05_accuracy,
        ext02_condense,
        gpt2_wikitext,
        fig10_speedup,
        tab07_selective,
        tab03_build,
        fig13_dbsize,
        tab08_sparse,
        ext01_workloads,
    )
)
