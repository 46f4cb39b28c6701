"""One script for a machine with a GPU: does ARA compute there what it computes on a CPU, and how fast is the result?

    make gpu-check
    make gpu-check GPU_CHECK_FLAGS="--device cpu"       # a rehearsal without a GPU, on tiny models
    python -m benchmarks.gpu_check --only stages --results stages.json

``checks.py`` lists the checks. Each runs in a process of its own, within its share of a budget of seconds: one that
hangs or runs out of memory costs only itself. All results go into one JSON file, which is written again after every
check. The exit code is 1 if a check failed.
"""
