"""Fair comparisons of methods: the same pairs, prompts and budgets, several learning rates, several seeds.

tropd compare LAB.toml

lab.py       what is compared: testbeds x methods x learning rates x seeds
trial.py     one training run, and its outcome
runner.py    all runs, on all cores; a kill costs only the runs in flight
tables.py    means with intervals, differences from the baseline, costs
figures.py   learning curves
"""
