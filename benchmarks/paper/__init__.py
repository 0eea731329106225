"""The AttMemo paper, re-measured: one script a table or figure, run by ``make paper``.

Each script measures one thing, keeps what it found as JSON with the facts of the machine, and says how to print and
draw it. ``report.py`` puts all of them beside the paper's figures, in docs/paper.md. Models and data lie in the folder
that MEMODB_EVAL_DATA names; what is measured goes through public functions of memodb and memodb_transformers alone.
"""
